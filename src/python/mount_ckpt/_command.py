"""Runs the command ``mount-ckpt``: options become arguments, and its messages exceptions."""

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from typing import Any, Union

#: A path, or a name where the command takes one.
PathLike = Union[str, os.PathLike[str]]
#: One value of an option.
Value = Union[str, int, float, os.PathLike[str]]
#: The value of an option: a flag, one value, or one value for each time that the option is given.
Option = Union[None, bool, Value, Sequence[Value]]


class Error(Exception):
    """What the command refused or failed to do, in its own words."""


class UsageError(Error):
    """An option that does not exist, or whose value it does not take."""


def inspect(src: PathLike, **options: Option) -> dict[str, Any]:
    """Return the plan of a view: where each of its tensors comes from. Mounts nothing.

    This is what a mounted view has in ``.mount-ckpt/plan.json``.

    Raises:
        Error: there is no checkpoint, or no such view of it.
    """
    plan: dict[str, Any] = json.loads(run(["inspect", "--json", *arguments(options), "--", src]))
    return plan


def verify(src: PathLike, **options: Option) -> dict[str, Any]:
    """Make every check that a mount makes, then read and check all the data once.

    Returns the number of tensors and bytes that were read. Where some FP8 tensors were decoded,
    ``fp8_blocks`` says how many of their blocks hold the largest code.

    Raises:
        Error: there is no such view, or some of its tensors cannot be read; the message names
            the first ones.
    """
    result: dict[str, Any] = json.loads(run(["verify", "--json", *arguments(options), "--", src]))
    return result


def export(src: PathLike, out: PathLike, **options: Option) -> str:
    """Write a view to the directory ``out``, and return the command's summary.

    An export that was interrupted is continued by the same call.

    Raises:
        Error: there is no such view, it cannot be read, or ``out`` cannot be written.
    """
    return run(["export", *arguments(options), "--", src, out]).strip()


def models() -> list[dict[str, Any]]:
    """Return the models that have a built-in mapping: name, ``model_type`` and layouts of each."""
    known: list[dict[str, Any]] = json.loads(run(["models", "--json"]))
    return known


def status() -> list[dict[str, Any]]:
    """Return the mounts of this machine that are up: mount point, source, whether it answers."""
    mounts: list[dict[str, Any]] = json.loads(run(["status", "--json"]))
    return mounts


def find_command() -> str:
    """Return the absolute path of the command.

    Raises:
        Error: it is nowhere.
    """
    named = os.environ.get("MOUNT_CKPT")
    if named:
        found = shutil.which(named)
        if found is None:
            raise Error(f"the environment variable MOUNT_CKPT names no program: `{named}`")
        return os.path.abspath(found)
    # The scripts of this environment, those of `pip install --user`, and PATH.
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
    """Turn options by name into arguments of the command."""
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
    # The command reads permission bits as octal digits, and 0o444 is a number here.
    if isinstance(value, int) and name.endswith("_mode"):
        return f"{value:o}"
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def run(words: Sequence[PathLike]) -> str:
    """Run the command and return what it prints.

    Raises:
        Error: with the command's message, where it exits with anything but 0.
    """
    command = [find_command(), *words]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise failure(done.returncode, done.stderr)
    return os.fsdecode(done.stdout)


def failure(code: int, stderr: bytes) -> Error:
    """Return the exception for an exit code other than 0 and the message that came with it."""
    message = os.fsdecode(stderr).strip()
    if code == 2:
        # After the message comes how the command is called, which is of no use here.
        message = message.partition("\n\nUsage:")[0].partition("\n\nFor more information")[0]
        return UsageError(_without(message, "error: "))
    return Error(_without(message, "mount-ckpt: ") or f"`mount-ckpt` ended with exit code {code}")


def _without(text: str, prefix: str) -> str:
    return text[len(prefix) :] if text.startswith(prefix) else text
