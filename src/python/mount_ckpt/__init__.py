"""Mount a Hugging Face checkpoint in another layout, from Python.

>>> import mount_ckpt
>>> from safetensors import safe_open
>>> with mount_ckpt.mount("/data/MiMo-V2-Flash", to="native") as path:
...     with safe_open(path / "model-00001-of-00117.safetensors", "pt") as shard:
...         tensor = shard.get_tensor("model.norm.weight")

Every function runs the command ``mount-ckpt``. Options of the command are keyword arguments, with
underscores: ``ep_size=8`` is ``--ep-size=8``, ``allow_other=True`` is ``--allow-other``, and
``include=["a", "b"]`` is ``--include=a --include=b``. An option that is ``None`` or ``False`` is
left out. ``mount-ckpt --help`` explains the options.

The command is the one that the environment variable ``MOUNT_CKPT`` names. If it is not set, the
command is looked for in the scripts directories of this Python, where pip installs it, and then in
``PATH``.
"""

from importlib.metadata import PackageNotFoundError, version

from ._command import Error, Option, UsageError, export, inspect, models, status, verify
from ._mount import Mount, mount

__all__ = [
    "Error",
    "Mount",
    "Option",
    "UsageError",
    "export",
    "inspect",
    "models",
    "mount",
    "status",
    "verify",
]

try:
    __version__ = version("mount-ckpt")
except PackageNotFoundError:
    # The package is not installed: its source directory is on the module path.
    __version__ = "unknown"
