"""KVCache: the cache of one conversation, which lies in buffers on its layers' GPUs."""

from __future__ import annotations

import copy
import copyreg
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .buffer import Buffer, Room
from .layers import FullLayer, HybridLayer, SlidingLayer, can_go_back, is_recurrent, is_strange, keeps_tokens_only

IS_LAYERED = hasattr(DynamicCache(), "layers")  # since transformers 4.54
if IS_LAYERED:
    _Base: Any = DynamicCache
else:
    from .older import ListedCache as _Base

_MOST_AHEAD_WITH_STATES = 64
_PLAIN = (FullLayer.plain, SlidingLayer.plain)
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
            # What keeps states cannot go back to do without room, should memory run out.
            if any(is_strange(layer) or is_recurrent(layer) for layer in ours.layers):
                room.most_ahead = _MOST_AHEAD_WITH_STATES
        return ours

    @staticmethod
    def can_replace(cache: Any) -> bool:
        """Whether `cache` is a DynamicCache as generate() makes it, with layers that ours replace, or none yet."""
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return False
        if not IS_LAYERED and cache.get_seq_length():
            return False
        layers = getattr(cache, "layers", ())
        known = {FullLayer.plain, SlidingLayer.plain, HybridLayer.plain}
        return all(map(is_recurrent, layers)) or not known.isdisjoint(map(type, layers))

    def _layer_like(self, layer: Any) -> Any:
        """A layer of ours for a plain one; one of another kind as it is."""
        if type(layer) is FullLayer.plain:
            ours = FullLayer(self.room)
        elif type(layer) is HybridLayer.plain:
            ours = HybridLayer(self.room, number_of_states=layer.number_of_states)
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
            if not isinstance(layer, FullLayer) and not is_recurrent(layer):
                layer.reorder_cache(beam_idx)
        for state in self.states():
            state.copy_(state.index_select(0, beam_idx.to(state.device)))
        for buffer in self.buffers():
            index = beam_idx.to(buffer.tensor.device)
            try:
                buffer.reorder(index)
            except torch.cuda.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # there, a view of the buffer is at hand
                if not self.give_room_back(self.length):
                    raise
                buffer.reorder(index)

    # --- what the engine asks -------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """How many tokens it holds; 0 if its layers are recurrent alone, which count none."""
        return int(self.get_seq_length()) if self.own_layers or not self.layers else 0

    @property
    def own_layers(self) -> list[FullLayer]:
        """Those of its layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, FullLayer)]

    @property
    def other_layers(self) -> list[Any]:
        """Those that keep something which is neither in buffers nor among the states."""
        return [layer for layer in self.layers if is_strange(layer)]

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

    def states(self) -> list[Tensor]:
        """The states of its recurrent layers, which are transformers' own and are written in place."""
        return [state for states in self._held_states() for state in states.values() if state is not None]

    def mark(self) -> tuple[Any, ...]:
        """What a decode step changes, to go back to."""
        counts = [(layer, layer.count()) for layer in self.own_layers]
        return counts, [state.clone() for state in self.states()]

    def go_back_to(self, mark: tuple[Any, ...]) -> None:
        """Be as at the `mark`, but for what decode steps have written behind the last token."""
        counts, states = mark
        for layer, count in counts:
            layer.set_count(count)
        for state, before in zip(self.states(), states, strict=True):
            state.copy_(before)

    @property
    def has_all_states(self) -> bool:
        """Whether each of its recurrent layers has states."""
        recurrent = filter(is_recurrent, self.layers)
        return all(any(layer.is_conv_states_initialized.values()) for layer in recurrent)

    def tensors(self) -> list[Tensor]:
        """The tensor of each of its `buffers()`, and its `states()`."""
        return [*[buffer.tensor for buffer in self.buffers()], *self.states()]

    def move_states(self, places: list[Tensor]) -> bool:
        """Have its states in these tensors from now on, with what they hold now. Returns whether they fit in there."""
        states = self.states()
        if len(places) != len(states):
            return False
        if all(map(is_, states, places)):
            return True
        if any(_kind(state) != _kind(place) for state, place in zip(states, places, strict=True)):
            return False
        if set(map(id, states)) & set(map(id, places)):  # one might be written over before it is read
            return False
        filled = iter(places)
        for held in self._held_states():
            held.update({name: next(filled).copy_(state) for name, state in held.items() if state is not None})
        return True

    def _held_states(self) -> Iterator[dict[Any, Tensor | None]]:
        for layer in filter(is_recurrent, self.layers):
            yield from (layer.conv_states, layer.recurrent_states)

    def bytes_by_device(self) -> dict[torch.device, int]:
        """Bytes of all buffers, their room included, and of all states."""
        sizes: dict[torch.device, int] = defaultdict(int)
        for tensor in self.tensors():
            sizes[tensor.device] += tensor.numel() * tensor.element_size()
        return dict(sizes)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`.

        Raises:
            ValueError: it cannot go back so far, and is as it was.
        """
        layer = self._layer_that_cannot_go_back_to(length)
        if layer is not None:
            raise ValueError(f"A {type(layer).__name__} cannot go back to {length} tokens.")
        for layer in self.layers:
            if isinstance(layer, FullLayer):
                layer.truncate(length)
            else:
                layer.reset()
                if type(layer) in _PLAIN:  # transformers 5.17 would keep its keys, and zero them
                    layer.keys = layer.values = None
                    layer.is_initialized = False

    @property
    def keeps_tokens_only(self) -> bool:
        """Whether it keeps keys and values, and no states that have no past."""
        return all(map(keeps_tokens_only, self.layers))

    @property
    def is_whole(self) -> bool:
        """Whether each of its layers has keys and values of as many tokens: else the model keeps others elsewhere."""
        return len({layer.buffers is not None and layer.get_seq_length() for layer in self.own_layers}) == 1

    def can_go_back_to(self, length: int) -> bool:
        """Whether `truncate(length)` can be had."""
        return self._layer_that_cannot_go_back_to(length) is None

    def _layer_that_cannot_go_back_to(self, length: int) -> Any:
        return next((layer for layer in self.layers if length and not can_go_back(layer, length)), None)

    @property
    def is_held(self) -> bool:
        """Whether somebody may hold tensors or layers of it, besides itself."""
        # Each has one reference from here, and one from the question.
        are_held = sys.getrefcount(self.layers) > 2 or any(
            sys.getrefcount(self.layers[index]) > 2 for index in range(len(self.layers))
        )
        return are_held or any(buffer.was_shown for buffer in self.buffers())

    def end_prompt(self) -> None:
        """A prompt was read, in one step or several."""
        for layer in self.own_layers:
            layer.end_prompt()

    def begin_reply(self, longest: int | None) -> None:
        """Another reply goes on with it, which may reach so many tokens; None if nobody knows."""
        self.room.longest, self.room.is_tight = longest, False
        if self.graphs is not None:  # the model may have changed since
            self.graphs.distrust()

    def make_room(self, tokens: int) -> None:
        """Have so many more tokens fit into all buffers, and what else there shall be room for."""
        for buffer in self.buffers():
            buffer.make_room(tokens)

    def give_room_back(self, length: int | None) -> bool:
        """Memory has run out in a step: forget what it has written, and have no room ahead from now on.

        Args:
            length: how many tokens there were before the step; None if nothing of the step is left.

        Returns:
            Whether that may help: False where there was no room ahead already.
        """
        if self.room.is_tight:
            return False
        try:
            if length is not None:
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


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
