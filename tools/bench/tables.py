"""Makes tables of results, in the shape of that of accelerate issue 1394."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from .. import models, quantized
from .records import STACK, Result, Sample
from .variants import ONE_GPU, VARIANTS

SIMULATED = "The GPUs are simulated on the CPU: memory is exact, times are the simulation's own."
DTYPES = {"float16": "16", "bfloat16": "16 (bf16)", "float32": "32"}
HEADER = (
    *("model", "size", "quantization", "GPU configuration", "seconds/token", "total peak VRAM"),
    *("decode / 1 GPU", "quickest tenth", "first token / 1 GPU", "VRAM / 1 GPU"),
)
RATIOS: tuple[Callable[[Sample], float], ...] = (
    lambda sample: sample.seconds_per_token,
    lambda sample: sample.first_token_seconds,
    lambda sample: sample.total_peak,
)
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def paired_ratios(ours: Iterable[Sample], base: Iterable[Sample], figure: Callable[[Sample], float]) -> list[float]:
    """How many times larger a figure is than in the other sample of the same round, for each round that has both."""
    pairs = {sample.round: figure(sample) for sample in base}
    return [figure(sample) / pairs[sample.round] for sample in ours if sample.round in pairs]


def in_markdown(results: Iterable[Result]) -> str:
    """One table for all runs of one day, machine, stack and length, with these beneath."""
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
    others = [version for library, version in result.versions.items() if library not in STACK]
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
    about += [f"{library} {result.versions[library]}" for library in STACK]
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
