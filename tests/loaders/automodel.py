"""nemo-automodel on native views of new checkpoints of the families with their own native layout.

    python automodel.py FAMILY=CHECKPOINT=MOUNT[=ADAPTER_VIEW]...

For each family,
1. its adapter must convert the checkpoint to the tensors of ADAPTER_VIEW, bit for bit. ADAPTER_VIEW is MOUNT, except for
   MiMo, whose K and V scales Automodel reads differently (`--kv-scales automodel`);
2. its `_HuggingFaceStorageReader` and `dcp.load` must fill empty tensors with those of MOUNT;
3. its model, built with `enable_hf_state_dict_adapter: false`, must have exactly these parameter names and shapes, and its
   checkpointer must load MOUNT into them.
"""

import re
import sys
import tempfile
import warnings

import torch
import torch.distributed.checkpoint as dcp
import transformers
from nemo_automodel.components.checkpoint._backports.hf_storage import _HuggingFaceStorageReader
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from torch.distributed.checkpoint.api import CheckpointException

from automodel_models import build, run_on_cpu
from compare import UNSIGNED_ZEROS, assert_same, read

# Tensors for which the class has no modules.
UNUSED = {"mimo-v2-flash": r"model\.mtp\."}


def check_adapter(family, checkpoint, view):
    adapter = build(family, checkpoint, adapter=True).state_dict_adapter
    adapter.dtype = torch.bfloat16
    converted = adapter.from_hf(read(checkpoint))
    assert_same(f"{family}, {type(adapter).__name__}", converted, read(view), family not in UNSIGNED_ZEROS)
    return f"{type(adapter).__name__}.from_hf gives the same {len(converted)} tensors"


def check_reader(family, mount):
    expected = read(mount)
    tensors = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(tensors, storage_reader=_HuggingFaceStorageReader(path=str(mount)), no_dist=True)
    assert_same(f"{family}, dcp.load", tensors, expected)
    return "dcp.load reads them"


def check_model(family, mount):
    model = build(family, mount, adapter=False)
    stored = read(mount)
    unused = {name for name in stored if family in UNUSED and re.match(UNUSED[family], name)}
    odd = sorted(set(model.state_dict()) ^ (set(stored) - unused))
    assert not odd, f"{family}: names on one side only: {odd[:5]}"
    with torch.no_grad():
        for parameter in model.state_dict().values():
            parameter.fill_(7)
    scratch = tempfile.mkdtemp()
    config = CheckpointingConfig(
        checkpoint_dir=scratch, model_cache_dir=scratch, model_repo_id=str(mount), save_consolidated=False
    )
    checkpointer = Checkpointer(config, dp_rank=0, tp_rank=0, pp_rank=0)

    def load():
        checkpointer.load_base_model(model, torch.device("cpu"), scratch, str(mount))

    # If a model lacks this attribute, Automodel 0.7.0 assumes that the checkpoint has the vendor's names, and renames
    # them as transformers would. If the attribute is None, it uses the names as they are.
    try:
        load()
        alone = "also without `state_dict_adapter = None`"
    except CheckpointException as failure:
        alone = f"without `state_dict_adapter = None`: {str(failure).strip().splitlines()[-1]}"
    model.state_dict_adapter = None
    load()
    loaded = model.state_dict()
    # The class decides the dtype of a parameter: router gates, for example, are F32 in a checkpoint and BF16 in a
    # model.
    expected = {name: stored[name].to(tensor.dtype) for name, tensor in loaded.items()}
    assert_same(f"{family}, {type(model).__name__}", loaded, expected)
    return f"{type(model).__name__} loads {len(loaded)} of them ({alone})"


warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
run_on_cpu()
for argument in sys.argv[1:]:
    family, checkpoint, mount, *view = argument.split("=")
    results = [
        check_adapter(family, checkpoint, *(view or [mount])),
        check_reader(family, mount),
        check_model(family, mount),
    ]
    print(f"{family}: " + "; ".join(results))
