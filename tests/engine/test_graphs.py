"""Graph mode: the same tokens as without, whatever happens to a reply; and eager, with a reason, where it must."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine import compat
from extensions.sharded_kv.engine.compat import own_cache_class
from extensions.sharded_kv.engine.graphs import capture, decode, eligible, runner
from tests import support
from tools import models, simulated
from tools.traffic import total

VERSION = Version(transformers.__version__)
# Which of them keep their caches in DynamicCache objects and use no Python numbers that grow with the reply.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-gqa": {},
    **(
        {"gptj": {}, "gpt-neox": {}, "opt": {}, "qwen2": {}, "phi": {}, "mixtral": {}, "mpt": {}}
        if Version("5") <= VERSION
        else {}
    ),
    **({"mistral-sliding": {}, "gemma2": {}} if Version("5") <= VERSION else {}),
}

needs_graphs = pytest.mark.skipif(Version("4.44") > VERSION, reason="no graph mode with this transformers")


def build(family: str, **options: Any) -> Any:
    """A tiny model of four layers, if nothing else is said: one for each of four devices."""
    return models.build(support.family_or_skip(family), **({"num_hidden_layers": 4} | options))


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices.up_to(2)


@pytest.fixture
def model(places: list[str]) -> Any:
    return support.spread(build("llama"), places)


@pytest.fixture
def sharding(model: Any) -> Sharding:
    sharding = shard(model)
    sharding.mode = "graph"
    return sharding


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[capture.Capture]:
    """Every capture that is begun."""
    begun: list[capture.Capture] = []

    class Capture(capture.Capture):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            begun.append(self)

    monkeypatch.setattr(decode, "Capture", Capture)
    return begun


def reply(model: Any, place: str, tokens: int = 20, batch: int = 1, length: int = 9, **options: Any) -> Any:
    """A greedy reply to prompts of `length` tokens."""
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(batch, length).items()}
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | options
    with torch.no_grad():
        return model.generate(**inputs, **options)


def right(tokens: int = 20, batch: int = 1, length: int = 9, **options: Any) -> list[list[int]]:
    """The reply of the same model on the CPU."""
    return reply(build("llama"), "cpu", tokens, batch, length, **options).tolist()


# --- the same tokens --------------------------------------------------------------------------------------------------


@needs_graphs
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.no_cover  # long, and of lines that shorter tests run
def test_replies_are_the_same_token_for_token(devices: support.Devices, family: str, count: int) -> None:
    tokens = 256 if count == 2 else 24
    model = build(family, num_hidden_layers=max(2, count), **FAMILIES[family])
    place = devices(count)[0]
    model = support.spread(model, devices(count)) if count > 1 else model.to(place)
    expected = reply(model, place, tokens).tolist()
    sharding = shard(model)
    sharding.mode = "graph"
    assert reply(model, place, tokens).tolist() == expected
    assert sharding.reason_for_eager == ""


@needs_graphs
@pytest.mark.parametrize("way", support.WAYS, ids=str)
def test_every_way_of_generating_gives_its_tokens(
    model: Any, sharding: Sharding, places: list[str], way: support.Way
) -> None:
    if not way.needs(model):
        pytest.skip(f"no {way} on this stack")
    expected = off(sharding, lambda: way.run(model, places[0]).tokens.tolist())
    assert way.run(model, places[0]).tokens.tolist() == expected


@needs_graphs
@pytest.mark.parametrize("count", [1, 2, 4])
def test_logits_of_given_tokens_are_those_of_eager_mode(devices: support.Devices, count: int) -> None:
    place = devices(count)[0]
    model = build("llama")
    model = support.spread(model, devices(count)) if count > 1 else model.to(place)
    tokens = torch.randint(5, models.VOCAB_SIZE, (3, 136), generator=torch.Generator().manual_seed(0)).to(place)
    sharding = shard(model)
    logits = {}
    for mode in ("eager", "graph"):
        sharding.mode = mode
        logits[mode] = steps(model, tokens, sharding.new_cache(), prompt=8)
    assert sharding.reason_for_eager == ""
    assert len(logits["graph"]) == 128
    for ours, theirs in zip(logits["graph"], logits["eager"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def steps(model: Any, tokens: Tensor, cache: Any, prompt: int) -> list[Tensor]:
    """The logits of each token after the prompt, given one at a time with nothing else than the cache."""
    with torch.no_grad():
        cache = model(tokens[:, :prompt], past_key_values=cache, use_cache=True).past_key_values
        logits = []
        for index in range(prompt, tokens.shape[1]):
            out = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            cache = out.past_key_values
    return logits


@needs_graphs
def test_prompts_padded_on_the_left_keep_their_padding(model: Any, sharding: Sharding, places: list[str]) -> None:
    assert reply(model, places[0], batch=3).tolist() == right(batch=3)
    assert sharding.reason_for_eager == ""


@needs_graphs
def test_sampling_draws_the_same_tokens(model: Any, sharding: Sharding, places: list[str]) -> None:
    def sampled() -> list[list[int]]:
        torch.manual_seed(0)
        getattr(torch, places[0].split(":")[0]).manual_seed_all(0)
        return reply(model, places[0], do_sample=True, temperature=1.5, top_k=20).tolist()

    ours = sampled()
    assert sharding.reason_for_eager == ""
    sharding.mode = "eager"
    assert sampled() == ours


@needs_graphs
def test_it_works_in_inference_mode_and_after_it(model: Any, sharding: Sharding, places: list[str]) -> None:
    with torch.inference_mode():
        assert reply(model, places[0]).tolist() == right()
    assert reply(model, places[0]).tolist() == right()
    assert sharding.reason_for_eager == ""


class Loop:
    """A generate() of the model's own, as in code that comes with a checkpoint: it makes a cache and keeps it."""

    def generate(self, input_ids: Tensor, max_new_tokens: int, stopping_criteria: Any = None) -> Tensor:
        cache: Any = transformers.DynamicCache()
        tokens = input_ids
        with torch.no_grad():
            for _ in range(max_new_tokens):
                logits = self(input_ids=tokens, past_key_values=cache, use_cache=True).logits  # type: ignore[operator]
                tokens = logits[:, -1:].argmax(-1)
                input_ids = torch.cat([input_ids, tokens], 1)
        return input_ids


@needs_graphs
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_cache_that_a_loop_of_the_models_own_keeps_is_filled(model: Any, places: list[str], mode: str) -> None:
    model.__class__ = type("Own", (Loop, type(model)), {})
    ids = support.prompts(1)["input_ids"].to(places[0])
    expected = model.generate(ids, max_new_tokens=12).tolist()
    sharding = shard(model)
    sharding.mode = mode
    assert model.generate(ids, max_new_tokens=12).tolist() == expected


@needs_graphs
def test_a_cache_that_is_replaced_while_graphs_wait_takes_no_old_buffers_along(
    model: Any, sharding: Sharding, devices: support.Devices, places: list[str]
) -> None:
    """A reply without graphs outgrows the buffers of the reply before."""
    held = []
    for tokens in (20, 600):
        size: list[int] = []
        look = StoppingCriteriaList([lambda *_, size=size, **__: bool(size.append(allocated(devices, places)))])
        options = {"output_hidden_states": True} if tokens == 600 else {}
        reply(model, places[0], tokens=tokens, stopping_criteria=look, **options)
        held.append(size[-1])
    sharding.mode = "eager"
    sharding.mode = "graph"
    size = []
    look = StoppingCriteriaList([lambda *_, size=size, **__: bool(size.append(allocated(devices, places)))])
    reply(model, places[0], tokens=600, output_hidden_states=True, stopping_criteria=look)
    assert held[1] == size[-1]


# --- buffers and graphs -----------------------------------------------------------------------------------------------


@needs_graphs
def test_the_next_reply_finds_graphs_and_buffers(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    for length in (9, 30, 4, 9):
        assert reply(model, places[0], length=length).tolist() == right(length=length)
        assert sharding.reason_for_eager == ""
    assert len(captures) == 1


@needs_graphs
def test_a_reply_that_outgrows_its_room_is_captured_again_and_loses_no_token(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extensions.sharded_kv.engine.kv.buffer._MOST_AHEAD", 128)
    assert reply(model, places[0], tokens=300).tolist() == right(tokens=300)
    assert sharding.reason_for_eager == ""
    assert len(captures) == 2


@needs_graphs
def test_a_reply_that_says_how_long_it_gets_is_captured_once(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    assert reply(model, places[0], tokens=300).tolist() == right(tokens=300)
    assert sharding.reason_for_eager == ""
    assert len(captures) == 1


@needs_graphs
def test_making_room_takes_one_buffer_more_and_not_a_second_cache(
    model: Any, sharding: Sharding, devices: support.Devices, places: list[str]
) -> None:
    if devices.kind != "sim":
        pytest.skip("peaks are exact on simulated devices")
    layers, heads, tokens = 2, model.config.num_key_value_heads, 500
    peaks = {}
    for mode in ("eager", "graph"):
        sharding.mode = mode
        gc.collect()
        simulated.reset_peak()
        before = simulated.allocated(1)
        asked = itertools.count()
        # The prompt, and the token with which room is made.
        stop = StoppingCriteriaList([lambda *_, asked=asked, **__: next(asked) == 1])
        reply(model, places[0], tokens=8, length=tokens, stopping_criteria=stop)
        peaks[mode] = simulated.peak(1) - before
    of_a_buffer = heads * 16 * 4
    room_ahead = layers * 2 * (256 * 2 - tokens) * of_a_buffer
    assert peaks["graph"] <= peaks["eager"] + room_ahead + tokens * of_a_buffer


@needs_graphs
def test_a_reply_leaves_its_buffers_where_they_are(model: Any, sharding: Sharding, places: list[str]) -> None:
    seen = set()
    asked = itertools.count()

    def look(*_: Any, **__: Any) -> bool:
        if next(asked) == 0:  # room ahead is made with the first token after the prompt
            return False
        (cache,) = (each for each in gc.get_objects() if type(each).__name__ == "KVCache")
        seen.add(tuple(buffer.tensor.data_ptr() for buffer in cache.buffers()))
        return False

    assert reply(model, places[0], stopping_criteria=StoppingCriteriaList([look])).tolist() == right()
    assert sharding.reason_for_eager == ""
    assert len(seen) == 1


@needs_graphs
def test_another_batch_size_gets_graphs_of_its_own(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    for batch in (1, 3, 1):
        assert reply(model, places[0], batch=batch).tolist() == right(batch=batch)
    assert len(captures) == 3


@needs_graphs
def test_of_steps_called_in_ever_new_ways_the_latest_few_keep_their_graphs(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("this transformers has no number that calls may differ in")

    def logits() -> list[Tensor]:
        tokens = support.prompts(1)["input_ids"].to(places[0])
        cache = model(input_ids=tokens, past_key_values=sharding.new_cache(), use_cache=True).past_key_values
        out = []
        for step in range(24):  # three in each of eight ways: watched, captured, replayed
            mask = torch.ones(1, tokens.shape[1] + step + 1, dtype=torch.int64, device=places[0])
            call = {"past_key_values": cache, "attention_mask": mask, "logits_to_keep": 1 + step // 3}
            positions = torch.full((1, 1), tokens.shape[1] + step, device=places[0])
            out.append(model(input_ids=tokens[:, :1], position_ids=positions, use_cache=True, **call).logits.cpu())
        kinds.append(0 if cache.graphs is None else len(cache.graphs._steps))
        return out

    kinds: list[int] = []

    with torch.no_grad():
        replayed = logits()
        assert len(captures) == 8
        assert kinds == [runner._MOST_KINDS]
        sharding.disable()
        assert all(torch.allclose(ours, eager, atol=1e-4) for ours, eager in zip(replayed, logits(), strict=True))


@needs_graphs
def test_room_follows_the_reply_and_not_what_the_model_could_take(
    model: Any, sharding: Sharding, places: list[str]
) -> None:
    sizes = set()
    reply(model, places[0], stopping_criteria=StoppingCriteriaList([lambda *_, **__: bool(sizes.add(room(sharding)))]))
    config = model.config
    one_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * 4
    assert max(sizes) == 256 * one_token < config.max_position_embeddings * one_token


def room(sharding: Sharding) -> int:
    """Bytes of the cache's buffers."""
    sharding.meter.memory.next_look = 0.0
    return sum(memory.cache for memory in sharding.meter.snapshot().memory)


@needs_graphs
@pytest.mark.parametrize("end", ["disable", "detach", "eager"])
def test_all_memory_is_free_again_when_it_is_switched_off(
    model: Any, sharding: Sharding, devices: support.Devices, places: list[str], end: str
) -> None:
    for mode in ("graph", "eager"):  # what graphs need once in a process is there
        sharding.mode = mode
        reply(model, places[0])
    before = allocated(devices, places)
    sharding.mode = "graph"
    reply(model, places[0])
    assert allocated(devices, places) > before
    if end == "eager":
        sharding.mode = "eager"
    else:
        getattr(sharding, end)()
    assert allocated(devices, places) == before


@needs_graphs
def test_an_unloaded_model_takes_its_graphs_along(devices: support.Devices, places: list[str]) -> None:
    capture_once(places)
    before = allocated(devices, places)
    capture_once(places)
    assert allocated(devices, places) == before


def capture_once(places: list[str]) -> None:
    model = support.spread(build("llama"), places)
    sharding = shard(model)
    sharding.mode = "graph"
    reply(model, places[0])
    assert sharding.reason_for_eager == ""


def allocated(devices: support.Devices, places: list[str]) -> int:
    gc.collect()
    return sum(devices.runtime.memory_allocated(place) for place in places)


@needs_graphs
@pytest.mark.no_cover  # long, and of lines that shorter tests run
def test_many_replies_leak_no_byte(model: Any, sharding: Sharding, devices: support.Devices, places: list[str]) -> None:
    lengths = torch.randint(2, 40, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    reply(model, places[0], tokens=4)
    before = allocated(devices, places)
    for length in lengths:
        reply(model, places[0], tokens=4, length=length)
    assert allocated(devices, places) == before


@needs_graphs
def test_a_cache_that_outlives_its_reply_has_tensors_of_its_own(
    model: Any, sharding: Sharding, places: list[str]
) -> None:
    kept = {}
    for mode in ("eager", "graph"):
        sharding.mode = mode
        kept[mode] = reply(model, places[0], return_dict_in_generate=True).past_key_values
    before = [tensor.clone() for tensor in list_of(kept["graph"])]
    for length in (12, 9):
        reply(model, places[0], length=length)  # writes over no buffer that somebody has
    assert type(kept["graph"]) is type(kept["eager"])
    assert support.same([t.cpu() for t in list_of(kept["graph"])], [t.cpu() for t in before])
    for ours, theirs in zip(list_of(kept["graph"]), list_of(kept["eager"]), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-3)


@needs_graphs
def test_tensors_of_a_cache_that_outlive_it_are_not_written_to(
    model: Any, sharding: Sharding, places: list[str]
) -> None:
    kept: list[Tensor] = []

    def keep(*_: Any, **__: Any) -> bool:
        if not kept:
            (cache,) = (each for each in gc.get_objects() if type(each).__name__ == "KVCache")
            kept.extend(list_of(cache))
            del cache
        return False

    reply(model, places[0], stopping_criteria=StoppingCriteriaList([keep]))
    before = [tensor.clone() for tensor in kept]
    for length in (12, 9):
        assert reply(model, places[0], length=length).tolist() == right(length=length)
    assert support.same([t.cpu() for t in kept], [t.cpu() for t in before])


@needs_graphs
@pytest.mark.parametrize("keep", [lambda cache: list(cache.layers), copy.copy], ids=["layers", "copy"])
def test_layers_of_a_cache_that_outlive_it_are_not_written_to(
    model: Any, sharding: Sharding, places: list[str], keep: Callable[[Any], Any]
) -> None:
    if Version("5") > VERSION:
        pytest.skip("this transformers gives callers tuples")
    kept = keep(reply(model, places[0], return_dict_in_generate=True).past_key_values)
    layers = getattr(kept, "layers", kept)
    before = [buffer.filled.clone() for layer in layers for buffer in layer.buffers]
    for length in (12, 9):
        assert reply(model, places[0], length=length).tolist() == right(length=length)
    after = [buffer.filled for layer in layers for buffer in layer.buffers]
    assert support.same([t.cpu() for t in after], [t.cpu() for t in before])


@needs_graphs
def test_a_kept_cache_goes_on_by_graphs_when_its_caller_does(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    if Version("5") > VERSION:
        pytest.skip("this transformers gives callers tuples")
    first = reply(model, places[0], return_dict_in_generate=True)
    other = reply(model, places[0], length=14)
    assert other.tolist() == right(length=14)
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    with torch.no_grad():
        again = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert sharding.reason_for_eager == ""
    assert again.tolist() == right(tokens=30)
    assert len(captures) == 2


@needs_graphs
def test_a_kept_cache_goes_on_with_the_weights_of_now(model: Any, sharding: Sharding, places: list[str]) -> None:
    if Version("5") > VERSION:
        pytest.skip("this transformers gives callers tuples")
    first = reply(model, places[0], return_dict_in_generate=True)
    kept = {on: copy.deepcopy(first.past_key_values) if on else first.past_key_values for on in (False, True)}
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    norm = model.get_submodule("model.norm")
    norm.weight = nn.Parameter(-norm.weight.detach())
    with torch.no_grad():
        ours = model.generate(first.sequences, past_key_values=kept[False], **options).tolist()
        theirs = off(sharding, lambda: model.generate(first.sequences, past_key_values=kept[True], **options).tolist())
    assert ours == theirs
    assert sharding.reason_for_eager == ""


@needs_graphs
@pytest.mark.parametrize("end", ["disable", "detach"])
def test_a_kept_cache_works_with_sharding_off(model: Any, sharding: Sharding, places: list[str], end: str) -> None:
    if Version("5") > VERSION:
        pytest.skip("this transformers gives callers tuples")
    first = reply(model, places[0], return_dict_in_generate=True)
    getattr(sharding, end)()
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    with torch.no_grad():
        again = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert again.tolist() == right(tokens=30)


@needs_graphs
def test_criteria_given_by_position_are_asked_and_end_no_graphs(
    model: Any, sharding: Sharding, places: list[str]
) -> None:
    asked: list[int] = []
    criteria = StoppingCriteriaList([lambda ids, *_, **__: bool(asked.append(ids.shape[1]))])
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts(1).items()}
    with torch.no_grad():
        for _ in range(3):
            out = model.generate(
                inputs["input_ids"], None, None, criteria, attention_mask=inputs["attention_mask"], **options
            )
            assert out.tolist() == right()
            assert sharding.reason_for_eager == ""
    assert len(asked) >= 3 * 19
    assert sharding.meter.snapshot().sharded.tokens > 0


def list_of(cache: Any) -> list[Tensor]:
    layers = [(layer.keys, layer.values) for layer in cache.layers] if hasattr(cache, "layers") else list(cache)
    return [tensor for layer in layers for tensor in layer]


@needs_graphs
def test_what_crosses_is_counted_and_is_no_more_than_in_eager_mode(
    model: Any, sharding: Sharding, devices: support.Devices, places: list[str]
) -> None:
    bytes_of = {}
    for mode in ("eager", "graph"):
        sharding.mode = mode
        reply(model, places[0])  # also captures
        before = sharding.meter.snapshot().traffic.total_bytes
        with devices.traffic() as crossed:
            reply(model, places[0])
        bytes_of[mode] = total(crossed.bytes)
        assert sharding.meter.snapshot().traffic.total_bytes - before == bytes_of[mode]
    # A mask over the room that is there instead of one for each token, and one step twice, to compare; but nothing
    # that nobody reads.
    room_of_mask = 256 * 4 * 20
    assert bytes_of["graph"] <= bytes_of["eager"] * 21 / 20 + room_of_mask


@needs_graphs
def test_the_memory_of_the_cache_shows_its_room(model: Any, sharding: Sharding, places: list[str]) -> None:
    shown: list[int] = []

    def look(*_: Any, **__: Any) -> bool:
        sharding.meter.memory.next_look = 0.0
        shown.append(sum(memory.cache for memory in sharding.meter.snapshot().memory))
        return False

    reply(model, places[0], stopping_criteria=StoppingCriteriaList([look]))
    assert shown[-1] == 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 16 * 4 * 256


# --- in the midst of a reply ------------------------------------------------------------------------------------------


@needs_graphs
@pytest.mark.no_cover  # long, and of lines that shorter tests run
def test_switches_at_every_token_change_no_token(model: Any, sharding: Sharding, places: list[str]) -> None:
    asked = 0

    def switch(*_: Any, **__: Any) -> bool:
        nonlocal asked
        asked += 1
        states = (
            "graph",
            "graph",
            "graph",
            "off",
            "eager",
            "graph",
            "graph",
            "off",
            "graph",
            "graph",
            "graph",
            "eager",
        )
        state = states[asked % len(states)]
        sharding.disable() if state == "off" else sharding.enable()
        sharding.mode = "eager" if state == "off" else state
        return False

    ours = reply(model, places[0], tokens=60, batch=3, stopping_criteria=StoppingCriteriaList([switch]))
    assert ours.tolist() == right(tokens=60, batch=3)


@needs_graphs
@pytest.mark.parametrize("at", [1, 2, 3, 4, 9])
def test_a_reply_that_was_broken_off_leaves_the_next_one_right(
    model: Any, sharding: Sharding, places: list[str], at: int
) -> None:
    class Stopped(Exception):
        pass

    asked = 0

    def stop(*_: Any, **__: Any) -> bool:
        nonlocal asked
        asked += 1
        if asked == at:
            raise Stopped
        return False

    with pytest.raises(Stopped):
        reply(model, places[0], length=20, stopping_criteria=StoppingCriteriaList([stop]))
    assert reply(model, places[0]).tolist() == right()
    assert sharding.reason_for_eager == ""


@needs_graphs
def test_a_reply_that_begins_meanwhile_has_graphs_of_its_own(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    replies: list[Any] = []
    asked = 0

    def another(*_: Any, **__: Any) -> bool:
        nonlocal asked
        asked += 1
        if 5 <= asked < 8:
            thread = threading.Thread(target=lambda: replies.append(reply(model, places[0], length=14).tolist()))
            thread.start()
            thread.join()
            assert sharding.reason_for_eager == ""
        return False

    assert reply(model, places[0], stopping_criteria=StoppingCriteriaList([another])).tolist() == right()
    assert replies == [right(length=14)] * 3
    assert sharding.reason_for_eager == ""
    assert len(captures) == 2


@needs_graphs
@pytest.mark.no_cover  # long, and of lines that shorter tests run
def test_replies_of_several_threads_at_once_are_all_right(model: Any, sharding: Sharding, places: list[str]) -> None:
    got: dict[int, Any] = {}

    def run(length: int) -> None:
        got[length] = [reply(model, places[0], length=length).tolist() for _ in range(3)]

    threads = [threading.Thread(target=run, args=(length,)) for length in (5, 9, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert got == {length: [right(length=length)] * 3 for length in (5, 9, 14)}


@needs_graphs
def test_weights_that_were_exchanged_between_replies_are_used(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    norm = model.get_submodule("model.norm")
    before, after = norm.weight, nn.Parameter(-norm.weight.detach())
    norm.weight = after
    expected = off(sharding, lambda: reply(model, places[0]).tolist())
    norm.weight = before
    assert reply(model, places[0]).tolist() == right()
    norm.weight = after
    assert reply(model, places[0]).tolist() == expected
    assert sharding.reason_for_eager == ""
    assert len(captures) == 2


class Wrapper(nn.Module):
    """As PeftModel: generate() is the inner model's, and the inner model's forward is what it calls."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


@needs_graphs
def test_a_wrapped_model_has_graphs_too(model: Any, places: list[str], captures: list[Any]) -> None:
    wrapper = Wrapper(model)
    sharding = shard(wrapper)
    sharding.mode = "graph"
    assert reply(wrapper, places[0]).tolist() == right()
    assert sharding.reason_for_eager == ""
    assert len(captures) == 1


@needs_graphs
def test_a_tensor_that_the_model_keeps_for_each_reply_is_the_replys_own(
    model: Any, sharding: Sharding, places: list[str]
) -> None:
    norm = model.get_submodule("model.norm")
    plain, shifts = type(norm).forward, [0.0, 3.0, 0.0]
    kept: list[Tensor] = []

    def shifted(self: Any, states: Tensor) -> Tensor:
        out = plain(self, states)
        shift = getattr(self, "shift", None)
        return out if shift is None else out + shift

    expected, ours = [], []
    type(norm).forward = shifted
    try:
        for results, switch in ((expected, sharding.disable), (ours, sharding.enable)):
            switch()
            for shift in shifts:
                norm.shift = torch.full((1,), shift, device=norm.weight.device)
                kept.append(norm.shift)  # so that each is somewhere else
                results.append(reply(model, places[0]).tolist())
    finally:
        type(norm).forward = plain
    assert ours == expected
    assert sharding.reason_for_eager == ""


@needs_graphs
def test_graphs_that_compute_something_else_are_not_used(
    model: Any, sharding: Sharding, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = capture.CapturedStep.replay

    def wrong(self: capture.CapturedStep) -> None:
        replay(self)
        self.transfers[-1].target.mul_(-1)

    if len(places) < 2:
        pytest.skip("needs a copy that is the step's output")
    monkeypatch.setattr(capture.CapturedStep, "replay", wrong)
    assert reply(model, places[0]).tolist() == right()
    assert "something else" in sharding.reason_for_eager


# --- one GPU ----------------------------------------------------------------------------------------------------------


@needs_graphs
def test_a_model_on_one_gpu_is_left_alone_but_in_graph_mode(devices: support.Devices) -> None:
    (place,) = devices(1)
    model = build("llama").to(place)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    sharding = shard(model)
    assert not sharding.active
    sharding.mode = "graph"
    assert sharding.active
    assert sharding.enabled
    assert reply(model, place).tolist() == right()
    sharding.mode = "eager"
    assert not sharding.active
    assert not sharding.enabled
    sharding.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@needs_graphs
def test_what_torch_compiles_of_a_model_leaves_its_graphs_as_they_are(devices: support.Devices) -> None:
    if devices.kind == "sim":
        pytest.skip("torch.compile cannot trace simulated devices")
    (place,) = devices(1)
    model = build("llama", device=place)
    tokens = support.prompts(1)["input_ids"].to(place)
    expected = reply(model, place, 40).tolist()
    with torch.no_grad():
        right = model(tokens).logits
        sharding = shard(model)
        sharding.mode = "graph"
        torch.testing.assert_close(torch.compile(model)(tokens).logits, right, atol=1e-3, rtol=1e-3)
    # transformers compiles the forward itself here.
    assert reply(model, place, 40, cache_implementation="static").shape == (1, 49)
    assert "StaticCache" in sharding.reason_for_eager
    assert reply(model, place, 40).tolist() == expected
    assert sharding.reason_for_eager == ""


@needs_graphs
def test_a_model_on_one_gpu_that_was_switched_off_stays_off(devices: support.Devices) -> None:
    model = build("llama").to(devices(1)[0])
    sharding = shard(model)
    sharding.disable()
    sharding.mode = "graph"
    assert not sharding.enabled


# --- without graphs, and why ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()


@contextlib.contextmanager
def hooked(model: Any) -> Iterator[None]:
    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def in_8_bit(model: Any) -> Iterator[None]:
    model.is_loaded_in_8bit = True
    yield
    del model.is_loaded_in_8bit


@contextlib.contextmanager
def autocast(model: Any) -> Iterator[None]:
    with torch.autocast(model.device.type, torch.bfloat16):
        yield


@needs_graphs
@pytest.mark.parametrize(
    ("state", "reason"),
    [(training, "training"), (hooked, "hook"), (autocast, "autocast"), (in_8_bit, "8-bit")],
    ids=["training", "hooked", "autocast", "8-bit"],
)
def test_a_model_in_a_state_that_graphs_would_miss_runs_without(
    model: Any, sharding: Sharding, places: list[str], state: Callable[[Any], Any], reason: str
) -> None:
    with state(model):
        expected = off(sharding, lambda: reply(model, places[0]).tolist())
        assert reply(model, places[0]).tolist() == expected
        assert reason in sharding.reason_for_eager
    assert reply(model, places[0]).tolist() == right()
    assert sharding.reason_for_eager == ""


def off(sharding: Sharding, run: Callable[[], Any]) -> Any:
    """What `run` gives with sharding off."""
    sharding.disable()
    try:
        return run()
    finally:
        sharding.enable()


@needs_graphs
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, "at once"),
        ({"cache_implementation": "static", **support._UNCOMPILED}, "StaticCache"),
    ],
    ids=["states", "prompt-lookup", "static-cache"],
)
def test_a_reply_that_wants_more_than_tokens_runs_without(
    model: Any,
    sharding: Sharding,
    places: list[str],
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        out = reply(model, places[0], **options)
    assert getattr(out, "sequences", out).tolist() == right()
    assert reason in caplog.text


@needs_graphs
def test_beams_have_graphs(model: Any, sharding: Sharding, places: list[str], captures: list[Any]) -> None:
    for _ in range(2):
        assert reply(model, places[0], num_beams=3).tolist() == right(num_beams=3)
        assert sharding.reason_for_eager == ""
    assert len(captures) == 1


@needs_graphs
def test_both_passes_of_guidance_have_graphs(
    model: Any, sharding: Sharding, places: list[str], captures: list[Any]
) -> None:
    negative = support.prompts(1)["input_ids"].flip(1)[:, :5]
    for _ in range(3):
        ours = reply(model, places[0], guidance_scale=1.5, negative_prompt_ids=negative.to(places[0]))
        assert ours.tolist() == right(guidance_scale=1.5, negative_prompt_ids=negative)
    if "tuples" in sharding.reason_for_eager:
        pytest.skip("before transformers 4.45 the second pass has a cache of tuples")
    assert sharding.reason_for_eager == ""
    assert len(captures) == 2  # the second reply has the buffers of both


@needs_graphs
def test_the_buffers_of_a_second_pass_stay_for_one_reply_without(
    model: Any, sharding: Sharding, places: list[str]
) -> None:
    negative = support.prompts(1)["input_ids"].flip(1)[:, :5].to(places[0])
    reply(model, places[0], guidance_scale=1.5, negative_prompt_ids=negative)
    runner = sharding._runtime.runners[""]
    for left in (2, 2, 1) if not sharding.reason_for_eager else ():
        assert len(runner._spares) == left
        reply(model, places[0])


@needs_graphs
def test_a_step_with_gradients_runs_without(model: Any, sharding: Sharding, places: list[str]) -> None:
    ids = support.prompts(1)["input_ids"].to(places[0])
    cache = model(ids, past_key_values=transformers.DynamicCache(), use_cache=True).past_key_values
    model(ids[:, -1:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert "Gradients" in sharding.reason_for_eager


@needs_graphs
def test_a_model_with_offloaded_weights_runs_without(devices: support.Devices) -> None:
    places = devices(2)
    model = build("llama")
    device_map = models.device_map(model, [*places, "cpu"])
    model = support.spread(model, places, device_map=device_map)
    sharding = shard(model)
    sharding.mode = "graph"
    assert reply(model, places[0]).tolist() == right()
    assert "offloaded" in sharding.reason_for_eager


@needs_graphs
@pytest.mark.skipif(Version("5") > VERSION, reason="this transformers keeps these models' caches in tuples")
@pytest.mark.parametrize(
    ("family", "options"),
    [("bloom", {}), ("falcon", {}), ("falcon", {"alibi": True})],
    ids=["bloom", "falcon", "alibi"],
)
def test_what_is_made_of_the_mask_or_of_pythons_numbers_has_graphs(
    devices: support.Devices, family: str, options: dict[str, Any], captures: list[Any]
) -> None:
    model = support.spread(build(family, **options), devices.up_to(2))
    place = str(next(model.parameters()).device)
    expected = [reply(build(family, **options), "cpu", batch=batch).tolist() for batch in (1, 3)]
    sharding = shard(model)
    sharding.mode = "graph"
    for _ in range(2):
        assert [reply(model, place, batch=batch).tolist() for batch in (1, 3)] == expected
        assert sharding.reason_for_eager == ""
    assert captures


class ReadsBack(nn.Module):
    """A part of a model that looks at a number on its GPU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Any:
        return self.inner(hidden) if hidden.abs().max() < 1e9 else hidden


@needs_graphs
def test_an_architecture_that_graphs_cannot_repeat_is_found_out(devices: support.Devices) -> None:
    places = devices(2)
    model = build("llama")
    model.model.layers[2].mlp = ReadsBack(model.model.layers[2].mlp)
    model = support.spread(model, places)
    expected = reply(model, places[0]).tolist()
    sharding = shard(model)
    sharding.mode = "graph"
    assert reply(model, places[0]).tolist() == expected
    assert "reads back" in sharding.reason_for_eager


@needs_graphs
@pytest.mark.skipif(Version("5") > VERSION, reason="this transformers has no mask of its own for a window")
def test_a_window_that_the_cache_does_not_know_is_kept_to_as_well(places: list[str]) -> None:
    model = support.spread(build("mistral-sliding", sliding_window=16), places)

    def with_plain_cache() -> list[list[int]]:
        return reply(model, places[0], tokens=30, past_key_values=own_cache_class()()).tolist()

    expected = with_plain_cache()
    sharding = shard(model)
    sharding.mode = "graph"
    assert with_plain_cache() == expected
    assert "window of 16" in sharding.reason_for_eager


@needs_graphs
def test_a_reply_of_nonsense_leaves_nothing_behind(model: Any, sharding: Sharding, places: list[str]) -> None:
    weight = model.get_submodule("model.layers.0.self_attn.v_proj").weight
    reply(model, places[0])
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        reply(model, places[0], tokens=40)
        weight.copy_(before)
    assert reply(model, places[0]).tolist() == right()


@needs_graphs
def test_what_cannot_be_captured_is_tried_once_and_told_once(
    model: Any,
    sharding: Sharding,
    devices: support.Devices,
    places: list[str],
    captures: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    reply(model, places[0], tokens=1)
    before = allocated(devices, places)
    monkeypatch.setattr(capture.Capture, "_turn_to", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert reply(model, places[0]).tolist() == right()
            assert "not permitted" in sharding.reason_for_eager
    assert len(captures) == 1
    assert len([record for record in caplog.records if "Without graphs" in record.message]) == 1
    assert allocated(devices, places) == before
    assert sharding.enabled
    assert sharding.failure == ""


@needs_graphs
@pytest.mark.parametrize("family", ["llama", "gptj", "opt"])  # one of them counts the tokens that a mask shows
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_a_mask_without_positions_has_the_model_place_its_tokens_itself(
    devices: support.Devices, family: str, is_padded: bool
) -> None:
    def tokens_of(model: Any, cache: Any) -> list[Any]:
        ids, mask = support.prompts(3).values()
        mask = mask if is_padded else torch.ones_like(mask)
        ids, mask = (each.to(next(model.parameters()).device) for each in (ids, mask))
        tokens = []
        with torch.no_grad():
            for _ in range(6):
                logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
                ids, mask = logits[:, -1:].argmax(-1), torch.nn.functional.pad(mask, (0, 1), value=1)
                tokens.append(ids.tolist())
        return tokens

    if family != "llama" and Version("5") > VERSION:
        pytest.skip("this transformers keeps this model's cache in tuples")
    model = support.spread(build(family), devices.up_to(2))
    sharding = shard(model)
    sharding.mode = "graph"
    plain = build(family)
    assert tokens_of(model, sharding.new_cache()) == tokens_of(plain, compat.empty_dynamic_cache(plain))
    assert bool(sharding.reason_for_eager) == (family == "opt")


@needs_graphs
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (eligible.Rules, "read"),
        (eligible.Rules, "against_model"),
        (runner.GraphRunner, "_graphs_for"),
        (runner.CacheGraphs, "step"),
        (decode.DecodeGraph, "run"),
    ],
)
def test_a_failure_of_ours_costs_nobody_a_reply(
    model: Any, sharding: Sharding, places: list[str], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        assert reply(model, places[0]).tolist() == right()
    assert "on purpose" in sharding.reason_for_eager
    sharding.mode = "eager"
    assert reply(model, places[0]).tolist() == right()


@needs_graphs
def test_where_buffers_do_not_fit_a_reply_runs_without_and_says_so(
    model: Any, sharding: Sharding, devices: support.Devices, places: list[str]
) -> None:
    if devices.kind != "sim":
        pytest.skip("real GPUs have no capacity to set")
    try:
        simulated.set_capacity(1, simulated.allocated(1) + 150_000)
        assert reply(model, places[0]).tolist() == right()
        assert "no room" in sharding.reason_for_eager
    finally:
        simulated.set_capacity(1, None)


@pytest.mark.skipif(Version("4.36") <= VERSION, reason="caches are objects here")
def test_caches_of_tuples_are_left_to_eager_mode(model: Any, sharding: Sharding, places: list[str]) -> None:
    assert reply(model, places[0]).tolist() == right()
    assert "tuples" in sharding.reason_for_eager
