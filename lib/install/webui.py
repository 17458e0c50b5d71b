"""The webui: what its version wants where, read from its own files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from . import environment, flags
from .environment import Environment
from .platforms import Platform
from .source import NAME
from .stopping import Refused


@dataclass(frozen=True)
class FlagsFile:
    """A webui's CMD_FLAGS.txt.

    Attributes:
        is_for_script_only: only the start script reads it; a server.py that is started by hand does not.
    """

    path: Path
    is_for_script_only: bool


@dataclass(frozen=True)
class Webui:
    """A text-generation-webui.

    Attributes:
        folder: as it was given: links are not followed, what lies beside it counts.
        extensions: the folder where this version looks for the user's extensions.
        launcher: the folder with the start script, where the one-click installer keeps its environment; None without.
        flags: its CMD_FLAGS.txt; None where this version has none.
        environment: the one that it runs in; None if none was found.
    """

    folder: Path
    platform: Platform
    extensions: Path
    launcher: Path | None
    flags: FlagsFile | None
    environment: Environment | None

    @property
    def is_started_by_script(self) -> bool:
        """Whether its start script is the way to start it: its environment is the one-click installer's, or to come."""
        if self.launcher is None:
            return False
        return self.environment is None or self.launcher / "installer_files" in self.environment.python.parents


def read(path: str, platform: Platform) -> Webui:
    """Find out all about the webui at `path`; changes nothing.

    Raises:
        Refused: it is none, or one that the extension cannot help.
    """
    folder = Path(os.path.normpath(os.path.join(_called_from(), path)))
    if not os.path.isdir(folder) or not os.access(folder, os.X_OK):
        raise Refused(f"'{path}' is not a folder that can be opened. Nothing was changed.")
    _must_be_a_webui(folder, platform)
    launcher = _launcher(folder, platform)
    flags_file = _flags_file(folder, launcher)
    return Webui(
        folder=folder,
        platform=platform,
        extensions=_extensions(folder, flags_file),
        launcher=launcher,
        flags=flags_file,
        environment=_environment(folder, launcher, platform),
    )


def _called_from() -> str:
    """The current folder, by the name that the user's shell has for it: not where its links lead."""
    name = os.environ.get("PWD", "")
    try:
        return name if os.path.isabs(name) and os.path.samefile(name, os.curdir) else os.getcwd()
    except OSError:
        return os.getcwd()


def _must_be_a_webui(folder: Path, platform: Platform) -> None:
    if (folder / "portable_env").is_dir() or (folder / "app" / "portable_env").is_dir():
        raise Refused(
            f"{folder} is a portable build: it has no PyTorch and runs GGUF models only, which {NAME} cannot help.\n"
            "It is for the full version of the webui. Nothing was changed."
        )
    for file in ("server.py", "modules/shared.py", "modules/extensions.py"):
        if not (folder / file).is_file():
            inside = folder / "text-generation-webui"
            instead = f"\nDid you mean {platform.shell.quoted(inside)}?" if (inside / "server.py").is_file() else ""
            raise Refused(
                f"{folder} is not a text-generation-webui: it has no {Path(file)}. Nothing was changed.{instead}"
            )


def _launcher(folder: Path, platform: Platform) -> Path | None:
    if (folder / "one_click.py").is_file() and (folder / platform.start_script).is_file():
        return folder
    # The one-click installer until September 2023 lies beside the webui.
    beside = folder.parent
    if (beside / "webui.py").is_file() and (beside / platform.start_script).is_file():
        return beside
    return None


def _flags_file(folder: Path, launcher: Path | None) -> FlagsFile | None:
    if _says(folder / "modules" / "shared.py", r"CMD_FLAGS\.txt"):  # v3.1 and later
        return FlagsFile(folder / "user_data" / "CMD_FLAGS.txt", is_for_script_only=False)
    if launcher is not None and any(_says(launcher / name, r"CMD_FLAGS\.txt") for name in ("one_click.py", "webui.py")):
        return FlagsFile(launcher / "CMD_FLAGS.txt", is_for_script_only=True)
    return None


def _extensions(folder: Path, flags_file: FlagsFile | None) -> Path:
    # v3.7 and later look into user_data/extensions first, and leave it alone when they update themselves.
    if not _says(folder / "modules" / "extensions.py", r"user_data(_dir)?[ /'\"]+extensions"):
        return folder / "extensions"
    data = folder / "user_data"
    if flags_file is not None:
        flag = flags.find(flags.read(flags_file.path), "--user-data-dir")
        if flag is not None and flag.values:
            data = Path(os.path.normpath(folder / flag.values[0]))
    if not data.is_dir():
        raise Refused(f"{data} is missing: that is where this webui looks for extensions. Nothing was changed.")
    return data / "extensions"


def _environment(folder: Path, launcher: Path | None, platform: Platform) -> Environment | None:
    for place in ((launcher or folder) / "installer_files" / "env", folder / "venv", folder / ".venv"):
        own = environment.in_folder(place, platform)
        if own is not None:
            return own
    for place in environment.active_folders():  # It need not be the webui's.
        other = environment.in_folder(place, platform)
        if other is not None and other.has("torch", "gradio"):
            return other
    return None


def _says(file: Path, pattern: str) -> bool:
    return file.is_file() and re.search(pattern, flags.decoded(file.read_bytes())) is not None
