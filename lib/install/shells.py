"""Commands for people to paste: as bash and zsh take them, and as both cmd and PowerShell do."""

from __future__ import annotations

import ntpath
import re
import shlex
from abc import ABC, abstractmethod
from pathlib import Path


class Shell(ABC):
    """A way to write commands. Each gives lines, to be pasted one after the other."""

    @abstractmethod
    def quoted(self, word: object) -> str:
        """One word, whatever it has in it."""

    @abstractmethod
    def run(self, program: object, *arguments: object) -> list[str]:
        """Run a program from any folder."""

    @abstractmethod
    def run_in(self, folder: object, command: str) -> list[str]:
        """Go to a folder and run something there."""

    @abstractmethod
    def run_here(self, script: str) -> str:
        """The command for a script in the folder where one is."""

    @abstractmethod
    def install_from_home(self, clone: Path, name: str, webui: Path, python: str) -> list[str]:
        """Move the clone of this repository into the user's home, and put the extension into the webui from there."""


class PosixShell(Shell):
    """bash, zsh and their like."""

    def quoted(self, word: object) -> str:
        text = str(word)
        if not text or "\n" in text:
            return shlex.quote(text)
        return re.sub(r"([^\w@%+=:,./-])", r"\\\1", text)

    def run(self, program: object, *arguments: object) -> list[str]:
        return [" ".join(map(self.quoted, (program, *arguments)))]

    def run_in(self, folder: object, command: str) -> list[str]:
        return [f"cd {self.quoted(folder)} && {command}"]

    def run_here(self, script: str) -> str:
        return f"./{script}"

    def install_from_home(self, clone: Path, name: str, webui: Path, python: str) -> list[str]:
        return [f"mv {self.quoted(clone)} ~/{name} && ~/{name}/install.sh {self.quoted(webui)}"]


class WindowsShell(Shell):
    """cmd and PowerShell, in what both understand: no `&&`, no `cd /d`, no quotes around the program."""

    def quoted(self, word: object) -> str:
        text = str(word)
        return text if re.fullmatch(r"[\w\\/:.+=-]+", text) else f'"{text}"'

    def run(self, program: object, *arguments: object) -> list[str]:
        words = " ".join(map(self.quoted, arguments))
        if self.quoted(program) == str(program):
            return [f"{program} {words}"]
        folder, name = ntpath.split(str(program))
        return self.run_in(folder, f"{self.run_here(name)} {words}")

    def run_in(self, folder: object, command: str) -> list[str]:
        return [f"pushd {self.quoted(folder)}", command]  # It changes the drive as well, and takes \\server\share.

    def run_here(self, script: str) -> str:
        return f".\\{script}"

    def install_from_home(self, clone: Path, name: str, webui: Path, python: str) -> list[str]:
        home = Path.home()
        move = self.run_in(home, f"move {self.quoted(clone)} {name}")
        return move + self.run(python, home / name / "install.py", webui)
