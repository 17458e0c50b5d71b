"""What install.sh answers before it installs anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "install.sh"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INSTALL, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_help_names_every_way_to_run_it_from_any_folder(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for way in ["./install.sh WEBUI", "--copy", "--enable", "--uninstall", "--demo", "--test"]:
        assert way in done.stdout


def test_no_argument_shows_the_help_as_an_error(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "--demo" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dmeo",), "'--dmeo'"),
        (("--test", "--stack", "2022"), "2023 2024 gptqmodel now"),
        (("--test", "--stack"), "2023 2024 gptqmodel now"),
        (("--test", "-k", "llama"), "--test -- -k"),
    ],
)
def test_an_argument_it_does_not_know_is_named_in_the_error(tmp_path, arguments, named):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
