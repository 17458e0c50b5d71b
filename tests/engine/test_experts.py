"""Mixtures of experts in graph mode, for each way in which transformers runs the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from extensions.sharded_kv import shard
from tests import support
from tools import models

if not hasattr(transformers.PreTrainedModel, "get_experts_implementation"):
    pytest.skip("this transformers has one way to run experts", allow_module_level=True)

TOKENS = 12
# Tiny, and one layer on each GPU of what Qwen3-30B-A3B has 48 of: 1.2 GB in bf16, nearly all of it experts.
TINY = {"hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
REAL = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
# None is what transformers takes where nobody says: grouped_mm, where it can.
WAYS = [None, "grouped_mm", "batched_mm"]
# For each hidden size, which of the prompts 0 to 99 has the clearest tokens: in bf16 the best two logits of others are
# equal or nearly so, and graph mode's attention rounds otherwise than torch's. Here they are 9 roundings apart or more.
CLEAR = {64: 99, 2048: 14}


@pytest.fixture(scope="module", params=["tiny", "real-size"])
def spread(request: pytest.FixtureRequest, devices: support.Devices) -> Any:
    """A model of two layers, one on each device."""
    if request.param == "real-size" and devices.kind == "sim":
        pytest.skip("experts of real size are for real GPUs: here they take 2.5 GB and half a minute")
    places = devices(2)
    settings = TINY if request.param == "tiny" else REAL
    config = models.config("qwen3-moe", num_hidden_layers=2, **settings)
    device = places[0] if devices.kind == "cuda" else "cpu"
    return support.spread(models.build(config, torch.bfloat16, device), places)


@pytest.fixture(params=WAYS, ids=str)
def model(request: pytest.FixtureRequest, spread: Any) -> Iterator[Any]:
    """The same, which runs its experts in one of the ways."""
    usual = spread.get_experts_implementation()[""]
    if request.param is not None:
        spread.set_experts_implementation(request.param)
    yield spread
    spread.set_experts_implementation(usual)


def prompt(model: Any) -> dict[str, Any]:
    place, seed = model.get_input_embeddings().weight.device, CLEAR[model.config.hidden_size]
    return {name: tensor.to(place) for name, tensor in support.prompts(1, seed=seed).items()}


@torch.no_grad()
def generated(model: Any) -> list[int]:
    """A greedy reply. In its decode steps transformers has batched_mm where it had grouped_mm."""
    out = model.generate(**prompt(model), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    replied: list[int] = out[0, -TOKENS:].tolist()
    return replied


@torch.no_grad()
def written(model: Any, cache: Any) -> list[int]:
    """The same in a loop of one's own, where nobody changes the way of the experts."""
    ids, tokens = prompt(model)["input_ids"], []
    for _ in range(TOKENS):
        ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens += ids.flatten().tolist()
    return tokens


def test_a_reply_has_eager_modes_tokens_from_graphs(model: Any, replays: list[object]) -> None:
    sharding = shard(model)
    right = generated(model)
    sharding.mode = "graph"
    replied, reason = generated(model), sharding.reason_for_eager
    sharding.detach()
    assert replied == right
    assert reason == ""
    assert len(replays) == TOKENS - 2  # not the prompt, and not the step that is traced


def test_a_loop_of_ones_own_has_eager_modes_tokens_from_graphs(model: Any, replays: list[object]) -> None:
    sharding = shard(model)
    right = written(model, sharding.new_cache())
    sharding.mode = "graph"
    replied, reason = written(model, sharding.new_cache()), sharding.reason_for_eager
    sharding.detach()
    assert replied == right
    assert reason == ""
    assert len(replays) == TOKENS - 2


def test_experts_that_are_run_one_by_one_have_no_graphs(spread: Any, replays: list[object]) -> None:
    usual = spread.get_experts_implementation()[""]
    spread.set_experts_implementation("eager")
    sharding = shard(spread)
    right = generated(spread)
    sharding.mode = "graph"
    replied, reason = generated(spread), sharding.reason_for_eager
    sharding.detach()
    spread.set_experts_implementation(usual)
    assert replied == right
    assert reason != ""
    assert not replays
