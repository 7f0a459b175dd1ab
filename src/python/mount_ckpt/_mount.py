"""A mount that lasts as long as a ``with`` block, or as the Python process.

The view is served by a process of its own in the background, so threads and forks of this process do
not disturb it. Who takes it down:

- ``close()``, the end of the ``with`` block, the garbage collector or the end of the interpreter,
  whichever comes first, in the process that mounted. A forked process does nothing.
- Where this process ends without any of them (SIGKILL, ``os._exit``), the keeper: a shell that
  started the mount and waits at a pipe whose other end this process has. Forked processes inherit
  that end, so the view stays until the last of them is gone too.
"""

import contextlib
import os
import subprocess
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import Optional

from ._command import Error, Option, PathLike, UsageError, arguments, failure, find_command, run

# $0 is the command, $1 the mount point, $2 the temporary directory that is it or nothing, and the
# rest the arguments of the mount. `read` fails where the pipe closes before a line comes.
_KEEPER = """
at=$1 temporary=$2
shift 2
trap '[ -z "$temporary" ] || rmdir -- "$temporary"' EXIT
"$0" "$@" || exit
cd /
read -r line || "$0" umount --lazy --quiet -- "$at"
"""


class Mount:
    """A view that is mounted. Made by :func:`mount`."""

    #: The mount point.
    path: Path

    def __init__(self, path: Path, keeper: subprocess.Popen[bytes]) -> None:
        self.path = path
        # Runs once: at close(), when the object is collected, or at the end of the interpreter.
        self._finish = weakref.finalize(self, _take_down, os.getpid(), path, keeper)

    def close(self) -> None:
        """Unmount. Does nothing the second time, and in a forked process.

        A view that is in use, for instance by a tensor that lies in it, is detached: the path is
        empty at once, and what is open can be read until it is closed.

        Raises:
            Error: the view cannot be unmounted.
        """
        self._finish()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<mount_ckpt.Mount at {str(self.path)!r}{'' if self._finish.alive else ', closed'}>"


def mount(
    src: PathLike, to: Optional[str] = None, *, at: Optional[PathLike] = None, **options: Option
) -> Mount:
    """Mount a view of the checkpoint ``src``, and return once it answers.

    As a context manager the result is the mount point, and the end of the block unmounts::

        with mount_ckpt.mount("/data/MiMo-V2-Flash", ep_size=8) as path:
            ...

    Without ``with``, ``path`` of the result is the mount point, and ``close()`` unmounts. A view
    that is not closed is unmounted when the result is garbage collected, and at the end of the
    process, however it ends.

    Args:
        src: A checkpoint directory, an entry of the hub cache, or the name of a model in it.
        to: Layout of the view: ``native``, ``transformers`` or ``hf``. By default ``native`` for a
            published checkpoint and ``hf`` for any other.
        at: An empty directory to mount at. By default it is a new temporary one, removed at the end.
        options: Options of the command by name, as the module's documentation explains.

    Raises:
        UsageError: there is no such option, or it does not take this value.
        Error: there is no such view, or it cannot be mounted.
    """
    if options.keys() & {"foreground", "help", "version"}:
        raise UsageError("`foreground`, `help` and `version` are for the command line only")
    command = find_command()
    words = arguments({"to": to, **options})
    if at is not None:
        path, temporary = Path(at).absolute(), ""
    else:
        path = Path(tempfile.mkdtemp(prefix="mount-ckpt-"))
        temporary = str(path)
    keeper = _start([command, str(path), temporary, *words, "--", os.fspath(src), str(path)])
    return Mount(path, keeper)


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    """Start the keeper, and return once the view that it mounts answers."""
    with tempfile.TemporaryFile() as stderr:
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # Ctrl-C is for this process, which decides when the view goes.
            start_new_session=True,
        )
        assert keeper.stdout is not None
        try:
            # The command prints one line when the view answers, and none where it fails.
            with keeper.stdout as stdout:
                mounted = stdout.readline()
        except BaseException:
            # Interrupted: the view that may be coming up goes again.
            _dismiss(keeper, b"")
            raise
        if not mounted:
            _dismiss(keeper, b"")
            stderr.seek(0)
            raise failure(keeper.returncode, stderr.read())
    return keeper


def _dismiss(keeper: subprocess.Popen[bytes], line: bytes) -> None:
    """End the keeper: with a line, it leaves the unmounting to us."""
    assert keeper.stdin is not None
    # It may have ended by itself, or been killed.
    with contextlib.suppress(BrokenPipeError), keeper.stdin as stdin:
        stdin.write(line)
    keeper.wait()


def _take_down(owner: int, path: Path, keeper: subprocess.Popen[bytes]) -> None:
    if os.getpid() != owner:
        return
    try:
        run(["umount", "--quiet", "--", path])
    except Error:
        # In use, most likely. Where that is not the reason, this fails as well.
        run(["umount", "--lazy", "--quiet", "--", path])
    _dismiss(keeper, b"unmounted\n")
