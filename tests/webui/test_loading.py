"""script.py loads in every way in which a webui loads it, and whatever a webui lacks. Each start is a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

SOURCE = Path(__file__).resolve().parents[2] / "extensions" / "sharded_kv"
STARTS = Path(__file__).with_name("starts.py")

Facts = dict[str, Any]


def link(to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.symlink_to(SOURCE, target_is_directory=True)


def copy(to: Path) -> None:
    shutil.copytree(SOURCE, to, ignore=shutil.ignore_patterns("__pycache__"))


# Where the extension is in each start, and which libraries are missing there.
PLACES: dict[str, list[tuple[Callable[[Path], None], str]]] = {
    "may_2023": [(link, "extensions/sharded_kv")],
    "another_name": [(copy, "extensions/my_kv")],
    "v4": [(copy, "user_data/extensions/sharded_kv"), (link, "extensions/sharded_kv")],
    "headless": [(copy, "user_data/extensions/sharded_kv"), (link, "extensions/sharded_kv")],
    "name_with_a_dot": [(link, "user_data/extensions/sharded_kv-1.0")],
    "without_torch": [(link, "user_data/extensions/sharded_kv")],
    "without_torch_from_extensions": [(link, "extensions/sharded_kv")],
}
MISSING = {
    "headless": ["gradio"],
    "without_torch": ["torch"],
    "without_torch_from_extensions": ["torch", "gradio"],
}


def run(start: str, folder: Path) -> Facts:
    """What `start` finds in a webui made in `folder`."""
    root, missing = folder / "webui", folder / "missing"
    openai = root / "extensions" / "openai"  # of webui 1 and 2; the library has the same name
    openai.mkdir(parents=True)
    (openai / "__init__.py").touch()
    for put, where in PLACES[start]:
        put(root / where)
    missing.mkdir()
    for name in MISSING.get(start, []):
        (missing / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(STARTS), start, str(root)],
        env={**os.environ, "PYTHONPATH": str(missing), "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    facts: Facts = json.loads(process.stdout.splitlines()[-1])
    return facts


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Facts]:
    """Starts a webui, once for all tests of all test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def start(name: str) -> Facts:
        folder = shared / f"webui-{name}"
        found = folder / "facts.json"
        with FileLock(shared / f"webui-{name}.lock"):
            if not found.exists():
                folder.mkdir()
                found.write_text(json.dumps(run(name, folder)))
        facts: Facts = json.loads(found.read_text())
        return facts

    return start


Started = Callable[[str], Facts]

whole = pytest.mark.parametrize("start", ["may_2023", "another_name", "v4", "headless"])


@whole
def test_a_model_that_the_webui_loads_is_seen(started: Started, start: str) -> None:
    (line,) = [text for level, text, _ in started(start)["loaded"]["lines"] if level == "INFO"]
    assert "GPU 0" in line
    assert "GPU 1" in line


@pytest.mark.parametrize("start", ["may_2023", "v4", "headless"])
def test_a_model_that_the_webui_loads_is_sharded(started: Started, start: str) -> None:
    assert started(start)["loaded"]["ours"]


@pytest.mark.parametrize("start", [*PLACES][:-2])
def test_there_is_one_copy_of_the_package(started: Started, start: str) -> None:
    assert len(started(start)["copies"]) == 1


@whole
def test_nothing_is_put_on_the_path_where_it_would_hide_a_library(started: Started, start: str) -> None:
    facts = started(start)
    assert facts["on the path"] == [facts["root"]]
    assert facts["openai"] is None or "site-packages" in facts["openai"]


@pytest.mark.parametrize("start", [*PLACES][:-2])
def test_nothing_goes_wrong(started: Started, start: str) -> None:
    facts = started(start)
    parts = [part for part in facts.values() if isinstance(part, dict)]
    lines = [*facts["rest"], *(line for part in parts for line in part.get("lines", []))]
    assert [text for level, text, _ in lines if level == "ERROR"] == []


def test_may_2023_has_the_script_as_an_attribute_of_its_package(started: Started) -> None:
    assert started("may_2023")["script"] == "extensions.sharded_kv.script"
    assert started("may_2023")["same script"]


def test_may_2023_loses_us_when_unticked_and_gets_us_back(started: Started) -> None:
    facts = started("may_2023")
    assert not facts["unticked"]["ours"]
    assert facts["ticked again"]["ours"]


def test_a_folder_of_another_name_gives_the_extension_its_name(started: Started) -> None:
    facts = started("another_name")
    assert facts["script"] == "extensions.my_kv.script"
    assert facts["params"]["activate"] is False
    assert not facts["loaded"]["ours"]
    assert all(text.startswith("my_kv: ") for level, text, _ in facts["loaded"]["lines"] if level == "INFO")


def test_a_folder_with_a_dot_in_its_name_works_too(started: Started) -> None:
    facts = started("name_with_a_dot")
    assert facts["params"]["mode"] == "graph"
    assert ["sharded_kv-1.0-mode" in text for level, text, _ in facts["rest"] if level == "WARNING"] == [True]


def test_webui_4_loads_the_script_without_a_package_around_it(started: Started) -> None:
    facts = started("v4")
    assert facts["script"] == "user_ext_sharded_kv"
    assert facts["package"] == ""


def test_webui_4_executes_the_script_anew_and_finds_the_same_extension(started: Started) -> None:
    facts = started("v4")
    assert facts["different scripts"] == 3
    assert facts["different params"] == 1


@pytest.mark.parametrize("start", ["v4", "headless"])
def test_importing_the_package_gives_the_copy_that_the_webui_runs(started: Started, start: str) -> None:
    assert started(start)["shard is"]


def test_without_an_interface_gradio_is_not_missed(started: Started) -> None:
    assert not started("headless")["gradio"]


def test_without_an_interface_one_line_says_why_nothing_was_done(started: Started) -> None:
    (line,) = [text for level, text, _ in started("headless")["rest"] if level == "INFO" and "Loading" not in text]
    assert "Server" in line


def test_without_pytorch_the_panel_says_so(started: Started) -> None:
    facts = started("without_torch")
    assert facts["built"] == 1
    assert ["No module named torch" in text for text in facts["texts"]] == [True]


@pytest.mark.parametrize("version", ["v4.7.3", "v2.8", "may-2023"])
def test_without_pytorch_the_webui_starts_with_us_in_its_extensions_folder(started: Started, version: str) -> None:
    assert started("without_torch_from_extensions").get(version) == ["sharded_kv"]


def test_without_pytorch_the_webuis_log_says_so_once(started: Started) -> None:
    errors = [text for level, text, with_traceback in started("without_torch")["rest"] if with_traceback]
    assert len(errors) == 1
    assert "sharded_kv" in errors[0]
