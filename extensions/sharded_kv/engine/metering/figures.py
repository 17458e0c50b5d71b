"""The figures of replies, as frozen facts: what a snapshot of the meter holds."""

from __future__ import annotations

import dataclasses

from ..transfers import Traffic


@dataclasses.dataclass(frozen=True)
class Token:
    """One decode step.

    Attributes:
        time: when it ended, `time.time()`.
        seconds: since the step before; where a step gave several tokens, divided among them.
        sharded: whether sharding was on.
    """

    time: float
    seconds: float
    sharded: bool


@dataclasses.dataclass(frozen=True)
class Figures:
    """Speed and traffic of the latest reply, or part of a reply, with sharding on or off.

    Attributes:
        seconds_per_token: median over the recent decode steps; None before the second token.
        first_token_seconds: from the call of `generate()` until the first token was there; None until then.
        bytes_per_token, copies_per_token: between GPUs, mean over the recent decode steps with sharding on; with it
            off, when accelerate moves tensors and does not count, of the step that was observed last.
        tokens: how many were measured.
        prompt_tokens: of the reply's prompt; None until the first token was there.
        kept_tokens: how many of these a kept cache had already, so that they were not computed.
    """

    seconds_per_token: float | None = None
    first_token_seconds: float | None = None
    bytes_per_token: float | None = None
    copies_per_token: float | None = None
    tokens: int = 0
    prompt_tokens: int | None = None
    kept_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The inverse of `seconds_per_token`."""
        return 1 / self.seconds_per_token if self.seconds_per_token else None


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device, in bytes. weights + cache + rest + others + free = total.

    Attributes:
        device, name: "cuda:0", "NVIDIA GeForce RTX 4090".
        weights: the model's parameters and buffers.
        cache: the cache of the reply being written, and those that are kept for the next.
        rest: everything else of this process.
        others: other processes.
        free, total: of the device.
        peak: the most that tensors of this process held since the reply began.
    """

    device: str
    name: str
    weights: int
    cache: int
    rest: int
    others: int
    free: int
    total: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the meter knows now.

    Attributes:
        sharded: the latest figures with sharding on; None if there were none yet.
        unsharded: the same with sharding off.
        current: the one of both that was measured last.
        generating: whether a reply is being written.
        memory: for each device of the model.
        tokens: the recent decode steps, oldest first.
        traffic: all that has crossed between devices with sharding on.
        kept_tokens: how many tokens' keys and values are kept for the next reply.
    """

    sharded: Figures | None
    unsharded: Figures | None
    current: Figures
    generating: bool
    memory: tuple[DeviceMemory, ...]
    tokens: tuple[Token, ...]
    traffic: Traffic
    kept_tokens: int = 0

    @property
    def current_is_sharded(self) -> bool:
        """Whether the latest figures are with sharding on."""
        return self.current is not self.unsharded

    @property
    def seconds_per_token(self) -> float | None:
        """Of the latest reply."""
        return self.current.seconds_per_token

    @property
    def tokens_per_second(self) -> float | None:
        """Of the latest reply."""
        return self.current.tokens_per_second

    @property
    def first_token_seconds(self) -> float | None:
        """Of the latest reply."""
        return self.current.first_token_seconds

    @property
    def bytes_per_token(self) -> float | None:
        """Of the latest reply."""
        return self.current.bytes_per_token

    @property
    def copies_per_token(self) -> float | None:
        """Of the latest reply."""
        return self.current.copies_per_token
