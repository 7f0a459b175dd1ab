"""What training leaves behind, mounted with `--to hf`: saves of transformers, and the comparison for those of any library.

    python saves.py make REFERENCE DIR FAMILY=IN_MEMORY=PUBLISHED...
        has transformers save the families' models in every way that gives other files, below DIR/FAMILY/transformers, and
        says which directories there are to mount, one a line. REFERENCE is what `transformers_views.py make REFERENCE` wrote,
        IN_MEMORY and PUBLISHED are FAMILY's checkpoint there, mounted with `--to transformers` and with `--to hf`
    python saves.py check REFERENCE DIR SAVE=MOUNT...
        MOUNT, the directory SAVE below DIR mounted with `--to hf`, must hold every tensor of the model under its published
        name, bit for bit, in the saved dtype or a wider one of the release, and the config.json that was saved.
        `automodel_saves.py` makes saves for it too
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
    """Published name -> the plain tensor of the release."""
    return dequantize(family, read_checkpoint(Path(reference) / family.name / "checkpoint"))


def held(family, reference, state):
    """Published name -> tensor, for what transformers has in memory: the release's values in the model's dtypes."""
    tensors = {}
    for name, tensor in release(family, reference).items():
        place = family.place(name)
        place = place[0] if isinstance(place, list) else place
        if place is not None:
            tensors[name] = tensor.to(state[place.name].dtype)
    return tensors


def load_any(family, directory, **options):
    """A model as training loads it: what its class has no use for, MTP layers, is no concern here."""
    return getattr(transformers, family.auto).from_pretrained(directory, dtype=DTYPE, **options)


def tied(family, directory, state):
    """The same model made by its constructor, with the embedding as its head."""
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
    # The names that the vendor published, as far as transformers finds back to them.
    model.save_pretrained(target / "published")
    model.save_pretrained(target / "in-memory", save_original_format=False)
    # Renames are undone only where loading did them: most of these are in-memory names.
    load_any(family, in_memory).save_pretrained(target / "from-view")
    tied(family, in_memory, model.state_dict()).save_pretrained(target / "tied", max_shard_size="300kB")
    if family.name == "gpt-oss":
        # MXFP4 is decoded as it is loaded, and the blocks' name is kept for what they were decoded to.
        checkpoint = Path(reference) / family.name / "checkpoint"
        decoded = load_any(family, checkpoint, quantization_config=transformers.Mxfp4Config(dequantize=True))
        decoded.save_pretrained(target / "decoded")
    save_file(held(family, reference, model.state_dict()), target / EXPECTED)
    for kind in sorted(target.iterdir()):
        if kind.is_dir():
            print(kind.relative_to(directory))


def make(reference, directory, *arguments):
    for argument in arguments:
        name, in_memory, published = argument.split("=")
        make_family(FAMILIES[name], reference, directory, in_memory, published)


def saved_config(save):
    """config.json as it was saved; torch's checkpoints have it one directory down."""
    files = [save / "config.json", save / ".hf_metadata/config.json"]
    return json.loads(next(file for file in files if file.is_file()).read_text())


def check_one(family, reference, directory, save, mount):
    library, kind = save.parts[1:3]
    expected = load_file(directory / family.name / library / EXPECTED)
    if kind == "tied":
        expected = {name: tensor for name, tensor in expected.items() if name not in HEADS}
    found = read(mount)
    # A tensor that the release keeps wide, a router for one, may be so again in a view. In `consolidated`, Automodel itself
    # gives each tensor the release's dtype, narrower ones too.
    published = release(family, reference)
    for name in set(found) & set(expected):
        tensor, dtype = expected[name], published[name].dtype
        wider = dtype.itemsize > tensor.dtype.itemsize
        if found[name].dtype == dtype and (wider or save.name == "consolidated"):
            expected[name] = tensor.to(dtype)
    assert_same(str(save), found, expected)
    config = json.loads((mount / "config.json").read_text())
    # As text, since the order of keys stays too.
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
