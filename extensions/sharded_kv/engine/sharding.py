"""Sharding: takes over from accelerate how a spread model runs, and gives it back exactly as it was."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from . import stacks
from .meter import Meter
from .placement import Block, Placement, Scope, read_placement
from .swaps import Installation, Installed, Swap
from .transfers import Forward, TrafficCounter, first_device

logger = logging.getLogger(__name__)

MODES = ("eager",)

# What is certainly no model: a caller's mistake, not a model that we cannot help.
_NO_MODELS = (type(None), str, bytes, bool, int, float, complex, list, tuple, dict, set, frozenset, type)

_shardings: weakref.WeakKeyDictionary[nn.Module, Sharding] = weakref.WeakKeyDictionary()
_shardings_lock = threading.RLock()


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
    with _shardings_lock:
        sharding = _shardings.get(model)
        if sharding is None:
            sharding = _shardings[model] = Sharding(model)
    sharding.enable()
    return sharding


class Sharding:
    """How one model runs: by accelerate's hooks (off) or by ours (on). Made by `shard()`.

    It holds the model weakly: a Sharding that outlives its model holds none of its memory.

    Attributes:
        placement: what of the model runs where, as last read.
        meter: seconds/token, traffic and memory of the model's replies.
    """

    def __init__(self, model: Any) -> None:
        self._lock = threading.RLock()
        self._counter = TrafficCounter()
        self._runtime = _Runtime(self._counter, self)
        self._installation: weakref.ref[_ShardingInstallation] | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self.meter = Meter(self._counter, lambda: self.enabled)
        if isinstance(model, nn.Module):
            self._model = weakref.ref(model)
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
        """Whether there is something to shard."""
        return not self.reason

    @property
    def reason(self) -> str:
        """One sentence on why there is nothing to shard; "" if there is."""
        if self._model is not None and self._model() is None:
            return "The model was unloaded."
        return self.placement.reason

    @property
    def enabled(self) -> bool:
        """Whether the model runs by our forwards now."""
        installation = self._installed()
        return installation is not None and installation.holds

    @property
    def mode(self) -> str:
        """How the model runs while enabled: "eager"."""
        return "eager"

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"There is no mode {mode!r}: choose one of {', '.join(MODES)}.")

    def enable(self) -> None:
        """Have the model run by our forwards. Takes effect between two blocks, also while a reply is written.

        Reads the placement again if the model was moved or dispatched again. Does nothing for an inactive Sharding.
        """
        with self._lock:
            installation = self._installed()
            if installation is not None and installation.holds:
                return
            self._restore()
            model = None if self._model is None else self._model()
            if model is None:
                return
            _detach_others(model, self)
            self.placement = read_placement(model)
            if self.placement.reason:
                return
            self._install(model)
            self.meter.attach(model, self.placement)

    def disable(self) -> None:
        """Give the model back accelerate's own hooks: the same objects, and the same traffic to the byte."""
        with self._lock:
            self._restore()

    def detach(self) -> None:
        """Off for good: the model has no attribute of ours any more. `shard()` would make a new Sharding."""
        with self._lock:
            self._restore()
            self.meter.detach()
            model = None if self._model is None else self._model()
        if model is not None:
            with _shardings_lock:
                if _shardings.get(model) is self:
                    del _shardings[model]

    def _installed(self) -> _ShardingInstallation | None:
        return None if self._installation is None else self._installation()

    def _install(self, model: nn.Module) -> None:
        stacks.keep_untraced(_Runtime.run_block, _Runtime.run_scope, _Runtime.run_alone, _Runtime.run_scope_inside)
        installation = _ShardingInstallation(model, self.placement, self._runtime)
        installation.install()
        self._installation = weakref.ref(installation)
        self._runtime.installation = self._installation

    def _restore(self) -> None:
        installation = self._installed()
        self._installation = self._runtime.installation = None
        if installation is not None:
            installation.restore()

    def _renew(self, stale: _ShardingInstallation) -> None:
        """Read the placement of a model that was moved or dispatched again, and go on with that."""
        with self._lock:
            if self._installed() is not stale:
                return
            stale.restore()
            model = None if self._model is None else self._model()
            if model is None:
                return
            self.placement = read_placement(model)
            if self.placement.blocks:
                # Also when all of it is on one device now: accelerate's hooks would send the inputs where the weights
                # were.
                self._install(model)
            logger.warning("The model was moved or dispatched again. %s", self.reason or self.placement.describe())


def _detach_others(model: nn.Module, sharding: Sharding) -> None:
    """A wrapper and what it wraps (a LoRA around a model) share modules: the newer Sharding takes over."""
    modules = set(model.modules())
    with _shardings_lock:
        others = [
            other
            for root, other in list(_shardings.items())
            if other is not sharding and (root in modules or not modules.isdisjoint(root.modules()))
        ]
    for other in others:
        other.detach()


class _Lane(threading.local):
    """The forward that is running in this thread, if any."""

    forward: Forward | None = None


class _Runtime:
    """What the installed forwards of one model share: how a scope and a block run.

    It refers to nothing of the model, so that a Sharding that outlives its model holds no weights.
    """

    def __init__(self, counter: TrafficCounter, sharding: Sharding | None) -> None:
        self.counter = counter
        self.lane = _Lane()
        self.sharding = None if sharding is None else weakref.ref(sharding)
        self.installation: weakref.ref[_ShardingInstallation] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Runtime:
        """The copy of a model runs by a runtime of its own."""
        return _Runtime(TrafficCounter(), None)

    def run_block(self, block: Block, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run one block on its device."""
        current = self.lane.forward
        if current is None:
            return self.run_alone(self.run_block, block, forward, args, kwargs)
        device = block.device
        home = first_device((args, kwargs)) if block.returns else None
        current.enter(device)
        args, kwargs = current.move_inputs(args, kwargs, device)
        output = forward(*args, **kwargs)
        return output if home is None else current.move_home(output, home)

    def run_scope(self, scope: Scope, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or a part of it that has blocks below and code of its own between them."""
        current = self.lane.forward
        if current is not None and current.owner is not scope:
            if scope.device is None:
                return forward(*args, **kwargs)
            return self.run_scope_inside(scope, forward, *args, **kwargs)
        stale = self._stale()
        if stale is not None:
            return stale.renewed(scope)(*args, **kwargs)
        return self.run_alone(self.run_scope_inside, scope, forward, args, kwargs)

    def _stale(self) -> _ShardingInstallation | None:
        installation = None if self.installation is None else self.installation()
        return None if installation is None or installation.holds else installation

    def run_scope_inside(self, scope: Scope, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a scope with the memo that is open."""
        current = self.lane.forward
        assert current is not None
        home = None
        if scope.returns:
            home = first_device((args, {k: v for k, v in kwargs.items() if k not in scope.cache_names}))
        if scope.device is not None:
            args, kwargs = current.move_inputs(args, kwargs, scope.device, scope.cache_names)
        output = forward(*args, **kwargs)
        return output if home is None else current.move_home(output, home, scope.cache_names)

    def run_alone(
        self, run: Callable[..., Any], part: Block | Scope, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run with a memo of its own, and leave nothing behind."""
        outer = self.lane.forward
        current = self.lane.forward = Forward(part, self.counter)
        try:
            return run(part, forward, *args, **kwargs)
        finally:
            self.lane.forward = outer
            current.close()


@dataclasses.dataclass(frozen=True)
class _Anchor:
    """One block of a stage, to see at little cost that it is where it was and that its forward is still ours."""

    module: nn.Module
    forward: Installed
    holder: nn.Module | None
    weight: str
    block: Block

    @property
    def holds(self) -> bool:
        if self.module.__dict__.get("forward") is not self.forward:
            return False
        if self.holder is None:
            return True
        tensor: Tensor | None = self.holder._parameters.get(self.weight)
        if tensor is None:
            tensor = self.holder._buffers.get(self.weight)
        return tensor is not None and tensor.device == self.block.device


class _ShardingInstallation(Installation):
    """Our forwards on one model.

    Block by block they may take effect while another thread is in a forward: a block aligns its inputs by itself,
    whoever called it. A module inside a block loses its hook after the block has got ours, and gets it back before.
    """

    def __init__(self, model: nn.Module, placement: Placement, runtime: _Runtime) -> None:
        self._model = model
        self._runtime = runtime
        self._modules = dict(model.named_modules())
        super().__init__(list(self._swaps(placement)))
        forwards = {swap.owner: swap.ours for swap in self.swaps}
        self._anchors = [
            self._anchor(block, forwards[self._modules[block.name]])
            for block in (stage.blocks[0] for stage in placement.stages)
        ]

    @property
    def holds(self) -> bool:
        """Whether the model is still placed as it was read and still runs by these forwards."""
        return all(anchor.holds for anchor in self._anchors)

    def renewed(self, scope: Scope) -> Callable[..., Any]:
        """The forward that the module of `scope` has once the model's placement was read again."""
        sharding = None if self._runtime.sharding is None else self._runtime.sharding()
        if sharding is None:
            self.restore()
        else:
            sharding._renew(self)
        forward: Callable[..., Any] = self._modules[scope.name].forward
        return forward

    def _swaps(self, placement: Placement) -> Iterator[Swap]:
        for block in (*placement.blocks, *placement.doors):
            module = self._modules[block.name]
            inner = module.forward if block.keeps_hooks else module._old_forward
            yield Swap(module, "forward", self._installed(self._runtime.run_block, block, inner, module))
        for scope in placement.scopes:
            module = self._modules[scope.name]
            inner = module.forward if scope.device is None else module._old_forward
            yield Swap(module, "forward", self._installed(self._runtime.run_scope, scope, inner, module))
        for name in placement.bare:
            module = self._modules[name]
            yield Swap(module, "forward", _bare(module._old_forward))
        yield from stacks.tuple_cache_swaps([self._modules[scope.name] for scope in placement.scopes])

    @staticmethod
    def _installed(
        run: Callable[..., Any], part: Block | Scope, inner: Callable[..., Any], module: nn.Module
    ) -> Installed:
        # generate() asks model.forward for its signature (position_ids, logits_to_keep): it must see the model's own.
        installed = Installed(run, part, inner)
        functools.update_wrapper(installed, module.forward)
        return installed

    def _anchor(self, block: Block, forward: Installed) -> _Anchor:
        module = self._modules[block.name]
        holder, _, weight = (block.weight or "").rpartition(".")
        return _Anchor(module, forward, module.get_submodule(holder) if block.weight else None, weight, block)


def _bare(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module without its hook, as an object of its own.

    So it can be told from the same method in its place after accelerate's `remove_hook_from_module`.
    """
    if isinstance(forward, types.MethodType):
        return types.MethodType(forward.__func__, forward.__self__)
    return functools.partial(forward)
