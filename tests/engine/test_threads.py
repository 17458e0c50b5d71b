"""Several replies at once, switches at any moment, stops at any token: every reply is right, and nobody is stuck."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import StoppingCriteriaList

from extensions.sharded_kv import Sharding, shard
from tests import support
from tools import models

# On the newest stack, of which a switch takes less than half as long.
SWITCHES = 10_000 if Version("5") <= Version(transformers.__version__) else 2_000
MODES = ("eager", "graph") if Version("4.44") <= Version(transformers.__version__) else ("eager",)
# A reply of these tests takes less than a second, with all others at once; whoever takes so long waits for ever.
PATIENCE_SECONDS = 200
LAYERS = 2
TOKENS = 12


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


def spread(places: list[str], seed: int = 0) -> Any:
    return support.spread(models.build("llama", seed=seed, num_hidden_layers=LAYERS), places)


def reply(model: Any, place: str, prompt: int, **options: Any) -> list[list[int]]:
    """A greedy reply to the prompt of that number; each has another length and another batch size."""
    batch, length = 1 + prompt % 3, 5 + 2 * prompt
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(batch, length, seed=prompt).items()}
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)
    tokens: list[list[int]] = out.tolist()
    return tokens


def together(*jobs: Callable[[], Any]) -> None:
    """Run each job in a thread of its own.

    Raises:
        BaseException: what the first of them raised that failed.
        AssertionError: one is still running after `PATIENCE_SECONDS`.
    """
    errors: list[BaseException] = []

    def run(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]


def switch(sharding: Sharding, times: int, seed: int) -> None:
    """Turn sharding on and off, and change its mode, at random moments."""
    draw = random.Random(seed)
    for _ in range(times):
        time.sleep(draw.choice((0, 0, 0, 0.001)))
        action = draw.choice(("enable", "disable", *MODES))
        if action in MODES:
            sharding.mode = action
        else:
            getattr(sharding, action)()


def test_four_replies_at_once_are_right_while_a_fifth_thread_switches(places: list[str]) -> None:
    model = spread(places)
    right = {prompt: reply(model, places[0], prompt) for prompt in range(4)}
    sharding, over = shard(model), threading.Event()
    replies = [0] * 4

    def write(prompt: int) -> None:
        try:
            while not over.is_set():
                assert reply(model, places[0], prompt) == right[prompt]
                replies[prompt] += 1
        finally:
            over.set()

    def switches() -> None:
        try:
            switch(sharding, SWITCHES, seed=0)
            while min(replies) < SWITCHES // 1_000 and not over.is_set():  # where replies take long
                switch(sharding, 100, seed=sum(replies))
        finally:
            over.set()

    together(switches, *(lambda prompt=prompt: write(prompt) for prompt in range(4)))
    assert sharding.failure == ""
    assert min(replies) >= SWITCHES // 1_000
    sharding.enable()
    assert reply(model, places[0], 0) == right[0]


def test_two_models_at_once_keep_apart(places: list[str]) -> None:
    made = [spread(places, seed) for seed in range(2)]
    right = [[reply(model, places[0], prompt) for prompt in range(4)] for model in made]
    assert right[0] != right[1]
    shardings = [shard(model) for model in made]

    def write(which: int) -> None:
        for prompt in range(4):
            assert reply(made[which], places[0], prompt) == right[which][prompt]

    together(
        *(lambda which=which: write(which) for which in (0, 1, 0, 1)),
        *(lambda sharding=sharding: switch(sharding, 100, seed=1) for sharding in shardings),
    )


class Stopped(Exception):
    """What the webui's stopping criterion raises."""


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_that_is_stopped_at_any_token_leaves_the_next_one_right(places: list[str], mode: str) -> None:
    model = spread(places)
    right = reply(model, places[0], 0)
    sharding = shard(model)
    sharding.mode = mode
    for at in range(1, TOKENS):  # at the last token transformers 4.28 asks nobody
        asked = itertools.count(1)

        def stop(*_: Any, asked: Iterator[int] = asked, at: int = at, **__: Any) -> bool:
            if next(asked) == at:
                raise Stopped
            return False

        with pytest.raises(Stopped):
            reply(model, places[0], 1, stopping_criteria=StoppingCriteriaList([stop]))
        assert reply(model, places[0], 0) == right
        assert not sharding.meter.snapshot().generating
    assert sharding.failure == ""
