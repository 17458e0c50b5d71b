"""What older versions of transformers and torch need on top, each difference once and under a name of its own."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .swaps import Swap, installed
from .transfers import TrafficCounter, first_device


def keep_untraced(*functions: Callable[..., Any]) -> None:
    """Have torch.compile run `functions` as they are; what they call it may compile.

    transformers 5 compiles the model's forward by itself where a static cache is used on a GPU. Which forward is
    running is nothing a compiled graph may assume, nor that a copy was made already.
    """
    for function in functions:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        # Not imported for this: it takes seconds, and whoever compiles has imported it.
        if "torch._dynamo" in sys.modules:
            torch._dynamo.decorators.skip(function)


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a kind of device. Before torch 2.4 one asks without naming it."""
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:
        return torch.is_autocast_enabled()


def tuple_cache_swaps(modules: Iterable[nn.Module], counter: TrafficCounter) -> Iterator[Swap]:
    """What generation code of transformers before 4.36 needs for a cache whose layers are on several devices.

    Until caches became objects (`transformers.cache_utils`, 4.36), beam search indexed every layer's cache with a beam
    index on the first GPU (`_reorder_cache`, e.g. models/llama/modeling_llama.py:758 of 4.28.1), and so did contrastive
    search (generation/utils.py:1989). A reply that began with sharding on still has such a cache after it was switched
    off: so this stays for good. A cache that is on one device is met without a move.

    Args:
        modules: those whose `generate` may be called.
        counter: counts the indices that cross.
    """
    if not _caches_are_tuples():
        return
    for module in modules:
        for name, ours in (("_reorder_cache", _reorder_by_layer), ("contrastive_search", _search_with_moved_indices)):
            if hasattr(type(module), name):
                original = getattr(module, name)
                yield Swap(module, name, installed(ours, counter, original, like=original))


def is_tuple_cache(value: Any) -> bool:
    """Whether `value` is a cache as it was before transformers 4.36: for each layer a tuple of tensors."""
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(isinstance(layer, (tuple, list)) and bool(layer) for layer in value)
        and any(isinstance(item, Tensor) for layer in value for item in layer)
    )


@functools.lru_cache(maxsize=1)
def _caches_are_tuples() -> bool:
    return importlib.util.find_spec("transformers.cache_utils") is None


def _reorder_by_layer(
    counter: TrafficCounter, original: Callable[[Any, Tensor], Any], past_key_values: Any, beam_idx: Tensor
) -> Any:
    """Reorder each layer's cache by the beam index on that layer's device."""
    if not is_tuple_cache(past_key_values):
        return original(past_key_values, beam_idx)
    indices = {beam_idx.device: beam_idx}
    reordered: list[Any] = []
    for layer in past_key_values:
        device = first_device(layer) or beam_idx.device
        if device not in indices:
            indices[device] = _moved(beam_idx, device, counter)
        reordered.extend(original((layer,), indices[device]))
    return tuple(reordered)


def _search_with_moved_indices(counter: TrafficCounter, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _MovedIndices(counter):
        return original(*args, **kwargs)


class _MovedIndices(TorchFunctionMode):
    """While active, `tensor[a, b]` moves index tensors that are on another device to the tensor's first."""

    def __init__(self, counter: TrafficCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            tensor, index = args
            args = (tensor, tuple(_moved(item, tensor.device, self._counter) for item in index))
        return func(*args, **(kwargs or {}))


def _moved(index: Any, device: torch.device, counter: TrafficCounter) -> Any:
    if not isinstance(index, Tensor) or index.device == device:
        return index
    counter.add(index.device, device, index.numel() * index.element_size())
    return index.to(device)
