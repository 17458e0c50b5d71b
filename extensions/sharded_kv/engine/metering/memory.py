"""Memory while replies are written: what of it is the cache, and the most that there was."""

from __future__ import annotations

import collections
import time
from typing import Any

import torch
from torch import Tensor

from ..devices import allocated
from ..transfers import tensors_in

# How often memory is looked at while a reply is written; a look costs about 0.05 ms for each device.
_PERIOD_SECONDS = 0.5


class MemoryMarks:
    """Our own marks of memory: torch's peak belongs to everybody in the process, so we must not reset it.

    Attributes:
        peak: the most bytes held on each device since the reply began.
        cache: bytes of the reply's cache on each device, as of the last look.
        next_look: when the next look is due, `time.monotonic()`.
    """

    def __init__(self) -> None:
        self.peak: dict[torch.device, int] = {}
        self.cache: dict[torch.device, int] = {}
        self._highest_before: dict[torch.device, int] = {}
        self.next_look = 0.0

    def begin(self, devices: tuple[torch.device, ...]) -> None:
        """A reply begins."""
        held = {device: allocated(device) for device in devices}
        self._highest_before = {device: marks.peak for device, marks in held.items()}
        self.peak = {device: marks.now for device, marks in held.items()}
        self.next_look = time.monotonic() + _PERIOD_SECONDS

    def end(self, devices: tuple[torch.device, ...]) -> None:
        """A reply ends."""
        self.look(devices)
        self.cache = {}

    def look(self, devices: tuple[torch.device, ...]) -> None:
        """Raise the peaks: exactly where torch's own mark rose since the reply began, else by what is held just now."""
        self.next_look = time.monotonic() + _PERIOD_SECONDS
        for device in devices:
            marks = allocated(device)
            rose = marks.peak > self._highest_before.get(device, 0)
            self.peak[device] = marks.peak if rose else max(self.peak.get(device, 0), marks.now)


def bytes_by_device(cache: Any) -> dict[torch.device, int]:
    """Bytes on each device of a cache: of tensors in tuples and lists, or of one of transformers' cache objects."""
    if hasattr(cache, "bytes_by_device"):  # a KVCache, its room included
        return dict(cache.bytes_by_device())
    sizes: dict[torch.device, int] = collections.defaultdict(int)
    for tensor in {id(tensor): tensor for tensor in _cache_tensors(cache)}.values():
        sizes[tensor.device] += tensor.numel() * tensor.element_size()
    return dict(sizes)


def _cache_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (Tensor, tuple, list, dict)):
        found = list(tensors_in(value))
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        objects = [item for item in items if type(item).__module__.startswith("transformers.")]
        return found + [tensor for item in objects for tensor in _cache_tensors(item)]
    if type(value).__module__.startswith("transformers."):
        return [tensor for item in vars(value).values() for tensor in _cache_tensors(item)]
    return []
