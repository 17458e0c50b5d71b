"""How large a long reply's cache is: hardly larger than transformers' own, where most layers keep a window alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from tests import support

if Version("5") > Version(transformers.__version__):
    pytest.skip("this transformers keeps no window in its cache", allow_module_level=True)

from extensions.sharded_kv.engine.kv.buffer import Room
from extensions.sharded_kv.engine.kv.cache import KVCache

# As Gemma 3 has it: 5 of 6 layers keep a window. Its heads are tiny here, for the ratio is the same with any.
LAYERS, WINDOW, SIZE = 12, 1024, 4
TOKENS = 8000
MOST = 1.03


def empty() -> Any:
    return transformers.DynamicCache(
        config=transformers.Gemma3TextConfig(
            num_hidden_layers=LAYERS,
            sliding_window=WINDOW,
            layer_types=[*["sliding_attention"] * 5, "full_attention"] * (LAYERS // 6),
        )
    )


@torch.no_grad()
def fill(cache: Any, places: list[str], counts: list[int]) -> None:
    """Write so many tokens, then so many, and so on. The first layers are on the first device."""
    share = LAYERS // len(places)
    for count in counts:
        for index in range(LAYERS):
            new = torch.zeros(1, 1, count, SIZE, device=places[index // share])
            cache.update(new, new.clone(), index)


def held_by(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


# The second is as if most of it had come token by token: its buffers grow as often.
@pytest.mark.parametrize(
    "counts",
    [[TOKENS - 100, *[1] * 100], [20, *[60] * ((TOKENS - 80) // 60), *[1] * 60]],
    ids=["long-prompt", "short-prompt"],
)
def test_a_reply_of_8000_tokens_takes_hardly_more_than_transformers_cache(
    devices: support.Devices, counts: list[int]
) -> None:
    places = devices.up_to(2)
    ours = KVCache.in_place_of(empty(), Room(longest=sum(counts) - 1))  # as the reply's that ends then
    plain = empty()
    for cache in (ours, plain):
        fill(cache, places, counts)
    assert ours.get_seq_length() == plain.get_seq_length() == TOKENS
    theirs = held_by(plain)
    for place, size in ours.bytes_by_device().items():
        assert size <= MOST * sum(tensor.nbytes for tensor in theirs if tensor.device == place)
