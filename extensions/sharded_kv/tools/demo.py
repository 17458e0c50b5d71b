"""The demo: a tiny Llama from a checkpoint on disk, spread over two GPUs, replying with sharding off and on.

`python -m extensions.sharded_kv.tools.demo` runs it over the machine's GPUs if there are two, over two simulated ones
otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .. import Sharding, shard
from ..engine.meter import DeviceMemory
from . import models, simulated, traffic

PROMPT = "The cache of a layer stays on the device of the layer, and"
# Sharding off and on take turns this often, so that whatever else the machine does falls on both.
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one setting of the switch gave.

    Attributes:
        bytes_per_token, copies_per_token: between GPUs, mean over a reply, prompt included.
        seconds_per_token, first_token_seconds: median over the rounds.
        memory: of each GPU at the end of the last reply.
        tokens: of the reply.
    """

    bytes_per_token: float
    copies_per_token: float
    seconds_per_token: float
    first_token_seconds: float
    memory: tuple[DeviceMemory, ...]
    tokens: list[int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the replies were equal."""
    options = _parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    devices = _devices(options.devices)
    with tempfile.TemporaryDirectory(prefix="sharded_kv-") as folder:
        print(f"Writing a tiny {options.family} checkpoint and loading it over {', '.join(devices)} ...", flush=True)
        model = load(models.save(options.family, Path(folder) / options.family), devices)
        sharding = shard(model)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / options.family)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(devices[0])
    print(f"Stages: {sharding.placement.describe()}\n", flush=True)
    off, on = compare(model, sharding, inputs, options.tokens)
    print(table(off, on))
    if devices[0].startswith("sim"):
        print(
            "\nThe GPUs are simulated on the CPU: bytes, copies and memory are exact, times are the simulation's own."
        )
    equal = off.tokens == on.tokens
    print("\nEqual tokens." if equal else "\nThe tokens DIFFER: please report this with the versions above.")
    return 0 if equal else 1


def load(folder: Path, devices: Sequence[str]) -> Any:
    """The checkpoint in `folder`, loaded as the webui loads one, its layers spread evenly over `devices`."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    device_map = models.device_map(skeleton, [torch.device(device) for device in devices])
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()


def compare(model: Any, sharding: Sharding, inputs: Any, tokens: int) -> tuple[Figures, Figures]:
    """Reply with sharding off and on, by turns.

    Args:
        model: a spread model.
        sharding: its Sharding.
        inputs: token ids and attention mask on the first device.
        tokens: how many new tokens a reply has.

    Returns:
        The figures with sharding off, and on.
    """
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    crossed, memory, replies = {}, {}, {}
    with tqdm(
        total=2 * (ROUNDS + 1), desc="Replying with sharding off and on", file=sys.stderr, leave=False
    ) as progress:
        for turn in range(ROUNDS + 1):
            for on, switch in ((False, sharding.disable), (True, sharding.enable)):
                switch()
                if turn == 0:  # warms up, and counting would cost time in the others
                    with traffic.record(model.device.type) as counted:
                        replies[on] = _reply(model, inputs, tokens)
                    crossed[on] = traffic.total(counted.bytes) / tokens, traffic.total(counted.copies) / tokens
                else:
                    _reply(model, inputs, tokens)
                    snapshot = sharding.meter.snapshot()
                    times[on].append((snapshot.seconds_per_token or 0.0, snapshot.first_token_seconds or 0.0))
                    memory[on] = snapshot.memory
                progress.update()

    def figures(on: bool) -> Figures:
        seconds, first = (statistics.median(column) for column in zip(*times[on], strict=True))
        return Figures(*crossed[on], seconds, first, memory[on], replies[on])

    return figures(False), figures(True)


def table(off: Figures, on: Figures) -> str:
    """The figures side by side, for a terminal."""
    rows = [
        ("", "off: accelerate", "on: sharded_kv"),
        ("bytes between GPUs per token", f"{off.bytes_per_token:,.0f}", f"{on.bytes_per_token:,.0f}"),
        ("copies between GPUs per token", f"{off.copies_per_token:.1f}", f"{on.copies_per_token:.1f}"),
        ("milliseconds per token", f"{off.seconds_per_token * 1e3:.2f}", f"{on.seconds_per_token * 1e3:.2f}"),
        ("milliseconds to first token", f"{off.first_token_seconds * 1e3:.2f}", f"{on.first_token_seconds * 1e3:.2f}"),
    ]
    rows += [
        (f"{before.device}: peak MiB of a reply", f"{before.peak / 2**20:,.2f}", f"{after.peak / 2**20:,.2f}")
        for before, after in zip(off.memory, on.memory, strict=True)
    ]
    rows += [(f"{after.device}: weights MiB", *[f"{after.weights / 2**20:,.2f}"] * 2) for after in on.memory]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{name:<{widths[0]}}   {a:>{widths[1]}}   {b:>{widths[2]}}" for name, a, b in rows)


def _reply(model: Any, inputs: Any, tokens: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
    ids: list[int] = out[0].tolist()
    return ids


def _devices(asked: str | None) -> list[str]:
    kind, _, count = (asked or ("cuda:2" if torch.cuda.device_count() >= 2 else "sim:2")).partition(":")
    if kind == "sim":
        simulated.start(int(count))
    elif torch.cuda.device_count() < int(count):
        sys.exit(
            f"There are {torch.cuda.device_count()} CUDA GPUs here, not {count}: --devices sim:{count} simulates them."
        )
    return [f"{kind}:{index}" for index in range(int(count))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./install.sh --demo", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a reply (default: %(default)s)")
    parser.add_argument("--family", choices=("llama", "gptj"), default="llama", help="default: %(default)s")
    parser.add_argument("--devices", help="cuda:N or sim:N (default: the GPUs if there are two, else sim:2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
