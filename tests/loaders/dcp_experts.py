"""torch.distributed.checkpoint on native views: two ranks (gloo), the grouped experts sharded over them.

    python dcp_experts.py make DIR
        writes DIR/checkpoint: FP8, one layer of 64 experts, large enough that a share differs from the whole
    python dcp_experts.py load CHECKPOINT MOUNT0 MOUNT1 SLICES [READER]
        rank r loads from MOUNTr; CHECKPOINT is mounted once per rank, as on a cluster of two nodes. By the counters of
        the mount, it must have read only that rank's share of the experts, plus at most
        read-ahead and one more expert at the ends of each tensor's part; so mount with `--read-ahead 512KiB`.
        SLICES, mounted with `--ep-size 2`, must contain the same tensors in its directories. READER is `module:class`, by
        default torch's own.
"""

import importlib
import json
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from compare import assert_same, read, shards

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))

import quantize  # noqa: E402
from checkpoint_io import read_checkpoint, write_checkpoint  # noqa: E402
from families import MiMo  # noqa: E402
from publish import publish  # noqa: E402

RANKS = 2
EXPERTS, WIDTH = 64, 512
LAYER = "model.layers.1.mlp.experts"
TORCH_READER = "torch.distributed.checkpoint:HuggingFaceStorageReader"


class Large(MiMo):
    """64 experts of 768 KiB in FP8, 48 MiB in total, and few other tensors."""

    config = MiMo.config | {
        "hidden_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": EXPERTS,
        "num_hidden_layers": 2,
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "layer_types": ["full_attention", "sliding_attention"],
    }
    mtp_layers = 0


def make(directory):
    family = Large()
    write_checkpoint(Path(directory) / "checkpoint", family.config, publish(family))


def expected_experts(checkpoint, experts):
    """The grouped tensors of some experts, decoded from the checkpoint with tests/reference."""
    stored = read_checkpoint(checkpoint)

    def plain(expert, part):
        name = f"{LAYER}.{expert}.{part}.weight"
        return quantize.decode_fp8(stored[name], stored[name + "_scale_inv"], torch.bfloat16).T

    pairs = [torch.cat([plain(e, "gate_proj"), plain(e, "up_proj")], -1) for e in experts]
    return {
        f"{LAYER}.gate_and_up_projs": torch.stack(pairs),
        f"{LAYER}.down_projs": torch.stack([plain(e, "down_proj") for e in experts]),
    }


def expert_bytes(checkpoint):
    """Stored bytes of all experts, payload and scales."""
    tensors = read_checkpoint(checkpoint)
    return sum(x.numel() * x.element_size() for name, x in tensors.items() if f"{LAYER}." in name)


def source_bytes(mount):
    """Bytes of the checkpoint that the mount has read so far, from its counters."""
    return json.loads((Path(mount) / ".mount-ckpt/stats.json").read_text())["engine"]["source_bytes"]


def destinations(mount, mesh):
    """Empty tensors for all tensors of the view, in two groups: experts as DTensors sharded on axis 0, and the others."""
    experts, others = {}, {}
    for shard in shards(mount):
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[part.get_dtype()]
                if name.startswith(LAYER):
                    cut = empty_dtensor(part.get_shape(), dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
                    experts[name] = cut
                else:
                    others[name] = torch.empty(part.get_shape(), dtype=dtype)
    return experts, others


def rank_main(rank, checkpoint, mounts, slices, reader, meeting):
    # Both ranks run on this machine, whatever its host name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(minutes=2), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    mount = mounts[rank]
    module, name = reader.split(":")
    storage = getattr(importlib.import_module(module), name)(path=mount)
    experts, others = destinations(mount, mesh)

    before = source_bytes(mount)
    dcp.load(others, storage_reader=storage)
    between = source_bytes(mount)
    dcp.load(experts, storage_reader=storage)
    after = source_bytes(mount)

    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in experts.items()}
    owned = range(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
    assert_same(f"rank {rank}, experts", local, expected_experts(checkpoint, owned))
    assert_same(f"rank {rank}, slices", read(Path(slices) / f"ep-{rank:04}-of-{RANKS:04}"), local | others)

    whole, got = expert_bytes(checkpoint), after - between
    share = got / whole
    assert 0.99 / RANKS <= share <= 0.56, f"rank {rank} read {got} of {whole} expert bytes, expected about half"
    print(
        f"rank {rank}: experts {owned.start} to {owned.stop - 1}: read {got} of {whole} stored expert bytes ({share:.1%}), "
        f"and {between - before} for {len(others)} other tensors",
        flush=True,
    )
    dist.destroy_process_group()


def load(checkpoint, mount0, mount1, slices, reader=TORCH_READER):
    with tempfile.TemporaryDirectory() as scratch:
        meeting = Path(scratch) / "ranks"
        mp.spawn(rank_main, (checkpoint, (mount0, mount1), slices, reader, meeting), nprocs=RANKS)


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](*sys.argv[2:])
