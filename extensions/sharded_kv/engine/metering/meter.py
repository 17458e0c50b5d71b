"""The meter of one model's replies: seconds/token, first token, traffic and memory, with sharding on and off.

It only listens: nothing's life hangs on it, and a failure of its own costs nobody a reply.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import devices, text
from ..placement import Placement
from ..transfers import TrafficCounter
from .figures import DeviceMemory, Figures, Snapshot, Token
from .memory import MemoryMarks, bytes_by_device
from .recorder import Recorder, Recording, Step

if TYPE_CHECKING:
    from ..prompts.kept import Conversations

logger = logging.getLogger(__name__)

_CHART_TOKENS = 512  # the chart shows every token of the recent minutes


class Meter:
    """Measures the replies of one model, which it holds weakly.

    Args:
        counter: counts what crosses.
        is_sharded: whether sharding is on.
        kept: what is kept between replies.

    Attributes:
        memory: marks of the reply that is being written, or of the latest.
        failure: one sentence on why the latest reply was not measured, or not to its end; "" if it was.
    """

    def __init__(self, counter: TrafficCounter, is_sharded: Callable[[], bool], kept: Conversations) -> None:
        self.failure = ""
        self.is_sharded = is_sharded
        self._counter, self._kept = counter, kept
        self._lock = threading.Lock()
        self._model: weakref.ref[nn.Module] | None = None
        self._devices: tuple[torch.device, ...] = ()
        self._tokens: collections.deque[Token] = collections.deque(maxlen=_CHART_TOKENS)
        self._recorders: dict[bool, Recorder] = {}
        self._latest: bool | None = None
        self._generating = 0
        self.memory = MemoryMarks()
        self._weights: dict[torch.device, int] = {}

    def read(self, model: nn.Module, placement: Placement) -> None:
        """Measure this model, on the devices where it is."""
        self._model = weakref.ref(model)
        self._devices = tuple(device for device in placement.devices if device.type != "cpu")

    def snapshot(self) -> Snapshot:
        """What is known now. May be called from any thread, while a reply is being written."""
        weights, kept = self._weigh(), self._kept.bytes_by_device()
        memory = tuple(
            self._device_memory(device, weights.get(device, 0), kept.get(device, 0)) for device in self._devices
        )
        with self._lock:
            figures = {sharded: recorder.figures() for sharded, recorder in self._recorders.items()}
            return Snapshot(
                sharded=figures.get(True),
                unsharded=figures.get(False),
                current=Figures() if self._latest is None else figures[self._latest],
                generating=self._generating > 0,
                memory=memory,
                tokens=tuple(self._tokens),
                traffic=self._counter.read(),
                kept_tokens=self._kept.tokens,
            )

    def begin(self) -> Recording:
        """A reply begins."""
        self.failure = ""
        with self._lock:
            self._generating += 1
        self._look(self.memory.begin)
        return Recording(self._counter, self, self.is_sharded)

    # --- what a recording tells ---------------------------------------------------------------------------------------

    def note_step(self, recording: Recording, step: Step) -> None:
        """A step was measured."""
        with self._lock:
            recorder = self._recorders.get(step.sharded)
            if recorder is None or recorder.recording.started < recording.started:
                # A reply that was switched in its midst has no first token with the new setting: the last one stays.
                first = None if recorder is None or step.tokens == 0 else recorder.first
                recorder = self._recorders[step.sharded] = Recorder(recording, first)
            if recorder.recording is recording:  # of two replies at once, the figures are those of the later
                recorder.add(step)
                self._latest = step.sharded
            if step.tokens and step.seconds is not None:
                each = step.seconds / step.tokens
                self._tokens.extend([Token(time.time(), each, step.sharded)] * step.tokens)

    def look_at_memory(self, cache: Any) -> None:
        """It is time for another look; a forward with this cache begins."""
        self.memory.cache = bytes_by_device(cache)
        self._look(self.memory.look)

    def note_failure(self, error: Exception) -> None:
        """Measuring has failed, and ends for this reply."""
        self.failure = f"Measuring has failed: {text.of_error(error)}"
        logger.warning("The rest of this reply is not measured.", exc_info=error)

    def note_end(self) -> None:
        """The reply is over."""
        self._look(self.memory.end)
        with self._lock:
            self._generating -= 1

    # --- memory -------------------------------------------------------------------------------------------------------

    def _look(self, look: Callable[[tuple[torch.device, ...]], None]) -> None:
        """Reading memory must not cost anybody a reply, whatever a driver answers."""
        try:
            look(self._devices)
        except Exception:
            logger.warning("The memory of %s cannot be read.", self._devices, exc_info=True)

    def _weigh(self) -> dict[torch.device, int]:
        """Bytes of the model's parameters and buffers on each device."""
        model = None if self._model is None else self._model()
        if model is None:
            return {}
        with contextlib.suppress(RuntimeError):  # modules come or go just now, as those of a LoRA: as it was before
            self._weights = bytes_by_device([*model.parameters(), *model.buffers()])
        return self._weights

    def _device_memory(self, device: torch.device, weights: int, kept: int) -> DeviceMemory:
        usage = devices.usage(device)
        cache = self.memory.cache.get(device, 0) + kept
        return DeviceMemory(
            device=str(device),
            name=devices.name(device),
            weights=weights,
            cache=cache,
            rest=max(0, usage.process - weights - cache),
            others=usage.used - usage.process,
            free=usage.total - usage.used,
            total=usage.total,
            peak=max(self.memory.peak.get(device, 0), usage.allocated),
        )
