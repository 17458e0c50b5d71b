"""The gate between forwards and switches: nothing is patched, and no graph freed, while a forward uses it."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)


class _Here(threading.local):
    """Of this thread: how many forwards it is in, one within the other, and whether it is switching."""

    forwards = 0
    is_switching = False


class Gate:
    """Forwards pass together; a switch passes alone, between two forwards.

    ``with gate:`` is a forward. A switch waits for the forwards that run, and those that come later wait for the
    switch. One that is asked for within a forward is done once that forward is over.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._here = _Here()
        self._forwards = 0  # threads that are in one
        self._switches = 0  # that wait, or are being done
        self._later: collections.deque[Callable[[], None]] = collections.deque()

    def __enter__(self) -> None:
        here = self._here
        here.forwards += 1  # first of all: a switch that this thread's garbage collection asks for has to wait
        if here.forwards > 1 or here.is_switching:
            return
        try:
            with self._condition:
                while self._switches:
                    self._condition.wait()
                self._forwards += 1
        except BaseException:  # Ctrl-C
            here.forwards -= 1
            raise

    def __exit__(self, *_: object) -> None:
        here = self._here
        if here.forwards > 1 or here.is_switching:
            here.forwards -= 1
            return
        with self._condition:
            self._forwards -= 1
            if self._switches:
                self._condition.notify_all()
        here.forwards -= 1
        if self._later:
            self._do_later()

    @property
    def is_in_forward(self) -> bool:
        """Whether this thread is in one."""
        return self._here.forwards > 0

    def alone(self, switch: Callable[[], None]) -> None:
        """Run `switch` while no forward runs: after those that do, or after this thread's own if it is in one."""
        if self.is_in_forward:
            self._later.append(switch)
            return
        with self.switching():
            switch()
        if self._later:
            self._do_later()

    def soon(self, switch: Callable[[], None]) -> None:
        """The same for what may not wait, as garbage collection may not: at once if nothing runs, else after that."""
        if self.is_in_forward or not self._condition.acquire(blocking=False):
            self._later.append(switch)
            return
        try:
            if self._forwards:
                self._later.append(switch)
            else:
                self.alone(switch)
        finally:
            self._condition.release()

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        """Within, no forward runs; not to be entered within a forward."""
        with self._condition:
            self._switches += 1
            try:
                while self._forwards:
                    self._condition.wait()
                was_switching, self._here.is_switching = self._here.is_switching, True
                try:
                    yield
                finally:
                    self._here.is_switching = was_switching
            finally:
                self._switches -= 1
                self._condition.notify_all()

    def _do_later(self) -> None:
        while self._later:
            with contextlib.suppress(IndexError):  # another thread has taken it
                switch = self._later.popleft()
                try:
                    self.alone(switch)
                except Exception:  # of a switch that nobody waits for
                    logger.exception("A switch that had to wait for the end of a forward has failed.")
