"""Where transformers holds a published tensor in memory, how a state dict is put together from such places, and a
release's config.json at toy size."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

RELEASES = Path(__file__).resolve().parent.parent / "releases"


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


def release_config(release, changes, beside=None):
    """config.json of `../releases/RELEASE` with the values in `changes`, whose keys it must have, and those in `beside`,
    whose keys it must lack: what a library wants and the release does not say."""
    config = json.loads((RELEASES / release / "config.json").read_text())

    def put(into, values, there):
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                put(into[key], value, there)
            else:
                assert (key in into) == there, f"{release}: `{key}` {'is not' if there else 'is'} in config.json"
                into[key] = copy.deepcopy(value)

    put(config, changes, there=True)
    put(config, beside or {}, there=False)
    return config
