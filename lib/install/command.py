"""The command line of the installer."""

from __future__ import annotations

from dataclasses import dataclass

from . import webui
from .lock import locked
from .platforms import Platform, here
from .put_in import put_in
from .starting import how_to_start
from .stopping import Interrupted, Refused, interruptible
from .take_out import take_out
from .talk import accept_any_path, complain, reason, say

USAGE = """\
sharded_kv: makes accelerate's multi-GPU generation fast.

  {door} WEBUI             puts the extension into the text-generation-webui in the folder WEBUI: links it,
  {here}                   and installs what it needs into the webui's environment, next to what is there
  {door} WEBUI --copy      ... as a copy: this clone may go afterwards
  {door} WEBUI --enable    ... and has the webui load it at every start (in CMD_FLAGS.txt)
  {door} WEBUI --uninstall takes all of that out again
  {door} --help            this text"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    path: str
    copy: bool
    enable: bool
    uninstall: bool


def main(arguments: list[str], platform: Platform | None = None) -> int:
    """Do what the command line asks for.

    Args:
        arguments: those behind the program's name.
        platform: for the tests, to have another platform's layout and messages than those of the one this runs on.

    Returns:
        The exit status.
    """
    accept_any_path()
    platform = platform or here()
    try:
        with interruptible():
            return _run(arguments, platform)
    except OSError as error:
        complain(reason(error))
        return 1
    except Refused as refused:
        complain(str(refused))
        return refused.status
    except Interrupted as interrupted:
        return interrupted.status


def _run(arguments: list[str], platform: Platform) -> int:
    if platform.is_quoted_badly:
        arguments = _as_meant(arguments)
    if not arguments or not arguments[0]:
        complain(usage(platform))
        return 2
    request = requested(arguments, platform)
    if request is None:
        say(usage(platform))
        return 0
    found = webui.read(request.path, platform)
    with locked(found.folder):
        if request.uninstall:
            take_out(found)
        else:
            put_in(found, request.copy, request.enable)
            say("\n".join(how_to_start(found)))
    return 0


def usage(platform: Platform) -> str:
    """What --help says."""
    door = " ".join(platform.door)
    return USAGE.format(door=door, here=" " * len(door))


def requested(arguments: list[str], platform: Platform) -> Request | None:
    """Read the command line; None is a wish for help.

    Raises:
        Refused: it makes no sense; the message says which part.
    """
    door = " ".join(platform.door)
    path, options = "", set()
    for argument in arguments:
        if argument in ("--help", "-h"):
            return None
        if argument in ("--copy", "--enable", "--uninstall"):
            options.add(argument)
        elif argument.startswith("-"):
            what = f"'{argument}' is not something {platform.installer} does: {door} --help tells what is."
            raise Refused(what, status=2)
        elif path:
            raise Refused(
                f"One webui at a time: '{path}' or '{argument}'? (A path with spaces needs quotes.)", status=2
            )
        else:
            path = argument
    if not path:
        raise Refused(f"Which webui? As in: {door} {platform.example}", status=2)
    if "--uninstall" in options and len(options) > 1:
        raise Refused("--uninstall goes without --copy and --enable.", status=2)
    return Request(path, "--copy" in options, "--enable" in options, "--uninstall" in options)


def _as_meant(arguments: list[str]) -> list[str]:
    r"""Windows takes `\"` for a quotation mark: "C:\my webui\" --copy, as a shell completes it, is one argument."""
    meant: list[str] = []
    for argument in arguments:
        path, mark, others = argument.partition('"')
        meant += [path, *others.split()] if mark else [argument]
    return meant
