"""Measures one model with sharding off and on: the same prompt by turns, so that what else the machine does falls on
both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..sharding import Sharding
from .copies import Observer

# Each setting replies once to be counted, which also warms it up, and this often to be timed.
ROUNDS = 5
TOKENS = 32
# The first reply is cut off after this time once it has a few tokens (on the stack of 2023 a token could take four
# seconds), and the others are as long as it.
_LONGEST_SECONDS = 6.0
_FEWEST_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the replies with one setting of the switch gave.

    Attributes:
        seconds_per_token, first_token_seconds: median over the rounds; None if a reply was too short to tell.
        bytes_per_token, copies_per_token: between GPUs, mean over the counted reply, prompt included.
        peak: for each device, as "cuda:0", the most bytes that tensors held after any operator of the counted reply.
        reply: the new token ids of the counted reply.
    """

    seconds_per_token: float | None
    first_token_seconds: float | None
    bytes_per_token: float
    copies_per_token: float
    peak: dict[str, int]
    reply: tuple[int, ...]

    @property
    def total_peak(self) -> int:
        """Bytes over all devices."""
        return sum(self.peak.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same replies with sharding off and on."""

    off: Measured
    on: Measured

    @property
    def speedup(self) -> float | None:
        """How many times faster a token comes with sharding on."""
        off, on = self.off.seconds_per_token, self.on.seconds_per_token
        return off / on if off and on else None


class Cancelled(Exception):
    """Measuring was stopped, by whoever was asked between two tokens."""


def compare(
    model: Any,
    sharding: Sharding,
    inputs: Any,
    *,
    tokens: int = TOKENS,
    turn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    goes_on: Callable[[], bool] = lambda: True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Reply with sharding off and on, by turns.

    Args:
        model: a spread model.
        sharding: its Sharding, active. Between replies, and afterwards, it is as it was.
        inputs: a tokenizer's output for one prompt, on the model's main device.
        tokens: how many new tokens a reply has at most; all have the same number, fewer where the first is slow.
        turn: entered for each reply, to wait until nobody else replies.
        goes_on: asked after each token; False cancels.
        progress: told after each reply how many of how many are done.

    Raises:
        Cancelled: `goes_on` said no.
        RuntimeError: sharding has switched itself off after an error, perhaps before, and stays off.
    """
    counted: dict[bool, tuple[Observer, list[int]]] = {}
    timed: dict[bool, list[tuple[float | None, float | None]]] = {False: [], True: []}
    longest = _LONGEST_SECONDS
    of = 2 * (ROUNDS + 1)
    for done in range(of):
        on = done % 2 == 1
        _refuse_after_failure(sharding)
        with turn(), _switched(sharding, on):
            if not goes_on():
                raise Cancelled
            if on not in counted:
                with Observer(sharding.placement.devices) as observer:
                    counted[on] = observer, _reply(model, inputs, tokens, longest, goes_on)
                if observer.failure is not None:
                    raise observer.failure
                tokens, longest = len(counted[on][1]), math.inf
            else:
                _reply(model, inputs, tokens, longest, goes_on)
                current = sharding.meter.snapshot().current
                timed[on].append((current.seconds_per_token, current.first_token_seconds))
        progress(done + 1, of)
    _refuse_after_failure(sharding)
    return Comparison(*(_measured(*counted[on], timed[on]) for on in (False, True)))


def _refuse_after_failure(sharding: Sharding) -> None:
    """Sharding that gave up is for the user to switch on again; with it on it was accelerate that replied."""
    if sharding.failure:
        raise RuntimeError(sharding.failure)


def _measured(observer: Observer, reply: list[int], timed: list[tuple[float | None, float | None]]) -> Measured:
    return Measured(
        seconds_per_token=_median([seconds for seconds, _ in timed]),
        first_token_seconds=_median([first for _, first in timed]),
        bytes_per_token=observer.bytes_between_gpus / len(reply),
        copies_per_token=observer.copies_between_gpus / len(reply),
        peak={str(device): held for device, held in observer.peak.items()},
        reply=tuple(reply),
    )


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@contextlib.contextmanager
def _switched(sharding: Sharding, on: bool) -> Any:
    before = sharding.enabled
    try:
        sharding.enable() if on else sharding.disable()
        yield
    finally:
        if not sharding.failure:
            sharding.enable() if before else sharding.disable()


def _reply(model: Any, inputs: Any, tokens: int, longest: float, goes_on: Callable[[], bool]) -> list[int]:
    began = time.monotonic()
    cancelled = False
    asked = 0

    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        nonlocal cancelled, asked
        asked += 1
        cancelled = not goes_on()
        return cancelled or (asked >= _FEWEST_TOKENS and time.monotonic() - began > longest)

    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            stopping_criteria=sys.modules["transformers"].StoppingCriteriaList([stop]),
        )
    if cancelled:
        raise Cancelled
    is_seq2seq = getattr(model.config, "is_encoder_decoder", False)  # then the prompt is not in there, but one token
    reply: list[int] = out[0, 1 if is_seq2seq else inputs["input_ids"].shape[1] :].tolist()
    return reply
