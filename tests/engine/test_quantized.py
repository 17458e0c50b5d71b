"""Models with 8-bit and 4-bit weights, each loaded by its own library's door, spread by its own dispatcher."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from extensions.sharded_kv import shard
from tests import support
from tests.loaders import auto_gptq, bitsandbytes_4bit, bitsandbytes_8bit, gptq_config, gptqmodel, spread_over
from tools import models
from tools.traffic import between_gpus

Load = Callable[[str, Path, dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQModel has torch compile its layers: half a minute each time, and the same numbers."""
    if importlib.util.find_spec("gptqmodel"):
        monkeypatch.setattr(torch._dynamo.config, "disable", True)


each_load = pytest.mark.parametrize("load", [bitsandbytes_8bit, bitsandbytes_4bit, auto_gptq, gptqmodel, gptq_config])
each_family = pytest.mark.parametrize("family", ["llama", "gptj"])


def same(ours: support.Reply, theirs: support.Reply) -> bool:
    """Whether two replies are equal to the last bit."""
    return ours.tokens.tolist() == theirs.tokens.tolist() and support.same(ours.scores, theirs.scores)


def close(ours: support.Reply, theirs: support.Reply) -> bool:
    """Whether two replies differ by rounding in 16 bit alone: by at most 1 % of the largest logit.

    Where two tokens are as near to each other as that, replies may part; what follows there is not compared.
    """
    prompt = theirs.tokens.shape[1] - len(theirs.scores)
    for row, (our_tokens, their_tokens) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        for step, (a, b) in enumerate(zip(ours.scores, theirs.scores, strict=True), prompt):
            a, b = a[row].nan_to_num(0, 0, 0), b[row].nan_to_num(0, 0, 0)
            if (a - b).abs().max() > 1e-2 * b.abs().max():
                return False
            if our_tokens[step] != their_tokens[step]:
                break
    return True


# --- eager mode -------------------------------------------------------------------------------------------------------


@each_family
@each_load
def test_a_quantized_model_replies_as_under_its_dispatcher(
    devices: support.Devices, load: Load, family: str, tmp_path: Path
) -> None:
    places = devices(3)
    model = load(family, tmp_path, spread_over(family, places))
    theirs = support.GREEDY.run(model, places[0])
    sharding = shard(model)
    assert len(sharding.placement.stages) == 3
    # With 16 bit torch rounds otherwise where a tensor is contiguous: the last hidden state is, under a dispatcher that
    # has sent it to and fro, and is a view of all tokens' where nobody moved it.
    equal = close if load is gptqmodel else same
    assert equal(support.GREEDY.run(model, places[0]), theirs)


@each_family
@each_load
def test_a_reply_of_a_quantized_model_moves_what_one_of_an_unquantized_model_moves(
    devices: support.Devices, load: Load, family: str, tmp_path: Path
) -> None:
    """What that is, to the byte, is in test_traffic."""
    places = devices(2)
    model = load(family, tmp_path, spread_over(family, places))
    inner = model.model if load in (auto_gptq, gptqmodel) else model
    plain = models.build(family, dtype=inner.dtype)
    if hasattr(inner, "_hf_hook"):
        plain = support.spread(plain, places)
    else:
        plain = support.simple_dispatch(plain, spread_over(family, places))
    shard(model)
    shard(plain)
    with devices.traffic() as traffic:
        support.GREEDY.run(model, places[0])
    autocast = torch.autocast(devices.kind) if load is auto_gptq else contextlib.nullcontext()
    with devices.traffic() as expected, autocast, torch.inference_mode(inner is not model):
        support.GREEDY.run(plain, places[0])
    assert between_gpus(traffic.bytes) == between_gpus(expected.bytes)
    assert between_gpus(traffic.copies) == between_gpus(expected.copies)


@each_load
def test_off_is_as_before_to_the_hook_and_the_byte(devices: support.Devices, load: Load, tmp_path: Path) -> None:
    places = devices(2)
    model = load("llama", tmp_path, spread_over("llama", places))
    support.GREEDY.run(model, places[0])  # GPTQ's layers bring a table of their own to their device, once
    hooks = {name: vars(module).get("_hf_hook") for name, module in model.named_modules()}
    with devices.traffic() as before:
        theirs = support.GREEDY.run(model, places[0])
    sharding = shard(model)
    with devices.traffic() as on:
        support.GREEDY.run(model, places[0])
    sharding.detach()
    with devices.traffic() as after:
        off = support.GREEDY.run(model, places[0])
    assert {name: vars(module).get("_hf_hook") for name, module in model.named_modules()} == hooks
    assert (after.bytes, after.copies) == (before.bytes, before.copies)
    assert sum(on.bytes.values()) < sum(before.bytes.values())
    assert support.same(off.scores, theirs.scores)


@each_load
def test_quantized_weights_take_no_more_memory_with_sharding_than_without(
    devices: support.Devices, load: Load, tmp_path: Path
) -> None:
    places = devices(2)
    model = load("llama", tmp_path, spread_over("llama", places))
    support.GREEDY.run(model, places[0])
    before = peaks(devices, places, lambda: support.GREEDY.run(model, places[0]))
    shard(model)
    after = peaks(devices, places, lambda: support.GREEDY.run(model, places[0]))
    masks = 3 * 19 * 19 * 4  # shared by the blocks of a GPU, and kept until the forward ends: README, Limits
    assert all(ours <= theirs + masks for ours, theirs in zip(after, before, strict=True))


def peaks(devices: support.Devices, places: list[str], reply: Callable[[], Any]) -> list[int]:
    """The most bytes in use on each device while it runs."""
    gc.collect()
    for place in places:
        devices.runtime.reset_peak_memory_stats(place)
    reply()
    return [devices.runtime.max_memory_allocated(place) for place in places]


# --- graph mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [bitsandbytes_4bit, gptqmodel, gptq_config])
def test_4_bit_steps_come_from_graphs(devices: support.Devices, load: Load, tmp_path: Path) -> None:
    places = devices.up_to(2)
    model = load("llama", tmp_path, spread_over("llama", places))
    theirs = support.GREEDY.run(model, places[0])
    sharding = shard(model)
    sharding.mode = "graph"
    assert close(support.GREEDY.run(model, places[0]), theirs)
    assert sharding.reason_for_eager == ""


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (bitsandbytes_8bit, "Its 8-bit weights (bitsandbytes) have the host wait in every layer, which no graph can."),
        (auto_gptq, "The model was called under autocast."),  # its wrapper's generate() does that
    ],
)
def test_where_no_graph_can_be_the_reply_comes_as_in_eager_mode_and_says_why(
    devices: support.Devices, load: Load, reason: str, tmp_path: Path
) -> None:
    places = devices.up_to(2)
    model = load("llama", tmp_path, spread_over("llama", places))
    theirs = support.GREEDY.run(model, places[0])
    sharding = shard(model)
    sharding.mode = "graph"
    assert same(support.GREEDY.run(model, places[0]), theirs)
    assert sharding.reason_for_eager == reason


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [bitsandbytes_8bit, bitsandbytes_4bit])
def test_a_lora_put_on_and_taken_off_replies_as_with_accelerate(
    devices: support.Devices, load: Load, tmp_path: Path
) -> None:
    """The webui's steps: PeftModel around the model, and unload()."""
    peft = pytest.importorskip("peft")
    if load is bitsandbytes_8bit and peft.__version__ == "0.12.0":
        pytest.skip("this peft wants an older bitsandbytes, which has no kernels for the CPU")
    places = devices(2)
    lora = support.save_lora("llama", tmp_path / "lora")

    def replies(attach: Callable[[Any], Any]) -> list[support.Reply]:
        model = load("llama", tmp_path / "model", spread_over("llama", places))
        attach(model)
        plain = support.GREEDY.run(model, places[0])
        tuned = peft.PeftModel.from_pretrained(model, str(lora))
        attach(tuned)
        with_lora = support.GREEDY.run(tuned, places[0])
        model = tuned.unload()
        attach(model)
        return [plain, with_lora, support.GREEDY.run(model, places[0])]

    theirs, ours = replies(lambda model: None), replies(enabled)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not same(ours[0], ours[1])


def enabled(model: Any) -> None:
    assert shard(model).enabled


# --- what cannot be helped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [bitsandbytes_8bit, bitsandbytes_4bit])
def test_quantized_weights_on_one_device_are_left_alone(devices: support.Devices, load: Load, tmp_path: Path) -> None:
    (place,) = devices(1)
    model = load("llama", tmp_path, {"": torch.device(place)})
    theirs = support.GREEDY.run(model, place)
    sharding = shard(model)
    assert not sharding.active
    assert sharding.reason.endswith(f" on one device ({place}): there is nothing to shard.")
    assert support.same(support.GREEDY.run(model, place).scores, theirs.scores)


def test_8_bit_weights_with_layers_on_the_cpu_are_left_alone_on_one_gpu(
    devices: support.Devices, tmp_path: Path
) -> None:
    (place,) = devices(1)
    device_map = {**spread_over("llama", [place]), "model.layers.2": "cpu", "model.layers.3": "cpu"}
    model = bitsandbytes_8bit("llama", tmp_path, device_map, llm_int8_enable_fp32_cpu_offload=True)
    theirs = support.GREEDY.run(model, place)
    sharding = shard(model)
    assert not sharding.active
    assert "offloaded to the CPU" in sharding.reason
    assert support.same(support.GREEDY.run(model, place).scores, theirs.scores)


def test_8_bit_weights_with_layers_on_the_cpu_are_sharded_over_two_gpus(
    devices: support.Devices, tmp_path: Path
) -> None:
    places = devices(2)
    device_map = {**spread_over("llama", places), "model.layers.2": "cpu", "model.layers.3": "cpu"}
    model = bitsandbytes_8bit("llama", tmp_path, device_map, llm_int8_enable_fp32_cpu_offload=True)
    theirs = support.GREEDY.run(model, places[0])
    assert shard(model).active
    assert same(support.GREEDY.run(model, places[0]), theirs)
