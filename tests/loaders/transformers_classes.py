"""transformers on mounts of new checkpoints: in its in-memory layout, and under the published names.

    python transformers_classes.py DIR FAMILY=IN_MEMORY=PUBLISHED...

DIR is what `transformers_views.py make DIR` wrote. IN_MEMORY is FAMILY's checkpoint mounted with `--to transformers`;
PUBLISHED is the same with `--to hf`: dequantized under the vendor's names, which transformers converts when it loads.
"""

import sys
import warnings
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))

from families import FAMILIES  # noqa: E402
from publish import DTYPE  # noqa: E402
from transformers_views import check, compare_states, load, logits, same_bits  # noqa: E402


def load_published(family, directory):
    """Loads the model. Only MTP layers, which the class does not have, may be reported as unexpected."""
    # Prefixes such as `model.layers.2.`, `model.mtp.layers.`, `mtp.0.norm`. No tensor with a place may begin with
    # one.
    beyond = tuple({".".join(name.split(".")[:3]) for name in family.tensors() if family.place(name) is None})
    assert not any(name.startswith(beyond) for name in family.tensors() if family.place(name)), beyond
    auto = getattr(transformers, family.auto)
    model, report = auto.from_pretrained(directory, dtype=DTYPE, output_loading_info=True)
    complaints = {what: set(map(str, names)) for what, names in report.items()}
    complaints["unexpected_keys"] = {name for name in complaints["unexpected_keys"] if not name.startswith(beyond)}
    complaints = {what: sorted(names)[:5] for what, names in complaints.items() if names}
    assert not complaints, f"{family.name}: from_pretrained says {complaints}"
    return model.eval()


warnings.filterwarnings("ignore")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
for argument in sys.argv[2:]:
    name, in_memory, published = argument.split("=")
    family = FAMILIES[name]
    check(family, Path(sys.argv[1]) / name / "checkpoint", in_memory)
    ours, theirs = load(family, in_memory), load_published(family, published)
    compare_states(family, theirs.state_dict(), ours.state_dict())
    assert same_bits(logits(family, theirs), logits(family, ours)), f"{name}: logits differ"
    print(f"{name}: the published names load to the same model")
