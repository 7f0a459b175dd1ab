"""Mounts a view for the duration of a ``with`` block, or of the Python process.

A separate background process serves the view, so threads and forks of this process do not affect
it. The view is unmounted in one of two ways:

- The process that mounted it calls ``close()``, leaves the ``with`` block, collects the object as
  garbage, or ends the interpreter, whichever comes first. In a forked process these do nothing.
- If this process ends without any of these (SIGKILL, ``os._exit``), the keeper unmounts. The keeper
  is a shell that started the mount and then reads from a pipe, of which this process has the write
  end. Forked processes inherit the write end, so the view stays until all of them have ended.
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

# $0 is the command, $1 the mount point, $2 the same path if it is a temporary directory, otherwise
# empty, and the rest are the arguments of the mount. `read` fails if the pipe closes before a line
# comes.
_KEEPER = """
at=$1 temporary=$2
shift 2
trap '[ -z "$temporary" ] || rmdir -- "$temporary"' EXIT
"$0" "$@" || exit
cd /
read -r line || "$0" umount --lazy --quiet -- "$at"
"""


class Mount:
    """A mounted view. :func:`mount` creates it."""

    #: The mount point.
    path: Path

    def __init__(self, path: Path, keeper: subprocess.Popen[bytes]) -> None:
        self.path = path
        # Runs once: at close(), at garbage collection, or at the end of the interpreter.
        self._finish = weakref.finalize(self, _unmount, os.getpid(), path, keeper)

    def close(self) -> None:
        """Unmount. Does nothing if called again, or in a forked process.

        A view that is in use, for instance by a tensor that maps a file, is detached: its path is
        empty at once, and open files stay readable until they are closed.

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
    """Mount a view of the checkpoint ``src``, and return when it answers.

    As a context manager the result gives the mount point, and the end of the block unmounts::

        with mount_ckpt.mount("/data/MiMo-V2-Flash", ep_size=8) as path:
            ...

    Without ``with``, ``path`` of the result is the mount point, and ``close()`` unmounts. A view
    that is not closed is unmounted when the result is garbage collected or when the process ends,
    also by a signal.

    Args:
        src: A checkpoint directory, an entry of the hub cache, or the name of a model in it.
        to: Layout of the view: ``native``, ``transformers`` or ``hf``. By default ``native`` for a
            published checkpoint and ``hf`` for any other.
        at: The mount point, an empty directory. By default a new temporary directory, which is
            removed after the unmount.
        options: Options of the command; see the documentation of the module.

    Raises:
        UsageError: an option does not exist, or its value is invalid.
        Error: the view is refused, or it cannot be mounted.
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
    """Start the keeper, and return when the view that it mounts answers."""
    with tempfile.TemporaryFile() as stderr:
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # Ctrl-C must not reach the keeper: this process decides when to unmount.
            start_new_session=True,
        )
        assert keeper.stdout is not None
        try:
            # The command prints one line when the view answers, and nothing if it fails.
            with keeper.stdout as stdout:
                mounted = stdout.readline()
        except BaseException:
            # Interrupted, for instance by Ctrl-C: unmount a view that is being mounted.
            _dismiss(keeper, b"")
            raise
        if not mounted:
            _dismiss(keeper, b"")
            stderr.seek(0)
            raise failure(keeper.returncode, stderr.read())
    return keeper


def _dismiss(keeper: subprocess.Popen[bytes], line: bytes) -> None:
    """End the keeper. If ``line`` is not empty, it ends without unmounting."""
    assert keeper.stdin is not None
    # The keeper may have ended already.
    with contextlib.suppress(BrokenPipeError), keeper.stdin as stdin:
        stdin.write(line)
    keeper.wait()


def _unmount(owner: int, path: Path, keeper: subprocess.Popen[bytes]) -> None:
    if os.getpid() != owner:
        return
    try:
        run(["umount", "--quiet", "--", path])
    except Error:
        # The view is probably in use. If the reason is another, this fails too.
        run(["umount", "--lazy", "--quiet", "--", path])
    _dismiss(keeper, b"unmounted\n")
