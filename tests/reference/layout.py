"""Where transformers keeps a published tensor in memory, how a state dict is assembled from such places, and a release's
config.json at toy size."""

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
    """The target of a published matrix: an in-memory name, an index in stacked experts, an operation."""

    name: str
    expert: int | None = None
    part: int = 0
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None


def rename(name, rules):
    """Rewrites `name` with the first rule whose pattern matches all of it. None if no rule matches."""
    for pattern, target in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target)
    return None


def place_expert(name, base, gate, up, down):
    """The Place of `{prefix}.experts.{e}.{projection}.weight` with the prefix `base(prefix)`, or None."""
    match = re.fullmatch(rf"(.*)\.experts\.(\d+)\.({gate}|{up}|{down})\.weight", name)
    if not match or base(match[1]) is None:
        return None
    grouped = "down_proj" if match[3] == down else "gate_up_proj"
    return Place(f"{base(match[1])}.experts.{grouped}", int(match[2]), int(match[3] == up))


def assemble(places):
    """Assembles the state dict from [(Place, matrix)]: experts stacked on axis 0, gate before up on axis 1."""
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


def release_config(release, changes, extra=None):
    """config.json of `../releases/RELEASE` with the values in `changes`, whose keys it must have, and those in `extra`,
    whose keys it must not have: keys that a library needs and the release lacks."""
    config = json.loads((RELEASES / release / "config.json").read_text())

    def put(into, values, there):
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                put(into[key], value, there)
            else:
                assert (key in into) == there, f"{release}: `{key}` {'is not' if there else 'is'} in config.json"
                into[key] = copy.deepcopy(value)

    put(config, changes, there=True)
    put(config, extra or {}, there=False)
    return config
