"""Saves models with transformers, and checks mounts of saved checkpoints of any library with `--to hf`.

    python saves.py make REFERENCE DIR FAMILY=IN_MEMORY=PUBLISHED...
        saves each family's model with transformers in every way that gives different files, below
        DIR/FAMILY/transformers, and prints the directories to mount, one per line. REFERENCE is the output of
        `transformers_views.py make REFERENCE`; IN_MEMORY and PUBLISHED are FAMILY's checkpoint there, mounted with
        `--to transformers` and with `--to hf`
    python saves.py check REFERENCE DIR SAVE=MOUNT...
        MOUNT is DIR/SAVE mounted with `--to hf`. It must have every tensor of the model under its published name, bit
        for bit, in the saved dtype or in a wider one of the release, and the saved config.json. `automodel_saves.py`
        makes saves for this check, too
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from compare import assert_same, read

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))

from checkpoint_io import read_checkpoint  # noqa: E402
from families import FAMILIES  # noqa: E402
from publish import DTYPE, dequantize, plain_config  # noqa: E402
from transformers_views import load  # noqa: E402

EXPECTED = "expected.safetensors"
HEADS = {"lm_head.weight", "head.weight", "language_model.lm_head.weight"}


def release(family, reference):
    """Published name -> plain tensor of the release."""
    return dequantize(family, read_checkpoint(Path(reference) / family.name / "checkpoint"))


def expected_tensors(family, reference, state):
    """Published name -> tensor, for all tensors that transformers has: the release's values in the model's dtypes."""
    tensors = {}
    for name, tensor in release(family, reference).items():
        place = family.place(name)
        place = place[0] if isinstance(place, list) else place
        if place is not None:
            tensors[name] = tensor.to(state[place.name].dtype)
    return tensors


def load_any(family, directory, **options):
    """Loads a model as training does. Unexpected keys, those of MTP layers, are ignored."""
    return getattr(transformers, family.auto).from_pretrained(directory, dtype=DTYPE, **options)


def tied(family, directory, state):
    """The same model from its constructor, with the head tied to the embedding."""
    config = transformers.AutoConfig.from_pretrained(directory)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = True
    model = getattr(transformers, family.auto).from_config(config, dtype=DTYPE)
    state = {name: tensor for name, tensor in state.items() if name not in HEADS}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model


def make_family(family, reference, directory, in_memory, published):
    target = Path(directory) / family.name / "transformers"
    model = load_any(family, published)
    # Published names, as far as transformers restores them.
    model.save_pretrained(target / "published")
    model.save_pretrained(target / "in-memory", save_original_format=False)
    # Saving undoes only renames that loading did, so most of these are in-memory names.
    load_any(family, in_memory).save_pretrained(target / "from-view")
    tied(family, in_memory, model.state_dict()).save_pretrained(target / "tied", max_shard_size="300kB")
    if family.name == "gpt-oss":
        # Loading decodes MXFP4, but keeps the name of the blocks.
        checkpoint = Path(reference) / family.name / "checkpoint"
        decoded = load_any(family, checkpoint, quantization_config=transformers.Mxfp4Config(dequantize=True))
        decoded.save_pretrained(target / "decoded")
    save_file(expected_tensors(family, reference, model.state_dict()), target / EXPECTED)
    for kind in sorted(target.iterdir()):
        if kind.is_dir():
            print(kind.relative_to(directory))


def make(reference, directory, *arguments):
    for argument in arguments:
        name, in_memory, published = argument.split("=")
        make_family(FAMILIES[name], reference, directory, in_memory, published)


def saved_config(save):
    """The saved config.json. torch's checkpoints have it in a subdirectory."""
    files = [save / "config.json", save / ".hf_metadata/config.json"]
    return json.loads(next(file for file in files if file.is_file()).read_text())


def check_one(family, reference, directory, save, mount):
    library, kind = save.parts[1:3]
    expected = load_file(directory / family.name / library / EXPECTED)
    if kind == "tied":
        expected = {name: tensor for name, tensor in expected.items() if name not in HEADS}
    found = read(mount)
    # A view may have a tensor in the wider dtype of the release, for example a router. In `consolidated`, Automodel
    # itself casts each tensor to the release's dtype, also to narrower ones.
    published = release(family, reference)
    for name in set(found) & set(expected):
        tensor, dtype = expected[name], published[name].dtype
        wider = dtype.itemsize > tensor.dtype.itemsize
        if found[name].dtype == dtype and (wider or save.name == "consolidated"):
            expected[name] = tensor.to(dtype)
    assert_same(str(save), found, expected)
    config = json.loads((mount / "config.json").read_text())
    # Compare as text, since the order of keys must stay.
    assert json.dumps(config) == json.dumps(plain_config(saved_config(directory / save))), f"{save}: config.json changed"
    assert config["model_type"] == family.config["model_type"], f"{save}: model_type is {config['model_type']}"
    if library == "transformers":
        load(family, mount)
    return len(found)


def check(reference, directory, *arguments):
    failures, tensors = [], 0
    for argument in arguments:
        save, mount = map(Path, argument.split("="))
        try:
            tensors += check_one(FAMILIES[save.parts[0]], reference, Path(directory), save, mount)
        except (AssertionError, OSError, ValueError) as failure:
            failures.append(str(failure) or repr(failure))
    print(f"{len(arguments)} saves, {tensors} tensors under their published names")
    if failures:
        sys.exit("\n".join([f"{len(failures)} of {len(arguments)} saves are wrong:", *failures]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    {"make": make, "check": check}[sys.argv[1]](*sys.argv[2:])
