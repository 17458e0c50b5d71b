"""One run at a time in a webui: two at once would undo each other's work."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Iterator

from .stopping import Refused


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the webui in this folder, by a lock on its server.py. It ends with the process.

    Where the file system has no locks, it goes on without one.

    Raises:
        Refused: another run is at work there.
    """
    with open(folder / "server.py", "rb") as file:
        _lock(file.fileno())
        yield


def _lock(file: int) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # far behind its end: a locked byte could not be read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise Refused("Another run of the installer is at work in this webui. Nothing was changed.") from None
