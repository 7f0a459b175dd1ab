"""Golden data of the five families in `../reference/plain_families.py`: checkpoints, and Automodel's native tensors.

    python make_models.py [DIR]

writes FAMILY/checkpoint and FAMILY/native.safetensors under DIR, by default the directory of this file. Needs `torch`,
`safetensors` and `nemo-automodel` 0.7.0. Runs on CPU and writes the same bytes on every run.

The tensors are random, seeded by their names. Expert 0 of the first layer with experts also has extreme values, which
random data lacks: every code of its format, and zero, subnormal and overflowing scales. Before anything is written, the
adapter's output is compared bit for bit with the same conversion done here.
"""

import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from nemo_automodel.components.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from nemo_automodel.components.models.glm4_moe.state_dict_adapter import Glm4MoeStateDictAdapter
from nemo_automodel.components.models.gpt_oss.state_dict_adapter import GPTOSSStateDictAdapter
from nemo_automodel.components.models.minimax_m2.state_dict_adapter import MiniMaxM2StateDictAdapter
from nemo_automodel.components.models.qwen3_moe.state_dict_adapter import Qwen3MoeStateDictAdapter
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))

from checkpoint_io import read_checkpoint, write_checkpoint  # noqa: E402
from plain_families import PLAIN_FAMILIES  # noqa: E402
from publish import DTYPE, dequantize, publish  # noqa: E402

ADAPTERS = {
    "deepseek-v3": DeepSeekV3StateDictAdapter,
    "qwen3-moe": Qwen3MoeStateDictAdapter,
    "glm4-moe": Glm4MoeStateDictAdapter,
    "minimax-m2": MiniMaxM2StateDictAdapter,
    "gpt-oss": GPTOSSStateDictAdapter,
}

# First expert matrix of each quantized family.
EXTREME = {
    "deepseek-v3": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "minimax-m2": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj",
}


def add_extremes(family, tensors):
    """Writes every code under ordinary and extreme scales into one expert, in place."""
    name = EXTREME.get(family.name)
    if name is None:
        return
    if family.name == "gpt-oss":
        blocks, scales = tensors[name + "_blocks"][0], tensors[name + "_scales"][0]
        flat = blocks.view(-1)
        flat[: 256 * 4] = torch.arange(256, dtype=torch.uint8).repeat(4)
        scales.view(-1)[:64] = torch.tensor([0, 1, 2, 64, 120, 127, 128, 140, 252, 253, 254], dtype=torch.uint8).repeat(6)[:64]
        return
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    payload = tensors[name].view(torch.uint8)
    payload[:] = codes.view(torch.uint8).repeat(payload.numel() // 256 + 1)[: payload.numel()].view(payload.shape)
    tensors[name + "_scale_inv"][:] = torch.tensor([[1e-40, 3e38], [0.0, 2.0**-9 / 3]])


def group(tensors):
    """Groups experts, one by one or stacked, as the native layout does. Other tensors are unchanged."""
    out, experts = {}, {}
    for name, matrix in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight", name)
        if match:
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
            experts.setdefault(match[1], {})[int(match[2]), part] = matrix.to(DTYPE).T
        elif name.endswith(".experts.gate_up_proj"):
            out[name.replace("gate_up_proj", "gate_and_up_projs")] = matrix
        elif name.endswith(".experts.down_proj"):
            out[name + "s"] = matrix
        else:
            out[name] = matrix
    for prefix, cells in experts.items():
        count = 1 + max(e for e, _ in cells)
        pairs = [torch.cat([cells[e, "gate_proj"], cells[e, "up_proj"]], -1) for e in range(count)]
        out[prefix + ".gate_and_up_projs"] = torch.stack(pairs)
        out[prefix + ".down_projs"] = torch.stack([cells[e, "down_proj"] for e in range(count)])
    return out


def native(family, tensors):
    """The native tensors, converted from the published ones by this script."""

    def native_name(name):
        name = name.replace(".block_sparse_moe.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")
        return name.replace(".block_sparse_moe.", ".mlp.").replace(".mlp.router.", ".mlp.gate.")

    return group({native_name(name): matrix for name, matrix in dequantize(family, tensors).items()})


def convert(family, tensors):
    """The native tensors, converted from the published ones by the adapter."""
    config = family.config
    moe = SimpleNamespace(
        n_routed_experts=next(config[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if k in config),
        moe_inter_dim=config.get("moe_intermediate_size", config["intermediate_size"]),
        expert_bias=family.name == "gpt-oss",
        expert_activation="quick_geglu" if family.name == "gpt-oss" else "swiglu",
    )
    backend = SimpleNamespace(attn="flex", dispatcher="torch", experts="torch", enable_hf_state_dict_adapter=True)
    adapter = ADAPTERS[family.name](SimpleNamespace(**config), moe, backend, dtype=DTYPE)
    return adapter.from_hf({name: tensor.clone() for name, tensor in tensors.items()})


def same(a, b):
    """Whether two tensors are equal bit for bit. Any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        nan = a.isnan() & b.isnan()
        a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def compare(name, theirs, ours, equal=same):
    """Exits with an error if names or tensors differ."""
    if set(theirs) != set(ours):
        sys.exit(f"{name}: names differ: {sorted(set(theirs) ^ set(ours))[:5]}")
    wrong = [tensor for tensor in sorted(ours) if not equal(theirs[tensor], ours[tensor])]
    if wrong:
        sys.exit(f"{name}: {len(wrong)} tensors differ: {wrong[:5]}")


def save(tensors, file):
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, file, {"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    directory = parser.parse_args().directory
    for family in PLAIN_FAMILIES:
        tensors = publish(family)
        add_extremes(family, tensors)
        target = directory / family.name
        write_checkpoint(target / "checkpoint", family.config, tensors)
        tensors = read_checkpoint(target / "checkpoint")
        theirs, ours = convert(family, tensors), native(family, tensors)
        compare(family.name, theirs, ours)
        save(theirs, target / "native.safetensors")
        print(f"{family.name}: {len(tensors)} published tensors, {len(theirs)} native ones")


if __name__ == "__main__":
    main()
