"""Takes down one reply: what each of its steps took, and what the figures of its recent ones are."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ..transfers import TrafficCounter
from .copies import Observer
from .figures import Figures
from .memory import MemoryMarks

# The figures of a reply are medians over its most recent tokens, so that one slow step (another program, a grown
# cache) does not show.
_RECENT_TOKENS = 32
# While sharding is off one decode step in so many is observed: it takes twice as long (Llama-7B on H200: 30 ms more).
_OBSERVE_EVERY = 128


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of a reply took; the first one, before which no token was there, gave none to measure.

    Attributes:
        seconds: since the step before; of the first, since the reply began. None for one that was slowed by counting.
        tokens: how many it gave; 0 for the first.
        bytes, copies: what crossed between GPUs; None where nobody counted.
        sharded: whether sharding was on.
    """

    seconds: float | None
    tokens: int
    bytes: int | None
    copies: int | None
    sharded: bool


class Listener(Protocol):
    """Who is told of what a recording takes down."""

    memory: MemoryMarks

    def note_step(self, recording: Recording, step: Step) -> None:
        """A step was measured."""

    def look_at_memory(self, cache: Any) -> None:
        """It is time for another look; a forward with this cache begins."""

    def note_failure(self, error: Exception) -> None:
        """Measuring has failed, and ends."""

    def note_end(self) -> None:
        """The reply is over."""


class Recording:
    """The measuring of one reply. None of its methods raises: if measuring fails, the reply goes on unmeasured.

    As one of the reply's stopping criteria it is asked after each step, which every way of generating does in every
    version of transformers. It never stops a reply. Nothing here synchronises a device.

    Args:
        counter: counts what crosses.
        listener: is told of each step.
        is_sharded: whether sharding is on.

    Attributes:
        started: when the reply began, `time.perf_counter()`.
        prompt_tokens: how many its prompt has; None until the first token is there.
        kept_tokens: how many of these need not be computed.
        first_seconds: until the first token was there; None before.
        ids: [rows, tokens], of prompt and reply as of the latest step; None before the first.
    """

    def __init__(self, counter: TrafficCounter, listener: Listener, is_sharded: Callable[[], bool]) -> None:
        self.started = time.perf_counter()
        self.prompt_tokens: int | None = None
        self.kept_tokens = 0
        self.first_seconds: float | None = None
        self.ids: Tensor | None = None
        self._crossed = counter.of_this_thread
        self._listener = listener
        self._is_sharded = is_sharded
        self._is_measured = True
        self._last: float | None = None
        self._length = 0
        self._awaits_first = False
        self._went_forward = False
        self._sharded = False
        self._bytes, self._copies = 0, 0  # by the end of the step before
        self._observer: Observer | None = None
        self._steps_off = 0

    def forward_begins(self, cache: Any) -> None:
        """The model is called, with this cache."""
        if not self._is_measured:
            return
        try:
            # What the step before this forward had to wait for has been waited for.
            if self._awaits_first:
                self._note_first_token()
            # accelerate's traffic grows slowly, with the cache, and observing a step makes it take twice as long.
            # Of a wrapper and what it wraps, the first to say so begins the step.
            if not self._sharded and not self._went_forward and self._last is not None:
                self._observe_some()
            self._went_forward = True
            if time.monotonic() >= self._listener.memory.next_look:
                self._listener.look_at_memory(cache)
        except Exception as error:
            self.fail(error)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        """A step has ended. Never stops generation."""
        # Assisted generation also asks whether a mere candidate would be the end.
        if not self._is_measured or not self._went_forward:
            return False
        self._went_forward = False
        self.ids = input_ids
        try:
            observed = None if self._observer is None else self._stop_observing()
            now, crossed, sharded, length = time.perf_counter(), self._crossed, self._is_sharded(), input_ids.shape[1]
            if self._last is None:
                self._awaits_first, self.prompt_tokens = True, length - 1
            elif sharded == self._sharded:  # a step during which it was switched belongs to neither
                seconds, tokens = now - self._last, max(1, length - self._length)
                if observed is not None:
                    step = Step(None, tokens, observed.bytes_between_gpus, observed.copies_between_gpus, sharded)
                elif sharded:
                    step = Step(seconds, tokens, crossed.bytes - self._bytes, crossed.copies - self._copies, sharded)
                else:
                    step = Step(seconds, tokens, None, None, sharded)
                self._listener.note_step(self, step)
            self._last, self._length, self._sharded = now, length, sharded
            self._bytes, self._copies = crossed.bytes, crossed.copies
        except Exception as error:
            self.fail(error)
        return False

    def end(self) -> None:
        """The reply is over, perhaps by an exception."""
        if self._is_measured:
            try:
                self._stop_observing()
                if self._awaits_first:
                    self._note_first_token()
            except Exception as error:
                self.fail(error)
        self._listener.note_end()

    def fail(self, error: Exception) -> None:
        """Measure no longer, because of an error."""
        self._is_measured = False
        with contextlib.suppress(Exception):
            self._listener.note_failure(error)
        with contextlib.suppress(Exception):
            self._stop_observing()

    def _note_first_token(self) -> None:
        self._awaits_first = False
        self.first_seconds = time.perf_counter() - self.started
        self._listener.note_step(self, Step(self.first_seconds, 0, None, None, self._sharded))

    def _observe_some(self) -> None:
        if self._steps_off % _OBSERVE_EVERY == 0:
            self._observer = Observer()
            self._observer.start()
        self._steps_off += 1

    def _stop_observing(self) -> Observer | None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            if observer.failure is not None:
                raise observer.failure
        return observer


class Recorder:
    """The recent steps of one recording, with sharding on or off."""

    def __init__(self, recording: Recording, first: float | None) -> None:
        self.recording = recording
        self.first = first
        self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT_TOKENS)
        self._crossed: collections.deque[tuple[int, int, int]] = collections.deque(maxlen=_RECENT_TOKENS)
        self._tokens = 0
        self._prompt_tokens: int | None = None
        self._kept_tokens = 0

    def add(self, step: Step) -> None:
        if step.tokens == 0:
            self.first = step.seconds
            self._prompt_tokens, self._kept_tokens = self.recording.prompt_tokens, self.recording.kept_tokens
            return
        self._tokens += step.tokens
        if step.seconds is not None:
            self._seconds.append(step.seconds / step.tokens)
        else:
            self._crossed.clear()  # watched, and newer than what was watched before
        if step.bytes is not None and step.copies is not None:
            self._crossed.append((step.bytes, step.copies, step.tokens))

    def figures(self) -> Figures:
        size, copies, tokens = map(sum, zip(*self._crossed, strict=True)) if self._crossed else (0, 0, 0)
        return Figures(
            seconds_per_token=statistics.median(self._seconds) if self._seconds else None,
            first_token_seconds=self.first,
            bytes_per_token=size / tokens if tokens else None,
            copies_per_token=copies / tokens if tokens else None,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            kept_tokens=self._kept_tokens,
        )
