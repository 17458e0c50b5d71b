"""The engine's doors: it knows torch and accelerate, and neither the webui nor Gradio nor our tools."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "extensions" / "sharded_kv" / "engine"


def test_importing_the_engine_imports_no_webui_no_gradio_and_no_tools() -> None:
    script = "import sys; from extensions.sharded_kv import shard; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "extensions.sharded_kv.engine.sharding" in loaded
    strangers = [name for name in loaded if name.split(".")[0] in ("gradio", "modules") or name.startswith("tools")]
    assert strangers == []


def test_importing_the_package_alone_imports_no_torch() -> None:
    script = "import sys, extensions.sharded_kv; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()


def test_no_file_of_the_engine_reaches_outside_it() -> None:
    for path in ENGINE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path.name} imports from above the engine"
