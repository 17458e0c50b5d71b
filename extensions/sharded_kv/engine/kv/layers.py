"""Layers of a cache whose keys and values are in buffers. To everybody else they are transformers' own layers.

What transformers does with a layer's `keys` and `values` (crop, reorder, repeat, select), it does here as well, in its
own code: reading them gives a view of what is filled, and setting them fills the buffer again.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..errors import our_part
from .buffer import Buffer, Room, WindowRoom

try:
    from transformers.cache_utils import DynamicLayer
except ImportError:  # before transformers 4.54
    from .older import DynamicLayer

_Sliding: Any = getattr(cache_utils, "DynamicSlidingWindowLayer", DynamicLayer)  # none before transformers 4.56

# Whether a prompt's keys are copied before the model attends to them: in another layout attention rounds otherwise.
_COPIES_PROMPT = hasattr(DynamicLayer, "lazy_initialization")


# Before transformers 5.14 a layer's states are one tensor each, and these layers stay transformers' own.
_HAS_STATES = (
    "number_of_states" in inspect.signature(getattr(cache_utils, "LinearAttentionLayer", object).__init__).parameters
)
_Recurrent: Any = cache_utils.LinearAttentionLayer if _HAS_STATES else ()
_Hybrid: Any = cache_utils.LinearAttentionAndFullAttentionLayer if _HAS_STATES else DynamicLayer
_Dummy: Any = getattr(cache_utils, "DummyLayer", ())


def is_recurrent(layer: Any) -> bool:
    """Whether a layer keeps states of one size, beside tokens or instead: transformers writes them in place."""
    return isinstance(layer, _Recurrent) and not getattr(layer, "record_past", False)


def is_strange(layer: Any) -> bool:
    """Whether a layer keeps something that is neither in our buffers nor such states."""
    return not isinstance(layer, (FullLayer, _Dummy)) and not (type(layer) is _Recurrent and is_recurrent(layer))


def keeps_tokens_only(layer: Any) -> bool:
    """Whether all that a layer keeps are keys and values in our buffers, or nothing."""
    return type(layer) in (FullLayer, SlidingLayer) or isinstance(layer, _Dummy)


def can_go_back(layer: Any, length: int) -> bool:
    """Whether what a layer of `length` tokens would have is still there."""
    return bool(layer.can_go_back_to(length)) if isinstance(layer, FullLayer) else isinstance(layer, _Dummy)


def _in_buffer(name: str) -> property:
    """A layer's `keys` or `values`, kept under `name`: a `Buffer`, or what transformers has for an empty layer."""

    def get(layer: Any) -> Any:
        held = getattr(layer, name)
        if isinstance(held, Buffer):
            held.was_shown = held.was_shown or not layer.is_read_by_host
            return held.filled
        return held

    def put(layer: Any, value: Any) -> None:
        held = vars(layer).get(name)
        if isinstance(held, Buffer) and isinstance(value, Tensor) and value.dim() == 4:
            held.set(value)
        elif isinstance(value, Tensor) and value.dim() == 4:
            setattr(layer, name, Buffer.of(value, layer.room))
        else:
            setattr(layer, name, value)

    return property(get, put)


def _by_host(name: str) -> Any:
    """transformers' own method of a layer, which reads `keys` and `values` and lets go of them again."""

    def run(layer: Any, *args: Any, **options: Any) -> None:
        layer.is_read_by_host = True
        try:
            getattr(super(FullLayer, layer), name)(*args, **options)
        finally:
            layer.is_read_by_host = False

    return run


class FullLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps all tokens.

    Attributes:
        kind: what it keeps, as the config's `layer_types` has it.
        room: how much room its buffers get.
        position: [new tokens], where a step writes them that is captured in a graph; None outside of one. Such a step
            is shown all of the buffers: what is not filled is for the mask to hide.
        width: how much of the buffers such a step is shown, in tokens.
        shown_length: a number on a GPU that says how many tokens there are, in such a step of a model that asks.
        is_read_by_host: whoever reads `keys` and `values` now will not keep them.
    """

    plain: type = DynamicLayer
    kind = "full_attention"
    is_read_by_host = False
    keys = _in_buffer("_keys")
    values = _in_buffer("_values")

    room: Any  # a Room; of a sliding layer a WindowRoom
    _keys: Any  # a Buffer, or what transformers has for an empty layer
    _values: Any

    def __init__(self, room: Room | WindowRoom, **options: Any) -> None:
        self.room = room
        self.position: Tensor | None = None
        self.shown_length: Tensor | None = None
        self.width = 0
        super().__init__(**options)

    @property
    def buffers(self) -> tuple[Buffer, Buffer] | None:
        """The keys and the values; None while the layer is empty, or has never been written to."""
        keys, values = self._keys, self._values
        return (keys, values) if isinstance(keys, Buffer) and isinstance(values, Buffer) else None

    def shows(self, name: str, view: Any) -> bool:
        """Whether a view that was given as `keys` or `values` is still what they would be."""
        held = getattr(self, f"_{name}")
        return isinstance(view, Tensor) and held.is_filled_by(view) if isinstance(held, Buffer) else held is view

    def get_seq_length(self, *_: Any) -> Any:
        """How many tokens it has seen."""
        if self.shown_length is not None:
            return self.shown_length
        keys = self._keys
        return keys.length if isinstance(keys, Buffer) else 0

    def get_mask_sizes(self, *args: Any) -> Any:
        """For how many tokens a mask is, and where they begin."""
        return super().get_mask_sizes(*args) if self.shown_length is None else (self.width, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write tokens behind the last. Returns the keys and values that they attend to, themselves included.

        Each layer comes here for each token, so what a decode step does is written out.

        Args:
            key_states, value_states: [batch, heads, new tokens, head size].
        """
        keys, values = self._keys, self._values
        if (
            type(keys) is Buffer
            and key_states.shape[2] == 1
            and (index := keys.length) < keys.capacity
            and index < values.capacity
            and self.position is None
            and not torch.is_grad_enabled()
        ):
            place = keys.place
            if place.index != index:
                place.move_to(index)
            try:
                # On a GPU this takes less of the host than to make a view and copy into it: 9 us of 24 (H200).
                keys.tensor.index_copy_(2, place.tensor, key_states)
                values.tensor.index_copy_(2, place.tensor, value_states)
            except RuntimeError:  # another batch, type or device than before
                return self._update(key_states, value_states, *args, **kwargs)
            keys.length = values.length = index = index + 1
            return keys.tensor.narrow(2, 0, index), values.tensor.narrow(2, 0, index)
        return self._update(key_states, value_states, *args, **kwargs)

    def _update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What `update` does with a prompt, in a captured step, with gradients, and where there is no room yet."""
        if self.position is not None:
            return self._write_at(self.position, key_states, value_states)
        is_filled = isinstance(self._keys, Buffer)
        # What is written to again carries no gradient; and of tensors that do not fit together transformers knows best.
        if torch.is_grad_enabled() or (is_filled and not self._keys.suits(key_states)):
            seen: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return seen
        with our_part():
            return self._append(key_states, value_states) if is_filled else self._begin(key_states, value_states)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        for buffer in (self._keys, self._values):  # both, before one is written to: memory may run out
            buffer.make_room(key_states.shape[2])
        return self._keys.append(key_states), self._values.append(value_states)

    def _begin(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._keys, self._values = Buffer(key_states, self.room), Buffer(value_states, self.room)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return (self._keys.filled, self._values.filled) if _COPIES_PROMPT else (key_states, value_states)

    def _write_at(self, position: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        for buffer, new in ((self._keys, key_states), (self._values, value_states)):
            buffer.tensor.index_copy_(2, position, new)
        return self._keys.tensor.narrow(2, 0, self.width), self._values.tensor.narrow(2, 0, self.width)

    def end_prompt(self) -> None:
        """A prompt was read, in one step or several."""

    def at(self, index: int) -> tuple[Tensor, Tensor] | None:
        """The keys and values, [batch, heads, 1, head size], of the token of this number; None if they are gone."""
        seen = self.get_seq_length()
        places = [each.start + each.length - (seen - index) for each in self.buffers or ()]
        if not places or min(places) < 0 or index >= seen:
            return None
        return self._keys.tensor.narrow(2, places[0], 1), self._values.tensor.narrow(2, places[1], 1)

    def advance(self, tokens: int) -> None:
        """Count the tokens that a captured step has written."""
        self._keys.length += tokens
        self._values.length += tokens

    def count(self) -> tuple[int, ...]:
        """How many tokens it has, and where they begin."""
        return tuple(number for buffer in self.buffers or () for number in (buffer.start, buffer.length))

    def set_count(self, count: tuple[int, ...]) -> None:
        """Have as many tokens again as it had."""
        keys, values = self._keys, self._values
        keys.start, keys.length, values.start, values.length = count

    def can_go_back_to(self, length: int) -> bool:
        """Whether what a layer of `length` tokens would have is still here."""
        return True

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, to which it can go back."""
        for buffer in self.buffers or ():
            buffer.truncate_at(buffer.start + length)

    def move_to(self, room: Room) -> None:
        """Have its buffers make room as `room` says from now on."""
        self.room = room
        for buffer in self.buffers or ():
            buffer.move_to(self.room)

    def give_room_back(self) -> None:
        """Take no more memory than what is filled needs."""
        for buffer in self.buffers or ():
            buffer.give_room_back()
        if self.get_seq_length() == 0:
            self._keys = self._values = None
            self.is_initialized = False

    crop = _by_host("crop")
    reset = _by_host("reset")
    reorder_cache = _by_host("reorder_cache")
    batch_repeat_interleave = _by_host("batch_repeat_interleave")
    batch_select_indices = _by_host("batch_select_indices")

    def __reduce__(self) -> Any:
        """A pickled layer is a plain one: whoever loads it need not have this package."""
        state = self._plain_state()
        for name in ("keys", "values"):
            state[name] = state[name].clone() if isinstance(state[name], Tensor) else state[name]
        return copyreg._reconstructor, (self.plain, object, None), state  # type: ignore[attr-defined]

    def as_plain(self) -> Any:
        """The layer that transformers would have in its place, with the same tensors."""
        plain: Any = object.__new__(self.plain)
        plain.__dict__.update(self._plain_state())
        return plain

    def _plain_state(self) -> dict[str, Any]:
        return {**self._others(), "keys": self.keys, "values": self.values}

    def _others(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OURS}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with buffers of its own, which make room when it goes on."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        kept = {**self._others(), "_keys": self._keys, "_values": self._values}
        copied.__dict__.update(copy.deepcopy(kept, memo), position=None, shown_length=None, width=0)
        copied.move_to(Room())
        return copied


class SlidingLayer(FullLayer, _Sliding):  # type: ignore[misc]
    """A layer that keeps its window, and some tokens before it that can be had back."""

    plain = _Sliding
    kind = "sliding_attention"
    sliding_window: int
    cumulative_length: int

    def __init__(self, room: Room, sliding_window: int) -> None:
        super().__init__(WindowRoom(room, sliding_window), sliding_window=sliding_window)

    def move_to(self, room: Room) -> None:
        """Have its buffers make room as `room` says from now on."""
        super().move_to(WindowRoom(room, self.sliding_window))  # type: ignore[arg-type]

    def get_seq_length(self, *_: Any) -> int:
        """How many tokens it has seen."""
        return self.cumulative_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `FullLayer.update`; recording what leaves the window (assisted generation) is transformers' own work."""
        if getattr(self, "record_past", False):
            seen: tuple[Tensor, Tensor] = _Sliding.update(self, key_states, value_states, *args, **kwargs)
            return seen
        return self._update(key_states, value_states, *args, **kwargs)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        seen = super()._append(key_states, value_states)
        self._keep_window(key_states.shape[2])
        return seen

    def _begin(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        last = 1 - self.sliding_window
        seen = super()._begin(key_states[:, :, last:], value_states[:, :, last:])
        self.cumulative_length += key_states.shape[2]
        return (
            seen if self._keys.length == key_states.shape[2] else (key_states.contiguous(), value_states.contiguous())
        )

    def end_prompt(self) -> None:
        """Have no more room than usual: a chunk needs more, so that its step can be taken back."""
        for buffer in self.buffers or ():
            if buffer.capacity > self.room.capacity(self.sliding_window):
                buffer.give_room_back()

    def advance(self, tokens: int) -> None:
        """Count the tokens that a captured step has written."""
        super().advance(tokens)
        self._keep_window(tokens)

    def count(self) -> tuple[int, ...]:
        """How many tokens it has, where they begin, and how many it has seen."""
        return (*super().count(), self.cumulative_length)

    def set_count(self, count: tuple[int, ...]) -> None:
        """Have as many tokens again as it had."""
        super().set_count(count[:-1])
        self.cumulative_length = count[-1]

    def _keep_window(self, new_tokens: int) -> None:
        self.cumulative_length += new_tokens
        for buffer in (self._keys, self._values):
            buffer.keep_last(self.sliding_window - 1)

    def can_go_back_to(self, length: int) -> bool:
        """Whether what a layer of `length` tokens would have is still here: the window before them."""
        kept = min(self.sliding_window - 1, length)
        return all(buffer.can_go_back(self.cumulative_length - length, kept) for buffer in self.buffers or ())

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, to which it can go back."""
        if self.cumulative_length > length:  # else a step that has failed has not come so far
            for buffer in self.buffers or ():
                buffer.go_back(self.cumulative_length - length, min(self.sliding_window - 1, length))
            self.cumulative_length = length


class HybridLayer(FullLayer, _Hybrid):  # type: ignore[misc]
    """A layer that keeps all tokens, and recurrent states, which are transformers' own."""

    plain = _Hybrid

    def can_go_back_to(self, length: int) -> bool:
        """Whether what a layer of `length` tokens would have is still here: its states have no past."""
        return False

    def truncate(self, length: int) -> None:
        """Forget all tokens, for it can go back no less."""
        self._keys = self._values = None  # transformers 5.17 would keep them, and zero them
        self.is_initialized = False
        _Recurrent.reset(self)


_OURS = frozenset({"_keys", "_values", "room", "position", "shown_length", "width", "is_read_by_host"})
