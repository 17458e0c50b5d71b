"""Puts into words for people what may be anything: errors, and names that others gave."""

from __future__ import annotations


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
