"""The layers of a cache by what they keep: where a captured step writes its tokens, and to which these attend."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..transfers import TrafficCounter


class LayerKind:
    """The layers of a cache that keep the same tokens: all of them, or those of a window.

    Args:
        layers: they hold something.
        main_device: where the model's inputs are.

    Attributes:
        width: for how many tokens they all have room.
        place: where in the buffers the tokens begin that are there, and how many they are.
    """

    def __init__(self, layers: list[Any], main_device: torch.device) -> None:
        buffers = [buffer for layer in layers for buffer in layer.buffers]
        self.width: int = min(buffer.capacity for buffer in buffers)
        self.place = (0, 0)
        self._window: int | None = getattr(layers[0], "sliding_window", None)
        self._devices = tuple(dict.fromkeys((main_device, *(layer.device for layer in layers))))
        self._like = buffers[0].tensor
        self._steps: dict[int, StepPlaces] = {}

    def of_step(self, tokens: int) -> StepPlaces:
        """Where a step of so many new tokens writes, and what it attends to."""
        if tokens not in self._steps:
            batch, dtype = self._like.shape[0], self._like.dtype
            self._steps[tokens] = StepPlaces(batch, tokens, self.width, dtype, self._devices, self._window)
        return self._steps[tokens]


class StepPlaces:
    """Where the layers of a kind write the new tokens of a captured step, and to which tokens these attend.

    Each device has positions and a mask of its own, which stay there.

    Args:
        batch, tokens, width, dtype: of the masks; see below.
        devices: where the layers are, and first where the model's inputs are.
        window: how many tokens one token attends to, itself included; None for all.

    Attributes:
        positions: on each device, [tokens], where in the buffers they are written.
        masks: on each device, [batch, 1, tokens, width], what is added to a token's score.
    """

    def __init__(
        self,
        batch: int,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        devices: tuple[torch.device, ...],
        window: int | None,
    ) -> None:
        self._tokens, self._window, self._masked = tokens, window or width, torch.finfo(dtype).min
        self._shown: tuple[int, int] | None = None  # from where to where the masks show tokens, if that is known
        with torch.inference_mode(False):
            self.positions = {device: torch.zeros(tokens, dtype=torch.int64, device=device) for device in devices}
            self.masks = {
                device: torch.zeros(batch, 1, tokens, width, dtype=dtype, device=device) for device in devices
            }
            # Which tokens one attends to where all count: those up to its own place, and none before its window.
            self._places = {device: torch.arange(width, device=device) for device in devices if tokens > 1}
            self._offsets = {device: torch.arange(tokens, device=device)[:, None] for device in self._places}

    def begin(self, place: tuple[int, int], mask: Tensor | None, is_one_longer: bool, counter: TrafficCounter) -> None:
        """Have the layers write the new tokens behind the others, and attend to all of them.

        Args:
            place: of the tokens that are there: where they begin, and how many they are.
            mask: [batch, tokens], which of all tokens of the reply count; None for all.
            is_one_longer: the step before was here, and it is its mask and a one behind it.
            counter: counts what crosses.
        """
        begin, new = place[0], sum(place)
        end = new + self._tokens
        for device, positions in self.positions.items():
            positions.fill_(new) if self._tokens == 1 else torch.add(self._offsets[device][:, 0], new, out=positions)
        (first, last), self._shown = self._shown or (end, end), None
        if is_one_longer and first <= begin and last + 1 == end and self._tokens == 1:
            for each in self.masks.values():
                if first < begin:  # what a window has lost
                    each[..., first:begin].fill_(self._masked)
                each[..., last].fill_(0)
        elif mask is None:
            for device in self.masks:
                self._show(device, begin, end)
        else:
            main_device, *others = self.masks
            main = self._show(main_device, begin, end)
            hidden = (mask[:, begin - end :] == 0).to(main.device)
            main[:, :, :, begin:end].masked_fill_(hidden[:, None, None], self._masked)
            for device in others:
                self.masks[device].copy_(main, non_blocking=True)
                counter.add(main_device, device, main.numel() * main.element_size())
        self._shown = (begin, end)

    def forget(self) -> None:
        """The masks may be those of another step, or somebody may have written to them: make them anew."""
        self._shown = None

    def _show(self, device: torch.device, begin: int, end: int) -> Tensor:
        """Have all tokens of these places count, each for those that come after it."""
        mask = self.masks[device].fill_(self._masked)
        if self._tokens == 1:
            mask[..., begin:end].fill_(0)
            return mask
        places, own = self._places[device], self._offsets[device] + (end - self._tokens)
        return mask.masked_fill_((places >= begin) & (places <= own) & (places > own - self._window), 0)


class MaskWatch:
    """Knows whether a step's mask is that of the step before with a one behind it.

    It does not look into masks: the host would have to wait for a GPU.
    """

    def __init__(self) -> None:
        self._latest: _Seen | None = None  # of the latest step
        self._longer: _Seen | None = None  # what generate() has made of that
        self._had_none = False

    def note_growth(self, before: Tensor, after: Tensor) -> None:
        """generate() has put ones behind the rows of `before`: that is `after`."""
        is_known = self._latest is not None and self._latest.is_still(before)
        self._longer = _Seen(after) if is_known and after.shape[1] == before.shape[1] + 1 else None

    def is_one_longer(self, mask: Tensor | None) -> bool:
        """Whether the mask of the next step, which this is, is so."""
        longer, had_none = self._longer, self._had_none
        self._latest, self._longer, self._had_none = None if mask is None else _Seen(mask), None, mask is None
        return had_none if mask is None else longer is not None and longer.is_still(mask)


class _Seen:
    """A tensor as it was when it was seen. It is held weakly."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = None if tensor.is_inference() else tensor._version

    def is_still(self, tensor: Tensor) -> bool:
        """Whether it is this one, and nobody has changed it; False for inference tensors, which do not count that."""
        return self._tensor() is tensor and self._version is not None and tensor._version == self._version
