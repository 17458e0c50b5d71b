"""Graph mode: the decode steps of a model as CUDA graphs, one for each stage, replayed token after token.

A reply's first decode step runs as ever, on static buffers, and is watched; its second is captured, watched too, and
replayed at once; all that follow are replayed. Two watched steps that differ in anything but the contents of tensors
rule a capture out (`tape.Watch`). A later reply's first step is watched as well: graphs that would not do the same,
after a LoRA was taken off or weights were exchanged, are captured anew. What operators do that cannot be watched shows
in the logits, which are compared each time. Prefill, and whatever is no plain decode step, runs without graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import caches, stacks, vram, wording
from .placement import CACHE_NAME, Placement
from .tape import CannotCapture, Capture, Tape, Watch
from .transfers import TrafficCounter, is_plain, tensors_in

logger = logging.getLogger(__name__)

# Room for tokens comes in such steps. A reply that outgrows its room is captured again, which takes as long as some
# twenty tokens; room that is not used yet is read by attention all the same.
_STEP = 256
_LEAST_ROOM = 64
# Of long replies the room grows by this part, so that captures get rarer.
_GROWTH = 1 / 4
# How many kinds of steps keep their graphs at once: usually a model is called in one way, or two.
_MOST_LOOKS = 4
# How far a replay's logits may be from the step's own, relative to the largest: in 16 bits one GPU differs from itself
# by up to 0.008 (tests/gpu/results), while another token, weight or position makes logits with little in common.
_TOLERANCE = 0.05

_ATTENTION = ("sdpa", "eager")  # these take any mask that is added to the scores

# Runs the model's forward with keyword arguments, in a forward of its own that counts with the given counter.
Run = Callable[[Mapping[str, Any], TrafficCounter], Any]


class StepAside(Exception):
    """This step is none for graphs. The message is one sentence for people."""


@dataclasses.dataclass(frozen=True)
class Stepped:
    """A step that ran with graphs."""

    output: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """A decode step, as the model is called for it.

    Attributes:
        cache: the reply's cache.
        length: how many tokens it holds.
        mask: [batch, length + 1], which of them count, or None for all.
        tensors: the other arguments that are tensors.
        plain: the other arguments; they are the same in every step that shares a graph.
    """

    cache: Any
    length: int
    mask: Tensor | None
    tensors: dict[str, Tensor]
    plain: dict[str, Any]

    @property
    def batch(self) -> int:
        """How many sequences are written."""
        return self.tensors["input_ids"].shape[0]

    @functools.cached_property
    def look(self) -> Any:
        """What two steps have in common that share a graph."""
        tensors = ((name, tuple(t.shape), t.dtype) for name, t in sorted(self.tensors.items()))
        return (*tensors, *sorted((name, repr(value)) for name, value in self.plain.items()))


class Graphs:
    """The decode steps of one model as CUDA graphs. One reply at a time has them; others run without.

    Args:
        model: the module whose forward a step is. Held weakly.
        placement: where its parts are.
        counter: counts what crosses between devices.

    Attributes:
        reason: one sentence on why the latest step ran without graphs; "" if it ran with them, or was a prompt.
    """

    def __init__(self, model: nn.Module, placement: Placement, counter: TrafficCounter) -> None:
        self.reason = ""
        self._model = weakref.ref(model)
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._devices = placement.devices
        self._main_device = placement.main_device
        self._counter = counter
        self._lock = threading.Lock()
        self._is_closed = False
        self._hopeless = _reason_against(placement)
        self._refused: dict[Any, str] = {}
        self._too_large: dict[int, int] = {}  # by batch size: so many tokens do not fit
        self._told: set[str] = set()
        self._held: _Held | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the static buffers."""
        held = self._held
        return 0 if held is None else held.buffers.nbytes

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> Stepped | None:
        """Run one forward, if it is a step for graphs; None if it is not: then nothing has run.

        Args:
            args, kwargs: what the model was called with.
            run: see `Run`.
        """
        named = dict(zip(self._names, args, strict=False)) | kwargs
        try:
            if _goes_on(named.get(CACHE_NAME)):
                with self._lock:
                    if not self._is_closed:
                        output = self._step(self._read(named), run)
                        self.reason = ""
                        return Stepped(output)
        except StepAside as aside:
            self._tell(str(aside))
        except Exception as error:  # a defect of ours must not cost anybody a reply
            self._hopeless = f"Graph mode has failed and is off for this model: {wording.of_error(error)}"
            self.reason = self._hopeless
            logger.exception("Without graphs: %s", self._hopeless)
            with self._lock, contextlib.suppress(Exception):
                self._free()
        finally:
            if self._is_closed:
                with contextlib.suppress(Exception):  # the step has run: it must not run again
                    self.close()
        return None

    def end_reply(self) -> None:
        """This thread's reply is over: if somebody kept its cache, that gets tensors of its own."""
        with self._lock:
            if self._held is not None and self._held.thread == threading.get_ident():
                try:
                    self._held.dismiss()
                except Exception as error:  # then the buffers are that cache's, and nobody else's
                    if not isinstance(error, torch.cuda.OutOfMemoryError):
                        logger.exception("A cache could not be taken out of graph mode's buffers, and keeps them.")
                    self._free()

    def close(self) -> None:
        """Free graphs and buffers, for good. Where a step is running, it does so at its end: nobody waits for it."""
        self._is_closed = True
        if self._lock.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._lock.release()

    def _free(self) -> None:
        """Let go of graphs and buffers.

        A cache that is in the buffers stays there, for its reply may be running in another thread: the buffers are its
        own now, until they die with it. What it concatenates from now on lies elsewhere.
        """
        held, self._held = self._held, None
        if held is not None:
            held.free()

    def _tell(self, reason: str) -> None:
        self.reason = reason
        if reason not in self._told:
            self._told.add(reason)
            logger.info("Without graphs: %s", wording.one_line(reason))

    # --- is it a step for graphs? -------------------------------------------------------------------------------------

    def _read(self, named: dict[str, Any]) -> _Call:
        """The call as a decode step.

        Raises:
            StepAside: it is none.
        """
        if self._hopeless:
            raise StepAside(self._hopeless)
        cache: Any = named.get(CACHE_NAME)
        if not named.get("use_cache", True):
            raise StepAside("The model was called without using its cache.")
        if reason := caches.reason_against(cache):
            raise StepAside(reason)
        ids = named.get("input_ids")
        model = self._model()
        assert model is not None  # it is being called
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise StepAside("The model was called with something else than token ids.")
        if ids.shape[1] != 1:
            raise StepAside(f"{ids.shape[1]} tokens came at once (prompt lookup, assisted generation).")
        if getattr(model, "is_loaded_in_8bit", False):
            raise StepAside("Its 8-bit weights (bitsandbytes) have the host wait in every layer, which no graph can.")
        if torch.is_grad_enabled() or model.training:
            raise StepAside("Gradients are wanted, or the model is in training mode.")
        if stacks.is_autocast_on(ids.device.type):
            raise StepAside("The model was called under autocast.")
        if ids.device != self._main_device:
            raise StepAside(f"The token ids are on {ids.device}, the model begins on {self._main_device}.")
        config = getattr(model, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        if attention not in _ATTENTION:
            raise StepAside(f"Its attention is {attention}: graph mode needs sdpa or eager attention.")
        for name in ("output_attentions", "output_hidden_states"):
            if named.get(name, getattr(config, name, False)):
                raise StepAside(f"{name} was asked for.")
        length = int(cache.get_seq_length())
        return self._split(named, cache, length, ids)

    def _split(self, named: dict[str, Any], cache: Any, length: int, ids: Tensor) -> _Call:
        mask = named.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (ids.shape[0], length + 1)):
            raise StepAside("Its attention mask is not the usual one, of a number for each token.")
        tensors, plain = {}, {}
        for name, value in named.items():
            if name in (CACHE_NAME, "attention_mask"):
                continue
            if isinstance(value, Tensor):
                if value.device != self._main_device:
                    raise StepAside(f"{name} is on {value.device}, the model begins on {self._main_device}.")
                tensors[name] = value
            elif is_plain(value):
                plain[name] = value
            else:
                raise StepAside(f"The model was called with {name}, a {type(value).__name__}.")
        if "position_ids" in self._names and mask is not None and "position_ids" not in tensors:
            raise StepAside("The model was called with an attention mask and no position_ids.")
        # What the model would make of Python's numbers, which differ from step to step, it gets as tensors.
        for name, shape in (("position_ids", (ids.shape[0], 1)), ("cache_position", (1,))):
            if name in self._names and tensors.get(name) is None:
                plain.pop(name, None)
                tensors[name] = torch.full(shape, length, dtype=torch.int64, device=ids.device)
        return _Call(cache, length, mask, tensors, plain)

    # --- stepping -----------------------------------------------------------------------------------------------------

    def _step(self, call: _Call, run: Run) -> Any:
        if call.look in self._refused:
            raise StepAside(self._refused[call.look])
        held = self._held
        if held is not None and held.owner() is not None and held.owner() is not call.cache:
            raise StepAside("Another reply has the graphs, or this is the second pass of guidance.")
        if held is None or not held.has(call):
            held = self._make_room(call)
        try:
            return held.step(call, run, self._counter)
        except torch.cuda.OutOfMemoryError as error:
            self._refuse_room(held.buffers.capacity, call, error)
        except CannotCapture as error:
            self._refuse(call, str(error))
        except Exception as error:
            logger.debug("A capture failed.", exc_info=error)
            words = wording.of_error(error).partition(" CUDA kernel errors might be")[0]  # and advice for debugging
            self._refuse(call, f"The step could not be captured: {words}")

    def _refuse(self, call: _Call, reason: str) -> NoReturn:
        """Never try steps of this look again."""
        self._refused[call.look] = reason
        self._give_up(reason)

    def _refuse_room(self, capacity: int, call: _Call, error: Exception) -> NoReturn:
        """Never try to have so much room again, nor more."""
        self._too_large[call.batch] = capacity
        first = str(error).split(". ", 1)[0]
        self._give_up(f"There is no room for a static cache of {capacity} tokens and its graphs ({first}).")

    def _give_up(self, reason: str) -> NoReturn:
        self._free()
        if reason not in self._told and not self._is_closed:  # else the model was switched off in the midst of a step
            self._told.add(reason)
            logger.warning("Without graphs: %s", wording.one_line(reason))
        raise StepAside(reason)

    def _make_room(self, call: _Call) -> _Held:
        """Move the reply's cache into buffers: those that are there if they suit, else new ones."""
        model = self._model()
        assert model is not None  # it is being called
        needed = call.length + 1
        longest = min(filter(None, (caches.longest(call.cache), _window(model))), default=None)
        if longest is not None and needed > longest:
            raise StepAside(f"The reply is longer than the model's sliding window of {longest} tokens.")
        held = self._held
        if held is not None and held.has_lost(call.cache):
            raise StepAside("The reply changes its cache between steps (beams, prompt lookup, assisted generation).")
        if reason := _hooked(model):
            raise StepAside(reason)
        if held is not None and held.suits(call):
            held.take(call.cache)
            return held
        capacity = _capacity(needed, longest)
        if capacity >= self._too_large.get(call.batch, math.inf):
            raise StepAside(f"There is no room for a static cache of {capacity} tokens and its graphs.")
        self._free()  # old buffers that hold this very cache live until it has moved
        try:
            held = _Held(caches.Buffers(call.cache, capacity), self._devices)
            held.take(call.cache)
        except torch.cuda.OutOfMemoryError as error:
            self._refuse_room(capacity, call, error)
        self._held = held
        return held


def _capacity(needed: int, longest: int | None) -> int:
    """For how many tokens there shall be room where `needed` must fit."""
    room = max(_LEAST_ROOM, int(needed * _GROWTH))
    capacity = -(-(needed + room) // _STEP) * _STEP
    return capacity if longest is None else min(capacity, longest)


class _Held:
    """Buffers, and the graphs on them.

    Attributes:
        buffers: as given.
        owner: the cache that is in the buffers, held weakly.
        thread: the identity of the thread whose reply it is.
    """

    def __init__(self, buffers: caches.Buffers, devices: Iterable[torch.device]) -> None:
        self.buffers = buffers
        self.owner: Callable[[], Any] = lambda: None
        self.thread = 0
        self._losses = 0
        self._devices = tuple(devices)
        self._steps: dict[Any, _Step] = {}

    def has(self, call: _Call) -> bool:
        """Whether the call's cache is in the buffers, and has room for a token."""
        return (
            self.owner() is call.cache
            and self.buffers.is_whole
            and call.length == self.buffers.length
            and call.length < self.buffers.capacity
        )

    def has_lost(self, cache: Any) -> bool:
        """Whether a cache that was moved in has twice been given tensors of its own since: each move is a copy."""
        if self.owner() is cache and not self.buffers.is_whole:
            self._losses += 1
        return self.owner() is cache and self._losses > 1

    def suits(self, call: _Call) -> bool:
        """Whether the call's cache could move in, and has so much to fill that the room is worth reading."""
        capacity = self.buffers.capacity
        return call.length < capacity <= 2 * (call.length + _STEP) and self.buffers.suit(call.cache)

    def take(self, cache: Any) -> None:
        """Move a cache in."""
        if self.owner() is not cache:
            self._losses = 0
        self.buffers.take(cache)
        self.owner, self.thread = weakref.ref(cache), threading.get_ident()
        for step in self._steps.values():
            step.is_proven = False

    def dismiss(self) -> None:
        """The cache that is in the buffers leaves."""
        cache, self.owner, self.thread = self.owner(), lambda: None, 0
        if cache is not None:
            self.buffers.give_back(cache)

    def free(self) -> None:
        """Free the graphs."""
        for step in self._steps.values():
            step.free()
        self._steps = {}

    def step(self, call: _Call, run: Run, counter: TrafficCounter) -> Any:
        """Run one step on the buffers."""
        step = self._steps.get(call.look)
        if step is None:
            while len(self._steps) >= _MOST_LOOKS:  # the oldest goes: somebody calls the model with ever new values
                self._steps.pop(next(iter(self._steps))).free()
            step = self._steps[call.look] = _Step(call, self.buffers, self._devices)
        output = step.run(call, run, counter)
        self.buffers.length += 1
        return output


class _Step:
    """One kind of decode step on one set of buffers: watched at first, then captured, then replayed.

    Args:
        call: the first of its kind.
        buffers: where its cache is.
        devices: where the model is.

    Attributes:
        is_proven: the graphs have been compared with a step of this reply.
    """

    def __init__(self, call: _Call, buffers: caches.Buffers, devices: Iterable[torch.device]) -> None:
        self.is_proven = False
        self._buffers = buffers
        self._devices = devices
        self._notes: list[Any] | None = None
        self._tape: Tape | None = None
        self._output: Any = None
        ids = call.tensors["input_ids"]
        keys = buffers.layers[0][0]
        with torch.inference_mode(False):
            self._tensors = {name: torch.empty_like(tensor) for name, tensor in call.tensors.items()}
            self._mask = torch.zeros(ids.shape[0], buffers.capacity, dtype=torch.int64, device=ids.device)
            # What a masked token's score is changed by; the other tokens' by 0.
            self._masked = torch.full((), torch.finfo(keys.dtype).min, dtype=keys.dtype, device=ids.device)
            self._counted = torch.zeros((), dtype=keys.dtype, device=ids.device)

    def run(self, call: _Call, run: Run, counter: TrafficCounter) -> Any:
        """The step's output."""
        self._set_inputs(call)
        if self._notes is None or (self._tape is not None and not self.is_proven):
            return self._watch(call, run, counter)
        if self._tape is None:
            self._capture(call, run)
            self._prove(self._run(call, run, counter), counter)
        else:
            self._replay(counter)
        return _copied(self._output, call.cache)

    def free(self) -> None:
        """Free the graphs."""
        if self._tape is not None:
            self._tape.free()
        self._tape = self._output = None

    def _set_inputs(self, call: _Call) -> None:
        for name, tensor in call.tensors.items():
            self._tensors[name].copy_(tensor)
        length = call.length + 1
        if call.mask is None:
            self._mask[:, :length] = 1
        else:
            self._mask[:, :length].copy_(call.mask)
        self._mask[:, length:] = 0
        self._buffers.point()

    def _run(self, call: _Call, run: Run, counter: TrafficCounter) -> Any:
        with _plain_mode(), self._buffers.step():
            return run(self._arguments(call), counter)

    def _watch(self, call: _Call, run: Run, counter: TrafficCounter) -> Any:
        watch = Watch()
        with _plain_mode(), watch:
            output = self._run(call, run, counter)
        if self._tape is not None and watch.notes == self._notes:
            self._prove(output, counter)
        else:
            self.free()
        self._notes = watch.notes
        return output

    def _capture(self, call: _Call, run: Run) -> None:
        # A pool whose graphs are all gone cannot be used again.
        capture = Capture({device: vram.runtime(device).graph_pool_handle() for device in self._devices})
        with _plain_mode(), capture.recording():
            output = self._run(call, run, TrafficCounter())  # nothing crosses before the replay
        self._output = _template(output, call.cache)
        self._tape = capture.tape(list(tensors_in(self._output)))
        if capture.notes != self._notes:
            raise CannotCapture(_difference(self._notes or [], capture.notes))

    def _replay(self, counter: TrafficCounter) -> None:
        assert self._tape is not None
        self._tape.replay()
        for transfer in self._tape.transfers:
            source, target = transfer.source, transfer.target
            counter.add(source.device, target.device, target.numel() * target.element_size())

    def _prove(self, output: Any, counter: TrafficCounter) -> None:
        """Replay the step that gave `output`, and compare."""
        self._replay(counter)
        for ours, theirs in zip(tensors_in(self._output), tensors_in(output), strict=True):
            difference, largest = (x.abs().max() for x in (_finite(ours) - _finite(theirs), _finite(theirs)))
            is_far = (difference > _TOLERANCE * largest) | (ours.isnan() != theirs.isnan()).any()
            if bool(is_far):
                raise CannotCapture("Its graphs compute something else than its forward, though they look the same.")
        self.is_proven = True

    def _arguments(self, call: _Call) -> dict[str, Any]:
        mask = torch.where(self._mask[:, None, None, :] != 0, self._counted, self._masked)
        return {**call.plain, **self._tensors, "attention_mask": mask, CACHE_NAME: call.cache}


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """No gradients, but not inference mode, where operators that consist of others are not taken apart."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.float(), posinf=0.0, neginf=0.0)


def _reason_against(placement: Placement) -> str:
    for block in placement.blocks:
        if block.keeps_hooks:
            return f"{block.name or 'The model'} keeps hooks: weights are offloaded, or somebody else's hook is there."
    for device in placement.devices:
        if not hasattr(vram.runtime(device) if device.type != "cpu" else None, "CUDAGraph"):
            return f"Graphs need CUDA GPUs, and part of the model is on {device}."
    return ""


def _goes_on(cache: Any) -> bool:
    """Whether something was said before: else the tokens that come are a prompt."""
    return cache is not None and not caches.is_empty(cache)


def _window(model: nn.Module) -> int | None:
    """The smallest window or chunk that the model's config speaks of; None if it has none.

    A cache without windows does not tell: then the model's own mask leaves out what lies behind, and ours does not.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((size for size in sizes if type(size) is int and size > 0), default=None)


def _hooked(model: nn.Module) -> str:
    """Why hooks of other people's rule graphs out: a replay runs no Python."""
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        theirs = [hook for hook in hooks if type(hook).__module__.rpartition(".")[0] != __name__.rpartition(".")[0]]
        if name and theirs:
            return f"Somebody's hook is on {name}, which a graph would not run."
    return ""


def _template(output: Any, cache: Any) -> Any:
    """A step's output, with a stand-in for the cache.

    Raises:
        CannotCapture: there is something in it of which the next step's could not be made.
    """
    if output is cache:
        return _CACHE
    if isinstance(output, Mapping):
        return type(output)(**{key: _template(value, cache) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)([_template(value, cache) for value in output])
    if isinstance(output, Tensor) or is_plain(output):
        return output
    raise CannotCapture(f"The model returned a {type(output).__name__}.")


def _copied(template: Any, cache: Any) -> Any:
    """A step's output for its caller to keep: the next replay would write over the graph's own."""
    if template is _CACHE:
        return cache
    if isinstance(template, Tensor):
        return template.clone()
    if isinstance(template, Mapping):
        return type(template)(**{key: _copied(value, cache) for key, value in template.items()})
    if isinstance(template, (tuple, list)):
        return type(template)([_copied(value, cache) for value in template])
    return template


_CACHE = "the reply's cache"  # stands for it in a template


def _difference(before: list[Any], after: list[Any]) -> str:
    """One sentence on where two steps differ."""
    for old, new in zip(before, after, strict=False):
        if old != new:
            return f"Its forward differs from step to step, from {new[0]} on: a graph would repeat one step's values."
    return f"Its forward ran {len(before)} operators in one step and {len(after)} in the next."
