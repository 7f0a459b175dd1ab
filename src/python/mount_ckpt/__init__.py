"""Mount a Hugging Face checkpoint in another layout, from Python.

>>> import mount_ckpt
>>> from safetensors import safe_open
>>> with mount_ckpt.mount("/data/MiMo-V2-Flash", to="native") as path:
...     with safe_open(path / "model-00001-of-00117.safetensors", "pt") as shard:
...         tensor = shard.get_tensor("model.norm.weight")

Every function runs the command ``mount-ckpt``, whose ``--help`` explains the options. They are
given by name, with underscores: ``ep_size=8`` is ``--ep-size=8``, ``allow_other=True`` is
``--allow-other``, ``include=["a", "b"]`` is ``--include=a --include=b``. An option that is ``None``
or ``False`` is not given.

The command is taken from the environment variable ``MOUNT_CKPT`` where that is set, else from the
scripts of this Python installation, where pip puts it, else from ``PATH``.
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
    # A source directory on PYTHONPATH; the command tells its own version.
    __version__ = "unknown"
