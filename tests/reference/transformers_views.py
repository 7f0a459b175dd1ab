"""Checks the `transformers` layout against the transformers package (5.23 or newer, CPU, offline).

    python transformers_views.py make DIR
        writes DIR/FAMILY/checkpoint for each family as its vendor publishes it, toy size, seeded; then lets
        transformers convert the dequantized tensors from the published names and compares that with our table
    python transformers_views.py check FAMILY CHECKPOINT VIEW
        VIEW is CHECKPOINT mounted with `--to transformers`: from_pretrained must report no missing, unexpected or
        mismatched key. Every tensor and the logits must equal, bit for bit, those of a model that was filled by
        hand from values that this script decodes itself
    python transformers_views.py write FAMILY CHECKPOINT VIEW
        writes the expected view with PyTorch; use it to test `check`
"""

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

from checkpoint_io import read_checkpoint, write_checkpoint
from families import FAMILIES
from publish import DTYPE, dequantize, in_memory, plain_config, publish


def load(family, directory):
    """Loads the model. from_pretrained must not report any key."""
    auto = getattr(transformers, family.auto)
    model, report = auto.from_pretrained(directory, dtype=DTYPE, output_loading_info=True)
    complaints = {what: sorted(map(str, names)) for what, names in report.items() if names}
    assert not complaints, f"{family.name}: from_pretrained says {complaints}"
    return model.eval()


def fill_by_hand(family, directory, state):
    """A new model with every tensor from `state`, cast as transformers does: to F32 if the class requires it."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, family.auto).from_config(config, dtype=DTYPE)
    wide = set()
    for module in model.modules():
        wide |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    cast = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if wide & set(name.split(".")) else DTYPE)
        cast[name] = tensor
    model.load_state_dict(cast, strict=True, assign=True)
    return model.eval()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def compare_states(family, got, expected):
    """Fails if names or tensors differ, and shows the first five names."""
    assert set(got) == set(expected), f"{family.name}: names differ: {sorted(set(got) ^ set(expected))[:5]}"
    wrong = [name for name in sorted(got) if not same_bits(got[name], expected[name])]
    assert not wrong, f"{family.name}: {len(wrong)} tensors differ: {wrong[:5]}"


@torch.no_grad()
def logits(family, model):
    """Logits for 256 seeded tokens, enough for every attention window and compression rate of the families."""
    text = family.config.get("text_config", family.config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, text["vocab_size"], (1, 256), generator=generator)
    out = model(input_ids=tokens, use_cache=False).logits
    assert torch.isfinite(out).all() and out.float().std() > 1e-3, f"{family.name}: logits are not finite or almost constant"
    return out


def make(directory):
    for family in FAMILIES.values():
        target = Path(directory) / family.name / "checkpoint"
        write_checkpoint(target, family.config, publish(family))
        stored = read_checkpoint(target)
        with tempfile.TemporaryDirectory() as scratch:
            # Omit tensors of MTP layers: some classes ignore them only at the layer count of the release.
            plain = {name: x for name, x in dequantize(family, stored).items() if family.place(name) is not None}
            write_checkpoint(scratch, plain_config(family.config), plain)
            theirs = load(family, scratch)
            ours = fill_by_hand(family, scratch, in_memory(family, stored))
        compare_states(family, theirs.state_dict(), ours.state_dict())
        assert same_bits(logits(family, theirs), logits(family, ours)), f"{family.name}: logits differ"
        print(f"{family.name}: {len(stored)} published tensors, {len(ours.state_dict())} in memory, as transformers converts them")


def write(family, checkpoint, view):
    write_checkpoint(view, plain_config(family.config), in_memory(family, read_checkpoint(checkpoint)))
    for file in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(Path(checkpoint) / file, Path(view) / file)


def check(family, checkpoint, view):
    config = json.loads((Path(view) / "config.json").read_text())
    assert config == plain_config(config), "config.json of the view still has a quantization_config"
    assert config == plain_config(json.loads((Path(checkpoint) / "config.json").read_text())), "config.json changed"
    expected = in_memory(family, read_checkpoint(checkpoint))
    compare_states(family, read_checkpoint(view), expected)
    loaded = load(family, view)
    filled = fill_by_hand(family, view, expected)
    compare_states(family, loaded.state_dict(), filled.state_dict())
    assert same_bits(logits(family, loaded), logits(family, filled)), f"{family.name}: logits differ"
    print(f"{family.name}: {len(expected)} tensors, no missing, unexpected or mismatched key, logits equal bit for bit")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("directory")
    for name in ("check", "write"):
        command = commands.add_parser(name)
        command.add_argument("family", choices=FAMILIES)
        command.add_argument("checkpoint")
        command.add_argument("view")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if args.command == "make":
        make(args.directory)
    else:
        {"check": check, "write": write}[args.command](FAMILIES[args.family], args.checkpoint, args.view)


if __name__ == "__main__":
    try:
        main()
    except AssertionError as failure:
        sys.exit(f"transformers_views: {failure}")
