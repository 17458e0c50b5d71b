"""A folder where a webui looks for extensions, and what of ours is in it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import paths, record
from .record import Record
from .source import EXTENSION, MARKER, NAME
from .stopping import Refused


@dataclass(frozen=True)
class Place:
    """The folder of extensions."""

    folder: Path

    @property
    def target(self) -> Path:
        """Where the extension goes."""
        return self.folder / NAME

    @property
    def record_file(self) -> Path:
        """Where it is written down what was done. The webui does not see it: it looks for */script.py."""
        return self.folder / f".{NAME}.installed"

    @property
    def record(self) -> Record:
        """What was done here before."""
        return record.read(self.record_file)

    @property
    def is_ours(self) -> bool:
        """Whether the target is a link to the extension in some clone, or a copy that --copy made."""
        if paths.leads_to(self.target):
            return Path(os.path.realpath(self.target)).parts[-2:] == EXTENSION.parts[-2:]
        return (self.target / MARKER).is_file()

    @property
    def is_somebody_elses(self) -> bool:
        """Whether something is in our place that we did not put there."""
        return paths.exists(self.target) and not self.is_ours

    def must_be_writable(self) -> None:
        """Refuse if the extension could not be put here or taken out."""
        must_be_writable(self.folder)
        if not paths.leads_to(self.target):  # The folder that a link lies in decides, not where it leads.
            must_be_writable(self.target)
        must_be_writable(self.record_file)


def must_be_writable(path: Path) -> None:
    """Ask before anything is changed whether it can be; of what is not there, its folder.

    Raises:
        Refused: it cannot.
    """
    while not path.exists():
        path = path.parent
    if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)):
        raise Refused(f"{path} cannot be written to by {_user()}. Nothing was changed.")


def _user() -> str:
    if sys.platform == "win32":
        return os.environ.get("USERNAME", "you")
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
