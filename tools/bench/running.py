"""Runs the benchmark: all variants reply by turns, and their logits are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import itertools
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from extensions.sharded_kv.engine import devices as device_memory

from .. import quantized
from .bandwidth import bandwidth_floor, copy_bandwidth
from .building import build
from .memory import Failures, bytes_on
from .records import STACK, Check, Result, Sample, Setting, microseconds
from .variants import ONE_GPU, VARIANTS, Variant

# How far logits may be from one GPU's, relative to the largest. With 16 bit, three times what one GPU differs from
# itself is allowed too: real GPUs do not add up in the same order each time.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}
CHECKED_STEPS = 8


def order_of_round(names: Sequence[str], round: int) -> list[str]:
    """The order in which variants take their turns.

    Over as many rounds as there are variants, twice as many for an odd number, each comes right after each other one
    equally often (E. J. Williams, Experimental designs balanced for the estimation of residual effects, 1949).
    """
    n = len(names)
    zigzag = [(turn + 1) // 2 if turn % 2 else -(turn // 2) for turn in range(n)]
    order = [names[(place + round) % n] for place in zigzag]
    return order[::-1] if n % 2 and round // n % 2 else order


def run(setting: Setting, with_check: bool = False) -> Result:
    """Build the models, have all variants reply by turns, and say what came out; with a check, compare logits first."""
    config, devices = setting.config(), setting.torch_devices
    bandwidth = copy_bandwidth(devices[0]) if devices[0].type == "cuda" else None
    failures = Failures()
    built = _build_both(setting, config, failures)
    model = next(filter(None, built.values()), None)
    floor = bandwidth_floor(setting, config, model, bandwidth) if bandwidth and model is not None else None
    # Special tokens are among the first five, or in the upper half.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, config.vocab_size // 2, (setting.batch, setting.context), generator=generator)
    checked = check(setting, built, tokens, failures) if with_check else None
    samples = measure(setting, built, tokens[:, : -setting.new_tokens], failures)
    shape = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
    return Result(
        date=datetime.date.today().isoformat(),
        machine=_machine(devices),
        versions=_versions(setting),
        sizes={**dataclasses.asdict(setting), "config": {name: getattr(config, name, None) for name in shape}},
        samples=samples,
        failures=dict(failures),
        check=checked,
        floor=floor,
    )


def _build_both(setting: Setting, config: Any, failures: Failures) -> dict[str, Any]:
    """The model of each variant: one on the first device, and one with the same weights that is spread over all."""
    built: dict[str, Any] = {}
    for spread in (False, True):
        names = [name for name in setting.variants if VARIANTS[name].spread == spread]
        places = setting.places if spread else setting.places[:1]
        if names:
            model = failures.attempt(names, build, config, setting.torch_dtype, places, setting.quantization)
            built.update(dict.fromkeys(names, model))
    return built


def measure(setting: Setting, built: Mapping[str, Any], prompts: Tensor, failures: Failures) -> dict[str, list[Sample]]:
    """Have the variants reply by turns, once before the rounds that count to warm up."""
    samples: dict[str, list[Sample]] = {name: [] for name in setting.variants}
    with tqdm(total=len(samples) * (setting.rounds + 1), file=sys.stderr, leave=False, disable=None) as bar:
        for round in range(-1, setting.rounds):
            for turn, name in enumerate(order_of_round(setting.variants, round)):
                bar.set_description(f"round {round + 1} of {setting.rounds}: {name}")
                sample = failures.attempt([name], reply, setting, VARIANTS[name], built[name], prompts, round, turn)
                if sample is not None and round >= 0:
                    samples[name].append(sample)
                bar.update()
    return samples


def reply(setting: Setting, variant: Variant, model: Any, prompts: Tensor, round: int, turn: int) -> Sample:
    """Have one variant reply once."""
    devices, clock = setting.torch_devices, _Clock(setting.torch_devices)
    prompts = prompts.to(devices[0])
    with variant.applied(model), no_collections():
        others = {device: device_memory.allocated(device).now - bytes_on(device, model) for device in devices}
        for device in devices:
            device_memory.runtime(device).reset_peak_memory_stats(device)
        clock.wait()
        began = time.perf_counter()
        criteria = transformers.StoppingCriteriaList([clock])
        generate(model, prompts, setting.new_tokens, min_new_tokens=setting.new_tokens, stopping_criteria=criteria)
        clock.wait()
        peak = {str(device): device_memory.allocated(device).peak - others[device] for device in devices}
    # Only the first token is waited for: the time from it to the second lacks the wait for the second.
    steps = [microseconds(b - a) for a, b in itertools.pairwise(clock.times[1 : setting.new_tokens])]
    first = microseconds(clock.times[0] - began)
    return Sample(round, turn, microseconds(statistics.median(steps)), first, steps, peak)


class _Clock(transformers.StoppingCriteria):
    """Notes when each token comes: generate() asks its stopping criteria after each.

    It waits for the first; for each later one generate() waits by itself, to see whether all replies are finished.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.times: list[float] = []

    def wait(self) -> None:
        for device in self.devices:
            device_memory.runtime(device).synchronize(device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.times:
            self.wait()
        self.times.append(time.perf_counter())
        return False


@torch.no_grad()
def generate(model: Any, prompts: Tensor, new_tokens: int, **options: Any) -> None:
    """Reply to `prompts`, always the most likely token next."""
    # transformers 5 compiles where it can, by itself: that is no part of a comparison of dispatchers.
    if hasattr(transformers.GenerationConfig(), "disable_compile"):
        options["disable_compile"] = True
    mask = torch.ones_like(prompts)
    model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **options)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Python collects its garbage before and not inside, so that none of it falls on one variant."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def check(setting: Setting, built: Mapping[str, Any], tokens: Tensor, failures: Failures) -> Check:
    """Compare all variants' logits with one GPU's, and one GPU's with its own of another time."""
    expected = failures.attempt([ONE_GPU], forced_logits, setting, VARIANTS[ONE_GPU], built[ONE_GPU], tokens)
    differences = {}
    for name in setting.variants if expected is not None else ():
        logits = failures.attempt([name], forced_logits, setting, VARIANTS[name], built[name], tokens)
        if logits is not None:
            differences[name] = [_difference(ours, theirs) for ours, theirs in zip(logits, expected, strict=True)]
    itself, tolerance = max(differences.pop(ONE_GPU, [0.0])), TOLERANCES[setting.dtype]
    return Check(tolerance if setting.dtype == "float32" else max(tolerance, 3 * itself), itself, differences)


def forced_logits(setting: Setting, variant: Variant, model: Any, tokens: Tensor) -> list[Tensor]:
    """The logits of a reply's first steps, on the CPU, where each next token is taken from `tokens`."""
    logits, tokens = [], tokens.to(setting.torch_devices[0])

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        logits.append(scores.float().cpu())
        next_token = tokens[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, next_token, 0.0)

    with variant.applied(model):
        steps = min(CHECKED_STEPS, setting.new_tokens)
        processors = transformers.LogitsProcessorList([force])
        generate(model, tokens[:, : -setting.new_tokens], steps, logits_processor=processors)
    return logits


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float(f"{((logits - expected).abs().max() / expected.abs().max()).item():.3g}")


def _versions(setting: Setting) -> dict[str, str]:
    versions = {name: str(sys.modules[name].__version__) for name in STACK}
    if setting.quantization:
        name = quantized.KINDS[setting.quantization].library()
        versions[name] = importlib.metadata.version(name)
    return versions


def _machine(devices: Sequence[torch.device]) -> dict[str, Any]:
    real = devices[0].type == "cuda"
    return {
        "gpus": [device_memory.name(device) for device in devices],
        "driver": _first_match("/proc/driver/nvidia/version", r"\s(\d+\.[\d.]+)\s") if real else None,
        "cuda": torch.version.cuda if real else None,
        "peer_access": torch.cuda.can_device_access_peer(*devices[:2]) if real and len(devices) > 1 else None,
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*: (.+)") or platform.machine(),
        "python": platform.python_version(),
    }


def _first_match(file: str, pattern: str) -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(file).read_text())
        return found and found[1]
    return None
