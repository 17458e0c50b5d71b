"""What older versions of transformers and torch need on top, each difference once and under a name of its own."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .patches import Patch, wrap_like
from .transfers import TrafficCounter, first_device


def keep_untraced(*owners: Any) -> None:
    """Have torch.compile run functions as they are; what they call it may compile.

    transformers 5 compiles the model's forward by itself where a static cache is used on a GPU. Which forward is
    running is nothing a compiled graph may assume, nor that a copy was made already.

    Args:
        owners: functions, or classes and modules for all that are written in them.
    """
    for owner in owners:
        for function in [owner] if inspect.isfunction(owner) else filter(inspect.isfunction, vars(owner).values()):
            function._torchdynamo_disable = True  # type: ignore[attr-defined]
            # Not imported for this: it takes seconds, and whoever compiles has imported it.
            if "torch._dynamo" in sys.modules:
                torch._dynamo.decorators.skip(function)


@functools.lru_cache(maxsize=1)
def has_cache_objects() -> bool:
    """Whether transformers is there and keeps caches in objects, as since 4.36, that it also gives to most models."""
    return find_spec("transformers") is not None and find_spec("transformers.cache_utils") is not None


class _NoCache:
    """What KVCache is where caches are tuples: nothing is one, or is replaced by one."""

    @staticmethod
    def can_replace(cache: Any) -> bool:
        return False


@functools.lru_cache(maxsize=1)
def own_cache_class() -> Any:
    """KVCache; where caches are tuples, a class of which nothing is."""
    if not has_cache_objects():
        return _NoCache
    from .kv.cache import KVCache

    return KVCache


def is_own_cache(cache: Any) -> bool:
    """Whether it is a KVCache."""
    return isinstance(cache, own_cache_class())


def cache_preparing_method(of: type) -> str:
    """The method of a model by which generate() makes its cache, or is first given what it has made; "" without one.

    Before transformers 4.45 generate() makes the cache in its midst, and then has the model find its first position.
    """
    names = ("_prepare_cache_for_generation", "_get_initial_cache_position")
    return next((name for name in names if has_cache_objects() and hasattr(of, name)), "")


def mask_growing_method(module: nn.Module) -> str:
    """The method of a model by which generate() puts a one behind its attention mask; "" where it is not transformers'
    own, which does nothing else to it.
    """
    name, home = "_update_model_kwargs_for_generation", "transformers.generation.utils"
    own = getattr(getattr(sys.modules.get(home), "GenerationMixin", None), name, None)
    is_own = getattr(type(module), name, None) is own is not None and name not in vars(module)
    return name if has_cache_objects() and is_own and own.__module__ == home else ""


def empty_dynamic_cache(model: nn.Module) -> Any:
    """A DynamicCache as generate() would make it for the model; since transformers 4.56 its config says of which kinds
    its layers are.
    """
    from transformers import DynamicCache

    config: Any = getattr(model, "config", None)
    if config is None or "config" not in inspect.signature(DynamicCache.__init__).parameters:
        return DynamicCache()
    return DynamicCache(config=config.get_text_config(decoder=True))


def layers_that_stay(cache: Any) -> list[Any]:
    """Of a DynamicCache the layers that a KVCache does not replace by its own; none of another cache."""
    if type(cache).__name__ != "DynamicCache":
        return []
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
    return [layer for layer in getattr(cache, "layers", ()) if type(layer).__name__ not in plain]


_is_dynamic: dict[type, bool] = {}  # of each type of cache, whether it is a KVCache or a DynamicCache


def cache_length(cache: Any) -> int | None:
    """How many tokens a cache holds; None where that is not known without waiting for a GPU, or does not matter."""
    kind = type(cache)
    if kind not in _is_dynamic:
        dynamic = getattr(sys.modules.get("transformers.cache_utils"), "DynamicCache", None)
        _is_dynamic[kind] = kind is dynamic or issubclass(kind, own_cache_class())
    if _is_dynamic[kind]:
        try:
            return int(cache.get_seq_length())
        except ValueError:  # recurrent layers alone count no tokens
            return None if any(map(_has_states, cache.layers)) else 0
    inner = getattr(cache, "self_attention_cache", None)  # of an encoder-decoder
    return None if inner is None else cache_length(inner)


def _has_states(layer: Any) -> bool:
    """Whether a layer of a cache has recurrent states; one that keeps nothing has none."""
    of_a_kind = (getattr(layer, f"is_{kind}_states_initialized", {}) for kind in ("conv", "recurrent"))
    return any(any(each.values()) for each in of_a_kind)


def truncate_cache(cache: Any, length: int | None) -> bool:
    """Take back what a step has written to a cache that held `length` tokens before it.

    Returns:
        Whether the cache is now as before; False for kinds that cannot go back.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # what is kept of the encoder stays right
    if cache is None or isinstance(cache, (tuple, list)):  # a step makes new tuples
        return True
    if length is None:
        return False
    try:
        if is_own_cache(cache):
            cache.truncate(length)
        else:
            _truncate_dynamic(cache, length)
    except ValueError:
        return False
    return True


def _truncate_dynamic(cache: Any, length: int) -> None:
    """The same for transformers' own. A step makes new tensors there, that begin with the old."""
    if not hasattr(cache, "layers"):
        cache._seen_tokens = length
        for tensors in (cache.key_cache, cache.value_cache):
            tensors[:] = [tensor[:, :, :length] for tensor in tensors] if length else []
        return
    for layer in cache.layers:
        is_recurrent = not hasattr(layer, "keys")
        if not is_recurrent and layer.keys is None:
            continue
        if is_recurrent or (type(layer).__name__ != "DynamicLayer" and length):
            raise ValueError(f"A {type(layer).__name__} cannot go back.")
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length


def _takes_device_type() -> bool:
    try:
        torch.is_autocast_enabled("cpu")
    except TypeError:
        return False
    return True


# Whether autocast is on for a kind of device. Before torch 2.4 one asks without naming it.
is_autocast_on: Callable[[str], bool] = (
    torch.is_autocast_enabled if _takes_device_type() else lambda device_type: torch.is_autocast_enabled()
)


def tuple_cache_patches(modules: Iterable[nn.Module], counter: TrafficCounter) -> Iterator[Patch]:
    """What generation code of transformers before 4.36 needs for a cache whose layers are on several devices.

    Until caches became objects (`transformers.cache_utils`, 4.36), beam search indexed every layer's cache with a beam
    index on the first GPU (`_reorder_cache`, e.g. models/llama/modeling_llama.py:758 of 4.28.1), and so did contrastive
    search (generation/utils.py:1989). A reply that began with sharding on still has such a cache after it was switched
    off: so this stays for good. A cache that is on one device is met without a move.

    Args:
        modules: those whose `generate` may be called.
        counter: counts the indices that cross.
    """
    if has_cache_objects():
        return
    for module in modules:
        for name, ours in (("_reorder_cache", _reorder_by_layer), ("contrastive_search", _search_with_moved_indices)):
            if hasattr(type(module), name):
                original = getattr(module, name)
                yield Patch(module, name, wrap_like(ours, counter, original, like=original))


def is_tuple_cache(value: Any) -> bool:
    """Whether `value` is a cache as it was before transformers 4.36: for each layer a tuple of tensors."""
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(isinstance(layer, (tuple, list)) and bool(layer) for layer in value)
        and any(isinstance(item, Tensor) for layer in value for item in layer)
    )


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
