"""Reads native views with safetensors, with torch and with numpy.

    python safetensors_files.py GOLDEN=MOUNT...
"""

import sys

import ml_dtypes  # noqa: F401  registers BF16 with numpy
import numpy
import safetensors.numpy
import safetensors.torch
import torch
from compare import assert_same, pairs, same, shards
from safetensors import safe_open


def slices(shape):
    """Slices as sharding loaders request them: of the first axis, of the last, of both."""
    if not shape:
        return []
    first, last = shape[0] // 2, shape[-1] // 3
    boxes = [(slice(first, None),), (slice(0, 1),), (Ellipsis, slice(last, None))]
    return boxes if len(shape) == 1 else boxes + [(slice(first, first + 1), Ellipsis, slice(0, last + 1))]


def check(name, mount, expected, signed_zeros):
    whole, opened, arrays, opened_arrays = {}, {}, {}, {}
    count = 0
    for shard in shards(mount):
        whole |= safetensors.torch.load_file(shard)
        arrays |= safetensors.numpy.load_file(shard)
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}, f"{shard}: metadata is {file.metadata()}"
            for tensor in file.keys():
                opened[tensor] = file.get_tensor(tensor)
                part = file.get_slice(tensor)
                assert part.get_shape() == list(expected[tensor].shape), tensor
                for box in slices(part.get_shape()):
                    wanted = expected[tensor][box]
                    assert same(part[box], wanted, signed_zeros), f"{name}: `{tensor}` differs in {box}"
                    count += 1
        with safe_open(shard, "np") as file:
            opened_arrays |= {tensor: file.get_tensor(tensor) for tensor in file.keys()}
    assert_same(f"{name}, load_file", whole, expected, signed_zeros)
    assert_same(f"{name}, get_tensor", opened, expected, signed_zeros)
    for what, found in {"load_file": arrays, "get_tensor": opened_arrays}.items():
        assert_same(f"{name}, numpy {what}", {n: as_torch(a) for n, a in found.items()}, expected, signed_zeros)
    print(f"{name}: {len(whole)} tensors in {len(shards(mount))} shards, {count} slices")


def as_torch(array):
    """Converts by bytes, since torch does not accept BF16 arrays of numpy."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(numpy.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


for pair in pairs(sys.argv[1:]):
    check(*pair)
