"""Every architecture, every way of generating: the CPU's tokens, and accelerate's logits to the last bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import transformers
from packaging.version import Version

from extensions.sharded_kv import shard
from tests import support
from tools import models

# (family, number of devices): the two that come first in everything on all numbers of devices, the others once.
CASES = [(name, count) for name in ("llama", "llama-gqa", "gptj") for count in (2, 3, 4)] + [
    (name, 2 + index % 3)
    for index, name in enumerate(
        ("gpt-neox", "opt", "bloom", "mpt", "falcon", "mistral-sliding", "mixtral", "gemma2", "t5", "qwen2", "phi")
    )
]
# One for each of four devices, and two of each kind where kinds take turns.
LAYERS = {"num_hidden_layers": 4}
# What transformers itself cannot do, on one device either, and from which version on it can.
BROKEN_UPSTREAM = {
    ("gemma2", "contrastive"): "5",  # HybridCache, which has no contrastive search
    ("gemma2", "prompt-lookup"): "5",  # nor a length
    ("gemma2", "earlier-cache"): "5",  # nor does generate() take one
    ("gemma2", "static-cache"): "5",  # its mask has the prompt's length, not the cache's
}


def build(family: str) -> Any:
    layers = LAYERS | ({"num_decoder_layers": 4} if family == "t5" else {})
    return models.build(support.family_or_skip(family), **layers)


@functools.lru_cache(maxsize=64)
def on_cpu(family: str, way: support.Way) -> list[list[int]]:
    """The tokens of the same model on the CPU, without hooks."""
    tokens: list[list[int]] = way.run(build(family), "cpu").tokens.tolist()
    return tokens


@pytest.mark.parametrize("way", support.WAYS, ids=str)
@pytest.mark.parametrize(("family", "count"), CASES)
def test_a_sharded_model_replies_as_on_the_cpu_and_as_under_accelerate(
    devices: support.Devices, family: str, count: int, way: support.Way
) -> None:
    model = build(family)
    if not way.needs(model):
        pytest.skip(f"{family} has no {way} on this stack")
    if Version(transformers.__version__) < Version(BROKEN_UPSTREAM.get((family, way.name), "0")):
        pytest.skip(f"{way} of {family} is broken in this transformers")
    places = devices(count)
    model = support.spread(model, places)
    theirs = way.run(model, places[0])
    sharding = shard(model)
    assert sharding.active
    assert sharding.enabled
    ours = way.run(model, places[0])
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert support.same(ours.scores, theirs.scores)
    assert support.same(ours.states, theirs.states)
    assert ours.places == theirs.places
    if devices.kind == "sim":  # other kernels than the CPU's round otherwise
        assert ours.tokens.tolist() == on_cpu(family, way)
