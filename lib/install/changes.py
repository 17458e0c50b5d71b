"""All or nothing: what a run changes is put back, the last change first, if the run does not reach its end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Callable, Iterator

from . import paths
from .stopping import Refused, uninterrupted
from .talk import complain, reason, say


class Changes:
    """What a run has changed so far.

    How to put a change back is noted before the change is made, and does nothing where it was not made yet: the run
    may end in the midst of any of them.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._set_aside: list[Path] = []

    def to_undo(self, undo: Callable[[], None]) -> None:
        """Note how something is put back that the caller changes next."""
        self._undo.append(undo)

    def make_folder(self, folder: Path) -> None:
        """Make a folder that is not there."""

        def undo() -> None:
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()

        self.to_undo(undo)
        folder.mkdir()

    def write(self, file: Path, content: bytes) -> None:
        """Write a file, whether it was there or not."""
        file = Path(os.path.realpath(file))
        if file.exists():
            before, times = file.read_bytes(), file.stat()

            def undo() -> None:
                try:
                    paths.write(file, before)
                except OSError:
                    file.write_bytes(before)
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

            self.to_undo(undo)
        else:
            self.to_undo(lambda: paths.remove(file))
        paths.write(file, content)

    def take_away(self, path: Path) -> None:
        """Set a file, link or folder aside, if it is there; it is gone for good when the run reaches its end."""
        if not paths.exists(path):
            return
        aside = paths.beside(path, "before")
        paths.remove(aside)  # of a run that was killed

        def undo() -> None:
            if paths.exists(aside):
                paths.remove(path)
                os.replace(aside, path)

        self.to_undo(undo)
        self._set_aside.append(aside)
        os.replace(path, aside)

    @contextlib.contextmanager
    def put(self, path: Path) -> Iterator[Path]:
        """Give the path where something is made that goes to `path` once it is whole, in place of what is there."""
        new = paths.beside(path, "new")
        self.to_undo(lambda: paths.remove(new))
        paths.remove(new)  # of a run that was killed
        yield new
        if not paths.exists(path):
            self.to_undo(lambda: paths.remove(path))
        self.take_away(path)
        os.replace(new, path)

    def finish(self) -> None:
        """Nothing is put back any more; remove what was set aside."""
        self._undo.clear()
        for path in self._set_aside:
            try:
                paths.remove(path)
            except OSError as error:
                say(f"{path} can go, but could not be removed: {reason(error)}")

    def put_back(self) -> list[str]:
        """Put everything back, and give what was in the way of that."""
        troubles = []
        while self._undo:
            try:
                self._undo.pop()()
            except OSError as error:
                troubles.append(reason(error))
        return troubles


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Changes]:
    """Changes that are all put back if an error or a signal ends the block.

    Raises:
        Refused: in place of an error of the operating system, with what it says.
    """
    changes = Changes()
    is_done = False
    try:
        yield changes
        with uninterrupted():
            is_done = True
            changes.finish()
    except BaseException as error:
        if is_done:
            raise
        with uninterrupted():
            how = _put_back(changes)
        if isinstance(error, OSError):
            raise Refused(f"{reason(error)}\n{how}") from error
        complain(how)
        raise


def _put_back(changes: Changes) -> str:
    troubles = changes.put_back()
    if not troubles:
        return "Stopped halfway; everything was put back as it was."
    return "\n  ".join(["Stopped halfway, and not everything could be put back:", *troubles])
