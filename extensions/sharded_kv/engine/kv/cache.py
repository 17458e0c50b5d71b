"""KVCache: the cache of one conversation, which lies in buffers on its layers' GPUs."""

from __future__ import annotations

import copy
import copyreg
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .buffer import Buffer, Room
from .layers import FullLayer, SlidingLayer

IS_LAYERED = hasattr(DynamicCache(), "layers")  # since transformers 4.54
if IS_LAYERED:
    _Base: Any = DynamicCache
else:
    from .older import ListedCache as _Base

_MOST_AHEAD_WITH_STATES = 64
# The attributes that a plain cache has not got.
_OURS = frozenset({"room", "graphs", *(() if IS_LAYERED else ("layers", "_lists", "_given"))})


class KVCache(_Base):  # type: ignore[misc]
    """A DynamicCache whose layers write in place into buffers with room for tokens to come.

    To its owner it is the cache that transformers would have made. Layers of kinds that have no buffers (recurrent
    states) are transformers' own.

    Args:
        args, options: for DynamicCache.
        room: how much room the buffers get.

    Attributes:
        room: as above.
        graphs: what graph mode keeps for the cache; it is asked to `outlive` the cache, with its buffers.
    """

    def __init__(self, *args: Any, room: Room | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.room, self.graphs = room or Room(), None
        if IS_LAYERED:
            self.layers: list[Any] = [self._layer_like(layer) for layer in self.layers]

    @classmethod
    def in_place_of(cls, cache: Any, room: Room) -> KVCache:
        """A cache with the kinds of layers that another has, and with what it holds.

        Args:
            cache: see `can_replace`.
            room: how much room the buffers get.
        """
        ours = cls(room=room)
        if IS_LAYERED:
            ours.__dict__.update(vars(cache))
            ours.layers = [ours._layer_like(layer) for layer in cache.layers]
            if len(ours.own_layers) < len(ours.layers):  # it cannot go back to do without room, should memory run out
                room.most_ahead = _MOST_AHEAD_WITH_STATES
        return ours

    @staticmethod
    def can_replace(cache: Any) -> bool:
        """Whether `cache` is a DynamicCache as generate() makes it, with layers that ours replace, or none yet."""
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return False
        if not IS_LAYERED and cache.get_seq_length():
            return False
        kinds = {type(layer) for layer in getattr(cache, "layers", ())}
        return not kinds or bool(kinds & {FullLayer.plain, SlidingLayer.plain})

    def _layer_like(self, layer: Any) -> Any:
        """A layer of ours for a plain one; one of another kind as it is."""
        if type(layer) is FullLayer.plain:
            ours = FullLayer(self.room)
        elif type(layer) is SlidingLayer.plain:
            ours = SlidingLayer(self.room, layer.sliding_window)
        else:
            return layer
        state = dict(vars(layer))
        keys, values = state.pop("keys", None), state.pop("values", None)
        ours.__dict__.update(state)
        if keys is not None:  # it was made with what it holds
            ours.keys, ours.values = keys, values
        return ours

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new tokens. Returns the keys and values that they attend to.

        Args:
            key_states, value_states: [batch, heads, new tokens, head size].
            layer_idx: of the layer.
        """
        layers = self.layers
        if not IS_LAYERED or layer_idx >= len(layers):
            self._prepare(layer_idx)
        seen: tuple[Tensor, Tensor] = layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return seen

    def _prepare(self, layer_idx: int) -> None:
        while layer_idx >= len(self.layers):
            self.layers.append(FullLayer(self.room))
        if not IS_LAYERED:
            self._take_over(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have the rows of each layer in another order, for beam search, which asks between two steps.

        Args:
            beam_idx: [batch], of each row the one that comes there.
        """
        for layer in self.layers:
            if not isinstance(layer, FullLayer):
                layer.reorder_cache(beam_idx)
        for buffer in self.buffers():
            index = beam_idx.to(buffer.tensor.device)
            try:
                buffer.reorder(index)
            except torch.cuda.OutOfMemoryError:
                if not self.give_room_back(self.length):
                    raise
                buffer.reorder(index)

    # --- what the engine asks -------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return int(self.get_seq_length())

    @property
    def own_layers(self) -> list[FullLayer]:
        """Those of its layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, FullLayer)]

    def kinds(self) -> dict[str, list[FullLayer]]:
        """Its layers that hold something, by what they keep, under transformers' names for that."""
        kinds: dict[str, list[FullLayer]] = {}
        for layer in self.own_layers:
            if layer.buffers is not None:
                kinds.setdefault(layer.kind, []).append(layer)
        return kinds

    def places(self) -> set[tuple[str, int, int]]:
        """Of each kind of its layers where in their buffers the tokens begin, and how many they are."""
        return {(layer.kind, each.start, each.length) for layer in self.own_layers for each in layer.buffers or ()}

    def level(self) -> bool:
        """Have the layers of a kind hold their tokens in the same place. Returns whether they hold as many."""
        for buffer in self.buffers():
            buffer.move_to_front()
        return len(self.places()) == len(self.kinds())

    def buffers(self) -> Iterator[Buffer]:
        """The keys, then the values, of each layer of ours that holds any."""
        for index, layer in enumerate(self.layers):
            if not IS_LAYERED:
                self._take_over(index)
            if isinstance(layer, FullLayer):
                yield from layer.buffers or ()

    def tensors(self) -> list[Tensor]:
        """The tensor of each of its `buffers()`."""
        return [buffer.tensor for buffer in self.buffers()]

    def bytes_by_device(self) -> dict[torch.device, int]:
        """Bytes of all buffers, their room included."""
        sizes: dict[torch.device, int] = defaultdict(int)
        for buffer in self.buffers():
            sizes[buffer.tensor.device] += buffer.tensor.numel() * buffer.tensor.element_size()
        return dict(sizes)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`.

        Raises:
            ValueError: it cannot go back so far, and is as it was.
        """
        for layer in self.layers if length else ():
            if not isinstance(layer, FullLayer) or not layer.can_go_back_to(length):
                raise ValueError(f"A {type(layer).__name__} cannot go back to {length} tokens.")
        for layer in self.layers:
            if isinstance(layer, FullLayer):
                layer.truncate(length)
            else:
                layer.reset()

    def begin_reply(self, longest: int | None) -> None:
        """Another reply goes on with it, which may reach so many tokens; None if nobody knows."""
        self.room.longest, self.room.is_tight = longest, False
        if self.graphs is not None:  # the model may have changed since
            self.graphs.distrust()

    def make_room(self) -> None:
        """Have one token more fit into all buffers, and what else there shall be room for."""
        for buffer in self.buffers():
            buffer.make_room(1)

    def give_room_back(self, length: int) -> bool:
        """Memory has run out in a step: forget what it has written, and have no room ahead from now on.

        Args:
            length: how many tokens there were before the step.

        Returns:
            Whether that may help: False where there was no room ahead already.
        """
        if self.room.is_tight:
            return False
        try:
            self.truncate(length)
        except ValueError:
            return False
        self.room.is_tight = True
        self.room.spare, self.graphs = [], None
        self.room.let_go()
        for layer in self.own_layers:
            layer.give_room_back()
        return True

    def become_plain(self) -> None:
        """Go on with layers of transformers' own, which hold the same; where it has no layers, it stays as it is."""
        self.graphs = None
        if IS_LAYERED:
            self.layers[:] = [layer.as_plain() if isinstance(layer, FullLayer) else layer for layer in self.layers]

    # --- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A cache with buffers of its own."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        others = {name: value for name, value in vars(self).items() if name not in ("room", "graphs")}
        copied.__dict__.update(copy.deepcopy(others, memo), room=Room(), graphs=None)
        for layer in copied.own_layers:
            layer.move_to(copied.room)
        return copied

    def __reduce__(self) -> Any:
        """A pickled cache is a plain one: whoever loads it need not have this package."""
        state = {name: value for name, value in vars(self).items() if name not in _OURS}
        if not IS_LAYERED:
            state["_seen_tokens"] = self.length
            for name in ("key_cache", "value_cache"):
                state[name] = [each.clone() if isinstance(each, Tensor) else each for each in getattr(self, name)]
        return copyreg._reconstructor, (DynamicCache, object, None), state  # type: ignore[attr-defined]

    def __del__(self) -> None:
        graphs = vars(self).get("graphs")
        if graphs is not None:
            graphs.outlive(self)
