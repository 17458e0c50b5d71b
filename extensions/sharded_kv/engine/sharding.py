"""Sharding: takes over from accelerate how a spread model runs, and gives it back exactly as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from . import stacks, wording
from .graphs import Graphs, Run
from .meter import Meter, writes_replies
from .placement import CACHE_NAME, Block, Placement, Scope, join, read_placement
from .swaps import Installation, Swap, Unhooking, installed, passing_on
from .transfers import Forward, TrafficCounter, first_device

logger = logging.getLogger(__name__)

MODES = ("eager", "graph")

# What is certainly no model: a caller's mistake, not a model that we cannot help.
_NO_MODELS = (type(None), str, bytes, bool, int, float, complex, list, tuple, dict, set, frozenset, type)

_shardings: weakref.WeakKeyDictionary[Any, Sharding] = weakref.WeakKeyDictionary()
# One for all: switching a wrapper on switches what it wraps off, so two models' locks could wait for each other.
_lock = threading.RLock()


def shard(model: Any) -> Sharding:
    """Attach to a model that is spread over several devices, and enable.

    Args:
        model: as `from_pretrained(device_map=...)`, `dispatch_model`, AutoGPTQ or GPTQModel left it; wrappers around
            such a model (PeftModel, AutoGPTQ's) too.

    Returns:
        The model's Sharding: always the same one for the same model. It is inactive, with a reason, for a model that
        cannot be helped; such a model is left untouched.

    Raises:
        TypeError: for what is no model at all, like None or the model's name.
    """
    if isinstance(model, _NO_MODELS):
        raise TypeError(f"shard() takes a loaded model, not {model!r:.60}: pass what from_pretrained() returned.")
    if not isinstance(model, nn.Module):
        return Sharding(model)
    with _lock:
        sharding = _shardings.get(model)
        if sharding is not None and sharding._is_detached:  # that failed midway, and is done now
            sharding.detach()
            sharding = None
        sharding = sharding or Sharding(model)
        _shardings[model] = sharding
        try:
            sharding.enable()
        except BaseException:  # a defect of ours, or Ctrl-C: of what was done by then nobody would know
            sharding.detach()
            raise
    return sharding


class Sharding:
    """How one model runs: by accelerate's hooks (off) or by ours (on). Made by `shard()`.

    It holds the model weakly: a Sharding that outlives its model holds none of its memory.

    Attributes:
        placement: what of the model runs where, as last read.
        meter: seconds/token, traffic and memory of the model's replies.
        failure: one sentence on the error after which it switched itself off; "" since it was last enabled.
    """

    def __init__(self, model: Any) -> None:
        self._counter = TrafficCounter()
        self._runtime = _Runtime(self._counter, self)
        self._forwards: _Forwards | None = None
        self._tuple_caches = Installation()
        self._is_detached = False
        self._mode = "eager"
        self._is_wanted = False
        self._model: weakref.ref[nn.Module] | None = None
        self.meter = Meter(self._counter, lambda: self.enabled, self._runtime.end_reply)
        self.failure = ""
        if isinstance(model, nn.Module):
            self._model = weakref.ref(model)
            # A wrapper may die before what it wraps (a LoRA that is taken off), on whose modules our forwards are.
            weakref.finalize(model, self.detach).atexit = False
            self.placement = read_placement(model)
        else:
            kind = type(model).__name__
            self.placement = Placement(
                reason=f"It is a {kind}, which is no torch model: it places its parts by itself."
            )

    def __repr__(self) -> str:
        what = self.placement.describe() if self.active else self.reason
        return f"<Sharding {'on' if self.enabled else 'off'}: {what}>"

    @property
    def active(self) -> bool:
        """Whether there is something to do for the model: to shard or, in graph mode, to capture."""
        return not self.reason

    @property
    def reason(self) -> str:
        """One sentence on why there is nothing to do for the model; "" if there is."""
        if self._model is not None and self._model() is None:
            return "The model was unloaded."
        if self.placement.reason and not (self.placement.is_alone and self._mode == "graph"):
            return self.placement.reason
        return "It was detached: shard() makes a new Sharding." if self._is_detached else ""

    @property
    def enabled(self) -> bool:
        """Whether the model runs by our forwards now."""
        forwards = self._forwards
        return forwards is not None and forwards.hold

    @property
    def mode(self) -> str:
        """How the model runs while enabled.

        "eager": block by block. "graph": decode steps as CUDA graphs, where that is possible; see `reason_for_eager`.
        May be set at any time, also while a reply is written.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"There is no mode {mode!r}: choose one of {', '.join(MODES)}.")
        with _lock:
            if self.placement.is_alone and mode != self._mode:  # by blocks there is nothing to do for it
                self._restore()
            self._mode = mode
            if self._is_wanted:
                self.enable()
            self._set_graphs()

    @property
    def reason_for_eager(self) -> str:
        """In graph mode: one sentence on why the latest decode step ran without graphs; "" if it ran with them."""
        return next((graphs.reason for graphs in self._runtime.graphs.values() if graphs.reason), "")

    def enable(self) -> None:
        """Have the model run by our forwards. Takes effect between two blocks, also while a reply is written.

        Reads the placement again, since the model may have been moved or dispatched again. Does nothing for an
        inactive Sharding or a detached one.
        """
        with _lock:
            self._is_wanted = True
            if self.enabled or self._is_detached:
                return
            model = None if self._model is None else self._model()
            if model is None:
                return
            self._restore()
            self.failure = ""
            _take_over(model, self)
            self.placement = read_placement(model)
            # On one device now, with hooks that would send the inputs to where the weights were: then we go on alone.
            if self.placement.blocks and (self.active or self.placement.hooks_are_stale):
                self._forwards = self._runtime.forwards = _Forwards(model, self.placement, self._runtime)
                self._attach(model)
                self._set_graphs()

    def disable(self) -> None:
        """Give the model back accelerate's own hooks: the same objects, and the same traffic to the byte."""
        with _lock:
            self._is_wanted = False
            self._restore()

    def detach(self) -> None:
        """Off for good: the model has no attribute of ours any more. `shard()` would make a new Sharding."""
        with _lock:
            self._is_detached = True
            self._is_wanted = False
            self._restore()
            self.meter.detach()
            self._tuple_caches.restore()
            model = None if self._model is None else self._model()
            if model is not None and _shardings.get(model) is self:
                del _shardings[model]

    def _attach(self, model: nn.Module) -> None:
        """What stays while sharding is off: the meter, and what caches of tuples need."""
        _shardings[model] = self
        self.meter.attach(model, self.placement)
        self._tuple_caches.restore()
        scopes = [model.get_submodule(scope.name) for scope in self.placement.scopes]
        self._tuple_caches = Installation(stacks.tuple_cache_swaps(scopes, self._counter))

    def _restore(self) -> None:
        self._runtime.forwards = None
        if self._forwards is not None:
            self._forwards.restore()
            self._forwards = None  # not before: what fails can be done again
        self._set_graphs()

    def _set_graphs(self) -> None:
        """Have graphs while enabled in graph mode, and none else."""
        graphs, wanted = self._runtime.graphs, self._mode == "graph" and self._forwards is not None
        if wanted == bool(graphs):
            return
        self._runtime.graphs = {}
        for each in graphs.values():
            each.close()
        model = None if self._model is None else self._model()
        if wanted and model is not None:
            self._runtime.graphs = {
                scope.name: Graphs(module, self.placement, self._counter)
                for scope in self.placement.scopes
                if writes_replies(type(module := model.get_submodule(scope.name)))
            }

    def _step_aside(self, error: Exception) -> None:
        """Leave the model to accelerate after an error that may be our doing, so that no reply is lost by it."""
        with _lock:
            if self.failure:  # the rest of a forward may fail as its beginning did
                return
            self._is_wanted = False
            self.failure = f"Switched off after an error in our part of a forward: {wording.of_error(error)}"
            try:
                self._restore()
            finally:
                logger.error("%s", self.failure, exc_info=error)

    def _renew(self, stale: _Forwards) -> None:
        """Read the placement of a model that was moved or dispatched again, and go on with that."""
        with _lock:
            if self._forwards is stale:
                self.enable()
                words = wording.one_line(self.reason or self.placement.describe())
                logger.warning("The model was moved or dispatched again. %s", words)


def _take_over(model: nn.Module, sharding: Sharding) -> None:
    """A wrapper and what it wraps (a LoRA around a model) share modules: the newer Sharding takes over."""
    modules = set(model.modules())
    for root, other in list(_shardings.items()):
        if other is not sharding and (root in modules or not modules.isdisjoint(root.modules())):
            other.detach()


class _Lane(threading.local):
    """The forward that is running in this thread, if any."""

    forward: Forward | None = None
    is_trial = False


@dataclasses.dataclass(frozen=True)
class _Original:
    """What a module's forward was.

    Attributes:
        forward: what ours runs.
        hooked: what stood there, with accelerate's hook around it where there is one.
    """

    forward: Callable[..., Any]
    hooked: Callable[..., Any]


class _Runtime:
    """What the installed forwards of one model share: how a scope and a block run.

    An error of ours costs nobody a reply. Before a module's own forward has run, we leave the model to accelerate and
    call what stood in our place; after it, accelerate brings the output home.

    It refers to nothing of the model, so that a Sharding that outlives its model holds no weights.
    """

    def __init__(self, counter: TrafficCounter, sharding: Sharding) -> None:
        self.counter = counter
        self.lane = _Lane()
        self.sharding = weakref.ref(sharding)
        self.forwards: _Forwards | None = None
        self.graphs: dict[str, Graphs] = {}  # by the name of the scope whose forward is a step

    def run_block(self, block: Block, original: _Original, /, *args: Any, **kwargs: Any) -> Any:
        """Run one block on its device: the way of most blocks in every step, so every call counts."""
        current = self.lane.forward
        if current is None or block.returns_to:
            return self.run_block_home(current, block, original, args, kwargs)
        try:
            device = block.device
            if device != current.device:
                current.enter(device)
            args, kwargs = current.move_inputs(args, kwargs, device)
        except Exception as error:
            self.recover(error)
            return original.hooked(*args, **kwargs)
        return original.forward(*args, **kwargs)

    def run_block_home(self, current: Forward | None, block: Block, original: _Original, args: Any, kwargs: Any) -> Any:
        """Run a block whose output may have to go back."""
        if current is None:
            # Nobody's forward: it was under way when we were switched on, or somebody calls the block alone.
            alone = dataclasses.replace(block, returns_to="input" if block.io_same_device else "")
            return self.run_forward(Forward(block, self.counter), self.run_block, alone, original, *args, **kwargs)
        try:
            home = current.home if block.returns_to == "model" else first_device((args, kwargs))
            current.enter(block.device)
            args, kwargs = current.move_inputs(args, kwargs, block.device)
        except Exception as error:
            self.recover(error)
            return original.hooked(*args, **kwargs)
        output = original.forward(*args, **kwargs)
        return output if home is None else self.run_home(current, output, home, _CACHES)

    def run_scope(self, scope: Scope, original: _Original, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or a part of it that has blocks below and code of its own between them."""
        current = self.lane.forward
        if current is not None and current.owner is not scope:
            if scope.device is None:
                return original.forward(*args, **kwargs)
            return self.run_scope_within(current, scope, original, args, kwargs)
        try:
            forwards = self.forwards
            renewed = None if forwards is None or forwards.hold else forwards.renewed(scope)
            graphs = None if renewed is not None else self.graphs.get(scope.name)
            stepped = None if graphs is None else graphs.step(args, kwargs, self._trial_of(scope, original))
        except Exception as error:
            self.recover(error)
            return original.hooked(*args, **kwargs)
        if renewed is not None:
            return renewed(*args, **kwargs)
        if stepped is not None:
            return stepped.output
        current = Forward(scope, self.counter)
        return self.run_forward(current, self.run_scope_within, current, scope, original, args, kwargs)

    def _trial_of(self, scope: Scope, original: _Original) -> Run:
        return lambda kwargs, counter: self.run_trial(scope, original, kwargs, counter)

    def run_trial(self, scope: Scope, original: _Original, kwargs: Any, counter: TrafficCounter) -> Any:
        """Run a step that may turn out to be none for graphs: its errors are for them to judge."""
        self.lane.is_trial = True
        try:
            current = Forward(scope, counter)
            return self.run_forward(current, self.run_scope_within, current, scope, original, (), kwargs)
        finally:
            self.lane.is_trial = False

    def end_reply(self) -> None:
        """A reply of this thread is over."""
        for graphs in self.graphs.values():
            try:
                graphs.end_reply()
            except Exception as error:
                self.step_aside(error)

    def run_scope_within(self, current: Forward, scope: Scope, original: _Original, args: Any, kwargs: Any) -> Any:
        """Run a scope with the memo of `current`."""
        try:
            home = None
            if scope.returns:
                home = first_device((args, {k: v for k, v in kwargs.items() if k not in scope.cache_names}))
            if scope.device is not None:
                args, kwargs = current.move_inputs(args, kwargs, scope.device, scope.cache_names)
        except Exception as error:
            self.recover(error)
            return original.hooked(*args, **kwargs)
        outer_home, current.home = current.home, scope.device or current.home or home
        try:
            output = original.forward(*args, **kwargs)
        finally:
            current.home = outer_home
        return output if home is None else self.run_home(current, output, home, scope.cache_names)

    def run_home(self, current: Forward, output: Any, home: torch.device, keep: frozenset[str]) -> Any:
        """Bring an output home, but for what `keep` names in it."""
        try:
            return current.move_home(output, home, keep)
        except Exception as error:
            self.recover(error)
            if isinstance(output, Mapping):  # accelerate 0.19 has no skip_keys
                kept = {key: value if key in keep else send_to_device(value, home) for key, value in output.items()}
                return type(output)(kept)  # type: ignore[call-arg]
            return send_to_device(output, home)

    def run_forward(self, current: Forward, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What `run` gives while `current` is the forward that runs in this thread, of which nothing is left behind."""
        lane = self.lane
        outer, lane.forward = lane.forward, current
        try:
            return run(*args, **kwargs)
        except Exception as error:
            if not lane.is_trial and _may_be_ours(error):
                self.step_aside(error)
            raise
        finally:
            lane.forward = outer
            try:
                current.close()
            except Exception as error:
                self.step_aside(error)

    def recover(self, error: Exception) -> None:
        """Leave the model to accelerate after an error in our code: its caller goes on without us.

        Raises:
            Exception: the error itself where going on would not help (no memory), or is for graphs to judge.
        """
        if self.lane.is_trial or isinstance(error, torch.cuda.OutOfMemoryError):
            raise error
        self.step_aside(error)

    def step_aside(self, error: Exception) -> None:
        """Leave the model to accelerate. Raises nothing: forwards that cannot be taken off now go on running."""
        sharding = self.sharding()
        if sharding is not None:
            with contextlib.suppress(Exception):
                sharding._step_aside(error)


def _may_be_ours(error: Exception) -> bool:
    """Whether it was raised in our code, or says that tensors met which are on different devices."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    innermost = Path(frame.f_code.co_filename)
    if isinstance(error, TypeError) and innermost == Path(__file__):
        return False  # the caller's arguments do not fit: that is raised where we pass them on
    return innermost.parent == Path(__file__).parent or "same device" in wording.of_error(error)


_CACHES = frozenset({CACHE_NAME})


@dataclasses.dataclass(frozen=True)
class _Anchor:
    """One block of a stage, to see at little cost that it is where it was and that its forward is still ours."""

    swap: weakref.ref[Swap]
    holder: weakref.ref[nn.Module] | None
    weight: str
    block: Block

    @property
    def holds(self) -> bool:
        swap = self.swap()
        if swap is None or not swap.in_place:
            return False
        holder = None if self.holder is None else self.holder()
        if holder is None:
            return True
        tensor: Tensor | None = holder._parameters.get(self.weight)
        if tensor is None:
            tensor = holder._buffers.get(self.weight)
        return tensor is not None and tensor.device == self.block.device


class _Forwards(Installation):
    """Our forwards on one model.

    Block by block they may take effect while another thread is in a forward: a block aligns its inputs by itself,
    whoever called it. A module inside a block loses its hook after the block has got ours, and gets it back before.
    """

    def __init__(self, model: nn.Module, placement: Placement, runtime: _Runtime) -> None:
        stacks.keep_untraced(*(getattr(_Runtime, name) for name in dir(_Runtime) if name.startswith("run_")))
        self._model = weakref.ref(model)
        self._sharding = runtime.sharding
        swaps = list(_forward_swaps(dict(model.named_modules()), placement, runtime))
        by_owner = {swap.owner: swap for swap in swaps}
        self._anchors = []
        for stage in placement.stages:
            block = stage.blocks[0]
            swap = swaps[0] if placement.is_alone else by_owner[model.get_submodule(block.name)]
            holder, _, weight = join(block.name, block.weight or "").rpartition(".")
            self._anchors.append(
                _Anchor(
                    swap=weakref.ref(swap),
                    holder=weakref.ref(model.get_submodule(holder)) if block.weight else None,
                    weight=weight,
                    block=block,
                )
            )
        super().__init__(swaps)

    @property
    def hold(self) -> bool:
        """Whether the model is still placed as it was read and still runs by these forwards."""
        return all(anchor.holds for anchor in self._anchors)

    def renewed(self, scope: Scope) -> Callable[..., Any]:
        """The forward that the module of `scope` has once the model's placement was read again."""
        sharding, model = self._sharding(), self._model()
        assert model is not None  # it is in a forward
        if sharding is None:
            self.restore()
        else:
            sharding._renew(self)
        forward: Callable[..., Any] = model.get_submodule(scope.name).forward
        return forward


def _forward_swaps(modules: dict[str, nn.Module], placement: Placement, runtime: _Runtime) -> Iterator[Swap]:
    inner: Any
    for block in () if placement.is_alone else (*placement.blocks, *placement.doors):
        module = modules[block.name]
        inner = module.forward if block.keeps_hooks else module._old_forward
        yield Swap(
            module,
            "forward",
            installed(runtime.run_block, block, _Original(inner, module.forward), like=module.forward),
        )
    for scope in placement.scopes:
        module = modules[scope.name]
        inner = module.forward if scope.device is None else module._old_forward
        yield Swap(
            module,
            "forward",
            installed(runtime.run_scope, scope, _Original(inner, module.forward), like=module.forward),
        )
    for name in placement.bare:
        module = modules[name]
        if Unhooking.suits(module):
            yield Unhooking(module)
        else:
            inner = module._old_forward
            yield Swap(module, "forward", passing_on(inner))
