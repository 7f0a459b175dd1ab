"""Published tensors of a family, random and quantized as by its vendor, and their in-memory state dict."""

import zlib

import torch

import quantize
from layout import assemble

DTYPE = torch.bfloat16


def random_tensor(name, shape, kind, config):
    """Random values seeded by the name: norms around 1, matrices of scale 1/sqrt(fan in), expert ids unique per row."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if kind == "i64":
        experts = config["n_routed_experts"]
        rows = [torch.randperm(experts, generator=generator)[: shape[1]] for _ in range(shape[0])]
        return torch.stack(rows)
    x = torch.randn(shape, generator=generator)
    if "norm" in name.split(".")[-2:][0]:
        return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    if len(shape) == 1 or "embed" in name:
        return 0.5 * x
    fan_in = shape[-2] if kind == "bf16" and len(shape) == 3 and "experts" in name else shape[-1]
    return x * fan_in**-0.5


def scale_name(family):
    """Suffix of the scale next to an FP8 `weight`."""
    return getattr(family, "scale", "weight_scale_inv")


def publish(family):
    """The published tensors: random values, quantized as by the vendor."""
    out, keys, scale_inv = {}, {}, scale_name(family)
    for name, (shape, kind) in family.tensors().items():
        x = random_tensor(name, shape, kind, family.config)
        stem = name.removesuffix("weight")
        if kind == "fp8":
            out[name], out[stem + scale_inv] = quantize.encode_fp8(x)
        elif kind == "fp8_k":
            keys[name] = x
        elif kind == "fp8_v":
            k = name.replace("v_proj", "k_proj")
            pair = quantize.encode_fp8_kv(keys.pop(k), x, family.shards)
            for payload, (codes, scale) in zip((k, name), pair):
                out[payload], out[payload + "_scale_inv"] = codes, scale
        elif kind == "fp8_e8m0":
            out[name], out[stem + "scale"] = quantize.encode_fp8(x, power_of_two=True)
        elif kind == "fp4":
            out[name], out[stem + "scale"] = quantize.encode_fp4(x)
        elif kind == "int4":
            out[name + "_packed"], out[name + "_scale"] = quantize.encode_int4(x)
            out[name + "_shape"] = torch.tensor(shape, dtype=torch.int32)
        elif kind == "mxfp4":
            out[name + "_blocks"], out[name + "_scales"] = quantize.encode_mxfp4(x)
        else:
            out[name] = x.to({"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[kind])
    assert not keys
    return out


def dequantize(family, stored):
    """Published name -> plain tensor: BF16 if it was quantized, otherwise as stored."""
    out = {}
    for name, (_, kind) in family.tensors().items():
        stem = name.removesuffix("weight")
        if kind == "fp8":
            out[name] = quantize.decode_fp8(stored[name], stored[stem + scale_name(family)], DTYPE)
        elif kind == "fp8_v":
            k = name.replace("v_proj", "k_proj")
            scales = stored[k + "_scale_inv"], stored[name + "_scale_inv"]
            shards = family.shards if scales[0].shape[0] != -(-stored[k].shape[0] // quantize.BLOCK) else 1
            if shards == 1:
                out[k], out[name] = (quantize.decode_fp8(stored[n], s, DTYPE) for n, s in zip((k, name), scales))
            else:
                out[k], out[name] = quantize.decode_fp8_kv(stored[k], scales[0], stored[name], scales[1], shards, DTYPE)
        elif kind == "fp8_e8m0":
            out[name] = quantize.decode_fp8(stored[name], stored[stem + "scale"], DTYPE)
        elif kind == "fp4":
            out[name] = quantize.decode_fp4(stored[name], stored[stem + "scale"], DTYPE)
        elif kind == "int4":
            out[name] = quantize.decode_int4(stored[name + "_packed"], stored[name + "_scale"], DTYPE)
        elif kind == "mxfp4":
            out[name] = quantize.decode_mxfp4(stored[name + "_blocks"], stored[name + "_scales"], DTYPE)
        elif kind != "fp8_k":
            out[name] = stored[name]
    return out


def in_memory(family, stored):
    """The in-memory state dict of published tensors, with the dtypes of a view."""
    places = []
    for name, matrix in dequantize(family, stored).items():
        place = family.place(name)
        for one in place if isinstance(place, list) else [place]:
            if one is not None:
                assert one.name and "None" not in one.name, f"`{name}` has no rule"
                places.append((one, matrix))
    return assemble(places)


def plain_config(config):
    """`config` without `quantization_config`, nested ones included."""
    return {k: plain_config(v) if isinstance(v, dict) else v for k, v in config.items() if k != "quantization_config"}
