"""What the person at the screen reads, in the order in which it happens."""

from __future__ import annotations

import io
import sys
import time
from typing import Callable


def accept_any_path() -> None:
    """Have paths printed that the output's encoding does not know: as the bytes they are, or escaped on Windows."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace" if sys.platform == "win32" else "surrogateescape")


def say(text: str, end: str = "\n") -> None:
    """Print at once: pip and errors print to the same screen."""
    print(text, end=end, flush=True)


def complain(text: str) -> None:
    """Print to where errors go."""
    print(text, file=sys.stderr, flush=True)


def reason(error: OSError) -> str:
    """What the operating system says, without its numbers."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def step(label: str, work: Callable[[], tuple[int, str]]) -> bool:
    """Do `work` and say in one line how long it takes; what it prints is shown only if it fails.

    Args:
        label: what is done, as the beginning of the line.
        work: gives the exit status and what was printed.
    """
    say(f"{label} ... ", end="")
    started = time.monotonic()
    status, output = work()
    seconds = int(time.monotonic() - started)
    say(f"failed after {seconds} s\n{output.rstrip()}" if status else f"{seconds} s")
    return status == 0
