"""Writes checkpoint directories of three shards, and reads any."""

import json
import zlib
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def shard_of(name, shards=3):
    """The shard of a tensor, from a hash of its name: experts of a layer, and payload and scale, are in different shards."""
    return zlib.crc32(name.encode()) % shards


def write_checkpoint(directory, config, tensors, shards=3):
    """A Hugging Face directory of `shards` safetensors files, config, index, and two files that a mount passes through."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[shard_of(name, shards)] for name in sorted(tensors)}
    for file in files:
        members = {name: tensors[name].contiguous() for name in weight_map if weight_map[name] == file}
        save_file(members, directory / file, {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for file, content in {
        "config.json": config,
        "model.safetensors.index.json": index,
        "generation_config.json": {"do_sample": True},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        (directory / file).write_text(json.dumps(content, indent=2) + "\n")


def read_checkpoint(directory):
    """name -> tensor, from every `*.safetensors` in `directory`. Fails for repeated names and files without format `pt`."""
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            assert (shard.metadata() or {}).get("format") == "pt", f"{file.name}: no `format` in the metadata"
            for name in shard.keys():
                assert name not in tensors, f"`{name}` is in two shards"
                tensors[name] = shard.get_tensor(name)
    return tensors
