"""What is put into a webui: the extension in this clone, and the names that mark it there as ours."""

from __future__ import annotations

from pathlib import Path

NAME = "sharded_kv"
ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "extensions" / NAME
REQUIREMENTS = EXTENSION / "requirements.txt"
# In a copy that --copy made. A folder of our name without it is somebody else's.
MARKER = ".installed_by_install.sh"
