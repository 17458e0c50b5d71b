"""Memory: none is left behind, accelerate's is enough, and a reply that ran out of it harms no other."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import StoppingCriteriaList

from extensions.sharded_kv import shard
from tests import support
from tools import models, simulated

VERSION = Version(transformers.__version__)
MODES = ("eager", "graph") if Version("4.44") <= VERSION else ("eager",)
CYCLES = 100


@pytest.fixture
def only_simulated(devices: support.Devices) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities are set, and peaks exact, on simulated devices")


def reply(model: Any, place: str, tokens: int = 6, length: int = 9, **options: Any) -> list[list[int]]:
    """A greedy reply to three prompts, two of them with padding."""
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(3, length).items()}
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    replied: list[list[int]] = out.tolist()
    return replied


@contextlib.contextmanager
def capacity(index: int, size: int) -> Iterator[None]:
    """Within, the device has `size` bytes."""
    simulated.set_capacity(index, size)
    try:
        yield
    finally:
        simulated.set_capacity(index, None)


@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_models_loaded_and_unloaded_leave_no_byte_and_no_model(devices: support.Devices, mode: str) -> None:
    places, living = devices(2), []

    def load_reply_and_unload() -> None:
        model = support.spread(models.build("llama", num_hidden_layers=2), places)
        sharding = shard(model)
        sharding.mode = mode
        reply(model, places[0], tokens=4)
        assert sharding.reason_for_eager == ""
        living.append(weakref.ref(model))

    def allocated() -> list[int]:
        gc.collect()
        return [devices.runtime.memory_allocated(place) for place in places]

    load_reply_and_unload()  # libraries take their work space once for all
    before = allocated()
    for _ in range(CYCLES):
        load_reply_and_unload()
    assert allocated() == before
    assert not any(model() is not None for model in living)


@pytest.mark.skipif(Version("5") > VERSION, reason="caches lie elsewhere under accelerate, in part")
@pytest.mark.parametrize("length", [24, 96])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "gptj"])
def test_devices_that_are_just_large_enough_for_accelerate_are_large_enough(
    devices: support.Devices, only_simulated: None, family: str, count: int, length: int
) -> None:
    places = devices(count)
    model = support.spread(models.build(family), places)
    gc.collect()
    simulated.reset_peak()
    right = reply(model, places[0], length=length)
    peaks = [simulated.peak(index) for index in range(count)]
    shard(model)
    gc.collect()
    with contextlib.ExitStack() as stack:
        for index, peak in enumerate(peaks):
            stack.enter_context(capacity(index, peak))
        assert reply(model, places[0], length=length) == right


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5], ids="token-{}".format)
@pytest.mark.parametrize("stage", [0, 1, 2, 3], ids="stage-{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_memory_that_runs_out_in_any_stage_leaves_the_next_reply_right(
    devices: support.Devices, only_simulated: None, mode: str, stage: int, at: int
) -> None:
    places = devices(4)
    model = support.spread(models.build("llama"), places)
    right = reply(model, places[0])
    sharding = shard(model)
    sharding.mode = mode
    asked = itertools.count(1)

    def fill(*_: Any, **__: Any) -> bool:
        if next(asked) == at:
            simulated.set_capacity(stage, simulated.allocated(stage))
        return False

    # Replays take no memory, but for what the caller gets.
    goes_on = mode == "graph" and at >= 3 and stage > 0
    with (
        capacity(stage, simulated.allocated(stage) if at == 0 else 1 << 40),
        contextlib.nullcontext() if goes_on else pytest.raises(torch.OutOfMemoryError),
    ):
        assert reply(model, places[0], stopping_criteria=StoppingCriteriaList([fill])) == right
    assert sharding.failure == ""
    assert sharding.enabled
    assert reply(model, places[0]) == right
    assert sharding._runtime.thread.state is None
