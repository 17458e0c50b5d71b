"""The least that one token can take: what the bandwidth of a GPU's memory allows."""

from __future__ import annotations

import time
from typing import Any

import torch

from extensions.sharded_kv.engine import devices as device_memory

from .. import quantized
from .memory import size_of
from .records import Setting, microseconds


def bandwidth_floor(setting: Setting, config: Any, model: Any, bandwidth: float) -> dict[str, float]:
    """The least that one token takes: its weights and cache are read once, by one GPU after the other.

    As gpt-fast counts it. Of layers with a sliding window no more of the context is read than that.

    Returns:
        bytes_per_second, read and written, of copies within a GPU's memory; bytes_per_token, of the weights (of the
        embedding one row is read) and of the cache of the context; seconds_per_token, one by the other.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = size_of(weight for weight in quantized.weights(model) if weight is not embedding or weight is head)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = head_size * (getattr(config, "num_key_value_heads", None) or heads)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    windows = [config.sliding_window if kind == "sliding_attention" else setting.context for kind in kinds]
    tokens = sum(min(setting.context, window) for window in windows)
    cache = 2 * setting.batch * tokens * width * embedding.element_size()
    seconds = microseconds((read + cache) / bandwidth)
    return {"bytes_per_second": round(bandwidth), "bytes_per_token": read + cache, "seconds_per_token": seconds}


def copy_bandwidth(device: torch.device, size: int = 2**28, copies: int = 20) -> float:
    """Bytes per second that a device reads and writes when it copies within its memory: the best of three trials."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    trials = []
    for _ in range(4):  # the first warms up
        device_memory.runtime(device).synchronize(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        device_memory.runtime(device).synchronize(device)
        trials.append(time.perf_counter() - began)
    return 2 * size * copies / min(trials[1:])
