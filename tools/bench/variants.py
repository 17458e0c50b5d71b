"""The ways of running a model that the benchmark compares: one GPU, accelerate, a patch of it, by hand, and ours."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import accelerate
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from accelerate.utils.operations import find_device, send_to_device
from torch import Tensor, nn

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine import devices as device_memory
from extensions.sharded_kv.engine.placement import CACHE_NAMES, align_hooks, read_placement

from .. import quantized

ONE_GPU = "one-gpu"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of running a model.

    Attributes:
        name: on the command line and in files.
        label: in the table, after the GPUs.
        spread: whether it runs the model that accelerate has spread over all devices, or the one on the first alone.
        applied: puts that model into this state inside a `with`, and back into exactly the state before.
    """

    name: str
    label: str
    spread: bool
    applied: Callable[[Any], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def without_skip_keys(model: nn.Module) -> Iterator[None]:
    """The hooks move whatever they are given, as before accelerate 0.20 had `skip_keys`."""
    hooks = [hook for module in model.modules() for hook in align_hooks(vars(module).get("_hf_hook"))]
    before = [(hook, hook.skip_keys) for hook in hooks if hasattr(hook, "skip_keys")]
    try:
        for hook, _ in before:
            hook.skip_keys = None
        yield
    finally:
        for hook, keys in before:
            hook.skip_keys = keys


@contextlib.contextmanager
def with_the_issues_patch(model: nn.Module) -> Iterator[None]:
    """What the issue's patch does, and nothing else: the model's outermost hook leaves the cache where it is.

    Then each layer's cache already is where that layer's own hook wants it.
    """
    with without_skip_keys(model):
        before: Any = model._hf_hook
        model._hf_hook = _CacheStays(before.execution_device)
        try:
            yield
        finally:
            model._hf_hook = before


class _CacheStays(AlignDevicesHook):
    """accelerate's hook of a whole model, which sends outputs back to where the inputs were, but for the cache."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.input_device = find_device([args, kwargs])
        return send_to_device(args, self.execution_device), _moved(kwargs, self.execution_device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not isinstance(output, Mapping):
            return send_to_device(output, self.input_device)
        return type(output)(_moved(output, self.input_device))


def _moved(values: Mapping[str, Any], device: Any) -> dict[str, Any]:
    return {key: value if key in CACHE_NAMES else send_to_device(value, device) for key, value in values.items()}


@contextlib.contextmanager
def split_by_hand(model: nn.Module) -> Iterator[None]:
    """No hooks and no checks: what somebody writes who splits one model by hand. Nothing that runs blocks is quicker.

    The first block of a stage moves what it is given, and those after it take what crossed there without a look. That
    is right for the models that the benchmark builds, and wrong for many others.
    """
    placement = read_placement(model)
    home = placement.stages[0].device
    hooked = {module: vars(module).pop("forward") for module in model.modules() if "_old_forward" in vars(module)}
    changed: list[nn.Module] = [model]
    try:
        for stage in placement.stages[1:]:
            crossed: dict[str, Any] = {}
            first, *others = (model.get_submodule(block.name) for block in stage.blocks)
            changed += [first, *others]
            first.forward = _entering(first.forward, stage.device, crossed)
            for module in others:
                module.forward = _going_on(module.forward, crossed)
        model.forward = _coming_home(model.forward, home)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)
        for module, forward in hooked.items():
            module.forward = forward


def _entering(forward: Callable[..., Any], device: torch.device, crossed: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        device_memory.runtime(device).set_device(device)
        moved = {key: _on(device, value) for key, value in kwargs.items()}
        crossed.clear()
        crossed.update({key: moved[key] for key in kwargs if moved[key] is not kwargs[key] and key != "hidden_states"})
        return forward(*[_on(device, value) for value in args], **moved)

    return run


def _going_on(forward: Callable[..., Any], crossed: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, **crossed}) if kwargs else forward(*args)

    return run


def _coming_home(forward: Callable[..., Any], home: torch.device) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        device_memory.runtime(home).set_device(home)
        output["logits"] = _on(home, output["logits"])
        return output

    return run


def _on(device: torch.device, value: Any) -> Any:
    """A tensor, or a tuple of tensors, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if type(value) is tuple and all(isinstance(item, Tensor) and item.device != device for item in value):
        return tuple(item.to(device, non_blocking=True) for item in value)
    return value


@contextlib.contextmanager
def sharded(model: nn.Module) -> Iterator[None]:
    """sharded_kv in eager mode, with its meter: as everybody runs it."""
    sharding = shard(model)
    try:
        if not sharding.enabled:
            raise RuntimeError(f"sharded_kv does not take this model: {sharding.reason}")
        yield
    finally:
        sharding.detach()


@contextlib.contextmanager
def graphed(model: nn.Module) -> Iterator[None]:
    """sharded_kv in graph mode, from a reply's first token on: it captures in each reply anew."""
    sharding = shard(model)
    try:
        sharding.mode = "graph"
        yield
        if sharding.reason_for_eager:
            raise RuntimeError(f"sharded_kv ran without graphs: {sharding.reason_for_eager}")
    finally:
        sharding.detach()


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(ONE_GPU, "", False, contextlib.nullcontext),
        Variant("one-gpu-graph", "sharded_kv, graph mode", False, graphed),
        Variant("no-skip-keys", "accelerate, no skip keys", True, without_skip_keys),
        Variant("accelerate", "accelerate", True, contextlib.nullcontext),
        Variant("patch", "accelerate, issue's patch", True, with_the_issues_patch),
        Variant("by-hand", "split by hand", True, split_by_hand),
        Variant("eager", "sharded_kv", True, sharded),
        Variant("graph", "sharded_kv, graph mode", True, graphed),
    )
}


def knows_skip_keys() -> bool:
    """Whether this accelerate has `skip_keys`; without, "no-skip-keys" is the same as "accelerate"."""
    return "skip_keys" in inspect.signature(accelerate.dispatch_model).parameters


def has_graphs(quantization: str | None) -> bool:
    """Whether decode steps with such weights can be graphs."""
    return quantization is None or quantized.KINDS[quantization].has_graphs


def default_variants(devices: int, quantization: str | None = None) -> list[str]:
    """Those that run on so many devices, with this stack."""
    left_out = set() if knows_skip_keys() else {"no-skip-keys"}
    if not hasattr(transformers, "DynamicCache") or not has_graphs(quantization):
        left_out |= {name for name, variant in VARIANTS.items() if variant.applied is graphed}
    return [name for name, variant in VARIANTS.items() if name not in left_out and (devices > 1 or not variant.spread)]
