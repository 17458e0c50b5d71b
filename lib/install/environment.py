"""An environment that a webui runs in: its Python, and what pip says and does there."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .platforms import Platform


@dataclass(frozen=True)
class Environment:
    """A folder with a Python in it.

    Attributes:
        on_path: its folders that go before PATH for what is run in it.
    """

    folder: Path
    python: Path
    on_path: tuple[Path, ...] = ()

    def runs(self) -> bool:
        """Whether its Python starts."""
        return self._run("-I", "-c", "")[0] == 0

    def has(self, *modules: str) -> bool:
        """Whether all of these modules can be imported there."""
        code = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
        return self._run("-I", "-c", code, *modules)[0] == 0

    def pip(self, *arguments: object, with_errors: bool = True) -> tuple[int, str]:
        """Run its pip, and give its exit status and what it prints."""
        # -I leaves out PYTHONPATH and what is in the user's home, as the webui's start script does.
        options = ("-I", "-m", "pip", "--disable-pip-version-check", "--no-input")
        return self._run(*options, *map(str, arguments), with_errors=with_errors)

    def packages(self) -> tuple[str, ...] | None:
        """What is installed, as NAME==VERSION; None if there is no pip that works."""
        status, output = self.pip("list", "--format=freeze", with_errors=False)
        return tuple(sorted(output.splitlines())) if status == 0 else None

    def needing(self, package: str) -> str | None:
        """Which packages need this one, "" if none does; None if it is not there."""
        status, output = self.pip("show", package, with_errors=False)
        if status != 0:
            return None
        needing = re.search(r"^Required-by:[ \t]*(.*)$", output, re.MULTILINE)
        return needing[1].strip() if needing else ""

    def _run(self, *arguments: str, with_errors: bool = False) -> tuple[int, str]:
        try:
            process = subprocess.Popen(
                [str(self.python), *arguments],
                env=self._variables(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if with_errors else subprocess.DEVNULL,
                universal_newlines=True,
                errors="replace",
            )
        except OSError as error:
            return 127, str(error)
        try:
            output = process.communicate()[0]
        except BaseException:
            process.communicate()  # pip is left to end by itself: half of an installation could not be taken back.
            raise
        return process.returncode, output

    def _variables(self) -> dict[str, str]:
        path = os.pathsep.join([*map(str, self.on_path), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PIP_ROOT_USER_ACTION": "ignore", "PATH": path}


def in_folder(folder: Path, platform: Platform) -> Environment | None:
    """The environment in a folder, if there is a Python that starts."""
    for place in platform.pythons:
        environment = Environment(folder, folder / place, _on_path(folder, platform))
        if environment.python.exists() and environment.runs():
            return environment
    return None


def of_python(python: Path, platform: Platform) -> Environment:
    """The environment that a Python belongs to, by where it is."""
    for place in map(Path, platform.pythons):
        folder = python
        for _ in place.parts:
            folder = folder.parent
        if folder / place == python:
            return Environment(folder, python, _on_path(folder, platform))
    return Environment(python.parent, python)


def active_folders() -> list[Path]:
    """The folders of the environments that were active when the installer was started."""
    folders = [os.environ.get(name, "") for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    return [Path(folder) for folder in folders if folder]


def _on_path(folder: Path, platform: Platform) -> tuple[Path, ...]:
    return tuple(folder / place for place in platform.on_path)
