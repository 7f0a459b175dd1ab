"""Quantizes golden native tensors with PyTorch, by the formulas of the published formats.

    python tests/golden/make_back.py

writes `<model>/hf.fp8.safetensors` for each model that is published as FP8 in 128x128 blocks with F32 scales: payload and
scale of every tensor that the published layout quantizes. Scale: amax / 448, or 1 for a block of zeros; code: x / scale,
clamped to 448, rounded to nearest even. MiMo's K and V share the blocks of their fused shards.
"""

import pathlib

import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
BLOCK = 128
LARGEST = 448.0


def quantize(matrix):
    """[rows, cols] of any float -> codes [rows, cols], scales [blocks of rows, blocks of cols]."""
    x = matrix.float()
    rows, cols = x.shape
    scales = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            box = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale = x[box].abs().amax() / LARGEST
            scale = torch.where(scale == 0, torch.ones(()), scale)
            scales[i, j] = scale
            codes[box] = (x[box] / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes, scales


def quantize_pair(k, v, shards):
    """Quantizes the K and V rows of each shard as one matrix, then splits the result."""
    out = [[], [], [], []]
    k_blocks = -(-(k.shape[0] // shards) // BLOCK)
    for a, b in zip(k.chunk(shards), v.chunk(shards)):
        codes, scales = quantize(torch.cat([a, b]))
        parts = codes[: a.shape[0]], codes[a.shape[0] :], scales[:k_blocks], scales[k_blocks:]
        for have, part in zip(out, parts):
            have.append(part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part)
    k_codes, v_codes, k_scales, v_scales = (torch.cat(part) for part in out)
    return k_codes.view(torch.float8_e4m3fn), v_codes.view(torch.float8_e4m3fn), k_scales, v_scales


def experts(native, prefix):
    """Yields (expert, gate, up, down), each matrix [out, in], from the grouped tensors under `prefix`."""
    gate_and_up = native[prefix + "gate_and_up_projs"]
    down = native[prefix + "down_projs"]
    for e in range(gate_and_up.shape[0]):
        gate, up = gate_and_up[e].T.chunk(2)
        yield e, gate, up, down[e].T


def layers(native, suffix):
    """Names of the layers that have a tensor with this suffix."""
    return [name.removesuffix(suffix) for name in sorted(native) if name.endswith(suffix)]


def mimo(native):
    out = {}

    def put(name, codes, scales):
        out[name + ".weight"] = codes.contiguous()
        out[name + ".weight_scale_inv"] = scales.contiguous()

    for layer in layers(native, ".self_attn.q_proj.weight"):
        attention = layer + ".self_attn."
        put(attention + "q_proj", *quantize(native[attention + "q_proj.weight"]))
        k, v = (native[attention + name + ".weight"] for name in ("k_proj", "v_proj"))
        k_codes, v_codes, k_scales, v_scales = quantize_pair(k, v, 2)
        put(attention + "k_proj", k_codes, k_scales)
        put(attention + "v_proj", v_codes, v_scales)
        for name in ("gate_proj", "up_proj", "down_proj"):
            if f"{layer}.mlp.{name}.weight" in native:
                put(f"{layer}.mlp.{name}", *quantize(native[f"{layer}.mlp.{name}.weight"]))
    for layer in layers(native, ".mlp.experts.down_projs"):
        prefix = layer + ".mlp.experts."
        for e, gate, up, down in experts(native, prefix):
            for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                put(f"{prefix}{e}.{name}", *quantize(matrix))
    return out


def deepseek_base(native):
    out = {}

    def put(name, matrix):
        codes, scales = quantize(matrix)
        out[name + ".weight"] = codes.contiguous()
        out[name + ".scale"] = scales.contiguous()

    for layer in layers(native, ".self_attn.wq_a.weight"):
        hf = layer.removeprefix("model.").replace("mtp.layers.", "mtp.") + "."
        layer += "."
        for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
            put(f"{hf}attn.{name}", native[f"{layer}self_attn.{name}.weight"])
        indexer = layer + "self_attn.compressor.indexer.wq_b.weight"
        if indexer in native:
            put(hf + "attn.indexer.wq_b", native[indexer])
        shared = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
        for name, long in shared.items():
            put(f"{hf}ffn.shared_experts.{name}", native[f"{layer}mlp.shared_experts.{long}.weight"])
        for e, gate, up, down in experts(native, layer + "mlp.experts."):
            for name, matrix in (("w1", gate), ("w3", up), ("w2", down)):
                put(f"{hf}ffn.experts.{e}.{name}", matrix)
    for name in ("e_proj", "h_proj"):
        put("mtp.0." + name, native[f"mtp.layers.0.{name}.weight"])
    return out


if __name__ == "__main__":
    for model, make in (("mimo-v2-flash", mimo), ("deepseek-v4-base", deepseek_base)):
        native = load_file(HERE / model / "native.safetensors")
        save_file(make(native), HERE / model / "hf.fp8.safetensors", metadata={"format": "pt"})
