"""Files, folders and links, with Windows' junctions as links. A link that leads nowhere exists, too."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

from .source import NAME


def exists(path: Path) -> bool:
    """Whether something has this path."""
    return os.path.lexists(path)


def leads_to(path: Path) -> str:
    """Where a link or junction leads, as it says itself; "" if it is none."""
    try:
        text = os.readlink(path)
    except (OSError, ValueError):  # ValueError: on Windows, what is neither link nor junction but built like one
        return ""
    for prefix, plain in (("\\\\?\\UNC\\", "\\\\"), ("\\\\?\\", "")):  # what Windows puts before a whole path
        if text.startswith(prefix):
            return plain + text[len(prefix) :]
    return text


def beside(path: Path, what: str) -> Path:
    """A path beside this one, for what is there only while a run lasts: a name that nobody else uses."""
    return path.with_name(f".{NAME}.{path.name}.{what}")


def is_same(one: Path, other: Path) -> bool:
    """Whether both paths lead to the same file or folder."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing if there is none."""
    if path.is_dir() and not leads_to(path):
        shutil.rmtree(path)
    elif exists(path):
        os.unlink(path)


def write(file: Path, content: bytes) -> None:
    """Write a file, so that at any moment it has either all of its old content or all of the new.

    Through a link, as an editor would, and with the mode and owner of the file that was there. Where its folder or its
    owner do not allow another file in its place, nor a mount on it, it is written over.
    """
    file = Path(os.path.realpath(file))
    new = beside(file, "new")
    try:
        new.write_bytes(content)
        _take_after(file, new)
        os.replace(new, file)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY):
            raise
        file.write_bytes(content)
    finally:
        remove(new)


def _take_after(file: Path, new: Path) -> None:
    """Give `new` the mode and owner of `file`, if there is one."""
    if not file.exists():
        return
    shutil.copymode(file, new)
    if sys.platform != "win32":
        old, own = file.stat(), new.stat()
        if (old.st_uid, old.st_gid) != (own.st_uid, own.st_gid):
            os.chown(new, old.st_uid, old.st_gid)


def symbolic_link(source: Path, link: Path) -> None:
    """Make `link` lead to the folder `source`. Windows allows that to administrators and in developer mode."""
    os.symlink(source, link, target_is_directory=True)


def junction(source: Path, link: Path) -> None:
    """Make `link` lead to the folder `source`, as Windows allows it to everybody on drives of their own machine."""
    if sys.platform != "win32":
        raise OSError("Only Windows has junctions.")
    import _winapi

    _winapi.CreateJunction(str(source), str(link))
