"""Every family of `tools.models`, replies six times as long as its windows: the CPU's tokens, mostly from graphs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from extensions.sharded_kv import shard
from tests import support
from tools import families, models

if Version("5.23") > Version(transformers.__version__):
    pytest.skip("the lists are of transformers 5.23", allow_module_level=True)

# Those that run eagerly, each for a reason: docs/models.md has it.
WITHOUT_GRAPHS = frozenset({"gpt-neo", "llama4", "minimax", "recurrent-gemma"})
# How many tokens on how many devices: windows have 16, prompts 9, and so all of them slide.
LENGTHS = {1: 20, 2: 96, 4: 20}


@functools.cache
def right(family: str) -> list[list[int]]:
    """The tokens of the whole model on the CPU."""
    return reply(models.build(family), "cpu", max(LENGTHS.values()))


def reply(model: Any, place: str, tokens: int) -> list[list[int]]:
    """What it adds to two prompts, one of them padded on the left."""
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(2).items()}
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    replied: list[list[int]] = out[:, -tokens:].tolist()
    return replied


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("family", models.DECODERS)
def test_a_long_reply_has_the_cpus_tokens(
    devices: support.Devices, replays: list[object], family: str, count: int
) -> None:
    places, tokens = devices(count), LENGTHS[count]
    model = support.spread(models.build(family), places)
    sharding = shard(model)
    sharding.mode = "graph"
    assert reply(model, places[0], tokens) == [row[:tokens] for row in right(family)]
    assert sharding.failure == ""
    assert bool(replays) == (family not in WITHOUT_GRAPHS)
    assert bool(replays) != bool(sharding.reason_for_eager)
    assert len(replays) in (0, tokens - 2)  # the prompt, and the step that is captured
    sharding.detach()


def test_most_families_have_graphs() -> None:
    assert set(models.DECODERS) >= WITHOUT_GRAPHS
    assert len(set(models.DECODERS) - WITHOUT_GRAPHS) >= 60


def test_the_documents_say_which_families_have_graphs() -> None:
    document = Path(__file__).parents[2] / "docs" / "models.md"
    rows = families.from_markdown(document.read_text())
    assert [(row.family, row.architecture) for row in rows] == [
        (name, models.ALL_FAMILIES[name].model_type) for name in models.DECODERS
    ]
    assert {row.family for row in rows if row.graph_mode != families.YES} == WITHOUT_GRAPHS
