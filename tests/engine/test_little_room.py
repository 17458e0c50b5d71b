"""Little memory: whatever fits under accelerate fits in every mode, whichever replies were before it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from packaging.version import Version

from extensions.sharded_kv import shard
from tests import support
from tools import models, simulated

VERSION = Version(transformers.__version__)
pytestmark = pytest.mark.skipif(Version("4.44") > VERSION, reason="no graph mode with this transformers")
CASES = 15 if Version("5") <= VERSION else 6
# A cache has a number for each device that says where to write, and simulated devices round nothing.
SPARE = 1.02


@dataclasses.dataclass(frozen=True)
class Asked:
    """One call of generate()."""

    length: int
    rows: int
    beams: int
    tokens: int
    caches: bool

    def of(self, model: Any) -> list[list[int]]:
        """The reply."""
        inputs = {name: tensor.to("sim:0") for name, tensor in support.prompts(self.rows, self.length).items()}
        options = {"num_beams": self.beams, "use_cache": self.caches}
        tokens = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens}
        with torch.no_grad():
            replied: list[list[int]] = model.generate(**inputs, do_sample=False, **tokens, **options).tolist()
        return replied


LONG = Asked(length=9, rows=1, beams=1, tokens=200, caches=True)
asked = st.builds(
    Asked,
    length=st.integers(2, 150),
    rows=st.integers(1, 3),
    beams=st.sampled_from([1, 1, 3]),
    tokens=st.integers(2, 60),
    caches=st.sampled_from([True, True, True, True, False]),
)


KNOWN = {
    "long": [LONG],
    "beams": [dataclasses.replace(LONG, beams=3)],
    "beams-of-rows": [Asked(length=78, rows=3, beams=3, tokens=34, caches=True)],
    "rows": [dataclasses.replace(LONG, rows=3)],
    "long-prompt-after": [LONG, dataclasses.replace(LONG, length=300, tokens=3)],
    "more-rows-after": [LONG, dataclasses.replace(LONG, length=100, rows=3, tokens=3)],
    "no-cache-after": [LONG, dataclasses.replace(LONG, length=150, tokens=3, caches=False)],
}


@pytest.fixture(autouse=True, scope="module")
def _capacities(devices: support.Devices) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities can be set on simulated devices")


@pytest.mark.parametrize("name", KNOWN)
def test_replies_that_people_had_no_room_for_fit(name: str) -> None:
    check(KNOWN[name])


@hypothesis.settings(max_examples=CASES, deadline=None, print_blob=True)
@hypothesis.given(st.lists(asked, min_size=1, max_size=4))
def test_replies_that_fit_under_accelerate_fit_in_every_mode(replies: list[Asked]) -> None:
    check(replies)


def check(replies: list[Asked]) -> None:
    """Run the replies by accelerate, and in every mode with the memory that they took there."""
    model = support.spread(models.build("llama", num_hidden_layers=4), ["sim:0", "sim:1"])
    gc.collect()
    simulated.reset_peak()
    right = [each.of(model) for each in replies]
    room = [int(simulated.peak(index) * SPARE) for index in range(2)]
    sharding = shard(model)
    for mode in ("eager", "graph"):
        sharding.mode = mode
        gc.collect()
        with contextlib.ExitStack() as stack:
            for index, size in enumerate(room):
                stack.callback(simulated.set_capacity, index, None)
                simulated.set_capacity(index, size)
            assert [each.of(model) for each in replies] == right
    assert sharding.failure == ""
    sharding.detach()
