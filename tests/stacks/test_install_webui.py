"""What the installer does to a webui: to stand-ins that have what it looks at, and with a pip that has no network.

Each test that runs it does so twice: as a user of Linux does, by install.sh, and by install.py with what it knows of
Windows (its start script, where a Python is in an environment, how commands are written), on whatever this runs on.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from lib.install.command import main
from lib.install.platforms import LINUX
from tests.stacks.stand_ins import (
    EXTENSION,
    MAY_2023,
    REPOSITORY,
    STUB_PYTHON,
    V2,
    V4,
    VERSIONS,
    environment,
    everything_in,
    make,
    make_executable,
)

INSTALL = REPOSITORY / "install.sh"
INSTALL_AS = Path(__file__).parent / "install_as.py"

every_version = pytest.mark.parametrize("version", VERSIONS)


@dataclass(frozen=True)
class Layout:
    """What is where, and what is called how, on a platform that the installer is run as."""

    platform: str
    door: str  # how it is started
    start_script: str  # how the webui's start script is started
    python: str  # in a venv
    conda_python: str

    def command(self, *arguments: object) -> list[str]:
        """The command line that runs the installer."""
        door = [INSTALL] if self.platform == "linux" else [sys.executable, INSTALL_AS, self.platform]
        return [*map(str, door), *map(str, arguments)]

    def broken(self, step: str, folder: Path) -> dict[str, str]:
        """Variables with which each call of a function of Python's does its work, and then says that it could not."""
        # install.sh runs install.py with the Python that it is given: this one leaves out -I and install.py's path.
        words = map(shlex.quote, [sys.executable, str(INSTALL_AS), self.platform])
        script = f"""#!/bin/sh
        case " $1 $2 " in *" -c "*) exec {shlex.quote(sys.executable)} "$@" ;; esac
        shift 2
        exec {" ".join(words)} "$@"
        """
        return {"PYTHON": str(make_executable(folder / "broken", script)), "SHARDED_KV_TEST_BREAKS": step}

    def quoted(self, word: object) -> str:
        """A path as this platform's shells take it, as far as a path of these tests needs it."""
        text = str(word)
        if self.platform == "windows":
            return f'"{text}"' if " " in text else text
        return text.replace(" ", "\\ ")

    def python_in(self, place: str) -> str:
        """Where the Python is in one of a webui's environments."""
        return f"{place}/{self.conda_python if place == 'installer_files/env' else self.python}"

    def start(self, folder: Path, command: str) -> str:
        """The lines that run something in a folder."""
        if self.platform == "windows":
            return f"pushd {self.quoted(folder)}\n{command}"
        return f"cd {self.quoted(folder)} && {command}"


LAYOUTS = [
    Layout("linux", "./install.sh", "./start_linux.sh", "bin/python", "bin/python"),
    Layout("windows", "py install.py", ".\\start_windows.bat", "Scripts/python.exe", "python.exe"),
]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.platform)
def layout(request):
    return request.param


@pytest.fixture
def install(layout):
    """Runs the installer."""

    def install(*arguments: object, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            layout.command(*arguments),
            cwd=cwd,
            env=environment(**variables),
            capture_output=True,
            text=True,
            check=False,
        )

    return install


@pytest.fixture
def said(install):
    """What the installer says when all goes well."""

    def said(*arguments: object, **options: object) -> str:
        done = install(*arguments, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return said


@pytest.fixture
def refused(install):
    """What the installer says when it refuses."""

    def refused(*arguments: object, **options: object) -> str:
        done = install(*arguments, **options)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    return refused


def extension_in(webui: Path) -> Path:
    """Where the extension is in a stand-in."""
    [path] = [path for path in webui.rglob("sharded_kv") if path.parent.name == "extensions"]
    return path


@pytest.fixture
def v4(tmp_path):
    return make(tmp_path / "webui", V4)


# --- where it goes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "folder"),
    [
        ("May 2023", "extensions"),
        ("v2", "extensions"),
        ("v3.1", "extensions"),
        ("v3.7", "user_data/extensions"),
        ("v4", "user_data/extensions"),
    ],
)
def test_it_is_linked_into_the_folder_that_this_version_looks_into(tmp_path, version, folder, said):
    webui = make(tmp_path, VERSIONS[version])
    said(webui)
    assert os.readlink(webui / folder / "sharded_kv") == str(EXTENSION)


@every_version
def test_uninstall_leaves_every_version_as_it_was_to_the_byte(tmp_path, version, said):
    webui = make(tmp_path, VERSIONS[version])
    before = everything_in(webui)
    said(webui, "--enable")
    said("--uninstall", webui)
    assert everything_in(webui) == before


def test_uninstall_leaves_no_folder_that_was_not_there(v4, said):
    shutil.rmtree(v4 / "user_data/extensions")
    before = everything_in(v4)
    said(v4)
    said(v4, "--uninstall")
    assert everything_in(v4) == before


def test_a_user_data_folder_that_cmd_flags_names_is_the_one_it_goes_into(tmp_path, said):
    webui = make(tmp_path / "webui", V4 | {"user_data/CMD_FLAGS.txt": "--user-data-dir ../mine\n"})
    (tmp_path / "mine").mkdir()
    said(webui)
    assert (tmp_path / "mine/extensions/sharded_kv").is_symlink()


@pytest.mark.parametrize("path", ["my webui", "my webui/", "./my webui", "link", "../here/my webui"])
def test_a_path_may_be_relative_and_have_spaces_or_be_a_link(tmp_path, path, said):
    here = tmp_path / "here"
    webui = make(here / "my webui", V4)
    (here / "link").symlink_to("my webui")
    said(path, cwd=here)
    assert (webui / "user_data/extensions/sharded_kv").is_symlink()


# --- a second time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--copy",), ("--enable",)], ids=" ".join)
def test_a_second_time_changes_nothing(v4, options, said):
    said(v4, *options)
    once = everything_in(v4)
    said(v4, *options)
    assert everything_in(v4) == once


def test_a_second_time_says_that_it_is_there(v4, said):
    said(v4, "--enable")
    assert "already" in said(v4, "--enable")


def test_uninstall_after_many_installs_still_leaves_all_as_it_was(v4, said):
    before = everything_in(v4)
    for options in [(), ("--enable",), ("--copy",), (), ("--enable", "--copy")]:
        said(v4, *options)
    said(v4, "--uninstall")
    assert everything_in(v4) == before


def test_a_second_uninstall_has_nothing_to_do(v4, said):
    said(v4)
    said(v4, "--uninstall")
    assert "Nothing to take out" in said(v4, "--uninstall")


@pytest.mark.parametrize("older", ["/gone/extensions/sharded_kv", "../../../older/extensions/sharded_kv"])
def test_a_link_to_another_clone_is_led_here_and_that_is_said(tmp_path, v4, older, said):
    (tmp_path / "older/extensions/sharded_kv").mkdir(parents=True)
    link = v4 / "user_data/extensions/sharded_kv"
    link.symlink_to(older)
    assert f"in place of a link to {older}" in said(v4)
    assert os.readlink(link) == str(EXTENSION)


def test_uninstall_finds_what_was_put_in_before_the_webui_was_updated(tmp_path, said):
    webui = make(tmp_path / "webui", V2)
    said(webui, "--enable")
    make(webui, V4)
    (webui / "CMD_FLAGS.txt").replace(webui / "user_data/CMD_FLAGS.txt")
    said(webui, "--uninstall")
    updated = V2 | V4 | {"user_data/CMD_FLAGS.txt": V2["CMD_FLAGS.txt"]}
    del updated["CMD_FLAGS.txt"]
    assert everything_in(webui) == everything_in(make(tmp_path / "never had it", updated))


# --- a copy -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_extension_and_no_leftovers_of_running_it(v4, said):
    said(v4, "--copy")
    ours = {path.relative_to(EXTENSION).as_posix() for path in EXTENSION.rglob("*") if "__pycache__" not in path.parts}
    assert everything_in(extension_in(v4)).keys() == ours | {".installed_by_install.sh"}


def test_a_copy_is_renewed_by_the_next_copy(v4, said):
    said(v4, "--copy")
    (extension_in(v4) / "old.py").touch()
    said(v4, "--copy")
    assert not (extension_in(v4) / "old.py").exists()


def test_a_copy_is_removed_with_what_running_it_left_there(v4, said):
    before = everything_in(v4)
    said("--copy", v4)
    (extension_in(v4) / "__pycache__").mkdir()
    (extension_in(v4) / "__pycache__/script.pyc").touch()
    said(v4, "--uninstall")
    assert everything_in(v4) == before


# --- CMD_FLAGS.txt ----------------------------------------------------------------------------------------------------

FLAGS = [
    pytest.param("", "--extensions sharded_kv\n", id="an empty file"),
    pytest.param("# only\n", "# only\n--extensions sharded_kv\n", id="comments"),
    pytest.param("--listen", "--listen\n--extensions sharded_kv\n", id="no line end at the end"),
    pytest.param("--listen\r\n--api\r\n", "--listen\r\n--api\r\n--extensions sharded_kv\r\n", id="Windows line ends"),
    pytest.param("--extensions a b\n--api\n", "--extensions a b sharded_kv\n--api\n", id="a list of extensions"),
    pytest.param("--extensions a b\r\n", "--extensions a b sharded_kv\r\n", id="a list with a Windows line end"),
    pytest.param("--extensions a --api", "--extensions a sharded_kv --api", id="a list in the middle"),
    pytest.param("--extensions=a --api\n", "--extensions a sharded_kv --api\n", id="an equals sign"),
    pytest.param(
        "--extensions a \\\n  b \\\n--api\n", "--extensions a \\\n  b sharded_kv \\\n--api\n", id="more lines"
    ),
    pytest.param("--extensions\na\n# x\nb\n", "--extensions\na\n# x\nb sharded_kv\n", id="one a line, and a comment"),
    pytest.param("--extensions a\\\n", "--extensions a sharded_kv\\\n", id="a backslash without a space"),
    pytest.param(
        "--extensions a\n--extensions b\n",
        "--extensions a\n--extensions b sharded_kv\n",
        id="two lists: the last counts",
    ),
    pytest.param("#--extensions a\n", "#--extensions a\n--extensions sharded_kv\n", id="a list that is a comment"),
    pytest.param(
        "--extensions sharded_kv2\n", "--extensions sharded_kv2 sharded_kv\n", id="a name that begins like ours"
    ),
    pytest.param("--extensions 'é x' b\n", "--extensions 'é x' b sharded_kv\n", id="quotes and accents"),
    pytest.param("--extensions a sharded_kv b\n", "--extensions a sharded_kv b\n", id="there already"),
]


@pytest.mark.parametrize(("text", "expected"), FLAGS)
def test_enable_adds_it_to_the_list_of_extensions(tmp_path, text, expected, said):
    webui = make(tmp_path, V4 | {"user_data/CMD_FLAGS.txt": text})
    said(webui, "--enable")
    assert (webui / "user_data/CMD_FLAGS.txt").read_bytes().decode() == expected


@pytest.mark.parametrize(("text", "enabled"), FLAGS)
def test_the_webui_then_loads_it_with_all_it_loaded_before(text, enabled):
    def loaded(flags: str) -> list[str]:
        lines = [line.strip().rstrip("\\") for line in flags.splitlines() if not line.strip().startswith("#")]
        parser = argparse.ArgumentParser()
        parser.add_argument("--extensions", nargs="+", default=[])
        return parser.parse_known_args(shlex.split(" ".join(lines)))[0].extensions

    others = [name for name in loaded(text) if name != "sharded_kv"]
    assert sorted(loaded(enabled)) == sorted([*others, "sharded_kv"])


@pytest.mark.parametrize(("text", "enabled"), FLAGS)
def test_uninstall_gives_cmd_flags_back_to_the_byte(tmp_path, text, enabled, said):
    webui = make(tmp_path, V4 | {"user_data/CMD_FLAGS.txt": text})
    said(webui, "--enable")
    said(webui, "--uninstall")
    assert (webui / "user_data/CMD_FLAGS.txt").read_bytes().decode() == text


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        ("--extensions sharded_kv\n--api\n", "--api\n"),
        ("--api\r\n--extensions sharded_kv\r\n", "--api\r\n"),
        ("--api --extensions sharded_kv --cpu\n", "--api --cpu\n"),
        ("--extensions sharded_kv a\n", "--extensions a\n"),
        ("--extensions a \\\n sharded_kv b\n", "--extensions a \\\n b\n"),
        ("--extensions 'sharded_kv' a\n", "--extensions a\n"),
        ("--api\n", "--api\n"),
    ],
)
def test_uninstall_takes_only_its_name_out_of_flags_that_were_edited_since(v4, edited, expected, said):
    said(v4, "--enable")
    (v4 / "user_data/CMD_FLAGS.txt").write_bytes(edited.encode())
    said(v4, "--uninstall")
    assert (v4 / "user_data/CMD_FLAGS.txt").read_bytes().decode() == expected


def test_a_cmd_flags_that_was_not_there_is_gone_after_uninstall(v4, said):
    (v4 / "user_data/CMD_FLAGS.txt").unlink()
    before = everything_in(v4)
    said(v4, "--enable")
    said(v4, "--uninstall")
    assert everything_in(v4) == before


def test_uninstall_leaves_a_flag_that_the_user_put_there_and_says_so(tmp_path, said):
    webui = make(tmp_path, V4 | {"user_data/CMD_FLAGS.txt": "--extensions sharded_kv\n"})
    said(webui, "--enable")
    assert "still names sharded_kv" in said(webui, "--uninstall")


def test_without_enable_cmd_flags_stays_as_it_is(v4, said):
    said(v4)
    assert (v4 / "user_data/CMD_FLAGS.txt").read_text() == V4["user_data/CMD_FLAGS.txt"]


@pytest.mark.parametrize("version", ["v2", "v3.1"])
def test_the_file_is_the_one_that_this_version_reads(tmp_path, version, said):
    webui = make(tmp_path, VERSIONS[version])
    said(webui, "--enable")
    [changed] = [path for path, text in VERSIONS[version].items() if (webui / path).read_text() != text]
    assert changed == {"v2": "CMD_FLAGS.txt", "v3.1": "user_data/CMD_FLAGS.txt"}[version]


def test_enable_says_that_a_webui_of_may_2023_has_no_such_file(tmp_path, said):
    webui = make(tmp_path, MAY_2023)
    assert "has no CMD_FLAGS.txt" in said(webui, "--enable")


# --- the command to start ---------------------------------------------------------------------------------------------


def start_command(output: str) -> str:
    """The lines that are to be pasted."""
    lines = iter(output.partition("To start the webui with it:\n")[2].splitlines())
    return "\n".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("  "), lines))


@pytest.mark.parametrize(
    ("version", "flags", "options", "given"),
    [
        ("v4", "", (), " --extensions sharded_kv"),
        ("v4", "", ("--enable",), ""),
        ("v4", "--extensions a b", (), " --extensions a b sharded_kv"),
        ("v2", "", (), " --extensions sharded_kv"),
        ("v2", "--extensions a", ("--enable",), ""),
    ],
)
def test_a_one_click_webui_is_started_by_its_script(tmp_path, version, flags, options, given, layout, said):
    webui = make(tmp_path, VERSIONS[version])
    (webui / ("CMD_FLAGS.txt" if version == "v2" else "user_data/CMD_FLAGS.txt")).write_text(flags)
    make_executable(webui / layout.python_in("installer_files/env"), STUB_PYTHON)
    assert start_command(said(webui, *options)) == layout.start(webui, layout.start_script + given)


@pytest.mark.parametrize(
    ("version", "options", "arguments"),
    [
        ("v4", (), "server.py --extensions sharded_kv"),
        ("v4", ("--enable",), "server.py"),
        ("v2", ("--enable",), "server.py --extensions sharded_kv"),  # there only the script reads CMD_FLAGS.txt
        ("May 2023", (), "server.py --extensions sharded_kv"),
    ],
)
def test_the_command_for_a_webui_with_a_venv_runs_as_it_is_printed(tmp_path, version, options, arguments, layout, said):
    webui = make(tmp_path / "my webui", VERSIONS[version])
    make_executable(webui / layout.python_in("venv"), STUB_PYTHON)
    command = start_command(said(webui, *options))
    # bash has a pushd of its own, which says where it is now.
    script = f'pushd() {{ builtin pushd "$@" >/dev/null; }}\n{command}'
    done = subprocess.run(["bash", "-c", script], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout == f"in {webui}: {arguments}\n"


def test_an_active_environment_is_started_by_its_name(v4, layout, said):
    python = make_executable(v4.parent / layout.python_in("active"), STUB_PYTHON)
    command = start_command(said(v4, VIRTUAL_ENV=python.parent.parent))
    assert command == layout.start(v4, "python server.py --extensions sharded_kv")


def test_the_start_script_is_this_platform_s_own(v4, layout, said):
    (v4 / layout.start_script[2:]).unlink()
    output = said(v4)
    assert layout.start_script not in output
    assert start_command(output) == layout.start(v4, "python server.py --extensions sharded_kv")


def test_where_cmd_flags_wins_over_the_command_line_the_way_is_to_enable_it(tmp_path, said):
    webui = make(tmp_path, V2 | {"CMD_FLAGS.txt": "--extensions a"})
    assert "--enable does that" in said(webui)


def test_the_installer_of_2023_that_takes_no_flags_has_them_in_its_webui_py(tmp_path, layout, said):
    make_executable(tmp_path / layout.python_in("installer_files/env"), STUB_PYTHON)
    make(tmp_path, {"webui.py": "CMD_FLAGS = ''", layout.start_script[2:]: ""})
    webui = make(tmp_path / "text-generation-webui", MAY_2023)
    output = said(webui)
    assert f"CMD_FLAGS in {tmp_path}/webui.py" in output
    assert start_command(output) == layout.start(tmp_path, layout.start_script)


def test_it_says_how_it_is_taken_out_again(v4, layout, said):
    assert f"To take it out again:\n  {layout.door} {v4} --uninstall\n" in said(v4)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nothing", "file", "", "v4/modules"])
def test_a_wrong_path_is_named(tmp_path, path, refused):
    make(tmp_path / "v4", V4)
    (tmp_path / "file").touch()
    assert f"{tmp_path}/{path}".rstrip("/") in refused(f"{tmp_path}/{path}".rstrip("/"))


def test_a_folder_that_has_the_webui_inside_is_answered_with_that_one(tmp_path, refused):
    make(tmp_path / "text-generation-webui", V4)
    assert f"Did you mean {tmp_path}/text-generation-webui?" in refused(tmp_path)


@pytest.mark.parametrize("folder", ["portable_env", "app/portable_env"])
def test_a_portable_build_is_told_that_it_cannot_use_it(v4, folder, refused):
    (v4 / folder).mkdir(parents=True)
    assert "portable build" in refused(v4)


@pytest.mark.parametrize("other", ["folder", "file", "link"])
def test_something_else_of_that_name_is_left_alone(v4, other, refused):
    place = v4 / "user_data/extensions/sharded_kv"
    if other == "folder":
        make(place, {"script.py": "somebody else's"})
    elif other == "file":
        place.touch()
    else:
        place.symlink_to(v4 / "modules")
    before = everything_in(v4)
    assert str(place) in refused(v4, "--copy", "--enable")
    assert everything_in(v4) == before


def test_uninstall_leaves_something_else_of_that_name_alone(v4, said):
    make(v4 / "user_data/extensions/sharded_kv", {"script.py": "somebody else's"})
    before = everything_in(v4)
    assert "stays" in said(v4, "--uninstall")
    assert everything_in(v4) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("webui", "--copi"), "'--copi'"),
        (("my", "webui"), "'webui'"),
        (("webui", "--uninstall", "--copy"), "--uninstall"),
        (("--enable",), "Which webui?"),
    ],
)
def test_arguments_that_make_no_sense_are_an_error_that_says_which(tmp_path, arguments, named, install):
    done = install(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr


@pytest.fixture
def as_somebody(layout):
    """A way to run the installer as a user for whom permissions count, and a folder this user can see."""
    before = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if before and not shutil.which("setpriv"):
        pytest.skip("the tests run as root, and nobody else can run the installer here")
    command = layout.command()
    if layout.platform == "windows":
        command = [find_python(before), *command[1:]]
    if before and subprocess.run([*before, *command, "--help"], capture_output=True).returncode != 0:
        pytest.skip("the tests run as root, and nobody else can run the installer here")
    folder = Path(tempfile.mkdtemp(prefix="sharded_kv-"))
    folder.chmod(0o755)
    yield [*before, *command], folder
    shutil.rmtree(folder)


def find_python(before: list[str]) -> str:
    """A Python that somebody else can run: the tests' own may be root's."""
    for python in (sys.executable, "/usr/bin/python3"):
        if Path(python).exists() and subprocess.run([*before, python, "-c", ""], capture_output=True).returncode == 0:
            return python
    pytest.skip("the tests run as root, and nobody else can run a Python here")


@pytest.mark.parametrize("read_only", ["user_data/extensions", "user_data/CMD_FLAGS.txt"])
def test_a_read_only_folder_or_file_is_named_before_anything_is_changed(as_somebody, read_only):
    command, folder = as_somebody
    webui = make(folder / "webui", V4)
    for path in [webui, *webui.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    (webui / read_only).chmod(0o555)
    tree = everything_in(webui)
    done = subprocess.run([*command, webui, "--enable"], env=environment(), capture_output=True, text=True, check=False)
    assert f"{webui}/{read_only} cannot be" in done.stderr
    assert everything_in(webui) == tree


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [None, (), ("--copy",)], ids=["nothing", "a link", "a copy"])
@pytest.mark.parametrize("step", ["shutil.copyfile", "os.chmod", "os.replace"])
def test_a_step_that_fails_leaves_what_was_there(tmp_path, v4, step, earlier, layout, said, refused):
    if earlier is not None:
        said(v4, *earlier)
    before = everything_in(v4)
    assert "put back" in refused(v4, "--copy", "--enable", **layout.broken(step, tmp_path))
    assert everything_in(v4) == before


@pytest.mark.parametrize("done", [False, True], ids=["instead of it", "after it"])
@pytest.mark.parametrize("arguments", [("--enable",), ("--enable", "--copy"), ("--uninstall",)], ids=" ".join)
def test_whichever_step_fails_all_is_as_before_or_all_is_done(tmp_path, v4, monkeypatch, capsys, arguments, done):
    def run(number: int) -> tuple[int, int]:
        """Run in this process, with a step that fails: the exit status, and how many steps were made."""
        with monkeypatch.context() as patch:
            made = fail_at(patch, number, done)
            status = main([str(v4), *arguments], LINUX)
        return status, len(made)

    def leave() -> dict[str, tuple[int, object]]:
        """What is there, but for what was set aside, could not be removed, and may go."""
        return {
            name: what for name, what in everything_in(v4).items() if not re.search(r"/\.sharded_kv\..*before", name)
        }

    if "--uninstall" in arguments:
        assert main([str(v4), "--enable"], LINUX) == 0
    shutil.copytree(v4, tmp_path / "before", symlinks=True)
    before = everything_in(v4)
    assert run(0)[0] == 0
    after = everything_in(v4)
    for number in itertools.count(1):
        shutil.rmtree(v4)
        shutil.copytree(tmp_path / "before", v4, symlinks=True)
        capsys.readouterr()
        status, made = run(number)
        if made < number:
            break
        if status == 0:
            assert leave() == after
        else:
            assert everything_in(v4) == before
            assert "everything was put back" in capsys.readouterr().err
    assert number > 5


def fail_at(patch: pytest.MonkeyPatch, number: int, done: bool) -> list[str]:
    """Have one of the steps that change files fail; gives the list of those that were made."""
    made: list[str] = []

    def counted(module: object, name: str) -> None:
        function = getattr(module, name)

        def step(*arguments: object, **options: object) -> object:
            made.append(name)
            fails = len(made) == number
            result = function(*arguments, **options) if done or not fails else None
            if fails:
                raise OSError(errno.EIO, "made to fail")
            return result

        patch.setattr(module, name, step)

    for name in ("chmod", "mkdir", "replace", "rmdir", "unlink", "utime"):
        counted(os, name)
    counted(shutil, "copyfile")
    counted(Path, "write_bytes")
    return made


@pytest.mark.parametrize("step", ["shutil.copymode", "os.chmod", "os.replace"])
def test_an_uninstall_that_fails_leaves_what_was_there(tmp_path, v4, step, layout, said, refused):
    said(v4, "--enable")
    before = everything_in(v4)
    assert "put back" in refused(v4, "--uninstall", **layout.broken(step, tmp_path))
    assert everything_in(v4) == before


@pytest.fixture
def at_work(tmp_path, v4, layout):
    """The installer while pip is at work, which takes a minute."""
    # A Python at work, as pip is one: sh ignores a Ctrl-C that comes while it is starting a command.
    at_work = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(60)"
    pip = f"""#!/bin/sh
    case "$*" in
      *"pip "*" list "*) echo pip==24.0 ;;
      *find_spec*) exit 1 ;;
      *"pip "*" install "*) exec {shlex.quote(sys.executable)} -c {shlex.quote(at_work)} ;;
    esac
    """
    make_executable(v4 / layout.python_in("venv"), pip)
    before = everything_in(v4)
    process = subprocess.Popen(
        layout.command(v4, "--enable"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
        assert process.poll() is None
    yield process, before
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)], ids=str
)
def test_ctrl_c_while_pip_is_at_work_leaves_what_was_there(v4, at_work, number, status):
    process, before = at_work
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert b"everything was put back" in output
    assert everything_in(v4) == before


def test_a_second_run_at_the_same_time_is_refused_and_changes_nothing(v4, at_work, refused):
    before = everything_in(v4)
    assert "Another run" in refused(v4, "--uninstall")
    assert everything_in(v4) == before


# --- the webui's environment ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    venv = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv


@pytest.fixture
def venv(empty_venv, v4, layout):
    """The folder of a real environment with pip, in a webui."""
    venv = Path(shutil.copytree(empty_venv, v4 / "venv", symlinks=True))
    if layout.platform == "windows":
        (venv / "bin/python.exe").symlink_to("python")
        (venv / "bin").rename(venv / "Scripts")
        (venv / "bin").symlink_to("Scripts")  # for this test's own pip
    return venv


def make_wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    module = {"nvidia-ml-py": "pynvml"}.get(name, name)
    facts = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": "",
        f"{facts}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{facts}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{facts}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{facts}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.fixture
def wheels(tmp_path):
    """The folder where pip finds what there is: nvidia-ml-py as requirements.txt wants it."""
    make_wheel(tmp_path / "wheels", "nvidia-ml-py", "13.1")
    return tmp_path / "wheels"


def pip(venv: Path, *arguments: object, **variables: object) -> str:
    command = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=True).stdout


def test_requirements_go_into_the_webui_s_environment(v4, venv, wheels, said):
    said(v4, PIP_FIND_LINKS=wheels)
    assert pip(venv, "freeze") == "nvidia-ml-py==13.1\n"


def test_uninstall_leaves_the_environment_as_it_was(v4, venv, wheels, said):
    before = everything_in(v4, but="venv/")
    said(v4, "--enable", PIP_FIND_LINKS=wheels)
    said(v4, "--uninstall")
    assert everything_in(v4, but="venv/") == before
    assert pip(venv, "freeze") == ""


def test_a_version_that_is_there_stays_whatever_it_is(v4, venv, wheels, said):
    make_wheel(wheels, "nvidia-ml-py", "11.0")
    pip(venv, "install", "nvidia-ml-py==11.0", PIP_FIND_LINKS=wheels)
    said(v4, PIP_FIND_LINKS=wheels)
    said(v4, "--uninstall")
    assert pip(venv, "freeze") == "nvidia-ml-py==11.0\n"


def test_a_pynvml_from_another_package_is_not_written_over(v4, venv, wheels, said):
    make_wheel(wheels, "pynvml", "8.0")
    pip(venv, "install", "pynvml", PIP_FIND_LINKS=wheels)
    said(v4, PIP_FIND_LINKS=wheels)
    assert pip(venv, "freeze") == "pynvml==8.0\n"


def test_what_would_change_another_package_is_not_installed_and_the_rest_is(v4, venv, wheels, said):
    make_wheel(wheels, "nvidia-ml-py", "13.1", needs="other>=2")
    make_wheel(wheels, "other", "1.0")
    make_wheel(wheels, "other", "2.0")
    pip(venv, "install", "other==1.0", PIP_FIND_LINKS=wheels)
    assert "works without its requirements" in said(v4, PIP_FIND_LINKS=wheels)
    assert pip(venv, "freeze") == "other==1.0\n"
    assert extension_in(v4).is_symlink()


def test_uninstall_leaves_what_somebody_else_needs_by_now(v4, venv, wheels, said):
    said(v4, PIP_FIND_LINKS=wheels)
    make_wheel(wheels, "monitor", "1.0", needs="nvidia-ml-py")
    pip(venv, "install", "monitor", PIP_FIND_LINKS=wheels)
    assert "monitor needs it" in said(v4, "--uninstall")
    assert "nvidia-ml-py==13.1" in pip(venv, "freeze")


def test_a_failing_pip_is_a_warning_with_the_command_for_later(v4, venv, layout, said):
    output = said(v4)
    requirements = layout.quoted(EXTENSION / "requirements.txt")
    assert f"{venv}/{layout.python} -m pip install -r {requirements}" in output


@pytest.mark.parametrize("place", ["installer_files/env", "venv", ".venv", "../active"])
def test_the_environment_that_is_used_is_named(v4, place, layout, said):
    make_executable(v4 / layout.python_in(place), STUB_PYTHON)
    assert f"is in {v4 / place} already" in said(v4, VIRTUAL_ENV=v4 / place)


def test_an_active_environment_that_cannot_run_the_webui_is_not_used(tmp_path, v4, layout, said):
    make_executable(tmp_path / layout.python_in("active"), "#!/bin/sh\nexit 1\n")
    assert "No environment of this webui was found" in said(v4, CONDA_PREFIX=tmp_path / "active")
