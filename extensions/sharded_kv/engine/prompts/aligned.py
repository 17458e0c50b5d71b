"""Attention of a chunk of a text to all that is before it, without a mask that has a number for each two tokens.

With such a mask the quick kernels are out of reach, and transformers copies the keys that several queries share: a
prompt in chunks would be slower than the whole (1.2 to 1.3 times, Llama-7B on H100).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import interfaces
from ..graphs.eligible import attention_of
from ..interfaces import CausalBias, causal_mask


def can_align(model: nn.Module) -> bool:
    """Whether a mask of the model may be a `CausalBias`, which keeps the quick kernels."""
    return CausalBias != () and attention_of(model) == "sdpa" and interfaces.has("mask", "sdpa")


@contextlib.contextmanager
def aligned() -> Iterator[None]:
    """Within, the mask of a chunk is a `CausalBias`, in forwards of a model that `can_align`."""
    with interfaces.replaced("mask", "sdpa", _mask), interfaces.replaced("attention", "sdpa", _attend):
        yield


def _mask(name: str, theirs: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """A mask by its alignment alone, if all tokens see all that are before them."""
    import transformers.masking_utils as masks

    new, tokens = kwargs.get("q_length"), kwargs.get("kv_length")
    is_plain_causal = (
        not args
        and kwargs.get("mask_function") is masks.causal_mask_function
        and kwargs.get("attention_mask") is None
        and kwargs.get("local_size") is None
        and kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("kv_offset")
    )
    if is_plain_causal and isinstance(new, int) and isinstance(tokens, int) and 1 < new < tokens:
        return causal_mask(new, tokens)
    return theirs(*args, **kwargs)


def _attend(
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
    """transformers' attention, which would copy keys that several queries share once for each."""
    if (
        type(attention_mask) is CausalBias
        and not args
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and not torch.is_grad_enabled()
        and _has_flash(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    ):
        # As CausalBias itself calls it, which asks anew in each layer what can be called: for lengths that differ this
        # kernel's causal masks end at the last token.
        seen = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, scale=kwargs.get("scaling")
        )[0]
        return seen.transpose(1, 2).contiguous(), None
    return theirs(module, query, key, value, attention_mask, *args, **kwargs)


@functools.lru_cache(maxsize=64)
def _has_flash(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, value_size: int
) -> bool:
    """Whether torch's flash attention takes heads of these sizes on a device, as they are."""
    if device.type != "cuda" or size % 8 or size != value_size:
        return False
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    query, key = (torch.empty(1, count, 8, size, dtype=dtype, device=device) for count in (heads, key_heads))
    return bool(can_use_flash_attention(SDPAParams(query, key, key, None, 0.0, True, heads != key_heads)))
