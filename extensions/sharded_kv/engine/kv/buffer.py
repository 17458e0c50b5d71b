"""The keys, or the values, of one layer: a tensor with room for tokens to come, written in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# How much room is made ahead: for what the reply may still add, but for no more than so many tokens, or a quarter of
# those that are there.
_MOST_AHEAD = 1024
_AHEAD_PART = 4
# Where nobody says how long the reply may get.
_AHEAD_OF_UNKNOWN = 256
# A sliding window's buffer has room for so many tokens more, or for this part of the window.
_LEAST_SLACK = 16
_SLACK_PART = 16


class Place:
    """Where the layers of a device write their next token: the same for all, so it is set once for each step.

    Attributes:
        index: as a number; -1 before the first step, for a prompt needs none.
        tensor: [1], on the device.
    """

    __slots__ = ("_device", "index", "tensor")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.index = -1
        self.tensor: Any = None

    def move_to(self, index: int) -> None:
        """Have them write there."""
        if self.tensor is None:
            with torch.inference_mode(False):
                self.tensor = torch.full((1,), index, dtype=torch.int64, device=self._device)
        else:
            self.tensor.fill_(index)
        self.index = index


@dataclasses.dataclass
class Room:
    """How much room the buffers of one cache get.

    Attributes:
        longest: how many tokens the reply may reach, prompt included; None if nobody says.
        most_ahead: at most so many tokens of room ahead; None for what is usual.
        step: the capacity is a multiple of it. Whole steps let the next reply use the same buffers, graphs and all.
        prompt: how many tokens the prompt has that is being read: there is room for all of it from the first on.
        spare: tensors of an earlier reply, in the order in which they were made there, to be used again.
        let_go: called before another tensor is made: whoever holds the buffers there are shall hold them no longer.
        made_by: who has made the cache: "generate" or "forward".
        is_tight: memory ran out with the room that there was ahead: from then on there is none.
        has_grown: room was made ahead, or graphs, since somebody has seen to it that enough memory is left.
    """

    longest: int | None = None
    step: int = 1
    most_ahead: int | None = None
    prompt: int = 0
    spare: list[Tensor] = dataclasses.field(default_factory=list)
    let_go: Callable[[], None] = lambda: None
    made_by: str = ""
    is_tight: bool = False
    has_grown: bool = False
    _used: int = 0  # of the spare ones
    _places: dict[torch.device, Place] = dataclasses.field(default_factory=dict)

    def capacity(self, needed: int) -> int:
        """For how many tokens there shall be room where `needed` must fit."""
        if self.is_tight:
            return needed
        is_unknown = self.longest is None or needed > self.longest + 1  # its last token makes room for itself
        wanted = _AHEAD_OF_UNKNOWN if is_unknown else max(0, (self.longest or 0) - needed)
        ahead = min(wanted, self.most_ahead or max(_MOST_AHEAD, needed // _AHEAD_PART))
        return -(-(needed + ahead) // self.step) * self.step

    def place(self, device: torch.device) -> Place:
        """Where all layers of a device write their next token."""
        if device not in self._places:
            self._places[device] = Place(device)
        return self._places[device]

    def tensor(self, like: Tensor, needed: int, capacity: int | None = None, *, is_prompt: bool = False) -> Tensor:
        """Zeros for some tokens.

        Args:
            like: [batch, heads, tokens, head size], gives all but the number of tokens.
            needed: so many tokens must fit.
            capacity: so many shall fit; `capacity(needed)` if nothing is given.
            is_prompt: there shall be no room ahead yet, for memory is scarcest while a prompt is read.
        """
        if capacity is None:
            needed = max(needed, self.prompt)
            capacity = self.capacity(needed)
        if self._used < len(self.spare):
            # Attention in graphs reads all of a buffer: one that is much too large is none that suits.
            spare = self.spare[self._used]
            if _same_kind(spare, like) and needed <= spare.shape[2] <= 2 * capacity:
                self._used += 1
                return spare.zero_()
            del spare
        self.spare = []
        self.let_go()
        self.has_grown = not is_prompt
        return _zeros(like, needed if is_prompt else capacity)


@dataclasses.dataclass
class WindowRoom:
    """The same for a layer with a sliding window, which forgets what is older.

    Attributes:
        room: of the whole cache.
        window: how many tokens one token sees, itself included.
    """

    room: Room
    window: int

    def place(self, device: torch.device) -> Place:
        """Where all layers of a device write their next token."""
        return self.room.place(device)

    def capacity(self, needed: int) -> int:
        """For how many tokens there shall be room where `needed` must fit."""
        most = self.window - 1 + max(_LEAST_SLACK, self.window // _SLACK_PART)
        return max(needed, min(self.room.capacity(needed), most))

    def tensor(self, like: Tensor, needed: int, *, is_prompt: bool = False) -> Tensor:
        """Zeros for the window and some tokens more, so that it moves to the front only once in so many tokens."""
        return self.room.tensor(like, needed, self.capacity(needed), is_prompt=is_prompt)


class Buffer:
    """Keys or values of one layer. What is filled is ``tensor[:, :, start : start + length]``.

    Attributes:
        tensor: [batch, heads, capacity, head size], on the layer's device.
        start: where the oldest token is; more than 0 once a sliding window has moved on.
        length: how many tokens are filled.
        capacity: how many tokens may be written to `tensor`; 0 for one that somebody else has made and may hold.
        place: where the layers of its device write their next token.
        was_shown: somebody was given a view of it, and may hold that.
    """

    __slots__ = ("_room", "capacity", "length", "place", "start", "tensor", "was_shown")

    def __init__(self, first: Tensor, room: Room | WindowRoom) -> None:
        """Hold a copy of `first`, [batch, heads, tokens, head size]."""
        self._room = room
        self._hold(room.tensor(first, first.shape[2], is_prompt=True), 0)
        self.append(first)

    @classmethod
    def of(cls, tensor: Tensor, room: Room | WindowRoom) -> Buffer:
        """Hold `tensor` itself, which somebody else has made: it is read, and never written to."""
        buffer = cls.__new__(cls)
        buffer._room = room
        buffer._hold(tensor, tensor.shape[2], is_ours=False)
        return buffer

    def _hold(self, tensor: Tensor, length: int, *, is_ours: bool = True) -> None:
        self.tensor, self.start, self.length, self.was_shown = tensor, 0, length, False
        self.place = self._room.place(tensor.device)
        self.capacity = tensor.shape[2] if is_ours else 0

    @property
    def filled(self) -> Tensor:
        """A view of what is filled, [batch, heads, length, head size]."""
        return self.tensor.narrow(2, self.start, self.length)

    def suits(self, new: Tensor) -> bool:
        """Whether `new` may be written to it: it differs in nothing but the number of tokens."""
        return _same_kind(new, self.tensor)

    def append(self, new: Tensor) -> Tensor:
        """Write tokens behind the last, of the same kind as those. Returns a view of all that are filled then."""
        count = new.shape[2]
        self.make_room(count)
        self.tensor.narrow(2, self.start + self.length, count).copy_(new)
        self.length += count
        return self.filled

    def make_room(self, count: int) -> None:
        """Have `count` more tokens fit, by moving what is filled towards the front or into a larger tensor."""
        if self.start + self.length + count <= self.capacity:
            return
        needed = self.length + count
        # With less room than a new one would have, what is filled would move at almost every token.
        if self._room.capacity(needed) <= self.capacity and not self.was_shown:
            self._move(min(self.start, (self.capacity - needed) // 2))  # some stay before them, to go back to
        else:
            larger = self._room.tensor(self.tensor, needed)
            larger.narrow(2, 0, self.length).copy_(self.filled)
            self._hold(larger, self.length)

    def move_to_front(self) -> None:
        """Have nothing before what is filled."""
        if self.start and self.capacity and not self.was_shown:
            self._move(0)
        elif self.start:
            self._hold(self.filled.clone(), self.length)

    def _move(self, start: int) -> None:
        """Have what is filled, and as much of what was before it, begin further to the front."""
        moved = self.tensor.narrow(2, self.start - start, start + self.length)
        self.tensor.narrow(2, 0, start + self.length).copy_(moved.clone())
        self.start = start

    def set(self, tensor: Tensor) -> None:
        """Hold what `tensor` holds: the same memory where it is a part of ours, ours where it fits in, else its own."""
        if self._place_of(tensor) == self.start:
            self.truncate_at(self.start + tensor.shape[2])
        elif (
            not (self.was_shown or torch.is_grad_enabled())
            and _same_kind(tensor, self.tensor)
            and tensor.shape[2] <= self.capacity
        ):
            own = tensor.clone() if _memory(tensor) == _memory(self.tensor) else tensor
            self.start, self.length = 0, tensor.shape[2]
            self.filled.copy_(own)
            self.tensor.narrow(2, self.length, self.capacity - self.length).zero_()
        else:
            self._hold(tensor, tensor.shape[2], is_ours=False)

    def reorder(self, index: Tensor) -> None:
        """Have the rows in another order: first the one that `index`, [batch], names first, and so on."""
        self.set(self.filled.index_select(0, index))

    def truncate_at(self, end: int) -> None:
        """Forget the tokens from the place `end` of the tensor on. They become zeros: graphs read all of a buffer, and
        a masked token counts 0 times its value, which is NaN if that is.
        """
        last, length = self.start + self.length, end - self.start
        if end >= last:
            return
        if self.was_shown and self.capacity:  # somebody may have a view of what would be written over
            self._hold(self.tensor.narrow(2, self.start, length).clone(), length)
            return
        if self.capacity:
            self.tensor.narrow(2, end, last - end).zero_()
        self.length = length

    def keep_last(self, count: int) -> None:
        """Count no more than the last `count` tokens as filled; those before stay where they are for a while."""
        if self.length > count:
            self.start += self.length - count
            self.length = count

    def move_to(self, room: Room | WindowRoom) -> None:
        """Make room as `room` says from now on."""
        self._room, self.place = room, room.place(self.tensor.device)

    def give_room_back(self) -> None:
        """Take no more memory than what is filled needs."""
        if self.length == self.tensor.shape[2]:
            return
        try:
            self._hold(self.filled.clone(), self.length)
        except torch.cuda.OutOfMemoryError:  # not even for a moment both
            device, filled = self.tensor.device, self.filled.cpu()
            del self.tensor
            self._hold(filled.to(device), self.length)

    def can_go_back(self, count: int, kept: int) -> bool:
        """Whether the `kept` tokens before the last `count` are still here."""
        return self.start + self.length - count >= kept

    def go_back(self, count: int, kept: int) -> None:
        """Forget the last `count` tokens, and count the `kept` before them as filled; nothing is kept at 0."""
        end = max(0, self.start + self.length - count)
        self.start, self.length = end - kept, self.start + self.length - (end - kept)
        self.truncate_at(end)

    def is_filled_by(self, view: Tensor) -> bool:
        """Whether `view` is what is filled."""
        return view.shape[2] == self.length and self._place_of(view) == self.start

    def _place_of(self, part: Tensor) -> int | None:
        """Where in `tensor` a part of it begins that has all its rows, heads and sizes; None if it is no such part."""
        whole = self.tensor
        if not _same_kind(part, whole) or part.stride() != whole.stride() or _memory(part) != _memory(whole):
            return None
        place, rest = divmod(int(part.storage_offset()) - int(whole.storage_offset()), whole.stride(2))
        return place if rest == 0 and 0 <= place <= whole.shape[2] - part.shape[2] else None

    def __deepcopy__(self, memo: object) -> Buffer:
        """A copy of what is filled, which makes room for itself when it goes on."""
        return Buffer.of(self.filled.clone(), Room())


def _same_kind(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ in nothing but the number of tokens."""
    return (
        one.dim() == other.dim() == 4
        and one.dtype == other.dtype
        and one.device == other.device
        and one.shape[:2] == other.shape[:2]
        and one.shape[3] == other.shape[3]
    )


def _memory(tensor: Tensor) -> int:
    """Which memory it lies in: the same for a tensor and its views."""
    return tensor.untyped_storage().data_ptr()


def _zeros(like: Tensor, tokens: int) -> Tensor:
    # A tensor made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return like.new_zeros((*like.shape[:2], tokens, like.shape[3]))
