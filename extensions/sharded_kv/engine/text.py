"""Puts into words for people what may be anything: errors, and names that others gave."""

from __future__ import annotations

import reprlib
from typing import Any

_values = reprlib.Repr()
_values.maxlevel = 2


def one_line(text: str) -> str:
    """`text` without line breaks and other characters that are not printed: it cannot pass for two lines of a log."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def of_error(error: BaseException) -> str:
    """An error's kind and message, on one line. It may be one whose message cannot be had."""
    try:
        message = one_line(str(error))
    except Exception:
        message = "its message cannot be read"
    return f"{one_line(type(error).__name__)}: {message}"


def of_value(value: Any) -> str:
    """A value as Python writes it, on one line and cut short.

    It is never written out in full: YAML's aliases make a few lines into more than would fit into memory.
    """
    return one_line(_values.repr(value))[:60]
