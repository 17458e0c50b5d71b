"""Sliding windows in graph mode: replies many times as long as the window, in buffers of its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine.graphs import capture, decode
from extensions.sharded_kv.engine.kv.buffer import Buffer
from tests import support
from tools import models, simulated

VERSION = Version(transformers.__version__)
pytestmark = pytest.mark.skipif(Version("5") > VERSION, reason="this transformers keeps no window in its cache")
WINDOW = 16
# One whose layers all have a window, and one where every other layer has.
FAMILIES = ["mistral-sliding", "gemma2"]


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices.up_to(2)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return support.family_or_skip(request.param)


@pytest.fixture
def model(family: str, places: list[str]) -> Any:
    return support.spread(build(family), places)


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


def build(family: str) -> Any:
    return models.build(family, num_hidden_layers=4, sliding_window=WINDOW)


def reply(model: Any, tokens: int = 3 * WINDOW, batch: int = 1, length: int = 9, **options: Any) -> Any:
    place = next(model.parameters()).device
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(batch, length).items()}
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | options
    with torch.no_grad():
        out = model.generate(**inputs, **options)
    return out if options.get("return_dict_in_generate") else out.tolist()


@pytest.mark.parametrize("length", [5, WINDOW - 1, WINDOW, 40])
@pytest.mark.parametrize("tokens", [5, WINDOW, 10 * WINDOW])
def test_replies_of_any_length_have_their_tokens_from_graphs(
    family: str, model: Any, sharding: Sharding, captures: list[Any], length: int, tokens: int
) -> None:
    expected = reply(build(family), tokens, length=length)
    for _ in range(2):
        assert reply(model, tokens, length=length) == expected
        assert sharding.reason_for_eager == ""
    assert len(captures) == 1


@pytest.mark.parametrize("length", [9, 30])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_rows_with_padding_have_their_tokens_from_graphs(
    family: str, model: Any, sharding: Sharding, captures: list[Any], length: int, options: dict[str, Any]
) -> None:
    batch = 1 if options else 3
    expected = reply(build(family), batch=batch, length=length, **options)
    assert reply(model, batch=batch, length=length, **options) == expected
    assert sharding.reason_for_eager == ""
    assert captures


def test_padding_that_has_left_the_window_is_nothing_to_it(family: str, model: Any, sharding: Sharding) -> None:
    inputs = support.prompts(2, WINDOW + 4)
    inputs["attention_mask"][1, : WINDOW + 1] = 0

    def replied(model: Any) -> Any:
        place = next(model.parameters()).device
        given = {name: tensor.to(place) for name, tensor in inputs.items()}
        with torch.no_grad():
            return model.generate(**given, do_sample=False, max_new_tokens=40, min_new_tokens=40).tolist()

    assert replied(model) == replied(build(family))
    assert sharding.reason_for_eager == ""


def test_logits_are_those_of_eager_mode(model: Any, sharding: Sharding, places: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, models.VOCAB_SIZE, (2, 10 * WINDOW), generator=generator).to(places[0])

    def steps() -> Tensor:
        cache, logits = sharding.new_cache(), []
        with torch.no_grad():
            model(tokens[:, :8], past_key_values=cache, use_cache=True)
            for index in range(8, tokens.shape[1]):
                out = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
                logits.append(out.logits.cpu())
        return torch.stack(logits)

    ours = steps()
    assert sharding.reason_for_eager == ""
    sharding.mode = "eager"
    torch.testing.assert_close(ours, steps(), rtol=1e-4, atol=1e-4)


def test_a_layer_with_a_window_takes_no_more_memory_than_that(model: Any, sharding: Sharding) -> None:
    cache = reply(model, 10 * WINDOW, return_dict_in_generate=True).past_key_values
    assert sharding.reason_for_eager == ""
    kinds = cache.kinds()
    for layer in kinds["sliding_attention"]:
        for buffer in layer.buffers:
            assert buffer.tensor.shape[2] <= 2 * WINDOW  # the window, and at least 16 tokens to move seldom
    for layer in kinds.get("full_attention", []):
        for buffer in layer.buffers:
            assert buffer.tensor.shape[2] >= 10 * WINDOW


def test_what_somebody_has_seen_of_a_window_stays_as_it_was(
    family: str, model: Any, sharding: Sharding, places: list[str]
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def replied(model: Any, cache: Any, *, looks: bool) -> list[int]:
        tokens = []
        ids = support.prompts(1)["input_ids"].to(next(model.parameters()).device)
        with torch.no_grad():
            for index in range(5 * WINDOW):
                logits = model(ids, past_key_values=cache, use_cache=True).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                tokens += ids.flatten().tolist()
                if looks and index % 20 == 10:
                    keys = cache.layers[1].keys
                    seen.append((keys, keys.clone()))
        return tokens

    config = model.config
    expected = replied(build(family), transformers.DynamicCache(config=config), looks=False)
    assert replied(model, sharding.new_cache(), looks=True) == expected
    assert sharding.reason_for_eager == ""
    for shown, as_it_was in seen:
        assert torch.equal(shown, as_it_was)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_layer_whose_tokens_somebody_sets_is_read_as_it_is_then(
    family: str, model: Any, sharding: Sharding, name: str
) -> None:
    def replied(model: Any, cache: Any) -> list[int]:
        tokens = []
        ids = support.prompts(1)["input_ids"].to(next(model.parameters()).device)
        with torch.no_grad():
            for index in range(4 * WINDOW):
                ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                tokens += ids.flatten().tolist()
                if index % 21 == 13:
                    for layer in cache.layers[1:3]:
                        setattr(layer, name, getattr(layer, name) * 0.5)
        return tokens

    expected = replied(build(family), transformers.DynamicCache(config=model.config))
    assert replied(model, sharding.new_cache()) == expected
    assert sharding.reason_for_eager == ""


def test_a_cache_that_begins_to_record_its_past_is_left_to_transformers(
    family: str, model: Any, sharding: Sharding
) -> None:
    def replied(model: Any, cache: Any) -> list[int]:
        tokens = []
        ids = support.prompts(1)["input_ids"].to(next(model.parameters()).device)
        with torch.no_grad():
            for index in range(40):
                ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                tokens += ids.flatten().tolist()
                for layer in cache.layers if index == 5 else ():
                    if hasattr(layer, "activate_past_recording"):
                        layer.activate_past_recording()
                if index in (14, 20, 30):
                    cache.crop(-2)
        return tokens

    if Version("5.18") > VERSION:
        pytest.skip("windows of this transformers record nothing, or cannot go back while they do")
    expected = replied(build(family), transformers.DynamicCache(config=model.config))
    assert replied(model, sharding.new_cache()) == expected
    assert "records" in sharding.reason_for_eager


# How many bytes are free from the first token on: enough for accelerate, and too little for graphs.
@pytest.mark.parametrize(
    ("family", "room"),
    [("mistral-sliding", 12_000), ("mistral-sliding", 16_000), ("mistral-sliding", 20_000), ("gemma2", 40_000)],
)
def test_memory_that_is_short_once_leaves_a_reply_without_graphs(
    devices: support.Devices, family: str, model: Any, sharding: Sharding, room: int
) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities can be set on simulated devices")

    def shorten(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if ids.shape[1] == 10:
            simulated.set_capacity(1, simulated.allocated(1) + room)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    try:
        replied = reply(model, 30, stopping_criteria=transformers.StoppingCriteriaList([shorten]))
    finally:
        simulated.set_capacity(1, None)
    assert replied == reply(build(family), 30)
    assert "no room" in sharding.reason_for_eager


def test_a_window_moves_only_once_in_some_tokens(
    family: str, model: Any, sharding: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    move = Buffer._move
    monkeypatch.setattr(Buffer, "_move", lambda self, start: (moved.append(self), move(self, start))[1])
    for length in (12, 20, 40):  # with buffers of its own, and with those of the reply before
        moved.clear()
        cache = reply(model, 5 * WINDOW, length=length, return_dict_in_generate=True).past_key_values
        buffers = sum(len(layer.buffers) for layer in cache.kinds()["sliding_attention"])
        assert len(moved) <= buffers * (5 * WINDOW / 8 + 2)
        reply(model, 2, length=length)


def test_it_can_go_back_a_little_and_on_again(family: str, model: Any, sharding: Sharding, places: list[str]) -> None:
    ids = support.prompts(1, 4 * WINDOW)["input_ids"].to(places[0])
    cache = sharding.new_cache()

    def logits_of(begin: int) -> list[Tensor]:
        with torch.no_grad():
            return [
                model(ids[:, index : index + 1], past_key_values=cache, use_cache=True).logits.cpu()
                for index in range(begin, 4 * WINDOW)
            ]

    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
    first = logits_of(8)
    cache.truncate(4 * WINDOW - 3)
    again = logits_of(4 * WINDOW - 3)
    assert sharding.reason_for_eager == ""
    torch.testing.assert_close(again, first[-3:], rtol=1e-4, atol=1e-4)


def test_switches_in_the_midst_of_a_reply_change_no_token(family: str, model: Any, sharding: Sharding) -> None:
    expected = reply(build(family), 5 * WINDOW)
    steps = iter(range(1000))

    def switch(*_: Any, **__: Any) -> bool:
        index = next(steps)
        if index % 3 == 0:
            sharding.mode = "eager" if sharding.mode == "graph" else "graph"
        if index % 20 == 7:
            sharding.disable()
        elif index % 20 == 9:
            sharding.enable()
        return False

    criteria = transformers.StoppingCriteriaList([switch])
    assert reply(model, 5 * WINDOW, stopping_criteria=criteria) == expected


def test_no_memory_is_left_behind(devices: support.Devices, model: Any, sharding: Sharding, places: list[str]) -> None:
    def allocated() -> list[int]:
        return [devices.runtime.memory_allocated(place) for place in places]

    reply(model, 2)
    sharding.disable()
    before = allocated()
    sharding.enable()
    for tokens in (5, 60, 20):
        reply(model, tokens)
    sharding.disable()
    assert allocated() == before
