"""Puts the extension into a webui, all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from . import flags, paths, requirements
from .changes import Changes, all_or_nothing
from .place import Place, must_be_writable
from .platforms import Platform
from .record import Record
from .source import EXTENSION, MARKER, NAME, ROOT
from .stopping import Refused
from .talk import say
from .webui import Webui


def put_in(webui: Webui, as_copy: bool, enable: bool) -> None:
    """Link or copy the extension to where the webui looks for it, and install its requirements.

    Args:
        as_copy: a copy, not a link.
        enable: also have the webui load it at every start, by its CMD_FLAGS.txt.

    Raises:
        Refused: it cannot be put there; nothing was changed, or everything was put back.
    """
    place = Place(webui.extensions)
    _must_be_possible(webui, place, enable)
    with all_or_nothing() as changes:
        record = place.record
        if not place.folder.is_dir():
            changes.make_folder(place.folder)
            record = replace(record, made_folder=True)
        _place(place, as_copy, webui.platform, changes)
        if enable:
            record = _enable(webui, record, changes)
        _keep(record, place, changes)
        added = requirements.install(webui, changes)
        _keep(replace(record, packages=record.packages + added), place, changes)


def _must_be_possible(webui: Webui, place: Place, enable: bool) -> None:
    if paths.is_same(place.target, ROOT) and not paths.leads_to(place.target):
        lines = webui.platform.shell.install_from_home(ROOT, NAME, webui.folder, webui.platform.door[0])
        where = "This clone itself lies where the webui looks for the extension."
        how = f"Move it elsewhere, then run {webui.platform.installer} there:"
        raise Refused("\n  ".join([f"{where} {how}", *lines]))
    if place.is_somebody_elses:
        raise Refused(
            f"{place.target} is there already, and {webui.platform.installer} did not make it. "
            "Move it away and try again. Nothing was changed."
        )
    place.must_be_writable()
    if enable and webui.flags is not None:
        must_be_writable(webui.flags.path)


def _place(place: Place, as_copy: bool, platform: Platform, changes: Changes) -> None:
    before = ""
    link = paths.leads_to(place.target)
    if link and not as_copy and paths.is_same(place.target, EXTENSION):
        say(f"{NAME} is linked into {place.folder} already.")
        return
    if link:
        before = f", in place of a link to {link}"
    elif paths.exists(place.target):
        before = ", in place of the copy that was there"
    with changes.put(place.target) as new:
        if not as_copy and _link(new, platform):
            say(f"{NAME} is linked into {place.folder}{before}. Keep the clone in {ROOT}.")
            return
        _copy(new)
        say(f"{NAME} is copied into {place.folder}{before}.")
        if not as_copy:
            say(f"No link can be made there: after an update of this clone, run {platform.installer} again.")


def _link(new: Path, platform: Platform) -> bool:
    """Make a link in the best way that works, and say whether one does."""
    for make in platform.links:
        with contextlib.suppress(OSError):
            make(EXTENSION, new)
            if (new / "script.py").is_file():
                return True
        paths.remove(new)
    return False


def _copy(new: Path) -> None:
    """Copy the extension without what running it left there."""
    new.mkdir()
    for folder, folders, files in os.walk(EXTENSION):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        to = new / os.path.relpath(folder, EXTENSION)
        to.mkdir(exist_ok=True)
        for name in files:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file() and not file.is_symlink():
                shutil.copyfile(file, to / name)
    (new / MARKER).touch()


def _enable(webui: Webui, record: Record, changes: Changes) -> Record:
    if webui.flags is None:
        say("This version of the webui has no CMD_FLAGS.txt, so --enable has nothing to add the flag to.")
        return record
    file = webui.flags.path
    text = flags.read(file)
    if NAME in flags.extensions(text):
        say(f"{file} names {NAME} already.")
        return record
    before = file.read_bytes() if file.exists() else None
    changes.write(file, flags.encoded(flags.with_ours(text)))
    say(f"{file} has {NAME} among its --extensions now.")
    return replace(record, flagged=file, flags_before=before)


def _keep(record: Record, place: Place, changes: Changes) -> None:
    if record != Record():
        changes.write(place.record_file, record.to_bytes())
