"""Attention of one new token over a cache's buffers, of which only a part is filled: each way that a GPU has to do it,
and which of them is quickest there.

transformers hands a step's attention to the function that is registered under its name. While a step is traced or
captured, ours is registered in the place of sdpa's. It takes what it is right for, and hands on the rest.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import interfaces, text
from .capture import free_generator, without_collections
from .trace import CannotCapture

logger = logging.getLogger(__name__)

Way = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

_SDPA = "sdpa"
_KNOWS_GROUPS = "enable_gqa" in (functional.scaled_dot_product_attention.__doc__ or "")  # since torch 2.5
# What transformers' own function is given beside tensors; anything else that it may come to know is handed on.
_KNOWN = frozenset({"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"})
# How far a way may be from float32's result, relative to the largest number, beyond what torch's own way is.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_CALLS_IN_A_GRAPH = 4
_REPLAYS = 9
_PIECE = 512


# --- the ways -------------------------------------------------------------------------------------------------------


def _grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """torch's attention, which knows that queries share keys. Quick where torch has cuDNN's kernel for it (Hopper)."""
    is_grouped = {"enable_gqa": True} if query.shape[1] != keys.shape[1] else {}
    seen = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, **is_grouped)
    return seen.transpose(1, 2)


def as_rows(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """torch's attention, to which the queries that share keys are a text of so many tokens."""
    batch, heads, _, size = query.shape
    rows = query.reshape(batch, keys.shape[1], heads // keys.shape[1], size)
    seen = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return seen.reshape(batch, 1, heads, size)


def _in_pieces(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same for pieces of the text as if they were a batch, merged by their sums: no stock kernel but cuDNN's splits
    the keys of one query.
    """
    (_, heads, _, size), (_, key_heads, width, _) = query.shape, keys.shape
    group, count = heads // key_heads, width // _PIECE
    rows = query.reshape(1, key_heads, group, size).expand(count, -1, -1, -1)
    pieces = [each.reshape(key_heads, count, _PIECE, size).transpose(0, 1) for each in (keys, values)]
    masks = mask.reshape(count, 1, 1, _PIECE).expand(count, key_heads, group, _PIECE)
    seen: Tensor
    seen, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(rows, *pieces, masks, True, scale=scale)
    shares = torch.softmax(sums[:, :, :group], 0).unsqueeze(-1)
    return (seen * shares).sum(0).to(query.dtype).reshape(1, 1, heads, size)


def ways_for(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Mapping[str, Way]:
    """By name those that may be right for these tensors."""
    ways: dict[str, Way] = {"rows": as_rows, "grouped": _grouped}
    if keys.shape[0] == 1 and keys.shape[2] % _PIECE == 0:
        ways["pieces"] = _in_pieces
    kernel = _kernel()
    if kernel is not None and kernel.takes(query, keys, values, mask):
        ways[_SPLIT] = kernel.attend
    return ways


@functools.lru_cache(maxsize=1)
def _kernel() -> Any:
    """The module of our Triton kernel; None where Triton cannot be had."""
    try:
        from . import split_keys
    except Exception as error:  # it is not there, or broken
        logger.info("There is no Triton for attention: %s", text.one_line(text.of_error(error))[:200])
        return None
    return split_keys


# --- which of them --------------------------------------------------------------------------------------------------

_by_speed: dict[Any, list[str]] = {}  # names of ways, the quickest first
# What is quickest once stays so for more tokens: it only has more to split. To time all ways takes half a second.
_SPLIT = "split keys"
_choosing = threading.Lock()


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The operator: the quickest way for such tensors, found out the first time."""
    if query.device.type != "cuda":
        return _grouped(query, keys, values, mask, scale).contiguous()
    with torch.cuda.device(query.device):  # where Triton launches
        return quickest(query, keys, values, mask, scale)(query, keys, values, mask, scale).contiguous()


def quickest(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Way:
    """The quickest way that is right for these tensors; torch's own where that could not be found out yet."""
    ways = ways_for(query, keys, values, mask)
    size = keys.shape[2].bit_length()  # what is quickest for some tokens is so for a few more
    alike = (torch.cuda.get_device_name(query.device), query.dtype, *query.shape, keys.shape[1])
    kind = (*alike, size)
    with _choosing:
        if _SPLIT in ways and any(_by_speed.get((*alike, each), [])[:1] == [_SPLIT] for each in range(size + 1)):
            return ways[_SPLIT]
        if not _by_speed.get(kind) and not torch.cuda.is_current_stream_capturing():  # else nothing can be measured
            with contextlib.suppress(torch.cuda.OutOfMemoryError):  # to be found out another time
                _by_speed[kind] = _ordered(ways, query, keys, values, mask, scale)
        return next((ways[name] for name in _by_speed.get(kind, ()) if name in ways), as_rows)


def _ordered(
    ways: Mapping[str, Way], query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> list[str]:
    """The names of the ways that are right, the quickest first."""
    group = query.shape[1] // keys.shape[1]
    first = (query[:, :group].float(), keys[:, :1].float(), values[:, :1].float(), mask.float(), scale)
    right = as_rows(*first)  # of the first heads: of all it would take much memory
    tolerance = _TOLERANCES[query.dtype] + 2 * difference(
        as_rows(query, keys, values, mask, scale)[:, :, :group], right
    )
    took: dict[str, float] = {}
    for name, way in ways.items():
        run = functools.partial(way, query, keys, values, mask, scale)
        try:
            if difference(run()[:, :, :group], right) <= tolerance:
                took[name] = measure(run, query.device)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # it is not for this GPU, or not for these shapes
            free_generator(query.device)  # it may have failed in a capture
            logger.info("Attention by %s cannot be had: %s", name, text.one_line(text.of_error(error))[:200])
    names = sorted(took, key=lambda name: took[name])
    times = ", ".join(f"{name} {1000 * took[name]:.0f} us" for name in names)
    logger.info("Attention over %d tokens in graphs on %s: %s.", keys.shape[2], query.device, times)
    return names


def difference(ours: Tensor, right: Tensor) -> float:
    """How far apart they are, relative to the largest number."""
    return float((ours.float() - right).abs().max() / right.abs().max().clamp_min(1e-30))


def measure(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that one call takes in a CUDA graph on a device, where it costs the host nothing."""
    runtime: Any = torch.cuda
    with runtime.device(device):
        stream = runtime.Stream(device)
        stream.wait_stream(runtime.current_stream(device))
        with runtime.stream(stream):
            run()
            graph = runtime.CUDAGraph()
            with without_collections():  # torch.cuda.graph() makes one each time, and waits for the GPU
                graph.capture_begin(capture_error_mode="thread_local")
                for _ in range(_CALLS_IN_A_GRAPH):
                    run()
                graph.capture_end()
        took: list[float] = []
        for _ in range(_REPLAYS):
            begin, end = (runtime.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            took.append(begin.elapsed_time(end) / _CALLS_IN_A_GRAPH)
        graph.reset()
    return statistics.median(took)


# One operator for all ways: who sees operators, as a trace does, sees it and not what it consists of.
_library: Any = torch.library.Library("sharded_kv", "FRAGMENT")  # type: ignore[no-untyped-call]
if not hasattr(torch.ops.sharded_kv, "attend"):
    _library.define("attend(Tensor query, Tensor keys, Tensor values, Tensor mask, float scale) -> Tensor")
    _library.impl("attend", _attend, "CompositeExplicitAutograd")


# --- in the place of transformers' ----------------------------------------------------------------------------------


def can_replace(name: Any) -> bool:
    """Whether ours can take the place of a model's attention of this name over buffers."""
    return _KNOWS_GROUPS and interfaces.has("attention", name)


def over_buffers(name: str) -> contextlib.AbstractContextManager[None]:
    """Within, the attention of this thread's forwards is ours, where it is transformers' attention of this name.

    Args:
        name: of the model's attention. One that takes no mask as ours has, such as flash attention, has sdpa's in its
            place where ours does not do.
    """
    return interfaces.replaced("attention", name, _instead_of) if can_replace(name) else contextlib.nullcontext()


def _instead_of(
    name: str,
    theirs: Callable[..., Any],
    /,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' attention: by our operator if it is of one token and a mask."""
    if name != _SDPA:
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise CannotCapture(f"Its attention is {name}, with soft caps or sinks: graph mode needs sdpa or eager.")
        theirs = interfaces.table("attention")()[_SDPA]
    if not args and _is_ours(theirs, module, query, key, value, attention_mask, kwargs):
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.sharded_kv.attend(query, key, value, attention_mask, scale), None
    return theirs(module, query, key, value, attention_mask, *args, **kwargs)


def _is_ours(
    theirs: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> bool:
    """Whether our operator gives the same."""
    others = [name for name in kwargs if kwargs[name] is not None and name not in _KNOWN and name in _named(theirs)]
    return (
        not others
        and kwargs.get("softcap") is None
        and not kwargs.get("dropout")
        and isinstance(mask, Tensor)
        and mask.is_floating_point()
        and query.dtype in _TOLERANCES
        and mask.dim() == query.dim() == key.dim() == 4
        and mask.shape[1:] == (1, 1, key.shape[2])
        and mask.shape[0] in (1, query.shape[0])
        and query.shape[2] == 1
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[1] == key.shape[1] * getattr(module, "num_key_value_groups", 1)
    )


@functools.lru_cache(maxsize=16)
def _named(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
