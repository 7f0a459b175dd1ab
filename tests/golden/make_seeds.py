"""Golden data of the five families in `../reference/families.py`: checkpoints, and Automodel's native tensors.

    python make_seeds.py [DIR]

writes under DIR, by default the directory of this file, for each folder

    checkpoint/                     the checkpoint as its vendor publishes it
    native.safetensors              every native tensor
    to_hf.listing.json              name -> dtype and shape of what the adapter's `to_hf` returns, plain and quantized

and once each

    mimo-v2-flash/native.automodel.safetensors  K and V of the layers whose scales Automodel reads differently
    kimi-k25-vl/hf.int4.safetensors             `to_hf` with INT4 quantization

Needs `torch`, `safetensors` and `nemo-automodel` 0.7.0. Runs on CPU and writes the same bytes on every run. Run
`make_back.py` afterwards.

The tensors are random, seeded by their names. Expert 0 of layer 1 also has values that random data lacks, see `add_codes`.
Before anything is written, the adapter's output is compared bit for bit with the same conversion done here. There are two
known differences: Automodel decodes FP4 code 8 to +0.0, and it reads MiMo's fused K/V scales on a plain grid.
native.safetensors has Automodel's zeros, and K and V decoded on the fused grid.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from nemo_automodel.components.models.deepseek_v4.state_dict_adapter import DeepSeekV4StateDictAdapter
from nemo_automodel.components.models.kimi_k25_vl.state_dict_adapter import KimiK25VLStateDictAdapter
from nemo_automodel.components.models.mimo_v2_flash.state_dict_adapter import MiMoV2FlashStateDictAdapter
from nemo_automodel.components.models.qwen3_vl_moe.state_dict_adapter import Qwen3VLMoeStateDictAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))

import quantize  # noqa: E402
from checkpoint_io import read_checkpoint, write_checkpoint  # noqa: E402
from families import FAMILIES  # noqa: E402
from layout import rename  # noqa: E402
from make_models import compare, group, same, save  # noqa: E402
from publish import DTYPE, dequantize, publish  # noqa: E402

# Folder -> family and adapter.
SEEDS = {
    "mimo-v2-flash": ("mimo-v2-flash", MiMoV2FlashStateDictAdapter),
    "deepseek-v4-flash": ("deepseek-v4", DeepSeekV4StateDictAdapter),
    "deepseek-v4-base": ("deepseek-v4-base", DeepSeekV4StateDictAdapter),
    "kimi-k25-vl": ("kimi-k25-vl", KimiK25VLStateDictAdapter),
    "qwen3-vl-moe": ("qwen3-vl-moe", Qwen3VLMoeStateDictAdapter),
}

# Rules from published to native names; the first match applies. Experts are grouped afterwards.
V4_LAYER = [
    (r"attn_norm\.(.*)", r"input_layernorm.\1"),
    (r"ffn_norm\.(.*)", r"post_attention_layernorm.\1"),
    (r"attn\.attn_sink", r"self_attn.sinks_param.weight"),
    (r"attn\.indexer\.compressor\.norm\.(.*)", r"self_attn.compressor.indexer.kv_norm.\1"),
    (r"attn\.indexer\.compressor\.ape", r"self_attn.compressor.indexer.ape_param.weight"),
    (r"attn\.indexer\.compressor\.(.*)", r"self_attn.compressor.indexer.\1"),
    (r"attn\.indexer\.(.*)", r"self_attn.compressor.indexer.\1"),
    (r"attn\.compressor\.norm\.(.*)", r"self_attn.compressor.kv_norm.\1"),
    (r"attn\.compressor\.ape", r"self_attn.compressor.ape_param.weight"),
    (r"attn\.(.*)", r"self_attn.\1"),
    (r"ffn\.gate\.bias", r"mlp.gate.e_score_correction_bias"),
    (r"ffn\.shared_experts\.w1\.(.*)", r"mlp.shared_experts.gate_proj.\1"),
    (r"ffn\.shared_experts\.w3\.(.*)", r"mlp.shared_experts.up_proj.\1"),
    (r"ffn\.shared_experts\.w2\.(.*)", r"mlp.shared_experts.down_proj.\1"),
    (r"ffn\.(.*)", r"mlp.\1"),
    (r"hc_(attn|ffn)_(.*)", r"\1_hc.\2"),
    (r"hc_head_(.*)", r"hc_head.hc_\1"),
    (r"(.*)", r"\1"),
]
V4_TOP = [
    (r"embed\.(.*)", r"model.embed_tokens.\1"),
    (r"norm\.(.*)", r"model.norm.\1"),
    (r"head\.(.*)", r"lm_head.\1"),
    (r"hc_head_(.*)", r"model.hc_head.hc_\1"),
]
KIMI = [
    (r"mm_projector\.proj\.0\.(.*)", r"model.multi_modal_projector.linear_1.\1"),
    (r"mm_projector\.proj\.2\.(.*)", r"model.multi_modal_projector.linear_2.\1"),
    (r"mm_projector\.(.*)", r"model.multi_modal_projector.\1"),
    (r"(.*)", r"model.\1"),
]


def native_name(folder, name):
    if folder == "kimi-k25-vl":
        return rename(name, KIMI)
    if not folder.startswith("deepseek-v4"):
        return name
    kind, _, rest = name.partition(".")
    if kind not in ("layers", "mtp"):
        return rename(name, V4_TOP)
    index, _, rest = rest.partition(".")
    return f"{'model.layers' if kind == 'layers' else 'mtp.layers'}.{index}.{rename(rest, V4_LAYER)}"


def add_codes(folder, tensors):
    """Every code of the format in expert 0 of layer 1, in place; in MiMo under scales from zero over subnormal to overflow, NaN
    among the codes, elsewhere under ordinary scales, so that BF16 holds all values."""

    def fill(name, values):
        raw = tensors[name].view(torch.uint8).view(-1)
        raw[:] = values.repeat(raw.numel() // values.numel() + 1)[: raw.numel()]

    every = torch.arange(256, dtype=torch.uint8)
    if folder == "mimo-v2-flash":
        scales = torch.tensor([[1e-40, 3e38], [0.0, 2.0**-9 / 3]])
        for turn, part in enumerate(("gate_proj", "up_proj", "down_proj")):
            name = f"model.layers.1.mlp.experts.0.{part}.weight"
            fill(name, every)
            tensors[name + "_scale_inv"][:] = scales.rot90(turn)
    elif folder == "deepseek-v4-base":
        fill("layers.1.ffn.experts.0.w1.weight", every[(every & 0x7F) != 0x7F])
    elif folder == "deepseek-v4-flash":
        for part in ("w1", "w3", "w2"):
            fill(f"layers.1.ffn.experts.0.{part}.weight", every)
            fill(f"layers.1.ffn.experts.0.{part}.scale", torch.arange(100, 140, dtype=torch.uint8))
    elif folder == "kimi-k25-vl":
        for part in ("gate_proj", "up_proj", "down_proj"):
            fill(f"language_model.model.layers.1.mlp.experts.0.{part}.weight_packed", every)


def native(folder, family, tensors):
    """The native tensors, by our own reading of the published ones."""
    plain = dequantize(family, tensors)
    out = group({native_name(folder, name): matrix for name, matrix in plain.items()})
    if folder == "kimi-k25-vl":
        # Its adapter casts every floating-point tensor.
        out = {name: x.to(DTYPE) if x.is_floating_point() else x for name, x in out.items()}
    return out


def on_a_plain_grid(tensors, names):
    """Decodes `names` as Automodel does: blocks of 128 rows from row 0, the last scale rows unused."""
    return {name: quantize.decode_fp8(tensors[name], tensors[name + "_scale_inv"], DTYPE) for name in names}


def fused(family, tensors):
    """Names of K and V whose scales have more rows than a plain grid."""
    keys = [name for name, (_, kind) in family.tensors().items() if kind == "fp8_k"]
    rows = {name: (tensors[name].shape[0], tensors[name + "_scale_inv"].shape[0]) for name in keys}
    keys = [name for name in keys if rows[name][1] != -(-rows[name][0] // quantize.BLOCK)]
    return keys + [name.replace("k_proj", "v_proj") for name in keys]


def adapter(folder, family, checkpoint):
    config = family.config
    text = config.get("text_config", config)
    moe = SimpleNamespace(
        n_routed_experts=text.get("n_routed_experts", text.get("num_experts")),
        moe_inter_dim=text["moe_intermediate_size"],
        expert_bias=False,
        expert_activation="swiglu",
    )
    backend = SimpleNamespace(attn="sdpa", dispatcher="torch", experts="torch", enable_hf_state_dict_adapter=True)
    # The V4 adapter reads the quantization of the experts from the checkpoint at this path.
    names = SimpleNamespace(**config | {"_name_or_path": str(checkpoint), "text_config": SimpleNamespace(**text)})
    return SEEDS[folder][1](names, moe, backend, dtype=DTYPE)


def unsigned_zeros(a, b):
    """As `same`, but +0.0 equals -0.0."""
    return same(*(torch.where(x == 0, torch.zeros_like(x), x) if x.is_floating_point() else x for x in (a, b)))


def listing(tensors):
    return {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in sorted(tensors.items())}


def write_listings(listings, file):
    """Writes JSON with one tensor per line."""
    parts = []
    for key, tensors in listings.items():
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(what)}" for name, what in tensors.items())
        parts.append(f"{json.dumps(key)}: {{\n{lines}\n}}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    directory = parser.parse_args().directory
    for folder, (name, _) in SEEDS.items():
        family, target = FAMILIES[name], directory / folder
        tensors = publish(family)
        add_codes(folder, tensors)
        write_checkpoint(target / "checkpoint", family.config, tensors)
        tensors = read_checkpoint(target / "checkpoint")
        convert = adapter(folder, family, target / "checkpoint")
        theirs = convert.from_hf({name: tensor.clone() for name, tensor in tensors.items()})
        ours = native(folder, family, tensors)
        if folder == "mimo-v2-flash":
            kv = fused(family, tensors)
            compare(folder, theirs, ours | on_a_plain_grid(tensors, kv))
            save({name: theirs[name] for name in kv}, target / "native.automodel.safetensors")
            theirs |= {name: ours[name] for name in kv}
        compare(folder, theirs, ours, unsigned_zeros if folder == "deepseek-v4-flash" else same)
        save(theirs, target / "native.safetensors")
        plain, quantized = (convert.to_hf(dict(theirs), quantization=q) for q in (False, True))
        if folder == "kimi-k25-vl":
            save(quantized, target / "hf.int4.safetensors")
        listings = {"quantization=False": listing(plain), "quantization=True": listing(quantized)}
        write_listings(listings, target / "to_hf.listing.json")
        print(f"{folder}: {len(tensors)} published tensors, {len(theirs)} native ones")


if __name__ == "__main__":
    main()
