"""Compares tensors bit for bit. Any NaN equals any NaN; +0.0 equals -0.0 on request."""

from pathlib import Path

import torch
from safetensors.torch import load_file

# Automodel decodes FP4 code 8 to +0.0; the format and views have -0.0.
UNSIGNED_ZEROS = ("deepseek-v4", "deepseek-v4-flash")


def same(a, b, signed_zeros=True):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        nan = a.isnan() & b.isnan()
        a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
        if not signed_zeros:
            a, b = a + 0, b + 0
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_same(what, got, expected, signed_zeros=True):
    """Fails if names or tensors differ, with their count and the first five."""
    odd = sorted(set(got) ^ set(expected))
    assert not odd, f"{what}: {len(odd)} names are on one side only: {odd[:5]}"
    wrong = [name for name in sorted(got) if not same(got[name], expected[name], signed_zeros)]
    assert not wrong, f"{what}: {len(wrong)} of {len(got)} tensors differ: {wrong[:5]}"


def shards(directory):
    """The safetensors files of a directory."""
    return sorted(str(file) for file in Path(directory).glob("*.safetensors"))


def read(directory):
    """name -> tensor, from all shards of a directory."""
    tensors = {}
    for shard in shards(directory):
        tensors |= load_file(shard)
    return tensors


def pairs(arguments):
    """Yields (folder name, mount, expected native tensors, signed_zeros) for each `GOLDEN=MOUNT` argument."""
    for argument in arguments:
        golden, mount = map(Path, argument.split("="))
        signed_zeros = golden.name not in UNSIGNED_ZEROS
        yield golden.name, mount, load_file(golden / "native.safetensors"), signed_zeros
