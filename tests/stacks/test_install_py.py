"""What install.py does beyond install.sh: on Windows, as far as that can be tried elsewhere, and on which Pythons."""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.install.command import main
from lib.install.platforms import WINDOWS
from lib.install.shells import PosixShell, WindowsShell
from tests.stacks.stand_ins import EXTENSION, REPOSITORY, V4, environment, everything_in, make

INSTALL = REPOSITORY / "install.py"


@pytest.fixture
def v4(tmp_path):
    return make(tmp_path / "my webui", V4)


# --- links ------------------------------------------------------------------------------------------------------------


def not_allowed(source: Path, link: Path) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


def leads_nowhere(source: Path, link: Path) -> None:
    """As a junction to another machine does, which Windows makes and does not follow."""
    os.symlink(r"\\server\share", link)


def junction(source: Path, link: Path) -> None:
    os.symlink(source, link)


def with_links(*links):
    return dataclasses.replace(WINDOWS, links=links)


def test_a_junction_is_made_where_a_symbolic_link_is_not_allowed(v4, capsys):
    assert main([str(v4)], with_links(not_allowed, junction)) == 0
    assert os.readlink(v4 / "user_data/extensions/sharded_kv") == str(EXTENSION)
    assert "is linked into" in capsys.readouterr().out


@pytest.mark.parametrize("links", [(not_allowed, not_allowed), (leads_nowhere, not_allowed), ()])
def test_a_copy_is_made_where_there_can_be_no_link_and_that_is_said(v4, capsys, links):
    before = everything_in(v4)
    for _ in range(2):
        assert main([str(v4)], with_links(*links)) == 0
        assert "No link can be made there" in capsys.readouterr().out
        assert (v4 / "user_data/extensions/sharded_kv/.installed_by_install.sh").is_file()
    assert main([str(v4), "--uninstall"], with_links(*links)) == 0
    assert everything_in(v4) == before


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "written"),
    [
        (r"C:\text-generation-webui", r"C:\text-generation-webui"),
        (r"D:\my webui", r'"D:\my webui"'),
        (r"\\server\c$\webui", r'"\\server\c$\webui"'),
        (r"C:\a & b (2)", r'"C:\a & b (2)"'),
        (r"C:\Users\José\webui", r"C:\Users\José\webui"),
    ],
)
def test_paths_of_windows_are_written_as_cmd_and_powershell_both_take_them(path, written):
    assert WindowsShell().quoted(path) == written


@pytest.mark.parametrize(
    "word", ["a b", "it's", "$HOME", "a\nb", "~", "", "#", "*?[x]", "José", "a\\b", "{a,b}", "a&b;c"]
)
def test_words_are_written_as_bash_takes_them(word):
    command = f"printf %s {PosixShell().quoted(word)}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout == word


def test_a_program_whose_path_needs_quotes_is_run_from_its_own_folder():
    # In quotes, PowerShell would take the path for a text and show it.
    assert WindowsShell().run(r"D:\my webui\venv\Scripts\python.exe", "-m", "pip", "install", "x y") == [
        r'pushd "D:\my webui\venv\Scripts"',
        r'.\python.exe -m pip install "x y"',
    ]


def test_any_other_program_is_run_in_one_line():
    assert WindowsShell().run(r"D:\env\python.exe", "-m", "pip") == [r"D:\env\python.exe -m pip"]


def test_a_folder_that_a_shell_has_completed_does_not_swallow_the_options(v4):
    # "C:\my webui\" --enable: cmd and PowerShell put the backslash there, and Windows takes \" for a quotation mark.
    assert main([f'{v4}" --enable'], WINDOWS) == 0
    assert "sharded_kv" in (v4 / "user_data/CMD_FLAGS.txt").read_text()


def test_help_and_errors_name_the_way_it_is_started_there(v4, capsys):
    assert main(["--help"], WINDOWS) == 0
    assert "py install.py WEBUI --uninstall" in capsys.readouterr().out
    assert main(["--enable"], WINDOWS) == 2
    assert r"As in: py install.py C:\path\to\text-generation-webui" in capsys.readouterr().err


# --- a clone in the webui ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["install.sh", "install.py"])
def test_a_clone_that_lies_in_its_own_place_is_told_to_be_moved(v4, door):
    clone = v4 / "user_data/extensions/sharded_kv"
    for name in ("lib", "extensions"):
        shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("install.sh", "install.py"):
        shutil.copy(REPOSITORY / name, clone / name)
    before = everything_in(v4)
    command = [clone / door] if door == "install.sh" else [sys.executable, clone / door]
    done = subprocess.run([*command, v4], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "This clone itself lies where the webui looks for the extension" in done.stderr
    assert everything_in(v4) == before


# --- the Python it runs on --------------------------------------------------------------------------------------------

FILES = [INSTALL, *sorted((REPOSITORY / "lib/install").glob("*.py"))]


def pythons(*versions: str) -> list[str]:
    """The Pythons of these versions on this machine."""
    found = [shutil.which(f"python{version}") for version in versions]
    found += [str(path) for version in versions for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    return [path for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_is_python_3_8_and_the_standard_library(file):
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.partition(".")[0])
    assert imported <= sys.stdlib_module_names | {"lib"}


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.13"])
def test_it_runs_on_old_and_new_pythons(v4, version):
    if not (found := pythons(version)):
        pytest.skip(f"there is no Python {version} here")
    before = everything_in(v4)
    for options in [("--enable",), ("--enable", "--copy"), ("--uninstall",)]:
        subprocess.run([found[0], "-I", INSTALL, v4, *options], env=environment(), check=True, stdout=subprocess.PIPE)
    assert everything_in(v4) == before


def test_a_python_that_is_too_old_is_told_which_it_needs():
    if not (found := pythons("2.7", "3.6", "3.7")):
        pytest.skip("there is no Python here that is too old")
    for python in found:
        done = subprocess.run([python, INSTALL, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "needs Python 3.8 or newer" in done.stderr


def test_without_a_python_install_sh_takes_the_webui_s_own(v4, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "date", "dirname", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    command = [REPOSITORY / "install.sh", v4]
    variables = environment(PATH=tools, HOME=tmp_path)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs Python 3.8 or newer" in done.stderr
    python = v4 / "installer_files/env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!{tools / "bash"}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE)
    assert (v4 / "user_data/extensions/sharded_kv").is_symlink()
