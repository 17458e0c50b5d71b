"""Counts what crosses between GPUs inside a `with`, whoever moves it: on simulated devices or on real ones."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import simulated

Pair = tuple[str, str]


class Traffic(Protocol):
    """What has crossed so far: for each (from, to) pair of devices, the host and the meta device among them."""

    @property
    def copies(self) -> dict[Pair, int]: ...

    @property
    def bytes(self) -> dict[Pair, int]: ...


@contextlib.contextmanager
def record(kind: str) -> Iterator[Traffic]:
    """Count copies and bytes between devices.

    Args:
        kind: "sim", or the type of real devices ("cuda"). On real ones each operator costs some microseconds more
            while it counts: do not take the time in the same run.
    """
    with simulated.record() if kind == "sim" else _RealTraffic() as traffic:
        yield traffic


def between_gpus(counts: dict[Pair, int]) -> dict[Pair, int]:
    """Counts without what came from or went to the host."""
    return {pair: n for pair, n in counts.items() if n and not {"cpu", "meta"} & set(pair)}


def total(counts: dict[Pair, int]) -> int:
    """Sum of the counts between GPUs."""
    return sum(between_gpus(counts).values())


class _RealTraffic(TorchDispatchMode):
    """Sees every operator of this thread; `_to_copy` and `copy_` are those by which tensors change devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[Pair] = Counter()
        self.bytes: Counter[Pair] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self._count(args[0], out)
        elif func is torch.ops.aten.copy_.default:
            self._count(args[1], out)
        return out

    def _count(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.device != target.device:
            pair = (str(source.device), str(target.device))
            self.copies[pair] += 1
            self.bytes[pair] += target.numel() * target.element_size()
