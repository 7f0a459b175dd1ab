"""Reads native views with loaders that use threads and buffers of their own instead of mmap.

    python weight_streamers.py GOLDEN=MOUNT...

runai-model-streamer and fastsafetensors run on their CPU paths. `prefetch` does what vLLM and SGLang do with
`safetensors_load_strategy=prefetch` and similar options: threads read whole files in large blocks, then safetensors reads them.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import safetensors.torch
from compare import assert_same, pairs, read, shards
from fastsafetensors import fastsafe_open
from runai_model_streamer import SafetensorsStreamer

THREADS = 8
BLOCK = 16 << 20


def runai(mount):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(shards(mount))
        return dict(streamer.get_tensors())


def fast(mount):
    with fastsafe_open(shards(mount), nogds=True, device="cpu") as files:
        return {name: files.get_tensor(name).clone() for name in files.keys()}


def whole_file(path):
    """Reads a file unbuffered in blocks."""
    blocks = []
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            blocks.append(block)
    return b"".join(blocks)


def prefetch(mount):
    tensors = {}
    with ThreadPoolExecutor(THREADS) as pool:
        # Every file four times, so that several threads read the same file at once.
        for content in pool.map(whole_file, shards(mount) * 4):
            tensors |= safetensors.torch.load(content)
    mapped = read(mount)
    assert_same(f"{mount}, mapped after the prefetch", mapped, tensors)
    return tensors


for name, mount, expected, signed_zeros in pairs(sys.argv[1:]):
    for loader in (prefetch, runai, fast):
        assert_same(f"{name}, {loader.__name__}", loader(mount), expected, signed_zeros)
    print(f"{name}: {len(expected)} tensors by {THREADS} threads, runai-model-streamer and fastsafetensors")
