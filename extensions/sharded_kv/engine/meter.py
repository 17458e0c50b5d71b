"""Measures replies, with sharding on and off: seconds/token, first-token time, traffic and memory.

A reply is one call of `generate()`. A token's time is taken when generation asks its stopping criteria, which it does
once for each step in every version of transformers and for every way of decoding. Nothing here synchronises a device.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import logging
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import vram, wording
from .caches import buffers_of
from .observer import Observer
from .placement import CACHE_NAME, Placement, Scope
from .stacks import keep_untraced
from .swaps import Installation, Swap, installed
from .transfers import Traffic, TrafficCounter, tensors_in

logger = logging.getLogger(__name__)

# The figures of a reply are medians over its most recent tokens, so that one slow step (another program, a grown
# cache) does not show; the chart shows every token of the recent minutes.
_RECENT_TOKENS = 32
_CHART_TOKENS = 512
# While sharding is off one decode step in so many is watched: it takes twice as long (30 ms more for Llama-7B on H200).
_OBSERVE_EVERY = 128
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
        bytes_per_token, copies_per_token: between GPUs, mean over the recent decode steps with sharding on; with it
            off, when accelerate moves tensors and does not count, of one decode step of the reply.
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
    def current_is_sharded(self) -> bool:
        """Whether the latest figures are with sharding on."""
        return self.current is not self.unsharded

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
        """Of the latest reply."""
        return self.current.bytes_per_token

    @property
    def copies_per_token(self) -> float | None:
        """Of the latest reply."""
        return self.current.copies_per_token


class Meter:
    """Measures the replies of one model. Holds the model weakly. A failure of its own costs nobody a reply.

    Attributes:
        failure: one sentence on why the latest reply was not measured, or not to its end; "" if it was.
    """

    def __init__(
        self, counter: TrafficCounter, is_sharded: Callable[[], bool], end_reply: Callable[[], None] = lambda: None
    ) -> None:
        self.failure = ""
        self._counter = counter
        self._is_sharded = is_sharded
        self._end_reply = end_reply
        self._lock = threading.Lock()
        self._lane = _Lane()
        self._model: weakref.ref[nn.Module] | None = None
        self._installation: Installation | None = None
        self._hooks: list[Any] = []
        self._scopes: tuple[Scope, ...] = ()
        self._devices: tuple[torch.device, ...] = ()
        self._tokens: collections.deque[Token] = collections.deque(maxlen=_CHART_TOKENS)
        self._recorders: dict[bool, _Recorder] = {}
        self._latest: bool | None = None
        self._generating = 0
        self._memory = _MemoryMarks()
        self._weights: dict[torch.device, int] = {}

    def snapshot(self) -> Snapshot:
        """What is known now. May be called from any thread, while a reply is being written."""
        weights = self._weigh()
        memory = tuple(self._device_memory(device, weights.get(device, 0)) for device in self._devices)
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
        if self._installation is not None and placement.scopes == self._scopes:
            return
        self.detach()
        self._scopes = placement.scopes
        keep_untraced(Meter.before_forward, Meter._run_reply, _BeforeForward.__call__)
        self._model = weakref.ref(model)
        swaps = []
        for module in (model.get_submodule(scope.name) for scope in placement.scopes):
            if writes_replies(type(module)):
                original: Any = module.generate
                swaps.append(Swap(module, "generate", installed(self._run_reply, original, like=original)))
                self._hooks.append(module.register_forward_pre_hook(_BeforeForward(self), with_kwargs=True))
        self._installation = Installation(swaps)

    def detach(self) -> None:
        """Leave the model as it was. What was measured stays."""
        if self._installation is not None:
            self._installation.restore()
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
        reply = _Reply(self._counter, self._is_sharded, self._record, self._has_failed)
        self.failure = ""
        with self._lock:
            self._generating += 1
        try:
            reply.spared(self._begin, reply, kwargs)
            return generate(*args, **kwargs)
        finally:
            self._lane.reply = None
            self._end_reply()
            reply.spared(reply.end)
            self._look_at_memory(self._memory.end)
            with self._lock:
                self._generating -= 1

    def _begin(self, reply: _Reply, kwargs: dict[str, Any]) -> None:
        """Put the clock among the criteria in `kwargs`."""
        kwargs["stopping_criteria"] = reply.among(kwargs.get("stopping_criteria"))
        self._lane.reply = reply
        self._look_at_memory(self._memory.begin)

    def before_forward(self, kwargs: dict[str, Any]) -> None:
        """A forward begins; its inputs tell where the cache is."""
        reply = self._lane.reply
        if reply is not None:
            reply.spared(self._before_forward, reply, kwargs)

    def _before_forward(self, reply: _Reply, kwargs: dict[str, Any]) -> None:
        reply.before_forward()
        if self._memory.is_due():
            self._memory.cache = bytes_by_device(kwargs.get(CACHE_NAME))
            self._look_at_memory(self._memory.look)

    def _has_failed(self, error: Exception) -> None:
        self.failure = f"Measuring has failed: {wording.of_error(error)}"
        logger.warning("The rest of this reply is not measured.", exc_info=error)

    def _look_at_memory(self, look: Callable[[tuple[torch.device, ...]], None]) -> None:
        """Reading memory must not cost anybody a reply, whatever a driver answers."""
        try:
            look(self._devices)
        except Exception:
            logger.warning("The memory of %s cannot be read.", self._devices, exc_info=True)

    def _record(self, reply: _Reply, step: _Step) -> None:
        with self._lock:
            recorder = self._recorders.get(step.sharded)
            if recorder is None or recorder.reply.started < reply.started:
                # A reply that was switched in its midst has no first token with the new setting: the last one stays.
                first = None if recorder is None or step.tokens == 0 else recorder.first
                recorder = self._recorders[step.sharded] = _Recorder(reply, first)
            if recorder.reply is reply:  # of two replies at once, the figures are those of the later
                recorder.add(step)
                self._latest = step.sharded
            if step.tokens and step.seconds is not None:
                each = step.seconds / step.tokens
                self._tokens.extend([Token(time.time(), each, step.sharded)] * step.tokens)

    def _weigh(self) -> dict[torch.device, int]:
        """Bytes of the model's parameters and buffers on each device."""
        model = None if self._model is None else self._model()
        if model is None:
            return {}
        with contextlib.suppress(RuntimeError):  # modules come or go just now, as those of a LoRA: as it was before
            self._weights = bytes_by_device([*model.parameters(), *model.buffers()])
        return self._weights

    def _device_memory(self, device: torch.device, weights: int) -> DeviceMemory:
        usage = vram.usage(device)
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


class _BeforeForward:
    """The hook by which a module tells the meter that a forward begins. A copy of the module tells nobody."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._meter is not None:
            self._meter.before_forward(kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _BeforeForward:
        return _BeforeForward(None)

    def __reduce__(self) -> Any:
        return _BeforeForward, (None,)


@dataclasses.dataclass(frozen=True)
class _Step:
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


class _Reply:
    """One call of `generate()`; as one of its stopping criteria it is asked after each step, and never stops it.

    Args:
        counter: counts what crosses.
        is_sharded: whether sharding is on.
        record: takes each step.
        failed: told of an error in measuring.
    """

    def __init__(
        self,
        counter: TrafficCounter,
        is_sharded: Callable[[], bool],
        record: Callable[[_Reply, _Step], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._counter = counter
        self._is_sharded = is_sharded
        self._record = record
        self._failed = failed
        self._is_measured = True
        self.started = time.perf_counter()
        self._last: float | None = None
        self._length = 0
        self._awaits_first = False
        self._went_forward = False
        self._sharded = False
        self._traffic = (0, 0)  # by the end of the step before
        self._observer: Observer | None = None
        self._steps_off = 0

    def among(self, criteria: Any) -> Any:
        """`criteria` with this one at the end."""
        if criteria is None:
            criteria = sys.modules["transformers"].StoppingCriteriaList()
        return type(criteria)([*criteria, self])

    def spared(self, measure: Callable[..., None], *args: Any) -> None:
        """Run a part of measuring. If it fails, this reply goes on and is not measured any more."""
        if not self._is_measured:
            return
        try:
            measure(*args)
        except Exception as error:
            self._is_measured = False
            with contextlib.suppress(Exception):
                self._failed(error)
            with contextlib.suppress(Exception):
                self._stop_observing()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        """A step has ended. Never stops generation."""
        self.spared(self._note_step, input_ids.shape[1])
        return False

    def _note_step(self, length: int) -> None:
        if not self._went_forward:  # assisted generation also asks whether a mere candidate would be the end
            return
        self._went_forward = False
        observed = self._stop_observing()
        now, traffic, sharded = time.perf_counter(), self._counter.of_this_thread(), self._is_sharded()
        if self._last is None:
            self._awaits_first = True
        elif sharded == self._sharded:  # a step during which it was switched belongs to neither
            seconds, tokens = now - self._last, max(1, length - self._length)
            if observed is not None:
                step = _Step(None, tokens, observed.bytes_between_gpus, observed.copies_between_gpus, sharded)
            elif sharded:
                crossed = traffic[0] - self._traffic[0], traffic[1] - self._traffic[1]
                step = _Step(seconds, tokens, *crossed, sharded)
            else:
                step = _Step(seconds, tokens, None, None, sharded)
            self._record(self, step)
        self._last, self._length, self._traffic, self._sharded = now, length, traffic, sharded

    def before_forward(self) -> None:
        """A forward begins: what the step before it had to wait for has been waited for."""
        begins, self._went_forward = not self._went_forward, True  # of a wrapper and what it wraps, the first to say so
        self._note_first_token()
        # accelerate's traffic grows slowly, with the cache, and looking at a step makes it take twice as long.
        if begins and self._last is not None and not self._sharded:
            if self._steps_off % _OBSERVE_EVERY == 0:
                self._observer = Observer()
                self._observer.start()
            self._steps_off += 1

    def end(self) -> None:
        """The reply is over, perhaps by an exception."""
        self._stop_observing()
        self._note_first_token()

    def _note_first_token(self) -> None:
        if self._awaits_first:
            self._awaits_first = False
            self._record(self, _Step(time.perf_counter() - self.started, 0, None, None, self._sharded))

    def _stop_observing(self) -> Observer | None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            if observer.failure is not None:
                raise observer.failure
        return observer


class _Recorder:
    """The recent steps of one reply, with sharding on or off."""

    def __init__(self, reply: _Reply, first: float | None) -> None:
        self.reply = reply
        self.first = first
        self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT_TOKENS)
        self._crossed: collections.deque[tuple[int, int, int]] = collections.deque(maxlen=_RECENT_TOKENS)
        self._tokens = 0

    def add(self, step: _Step) -> None:
        if step.tokens == 0:
            self.first = step.seconds
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

    def end(self, devices: tuple[torch.device, ...]) -> None:
        """A reply ends."""
        self.look(devices)
        self.cache = {}

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


def writes_replies(of: type) -> bool:
    """Whether modules of this type have a `generate` of transformers' kind, and not one of their own."""
    generate = getattr(of, "generate", None)
    if not callable(generate) or "transformers" not in sys.modules:
        return False
    parameters = inspect.signature(generate).parameters
    return "stopping_criteria" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def bytes_by_device(cache: Any) -> dict[torch.device, int]:
    """Bytes on each device of a cache: of tensors in tuples and lists, or of one of transformers' cache objects."""
    sizes: dict[torch.device, int] = collections.defaultdict(int)
    for tensor in {id(tensor): tensor for tensor in _cache_tensors(cache)}.values():
        sizes[tensor.device] += tensor.numel() * tensor.element_size()
    return dict(sizes)


def _cache_tensors(value: Any) -> list[Tensor]:
    if (buffers := buffers_of(value)) is not None:
        return [tensor for pair in buffers.layers for tensor in pair]
    if isinstance(value, (Tensor, tuple, list, dict)):
        found = list(tensors_in(value))
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        objects = [item for item in items if type(item).__module__.startswith("transformers.")]
        return found + [tensor for item in objects for tensor in _cache_tensors(item)]
    if type(value).__module__.startswith("transformers."):
        return [tensor for item in vars(value).values() for tensor in _cache_tensors(item)]
    return []
