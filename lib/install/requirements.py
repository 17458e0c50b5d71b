"""What the extension needs beside what the webui has: put into the webui's environment, and taken out of it."""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path

from . import environment
from .changes import Changes
from .environment import Environment
from .platforms import Platform
from .record import Package
from .source import NAME, REQUIREMENTS
from .talk import say, step
from .webui import Webui


def install(webui: Webui, changes: Changes) -> tuple[Package, ...]:
    """Install what is missing, and give what was added.

    What is there does not change. A failure is only a warning: the extension works without its requirements.
    """
    place = webui.environment
    if place is None:
        own = Path("installer_files", "env")
        say(f"No environment of this webui was found: {own}, venv, .venv, or an active one with torch and gradio.")
        _say_how_to_install("python", webui.platform)
        return ()
    present = place.packages()
    if present is None:
        say(f"{place.folder} has no pip that works.")
        _say_how_to_install(place.python, webui.platform)
        return ()
    there = [wanted for wanted in _requirements() if _is_installed(wanted, present, place)]
    missing = [wanted for wanted in _requirements() if wanted not in there]
    if there:
        say(f"{_names(there)} is in {place.folder} already, and stays as it is.")
    if not missing:
        return ()
    changes.to_undo(lambda: _take_back(place, present))
    if not _pip_install(place, missing, present):
        _say_how_to_install(place.python, webui.platform)
        return ()
    return tuple(_package(place, line) for line in place.packages() or () if line not in present)


def uninstall(packages: tuple[Package, ...], platform: Platform) -> None:
    """Uninstall what was added, as far as nothing else needs it by now."""
    for package in packages:
        place = environment.of_python(package.python, platform)
        needing = place.needing(package.name)
        if needing is None:  # It is gone already.
            continue
        if needing:
            say(f"{package.name} stays in {place.folder}: {needing} needs it.")
        elif not step(
            f"uninstalling {package.name} from {place.folder}",
            partial(place.pip, "uninstall", "-qq", "-y", package.name),
        ):
            command = platform.shell.run(package.python, "-m", "pip", "uninstall", package.name)
            say("\n  ".join([f"To try again: {command[0]}", *command[1:]]))


def _requirements() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in (re.sub(r"\s*#.*", "", line).strip() for line in lines) if line]


def _names(requirements: list[str]) -> str:
    return " ".join(re.split(r"[<>=~!]", requirement)[0] for requirement in requirements)


def _is_installed(requirement: str, present: tuple[str, ...], place: Environment) -> bool:
    """Whether it is there, in any version."""
    name = _names([requirement])
    pattern = re.sub(r"[-_.]", "[-_.]", name) + "=="
    if any(re.match(pattern, line, re.IGNORECASE) for line in present):
        return True
    # Packages of other names have brought the same module: pynvml up to 11, nvidia-ml-py3.
    return name == "nvidia-ml-py" and place.has("pynvml")


def _pip_install(place: Environment, missing: list[str], present: tuple[str, ...]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        # All that is there is a constraint: pip may add, and change nothing.
        # realpath: what a Python of the Microsoft Store calls its temporary folder is another one for other programs.
        constraints = Path(os.path.realpath(folder), "constraints.txt")
        constraints.write_text("".join(f"{line}\n" for line in present), encoding="utf-8")
        options = ("-qq", "--only-binary", ":all:", "--retries", "1", "--constraint", constraints)
        label = f"installing {_names(missing)} into {place.folder}"
        return step(label, lambda: place.pip("install", *options, *missing))


def _package(place: Environment, line: str) -> Package:
    name, _, version = line.partition("==")
    return Package(place.python, name, version)


def _take_back(place: Environment, present: tuple[str, ...]) -> None:
    """Uninstall what pip had installed when it was stopped."""
    for line in place.packages() or ():
        if line not in present:
            place.pip("uninstall", "-qq", "-y", _package(place, line).name)


def _say_how_to_install(python: object, platform: Platform) -> None:
    say(f"{NAME} works without its requirements; VRAM figures then come from torch alone. To install them:")
    for line in platform.shell.run(python, "-m", "pip", "install", "-r", REQUIREMENTS):
        say(f"  {line}")
