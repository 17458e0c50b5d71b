"""Steps of several tokens in graph mode, as prompt lookup and assisted generation have them verified."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine import compat
from extensions.sharded_kv.engine.graphs import capture, decode, eligible, runner
from tests import support
from tools import models

VERSION = Version(transformers.__version__)
pytestmark = pytest.mark.skipif(Version("5") > VERSION, reason="masks of this transformers differ from step to step")
TOKENS = 60
FAMILIES = ("llama", "llama-gqa", "gptj", "opt", "mixtral", "qwen2")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many steps of so many tokens ran on static buffers."""
    counted: Counter[int] = Counter()
    step = runner.CacheGraphs.step

    def count(graphs: Any, of: Any, *args: Any) -> Any:
        output = step(graphs, of, *args)
        counted[of.tokens] += 1
        return output

    monkeypatch.setattr(runner.CacheGraphs, "step", count)
    return counted


def sharded(family: str, devices: support.Devices, count: int = 2) -> tuple[Any, Any]:
    places = devices.up_to(count)
    model = support.spread(models.build(family), places)
    sharding = shard(model)
    sharding.mode = "graph"
    return model, sharding


def replied(model: Any, **options: Any) -> list[list[int]]:
    ids = torch.tensor([list(range(5, 13)) * 6], device=next(model.parameters()).device)
    limits = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with torch.no_grad():
        tokens: list[list[int]] = model.generate(ids, **limits, **options).tolist()
    return tokens


@pytest.mark.parametrize("candidates", [3, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_is_verified_in_graphs(
    devices: support.Devices, steps: Counter[int], family: str, candidates: int
) -> None:
    options = {"prompt_lookup_num_tokens": candidates}
    right = replied(models.build(support.family_or_skip(family)), **options)
    model, sharding = sharded(family, devices)
    for _ in range(2):
        assert replied(model, **options) == right
    assert sharding.failure == ""
    if sharding.reason_for_eager not in ("", eligible.SELDOM):
        pytest.skip(sharding.reason_for_eager)
    assert steps[candidates + 1] > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_assistant_proposes_is_verified_in_graphs(
    devices: support.Devices, steps: Counter[int], family: str
) -> None:
    right = replied(models.build(support.family_or_skip(family)), assistant_model=models.build(family, seed=1))
    model, sharding = sharded(family, devices)
    assistant = models.build(family, device=next(model.parameters()).device)
    assert replied(model, assistant_model=assistant) == right
    assert sharding.failure == ""
    if sharding.reason_for_eager not in ("", eligible.SELDOM):
        pytest.skip(sharding.reason_for_eager)
    assert sum(count for tokens, count in steps.items() if tokens > 1) > 5


def logits_of(model: Any, cache: Any, counts: list[int], *, is_padded: bool) -> list[Tensor]:
    """Of steps of so many tokens, behind a prompt, in one's own loop."""
    place = next(model.parameters()).device
    inputs = support.prompts(2, 9)
    ids = torch.cat([inputs["input_ids"], torch.randint(5, 150, (2, sum(counts)), generator=torch.manual_seed(0))], 1)
    mask = torch.ones_like(ids)
    if is_padded:
        mask[:, :9] = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, begin = [], 0
    for end in itertools.accumulate([9, *counts]):
        step = {"input_ids": ids[:, begin:end], "position_ids": positions[:, begin:end]}
        given = {name: tensor.to(place) for name, tensor in step.items()}
        if is_padded:
            given["attention_mask"] = mask[:, :end].to(place)
        with torch.no_grad():
            logits.append(model(**given, past_key_values=cache, use_cache=True).logits.float().cpu())
        begin = end
    return logits


@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama-gqa", "gptj", "mistral-sliding", "gemma2"])
def test_each_of_several_tokens_attends_to_those_before_it(
    devices: support.Devices, steps: Counter[int], family: str, is_padded: bool
) -> None:
    counts = [3, 3, 3, 3, 1, 1, 3, 1, 1, 3, 3, 3, 5, 1, 1, 3]
    plain = models.build(support.family_or_skip(family))
    model, sharding = sharded(family, devices)
    expected = logits_of(plain, compat.empty_dynamic_cache(plain), counts, is_padded=is_padded)
    seen = logits_of(model, sharding.new_cache(), counts, is_padded=is_padded)
    for ours, right in zip(seen, expected, strict=True):
        assert torch.allclose(ours, right, atol=1e-3)
    assert steps[3] >= 6
    assert steps[1] >= 5
    assert steps[5] == 0  # came once


def test_a_cache_that_is_cropped_after_each_step_goes_on_in_graphs(
    devices: support.Devices, steps: Counter[int]
) -> None:
    def tokens_of(model: Any, cache: Any) -> list[list[int]]:
        ids = torch.tensor([list(range(5, 14))], device=next(model.parameters()).device)
        chosen = []
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            for step in range(12):
                guess = torch.tensor([[20 + step, 30 + step, 40 + step]], device=ids.device)
                chosen.append(model(guess, past_key_values=cache, use_cache=True).logits[0].argmax(-1).tolist())
                cache.crop(-2)
        return chosen

    plain = models.build(support.family_or_skip("llama-gqa"))
    model, sharding = sharded("llama-gqa", devices)
    assert tokens_of(model, sharding.new_cache()) == tokens_of(plain, compat.empty_dynamic_cache(plain))
    assert steps[3] >= 9


class ReadsSeveralBack(torch.nn.Module):
    """A part of a model that looks at a number on its GPU where several tokens come at once."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Any:
        return self.inner(hidden) if hidden.shape[1] == 1 or hidden.abs().max() < 1e9 else hidden


def test_steps_that_cannot_be_captured_cost_others_no_graphs(
    devices: support.Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []

    class Capture(capture.Capture):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            begun.append(self)

    monkeypatch.setattr(decode, "Capture", Capture)
    plain = models.build("llama-gqa")
    model = models.build("llama-gqa")
    model.model.layers[1].mlp = ReadsSeveralBack(model.model.layers[1].mlp)
    model = support.spread(model, devices.up_to(2))
    sharding = shard(model)
    sharding.mode = "graph"
    counts = [1, 1, 1, *[3] * 6, 1, 1, 1]
    expected = logits_of(plain, compat.empty_dynamic_cache(plain), counts, is_padded=False)
    seen = logits_of(model, sharding.new_cache(), counts, is_padded=False)
    assert all(torch.allclose(ours, right, atol=1e-3) for ours, right in zip(seen, expected, strict=True))
    assert sharding.reason_for_eager == ""
    assert len(begun) == 1
