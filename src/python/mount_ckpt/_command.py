"""Runs the command ``mount-ckpt``: converts options to arguments, and its errors to exceptions."""

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from typing import Any, Union

#: A path, or another word that the command accepts in its place, such as ``org/name``.
PathLike = Union[str, os.PathLike[str]]
#: One value of an option.
Value = Union[str, int, float, os.PathLike[str]]
#: The value of an option: a bool for a flag, one value, or a sequence to repeat the option.
Option = Union[None, bool, Value, Sequence[Value]]


class Error(Exception):
    """The command failed. The text is its error message."""


class UsageError(Error):
    """An option does not exist, or its value is invalid."""


def inspect(src: PathLike, **options: Option) -> dict[str, Any]:
    """Return the plan of a view: where each of its tensors comes from. Mounts nothing.

    A mount has the same document in ``.mount-ckpt/plan.json``.

    Raises:
        Error: ``src`` is no checkpoint, or this view of it is refused.
    """
    plan: dict[str, Any] = json.loads(run(["inspect", "--json", *arguments(options), "--", src]))
    return plan


def verify(src: PathLike, **options: Option) -> dict[str, Any]:
    """Make every check that a mount makes, then read all tensors of the view once.

    Returns the number of tensors and bytes that were read. If FP8 tensors were decoded,
    ``fp8_blocks`` says how many of their blocks contain the largest code.

    Raises:
        Error: the view is refused, or some of its tensors cannot be read; the message names the
            first ones.
    """
    result: dict[str, Any] = json.loads(run(["verify", "--json", *arguments(options), "--", src]))
    return result


def export(src: PathLike, out: PathLike, **options: Option) -> str:
    """Write a view to the directory ``out``, and return the command's summary.

    If an export was interrupted, the same call continues it.

    Raises:
        Error: the view is refused, it cannot be read, or ``out`` cannot be written.
    """
    return run(["export", *arguments(options), "--", src, out]).strip()


def models() -> list[dict[str, Any]]:
    """Return the built-in mappings: name, ``model_type`` values and layouts of each."""
    known: list[dict[str, Any]] = json.loads(run(["models", "--json"]))
    return known


def status() -> list[dict[str, Any]]:
    """Return the mounts on this machine: mount point, source, and whether it answers."""
    mounts: list[dict[str, Any]] = json.loads(run(["status", "--json"]))
    return mounts


def find_command() -> str:
    """Return the absolute path of the command.

    Raises:
        Error: the command is not found.
    """
    named = os.environ.get("MOUNT_CKPT")
    if named:
        found = shutil.which(named)
        if found is None:
            raise Error(f"the environment variable MOUNT_CKPT names no program: `{named}`")
        return os.path.abspath(found)
    # The scripts directory of this environment, that of `pip install --user`, and PATH.
    scripts, of_user = sysconfig.get_path("scripts"), sysconfig.get_path("scripts", "posix_user")
    for path in (scripts, of_user, None):
        found = shutil.which("mount-ckpt", path=path)
        if found is not None:
            return os.path.abspath(found)
    raise Error(
        "cannot find the command `mount-ckpt`: install it with `pip install mount-ckpt`, "
        "or set the environment variable MOUNT_CKPT to its path"
    )


def arguments(options: dict[str, Option]) -> list[str]:
    """Convert keyword arguments to arguments of the command."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [f"{flag}={_word(name, each)}" for each in value]
        else:
            words.append(f"{flag}={_word(name, value)}")
    return words


def _word(name: str, value: Value) -> str:
    # The command expects permission bits as octal digits; here they are a number, such as 0o444.
    if isinstance(value, int) and name.endswith("_mode"):
        return f"{value:o}"
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def run(words: Sequence[PathLike]) -> str:
    """Run the command and return its standard output.

    Raises:
        Error: the command exits with another status than 0; the text is its message.
    """
    command = [find_command(), *words]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise failure(done.returncode, done.stderr)
    return os.fsdecode(done.stdout)


def failure(code: int, stderr: bytes) -> Error:
    """Return the exception for an exit code other than 0 and what the command wrote to stderr."""
    message = os.fsdecode(stderr).strip()
    if code == 2:
        # Leave out the usage text after the message.
        message = message.partition("\n\nUsage:")[0].partition("\n\nFor more information")[0]
        return UsageError(_without(message, "error: "))
    return Error(_without(message, "mount-ckpt: ") or f"`mount-ckpt` ended with exit code {code}")


def _without(text: str, prefix: str) -> str:
    return text[len(prefix) :] if text.startswith(prefix) else text
