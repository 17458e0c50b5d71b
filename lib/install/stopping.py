"""How a run ends before its end: refused with a sentence, or interrupted by a signal."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any, ContextManager, Iterator


class Refused(Exception):
    """The run ends here. The message says what is the matter and what to do."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(BaseException):
    """Ctrl-C, or another signal to stop. `status` is what a shell would give for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        # A closed terminal is a reason to terminate like any other.
        self.status = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _signals() -> list[signal.Signals]:
    """The signals that stop a run; one that was ignored when it started, as nohup does, stays so."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    known = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first signal to stop into Interrupted; later ones cannot disturb what is then put back."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _signals():
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    with _handled_by(stop):
        yield


def uninterrupted() -> ContextManager[None]:
    """Ignore signals to stop: what is done now takes no time, or must not be left half done."""
    return _handled_by(signal.SIG_IGN)


@contextlib.contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _signals()}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
