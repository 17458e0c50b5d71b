"""Measuring one model with sharding off and on, by turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine.metering import compare
from extensions.sharded_kv.engine.transfers import ForwardState
from tests import support
from tools import models
from tools.traffic import total

TOKENS = 6


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


@pytest.fixture
def model(places: list[str]) -> Any:
    return support.spread(models.build("llama"), places)


@pytest.fixture
def sharding(model: Any) -> Sharding:
    return shard(model)


@pytest.fixture
def run(model: Any, sharding: Sharding, places: list[str]) -> Any:
    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts(batch=1).items()}
    return lambda **options: compare.compare(model, sharding, inputs, tokens=TOKENS, **options)


def test_it_measures_both_settings(run: Any) -> None:
    comparison = run()
    for measured in (comparison.off, comparison.on):
        assert measured.seconds_per_token > 0
        assert measured.first_token_seconds > 0
        assert measured.total_peak > 0
    assert comparison.speedup == comparison.off.seconds_per_token / comparison.on.seconds_per_token


def test_the_replies_are_the_same(run: Any) -> None:
    comparison = run()
    assert comparison.off.reply == comparison.on.reply


def test_it_counts_what_crosses_with_each_setting(
    run: Any, model: Any, sharding: Sharding, devices: support.Devices, places: list[str]
) -> None:
    comparison = run()
    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts(batch=1).items()}
    for measured, switch in ((comparison.off, sharding.disable), (comparison.on, sharding.enable)):
        switch()
        with devices.traffic() as crossed:
            model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        assert measured.bytes_per_token == total(crossed.bytes) / TOKENS
        assert measured.copies_per_token == total(crossed.copies) / TOKENS


def test_peak_memory_is_that_of_the_reply_and_not_of_those_before(run: Any, places: list[str]) -> None:
    first = run()
    assert set(first.on.peak) == set(places)
    assert run().on.peak == first.on.peak


@pytest.mark.parametrize("enabled", [True, False])
def test_the_switch_is_afterwards_as_it_was(run: Any, sharding: Sharding, enabled: bool) -> None:
    sharding.enable() if enabled else sharding.disable()
    run()
    assert sharding.enabled == enabled


def test_each_reply_waits_for_its_turn_and_gives_it_back(run: Any, sharding: Sharding) -> None:
    turns = []

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        assert not turns or turns[-1] == "over"
        turns.append("mine")
        yield
        assert not sharding.meter.snapshot().generating
        turns.append("over")

    run(turn=turn)
    assert turns.count("over") == 2 * (compare.ROUNDS + 1)


def test_progress_goes_up_to_the_end(run: Any) -> None:
    steps: list[tuple[int, int]] = []
    run(progress=lambda done, of: steps.append((done, of)))
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]


@pytest.mark.parametrize("asked", [1, 5, 40])
def test_it_can_be_cancelled_between_any_two_tokens(run: Any, sharding: Sharding, asked: int) -> None:
    left = iter(range(asked))
    with pytest.raises(compare.Cancelled):
        run(goes_on=lambda: next(left, None) is not None)
    assert sharding.enabled


def test_where_replies_are_slow_all_are_cut_to_the_length_of_the_first(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_LONGEST_SECONDS", 0.0)
    comparison = run()
    assert len(comparison.off.reply) == compare._FEWEST_TOKENS < TOKENS
    assert comparison.off.reply == comparison.on.reply


@pytest.mark.parametrize("part", ["move_inputs", "_copy"])
def test_sharding_that_gives_up_meanwhile_ends_it_and_stays_off(
    run: Any, sharding: Sharding, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(ForwardState, part, None)
    with pytest.raises(RuntimeError, match="Switched off after an error"):
        run()
    assert not sharding.enabled
    assert "TypeError" in sharding.failure


def test_sharding_that_gave_up_before_is_not_switched_on_by_it(
    run: Any, model: Any, sharding: Sharding, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ForwardState, "move_inputs", None)
        support.GREEDY.run(model, places[0])
    with pytest.raises(RuntimeError, match="Switched off after an error"):
        run()
    assert not sharding.enabled
    assert sharding.failure != ""
