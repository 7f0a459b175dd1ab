"""Load a native view with torch.distributed.checkpoint: experts are sharded, and each rank reads only its own.

    mount-ckpt --to native SRC MNT
    torchrun --standalone --nproc-per-node 2 load_dcp.py MNT

Needs `torch` and `safetensors`. The loading code does not depend on mount-ckpt. At the end, the counters of the mount
show how much of the source was read.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, empty

directory = Path(sys.argv[1])
# gloo works without a GPU.
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))

reader = HuggingFaceStorageReader(path=str(directory))
state = {}
for name, stored in reader.read_metadata().state_dict_metadata.items():
    # Grouped experts are [experts, …]: shard axis 0. In training, the parallel plan of the model decides this.
    placement = Shard(0) if ".experts." in name and len(stored.size) == 3 else Replicate()
    state[name] = empty(stored.size, dtype=stored.properties.dtype, device_mesh=mesh, placements=[placement])

dcp.load(state, storage_reader=reader)

held = sum(tensor.to_local().numel() * tensor.element_size() for tensor in state.values())
whole = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
print(f"rank {rank} of {ranks}: {len(state)} tensors, {held / 1e6:.1f} of {whole / 1e6:.1f} MB", flush=True)
dist.barrier()
stats = directory / ".mount-ckpt/stats.json"
if rank == 0 and stats.exists():
    print(f"read from the checkpoint: {json.loads(stats.read_text())['engine']['source_bytes'] / 1e6:.1f} MB")
dist.destroy_process_group()
