"""Sharding: takes over from accelerate how a spread model runs, and gives it back exactly as it was."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from typing import Any

from torch import nn

from . import compat, text
from .eager import EagerPatches, Runtime
from .gate import Gate
from .graphs import eligible
from .metering.meter import Meter
from .placement import Placement, read_placement
from .reply import ReplyPatches, writes_replies
from .transfers import TrafficCounter

logger = logging.getLogger(__name__)

MODES = ("eager", "graph")

# What is certainly no model: a caller's mistake, not a model that we cannot help.
_NO_MODELS = (type(None), str, bytes, bool, int, float, complex, list, tuple, dict, set, frozenset, type)

_shardings: weakref.WeakKeyDictionary[Any, Sharding] = weakref.WeakKeyDictionary()
# One for all models: a wrapper and what it wraps share modules, and switching one on takes the other off.
_gate = Gate()
_lock = threading.Lock()  # while a model's Sharding is looked up, or made


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
    sharding = _sharding_of(model)
    try:
        sharding.enable()
    except BaseException:  # a defect of ours, or Ctrl-C: nothing half done stays
        sharding.detach()
        raise
    return sharding


def attach(model: Any) -> Sharding:
    """The same without enabling: the model runs as accelerate has it, and its replies are measured."""
    sharding = _sharding_of(model)
    try:
        sharding.attach()
    except BaseException:
        sharding.detach()
        raise
    return sharding


def _sharding_of(model: Any) -> Sharding:
    if isinstance(model, _NO_MODELS):
        raise TypeError(f"shard() takes a loaded model, not {model!r:.60}: pass what from_pretrained() returned.")
    if not isinstance(model, nn.Module):
        return Sharding(model)
    before = _shardings.get(model)
    if before is not None and before.is_detached:  # that failed midway, and is done now
        before.detach()
    with _lock:
        sharding = _shardings.get(model)
        if sharding is None or sharding.is_detached:
            sharding = _shardings[model] = Sharding(model)
        return sharding


class Sharding:
    """How one model runs: by accelerate's hooks (off) or by ours (on). Made by `shard()` or `attach()`.

    It holds the model weakly: a Sharding that outlives its model holds none of its memory.

    Attributes:
        placement: what of the model runs where, as last read.
        meter: seconds/token, traffic and memory of the model's replies.
        failure: one sentence on the error after which it switched itself off; "" since it was last enabled.
        is_detached: it is off for good.
    """

    def __init__(self, model: Any) -> None:
        self.failure = ""
        self.is_detached = False
        self._runtime = Runtime(_gate, TrafficCounter(), self)
        self.meter = Meter(self._runtime.counter, self._runtime.is_on, self._runtime.prompts.kept)
        self._reply_patches: ReplyPatches | None = None
        self._mode = MODES[0]
        self._is_wanted = False
        self._model: weakref.ref[nn.Module] | None = None
        self.placement = Placement(reason="Nobody has read where its parts are.")
        if isinstance(model, nn.Module):
            self._model = weakref.ref(model)
            # A wrapper may die before what it wraps (a LoRA that is taken off), on whose modules our forwards are.
            weakref.finalize(model, self._end).atexit = False
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
        if self.placement.reason and not (self.placement.is_one_block and self._mode == "graph"):
            return self.placement.reason
        return "It was detached: shard() makes a new Sharding." if self.is_detached else ""

    @property
    def enabled(self) -> bool:
        """Whether the model runs by our forwards now."""
        patches = self._runtime.patches
        return patches is not None and patches.hold and not self._runtime.is_given_up

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
        if mode != self._mode:
            _gate.alone(lambda: self._set_mode(mode))

    @property
    def reason_for_eager(self) -> str:
        """In graph mode: one sentence on why the latest decode step ran without graphs; "" if it ran with them."""
        runners = self._runtime.runners.values()
        if runners:
            return max(runners, key=lambda runner: runner.latest).reason
        model = None if self._model is None else self._model()
        if model is None or self._mode == "eager" or not self.enabled:
            return ""
        return eligible.GENERATES_HOOKED if writes_replies(type(model)) else eligible.NOTHING_GENERATES

    @property
    def kept_conversations(self) -> int:
        """How many conversations' caches are kept between replies, so that what a prompt has in common with one of them
        is not computed again; 0, as at first, for none. May be set at any time.
        """
        return self._runtime.prompts.kept.most

    @kept_conversations.setter
    def kept_conversations(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"There is no keeping {count} conversations: 0 keeps none.")
        self._runtime.prompts.kept.most = count
        self.drop_kept()

    def drop_kept(self) -> None:
        """Free what is kept of conversations, buffers and graphs. The next prompt is computed as a whole."""
        _gate.alone(self._drop_kept)

    def _drop_kept(self) -> None:
        self._runtime.drop_spare()

    @property
    def prompt_chunk(self) -> int | None:
        """How many tokens of a prompt are read at once, so that each GPU works on a chunk of its own.

        0 for all of them. None, as at first: as many as are quickest. May be set at any time.
        """
        return self._runtime.prompts.chunk

    @prompt_chunk.setter
    def prompt_chunk(self, tokens: int | None) -> None:
        if tokens is not None and tokens < 0:
            raise ValueError(f"There are no chunks of {tokens} tokens: 0 reads a prompt as a whole.")
        self._runtime.prompts.chunk = tokens

    def new_cache(self) -> Any:
        """An empty KVCache for a loop of one's own: ``model(ids, past_key_values=cache)``. Graphs serve it too.

        Raises:
            RuntimeError: this transformers keeps caches in tuples, or the model was unloaded.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise RuntimeError(f"There is no model to make a cache for. {self.reason}")
        if not compat.has_cache_objects():
            raise RuntimeError("This version of transformers keeps caches in tuples: a KVCache needs a newer one.")
        name = next(iter(self._runtime.runners), "")
        return self._runtime.own_cache(compat.empty_dynamic_cache(model), name, "generate")

    def attach(self) -> None:
        """Read the placement, and see the model's replies from now on. What the model runs by stays as it is."""
        if not self.enabled:
            _gate.alone(self._attach)

    def enable(self) -> None:
        """Have the model run by our forwards, from the next forward on, also while a reply is written.

        Reads the placement again, since the model may have been moved or dispatched again. Does nothing for an
        inactive Sharding or a detached one.
        """
        self._is_wanted = True
        if not self.enabled:
            _gate.alone(self._enable)

    def disable(self) -> None:
        """Give the model back accelerate's own hooks: the same objects, and the same traffic to the byte."""
        self._is_wanted = False
        _gate.alone(self._disable)

    def detach(self) -> None:
        """Off for good: the model has no attribute of ours any more. `shard()` would make a new Sharding."""
        self._is_wanted = False
        self.is_detached = True
        _gate.alone(self._detach)

    def _end(self) -> None:
        """The model is gone. Called in garbage collection, which must not wait for anybody."""
        self._is_wanted = False
        self.is_detached = True
        _gate.soon(self._detach)

    # --- between two forwards -----------------------------------------------------------------------------------------

    def _attach(self) -> None:
        model = None if self._model is None else self._model()
        if model is None or self.is_detached:
            return
        _take_over(model, self)
        self._disable()
        self.placement = read_placement(model)
        # On one device now, with hooks that would send the inputs to where the weights were: then we go on alone.
        is_ours = bool(self.placement.blocks) and (self.active or self.placement.hooks_are_stale)
        # Those that suit stay: a reply calls them between two forwards, when a switch may come.
        if self._reply_patches is not None and not (is_ours and self._reply_patches.suit(model, self.placement)):
            self._reply_patches.restore()
            self._reply_patches = None
        if is_ours:
            _shardings[model] = self
            self.meter.read(model, self.placement)
            if self._reply_patches is None:
                self._reply_patches = ReplyPatches(model, self.placement, self._runtime, self.meter)

    def _enable(self) -> None:
        model = None if self._model is None else self._model()
        if model is None or not self._is_wanted or self.enabled:
            return
        self._attach()
        self.failure = ""
        if self._reply_patches is not None:
            self._runtime.prompts.stages = len(self.placement.devices)
            self._runtime.patches = EagerPatches(model, self.placement, self._runtime)
            self._runtime.is_given_up = False
            self._set_runners(model)

    def _disable(self) -> None:
        self._runtime.prompts.kept.drop()
        self._set_runners(None)
        patches = self._runtime.patches
        if patches is not None:
            self._runtime.is_given_up = True  # until the last is off
            patches.restore()
            self._runtime.patches = None  # not before: what fails can be done again

    def _detach(self) -> None:
        self._disable()
        if self._reply_patches is not None:
            self._reply_patches.restore()
            self._reply_patches = None
        model = None if self._model is None else self._model()
        if model is not None and _shardings.get(model) is self:
            del _shardings[model]

    def _set_mode(self, mode: str) -> None:
        self._mode = mode
        model = None if self._model is None else self._model()
        if model is None:
            return
        if self.placement.is_one_block and not self.active:  # by blocks there is nothing to do for it
            self._disable()
        elif self.enabled:
            self._set_runners(model)
        elif self._is_wanted:
            self._enable()
        elif self._reply_patches is None:
            self._attach()

    def _set_runners(self, model: nn.Module | None) -> None:
        """Run decode steps as graphs where the mode says so; close all runners without a model."""
        for runner in self._runtime.runners.values():
            runner.close()
        self._runtime.runners = {}
        if model is None or self._mode == "eager":
            return
        from .graphs.runner import GraphRunner

        self._runtime.runners = {
            container.name: GraphRunner(module, self.placement, self._runtime.counter)
            for container in self.placement.containers
            if writes_replies(type(module := model.get_submodule(container.name)))
        }

    # --- what a step asks ---------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Read the placement of a model that was moved or dispatched again, and go on with that."""
        _gate.alone(self._renew)

    def _renew(self) -> None:
        self._enable()
        words = text.one_line(self.reason or self.placement.describe())
        logger.warning("The model was moved or dispatched again. %s", words)

    def step_aside(self, error: BaseException) -> None:
        """Leave the model to accelerate after an error that is our doing, so that no reply is lost by it."""
        with contextlib.suppress(Exception):
            _gate.alone(lambda: self._step_aside(error))

    def _step_aside(self, error: BaseException) -> None:
        if self.failure:  # another thread's step has failed as well
            return
        self._is_wanted = False
        self.failure = f"Switched off after an error in our part of a forward: {text.of_error(error)}"
        try:
            self._disable()
        finally:
            logger.error("%s", self.failure, exc_info=error)


def _take_over(model: nn.Module, sharding: Sharding) -> None:
    """A wrapper and what it wraps (a LoRA around a model) share modules: the newer Sharding takes over."""
    modules = set(model.modules())
    for root, other in list(_shardings.items()):
        if other is not sharding and (root in modules or not modules.isdisjoint(root.modules())):
            other.detach()
