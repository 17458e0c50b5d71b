"""The cache of a reply in static buffers: where captured graphs find it, and where the model's own code does.

A cache of transformers grows by concatenation: at each step its tensors lie elsewhere. For graphs, each layer's keys
and values move into buffers with room for tokens to come, on the same device. The reply goes on with the same cache
object, which shows what of the buffers is filled. So any step may run without a graph; what it concatenates is the
cache's own again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Buffers:
    """Room for the keys and values of one cache at a time.

    Args:
        cache: gives the shapes, types and devices.
        capacity: how many tokens fit.

    Attributes:
        capacity: as above.
        length: how many tokens they hold.
        is_whole: all of the cache that was taken in is still here: nobody has given it tensors of its own.
        layers: of each layer the keys and values, [batch, heads, capacity, head size]; made by the first `take()`.
    """

    def __init__(self, cache: Any, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.is_whole = False
        self.is_stepping = False
        self.layers: list[Pair] = []
        self._kinds = [_kinds(pair) for pair in pairs(cache)]
        self._positions: dict[torch.device, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.numel() * tensor.element_size() for pair in self.layers for tensor in pair)

    def suit(self, cache: Any) -> bool:
        """Whether they have the shapes, types and devices of `cache`, but for the number of tokens."""
        return [_kinds(pair) for pair in pairs(cache)] == self._kinds

    def take(self, cache: Any) -> None:
        """Move a cache in, layer by layer: no more than one layer is there twice.

        Raises:
            torch.OutOfMemoryError: there is no room; the cache is as it was.
        """
        self.length = cache.get_seq_length()
        lender = _lender(cache)
        assert lender is not None
        try:
            for index in range(len(self._kinds)):
                pair = lender.pair(cache, index)
                if index == len(self.layers):
                    self.layers.append(self._room_for(pair))
                for buffer, own in zip(self.layers[index], pair, strict=True):
                    buffer[:, :, : self.length].copy_(own)
                    buffer[:, :, self.length :].zero_()  # a masked token counts 0 times its value, and 0 * NaN is NaN
                del own, pair
                lender.lend(cache, index, self)
        except BaseException:
            while self.layers:
                lender.take_back(cache, len(self.layers) - 1)
                self.layers.pop()
            raise
        self.is_whole = True

    def _room_for(self, pair: Pair) -> Pair:
        device = pair[0].device
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            if device not in self._positions:
                self._positions[device] = torch.zeros(1, dtype=torch.int64, device=device)
            keys, values = (t.new_empty((*t.shape[:2], self.capacity, t.shape[3])) for t in pair)
        return keys, values

    def give_back(self, cache: Any) -> None:
        """Leave the cache tensors of its own, as if it had never been here."""
        lender = _lender(cache)
        assert lender is not None
        for index in range(len(self.layers)):
            lender.take_back(cache, index)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within, the cache writes one token behind its last into the buffers, and shows the model all of them."""
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False

    def point(self) -> None:
        """Say on each device where the next token is to be written."""
        for position in self._positions.values():
            position.fill_(self.length)

    def write(self, index: int, keys: Tensor, values: Tensor) -> Pair:
        """Write one token of a layer, [batch, heads, 1, head size]. Returns all of the layer's buffers."""
        position = self._positions[keys.device]
        for buffer, new in zip(self.layers[index], (keys, values), strict=True):
            buffer.index_copy_(2, position, new)
        return self.layers[index]

    def filled(self, index: int, which: int) -> Tensor:
        """A copy of what of a layer's keys (0) or values (1) holds tokens: the buffers are the next reply's, too."""
        return self.layers[index][which][:, :, : self.length].clone()


def reason_against(cache: Any) -> str:
    """One sentence on why a cache cannot be moved into buffers; "" if it can."""
    if isinstance(cache, (tuple, list)):
        return "This version of transformers keeps this model's cache in tuples: graph mode needs a newer one."
    lender = _lender(cache)
    if lender is None:
        return f"The cache is a {type(cache).__name__}, not the usual DynamicCache."
    return lender.reason_against(cache)


def pairs(cache: Any) -> Iterator[Pair]:
    """The keys and values of each layer, [batch, heads, tokens, head size]; of a lent one they are copies."""
    lender = _lender(cache)
    assert lender is not None
    return (lender.pair(cache, index) for index in range(len(cache)))


def is_empty(cache: Any) -> bool:
    """Whether it is there and holds nothing yet: then the tokens that come are a prompt."""
    return _lender(cache) is not None and cache.get_seq_length() == 0


def buffers_of(value: Any) -> Buffers | None:
    """The buffers that a cache, or a layer of it, has its tensors in."""
    lent = getattr(value, "__dict__", {}).get("_lent")
    return None if lent is None else lent[0]


def longest(cache: Any) -> int | None:
    """How many tokens it may hold and still keep them all: the size of its smallest sliding window; None without."""
    windows = [layer.sliding_window for layer in getattr(cache, "layers", ()) if getattr(layer, "is_sliding", False)]
    return min(windows, default=None)


def _kinds(pair: Pair) -> list[Any]:
    """What must be the same of two pairs for one to go where the other was."""
    return [(*tensor.shape[:2], tensor.shape[3], tensor.dtype, tensor.device) for tensor in pair]


# --- two generations of caches ----------------------------------------------------------------------------------------


def _lender(cache: Any) -> _Layered | _Listed | None:
    """What lends the tensors of such a cache, layer by layer; None if nothing does."""
    utils = sys.modules.get("transformers.cache_utils")
    dynamic = getattr(utils, "DynamicCache", None)
    if hasattr(cache, "layers"):
        return _layered() if type(cache) is dynamic else None
    return _listed() if dynamic is not None and type(cache) in (dynamic, _listed().lent_class) else None


@functools.lru_cache(maxsize=1)
def _layered() -> _Layered:
    return _Layered()


@functools.lru_cache(maxsize=1)
def _listed() -> _Listed:
    return _Listed()


class _Own:
    """An attribute of a lent cache or layer: what the buffers say until somebody sets it."""

    def __init__(self, name: str, of_buffers: Any) -> None:
        self._name = name
        self._of_buffers = of_buffers

    def __get__(self, lent: Any, owner: type) -> Any:
        own = vars(lent)
        buffers = own.get("_lent")  # before the question: another thread may give the cache back meanwhile
        return own[self._name] if self._name in own else self._of_buffers(lent, *buffers)

    def __set__(self, lent: Any, value: Any) -> None:
        vars(lent)[self._name] = value
        lent._lent[0].is_whole = False


class _Layered:
    """Since transformers 4.54 a cache is a list of layers, each with its own class (cache_utils.py of 5.17)."""

    def __init__(self) -> None:
        utils = sys.modules["transformers.cache_utils"]
        plain = (getattr(utils, name, None) for name in ("DynamicLayer", "DynamicSlidingWindowLayer"))
        self._lent_classes: dict[type, type] = {of: _lent_layer(of) for of in plain if of is not None}
        self._plain_classes = {lent: plain for plain, lent in self._lent_classes.items()}

    def reason_against(self, cache: Any) -> str:
        if getattr(cache, "offloading", False):
            return "The cache is offloaded to the CPU."
        for layer in cache.layers:
            if type(layer) not in self._lent_classes and type(layer) not in self._plain_classes:
                return f"A layer's cache is a {type(layer).__name__}, which graph mode does not know."
            if not (layer.is_initialized if hasattr(layer, "is_initialized") else layer.keys is not None):
                return "The cache is empty in some layers."
            if getattr(layer, "record_past", False):
                return "The cache records what it drops from its sliding window."
        return ""

    def pair(self, cache: Any, index: int) -> Pair:
        layer = cache.layers[index]
        return layer.keys, layer.values

    def lend(self, cache: Any, index: int, buffers: Buffers) -> None:
        layer = cache.layers[index]
        for name in ("keys", "values", "cumulative_length"):
            vars(layer).pop(name, None)
        layer.__class__ = self._lent_classes.get(type(layer), type(layer))
        layer._lent = (buffers, index)

    def take_back(self, cache: Any, index: int) -> None:
        layer = cache.layers[index]
        if type(layer) not in self._plain_classes:
            return
        # In an order in which another thread may read the layer meanwhile.
        layer.keys, layer.values = layer.keys, layer.values
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length = layer.cumulative_length
        layer.__class__ = self._plain_classes[type(layer)]
        del layer._lent


def _lent_layer(plain: Any) -> Any:
    """The class of layers whose tensors are in buffers. An object may change between it and `plain`.

    Another thread may give the layer back while one of these functions runs: then it has left this class, of whose
    functions and super() it knows nothing any more.
    """

    def seen(layer: Any, filled: Tensor) -> Tensor:
        """What a layer keeps for the next token: of a sliding window, all but its oldest."""
        return filled[:, :, -layer.sliding_window + 1 :] if getattr(plain, "is_sliding", False) else filled

    class LentLayer(plain):  # type: ignore[misc]
        __module__ = plain.__module__  # whoever looks for caches of transformers finds it
        _lent: tuple[Buffers, int]
        keys = _Own("keys", lambda layer, buffers, index: seen(layer, buffers.filled(index, 0)))
        values = _Own("values", lambda layer, buffers, index: seen(layer, buffers.filled(index, 1)))
        if getattr(plain, "is_sliding", False):
            cumulative_length = _Own("cumulative_length", lambda layer, buffers, index: buffers.length)

        def get_seq_length(self, *args: Any) -> int:
            own: Any = vars(self)
            lent = own.get("_lent")  # before the question: another thread may give the layer back meanwhile
            length: int = plain.get_seq_length(self, *args) if "keys" in own or lent is None else lent[0].length
            return length

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            buffers, index = self._lent
            if buffers.is_stepping:
                return buffers.write(index, key_states, value_states)
            return plain.update(self, key_states, value_states, *args, **kwargs)

        def reset(self) -> None:
            self.keys, self.values = self.keys, self.values  # it writes zeros into them
            super().reset()

    return LentLayer


class _Listed:
    """Up to transformers 4.53 a cache holds a list of keys and a list of values (cache_utils.py of 4.44)."""

    def __init__(self) -> None:
        self._plain_class: Any = sys.modules["transformers.cache_utils"].DynamicCache
        self.lent_class = _lent_cache(self._plain_class)

    def reason_against(self, cache: Any) -> str:
        return "" if len(cache) and len(cache.key_cache) == len(cache.value_cache) else "The cache is empty."

    def pair(self, cache: Any, index: int) -> Pair:
        return cache.key_cache[index], cache.value_cache[index]

    def lend(self, cache: Any, index: int, buffers: Buffers) -> None:
        vars(cache).pop("_seen_tokens", None)
        if type(cache) is self._plain_class:
            cache.__class__ = self.lent_class
            cache.key_cache = _LentList(cache.key_cache)
            cache.value_cache = _LentList(cache.value_cache)
        cache._lent = (buffers,)
        cache.key_cache.lend(index, buffers, 0)
        cache.value_cache.lend(index, buffers, 1)

    def take_back(self, cache: Any, index: int) -> None:
        if type(cache) is not self.lent_class:
            return
        for tensors in (cache.key_cache, cache.value_cache):
            tensors[index] = tensors[index]
        if not cache.key_cache.is_any_lent():
            cache.key_cache, cache.value_cache = list(cache.key_cache), list(cache.value_cache)
            cache._seen_tokens = cache._seen_tokens
            cache.__class__ = self._plain_class
            del cache._lent


def _lent_cache(plain: Any) -> Any:
    """The class of caches whose tensors are in buffers. An object may change between it and `plain`.

    Another thread may give the cache back while one of these functions runs: its keys are a plain list then, and
    super() knows nothing of it any more.
    """

    class LentCache(plain):  # type: ignore[misc]
        __module__ = plain.__module__
        _lent: tuple[Buffers]
        _seen_tokens = _Own("_seen_tokens", lambda cache, buffers: buffers.length)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            keys = self.key_cache
            buffers = keys.lent_to(layer_idx) if isinstance(keys, _LentList) else None
            return plain.get_seq_length(self, layer_idx) if buffers is None else buffers.length

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None) -> Any:
            (buffers,) = self._lent
            if buffers.is_stepping:
                return buffers.write(layer_idx, key_states, value_states)
            return plain.update(self, key_states, value_states, layer_idx, cache_kwargs)

    return LentCache


class _LentList(list):  # type: ignore[type-arg]
    """Tensors of each layer, some of which are in buffers."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        self._lent: dict[int, tuple[Buffers, int]] = {}

    def lend(self, index: int, buffers: Buffers, which: int) -> None:
        """From now on the tensor is what of the buffers is filled."""
        super().__setitem__(index, None)
        self._lent[index] = (buffers, which)

    def lent_to(self, index: int) -> Buffers | None:
        """The buffers that the tensor is in, if it is in any."""
        lent = self._lent.get(index)
        return None if lent is None else lent[0]

    def is_any_lent(self) -> bool:
        """Whether any tensor is."""
        return bool(self._lent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        lent = self._lent.get(range(len(self))[index])  # before its own: another thread may give the cache back
        own = super().__getitem__(index)
        return lent[0].filled(range(len(self))[index], lent[1]) if own is None and lent is not None else own

    def __setitem__(self, index: Any, tensor: Any) -> None:
        super().__setitem__(index, tensor)
        lent = self._lent.pop(range(len(self))[index], None)
        if lent is not None:
            lent[0].is_whole = False

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __reversed__(self) -> Iterator[Any]:
        return (self[index] for index in reversed(range(len(self))))
