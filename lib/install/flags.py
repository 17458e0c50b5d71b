"""The text of CMD_FLAGS.txt: which extensions it names, and the same text with or without ours.

The webui joins its lines into one command line, without those that start with # and without the backslashes at line
ends. So a flag's values may go on in the next line, and of two --extensions the last one wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from .source import NAME


@dataclass(frozen=True)
class Flag:
    """A flag in a text: its values without quotes, where it begins and where its last value ends."""

    values: tuple[str, ...]
    start: int
    end: int


def read(file: Path | None) -> str:
    """The text of a file, "" if there is none, with all its line ends and with bytes that are no UTF-8."""
    return decoded(file.read_bytes()) if file is not None and file.is_file() else ""


def decoded(content: bytes) -> str:
    """The text of these bytes."""
    return content.decode("utf-8", "surrogateescape")


def encoded(text: str) -> bytes:
    """The bytes of such a text."""
    return text.encode("utf-8", "surrogateescape")


def find(text: str, name: str) -> Flag | None:
    """The last flag of this name, if there is one."""
    found: Flag | None = None
    inside = False
    for word, start in _words(text):
        end = start + len(word)
        if word == name or word.startswith(f"{name}="):
            first = word[len(name) + 1 :]
            found, inside = Flag((_unquoted(first),) if word != name else (), start, end), True
        elif word.startswith("-"):
            inside = False
        elif inside and found is not None:
            found = Flag((*found.values, _unquoted(word)), found.start, end)
    return found


def extensions(text: str) -> tuple[str, ...]:
    """The extensions that it names."""
    flag = find(text, "--extensions")
    return flag.values if flag is not None else ()


def with_ours(text: str) -> str:
    """The text with our extension beside those that it names."""
    flag = find(text, "--extensions")
    if flag is not None:
        words = text[flag.start : flag.end]
        # With = argparse takes one value only.
        words = re.sub(r"^--extensions=", "--extensions ", words)
        return f"{text[: flag.start]}{words} {NAME}{text[flag.end :]}"
    newline = "\r\n" if "\r\n" in text else "\n"
    between = newline if text and not text.endswith("\n") else ""
    return f"{text}{between}--extensions {NAME}{newline}"


def without_ours(text: str) -> str:
    """The text without our extension, and without --extensions if that was all it had."""
    flag = find(text, "--extensions")
    if flag is None or NAME not in flag.values:
        return text
    before, words, after = text[: flag.start], text[flag.start : flag.end], text[flag.end :]
    if len(flag.values) > 1:
        ours = re.fullmatch(rf"(.*)\s[\"']?{NAME}[\"']?(\s.*)?", words, re.DOTALL | re.ASCII)
        return before + (ours[1] + (ours[2] or "") if ours else words) + after
    if not before or before.endswith("\n"):  # The line goes with it, if nothing else is in it.
        return before + re.sub(r"^[ \t]*\r?\n", "", after)
    return before.rstrip(" \t") + after


def _words(text: str) -> Iterator[tuple[str, int]]:
    """Each word outside comments with its place, less the backslashes at its line's end."""
    offset = 0
    for line in text.split("\n"):
        if not re.match(r"\s*#", line, re.ASCII):
            last = len(line.rstrip(" \t\r\v\f"))
            for match in re.finditer(r"\S+", line, re.ASCII):
                word = match[0].rstrip("\\") if match.end() == last else match[0]
                if word:
                    yield word, offset + match.start()
        offset += len(line) + 1


def _unquoted(word: str) -> str:
    return re.sub("[\"']", "", word)
