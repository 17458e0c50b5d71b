"""The benchmark: the table of accelerate issue 1394, measured on this machine.

`python -m extensions.sharded_kv.tools.bench` compares one GPU, several GPUs as accelerate runs them, the issue's own
patch and sharded_kv: seconds/token, first token and peak VRAM, of models of real size with random weights. All variants
reply by turns in one process, so that what else the machine does falls on all alike, and ratios are taken within each
round. `--json FILE` keeps every sample; `--table FILE ... --write README.md` makes the README's table of such files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import itertools
import json
import platform
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from ..engine import vram
from . import models, quantized, simulated
from .variants import ONE_GPU, VARIANTS, Variant, default_variants, graphed, has_graphs, knows_skip_keys

SIMULATED = "The GPUs are simulated on the CPU: memory is exact, times are the simulation's own."
# How far logits may be from one GPU's, relative to the largest. With 16 bit, three times what one GPU differs from
# itself is allowed too: real GPUs do not add up in the same order each time.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}
CHECKED_STEPS = 8
FEWEST_TOKENS = 4  # of a reply: the step to the second is not timed, and that to the last not by transformers 4.28
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


# Turns ---------------------------------------------------------------------------------------------------------------


def order_of_round(names: Sequence[str], round: int) -> list[str]:
    """The order in which variants take their turns.

    Over as many rounds as there are variants, twice as many for an odd number, each comes right after each other one
    equally often (E. J. Williams, Experimental designs balanced for the estimation of residual effects, 1949).
    """
    n = len(names)
    zigzag = [(turn + 1) // 2 if turn % 2 else -(turn // 2) for turn in range(n)]
    order = [names[(place + round) % n] for place in zigzag]
    return order[::-1] if n % 2 and round // n % 2 else order


# What goes in and what comes out -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        size: one of `models.REAL_SIZES`, or of `models.FAMILIES` for a tiny model.
        layers: how many of the model's layers; None for all.
        dtype: "float16", "bfloat16" or "float32".
        quantization: one of `quantized.KINDS`; None for none.
        devices: "cuda:2" or "sim:2".
        context: tokens of a prompt and its reply together; `new_tokens` are the reply's.
        batch: prompts at once.
        rounds: replies of each variant that count.
        variants: names, in the order of the table.
    """

    size: str
    layers: int | None
    dtype: str
    quantization: str | None
    devices: str
    context: int
    new_tokens: int
    batch: int
    rounds: int
    variants: tuple[str, ...]

    @property
    def places(self) -> list[int | str]:
        """The devices as `device_map="auto"` writes them: GPUs are numbers."""
        kind, _, count = self.devices.partition(":")
        return [index if kind == "cuda" else f"{kind}:{index}" for index in range(int(count))]

    @property
    def torch_devices(self) -> list[torch.device]:
        """The devices as torch has them."""
        return [_device(place) for place in self.places]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the weights as torch has it."""
        return getattr(torch, self.dtype)

    def config(self) -> Any:
        """The model's config; NotImplementedError where the installed transformers does not have the model."""
        layers = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return (models.real_config if self.size in models.REAL_SIZES else models.config)(self.size, **layers)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One reply of one variant.

    Attributes:
        round, turn: when; samples of one round are paired.
        seconds_per_token: median of `steps`, the seconds from token to token.
        first_token_seconds: until all devices were done with the first forward.
        peak: for each device, the most bytes that tensors held, without the models of other variants.
    """

    round: int
    turn: int
    seconds_per_token: float
    first_token_seconds: float
    steps: list[float]
    peak: dict[str, int]

    @property
    def total_peak(self) -> int:
        """Bytes over all devices."""
        return sum(self.peak.values())


@dataclasses.dataclass(frozen=True)
class Check:
    """How far logits of teacher-forced steps are from one GPU's: largest difference, relative to the largest logit.

    Attributes:
        tolerance: how far they may be.
        itself: how far one GPU's are from its own of another time, at most.
        differences: of each step, for each variant that had enough memory.
    """

    tolerance: float
    itself: float
    differences: dict[str, list[float]]

    @property
    def complaints(self) -> list[str]:
        """One sentence for each variant that is wrong, about its first wrong step."""
        if not self.differences:
            return ["There are no logits to compare with one GPU's."]
        wrong = {
            name: next((step for step, far in enumerate(steps) if not far <= self.tolerance), None)
            for name, steps in self.differences.items()
        }
        return [
            f"{name}: the logits of step {step} are {self.differences[name][step]:.1e} from one GPU's; "
            f"{self.tolerance:.1e} is allowed."
            for name, step in wrong.items()
            if step is not None
        ]


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of the benchmark, as its file has it.

    Attributes:
        date, machine, versions: when, on what, and with which torch, transformers and accelerate.
        sizes: the `Setting`, and the shape of the model.
        samples: of each variant.
        failures: for each variant that did not have enough memory, what was missing.
        check: None if it was not asked for.
        floor: see `bandwidth_floor`; None for simulated devices.
    """

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    sizes: dict[str, Any]
    samples: dict[str, list[Sample]]
    failures: dict[str, str]
    check: Check | None
    floor: dict[str, float] | None

    def to_json(self) -> str:
        """For `from_json`, with each list of numbers on one line."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        return re.sub(r"\[[\s\d.,e+-]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """What `to_json` wrote."""
        raw = json.loads(text)
        raw["samples"] = {name: [Sample(**sample) for sample in samples] for name, samples in raw["samples"].items()}
        raw["check"] = raw["check"] and Check(**raw["check"])
        return cls(**raw)


# Running -------------------------------------------------------------------------------------------------------------


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
    with variant.applied(model), _no_collections():
        others = {device: vram.allocated(device).now - _bytes_on(device, model) for device in devices}
        for device in devices:
            vram.runtime(device).reset_peak_memory_stats(device)
        clock.wait()
        began = time.perf_counter()
        criteria = transformers.StoppingCriteriaList([clock])
        _generate(model, prompts, setting.new_tokens, min_new_tokens=setting.new_tokens, stopping_criteria=criteria)
        clock.wait()
        peak = {str(device): vram.allocated(device).peak - others[device] for device in devices}
    # Only the first token is waited for: the time from it to the second lacks the wait for the second.
    steps = [_microseconds(b - a) for a, b in itertools.pairwise(clock.times[1 : setting.new_tokens])]
    first = _microseconds(clock.times[0] - began)
    return Sample(round, turn, _microseconds(statistics.median(steps)), first, steps, peak)


class _Clock(transformers.StoppingCriteria):
    """Notes when each token comes: generate() asks its stopping criteria after each.

    It waits for the first; for each later one generate() waits by itself, to see whether all replies are finished.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.times: list[float] = []

    def wait(self) -> None:
        for device in self.devices:
            vram.runtime(device).synchronize(device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.times:
            self.wait()
        self.times.append(time.perf_counter())
        return False


@torch.no_grad()
def _generate(model: Any, prompts: Tensor, new_tokens: int, **options: Any) -> None:
    # transformers 5 compiles where it can, by itself: that is no part of a comparison of dispatchers.
    if hasattr(transformers.GenerationConfig(), "disable_compile"):
        options["disable_compile"] = True
    mask = torch.ones_like(prompts)
    model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **options)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Python collects its garbage before and not inside, so that none of it falls on one variant."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _microseconds(seconds: float) -> float:
    return round(seconds, 6)


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
        _generate(model, tokens[:, : -setting.new_tokens], steps, logits_processor=processors)
    return logits


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float(f"{((logits - expected).abs().max() / expected.abs().max()).item():.3g}")


def bandwidth_floor(setting: Setting, config: Any, model: Any, bandwidth: float) -> dict[str, float]:
    """The least that one token takes: its weights and cache are read once, by one GPU after the other.

    As gpt-fast counts it. For models all of whose layers keep the whole context.

    Returns:
        bytes_per_second, read and written, of copies within a GPU's memory; bytes_per_token, of the weights (of the
        embedding one row is read) and of the cache of the whole context; seconds_per_token, one by the other.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = _size(weight for weight in quantized.weights(model) if weight is not embedding or weight is head)
    heads = config.num_attention_heads
    width = config.hidden_size // heads * (getattr(config, "num_key_value_heads", None) or heads)
    cache = 2 * config.num_hidden_layers * setting.batch * setting.context * width * embedding.element_size()
    seconds = _microseconds((read + cache) / bandwidth)
    return {"bytes_per_second": round(bandwidth), "bytes_per_token": read + cache, "seconds_per_token": seconds}


def copy_bandwidth(device: torch.device, size: int = 2**28, copies: int = 20) -> float:
    """Bytes per second that a device reads and writes when it copies within its memory: the best of three trials."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    trials = []
    for _ in range(4):  # the first warms up
        vram.runtime(device).synchronize(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        vram.runtime(device).synchronize(device)
        trials.append(time.perf_counter() - began)
    return 2 * size * copies / min(trials[1:])


# Models, and too little memory for them ------------------------------------------------------------------------------


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


def build(config: Any, dtype: torch.dtype, places: Sequence[int | str], quantization: str | None = None) -> Any:
    """A model with random weights, always the same: on one device, or spread over several by accelerate.

    As `from_pretrained(device_map=...)` does it, each weight is made on its own device, so that no device ever holds
    more than its share, and what is no weight on the CPU. Those that are quantized are made in `dtype` first.

    Raises:
        torch.cuda.OutOfMemoryError: a device has no room for its share.
    """
    registered: list[nn.Module] = []
    with _each_parameter(lambda module, name: registered.append(module)):
        skeleton = _skeleton(config, dtype)
    device_map = models.device_map(skeleton, places)
    homes = {
        module: _device(place)
        for name, place in device_map.items()
        for module in skeleton.get_submodule(name).modules()
    }
    _require_room(homes)
    home = (homes.get(module, _device(places[0])) for module in registered)

    def send_home(module: nn.Module, name: str) -> None:
        old, device = module._parameters[name], next(home)
        if old.device != device:
            # A norm's ones count, what is in a matrix does not: it is drawn anew.
            new = old.data.to(device) if old.dim() == 1 else torch.empty_like(old.data, device=device)
            module._parameters[name] = nn.Parameter(new, old.requires_grad)

    with _each_parameter(send_home):
        model = models.build(config, dtype)
    if len(places) == 1:
        model = model.to(_device(places[0]))
    if quantization:
        quantized.quantize(model, quantization)
        _give_back_memory(homes.values())
    if len(places) == 1:
        return model
    skip_keys = {"skip_keys": getattr(model, "_skip_keys_device_placement", None)} if knows_skip_keys() else {}
    return accelerate.dispatch_model(model, device_map, main_device=places[0], **skip_keys)


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, torch_dtype=dtype)


@contextlib.contextmanager
def _each_parameter(then: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Inside, `then` is told of each parameter that a module registers: accelerate's `init_on_device` does it so."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None:
            then(module, name)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _require_room(homes: Mapping[nn.Module, torch.device]) -> None:
    _give_back_memory(homes.values())
    for device in set(homes.values()):
        needed = sum(_size(module.parameters(recurse=False)) for module, home in homes.items() if home == device)
        free, _ = vram.runtime(device).mem_get_info(device)
        if needed > free:
            raise torch.cuda.OutOfMemoryError(_missing(device, needed - free))


def _give_back_memory(devices: Iterable[torch.device]) -> None:
    gc.collect()
    for device in set(devices):
        vram.runtime(device).empty_cache()


def _bytes_on(device: torch.device, model: nn.Module) -> int:
    return _size(tensor for tensor in quantized.tensors(model) if tensor.device == device)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _device(place: int | str) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
# "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free. ..."; up to torch 2.1
# "Tried to allocate 20.00 MiB (GPU 0; 23.69 GiB total capacity; 22.99 GiB already allocated; 14.06 MiB free; ..."
_OUT_OF_MEMORY = re.compile(r"Tried to allocate ([\d.]+) (\w+).*?GPU (\d+).*?([\d.]+) (\w+) (?:is )?free", re.DOTALL)


class Failures(dict[str, str]):
    """For each variant that did not have enough memory, what was missing."""

    def attempt(self, names: Sequence[str], action: Callable[..., Any], *args: Any) -> Any:
        """What `action` gives for the variants `names`; None where memory does not suffice, or did not before."""
        if any(name in self for name in names):
            return None
        try:
            return action(*args)
        except torch.cuda.OutOfMemoryError as error:
            missing = shortage(error)
        self.update(dict.fromkeys(names, missing))
        advice = "Fewer --layers, a shorter --context or fewer --variants need less"
        tqdm.write(
            f"{', '.join(names)}: out of memory, {missing}. {advice} ({ONE_GPU} has a model of its own).", sys.stderr
        )
        return None


def shortage(error: Exception) -> str:
    """What is missing where, by a device's message: what was asked for, less what was free."""
    found = _OUT_OF_MEMORY.search(str(error))
    if found is None:
        return str(error)
    asked, unit, index, free, free_unit = found.groups()
    device = f"{'sim' if str(error).startswith('sim') else 'cuda'}:{index}"
    return _missing(device, float(asked) * _UNITS[unit] - float(free) * _UNITS[free_unit])


def _missing(device: object, size: float) -> str:
    unit = next((unit for unit, scale in _UNITS.items() if size >= scale), "bytes")
    return f"at least {size / _UNITS[unit]:.1f} {unit} missing on {device}"


# Tables --------------------------------------------------------------------------------------------------------------

DTYPES = {"float16": "16", "bfloat16": "16 (bf16)", "float32": "32"}
_STACK = ("torch", "transformers", "accelerate")
HEADER = (
    *("model", "size", "quantization", "GPU configuration", "seconds/token", "total peak VRAM"),
    *("decode / 1 GPU", "quickest tenth", "first token / 1 GPU", "VRAM / 1 GPU"),
)
RATIOS: tuple[Callable[[Sample], float], ...] = (
    lambda sample: sample.seconds_per_token,
    lambda sample: sample.first_token_seconds,
    lambda sample: sample.total_peak,
)


def paired_ratios(ours: Iterable[Sample], base: Iterable[Sample], figure: Callable[[Sample], float]) -> list[float]:
    """How many times larger a figure is than in the other sample of the same round, for each round that has both."""
    pairs = {sample.round: figure(sample) for sample in base}
    return [figure(sample) / pairs[sample.round] for sample in ours if sample.round in pairs]


def table(results: Iterable[Result]) -> str:
    """In Markdown: one table for all runs of one day, machine, stack and length, with these beneath."""
    parts = []
    for caption, group in itertools.groupby(results, key=_caption):
        alike = list(group)
        rows = [HEADER, *(row for result in alike for row in _rows(result))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        remarks = _rounds(alike) + "".join(_floor(result) for result in alike)
        parts.append("\n".join(f"| {line} |" for line in lines) + f"\n\n{caption}{remarks}")
    return "\n\n".join(parts)


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    sizes, gpus = result.sizes, result.machine["gpus"]
    is_tiny = sizes["size"] in models.FAMILIES
    model, _, size = (sizes["size"], "", "tiny") if is_tiny else sizes["size"].partition("-")
    size += f", {sizes['layers']} layers" if sizes["layers"] else ""
    for name in sizes["variants"]:
        variant = VARIANTS[name]
        where = ", ".join(filter(None, [_counted(gpus if variant.spread else gpus[:1]), variant.label]))
        yield model, size, _weights(result), where, *_figures(result, name)


def _weights(result: Result) -> str:
    """As "16", or "4 w/bnb 0.50.2"."""
    kind = result.sizes.get("quantization")  # files of before 2026-11-24 have none
    if not kind:
        return DTYPES[result.sizes["dtype"]]
    others = [version for library, version in result.versions.items() if library not in _STACK]
    return " ".join((quantized.KINDS[kind].label, *others))


def _figures(result: Result, name: str) -> tuple[str, ...]:
    if name in result.failures:
        return f"out of memory: {result.failures[name]}", *["-"] * (2 + len(RATIOS))
    samples, base = result.samples[name], result.samples.get(ONE_GPU, [])
    seconds = f"{statistics.median(sample.seconds_per_token for sample in samples):.4f}"
    peak = max(sample.total_peak for sample in samples) / 2**20
    ratios = [paired_ratios(samples, base, figure) for figure in RATIOS]
    if ratios[0] and name != ONE_GPU:
        slower = statistics.median(ratios[0])
        seconds += f" ({slower:.2f}x slower)" if slower >= 1 else f" ({1 / slower:.2f}x faster)"
    decode, *others = map(_median_and_range, ratios)
    quickest = f"{quickest_tenth(samples) / quickest_tenth(base):.2f}" if base else "-"
    return seconds, f"{peak:,.{0 if peak >= 100 else 2}f} MiB", decode, quickest, *others


def quickest_tenth(samples: Iterable[Sample]) -> float:
    """Seconds that a tenth of all tokens take at most.

    On a machine that others use as well, medians show them too: one GPU's own times may differ by two within a run.
    """
    steps = [seconds for sample in samples for seconds in sample.steps]
    return statistics.quantiles(steps, n=10, method="inclusive")[0]


def _median_and_range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    median, least, greatest = (f"{value:.2f}" for value in (statistics.median(values), min(values), max(values)))
    return median if least == greatest else f"{median} ({least} to {greatest})"


def _caption(result: Result) -> str:
    machine, sizes = result.machine, result.sizes
    about = [_counted(machine["gpus"])]
    about += [f"{name} {machine[key]}" for name, key in (("driver", "driver"), ("CUDA", "cuda")) if machine[key]]
    about += [machine["cpu"], f"Python {machine['python']}"]
    about += [f"{library} {result.versions[library]}" for library in _STACK]
    text = (
        f"{result.date}: {', '.join(about)}. Batch {sizes['batch']}, {sizes['context']} tokens of context, the last "
        f"{sizes['new_tokens']} of them new."
    )
    return f"{text} {SIMULATED}" if sizes["devices"].startswith("sim") else text


def _rounds(results: Sequence[Result]) -> str:
    counts = [result.sizes["rounds"] for result in results]
    between = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    return (
        f" Medians of {between} rounds; ratios (least to greatest) are paired within each round. "
        "Quickest tenth: what a tenth of all tokens take at most, to one GPU's."
    )


def _floor(result: Result) -> str:
    if not result.floor:
        return ""
    what, bandwidth = result.sizes["size"], result.floor["bytes_per_second"] / 1e12
    what += f" ({_weights(result)})" if result.sizes.get("quantization") else ""
    seconds = result.floor["seconds_per_token"]
    return (
        f" To read {what} and its cache once takes {seconds:.4f} seconds at the {bandwidth:.2f} TB/s of a copy there."
    )


def _counted(gpus: Sequence[str]) -> str:
    return ", ".join(f"{count}x {name}" for name, count in Counter(gpus).items())


def write_between_markers(file: Path, text: str) -> None:
    """Replace what stands between the two markers in a file, and nothing else. Exits where they are not there."""
    content = file.read_bytes().decode()
    before, _, rest = content.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found or BEGIN in rest or END in before + after:
        sys.exit(f"{file} needs a line {BEGIN} and below it a line {END}, each once, to have the table between.")
    file.write_bytes(f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


def _versions(setting: Setting) -> dict[str, str]:
    versions = {name: str(sys.modules[name].__version__) for name in _STACK}
    if setting.quantization:
        name = quantized.KINDS[setting.quantization].library()
        versions[name] = importlib.metadata.version(name)
    return versions


def _machine(devices: Sequence[torch.device]) -> dict[str, Any]:
    real = devices[0].type == "cuda"
    return {
        "gpus": [vram.name(device) for device in devices],
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


# The command ---------------------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"size": "llama-7b", "dtype": "float16", "context": 2048, "new_tokens": 32, "rounds": 7},
    "sim": {"size": "llama", "dtype": "float32", "context": 64, "new_tokens": 8, "rounds": 3},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or make tables of earlier runs.

    Returns:
        0; 1 if logits differ, or if no variant had enough memory.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for file in options.table or ():
        if not file.is_file():
            parser.error(f"--table {file}: there is no such file.")
    if options.write and not options.table:
        parser.error("--write FILE takes tables from --table.")
    if options.table:
        text = table(Result.from_json(file.read_text()) for file in options.table)
        print(text)
        if options.write:
            write_between_markers(options.write, text)
        return 0
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder.")
    setting = _setting(options, parser)
    transformers.logging.set_verbosity_error()
    result = run(setting, options.check)
    print(table([result]))
    if options.json:
        options.json.write_text(result.to_json())
    if result.floor:
        print(f"\nRead at the memory's bandwidth, a token takes {result.floor['seconds_per_token']:.4f} seconds.")
    complaints = result.check.complaints if result.check else []
    if result.check and not complaints:
        far = [f"{name} {max(steps):.1g}" for name, steps in result.check.differences.items()]
        far += [f"itself {result.check.itself:.1g}", f"allowed {result.check.tolerance:.1g}"]
        print(f"\nLogits as one GPU's. Differences, relative to the largest: {', '.join(far)}.")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints or not any(result.samples.values()) else 0


def _setting(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Setting:
    """The options, with defaults that suit the devices; a parser's error where they cannot be."""
    gpus = torch.cuda.device_count()
    devices = options.devices or ("cuda:2" if gpus >= 2 else "sim:2")
    kind, _, count = devices.partition(":")
    if kind not in DEFAULTS or not count.isdigit() or int(count) < 1:
        parser.error(f"--devices {devices}: give cuda:N or sim:N, with N at least 1.")
    if kind == "cuda" and int(count) > gpus:
        parser.error(f"--devices {devices}: there are {gpus} CUDA GPUs here; sim:{count} simulates them.")
    if kind == "sim":
        simulated.start(int(count))
    chosen = {name: getattr(options, name) or default for name, default in DEFAULTS[kind].items()}
    if options.quantization and not options.dtype:
        chosen["dtype"] = "float16"  # what these layers are made for
    variants = options.variants or default_variants(int(count), options.quantization)
    if int(count) == 1 and any(VARIANTS[name].spread for name in variants):
        parser.error(f"--devices {devices}: for these --variants give at least two.")
    if not has_graphs(options.quantization) and any(VARIANTS[name].applied is graphed for name in variants):
        parser.error(f"--quantization {options.quantization}: layers wait for their device, which no graph can repeat.")
    setting = Setting(
        layers=options.layers,
        quantization=options.quantization,
        devices=devices,
        batch=options.batch,
        variants=tuple(variants),
        **chosen,
    )
    try:
        if options.quantization:
            quantized.KINDS[options.quantization].library()
    except ModuleNotFoundError as error:
        parser.error(f"--quantization {options.quantization}: {error}.")
    try:
        config = setting.config()
    except NotImplementedError as error:
        parser.error(str(error))
    if config.num_hidden_layers < int(count):
        parser.error(f"--layers {config.num_hidden_layers}: each of {count} devices gets at least one.")
    longest = getattr(config, "max_position_embeddings", models.MAX_POSITIONS)
    if not FEWEST_TOKENS <= setting.new_tokens < setting.context <= longest:
        parser.error(
            f"--context {setting.context} --new-tokens {setting.new_tokens}: a reply has at least {FEWEST_TOKENS} "
            f"tokens, and with its prompt it fits into the context, which is at most {longest}."
        )
    if options.check and (ONE_GPU not in variants or len(variants) < 2):
        parser.error(f"--check compares with {ONE_GPU}: it must be among --variants, and another one.")
    return setting


def _parser() -> argparse.ArgumentParser:
    command = "python -m extensions.sharded_kv.tools.bench"
    parser = argparse.ArgumentParser(prog=command, description=__doc__.split("\n")[0])
    sizes = [*models.REAL_SIZES, *(name for name, family in models.FAMILIES.items() if not family.is_encoder_decoder)]
    parser.add_argument(
        "--size", choices=sizes, metavar="SIZE", help=f"{', '.join(models.REAL_SIZES)}, or a tiny model"
    )
    parser.add_argument("--layers", type=_positive, help="how many of the model's layers (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16, simulated and unquantized float32")
    parser.add_argument(
        "--quantization",
        choices=quantized.KINDS,
        help="8 or 4 bits of bitsandbytes (4: nf4, double quantization), or 4 of GPTQ (default: none)",
    )
    parser.add_argument("--devices", help="cuda:N or sim:N (default: cuda:2 if there are two GPUs, else sim:2)")
    parser.add_argument("--context", type=_positive, help="tokens of prompt and reply (default: 2048, simulated 64)")
    parser.add_argument("--new-tokens", type=_positive, help="tokens of the reply (default: 32, simulated 8)")
    parser.add_argument("--batch", type=_positive, default=1, help="prompts at once (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, help="replies of each variant (default: 7, simulated 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    parser.add_argument("--check", action="store_true", help="compare logits with one GPU's; fail if they differ")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every sample")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="measure nothing: a table of such files")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"with --table: into FILE, between {BEGIN} and {END}"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: the collections between replies need not look through it
    sys.exit(main())
