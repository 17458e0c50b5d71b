"""Takes the extension out of a webui, and leaves the webui's files as they were."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from . import flags, requirements
from .changes import Changes, all_or_nothing
from .place import Place, must_be_writable
from .record import Record
from .source import NAME
from .talk import say
from .webui import Webui


def take_out(webui: Webui) -> None:
    """Take out all that the installer put into a webui.

    Raises:
        Refused: it cannot be done; nothing was changed, or everything was put back.
    """
    found = _places(webui)
    if not found:
        say(f"Nothing to take out: {webui.platform.installer} put nothing into {webui.folder}.")
    for place in found:
        _empty(place, webui)
    if webui.flags is not None and NAME in flags.extensions(flags.read(webui.flags.path)):
        say(f"{webui.flags.path} still names {NAME}: {webui.platform.installer} did not put that there.")


def _places(webui: Webui) -> list[Place]:
    """Where something of ours is. A webui older than v3.7 when we were put in may be a newer one today."""
    found = []
    older = webui.folder / "extensions"
    for folder in [webui.extensions] if webui.extensions == older else [webui.extensions, older]:
        place = Place(folder)
        if place.is_ours or place.record_file.is_file():
            found.append(place)
            place.must_be_writable()
            flagged = _flagged(place.record, webui)
            if flagged is not None:
                must_be_writable(flagged)
        elif place.is_somebody_elses:
            say(f"{place.target} stays: {webui.platform.installer} did not make it.")
    return found


def _empty(place: Place, webui: Webui) -> None:
    record = place.record
    with all_or_nothing() as changes:
        if place.is_ours:
            changes.take_away(place.target)
            say(f"{place.target} is removed.")
        _remove_flag(record, webui, changes)
        requirements.uninstall(record.packages, webui.platform)
        changes.take_away(place.record_file)
    if record.made_folder:
        with contextlib.suppress(OSError):  # Somebody else has put something there.
            os.rmdir(place.folder)


def _remove_flag(record: Record, webui: Webui, changes: Changes) -> None:
    """Remove what --enable added: to the byte, if nobody has changed the file since."""
    file = _flagged(record, webui)
    if file is None:
        return
    text = flags.read(file)
    before = record.flags_before
    if text != flags.with_ours(flags.decoded(before or b"")):
        changes.write(file, flags.encoded(flags.without_ours(text)))
    elif before is None:
        changes.take_away(file)
    else:
        changes.write(file, before)
    say(f"{file} does not name {NAME} any more.")


def _flagged(record: Record, webui: Webui) -> Path | None:
    """The file that --enable changed, where it lies now: the webui may have been moved, or updated."""
    if record.flagged is None or record.flagged.is_file():
        return record.flagged
    return webui.flags.path if webui.flags is not None and webui.flags.path.is_file() else None
