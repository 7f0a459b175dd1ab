"""Where transformers holds a published tensor in memory, and how a state dict is put together from such places."""

import re
from dataclasses import dataclass
from typing import Callable

import torch


@dataclass
class Place:
    """Where a published matrix goes: an in-memory name, a slot for stacked experts, an operation."""

    name: str
    expert: int | None = None
    part: int = 0
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None


def rename(name, rules):
    """First rule whose pattern matches all of `name` rewrites it; None where none does."""
    for pattern, target in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target)
    return None


def place_expert(name, base, gate, up, down):
    """Place of `{prefix}.experts.{e}.{projection}.weight` under `base` applied to the prefix, or None."""
    match = re.fullmatch(rf"(.*)\.experts\.(\d+)\.({gate}|{up}|{down})\.weight", name)
    if not match or base(match[1]) is None:
        return None
    grouped = "down_proj" if match[3] == down else "gate_up_proj"
    return Place(f"{base(match[1])}.experts.{grouped}", int(match[2]), int(match[3] == up))


def assemble(places):
    """In-memory state dict of [(Place, matrix)]: experts stacked on axis 0, gate above up on axis 1."""
    state, stacks = {}, {}
    for place, matrix in places:
        if place.convert is not None:
            matrix = place.convert(matrix)
        if place.expert is None:
            assert place.name not in state, place.name
            state[place.name] = matrix
        else:
            stacks.setdefault(place.name, {})[place.expert, place.part] = matrix
    for name, cells in stacks.items():
        experts = 1 + max(e for e, _ in cells)
        parts = 1 + max(p for _, p in cells)
        assert len(cells) == experts * parts, name
        state[name] = torch.stack([torch.cat([cells[e, p] for p in range(parts)]) for e in range(experts)])
    return state


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
