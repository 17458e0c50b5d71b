"""Which steps may be graphs, and for the others why not: every such sentence is here.

A step is eligible if it is one new token of a reply on a KVCache, or a few at once, and asks for nothing that a replay
would not give.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat, devices, text
from ..placement import CACHE_NAMES, Placement, cache_name
from ..transfers import is_plain
from .attention import can_replace
from .trace import CannotCapture

_ATTENTION = ("sdpa", "eager")  # these take any mask that is added to the scores
# Of a step: what prompt lookup and assisted generation have verified at once.
MOST_TOKENS = 32


class NotEligible(Exception):
    """This step runs without graphs. The message is one sentence for people; "" for a prompt, which never has them."""


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """A decode step, as the model is called for it.

    Attributes:
        model: what was called.
        cache: the reply's KVCache.
        cache_name: the name of the argument that it is.
        length: how many tokens it holds; 0 if its layers are recurrent alone.
        tokens: how many are new.
        mask: [batch, length + tokens], which of them count, or None for all.
        tensors: the other arguments that are tensors, on the main device.
        plain: the other arguments.
        graph_key: what two steps have in common that share a graph.
        given: what the model was called with, all of it.
        positions_are_ours: `tensors` has positions that the caller has left to the model.
    """

    model: nn.Module
    cache: Any
    cache_name: str
    length: int
    tokens: int
    mask: Tensor | None
    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    graph_key: Any
    given: dict[str, Any]
    positions_are_ours: bool


class Rules:
    """What a model's steps must be like.

    Args:
        model: the module whose forward a step is.
        placement: where its parts are.
    """

    def __init__(self, model: nn.Module, placement: Placement) -> None:
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._main_device = placement.main_device
        self._against_placement = _against_placement(placement)

    def against_model(self, model: nn.Module) -> str:
        """Why no step of the model is eligible as it is now; "" if one may be. Asked once for each reply."""
        if self._against_placement:
            return self._against_placement
        if getattr(model, "is_loaded_in_8bit", False):
            return "Its 8-bit weights (bitsandbytes) have the host wait in every layer, which no graph can."
        attention = attention_of(model)
        if attention not in _ATTENTION and not can_replace(attention):
            return f"Its attention is {attention}: graph mode needs sdpa or eager attention."
        if "chunked_attention" in (getattr(_of_text(getattr(model, "config", None)), "layer_types", None) or ()):
            return "Its layers attend to chunks of the text, which graph mode does not know."
        return ""

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecodeStep:
        """A call of the model as a decode step.

        Raises:
            NotEligible: it is none.
        """
        named = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        of_cache = cache_name(named)
        cache: Any = named.get(of_cache)
        ids: Any = named.get("input_ids")
        mask = named.get("attention_mask")
        if not any(name in self._names for name in CACHE_NAMES):
            raise NotEligible(_NO_CACHE)
        if named.get("use_cache") is False:
            raise NotEligible("The model was called without using its cache.")
        if cache is None or compat.cache_length(cache) == 0:
            raise NotEligible  # a prompt
        if reason := _against_call(model, named, cache, ids, self._main_device):
            raise NotEligible(reason)
        length, (batch, tokens) = cache.length, ids.shape
        if tokens > 1 and cache.states():
            raise NotEligible(f"{tokens} tokens came at once, which recurrent layers read in another way than one.")
        usual = (batch, length + tokens) if length else None  # without a length, nobody can tell
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != usual):
            raise NotEligible("Its attention mask is not the usual one, of a number for each token.")
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, value in named.items():
            if name in (of_cache, "attention_mask"):
                continue
            if isinstance(value, Tensor):
                if value.device != self._main_device:
                    raise NotEligible(f"{name} is on {value.device}, the model begins on {self._main_device}.")
                tensors[name] = value
            elif value is None or isinstance(value, (bool, int)) or is_plain(value):
                plain[name] = value
            else:
                raise NotEligible(f"The model was called with {name}, a {type(value).__name__}.")
        # What the model would make of Python's numbers, which differ from step to step, it gets as tensors.
        are_ours = False
        for name, shape in (("position_ids", (batch, tokens)), ("cache_position", (tokens,))):
            if name in self._names and name not in tensors:
                plain.pop(name, None)
                are_ours = True
                tensors[name] = torch.arange(length, length + tokens, device=ids.device).expand(shape)
        shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items())]
        settings = [(name, repr(value)) for name, value in sorted(plain.items())]
        graph_key = (are_ours, mask is None, *shapes, *settings)
        return DecodeStep(model, cache, of_cache, length, tokens, mask, tensors, plain, graph_key, named, are_ours)


def _against_call(
    model: nn.Module, named: dict[str, Any], cache: Any, ids: Any, main_device: torch.device | None
) -> str:
    """Why a call with a cache that holds something is no step for graphs; "" if it may be one."""
    if isinstance(cache, (tuple, list)):
        return "This version of transformers keeps this model's cache in tuples: graph mode needs a newer one."
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return "The model was called with something else than token ids."
    if ids.shape[1] > MOST_TOKENS:
        return f"{ids.shape[1]} tokens came at once."
    if ids.device != main_device:
        return f"The token ids are on {ids.device}, the model begins on {main_device}."
    if torch.is_grad_enabled() or model.training:
        return "Gradients are wanted, or the model is in training mode."
    if compat.is_autocast_on(ids.device.type):
        return "The model was called under autocast."
    config = getattr(model, "config", None)
    for name in ("output_attentions", "output_hidden_states"):
        if named.get(name, getattr(config, name, False)):
            return f"{name} was asked for."
    if not hasattr(cache, "get_seq_length"):
        return _NO_CACHE
    if not compat.is_own_cache(cache):
        unknown = compat.layers_that_stay(cache)
        if unknown:
            return _unknown(unknown[0])
        return (
            f"The cache is a {type(cache).__name__}: the caller's own, of the second pass of guidance, or of a reply "
            "that began without sharding. For loops of one's own, sharding.new_cache() makes one that graphs serve."
        )
    return ""


def attention_of(model: nn.Module) -> Any:
    """The name of its attention, as transformers has it."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def against_cache(cache: Any) -> str:
    """Why tokens cannot be written to a cache in a graph; "" if they can."""
    if others := cache.other_layers:
        return _unknown(others[0])
    if any(layer.buffers is None for layer in cache.own_layers) or not cache.has_all_states:
        return "The cache is empty in some layers."
    return against_layers(cache)


def against_layers(cache: Any) -> str:
    """The same for what may change from step to step."""
    if any(vars(layer).get("record_past") for layer in cache.layers):
        return "The cache records what it drops from its sliding window."
    return ""


def _unknown(layer: Any) -> str:
    return f"A layer's cache is a {type(layer).__name__}, which graph mode does not know."


def past_window(window: int) -> str:
    """The reply is longer than a window."""
    return f"The reply is longer than the model's sliding window of {window} tokens."


_NO_CACHE = "This model keeps no keys and values of the tokens before, to which graphs would add."
SELDOM = "Several tokens came at once (prompt lookup, assisted generation), so many for the first or second time."
NO_ROOM = "There is no room for a static cache and its graphs beside what is in memory."
UNEVEN = "The layers of its cache hold different numbers of tokens."
NOTHING_GENERATES = "The model has no generate() of transformers' kind, so it has no decode steps."
GENERATES_HOOKED = "Somebody's hook is on the model beside accelerate's: it runs as accelerate has it."


def not_captured(error: Exception) -> str:
    """A capture has failed."""
    if isinstance(error, CannotCapture):
        return str(error)
    words = text.of_error(error)
    words = words.partition(" CUDA kernel errors might be")[0]  # and advice for debugging
    return f"The step could not be captured: {words}"


def failed(error: Exception) -> str:
    """Something of ours has failed."""
    return f"Graph mode has failed, and is off for this reply: {text.of_error(error)}"


def _against_placement(placement: Placement) -> str:
    for block in placement.blocks:
        if block.keeps_hooks:
            return f"{block.name or 'The model'} keeps hooks: weights are offloaded, or somebody else's hook is there."
    for device in placement.devices:
        if not hasattr(devices.runtime(device) if device.type != "cpu" else None, "CUDAGraph"):
            return f"Graphs need CUDA GPUs, and part of the model is on {device}."
    return ""


def window(cache: Any, model: nn.Module) -> int | None:
    """How many tokens a reply may have where layers that keep all tokens do not attend to all; None for any number.

    Which of them they attend to, the model's own mask says then, and ours does not. Layers that keep a window only are
    masked by what they keep.
    """
    config = _of_text(getattr(model, "config", None))
    names = ["window_size"] if "sliding_attention" in cache.kinds() else ["window_size", "sliding_window"]
    sizes = [getattr(config, name, None) for name in names]
    return min((size for size in sizes if type(size) is int and size > 0), default=None)


def _of_text(config: Any) -> Any:
    """What a config says of the part that reads and writes text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
