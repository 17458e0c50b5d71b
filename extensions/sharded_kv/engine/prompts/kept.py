"""Conversations that are kept between replies, so that a prompt which goes on with one need not compute all of it."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor

from ..graphs.fingerprint import Fingerprint


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A cache that no reply has just now.

    Attributes:
        generator: the container's name whose generate() it is for.
        cache: a KVCache.
        ids: [1, tokens], of the tokens in it.
        fingerprint: of the model that computed it.
    """

    generator: str
    cache: Any
    ids: Tensor
    fingerprint: Fingerprint


class Conversations:
    """Those of one model that no reply has just now.

    Attributes:
        most: how many may be kept; 0 for none.
    """

    def __init__(self) -> None:
        self.most = 0
        self._kept: list[Conversation] = []  # the latest last
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """How many tokens all kept conversations have."""
        with self._lock:
            return sum(each.ids.shape[1] for each in self._kept)

    def bytes_by_device(self) -> dict[torch.device, int]:
        """What the caches of all kept conversations take."""
        sizes: dict[torch.device, int] = {}
        with self._lock:
            for each in self._kept:
                for device, size in each.cache.bytes_by_device().items():
                    sizes[device] = sizes.get(device, 0) + size
        return sizes

    def keep(self, kept: Conversation) -> None:
        """Keep the conversation of a reply that is over, in the place of the one that was used longest ago."""
        with self._lock:
            before, self._kept = self._kept, [*self._kept, kept][-self.most :] if self.most else []
        del before  # whose caches are freed without the lock

    def drop(self) -> bool:
        """Let go of all conversations. Returns whether there were any."""
        with self._lock:
            before, self._kept = self._kept, []
        return bool(before)

    def take(self, generator: str, ids: Tensor) -> tuple[Conversation | None, int]:
        """The conversation that begins most like a prompt, and how many tokens they share; None and 0 without one.

        It is kept no longer. One of which less than half would stay is left for its own next reply, while there is
        place for another.
        """
        with self._lock:
            mine = [each for each in self._kept if each.generator == generator]
            shared = [_common(each.ids, ids) for each in mine]
            best = max(range(len(mine)), key=shared.__getitem__, default=None)
            if best is not None and 2 * shared[best] < mine[best].ids.shape[1]:
                best = 0 if len(self._kept) >= self.most else None
            if best is None:
                return None, 0
            taken = mine[best]
            self._kept = [each for each in self._kept if each is not taken]
        return (taken, shared[best]) if taken.fingerprint.holds_throughout() else (None, 0)


def _common(one: Tensor, other: Tensor) -> int:
    """With how many tokens two texts, [1, tokens] each, begin alike."""
    length = min(one.shape[1], other.shape[1])
    differ = one[0, :length].to(other.device) != other[0, :length]
    return int(torch.cat([differ, differ.new_ones(1)]).int().argmax())
