"""Measures two ways to load MiMo's parameters in NeMo Automodel's native layout: from a mount by safetensors, and
from the checkpoint by safetensors and Automodel's `from_hf`. Each round runs both. Prints the rates of all rounds but
the first as JSON, in bytes of parameters per second.

    python automodel.py CHECKPOINT MOUNT ROUNDS

Before each round, the pages of the mount are dropped from the page cache; those of the checkpoint stay. Needs
torch, safetensors and nemo-automodel 0.7.0.
"""

import glob
import json
import os
import sys
import time
from types import SimpleNamespace

import torch
from nemo_automodel.components.models.mimo_v2_flash.state_dict_adapter import MiMoV2FlashStateDictAdapter
from safetensors.torch import load_file


def load(directory):
    tensors = {}
    for path in sorted(glob.glob(f"{directory}/*.safetensors")):
        tensors |= load_file(path)
    return tensors


def forget(directory):
    for path in glob.glob(f"{directory}/*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(directory):
    with open(f"{directory}/config.json") as file:
        config = json.load(file)
    moe = SimpleNamespace(
        n_routed_experts=config["n_routed_experts"],
        moe_inter_dim=config["moe_intermediate_size"],
        expert_bias=False,
        expert_activation="swiglu",
    )
    backend = SimpleNamespace(attn="sdpa", experts="torch")
    adapter = MiMoV2FlashStateDictAdapter(SimpleNamespace(**config), moe, backend, torch.bfloat16)
    return adapter.from_hf(load(directory))


def rate(parameters, work, directory):
    start = time.monotonic()
    tensors = work(directory)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    seconds = time.monotonic() - start
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()) / seconds


checkpoint, mount, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
parameters = {name: torch.ones_like(tensor) for name, tensor in load(mount).items()}
rates = []
for _ in range(rounds + 1):
    forget(mount)
    rates.append([rate(parameters, load, mount), rate(parameters, convert, checkpoint)])
print(json.dumps(rates[1:]))
