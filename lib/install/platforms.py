"""What Linux, macOS and Windows do differently, all of it: one `Platform` each."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

from . import paths
from .shells import PosixShell, Shell, WindowsShell
from .source import ROOT


@dataclass(frozen=True)
class Platform:
    """One of them, whichever this program runs on: the tests have Windows' layout on Linux.

    Attributes:
        start_script: what starts a webui of the one-click installer.
        pythons: where a Python may be in its environment.
        on_path: an environment's folders that are on PATH while it is active, as far as its Python needs them.
        links: the ways to make a link to a folder, the best one first; where none works, a copy is made.
        shell: how commands are written that a person pastes.
        door: how this installer is started.
        example: a webui's folder, as a path looks there.
        is_quoted_badly: whether `"C:\\my webui\\" --copy` arrives as one argument, with a quotation mark in it.
    """

    start_script: str
    pythons: tuple[str, ...]
    on_path: tuple[str, ...]
    links: tuple[Callable[[Path, Path], None], ...]
    shell: Shell
    door: tuple[str, ...]
    example: str
    is_quoted_badly: bool = False

    @property
    def installer(self) -> str:
        """This installer's name."""
        return Path(self.door[-1]).name


LINUX = Platform(
    start_script="start_linux.sh",
    pythons=("bin/python",),
    on_path=(),
    links=(paths.symbolic_link,),
    shell=PosixShell(),
    door=("./install.sh",),
    example="/path/to/text-generation-webui",
)
MACOS = replace(LINUX, start_script="start_macos.sh")
WINDOWS = Platform(
    start_script="start_windows.bat",
    pythons=("Scripts/python.exe", "python.exe"),  # of a venv, and of conda
    on_path=("", "Library/bin", "Scripts"),  # where conda's Python finds its libraries, that of TLS among them
    links=(paths.symbolic_link, paths.junction),
    shell=WindowsShell(),
    door=("py", "install.py"),
    example=r"C:\path\to\text-generation-webui",
    is_quoted_badly=True,
)


def here() -> Platform:
    """The one this program runs on."""
    if sys.platform == "darwin":
        return MACOS
    if sys.platform != "win32":
        return LINUX
    # py comes with Python's own installer for Windows alone.
    return WINDOWS if shutil.which("py") else replace(WINDOWS, door=(sys.executable, str(ROOT / "install.py")))
