"""The demo: a tiny model from a checkpoint on disk, spread over two GPUs, replying with sharding off and on; then the
panel on a page of its own.

`python -m tools.demo` runs it over the machine's GPUs if there are two, over two simulated ones
otherwise.
"""

from __future__ import annotations

import argparse
import logging
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine.metering import compare as comparing
from extensions.sharded_kv.engine.metering.compare import Comparison

from . import models, simulated

PROMPT = "The cache of a layer stays on the device of the layer, and"
PORT = 7861
SIMULATED = "The GPUs are simulated on the CPU: bytes, copies and memory are exact, times are the simulation's own."
# Room for the tiny model and a long reply, so that the panel's bars have something to show.
SIMULATED_BYTES = 4 * 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the replies were equal."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sharded_kv").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.page and not _is_free(options.port):
        sys.exit(f"Port {options.port} is taken: --port chooses another, --no-page does without.")
    devices = _devices(options.devices)
    with tempfile.TemporaryDirectory(prefix="sharded_kv-") as folder:
        print(f"Writing a tiny {options.family} checkpoint and loading it over {', '.join(devices)} ...", flush=True)
        model = load(models.save(options.family, Path(folder) / options.family), devices)
        sharding = shard(model)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / options.family)
    print(f"Stages: {sharding.placement.describe()}\n", flush=True)
    comparison = compare(model, sharding, tokenizer(PROMPT, return_tensors="pt").to(devices[0]), options.tokens)
    print(table(comparison, sharding))
    remark = SIMULATED if devices[0].startswith("sim") else ""
    if remark:
        print(f"\n{remark}")
    equal = comparison.off.reply == comparison.on.reply
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    print("\nEqual tokens." if equal else f"\nThe tokens DIFFER: please report this ({versions}).", flush=True)
    if options.page:
        from . import page  # Gradio takes seconds to import, and may be missing where nobody wants a page

        page.serve(model, tokenizer, f"tiny {options.family}", options.port, remark)
    return 0 if equal else 1


def load(folder: Path, devices: Sequence[str]) -> Any:
    """The checkpoint in `folder`, loaded as the webui loads one, its layers spread evenly over `devices`."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    device_map = models.device_map(skeleton, [torch.device(device) for device in devices])
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()


def compare(model: Any, sharding: Sharding, inputs: Any, tokens: int) -> Comparison:
    """Reply with sharding off and on, by turns, with a progress bar."""
    with tqdm(desc="Replying with sharding off and on", file=sys.stderr, leave=False) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        return comparing.compare(model, sharding, inputs, tokens=tokens, progress=progress)


def table(comparison: Comparison, sharding: Sharding) -> str:
    """The figures side by side, for a terminal."""
    off, on = comparison.off, comparison.on
    rows = [
        ("", "off: accelerate", "on: sharded_kv"),
        ("bytes between GPUs per token", f"{off.bytes_per_token:,.0f}", f"{on.bytes_per_token:,.0f}"),
        ("copies between GPUs per token", f"{off.copies_per_token:.1f}", f"{on.copies_per_token:.1f}"),
        ("milliseconds per token", _milliseconds(off.seconds_per_token), _milliseconds(on.seconds_per_token)),
        (
            "milliseconds to first token",
            _milliseconds(off.first_token_seconds),
            _milliseconds(on.first_token_seconds),
        ),
    ]
    rows += [
        (f"{device}: peak MiB of a reply", f"{off.peak[device] / 2**20:,.2f}", f"{peak / 2**20:,.2f}")
        for device, peak in on.peak.items()
    ]
    rows += [
        (f"{memory.device}: weights MiB", *[f"{memory.weights / 2**20:,.2f}"] * 2)
        for memory in sharding.meter.snapshot().memory
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{name:<{widths[0]}}   {a:>{widths[1]}}   {b:>{widths[2]}}" for name, a, b in rows)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _devices(asked: str) -> list[str]:
    kind, _, count = asked.partition(":")
    if kind == "sim":
        simulated.start(int(count))
        for index in range(int(count)):
            simulated.set_capacity(index, SIMULATED_BYTES)
    elif torch.cuda.device_count() < int(count):
        sys.exit(
            f"There are {torch.cuda.device_count()} CUDA GPUs here, not {count}: --devices sim:{count} simulates them."
        )
    return [f"{kind}:{index}" for index in range(int(count))]


def _several_devices(text: str) -> str:
    if not re.fullmatch(r"(cuda|sim):([2-9]|1[0-6])", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cuda:N nor sim:N with N from 2 to 16")
    return text


def _between(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    summary = " ".join((__doc__ or "").split("\n\n", 1)[0].split())
    parser = argparse.ArgumentParser(prog="./install.sh --demo", description=summary)
    tokens, port = _between(2, models.MAX_POSITIONS // 2), _between(1, 65535)
    parser.add_argument("--tokens", type=tokens, default=32, help="new tokens of a reply (default: %(default)s)")
    parser.add_argument("--family", choices=("llama", "gptj"), default="llama", help="default: %(default)s")
    parser.add_argument(
        "--devices",
        type=_several_devices,
        default="cuda:2" if torch.cuda.device_count() >= 2 else "sim:2",
        help="cuda:N or sim:N (default: the GPUs if there are two, else sim:2)",
    )
    parser.add_argument("--port", type=port, default=PORT, help="of the page with the panel (default: %(default)s)")
    parser.add_argument("--no-page", dest="page", action="store_false", help="print the table and end")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
