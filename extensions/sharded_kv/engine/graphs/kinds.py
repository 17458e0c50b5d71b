"""The layers of a cache by what they keep: where a captured step writes its token, and to which tokens it attends."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..transfers import TrafficCounter


class LayerKind:
    """The layers of a cache that keep the same tokens: all of them, or those of a window.

    Each of their devices has a mask of its own, which stays there: a step only adds its token to it.

    Args:
        layers: they hold something.
        main_device: where the model's inputs are.

    Attributes:
        width: for how many tokens they all have room.
        place: where in the buffers the tokens begin that are there, and how many they are.
        positions: on each device of theirs, [1], where they write the token of a captured step.
        masks: on the same devices, and on the main device, [batch, 1, 1, width], what is added to a token's score.
    """

    def __init__(self, layers: list[Any], main_device: torch.device) -> None:
        buffers = [buffer for layer in layers for buffer in layer.buffers]
        self.width: int = min(buffer.capacity for buffer in buffers)
        self.place = (0, 0)
        self._attended = (0, 0)  # the place in the masks
        self._main_device = main_device
        batch, dtype = buffers[0].tensor.shape[0], buffers[0].tensor.dtype
        self._masked = torch.finfo(dtype).min
        devices = dict.fromkeys(layer.device for layer in layers)
        with torch.inference_mode(False):
            self.positions = {device: torch.zeros(1, dtype=torch.int64, device=device) for device in devices}
            self.masks = {
                device: torch.zeros(batch, 1, 1, self.width, dtype=dtype, device=device)
                for device in (main_device, *devices)
            }

    def begin_step(self, mask: Tensor | None, is_one_longer: bool, counter: TrafficCounter) -> None:
        """Have the layers write the next token behind the others, and attend to all of them.

        Args:
            mask: [batch, tokens], which of all tokens of the reply count; None for all.
            is_one_longer: it is the mask of the step before, and a one behind it.
            counter: counts what crosses.
        """
        begin, end = self.place[0], sum(self.place) + 1
        for position in self.positions.values():
            position.fill_(end - 1)
        (first, last), self._attended = self._attended, (0, 0)
        if is_one_longer and first <= begin and last + 1 == end:
            for each in self.masks.values():
                if first < begin:  # what a window has lost
                    each[..., first:begin].fill_(self._masked)
                each[..., last].fill_(0)
        elif mask is None:
            for each in self.masks.values():
                each.fill_(self._masked)[..., begin:end].fill_(0)
        else:
            main = self.masks[self._main_device].fill_(self._masked)
            counts = (mask[:, begin - end :] != 0).to(main.device)
            main[:, 0, 0, begin:end].masked_fill_(counts, 0)
            for device, each in self.masks.items():
                if device != self._main_device:
                    each.copy_(main, non_blocking=True)
                    counter.add(self._main_device, device, each.numel() * each.element_size())
        self._attended = (begin, end)


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
