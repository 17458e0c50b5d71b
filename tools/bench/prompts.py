"""The benchmark of prompts: the time to the first token, of whole prompts, in chunks, and of a chat's next message."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine import devices as device_memory

from .. import models
from .building import build
from .memory import bytes_on
from .records import Setting
from .running import generate, no_collections

# Tokens of a prompt; of a chat's next message those that are kept and those that are new.
LENGTHS = (2048, 4096, 8192, 16384)
KEPT, NEW = 2000, 30
_DECODED = 24
ONE_GPU, ACCELERATE, WHOLE, CHUNKS = "one GPU, whole", "accelerate", "whole", "chunks"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One reply.

    Attributes:
        variant: how the model ran.
        tokens: of the prompt.
        round: the samples of one round were taken after each other.
        milliseconds: to the first token; of "decode" variants for one token.
        peak: bytes above the weights at most, of all devices together.
    """

    variant: str
    tokens: int
    round: int
    milliseconds: float
    peak: int


def run(setting: Setting, lengths: Sequence[int], chunks: Sequence[int], file: Path | None = None) -> str:
    """Time all variants on one device and on all, by turns.

    Args:
        setting: which model and devices, and how many rounds.
        lengths: tokens of the prompts.
        chunks: more sizes of chunks to try beside the usual one.
        file: gets every sample, as JSON.

    Returns:
        A table in Markdown: milliseconds, and in brackets how that is to one GPU.
    """
    config, devices = setting.config(), setting.torch_devices
    config.max_position_embeddings = max(*lengths, models.MAX_POSITIONS, KEPT + 2 * NEW)
    one = build(config, setting.torch_dtype, setting.places[:1])
    spread = build(config, setting.torch_dtype, setting.places)
    sharding = shard(spread)
    bench = _Bench(devices, torch.Generator().manual_seed(0), config.vocab_size // 2)
    variants: list[tuple[str, Any, Callable[[], Any]]] = [
        (ONE_GPU, one, contextlib.nullcontext),
        (ACCELERATE, spread, lambda: _off(sharding)),
        (WHOLE, spread, lambda: _chunked(sharding, 0)),
        (CHUNKS, spread, lambda: _chunked(sharding, None)),
        *[(f"chunks of {size}", spread, lambda size=size: _chunked(sharding, size)) for size in chunks],
    ]
    samples = []
    with tqdm(total=len(lengths) * (setting.rounds + 1), file=sys.stderr, leave=False, disable=None) as bar:
        for tokens in lengths:
            for round in range(-1, setting.rounds):
                for name, model, applied in variants:
                    with applied():
                        took = bench.first_token(model, bench.text(tokens))
                    samples.append(Sample(name, tokens, round, *took))
                bar.update()
    samples += _next_messages(bench, one, spread, sharding, setting.rounds)
    samples = [sample for sample in samples if sample.round >= 0]
    if file is not None:
        about = {
            "date": datetime.date.today().isoformat(),
            "gpus": [device_memory.name(device) for device in devices],
            "torch": torch.__version__,
            "size": setting.size,
            "samples": [dataclasses.asdict(sample) for sample in samples],
        }
        file.write_text(json.dumps(about, indent=1))
    return in_markdown(samples)


def _next_messages(bench: _Bench, one: Any, spread: Any, sharding: Any, rounds: int) -> list[Sample]:
    """A conversation's next message, kept and not, and a token in the same mode to compare it with."""
    samples = []
    past = bench.text(KEPT)
    for mode in ("eager", "graph"):
        sharding.mode, sharding.kept_conversations = mode, 1
        generate(spread, past, _DECODED, min_new_tokens=_DECODED)  # what is kept of it is the prompt and its reply
        for round in range(-1, rounds):
            message = torch.cat([past, bench.text(NEW)], 1)
            samples.append(Sample(f"next message, {mode}", KEPT + NEW, round, *bench.first_token(spread, message)))
            samples.append(Sample(f"a token, {mode}", KEPT + NEW, round, bench.token(spread, message), 0))
        sharding.kept_conversations = 0
        for round in range(-1, rounds):
            message = torch.cat([past, bench.text(NEW)], 1)
            took = bench.first_token(spread, message)
            samples.append(Sample(f"the same, not kept, {mode}", KEPT + NEW, round, *took))
    for round in range(-1, rounds):
        took = bench.first_token(one, bench.text(KEPT + NEW))
        samples.append(Sample(ONE_GPU, KEPT + NEW, round, *took))
    return samples


def check(setting: Setting) -> dict[str, float]:
    """How far the logits after a prompt are from those of the whole prompt on one device, relative to the largest.

    Returns:
        For a prompt in chunks, and for one of which most was kept: by a prompt before, and by a reply in graph mode.
        "itself" is one device's whole prompt with the last token read alone: other shapes round otherwise.
    """
    config, devices = setting.config(), setting.torch_devices
    one = build(config, setting.torch_dtype, setting.places[:1])
    spread = build(config, setting.torch_dtype, setting.places)
    sharding = shard(spread)
    bench = _Bench(devices, torch.Generator().manual_seed(0), config.vocab_size // 2)
    longest = setting.context - _DECODED - NEW
    text, differences = bench.text(longest), {}
    right = bench.logits(one, text)
    with torch.no_grad():
        before = one(text[:, :-1], use_cache=True, logits_to_keep=1)
        alone = one(text[:, -1:], past_key_values=before.past_key_values).logits[0, -1].float().cpu()
    differences["itself"] = _difference(alone, right)
    with _chunked(sharding, longest // 4):
        differences["chunks"] = _difference(bench.logits(spread, text), right)
    for mode, tokens in (("eager", 1), ("graph", _DECODED)):
        sharding.mode, sharding.kept_conversations = mode, 1
        past = text[:, : longest - NEW]
        out = spread.generate(
            past, attention_mask=torch.ones_like(past), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        message = torch.cat([out[:, :-1], text[:, -NEW:]], 1)
        differences[f"kept, {mode}"] = _difference(bench.logits(spread, message), bench.logits(one, message))
        if not sharding.meter.snapshot().current.kept_tokens:
            raise RuntimeError("Nothing of the prompt was kept.")
        sharding.kept_conversations = 0
    return differences


def _difference(ours: Tensor, right: Tensor) -> float:
    return float((ours - right).abs().max() / right.abs().max())


@contextlib.contextmanager
def _off(sharding: Any) -> Iterator[None]:
    sharding.disable()
    try:
        yield
    finally:
        sharding.enable()


@contextlib.contextmanager
def _chunked(sharding: Any, size: int | None) -> Iterator[None]:
    sharding.prompt_chunk = size
    try:
        yield
    finally:
        sharding.prompt_chunk = None


class _Bench:
    """Replies on some devices."""

    def __init__(self, devices: Sequence[torch.device], generator: torch.Generator, words: int) -> None:
        self._devices, self._generator, self._words = devices, generator, words

    def text(self, tokens: int) -> Tensor:
        """A text of its own, [1, tokens], on the first device."""
        return torch.randint(5, self._words, (1, tokens), generator=self._generator).to(self._devices[0])

    def wait(self) -> None:
        for device in self._devices:
            device_memory.runtime(device).synchronize(device)

    def logits(self, model: Any, prompts: Tensor) -> Tensor:
        """Those after the first of some prompts, [words], on the CPU in float32."""
        options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
        with torch.no_grad():
            mask = torch.ones_like(prompts)
            out = model.generate(prompts, attention_mask=mask, max_new_tokens=1, min_new_tokens=1, **options)
        logits: Tensor = out.logits[0][0].float().cpu()
        return logits

    def first_token(self, model: Any, prompt: Tensor) -> tuple[float, int]:
        """Milliseconds until it is there, and the peak above the weights of the model."""
        held = {device: device_memory.allocated(device).now for device in self._devices}
        others = {device: held[device] - bytes_on(device, model) for device in self._devices}
        weights = sum(bytes_on(device, model) for device in self._devices)
        for device in self._devices:
            device_memory.runtime(device).reset_peak_memory_stats(device)
        with no_collections():
            self.wait()
            began = time.perf_counter()
            generate(model, prompt, 1, min_new_tokens=1)
            self.wait()
            took = 1000 * (time.perf_counter() - began)
        peak = sum(device_memory.allocated(device).peak - others[device] for device in self._devices)
        return took, peak - weights

    def token(self, model: Any, prompt: Tensor) -> float:
        """Milliseconds of a decode step, the median of a reply's."""
        times: list[float] = []

        def note(input_ids: Tensor, scores: Any, **_: Any) -> bool:
            times.append(time.perf_counter())
            return False

        criteria = transformers.StoppingCriteriaList([note])
        generate(model, prompt, _DECODED, min_new_tokens=_DECODED, stopping_criteria=criteria)
        return statistics.median(1000 * (after - before) for before, after in itertools.pairwise(times[4:]))


def in_markdown(samples: Sequence[Sample]) -> str:
    """The table: a line for each variant, a column for each length."""
    names = list(dict.fromkeys(sample.variant for sample in samples))
    lengths = list(dict.fromkeys(sample.tokens for sample in samples))
    lines = [["", *[f"{tokens:,} tokens" for tokens in lengths]]]
    for name in names:
        lines.append([name, *[_cell(samples, name, tokens) for tokens in lengths]])
    lines.insert(1, ["---"] * (1 + len(lengths)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(samples: Sequence[Sample], name: str, tokens: int) -> str:
    mine = {each.round: each for each in samples if (each.variant, each.tokens) == (name, tokens)}
    one = {each.round: each for each in samples if (each.variant, each.tokens) == (ONE_GPU, tokens)}
    if not mine:
        return ""
    took = statistics.median(each.milliseconds for each in mine.values())
    pairs = [mine[round].milliseconds / one[round].milliseconds for round in mine if round in one]
    ratio = f" ({statistics.median(pairs):.2f})" if pairs else ""
    peak = statistics.median(each.peak for each in mine.values()) / 2**20
    return f"{took:.1f} ms{ratio}" + (f", {peak:,.0f} MiB" if peak else "")
