"""Measures replies, with sharding on and off: seconds/token, first-token time, traffic and memory.

A reply is one call of `generate()`. A token's time is taken when generation asks its stopping criteria, which it does
once for each step in every version of transformers and for every way of decoding. Nothing here synchronises a device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import vram
from .placement import CACHE_NAME, Placement, Scope
from .stacks import keep_untraced
from .swaps import Installation, Installed, Swap
from .transfers import Traffic, TrafficCounter, tensors_in

# The figures of a reply are medians over its most recent tokens, so that one slow step (another program, a grown
# cache) does not show; the chart shows every token of the recent minutes.
_RECENT_TOKENS = 32
_CHART_TOKENS = 512
# How often memory is looked at while a reply is written; a look costs about 0.05 ms for each device.
_MEMORY_PERIOD_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Token:
    """One decode step.

    Attributes:
        time: when it ended, `time.time()`.
        seconds: since the step before; where a step gave several tokens, divided among them.
        sharded: whether sharding was on.
    """

    time: float
    seconds: float
    sharded: bool


@dataclasses.dataclass(frozen=True)
class Figures:
    """Speed and traffic of the latest reply, or part of a reply, with sharding on or off.

    Attributes:
        seconds_per_token: median over the recent decode steps; None before the second token.
        first_token_seconds: from the call of `generate()` until the first token was there; None until then.
        bytes_per_token, copies_per_token: mean over the recent decode steps; None while sharding is off, when
            accelerate moves tensors and does not count.
        tokens: how many were measured.
    """

    seconds_per_token: float | None = None
    first_token_seconds: float | None = None
    bytes_per_token: float | None = None
    copies_per_token: float | None = None
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The inverse of `seconds_per_token`."""
        return 1 / self.seconds_per_token if self.seconds_per_token else None


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device, in bytes. weights + cache + rest + others + free = total.

    Attributes:
        device, name: "cuda:0", "NVIDIA GeForce RTX 4090".
        weights: the model's parameters and buffers.
        cache: the cache of the reply being written.
        rest: everything else of this process.
        others: other processes.
        free, total: of the device.
        peak: the most that tensors of this process held since the reply began.
    """

    device: str
    name: str
    weights: int
    cache: int
    rest: int
    others: int
    free: int
    total: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the meter knows now.

    Attributes:
        sharded: the latest figures with sharding on; None if there were none yet.
        unsharded: the same with sharding off.
        current: the one of both that was measured last.
        generating: whether a reply is being written.
        memory: for each device of the model.
        tokens: the recent decode steps, oldest first.
        traffic: all that has crossed between devices with sharding on.
    """

    sharded: Figures | None
    unsharded: Figures | None
    current: Figures
    generating: bool
    memory: tuple[DeviceMemory, ...]
    tokens: tuple[Token, ...]
    traffic: Traffic

    @property
    def seconds_per_token(self) -> float | None:
        """Of the latest reply."""
        return self.current.seconds_per_token

    @property
    def tokens_per_second(self) -> float | None:
        """Of the latest reply."""
        return self.current.tokens_per_second

    @property
    def first_token_seconds(self) -> float | None:
        """Of the latest reply."""
        return self.current.first_token_seconds

    @property
    def bytes_per_token(self) -> float | None:
        """Of the latest reply; None while sharding is off."""
        return self.current.bytes_per_token

    @property
    def copies_per_token(self) -> float | None:
        """Of the latest reply; None while sharding is off."""
        return self.current.copies_per_token


class Meter:
    """Measures the replies of one model. Holds the model weakly."""

    def __init__(self, counter: TrafficCounter, is_sharded: Callable[[], bool]) -> None:
        self._counter = counter
        self._is_sharded = is_sharded
        self._lock = threading.Lock()
        self._lane = _Lane()
        self._model: weakref.ref[nn.Module] | None = None
        self._installation: weakref.ref[Installation] | None = None
        self._hooks: list[Any] = []
        self._scopes: tuple[Scope, ...] = ()
        self._devices: tuple[torch.device, ...] = ()
        self._tokens: collections.deque[Token] = collections.deque(maxlen=_CHART_TOKENS)
        self._recorders: dict[bool, _Recorder] = {}
        self._latest: bool | None = None
        self._generating = 0
        self._memory = _MemoryMarks()

    def __deepcopy__(self, memo: dict[int, Any]) -> Meter:
        """The copy of a model is measured by a meter of its own."""
        return Meter(TrafficCounter(), lambda: False)

    def snapshot(self) -> Snapshot:
        """What is known now. May be called from any thread, while a reply is being written."""
        memory = tuple(self._device_memory(device) for device in self._devices)
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
            )

    def attach(self, model: nn.Module, placement: Placement) -> None:
        """Measure the replies of `model`, with sharding on and off alike."""
        self._devices = tuple(device for device in placement.devices if device.type != "cpu")
        if self._installation is not None and self._installation() is not None and placement.scopes == self._scopes:
            return
        self.detach()
        self._scopes = placement.scopes
        keep_untraced(type(self)._before_forward, type(self)._run_reply)
        modules = dict(model.named_modules())
        scopes = [modules[scope.name] for scope in placement.scopes]
        swaps = []
        for module in scopes:
            if callable(getattr(type(module), "generate", None)):
                original = module.generate
                ours = functools.update_wrapper(Installed(self._run_reply, original), original)
                swaps.append(Swap(module, "generate", ours))
            self._hooks.append(module.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        installation = Installation(swaps)
        installation.install()
        self._installation = weakref.ref(installation)
        self._model = weakref.ref(model)

    def detach(self) -> None:
        """Leave the model as it was. What was measured stays."""
        installation = None if self._installation is None else self._installation()
        if installation is not None:
            installation.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._installation = None

    def _run_reply(self, generate: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `generate()` with a clock among its stopping criteria."""
        # The fourth positional argument is `stopping_criteria` too; nobody passes it so, and then the reply is not
        # measured.
        if self._lane.reply is not None or len(args) > 3:
            return generate(*args, **kwargs)
        reply = self._lane.reply = _Reply(self)
        kwargs["stopping_criteria"] = reply.among(kwargs.get("stopping_criteria"))
        with self._lock:
            self._generating += 1
            self._memory.begin(self._devices)
        try:
            return generate(*args, **kwargs)
        finally:
            self._lane.reply = None
            with self._lock:
                self._generating -= 1
                self._memory.look(self._devices)
                self._memory.cache = {}

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The first forward after the first token: now that token is known to be there."""
        reply = self._lane.reply
        if reply is None:
            return
        reply.before_forward()
        if self._memory.is_due():
            with self._lock:
                self._memory.look(self._devices)
                self._memory.cache = _bytes_by_device(kwargs.get(CACHE_NAME))

    def _record_first(self, started: float, now: float, sharded: bool) -> None:
        with self._lock:
            recorder = self._recorders[sharded] = _Recorder()
            recorder.first = now - started
            self._latest = sharded

    def _record_token(self, seconds: float, tokens: int, sharded: bool, traffic: Traffic) -> None:
        with self._lock:
            recorder = self._recorders.setdefault(sharded, _Recorder())
            recorder.add(seconds, tokens, traffic if sharded else None)
            self._tokens.extend([Token(time.time(), seconds / tokens, sharded)] * tokens)
            self._latest = sharded

    def _device_memory(self, device: torch.device) -> DeviceMemory:
        usage = vram.usage(device)
        model = None if self._model is None else self._model()
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        weights = sum(t.numel() * t.element_size() for t in tensors if t.device == device)
        cache = self._memory.cache.get(device, 0)
        return DeviceMemory(
            device=str(device),
            name=vram.name(device),
            weights=weights,
            cache=cache,
            rest=max(0, usage.process - weights - cache),
            others=usage.used - usage.process,
            free=usage.total - usage.used,
            total=usage.total,
            peak=max(self._memory.peak.get(device, 0), usage.allocated),
        )


class _Lane(threading.local):
    """The reply that is being written in this thread, if any."""

    reply: _Reply | None = None


class _Reply:
    """One call of `generate()`; as one of its stopping criteria it is asked after each step, and never stops it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._started = time.perf_counter()
        self._last: float | None = None
        self._length = 0
        self._awaits_first = False
        self._went_forward = False
        self._sharded = False
        self._traffic = meter._counter.read()

    def among(self, criteria: Any) -> Any:
        """`criteria` with this one at the end."""
        if criteria is None:
            criteria = sys.modules["transformers"].StoppingCriteriaList()
        return type(criteria)([*criteria, self])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        """Note that a step has ended. Never stops generation."""
        if not self._went_forward:  # assisted generation also asks whether a mere candidate would be the end
            return False
        self._went_forward = False
        now, traffic, sharded = time.perf_counter(), self._meter._counter.read(), self._meter._is_sharded()
        length = input_ids.shape[1]
        if self._last is None:
            self._awaits_first = True
        elif sharded == self._sharded:  # a step during which it was switched belongs to neither
            self._meter._record_token(now - self._last, max(1, length - self._length), sharded, traffic - self._traffic)
        self._last, self._length, self._traffic, self._sharded = now, length, traffic, sharded
        return False

    def before_forward(self) -> None:
        """A forward begins: what the step before it had to wait for has been waited for."""
        self._went_forward = True
        if self._awaits_first:
            self._awaits_first = False
            self._meter._record_first(self._started, time.perf_counter(), self._sharded)


class _Recorder:
    """The recent tokens of one reply, with sharding on or off."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT_TOKENS)
        self._traffic: collections.deque[tuple[int, int, int]] = collections.deque(maxlen=_RECENT_TOKENS)
        self._tokens = 0

    def add(self, seconds: float, tokens: int, traffic: Traffic | None) -> None:
        self._seconds.append(seconds / tokens)
        self._tokens += tokens
        if traffic is not None:
            self._traffic.append((tokens, traffic.total_bytes, traffic.total_copies))

    def figures(self) -> Figures:
        tokens = sum(step[0] for step in self._traffic)
        return Figures(
            seconds_per_token=statistics.median(self._seconds) if self._seconds else None,
            first_token_seconds=self.first,
            bytes_per_token=sum(step[1] for step in self._traffic) / tokens if tokens else None,
            copies_per_token=sum(step[2] for step in self._traffic) / tokens if tokens else None,
            tokens=self._tokens,
        )


class _MemoryMarks:
    """Our own marks of memory: torch's peak belongs to everybody in the process, so we must not reset it."""

    def __init__(self) -> None:
        self.peak: dict[torch.device, int] = {}
        self.cache: dict[torch.device, int] = {}
        self._highest_before: dict[torch.device, int] = {}
        self._next_look = 0.0

    def begin(self, devices: tuple[torch.device, ...]) -> None:
        """A reply begins."""
        held = {device: vram.allocated(device) for device in devices}
        self._highest_before = {device: marks.peak for device, marks in held.items()}
        self.peak = {device: marks.now for device, marks in held.items()}
        self._next_look = time.monotonic() + _MEMORY_PERIOD_SECONDS

    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return time.monotonic() >= self._next_look

    def look(self, devices: tuple[torch.device, ...]) -> None:
        """Raise the peaks: exactly where torch's own mark rose since the reply began, else by what is held just now."""
        self._next_look = time.monotonic() + _MEMORY_PERIOD_SECONDS
        for device in devices:
            marks = vram.allocated(device)
            rose = marks.peak > self._highest_before.get(device, 0)
            self.peak[device] = marks.peak if rose else max(self.peak.get(device, 0), marks.now)


def _bytes_by_device(cache: Any) -> dict[torch.device, int]:
    """Bytes of a cache on each device: of tuples of tensors, or of one of transformers' cache objects."""
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
