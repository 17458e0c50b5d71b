"""Attributes of a model that are ours for a while, and how the model gets back its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

MISSING = object()


class Installed(functools.partial):  # type: ignore[type-arg]
    """A callable of ours in an attribute of a model.

    A partial, so that a deep copy of the model gets one that is bound to the copy. It owns the record of all that was
    installed together: the record refers to modules, so only the model itself may keep it alive.
    """

    record: Installation


@dataclasses.dataclass
class Swap:
    """One attribute of one module.

    Attributes:
        owner: the module.
        name: the attribute, ``forward`` for most.
        ours: what stands there while it is installed.
        before: what stood among the instance's own attributes; `MISSING` if the class's was used.
    """

    owner: nn.Module
    name: str
    ours: Any
    before: Any = MISSING

    def install(self) -> None:
        """Put ours there, and keep what was there."""
        self.before = self.owner.__dict__.get(self.name, MISSING)
        setattr(self.owner, self.name, self.ours)

    def restore(self) -> None:
        """Put back what was there, unless somebody else has replaced ours meanwhile."""
        if not self.in_place:
            return
        if self.before is MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)

    @property
    def in_place(self) -> bool:
        """Whether ours is still there."""
        return self.owner.__dict__.get(self.name, MISSING) is self.ours


class Installation:
    """All that is installed together on one model.

    Args:
        swaps: in the order in which they may take effect one by one, while another thread runs the model.
    """

    def __init__(self, swaps: list[Swap]) -> None:
        self.swaps = swaps
        for swap in swaps:
            if isinstance(swap.ours, Installed):
                swap.ours.record = self

    def install(self) -> None:
        """Put all of ours there."""
        for swap in self.swaps:
            swap.install()

    def restore(self) -> None:
        """Put back all that was there, in the opposite order."""
        for swap in reversed(self.swaps):
            swap.restore()
