"""The benchmark of attention alone: one new token over a buffer, by each way that a GPU has to do it."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from extensions.sharded_kv.engine.graphs import attention

from .bandwidth import copy_bandwidth

# Query heads, key heads, head size, tokens: Llama-7B, Llama-3-8B, Gemma-3-12B.
CASES = [(32, 32, 128, 2000), (32, 8, 128, 2000), (32, 8, 128, 8000), (32, 8, 128, 32000), (16, 8, 256, 8000)]
# Buffers have room for some tokens to come, in such steps.
_ROOM = 512
_MOST_LAYERS = 32
_MOST_BYTES = 8e9


@dataclasses.dataclass(frozen=True)
class Timing:
    """One way in one case.

    Attributes:
        heads, key_heads, head_size, tokens: the case.
        layers: so many buffers one after the other, so that none is in the GPU's cache.
        way: its name.
        milliseconds: for 32 layers.
        to_floor: times what reading the filled keys and values once takes.
        error: from float32's result, relative to the largest number.
    """

    heads: int
    key_heads: int
    head_size: int
    tokens: int
    layers: int
    way: str
    milliseconds: float
    to_floor: float
    error: float


def run(device: torch.device, file: Path | None = None) -> str:
    """Time all cases on a GPU.

    Args:
        device: the GPU.
        file: gets every number, as JSON.

    Returns:
        A table in Markdown: milliseconds for 32 layers, and in brackets how that is to the floor.
    """
    bandwidth = copy_bandwidth(device)
    cases = tqdm(CASES, file=sys.stderr, leave=False, disable=None)
    timings = [timing for case in cases for timing in _case(device, bandwidth, *case)]
    if file is not None:
        name, versions = torch.cuda.get_device_name(device), {"torch": torch.__version__}
        rows = [dataclasses.asdict(timing) for timing in timings]
        file.write_text(
            json.dumps({"gpu": name, "versions": versions, "bandwidth": bandwidth, "timings": rows}, indent=1)
        )
    return _table(timings)


def _case(
    device: torch.device, bandwidth: float, heads: int, key_heads: int, size: int, tokens: int
) -> Iterator[Timing]:
    width = -(-(tokens + 1) // _ROOM) * _ROOM
    layers = max(1, min(_MOST_LAYERS, int(_MOST_BYTES / (4 * key_heads * width * size))))
    new = functools.partial(torch.randn, dtype=torch.float16, device=device)
    keys, values = ([new(1, key_heads, width, size) for _ in range(layers)] for _ in range(2))
    query, scale = new(1, heads, 1, size), size**-0.5
    mask = torch.zeros(1, 1, 1, width, dtype=torch.float16, device=device)
    mask[..., tokens:] = torch.finfo(torch.float16).min
    right = attention.as_rows(query.float(), keys[0].float(), values[0].float(), mask.float(), scale)
    floor = 4 * key_heads * tokens * size * _MOST_LAYERS / bandwidth * 1000
    for name, way in _ways(query, keys[0], values[0], mask).items():
        try:
            error = attention.difference(way(query, keys[0], values[0], mask, scale), right)
            each = [functools.partial(way, query, k, v, mask, scale) for k, v in zip(keys, values, strict=True)]
            took = attention.measure(lambda each=each: [run() for run in each], device) * _MOST_LAYERS / layers
        except Exception as error_of_way:
            print(f"{name} cannot be had: {type(error_of_way).__name__}: {error_of_way}", file=sys.stderr)
            continue
        yield Timing(heads, key_heads, size, tokens, layers, name, round(took, 3), round(took / floor, 2), error)


def _ways(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> dict[str, attention.Way]:
    """The engine's ways, those of torch also without cuDNN's kernels, and what transformers did before 5.23."""
    ways = {"repeated": _repeated, **attention.ways_for(query, keys, values, mask)}
    for name in ("repeated", "rows", "grouped"):
        ways[f"{name}, no cuDNN"] = _without_cudnn(ways[name])
    return ways


def _repeated(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    each = [tensor.repeat_interleave(group, 1) if group > 1 else tensor for tensor in (keys, values)]
    return functional.scaled_dot_product_attention(query, *each, attn_mask=mask, scale=scale).transpose(1, 2)


def _without_cudnn(way: attention.Way) -> attention.Way:
    def run(*given: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return way(*given)

    return run


def _table(timings: list[Timing]) -> str:
    """Markdown: a row for each way, a column for each case."""
    cases = list(dict.fromkeys((t.heads, t.key_heads, t.head_size, t.tokens) for t in timings))
    names = list(dict.fromkeys(t.way for t in timings))
    found = {(t.way, t.heads, t.key_heads, t.head_size, t.tokens): t for t in timings}
    lines = ["| | " + " | ".join(f"{k} of {h} heads of {s}, {t:,}" for h, k, s, t in cases) + " |"]
    lines.append("| --- |" + " --- |" * len(cases))
    for name in names:
        each = (found.get((name, *case)) for case in cases)
        cells = ["" if t is None else f"{t.milliseconds:.2f} ({t.to_floor:.2f})" for t in each]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
