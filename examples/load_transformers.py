"""Load a checkpoint with transformers from a mount. Nothing is converted while loading, and no copy is on disk.

    mount-ckpt --to transformers SRC MNT
    python load_transformers.py MNT

Needs `torch` and `transformers` >= 5.23. The code is the same for any checkpoint directory.
"""

import sys
import time

import torch
import transformers

directory = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(directory)
vision = config.architectures[0].endswith("ForConditionalGeneration")
auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM

started = time.monotonic()
model, report = auto.from_pretrained(directory, dtype="auto", output_loading_info=True)
seconds = time.monotonic() - started

problems = {kind: sorted(map(str, names))[:5] for kind, names in report.items() if names}
if problems:
    sys.exit(f"{directory}: {problems}")
held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
print(f"{type(model).__name__}: {held / 1e6:.1f} MB in {seconds:.1f} s, no key missing or unexpected")

with torch.no_grad():
    tokens = torch.arange(16).unsqueeze(0)
    next_token = model.eval()(input_ids=tokens, use_cache=False).logits[0, -1].argmax()
print(f"most likely token after tokens 0 to 15: {next_token}")
