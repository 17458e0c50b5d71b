"""Counts what crosses between GPUs inside a `with`, whoever moves it: on simulated devices or on real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from extensions.sharded_kv.engine.metering import copies

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
    with simulated.record() if kind == "sim" else copies.Observer() as traffic:
        yield traffic


def between_gpus(counts: dict[Pair, int]) -> dict[Pair, int]:
    """Counts without what came from or went to the host."""
    return {pair: n for pair, n in counts.items() if n and copies.between_gpus(pair)}


def total(counts: dict[Pair, int]) -> int:
    """Sum of the counts between GPUs."""
    return sum(between_gpus(counts).values())
