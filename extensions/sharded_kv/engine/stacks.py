"""What older versions of transformers need on top, each difference once and under a name of its own."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .swaps import Installed, Swap
from .transfers import first_device, is_legacy_cache


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


def tuple_cache_swaps(modules: list[nn.Module]) -> Iterator[Swap]:
    """What generation code of transformers before 4.36 needs for a cache whose layers are on several devices.

    Until caches became objects (`transformers.cache_utils`, 4.36), beam search indexed every layer's cache with a beam
    index on the first GPU (`_reorder_cache`, e.g. models/llama/modeling_llama.py:758 of 4.28.1), and so did contrastive
    search (generation/utils.py:1989).

    Args:
        modules: those whose `generate` may be called.
    """
    if not _caches_are_tuples():
        return
    for module in modules:
        for name, ours in (("_reorder_cache", _reorder_by_layer), ("contrastive_search", _search_with_moved_indices)):
            if hasattr(type(module), name):
                original = getattr(module, name)
                yield Swap(module, name, functools.update_wrapper(Installed(ours, original), original))


@functools.lru_cache(maxsize=1)
def _caches_are_tuples() -> bool:
    return importlib.util.find_spec("transformers.cache_utils") is None


def _reorder_by_layer(original: Callable[[Any, Tensor], Any], cache: Any, beam_idx: Tensor) -> Any:
    """Reorder each layer's cache by the beam index on that layer's device."""
    if not is_legacy_cache(cache):
        return original(cache, beam_idx)
    indices = {beam_idx.device: beam_idx}
    reordered: list[Any] = []
    for layer in cache:
        device = first_device(layer) or beam_idx.device
        if device not in indices:
            indices[device] = beam_idx.to(device)
        reordered.extend(original((layer,), indices[device]))
    return tuple(reordered)


def _search_with_moved_indices(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _MovedIndices():
        return original(*args, **kwargs)


class _MovedIndices(TorchFunctionMode):
    """While active, indexing a tensor with index tensors on another device moves these first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            tensor, index = args
            args = (tensor, tuple(_moved(i, tensor.device) for i in index) if isinstance(index, tuple) else index)
        return func(*args, **(kwargs or {}))


def _moved(index: Any, device: torch.device) -> Any:
    return index.to(device) if isinstance(index, Tensor) and index.device != device else index
