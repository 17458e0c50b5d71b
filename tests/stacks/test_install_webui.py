"""What install.sh does to a webui: to stand-ins that have what it looks at, and with a pip that has no network."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
INSTALL = REPOSITORY / "install.sh"
EXTENSION = REPOSITORY / "extensions" / "sharded_kv"

# Files of the webui, down to what tells its versions apart.
MAY_2023 = {
    "modules/shared.py": "",
    "modules/extensions.py": "import extensions.NAME.script",
    "extensions/x/script.py": "",
}
V2 = MAY_2023 | {"one_click.py": "CMD_FLAGS.txt", "start_linux.sh": "", "CMD_FLAGS.txt": "# --listen\n"}
V3_1 = MAY_2023 | {
    "one_click.py": "",
    "start_linux.sh": "",
    "modules/shared.py": 'Path("user_data") / "CMD_FLAGS.txt"',
    "user_data/CMD_FLAGS.txt": "# --listen\n",
}
V3_7 = V3_1 | {"modules/extensions.py": "f'user_data/extensions/{name}'", "user_data/extensions/x.txt": ""}
V4 = V3_7 | {"modules/extensions.py": "shared.user_data_dir / 'extensions' / name"}
VERSIONS = {"May 2023": MAY_2023, "v2": V2, "v3.1": V3_1, "v3.7": V3_7, "v4": V4}
every_version = pytest.mark.parametrize("version", VERSIONS)

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
    """The variables install.sh runs with: no environment is active, and pip knows no index."""
    ours = ("PIP_", "PYTHON", "VIRTUAL_ENV", "CONDA_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return mine | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull} | {k: str(v) for k, v in variables.items()}


def install(*arguments: object, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INSTALL, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def said(*arguments: object, **options: object) -> str:
    """What install.sh says when all goes well."""
    done = install(*arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments: object, **options: object) -> str:
    done = install(*arguments, **options)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


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
def test_it_is_linked_into_the_folder_that_this_version_looks_into(tmp_path, version, folder):
    webui = make(tmp_path, VERSIONS[version])
    said(webui)
    assert os.readlink(webui / folder / "sharded_kv") == str(EXTENSION)


@every_version
def test_uninstall_leaves_every_version_as_it_was_to_the_byte(tmp_path, version):
    webui = make(tmp_path, VERSIONS[version])
    before = everything_in(webui)
    said(webui, "--enable")
    said("--uninstall", webui)
    assert everything_in(webui) == before


def test_uninstall_leaves_no_folder_that_was_not_there(v4):
    shutil.rmtree(v4 / "user_data/extensions")
    before = everything_in(v4)
    said(v4)
    said(v4, "--uninstall")
    assert everything_in(v4) == before


def test_a_user_data_folder_that_cmd_flags_names_is_the_one_it_goes_into(tmp_path):
    webui = make(tmp_path / "webui", V4 | {"user_data/CMD_FLAGS.txt": "--user-data-dir ../mine\n"})
    (tmp_path / "mine").mkdir()
    said(webui)
    assert (tmp_path / "mine/extensions/sharded_kv").is_symlink()


@pytest.mark.parametrize("path", ["my webui", "my webui/", "./my webui", "link", "../here/my webui"])
def test_a_path_may_be_relative_and_have_spaces_or_be_a_link(tmp_path, path):
    here = tmp_path / "here"
    webui = make(here / "my webui", V4)
    (here / "link").symlink_to("my webui")
    said(path, cwd=here)
    assert (webui / "user_data/extensions/sharded_kv").is_symlink()


# --- a second time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--copy",), ("--enable",)], ids=" ".join)
def test_a_second_time_changes_nothing(v4, options):
    said(v4, *options)
    once = everything_in(v4)
    said(v4, *options)
    assert everything_in(v4) == once


def test_a_second_time_says_that_it_is_there(v4):
    said(v4, "--enable")
    assert "already" in said(v4, "--enable")


def test_uninstall_after_many_installs_still_leaves_all_as_it_was(v4):
    before = everything_in(v4)
    for options in [(), ("--enable",), ("--copy",), (), ("--enable", "--copy")]:
        said(v4, *options)
    said(v4, "--uninstall")
    assert everything_in(v4) == before


def test_a_second_uninstall_has_nothing_to_do(v4):
    said(v4)
    said(v4, "--uninstall")
    assert "Nothing to take out" in said(v4, "--uninstall")


@pytest.mark.parametrize("older", ["/gone/extensions/sharded_kv", "../../../older/extensions/sharded_kv"])
def test_a_link_to_another_clone_is_led_here_and_that_is_said(tmp_path, v4, older):
    (tmp_path / "older/extensions/sharded_kv").mkdir(parents=True)
    link = v4 / "user_data/extensions/sharded_kv"
    link.symlink_to(older)
    assert f"in place of a link to {older}" in said(v4)
    assert os.readlink(link) == str(EXTENSION)


def test_uninstall_finds_what_was_put_in_before_the_webui_was_updated(tmp_path):
    webui = make(tmp_path / "webui", V2)
    said(webui, "--enable")
    make(webui, V4)
    (webui / "CMD_FLAGS.txt").replace(webui / "user_data/CMD_FLAGS.txt")
    said(webui, "--uninstall")
    updated = V2 | V4 | {"user_data/CMD_FLAGS.txt": V2["CMD_FLAGS.txt"]}
    del updated["CMD_FLAGS.txt"]
    assert everything_in(webui) == everything_in(make(tmp_path / "never had it", updated))


# --- a copy -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_extension_and_no_leftovers_of_running_it(v4):
    said(v4, "--copy")
    ours = {path.relative_to(EXTENSION).as_posix() for path in EXTENSION.rglob("*") if "__pycache__" not in path.parts}
    assert everything_in(extension_in(v4)).keys() == ours | {".installed_by_install.sh"}


def test_a_copy_is_renewed_by_the_next_copy(v4):
    said(v4, "--copy")
    (extension_in(v4) / "old.py").touch()
    said(v4, "--copy")
    assert not (extension_in(v4) / "old.py").exists()


def test_a_copy_is_removed_with_what_running_it_left_there(v4):
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
def test_enable_adds_it_to_the_list_of_extensions(tmp_path, text, expected):
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
def test_uninstall_gives_cmd_flags_back_to_the_byte(tmp_path, text, enabled):
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
def test_uninstall_takes_only_its_name_out_of_flags_that_were_edited_since(v4, edited, expected):
    said(v4, "--enable")
    (v4 / "user_data/CMD_FLAGS.txt").write_bytes(edited.encode())
    said(v4, "--uninstall")
    assert (v4 / "user_data/CMD_FLAGS.txt").read_bytes().decode() == expected


def test_a_cmd_flags_that_was_not_there_is_gone_after_uninstall(v4):
    (v4 / "user_data/CMD_FLAGS.txt").unlink()
    before = everything_in(v4)
    said(v4, "--enable")
    said(v4, "--uninstall")
    assert everything_in(v4) == before


def test_uninstall_leaves_a_flag_that_the_user_put_there_and_says_so(tmp_path):
    webui = make(tmp_path, V4 | {"user_data/CMD_FLAGS.txt": "--extensions sharded_kv\n"})
    said(webui, "--enable")
    assert "still names sharded_kv" in said(webui, "--uninstall")


def test_without_enable_cmd_flags_stays_as_it_is(v4):
    said(v4)
    assert (v4 / "user_data/CMD_FLAGS.txt").read_text() == V4["user_data/CMD_FLAGS.txt"]


@pytest.mark.parametrize("version", ["v2", "v3.1"])
def test_the_file_is_the_one_that_this_version_reads(tmp_path, version):
    webui = make(tmp_path, VERSIONS[version])
    said(webui, "--enable")
    [changed] = [path for path, text in VERSIONS[version].items() if (webui / path).read_text() != text]
    assert changed == {"v2": "CMD_FLAGS.txt", "v3.1": "user_data/CMD_FLAGS.txt"}[version]


def test_enable_says_that_a_webui_of_may_2023_has_no_such_file(tmp_path):
    webui = make(tmp_path, MAY_2023)
    assert "has no CMD_FLAGS.txt" in said(webui, "--enable")


# --- the command to start ---------------------------------------------------------------------------------------------


def start_command(output: str) -> str:
    lines = output.splitlines()
    return lines[lines.index("To start the webui with it:") + 1].strip()


@pytest.mark.parametrize(
    ("version", "flags", "options", "command"),
    [
        ("v4", "", (), "./start_linux.sh --extensions sharded_kv"),
        ("v4", "", ("--enable",), "./start_linux.sh"),
        ("v4", "--extensions a b", (), "./start_linux.sh --extensions a b sharded_kv"),
        ("v2", "", (), "./start_linux.sh --extensions sharded_kv"),
        ("v2", "--extensions a", ("--enable",), "./start_linux.sh"),
    ],
)
def test_a_one_click_webui_is_started_by_its_script(tmp_path, version, flags, options, command):
    webui = make(tmp_path, VERSIONS[version])
    (webui / ("CMD_FLAGS.txt" if version == "v2" else "user_data/CMD_FLAGS.txt")).write_text(flags)
    make_executable(webui / "installer_files/env/bin/python", STUB_PYTHON)
    assert start_command(said(webui, *options)) == f"cd {webui} && {command}"


@pytest.mark.parametrize(
    ("version", "options", "arguments"),
    [
        ("v4", (), "server.py --extensions sharded_kv"),
        ("v4", ("--enable",), "server.py"),
        ("v2", ("--enable",), "server.py --extensions sharded_kv"),  # there only the script reads CMD_FLAGS.txt
        ("May 2023", (), "server.py --extensions sharded_kv"),
    ],
)
def test_the_command_for_a_webui_with_a_venv_runs_as_it_is_printed(tmp_path, version, options, arguments):
    webui = make(tmp_path / "my webui", VERSIONS[version])
    make_executable(webui / "venv/bin/python", STUB_PYTHON)
    command = start_command(said(webui, *options))
    done = subprocess.run(["bash", "-c", command], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout == f"in {webui}: {arguments}\n"


def test_where_cmd_flags_wins_over_the_command_line_the_way_is_to_enable_it(tmp_path):
    webui = make(tmp_path, V2 | {"CMD_FLAGS.txt": "--extensions a"})
    assert "--enable does that" in said(webui)


def test_the_installer_of_2023_that_takes_no_flags_has_them_in_its_webui_py(tmp_path):
    make_executable(tmp_path / "installer_files/env/bin/python", STUB_PYTHON)
    make(tmp_path, {"webui.py": "CMD_FLAGS = ''", "start_linux.sh": ""})
    webui = make(tmp_path / "text-generation-webui", MAY_2023)
    output = said(webui)
    assert f"CMD_FLAGS in {tmp_path}/webui.py" in output
    assert start_command(output) == f"cd {tmp_path} && ./start_linux.sh"


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nothing", "file", "", "v4/modules"])
def test_a_wrong_path_is_named(tmp_path, path):
    make(tmp_path / "v4", V4)
    (tmp_path / "file").touch()
    assert f"{tmp_path}/{path}".rstrip("/") in refused(f"{tmp_path}/{path}".rstrip("/"))


def test_a_folder_that_has_the_webui_inside_is_answered_with_that_one(tmp_path):
    make(tmp_path / "text-generation-webui", V4)
    assert f"Did you mean {tmp_path}/text-generation-webui?" in refused(tmp_path)


@pytest.mark.parametrize("folder", ["portable_env", "app/portable_env"])
def test_a_portable_build_is_told_that_it_cannot_use_it(v4, folder):
    (v4 / folder).mkdir(parents=True)
    assert "portable build" in refused(v4)


@pytest.mark.parametrize("other", ["folder", "file", "link"])
def test_something_else_of_that_name_is_left_alone(v4, other):
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


def test_uninstall_leaves_something_else_of_that_name_alone(v4):
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
def test_arguments_that_make_no_sense_are_an_error_that_says_which(tmp_path, arguments, named):
    done = install(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr


@pytest.fixture
def as_somebody():
    """A way to run install.sh as a user for whom permissions count, and a folder this user can see."""
    before = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if before and (
        not shutil.which("setpriv") or subprocess.run([*before, INSTALL, "--help"], capture_output=True).returncode != 0
    ):
        pytest.skip("the tests run as root, and nobody else can run install.sh here")
    folder = Path(tempfile.mkdtemp(prefix="sharded_kv-"))
    folder.chmod(0o755)
    yield before, folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("read_only", ["user_data/extensions", "user_data/CMD_FLAGS.txt"])
def test_a_read_only_folder_or_file_is_named_before_anything_is_changed(as_somebody, read_only):
    before, folder = as_somebody
    webui = make(folder / "webui", V4)
    for path in [webui, *webui.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    (webui / read_only).chmod(0o555)
    tree = everything_in(webui)
    command = [*before, INSTALL, webui, "--enable"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert f"{webui}/{read_only} cannot be" in done.stderr
    assert everything_in(webui) == tree


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_path(tmp_path):
    """Gives a PATH on which a command does its work, and then says that it could not."""

    def broken_path(command: str) -> str:
        make_executable(tmp_path / "bin" / command, f'#!/bin/sh\n{shutil.which(command)} "$@"\nexit 1\n')
        return f"{tmp_path}/bin:{os.environ['PATH']}"

    return broken_path


@pytest.mark.parametrize("earlier", [None, (), ("--copy",)], ids=["nothing", "a link", "a copy"])
@pytest.mark.parametrize("command", ["cp", "base64", "mv"])
def test_a_step_that_fails_leaves_what_was_there(v4, broken_path, command, earlier):
    if earlier is not None:
        said(v4, *earlier)
    before = everything_in(v4)
    assert "put back" in refused(v4, "--copy", "--enable", PATH=broken_path(command))
    assert everything_in(v4) == before


@pytest.mark.parametrize("command", ["cp", "base64", "mv"])
def test_an_uninstall_that_fails_leaves_what_was_there(v4, broken_path, command):
    said(v4, "--enable")
    before = everything_in(v4)
    assert "put back" in refused(v4, "--uninstall", PATH=broken_path(command))
    assert everything_in(v4) == before


def test_ctrl_c_while_pip_is_at_work_leaves_what_was_there(tmp_path, v4):
    # A Python at work, as pip is one: sh ignores a Ctrl-C that comes while it is starting a command.
    at_work = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(60)"
    pip = f"""#!/bin/sh
    case "$*" in
      *"pip "*" list "*) echo pip==24.0 ;;
      *find_spec*) exit 1 ;;
      *"pip "*" install "*) exec {shlex.quote(sys.executable)} -c {shlex.quote(at_work)} ;;
    esac
    """
    make_executable(v4 / "venv/bin/python", pip)
    before = everything_in(v4)
    process = subprocess.Popen(
        [INSTALL, v4, "--enable"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert everything_in(v4) == before


# --- the webui's environment ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    venv = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv


@pytest.fixture
def venv(empty_venv, v4):
    """The folder of a real environment with pip, in a webui."""
    return Path(shutil.copytree(empty_venv, v4 / "venv", symlinks=True))


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


def test_requirements_go_into_the_webui_s_environment(v4, venv, wheels):
    said(v4, PIP_FIND_LINKS=wheels)
    assert pip(venv, "freeze") == "nvidia-ml-py==13.1\n"


def test_uninstall_leaves_the_environment_as_it_was(v4, venv, wheels):
    before = everything_in(v4, but="venv/")
    said(v4, "--enable", PIP_FIND_LINKS=wheels)
    said(v4, "--uninstall")
    assert everything_in(v4, but="venv/") == before
    assert pip(venv, "freeze") == ""


def test_a_version_that_is_there_stays_whatever_it_is(v4, venv, wheels):
    make_wheel(wheels, "nvidia-ml-py", "11.0")
    pip(venv, "install", "nvidia-ml-py==11.0", PIP_FIND_LINKS=wheels)
    said(v4, PIP_FIND_LINKS=wheels)
    said(v4, "--uninstall")
    assert pip(venv, "freeze") == "nvidia-ml-py==11.0\n"


def test_a_pynvml_from_another_package_is_not_written_over(v4, venv, wheels):
    make_wheel(wheels, "pynvml", "8.0")
    pip(venv, "install", "pynvml", PIP_FIND_LINKS=wheels)
    said(v4, PIP_FIND_LINKS=wheels)
    assert pip(venv, "freeze") == "pynvml==8.0\n"


def test_what_would_change_another_package_is_not_installed_and_the_rest_is(v4, venv, wheels):
    make_wheel(wheels, "nvidia-ml-py", "13.1", needs="other>=2")
    make_wheel(wheels, "other", "1.0")
    make_wheel(wheels, "other", "2.0")
    pip(venv, "install", "other==1.0", PIP_FIND_LINKS=wheels)
    assert "works without its requirements" in said(v4, PIP_FIND_LINKS=wheels)
    assert pip(venv, "freeze") == "other==1.0\n"
    assert extension_in(v4).is_symlink()


def test_uninstall_leaves_what_somebody_else_needs_by_now(v4, venv, wheels):
    said(v4, PIP_FIND_LINKS=wheels)
    make_wheel(wheels, "monitor", "1.0", needs="nvidia-ml-py")
    pip(venv, "install", "monitor", PIP_FIND_LINKS=wheels)
    assert "monitor needs it" in said(v4, "--uninstall")
    assert "nvidia-ml-py==13.1" in pip(venv, "freeze")


def test_a_failing_pip_is_a_warning_with_the_command_for_later(v4, venv):
    output = said(v4)
    requirements = str(EXTENSION / "requirements.txt").replace(" ", "\\ ")  # as a shell takes it
    assert f"{venv}/bin/python -m pip install -r {requirements}" in output


@pytest.mark.parametrize("place", ["installer_files/env", "venv", ".venv", "../active"])
def test_the_environment_that_is_used_is_named(v4, place):
    python = make_executable(v4 / place / "bin/python", STUB_PYTHON)
    assert f"is in {python.parent.parent} already" in said(v4, VIRTUAL_ENV=python.parent.parent)


def test_an_active_environment_that_cannot_run_the_webui_is_not_used(tmp_path, v4):
    make_executable(tmp_path / "active/bin/python", "#!/bin/sh\nexit 1\n")
    assert "No environment of this webui was found" in said(v4, CONDA_PREFIX=tmp_path / "active")
