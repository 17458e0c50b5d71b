"""What the meter says of a reply, with sharding on and off, and what it costs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C import _len_torch_dispatch_stack
from transformers import StoppingCriteriaList

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine import devices as device_memory
from extensions.sharded_kv.engine.compat import has_cache_objects
from extensions.sharded_kv.engine.metering import memory as meter_memory
from extensions.sharded_kv.engine.metering.figures import Figures
from tests import support
from tools import models
from tools.traffic import total


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


@pytest.fixture
def model(places: list[str]) -> Any:
    return support.spread(models.build("llama"), places)


def reply(model: Any, place: str, tokens: int = 10, **options: Any) -> Any:
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(batch=1).items()}
    return model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options)


def test_before_the_first_reply_nothing_is_claimed(model: Any) -> None:
    snapshot = shard(model).meter.snapshot()
    assert snapshot.current == Figures()
    assert snapshot.seconds_per_token is None
    assert snapshot.tokens_per_second is None
    assert snapshot.sharded is None
    assert snapshot.tokens == ()


def test_seconds_per_token_is_the_time_between_two_decode_steps(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    model.model.layers[3].register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    reply(model, places[0])
    snapshot = meter.snapshot()
    assert 0.05 < snapshot.seconds_per_token < 5
    assert snapshot.tokens_per_second == 1 / snapshot.seconds_per_token
    assert 0.05 < snapshot.first_token_seconds < 10


def test_every_decode_step_is_on_the_chart(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    reply(model, places[0], tokens=10)
    tokens = meter.snapshot().tokens
    assert len(tokens) in (8, 9)  # before 4.39 generation did not ask its other criteria after the last token
    assert all(token.sharded and token.seconds > 0 for token in tokens)
    assert [token.time for token in tokens] == sorted(token.time for token in tokens)


def test_figures_with_sharding_off_are_kept_beside_those_with_it_on(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    reply(model, places[0])
    sharding.disable()
    reply(model, places[0])
    snapshot = sharding.meter.snapshot()
    assert snapshot.sharded.bytes_per_token > 0
    assert snapshot.unsharded.seconds_per_token > 0
    assert snapshot.unsharded.copies_per_token > snapshot.sharded.copies_per_token
    assert snapshot.current == snapshot.unsharded


def test_bytes_and_copies_per_token_are_those_that_crossed(
    devices: support.Devices, model: Any, places: list[str]
) -> None:
    meter = shard(model).meter
    reply(model, places[0], tokens=4)
    with devices.traffic() as short:
        reply(model, places[0], tokens=4)
    with devices.traffic() as long:
        reply(model, places[0], tokens=12)
    snapshot = meter.snapshot()
    assert snapshot.copies_per_token == (total(long.copies) - total(short.copies)) / 8
    # A mask grows by a few bytes with each token.
    assert snapshot.bytes_per_token == pytest.approx((total(long.bytes) - total(short.bytes)) / 8, rel=0.05)


def test_a_reply_that_is_switched_off_in_its_midst_keeps_the_last_first_token_with_it_off(
    model: Any, places: list[str]
) -> None:
    sharding = shard(model)
    sharding.disable()
    reply(model, places[0])
    first = sharding.meter.snapshot().unsharded.first_token_seconds
    sharding.enable()
    steps = iter(range(100))

    def switch(input_ids: Any, scores: Any, **_: Any) -> bool:
        if next(steps) == 4:
            sharding.disable()
        return False

    reply(model, places[0], stopping_criteria=StoppingCriteriaList([switch]))
    assert sharding.meter.snapshot().unsharded.tokens < 9
    assert sharding.meter.snapshot().unsharded.first_token_seconds == first


def test_with_sharding_off_one_decode_step_of_the_reply_is_counted(
    devices: support.Devices, model: Any, places: list[str]
) -> None:
    sharding = shard(model)
    sharding.disable()
    with devices.traffic() as first_token:
        reply(model, places[0], tokens=1)
    with devices.traffic() as two_tokens:
        reply(model, places[0], tokens=2)
    reply(model, places[0], tokens=8)
    figures = sharding.meter.snapshot().unsharded
    assert figures.copies_per_token == total(two_tokens.copies) - total(first_token.copies)
    assert figures.bytes_per_token == total(two_tokens.bytes) - total(first_token.bytes)


def test_a_long_reply_is_counted_again(model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extensions.sharded_kv.engine.metering.recorder._OBSERVE_EVERY", 4)
    sharding = shard(model)
    sharding.disable()
    reply(model, places[0], tokens=10)
    snapshot = sharding.meter.snapshot()
    assert snapshot.unsharded.tokens - len(snapshot.tokens) in (2, 3)


def test_the_step_that_counts_is_not_timed(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    sharding.disable()
    reply(model, places[0], tokens=6)
    meter = sharding.meter.snapshot()
    assert meter.unsharded.tokens - len(meter.tokens) == 1


def test_a_reply_that_fails_while_a_step_is_counted_leaves_nothing_watching(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    sharding.disable()
    calls = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            assert _len_torch_dispatch_stack() == 1
            raise ArithmeticError

    model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        reply(model, places[0])
    assert _len_torch_dispatch_stack() == 0


def test_several_tokens_in_one_step_share_its_time(model: Any, places: list[str]) -> None:
    way = next(way for way in support.WAYS if way.name == "prompt-lookup")
    if not way.needs(model):
        pytest.skip("this transformers has no prompt lookup")
    meter = shard(model).meter
    way.run(model, places[0])
    assert meter.snapshot().sharded.tokens == way.new_tokens - 1


def test_the_users_own_stopping_criteria_are_asked_too(model: Any, places: list[str]) -> None:
    shard(model)
    calls = []

    class Stop:
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
            calls.append(1)
            return len(calls) == 3

    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts(batch=1).items()}
    criteria = StoppingCriteriaList([Stop()])
    out = model.generate(**inputs, do_sample=False, max_new_tokens=10, stopping_criteria=criteria)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    assert len(criteria) == 1


def test_a_stopped_reply_is_over(model: Any, places: list[str]) -> None:
    meter = shard(model).meter

    class Abort:
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
            assert meter.snapshot().generating
            raise InterruptedError

    with pytest.raises(InterruptedError):
        reply(model, places[0], stopping_criteria=StoppingCriteriaList([Abort()]))
    assert not meter.snapshot().generating


def test_memory_adds_up_on_every_device(devices: support.Devices, model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    for memory, place in zip(meter.snapshot().memory, places, strict=True):
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if str(p.device) == place)
        buffers = sum(b.numel() * b.element_size() for b in model.buffers() if str(b.device) == place)
        assert memory.device == place
        assert memory.name
        assert memory.weights == weights + buffers
        assert memory.weights + memory.cache + memory.rest + memory.others + memory.free == memory.total


def test_the_cache_of_a_reply_is_on_the_device_of_its_layers(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    seen = []

    class Look:
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
            meter.memory.next_look = 0
            seen.append([memory.cache for memory in meter.snapshot().memory])
            return False

    reply(model, places[0], stopping_criteria=StoppingCriteriaList([Look()]))
    # Layers x (keys and values) x hidden size x 4 bytes for each token that there is room for: the last is not read
    # again, and the one before makes its own.
    per_token = 3 * 2 * model.config.hidden_size * 4
    tokens = 9 + 10 - 2 if has_cache_objects() else 10
    assert seen[2] == [tokens * per_token] * 2
    assert [memory.cache for memory in meter.snapshot().memory] == [0, 0]


def test_the_peak_is_of_the_reply_and_torchs_own_mark_is_not_reset(
    devices: support.Devices, model: Any, places: list[str]
) -> None:
    meter = shard(model).meter
    big = torch.ones(1_000_000, device=places[1])
    del big
    mark = devices.runtime.max_memory_allocated(places[1])
    reply(model, places[0])
    memory = meter.snapshot().memory[1]
    assert memory.weights < memory.peak < mark
    assert devices.runtime.max_memory_allocated(places[1]) == mark


def test_a_snapshot_may_be_taken_by_another_thread_during_a_reply(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    stop = threading.Event()
    snapshots, errors = [], []

    def poll() -> None:
        while not stop.is_set():
            try:
                snapshots.append(meter.snapshot())
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    reply(model, places[0], tokens=20)
    stop.set()
    thread.join()
    assert not errors
    assert any(snapshot.generating for snapshot in snapshots)


def test_a_snapshot_while_modules_are_added_has_the_weights_of_the_one_before(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = shard(model).meter
    before = meter.snapshot()

    def parameters() -> Iterator[Any]:
        yield next(model.lm_head.parameters())
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(model, "parameters", parameters)
    assert [m.weights for m in meter.snapshot().memory] == [m.weights for m in before.memory]


def test_replies_in_two_threads_are_both_counted(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    threads = [threading.Thread(target=reply, args=(model, places[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(meter.snapshot().tokens) in (16, 18)
    assert not meter.snapshot().generating


def test_metering_a_step_costs_little(model: Any) -> None:
    """Per step: one call as a stopping criterion and one before each forward. 1 % of a 20 ms step is 200 us."""
    meter = shard(model).meter
    recording = meter.begin()
    rounds = 2000
    started = time.perf_counter()
    for length in range(rounds):
        recording(torch.zeros(1, length), None)
        recording.forward_begins(None)
    seconds = (time.perf_counter() - started) / rounds
    recording.end()
    assert seconds < 200e-6


def test_metering_reads_nothing_off_a_device(devices: support.Devices, model: Any, places: list[str]) -> None:
    if devices.kind != "sim":
        pytest.skip("reads are counted on simulated devices")
    sharding = shard(model)
    with devices.traffic() as metered:
        reply(model, places[0])
    sharding._reply_patches.restore()
    with devices.traffic() as bare:
        reply(model, places[0])
    assert metered.reads == bare.reads


def test_a_reply_of_one_token_has_a_first_token_time(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    reply(model, places[0], tokens=1)
    snapshot = meter.snapshot()
    if snapshot.sharded is None:
        pytest.skip("before 4.39 generation did not ask its other criteria after the last token")
    assert snapshot.first_token_seconds > 0
    assert snapshot.seconds_per_token is None


def test_two_replies_at_once_do_not_share_their_bytes(model: Any, places: list[str]) -> None:
    meter = shard(model).meter
    reply(model, places[0], tokens=20)
    alone = meter.snapshot().copies_per_token
    threads = [threading.Thread(target=reply, args=(model, places[0], 20)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.snapshot().copies_per_token == alone


def test_memory_that_cannot_be_read_costs_nobody_a_reply(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard(model)

    def broken(device: torch.device) -> None:
        raise RuntimeError("driver says no")

    monkeypatch.setattr(meter_memory, "allocated", broken)
    assert reply(model, places[0]).shape[1] == 19
    assert "cannot be read" in caplog.text


class FakeDriver:
    """nvidia-ml-py, as far as we ask it: this process holds 5 GiB of each device."""

    NVMLError = RuntimeError

    @staticmethod
    def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    @staticmethod
    def nvmlDeviceGetComputeRunningProcesses(handle: str) -> list[Any]:
        return [
            SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=7 << 30),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 << 30),
        ]


def test_the_driver_tells_this_process_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes": {"all": {"current": 3 << 30, "peak": 4 << 30}}}
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (10 << 30, 24 << 30),
        memory_stats_as_nested_dict=lambda device: stats,
        memory_reserved=lambda device: 4 << 30,
        get_device_properties=lambda device: SimpleNamespace(uuid="1234"),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    device = torch.device("cuda", 1)
    monkeypatch.setattr(device_memory, "_nvml", lambda: FakeDriver)
    assert device_memory.usage(device) == device_memory.Usage(
        allocated=3 << 30, process=5 << 30, used=14 << 30, total=24 << 30
    )
    monkeypatch.setattr(device_memory, "_nvml", lambda: None)
    assert device_memory.usage(device).process == 4 << 30


@pytest.mark.skipif(torch.version.cuda is not None and torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_there_is_nobody_to_ask() -> None:
    assert device_memory._nvml.__wrapped__() is None
