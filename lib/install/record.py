"""What the installer did to a webui, in a file beside the extension, for its --uninstall."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from .source import NAME


@dataclass(frozen=True)
class Package:
    """A package that the installer added to an environment."""

    python: Path
    name: str
    version: str


@dataclass(frozen=True)
class Record:
    """What was done.

    Attributes:
        made_folder: the folder of extensions was not there before.
        flagged: the CMD_FLAGS.txt that --enable changed.
        flags_before: what was in it; None if there was no such file.
        packages: what pip installed for us.
    """

    made_folder: bool = False
    flagged: Path | None = None
    flags_before: bytes | None = None
    packages: tuple[Package, ...] = ()

    def to_bytes(self) -> bytes:
        """The file: one KEY=VALUE a line, the former flags in base64."""
        before = "none" if self.flags_before is None else base64.b64encode(self.flags_before).decode()
        lines = [
            f"# What install.sh of {NAME} did here, for its --uninstall.",
            f"made_folder={'true' if self.made_folder else ''}",
            f"flagged={self.flagged or ''}",
            f"flags_before={before if self.flagged else ''}",
            *(f"package={package.python}\t{package.name}=={package.version}" for package in self.packages),
        ]
        return os.fsencode("".join(f"{line}\n" for line in lines))


def read(file: Path) -> Record:
    """The record in a file; of nothing, if there is none."""
    values: dict[str, list[str]] = {}
    for line in os.fsdecode(file.read_bytes()).split("\n") if file.is_file() else []:
        key, _, value = line.partition("=")
        values.setdefault(key, []).append(value)

    def of(key: str) -> str:
        return values.get(key, [""])[0]

    had_flags = of("flagged") and of("flags_before") != "none"
    return Record(
        made_folder=of("made_folder") == "true",
        flagged=Path(of("flagged")) if of("flagged") else None,
        flags_before=base64.b64decode(of("flags_before")) if had_flags else None,
        packages=tuple(map(_package, values.get("package", []))),
    )


def _package(text: str) -> Package:
    python, _, package = text.partition("\t")
    name, _, version = package.partition("==")
    return Package(Path(python), name, version)
