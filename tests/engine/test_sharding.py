"""On, off, off for good: what `shard()` does to a model, and that nothing of it stays."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine.patches import PatchSet, Wrapped
from extensions.sharded_kv.engine.transfers import ForwardState
from tests import support
from tools import models


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


@pytest.fixture(autouse=True)
def _current_device(devices: support.Devices) -> Iterator[None]:
    """What fails here may leave another device the current one, which is nothing for the next test."""
    with devices.runtime.device(0):
        yield


@pytest.fixture
def model(places: list[str]) -> Any:
    return support.spread(models.build("llama"), places)


def attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module's own, with the very objects."""
    return {(name, key): value for name, module in model.named_modules() for key, value in vars(module).items()}


def is_as_before(model: nn.Module, before: dict[tuple[str, str], Any]) -> bool:
    now = attributes(model)
    return now.keys() == before.keys() and all(now[key] is before[key] for key in now)


def tokens(model: Any, place: str, **options: Any) -> list[list[int]]:
    return support.GREEDY.run(model, place).tokens.tolist()


@pytest.fixture
def right() -> list[list[int]]:
    return support.on_cpu("llama", support.GREEDY).tokens.tolist()


def test_disable_gives_back_the_very_hooks_and_forwards(model: Any) -> None:
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    hooks = {name: module.__dict__.get("_hf_hook") for name, module in model.named_modules()}
    shard(model).disable()
    for name, module in model.named_modules():
        assert module.__dict__.get("forward") is forwards[name], name
        assert module.__dict__.get("_hf_hook") is hooks[name], name


def test_detach_leaves_no_attribute_of_ours(model: Any) -> None:
    before = attributes(model)
    shard(model).detach()
    assert is_as_before(model, before)
    assert not any(len(module._forward_pre_hooks) for module in model.modules())


def test_detach_while_off_leaves_no_attribute_of_ours(model: Any) -> None:
    before = attributes(model)
    sharding = shard(model)
    sharding.disable()
    sharding.detach()
    assert is_as_before(model, before)


def test_on_off_and_on_again_reply_the_same(model: Any, places: list[str], right: list[list[int]]) -> None:
    sharding = shard(model)
    for switch in (sharding.disable, sharding.enable, sharding.disable, sharding.disable, sharding.enable):
        switch()
        assert tokens(model, places[0]) == right
    assert sharding.enabled


def test_switching_between_two_steps_goes_on_with_the_same_cache(
    model: Any, places: list[str], right: list[list[int]]
) -> None:
    sharding = shard(model)

    class Switch:
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
            (sharding.disable if sharding.enabled else sharding.enable)()
            return False

    from transformers import StoppingCriteriaList

    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts().items()}
    reply = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=support.GREEDY.new_tokens,
        min_new_tokens=support.GREEDY.new_tokens,
        stopping_criteria=StoppingCriteriaList([Switch()]),
    )
    assert reply.tolist() == right


def test_sharding_a_model_twice_gives_the_same_sharding(model: Any) -> None:
    assert shard(model) is shard(model)


def test_sharding_it_again_after_detach_works(model: Any, places: list[str], right: list[list[int]]) -> None:
    first = shard(model)
    first.detach()
    assert shard(model) is not first
    assert tokens(model, places[0]) == right


def test_generate_sees_the_signature_of_the_models_own_forward(model: Any) -> None:
    signature = inspect.signature(model.forward)
    shard(model)
    assert inspect.signature(model.forward) == signature


def test_a_deleted_model_dies_though_its_sharding_lives(devices: support.Devices, places: list[str]) -> None:
    warm_up = support.spread(models.build("gptj"), places)  # libraries take their work space once for all
    support.GREEDY.run(warm_up, places[0])
    del warm_up
    gc.collect()
    before = [devices.runtime.memory_allocated(place) for place in places]
    model = support.spread(models.build("gptj"), places)
    sharding = shard(model)
    support.GREEDY.run(model, places[0])
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert [devices.runtime.memory_allocated(place) for place in places] == before
    assert not sharding.active
    assert not sharding.enabled
    assert "unloaded" in sharding.reason
    sharding.enable()
    sharding.disable()
    sharding.detach()
    assert sharding.meter.snapshot().generating is False


def test_a_deleted_model_dies_also_after_being_switched_off(devices: support.Devices, places: list[str]) -> None:
    model = support.spread(models.build("llama"), places)
    sharding = shard(model)
    sharding.disable()
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert not sharding.enabled


class Injected(Exception):
    """Raised by a test inside a forward."""


@pytest.mark.parametrize("error", [Injected, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [1, 4])
def test_an_exception_in_a_block_leaves_no_memo_and_the_callers_device(
    devices: support.Devices, model: Any, places: list[str], right: list[list[int]], error: type, layer: int
) -> None:
    sharding = shard(model)
    seen = []

    def fail(module: nn.Module, args: Any) -> None:
        seen.append(sharding._runtime.thread.state)
        raise error("injected")

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        tokens(model, places[0])
    hook.remove()
    assert sharding._runtime.thread.state is None
    assert seen[0]._memo == {}
    assert devices.runtime.current_device() == 0
    assert tokens(model, places[0]) == right


def test_out_of_memory_on_the_second_device_leaves_the_next_reply_right(
    devices: support.Devices, model: Any, places: list[str], right: list[list[int]]
) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities are set on simulated devices")
    from tools import simulated

    shard(model)
    simulated.set_capacity(1, simulated.allocated(1) + 64)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            tokens(model, places[0])
    finally:
        simulated.set_capacity(1, None)
    gc.collect()
    assert tokens(model, places[0]) == right


def test_the_callers_current_device_is_back_after_a_forward(devices: support.Devices, model: Any) -> None:
    shard(model)
    runtime = devices.runtime
    runtime.set_device(1)
    try:
        tokens(model, f"{devices.kind}:0")
        assert runtime.current_device() == 1
    finally:
        runtime.set_device(0)


def test_a_forward_within_a_forward_has_a_memo_of_its_own(
    model: Any, places: list[str], right: list[list[int]]
) -> None:
    shard(model)
    other = {name: tensor.to(places[0]) for name, tensor in support.prompts(seed=5).items()}
    calls = []

    def nested(module: nn.Module, args: Any) -> None:
        if not calls:
            calls.append(1)
            with torch.no_grad():
                model(**other)
            calls.clear()

    model.model.layers[4].mlp.register_forward_pre_hook(nested)
    assert tokens(model, places[0]) == right


def test_a_model_may_be_sharded_within_the_forward_of_another(
    model: Any, places: list[str], right: list[list[int]]
) -> None:
    shard(model)
    other = support.spread(models.build("llama", num_hidden_layers=2), places)
    found: list[Sharding] = []

    def hook(module: nn.Module, args: Any) -> None:
        found.append(shard(other))

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    assert tokens(model, places[0]) == right
    handle.remove()
    assert found[0].enabled
    assert all(sharding is found[0] for sharding in found)


def test_a_cache_given_by_position_is_undone_as_well(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(transformers, "DynamicCache") or not support._knows("cache_implementation")(model):
        pytest.skip("this transformers keeps caches in tuples")
    ids = support.prompts(1)["input_ids"].to(places[0])
    names = list(inspect.signature(model.forward).parameters)
    logits = []
    for on in (False, True):
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            given: dict[str, Any] = {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True}
            args = [given.get(name) for name in names[: names.index("past_key_values") + 1]]
            with monkeypatch.context() as patch:
                if on:
                    support.FailsLater(patch, ForwardState, "enter", 1, TypeError("of ours"))
                logits.append(model(*args, use_cache=True).logits.cpu())
        shard(model)
    assert torch.equal(*logits)


@pytest.mark.parametrize("nothing", [None, "llama-7b", 7, [], {}, nn.Linear])
def test_what_is_no_model_is_a_type_error(nothing: Any) -> None:
    with pytest.raises(TypeError, match=r"shard\(\) takes a loaded model"):
        shard(nothing)


def inactive(model: Any) -> Sharding:
    sharding = shard(model)
    assert not sharding.active
    assert not sharding.enabled
    sharding.enable()
    sharding.disable()
    sharding.detach()
    return sharding


def test_a_model_on_one_device_is_left_alone(places: list[str]) -> None:
    model = models.build("llama").to(places[1])
    before = attributes(model)
    assert "one device" in inactive(model).reason
    assert is_as_before(model, before)


def test_a_hooked_model_on_one_device_is_left_alone(places: list[str]) -> None:
    model = models.build("llama")
    model = dispatch_model(model, models.device_map(model, places[:1]), main_device=places[0])
    sharding = shard(model)
    assert not sharding.active
    assert not sharding.enabled
    assert "one device" in sharding.reason


def test_a_detached_sharding_says_so(model: Any) -> None:
    sharding = shard(model)
    sharding.detach()
    assert not sharding.active
    assert "detached" in sharding.reason


def test_a_model_on_meta_is_not_loaded_yet() -> None:
    assert "meta" in inactive(models.build("llama").to("meta")).reason


def test_a_plain_module_is_left_alone() -> None:
    assert "one device" in inactive(nn.Linear(3, 3)).reason
    assert "no weights" in inactive(nn.ReLU()).reason


def test_a_model_spread_by_hand_is_told_how_to_load(places: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3).to(places[0]), nn.Linear(3, 3).to(places[1]))
    assert "device_map" in inactive(model).reason


def test_an_object_that_is_no_torch_model_gets_a_reason() -> None:
    class LlamaServer:
        def generate(self) -> None: ...

    sharding = shard(LlamaServer())
    assert not sharding.active
    assert "LlamaServer" in sharding.reason
    sharding.enable()
    sharding.disable()
    sharding.detach()
    assert sharding.meter.snapshot().memory == ()


def test_a_model_dispatched_again_runs_by_its_new_placement_once_sharded_again(
    model: Any, places: list[str], right: list[list[int]]
) -> None:
    sharding = shard(model)
    model = support.spread(model, places, split=[1, 5])
    assert tokens(model, places[0]) == right
    assert shard(model) is sharding
    assert sharding.enabled
    assert len(sharding.placement.stages[0].blocks) < len(sharding.placement.stages[1].blocks)
    assert tokens(model, places[0]) == right


def test_a_model_dispatched_again_is_not_said_to_be_sharded(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    support.spread(model, places, split=[1, 5])
    assert not sharding.enabled


def test_a_moved_model_goes_on_where_it_is(
    model: Any, places: list[str], right: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    sharding = shard(model)
    model.to(places[1])
    with caplog.at_level(logging.WARNING):
        assert tokens(model, places[1]) == right
    assert "moved" in caplog.text
    assert not sharding.active
    assert "one device" in sharding.reason


def test_hooks_removed_by_accelerate_are_gone_for_good(model: Any, right: list[list[int]]) -> None:
    sharding = shard(model)
    remove_hook_from_submodules(model)
    assert not sharding.enabled
    sharding.detach()
    model.to("cpu")
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    assert tokens(model, "cpu") == right


class Wrapper(nn.Module):
    """A model in a wrapper, as AutoGPTQ's or a PeftModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return self.model.generate(**kwargs)


def test_a_wrapper_sharded_later_takes_over(model: Any, places: list[str], right: list[list[int]]) -> None:
    inner = shard(model)
    wrapper = Wrapper(model)
    wrapper.config = model.config
    outer = shard(wrapper)
    assert outer is not inner
    assert outer.enabled
    assert not inner.enabled
    assert tokens(wrapper, places[0]) == right
    outer.detach()
    assert tokens(model, places[0]) == right


def test_a_deep_copy_of_a_sharded_model_is_one_that_was_never_sharded(
    model: Any, places: list[str], right: list[list[int]]
) -> None:
    if not hasattr(model.forward, "func"):
        pytest.skip("accelerate 0.19 binds the forwards of a copy to the original")
    shard(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert tokens(twin, places[0]) == right
    sharding = shard(twin)
    assert not any(block.keeps_hooks for block in sharding.placement.blocks)
    assert tokens(twin, places[0]) == right


def test_a_mode_that_does_not_exist_is_an_error(model: Any) -> None:
    sharding = shard(model)
    assert sharding.mode == "eager"
    sharding.mode = "eager"
    with pytest.raises(ValueError, match="eager"):
        sharding.mode = "turbo"


def test_its_repr_says_how_the_model_is_split(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    first, second = (len(stage.blocks) for stage in sharding.placement.stages)
    assert repr(sharding) == f"<Sharding on: {places[0]}: {first} blocks, {places[1]}: {second} blocks>"
    sharding.disable()
    assert repr(sharding).startswith("<Sharding off")


def test_a_compiled_forward_runs_ours_as_they_are(model: Any, places: list[str], right: list[list[int]]) -> None:
    """transformers 5 compiles the forward by itself for a static cache on a GPU; on simulated ones we compile it."""
    if not places[0].startswith("cuda"):
        pytest.skip("torch.compile cannot trace simulated devices")
    way = next(way for way in support.WAYS if way.name == "static-cache")
    shard(model)
    compiled = support.Way("compiled", {**way.options, "disable_compile": False}, batch=3)
    assert compiled.run(model, places[0]).tokens.shape == torch.Size([3, 9 + compiled.new_tokens])


@pytest.mark.parametrize("way", ["greedy", "beams", "contrastive"])
def test_switching_at_any_moment_from_another_thread_changes_no_token(model: Any, places: list[str], way: str) -> None:
    chosen = next(one for one in support.WAYS if one.name == way)
    if not chosen.needs(model):
        pytest.skip(f"no {way} on this stack")
    right = support.on_cpu("llama", chosen).tokens.tolist()
    sharding, over, switches = shard(model), threading.Event(), []

    def switch() -> None:
        while not over.is_set():
            sharding.disable()
            sharding.enable()
            switches.append(1)
            time.sleep(0.001)  # or a busy thread takes Python's lock again before the reply has got it

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        replies = [chosen.run(model, places[0]).tokens.tolist() for _ in range(2)]
    finally:
        over.set()
        thread.join()
    assert replies == [right] * 2
    assert len(switches) > 10


def test_what_a_reply_calls_between_two_forwards_stays_at_a_switch(model: Any) -> None:
    sharding = shard(model)
    before = dict(vars(model))
    for _ in range(2):
        sharding.disable()
        sharding.enable()
    assert vars(model)["generate"] is before["generate"]
    for name in ("_reorder_cache", "contrastive_search", "_prepare_cache_for_generation"):
        assert vars(model).get(name) is before.get(name)


@pytest.mark.parametrize("layer", [1, 4])
def test_enabling_within_a_forward_of_a_simple_dispatched_model_brings_its_logits_home(
    places: list[str], layer: int
) -> None:
    model = models.build("gptj")
    model = support.simple_dispatch(model, models.device_map(model, places))
    sharding = shard(model)
    sharding.disable()
    model.transformer.h[layer].mlp.register_forward_pre_hook(
        lambda module, args: sharding.disable() if sharding.enabled else sharding.enable()
    )
    right = support.on_cpu("gptj", support.GREEDY).tokens.tolist()
    assert tokens(model, places[0]) == right


def test_a_model_moved_and_sharded_again_goes_on_where_it_is(
    model: Any, places: list[str], right: list[list[int]]
) -> None:
    sharding = shard(model)
    model.to(places[1])
    assert shard(model) is sharding
    assert not sharding.active
    assert tokens(model, places[1]) == right


def test_a_wrapper_dies_though_the_model_it_wrapped_lives(model: Any) -> None:
    wrapper = Wrapper(model)
    shard(wrapper)
    dead = weakref.ref(wrapper)
    del wrapper
    gc.collect()
    assert dead() is None


def test_two_threads_may_shard_a_model_and_its_wrapper_at_once(model: Any) -> None:
    wrapper = nn.Sequential(model)
    threads = [
        threading.Thread(target=lambda what=what: [shard(what) for _ in range(50)], daemon=True)
        for what in (model, wrapper)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_model_with_a_generate_of_its_own_keeps_it(places: list[str]) -> None:
    class Nano(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

        def generate(self, x: torch.Tensor, steps: int) -> torch.Tensor:
            for _ in range(steps):
                x = self(x)
            return x

    model = dispatch_model(Nano(), {"layers.0": places[0], "layers.1": places[1]}, main_device=places[0])
    x = torch.ones(1, 4, device=places[0])
    expected = model.generate(x, 3)
    assert shard(model).enabled
    assert torch.equal(model.generate(x, 3), expected)


def test_the_loss_of_a_simple_dispatched_model_meets_its_labels(places: list[str]) -> None:
    model = models.build("gptj")
    model = support.simple_dispatch(model, models.device_map(model, places))
    ids = support.prompts(batch=1)["input_ids"].to(places[0])
    expected = model(input_ids=ids, labels=ids).loss
    shard(model)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)


def fail(*_: Any, **__: Any) -> Any:
    raise TypeError("of ours")


@pytest.mark.parametrize(
    ("part", "way"),
    [
        *((part, "greedy") for part in ("enter", "move_inputs", "move_home", "_copy", "close")),
        *((part, way) for part in ("move_home", "_copy") for way in ("beams", "guidance")),
    ],
)
def test_an_error_in_our_part_of_a_forward_has_accelerate_go_on_from_there(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch, part: str, way: str
) -> None:
    chosen = next(one for one in support.WAYS if one.name == way)
    if not chosen.needs(model):
        pytest.skip(f"no {way} on this stack")
    right = support.on_cpu("llama", chosen).tokens.tolist()
    sharding = shard(model)
    for calls in (3, 20):  # in the midst of the prompt's forward, in that of a token
        with monkeypatch.context() as patch:
            failing = support.FailsLater(patch, ForwardState, part, calls, TypeError("of ours"))
            assert chosen.run(model, places[0]).tokens.tolist() == right
        if failing.failures:
            assert not sharding.enabled
            assert sharding.failure.endswith("TypeError: of ours")
        sharding.enable()
        assert sharding.failure == ""


@pytest.mark.parametrize("part", ["enter", "move_inputs", "move_home", "_copy"])
def test_so_do_models_whose_blocks_all_send_their_outputs_back(
    places: list[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    right = support.on_cpu("gptj", support.GREEDY).tokens.tolist()
    model = models.build("gptj")
    model = support.simple_dispatch(model, models.device_map(model, places))
    sharding = shard(model)
    for calls in (3, 20):
        with monkeypatch.context() as patch:
            failing = support.FailsLater(patch, ForwardState, part, calls, TypeError("of ours"))
            assert tokens(model, places[0]) == right
        assert not sharding.enabled or not failing.failures
        sharding.enable()


def test_after_an_error_of_ours_the_model_has_accelerates_own_forwards(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    shard(model)
    support.FailsLater(monkeypatch, ForwardState, "move_inputs", 7, TypeError("of ours"))
    tokens(model, places[0])
    assert all(vars(module).get("forward") is before[name] for name, module in model.named_modules())


def test_an_error_of_ours_is_logged_once_however_often_it_would_recur(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard(model)
    support.FailsLater(monkeypatch, ForwardState, "_copy", 0, TypeError("of ours"))
    tokens(model, places[0])
    assert [record.levelname for record in caplog.records if "error in our part" in record.message] == ["ERROR"]


def test_a_moved_model_whose_placement_cannot_be_read_again_is_accelerates(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = shard(model)
    model.to(places[1])
    support.FailsLater(monkeypatch, sys.modules[Sharding.__module__], "read_placement", 0, TypeError("of ours"))
    with pytest.raises(RuntimeError, match="device"):  # its hooks send the inputs to where the weights were
        tokens(model, places[1])
    assert not any(isinstance(vars(module).get("forward"), Wrapped) for module in model.modules())
    assert sharding.failure.endswith("TypeError: of ours")


class Unreadable(Exception):
    """An error whose message cannot be had."""

    def __str__(self) -> str:
        raise TypeError("it has none")


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("layers", [2, 9], ids=["prompt", "token"])
@pytest.mark.parametrize(
    "error",
    [ValueError("theirs"), KeyboardInterrupt(), torch.cuda.OutOfMemoryError("2 GiB"), Unreadable()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_model_itself_passes_through_as_it_is(
    places: list[str], monkeypatch: pytest.MonkeyPatch, mode: str, layers: int, error: BaseException
) -> None:
    support.FailsLater(monkeypatch, nn.functional, "silu", layers, error)
    model = support.spread(models.build("llama"), places)
    sharding = shard(model)
    sharding.mode = mode
    with pytest.raises(type(error)) as raised:
        tokens(model, places[0])
    assert raised.value is error
    assert sharding.enabled
    assert sharding.failure == ""


@pytest.mark.parametrize("name", ["", "model.layers.3"])
def test_arguments_that_do_not_fit_are_the_callers_error_and_leave_sharding_on(model: Any, name: str) -> None:
    sharding = shard(model)
    with pytest.raises(TypeError, match=r"nonsense|argument"):
        model.get_submodule(name)(nonsense=1, input_ids=3)
    assert sharding.enabled
    assert sharding.failure == ""


def test_forwards_that_cannot_be_taken_off_after_an_error_of_ours_cost_no_reply_either(
    model: Any, places: list[str], right: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(model)
    monkeypatch.setattr(PatchSet, "restore", fail)
    support.FailsLater(monkeypatch, ForwardState, "move_inputs", 7, TypeError("of ours"))
    assert tokens(model, places[0]) == right


def test_letting_go_that_failed_midway_is_done_by_the_next_shard(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shard(model)
    with monkeypatch.context() as patch:
        patch.setattr(PatchSet, "restore", fail)
        with pytest.raises(TypeError, match="of ours"):
            first.detach()
    second = shard(model)
    assert second is not first
    assert second.enabled


def test_too_little_memory_for_our_copy_is_nobodys_defect(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = shard(model)
    support.FailsLater(monkeypatch, ForwardState, "_copy", 3, torch.cuda.OutOfMemoryError("2 GiB"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        tokens(model, places[0])
    assert sharding.enabled
    assert sharding.failure == ""


def test_tensors_that_meet_on_different_devices_switch_sharding_off(model: Any, places: list[str]) -> None:
    sharding = shard(model)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        tokens(model, places[0])
    assert not sharding.enabled
    hook.remove()
    sharding.enable()
    assert sharding.enabled
    assert sharding.failure == ""


@pytest.mark.parametrize("error", [ArithmeticError("somebody's"), torch.cuda.OutOfMemoryError("2 GiB")])
def test_an_error_of_the_model_or_of_memory_leaves_sharding_on(model: Any, places: list[str], error: Exception) -> None:
    sharding = shard(model)

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        tokens(model, places[0])
    assert sharding.enabled
    assert sharding.failure == ""


def test_a_wrapper_that_dies_leaves_nothing_of_ours_on_what_it_wrapped(model: Any) -> None:
    before = attributes(model)
    wrapper = Wrapper(model)
    shard(wrapper)
    del wrapper
    gc.collect()
    assert is_as_before(model, before)
    sharding = shard(model)
    assert sharding.enabled
    sharding.detach()
    assert is_as_before(model, before)
