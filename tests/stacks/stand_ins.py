"""Webuis that have what the installer looks at and nothing else, for the tests of it."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
EXTENSION = REPOSITORY / "extensions" / "sharded_kv"

# Files of the webui, down to what tells its versions apart.
MAY_2023 = {
    "modules/shared.py": "",
    "modules/extensions.py": "import extensions.NAME.script",
    "extensions/x/script.py": "",
}
ONE_CLICK = MAY_2023 | dict.fromkeys(("one_click.py", "start_linux.sh", "start_macos.sh", "start_windows.bat"), "")
V2 = ONE_CLICK | {"one_click.py": "CMD_FLAGS.txt", "CMD_FLAGS.txt": "# --listen\n"}
V3_1 = ONE_CLICK | {
    "modules/shared.py": 'Path("user_data") / "CMD_FLAGS.txt"',
    "user_data/CMD_FLAGS.txt": "# --listen\n",
}
V3_7 = V3_1 | {"modules/extensions.py": "f'user_data/extensions/{name}'", "user_data/extensions/x.txt": ""}
V4 = V3_7 | {"modules/extensions.py": "shared.user_data_dir / 'extensions' / name"}
VERSIONS = {"May 2023": MAY_2023, "v2": V2, "v3.1": V3_1, "v3.7": V3_7, "v4": V4}

# Answers like a Python whose environment has all that the extension needs, and starts nothing but itself.
STUB_PYTHON = """#!/bin/sh
case "$*" in
  *"pip "*" list "*) echo nvidia-ml-py==12.0 ;;
  server.py*) echo "in $PWD: $*" ;;
esac
"""


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in ({"server.py": ""} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def make_executable(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def environment(**variables: object) -> dict[str, str]:
    """The variables the installer runs with: no environment is active, and pip knows no index."""
    ours = ("PIP_", "PYTHON", "VIRTUAL_ENV", "CONDA_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return mine | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull} | {k: str(v) for k, v in variables.items()}


def everything_in(folder: Path, but: str = "") -> dict[str, tuple[int, object]]:
    """Each path below a folder with its mode and its bytes, or where it leads."""
    found: dict[str, tuple[int, object]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if but and name.startswith(but):
            continue
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[name] = (path.lstat().st_mode, content)
    return found
