"""Attention of one new token by a Triton kernel that splits the keys among all of a GPU's processors.

It never reads a key or value that is masked: so of a buffer it reads what is filled, wherever that lies. The method is
that of Flash-Decoding (Tri Dao, Daniel Haziza, Francisco Massa, Grigory Sizov, 2023): each program attends to a part of
the keys, and a second kernel merges the parts by their largest scores and sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Keys in one turn of a program's loop, and programs for each processor: enough to keep its memory busy.
_KEYS_AT_ONCE = 64
_PROGRAMS_PER_PROCESSOR = 4
# More than one program can merge. It is compiled for as many as there may be, and so once for all lengths.
_MOST_SPLITS = 128
# Rows of a product on tensor cores; the queries that share keys are padded to so many.
_FEWEST_ROWS = 16


@triton.jit(do_not_specialize=["width", "splits", "heads"])
def _attend_to_part(
    query,
    keys,
    values,
    mask,
    parts,
    largest,
    sums,
    scale,
    masked_below,
    width,
    splits,
    heads,
    query_batch,
    query_head,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    mask_batch,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
):
    batch, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    row, size, key = tl.arange(0, ROWS), tl.arange(0, SIZE_PADDED), tl.arange(0, KEYS)
    is_row, is_size = row < GROUP, size < SIZE
    first_query = query + batch * query_batch + head * GROUP * query_head
    queries = tl.load(
        first_query + row[:, None] * query_head + size[None, :], is_row[:, None] & is_size[None, :], other=0.0
    )
    first_key = keys + batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
    first_value = values + batch.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, SIZE_PADDED), tl.float32)
    for begin in range(split * KEYS, width, splits * KEYS):
        token = begin + key
        bias = tl.load(mask + batch * mask_batch + token, token < width, other=float("-inf")).to(tl.float32)
        is_seen = bias > masked_below
        if tl.max(is_seen.to(tl.int32), 0) > 0:
            is_read = is_seen[:, None] & is_size[None, :]
            key_rows = tl.load(first_key + token[:, None].to(tl.int64) * key_token + size[None, :], is_read, other=0.0)
            value_rows = tl.load(
                first_value + token[:, None].to(tl.int64) * value_token + size[None, :], is_read, other=0.0
            )
            scores = tl.dot(queries, tl.trans(key_rows), input_precision="ieee") * scale + bias[None, :]
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            rescale = tl.exp(highest - higher)
            total = total * rescale + tl.sum(weights, 1)
            product = tl.dot(weights.to(value_rows.dtype), value_rows, input_precision="ieee")
            result = result * rescale[:, None] + product
            highest = higher
    place = (tl.program_id(0) * GROUP + row) * splits + split
    tl.store(largest + place, highest, is_row)
    tl.store(sums + place, total, is_row)
    tl.store(parts + place[:, None] * SIZE + size[None, :], result, is_row[:, None] & is_size[None, :])


@triton.jit(do_not_specialize=["splits"])
def _merge(
    parts,
    largest,
    sums,
    out,
    splits,
    SPLITS_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    row = tl.program_id(0)
    split, size = tl.arange(0, SPLITS_PADDED), tl.arange(0, SIZE_PADDED)
    is_split, is_size = split < splits, size < SIZE
    highest = tl.load(largest + row * splits + split, is_split, other=float("-inf"))
    share = tl.exp(highest - tl.max(highest, 0))
    total = tl.sum(share * tl.load(sums + row * splits + split, is_split, other=0.0), 0)
    place = (row * splits + split[:, None]) * SIZE + size[None, :]
    part = tl.load(parts + place, is_split[:, None] & is_size[None, :], other=0.0)
    result = tl.sum(share[:, None] * part, 0) / total
    tl.store(out + row * SIZE + size, result.to(out.dtype.element_ty), is_size)


def takes(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> bool:
    """Whether the kernel is right for these: their sizes and layouts, and that they are of one type."""
    return (
        query.shape[3] <= 256
        and query.dtype == keys.dtype == values.dtype
        and all(tensor.stride(3) == 1 for tensor in (query, keys, values, mask))
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives for one new token.

    Args:
        query: [batch, heads, 1, head size].
        keys, values: [batch, key heads, tokens, head size].
        mask: [batch or 1, 1, 1, tokens], added to the scores. Tokens with the lowest number of its type are not read.
        scale: of the scores.

    Returns:
        [batch, 1, heads, head size].
    """
    batch, query_heads, _, size = query.shape
    heads, width = keys.shape[1], keys.shape[2]
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 8
    turns = triton.cdiv(width, _KEYS_AT_ONCE)
    most = max(1, min(_MOST_SPLITS, _PROGRAMS_PER_PROCESSOR * processors // (batch * heads)))
    splits = min(turns, most)
    rows = batch * query_heads
    parts = query.new_empty((rows, splits, size), dtype=torch.float32)
    largest, sums = (query.new_empty((rows, splits), dtype=torch.float32) for _ in range(2))
    out = query.new_empty((batch, 1, query_heads, size))
    group = query_heads // heads
    padded: dict[str, Any] = {"SIZE": size, "SIZE_PADDED": max(16, triton.next_power_of_2(size))}
    _attend_to_part[(batch * heads, splits)](
        query,
        keys,
        values,
        mask,
        parts,
        largest,
        sums,
        scale,
        torch.finfo(mask.dtype).min / 2,
        width,
        splits,
        heads,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        mask.stride(0) if mask.shape[0] > 1 else 0,
        GROUP=group,
        ROWS=max(_FEWEST_ROWS, triton.next_power_of_2(group)),
        KEYS=_KEYS_AT_ONCE if size <= 128 else _KEYS_AT_ONCE // 2,
        **padded,
    )
    _merge[(rows,)](parts, largest, sums, out, splits, SPLITS_PADDED=triton.next_power_of_2(most), **padded)
    return out
