"""Quantization schemes of published checkpoints, encoding and decoding, in plain PyTorch.

Every `encode_*` takes an F32 matrix and returns (payload, scale); every `decode_*` returns the values with one F32
multiplication and one rounding to the output dtype. The layouts are those of the released files:

    FP8    payload F8_E4M3 [rows, cols], scale [ceil(rows/128), ceil(cols/128)], F32 or F8_E8M0
    FP4    payload I8 [rows, cols/2], two E2M1 codes per byte, low nibble first; scale F8_E8M0 [rows, cols/32]
    INT4   payload I32 [rows, cols/8], eight codes per word, low nibble first, zero point 8; scale BF16 [rows, cols/32]
    MXFP4  FP4 of stacked experts, payload U8 [experts, rows, cols/32, 16], scale U8 [experts, rows, cols/32]

Slow, and independent of the project's code.
"""

import torch

BLOCK = 128
GROUP = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def spread(scale, block, rows, cols):
    """Repeats block scales to one scale per element of a [rows, cols] matrix."""
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]


def block_amax(matrix, block):
    """Largest magnitude in each block, including incomplete blocks at the edges."""
    rows, cols = matrix.shape
    pad = torch.zeros(-(-rows // block[0]) * block[0], -(-cols // block[1]) * block[1])
    pad[:rows, :cols] = matrix.abs()
    return pad.view(pad.shape[0] // block[0], block[0], pad.shape[1] // block[1], block[1]).amax((1, 3))


def power_of_two_at_least(x):
    """Smallest power of two that is not below x (1 for 0)."""
    mantissa, exponent = torch.frexp(torch.where(x > 0, x, torch.ones_like(x)))
    return torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))


def encode_fp8(matrix, power_of_two=False):
    """E4M3 codes and 128x128 block scales (F32, or E8M0 with `power_of_two`)."""
    amax = block_amax(matrix, (BLOCK, BLOCK))
    scale = torch.where(amax > 0, amax / 448, torch.ones_like(amax))
    if power_of_two:
        scale = power_of_two_at_least(scale)
    codes = (matrix / spread(scale, (BLOCK, BLOCK), *matrix.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale.to(torch.float8_e8m0fnu) if power_of_two else scale


def decode_fp8(codes, scale, dtype):
    return (codes.float() * spread(scale.float(), (BLOCK, BLOCK), *codes.shape)).to(dtype)


def encode_fp8_kv(k, v, shards):
    """Quantizes K and V as `shards` fused [K; V] matrices whose 128-row blocks may cross the K/V boundary.

    Returns (k codes, k scale), (v codes, v scale). The first ceil(k_rows/128) scale rows of a shard belong to K.
    """
    parts = []
    for k_part, v_part in zip(k.chunk(shards), v.chunk(shards)):
        codes, scale = encode_fp8(torch.cat([k_part, v_part]))
        first = -(-k_part.shape[0] // BLOCK)
        parts.append((codes[: k_part.shape[0]], scale[:first], codes[k_part.shape[0] :], scale[first:]))
    k_codes, k_scale, v_codes, v_scale = (torch.cat(x) for x in zip(*parts))
    return (k_codes, k_scale), (v_codes, v_scale)


def decode_fp8_kv(k, k_scale, v, v_scale, shards, dtype):
    """Inverse of `encode_fp8_kv`: (K, V)."""
    ks, vs = [], []
    for k_part, ks_part, v_part, vs_part in zip(
        k.chunk(shards), k_scale.chunk(shards), v.chunk(shards), v_scale.chunk(shards)
    ):
        codes = torch.cat([k_part.float(), v_part.float()])
        fused = decode_fp8(codes, torch.cat([ks_part, vs_part]), dtype)
        ks.append(fused[: k_part.shape[0]])
        vs.append(fused[k_part.shape[0] :])
    return torch.cat(ks), torch.cat(vs)


def nearest_e2m1(x):
    """E2M1 codes of x: the nearest value, ties to the even code."""
    distance = (x.abs().unsqueeze(-1) - E2M1[:8]).abs()
    low = distance.argmin(-1)
    high = (low + 1).clamp(max=7)
    tie = distance.gather(-1, low.unsqueeze(-1)) == distance.gather(-1, high.unsqueeze(-1))
    code = torch.where(tie.squeeze(-1) & (low % 2 == 1), high, low)
    return code + 8 * torch.signbit(x)


def pack_nibbles(codes):
    """[rows, cols] codes 0..15 -> [rows, cols/2] bytes, with the even column in the low nibble."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_nibbles(payload):
    payload = payload.view(torch.uint8)
    return torch.stack([payload & 15, payload >> 4], -1).flatten(-2).long()


def encode_fp4(matrix):
    """E2M1 codes (two per I8) and one E8M0 scale per group of 32 columns."""
    scale = power_of_two_at_least(block_amax(matrix, (1, GROUP)) / 6)
    codes = nearest_e2m1(matrix / spread(scale, (1, GROUP), *matrix.shape))
    return pack_nibbles(codes).view(torch.int8), scale.to(torch.float8_e8m0fnu)


def decode_fp4(payload, scale, dtype):
    values = E2M1[unpack_nibbles(payload)]
    return (values * spread(scale.float(), (1, GROUP), *values.shape)).to(dtype)


def encode_int4(matrix):
    """Symmetric INT4 codes (eight per I32) and one BF16 scale per group of 32 columns."""
    scale = (block_amax(matrix, (1, GROUP)) / 7).clamp(min=1e-10)
    codes = (matrix / spread(scale, (1, GROUP), *matrix.shape)).round().clamp(-8, 7) + 8
    return pack_nibbles(codes).contiguous().view(torch.int32), scale.to(torch.bfloat16)


def decode_int4(payload, scale, dtype):
    values = unpack_nibbles(payload).float() - 8
    return (values * spread(scale.float(), (1, GROUP), *values.shape)).to(dtype)


def encode_mxfp4(matrices):
    """[E, rows, cols] -> blocks U8 [E, rows, cols/32, 16] and scales U8 [E, rows, cols/32], as gpt-oss publishes."""
    payload, scale = zip(*map(encode_fp4, matrices))
    scale = torch.stack(scale).view(torch.uint8)
    return torch.stack(payload).view(torch.uint8).view(*scale.shape, GROUP // 2), scale


def decode_mxfp4(blocks, scales, dtype):
    """Inverse of `encode_mxfp4`, but [E, cols, rows]: the orientation that loaders use for these experts."""
    pairs = zip(blocks.flatten(-2), scales.view(torch.float8_e8m0fnu))
    return torch.stack([decode_fp4(block, scale, dtype) for block, scale in pairs]).transpose(1, 2).contiguous()
