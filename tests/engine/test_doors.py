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
    for path in ENGINE.rglob("*.py"):
        depth = len(path.relative_to(ENGINE).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path.name} imports from above the engine"


def imports_of(package: Path) -> dict[str, set[str]]:
    """Of each module of a package, those of its modules that importing it imports; later imports do not count."""
    root = package.parents[2]
    names = {".".join(path.relative_to(root).with_suffix("").parts): path for path in package.rglob("*.py")}
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join(name.split(".")[: -node.level])
                origin = f"{base}.{node.module}" if node.module else base
                found[name] |= {origin} & names.keys()
                found[name] |= {f"{origin}.{alias.name}" for alias in node.names} & names.keys()
    return found


def test_no_imports_go_in_circles() -> None:
    imports = imports_of(ROOT / "extensions" / "sharded_kv")

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"an import cycle: {' -> '.join((*above, name))}"
        for other in imports[name]:
            visit(other, (*above, name))

    for name in imports:
        visit(name, ())


def test_the_engine_imports_neither_webui_nor_tools_and_the_tools_no_webui_but_for_the_demo() -> None:
    for path in ENGINE.rglob("*.py"):
        assert not {"webui", "tools", "gradio", "modules"} & imported_words(path), path
    for path in (ROOT / "tools").rglob("*.py"):
        if path.name != "page.py":
            assert "webui" not in imported_words(path), path


def imported_words(path: Path) -> set[str]:
    """Every part of every name that a file imports from."""
    words: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            words |= set((node.module or "").split(".")) | {alias.name for alias in node.names if not node.module}
        elif isinstance(node, ast.Import):
            words |= {part for alias in node.names for part in alias.name.split(".")}
    return words
