"""How the webui is started with the extension, and how the extension is taken out again: what is said at the end."""

from __future__ import annotations

from . import environment, flags
from .source import NAME
from .webui import Webui


def how_to_start(webui: Webui) -> list[str]:
    """The lines to say."""
    lines = []
    heading = "To start the webui with it"
    if webui.is_started_by_script:
        lines += _by_script(webui, heading)
        heading = "or, in an environment of your own"
    if not webui.is_started_by_script or webui.environment is None:
        missing, _ = _missing_flag(webui, by_script=False)
        command = webui.platform.shell.run_in(webui.folder, f"{_python(webui)} server.py{missing}")
        lines += _paragraph(heading, command)
    out = webui.platform.shell.run(*webui.platform.door, webui.folder, "--uninstall")
    return lines + _paragraph("To take it out again", out)


def _by_script(webui: Webui, heading: str) -> list[str]:
    launcher = webui.launcher
    assert launcher is not None
    shell, lines = webui.platform.shell, []
    missing, others = _missing_flag(webui, by_script=True)
    if missing and launcher != webui.folder:  # It hands no flags on.
        if webui.flags is not None:
            lines = [f"Add{missing} to {webui.flags.path}: --enable does that."]
        else:
            lines = [f"Add{missing} to CMD_FLAGS in {launcher / 'webui.py'}."]
        missing = ""
    elif missing and others and webui.flags is not None and webui.flags.is_for_script_only:
        # It puts the file's flags behind those given at the start.
        lines = [
            f"Add {NAME} to --extensions in {webui.flags.path}: --enable does that. A list given at the start is lost."
        ]
        missing = ""
    command = shell.run_in(launcher, shell.run_here(webui.platform.start_script) + missing)
    return lines + _paragraph(heading, command)


def _missing_flag(webui: Webui, by_script: bool) -> tuple[str, tuple[str, ...]]:
    """What has to be given at the start beside what CMD_FLAGS.txt says, and the extensions that are named there."""
    named: tuple[str, ...] = ()
    if webui.flags is not None and (by_script or not webui.flags.is_for_script_only):
        named = flags.extensions(flags.read(webui.flags.path))
    if NAME in named:
        return "", named
    # A list given at the start replaces the one in the file, so it names those, too.
    return " ".join([" --extensions", *named, NAME]), named


def _python(webui: Webui) -> str:
    """The webui's Python, as it is called in the webui's folder."""
    place = webui.environment
    if place is None or place.folder in environment.active_folders():
        return "python"
    try:
        return webui.platform.shell.quoted(place.python.relative_to(webui.folder))
    except ValueError:
        return webui.platform.shell.quoted(place.python)


def _paragraph(heading: str, lines: list[str]) -> list[str]:
    return [f"{heading}:", *(f"  {line}" for line in lines)]
