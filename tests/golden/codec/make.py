"""Writes codec.safetensors: results of PyTorch on CPU for decoding, encoding and casting.

    pip install torch safetensors numpy
    python make.py
"""

import numpy as np
import torch
from safetensors.torch import save_file

F32 = torch.float32
generator = torch.Generator().manual_seed(20)


def bits(words):
    """F32 values with these bits."""
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32).copy())


# Scales: ordinary ones, and the extreme values of F32.
scales = torch.cat([
    torch.rand(40, generator=generator, dtype=F32) * 1e-2,
    -torch.rand(4, generator=generator, dtype=F32),
    2.0 ** torch.arange(-8, 8, dtype=F32),
    bits([0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x00000000]),
])

codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
e4m3 = codes.to(F32)[None, :] * scales[:, None]
int4 = torch.arange(-8, 8, dtype=F32)[None, :] * scales[:, None]
e2m1_values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=F32)
e2m1 = torch.cat([e2m1_values, -e2m1_values])[None, :] * scales[:, None]

# Values to encode, including every tie between two neighbouring codes under scale 1.
grid = codes.to(F32)[:0x7F]
ties = (grid[1:] + grid[:-1]) / 2
halves = torch.arange(-20, 21, dtype=F32) / 2
special = torch.tensor([0.0, -0.0, 1e-45, 448.0, 449.0, 464.0, 1e30, -1e30, 3.4e38], dtype=F32)
numbers = torch.cat([ties, -ties, halves, special, torch.randn(1713, generator=generator, dtype=F32) * 8])
encode_scales = torch.tensor([1.0, 0.3, 0.017, 1e-10, 2.0**-20, 7.0], dtype=F32)
quotients = numbers[None, :] / encode_scales[:, None]

everything = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64)
everything = torch.cat([bits(everything.to(torch.int32).numpy().view(np.uint32)), scales, numbers])

save_file(
    {
        "scales": scales,
        "e4m3.bf16": e4m3.to(torch.bfloat16),
        "e4m3.f16": e4m3.to(torch.float16),
        "int4.bf16": int4.to(torch.bfloat16),
        "e2m1.bf16": e2m1.to(torch.bfloat16),
        "numbers": numbers,
        "encode.scales": encode_scales,
        "encode.e4m3": quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
        "encode.int4": (quotients.round().clamp(-8, 7) + 8).to(torch.uint8),
        "cast.f32": everything,
        "cast.bf16": everything.to(torch.bfloat16),
        "cast.f16": everything.to(torch.float16),
        "cast.e8m0": everything.to(torch.float8_e8m0fnu).view(torch.uint8),
    },
    "codec.safetensors",
)
