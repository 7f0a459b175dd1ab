"""Checkpoints saved by nemo-automodel's checkpointer, for `saves.py check`.

    python automodel_saves.py REFERENCE DIR FAMILY=PUBLISHED...
        REFERENCE is what `transformers_views.py make REFERENCE` wrote, PUBLISHED is FAMILY's checkpoint there, mounted with
        `--to hf`. Writes DIR/FAMILY/automodel/KIND and prints the directories to mount, one per line

KIND is `adapter` (published names) or `native` (Automodel's own, `enable_hf_state_dict_adapter: false`). Each contains
`model`, as torch.distributed.checkpoint writes it, and `model/consolidated`, where Automodel joins it. The families in
RANKED are also saved by two processes, as kinds with `-2-ranks`: experts sharded over the ranks, all other parameters by FSDP.
"""

import logging
import os
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.moe.parallelizer import apply_ep
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from automodel_models import build, run_on_cpu
from compare import assert_same, read
from saves import EXPECTED, FAMILIES, release

RANKS = 2
# One family whose stacked experts have other names in the native layout, one with biases of experts.
RANKED = ("mimo-v2-flash", "gpt-oss")


def filled(family, published, adapter):
    """The model with the release's values, and the adapter that converted them."""
    model = build(family, published, adapter)
    convert = (model if adapter else build(family, published, adapter=True)).state_dict_adapter
    convert.dtype = torch.bfloat16
    missing, _ = model.load_state_dict(convert.from_hf(read(published)), strict=False)
    assert not missing, f"{family}: no value for {missing[:5]}"
    return model, convert


def save(model, directory, original, rank=0, mesh=None):
    config = CheckpointingConfig(
        checkpoint_dir=str(directory),
        model_cache_dir=str(directory),
        model_repo_id=str(original),
        save_consolidated=True,
    )
    checkpointer = Checkpointer(config, dp_rank=rank, tp_rank=0, pp_rank=0, moe_mesh=mesh)
    checkpointer.save_model(model, str(directory))
    checkpointer.close()


def cut(model, convert, adapter):
    """Shards experts over the ranks and all else by FSDP, as Automodel's parallelizer does. Returns the mesh of the experts."""
    state = model.state_dict()
    # Automodel records the names of the whole model before it shards it.
    model._pre_shard_hf_state_dict_keys = list(convert.to_hf(state) if adapter else state)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("ep_shard", "ep"))
    apply_ep(model, mesh["ep"])
    experts = {parameter for name, parameter in model.named_parameters() if ".mlp.experts." in name}
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), ignored_params=experts)
    return mesh


def quiet():
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    run_on_cpu()


def rank_main(rank, reference, directory, published, meeting):
    # Both ranks run on this machine, whatever its host name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(minutes=2), rank=rank, world_size=RANKS)
    for family in RANKED:
        for kind in ("adapter", "native"):
            model, convert = filled(family, published[family], kind == "adapter")
            mesh = cut(model, convert, kind == "adapter")
            target = directory / family / "automodel" / f"{kind}-{RANKS}-ranks"
            save(model, target, reference / family / "checkpoint", rank, mesh)
    dist.destroy_process_group()


def make(reference, directory, *arguments):
    reference, directory = Path(reference), Path(directory)
    published = dict(argument.split("=") for argument in arguments)
    with tempfile.TemporaryDirectory() as scratch:
        shared = (reference, directory, published, Path(scratch) / "ranks")
        # Fork, since the imports take longest; and fork first, while this process has no threads.
        mp.start_processes(rank_main, shared, nprocs=RANKS, start_method="fork")
    for family in published:
        target = directory / family / "automodel"
        for kind in ("adapter", "native"):
            model, convert = filled(family, published[family], kind == "adapter")
            save(model, target / kind, reference / family / "checkpoint")
        # Converted from the native model, so only the adapter decides the names.
        expected = {name: tensor.contiguous() for name, tensor in convert.to_hf(model.state_dict()).items()}
        original = release(FAMILIES[family], reference)
        same = {name: original[name].to(tensor.dtype) for name, tensor in expected.items()}
        assert_same(f"{family}, {type(convert).__name__}", expected, same)
        save_file(expected, target / EXPECTED)
    for model in sorted(directory.glob("*/automodel/*/model")):
        print(model.relative_to(directory))
        print((model / "consolidated").relative_to(directory))


if __name__ == "__main__":
    quiet()
    make(*sys.argv[1:])
