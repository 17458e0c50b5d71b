"""The benchmark: the table of accelerate issue 1394, measured on this machine.

`python -m tools.bench` compares one GPU, several GPUs as accelerate runs them, the issue's own
patch and sharded_kv: seconds/token, first token and peak VRAM, of models of real size with random weights. All variants
reply by turns in one process, so that what else the machine does falls on all alike, and ratios are taken within each
round. `--json FILE` keeps every sample; `--table FILE ... --write README.md` makes the README's table of such files.
`--attention` times the attention of graph mode alone, by each way that the GPU has; `--prompts` the first token of long
prompts, and of a chat's next message.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import models, quantized, simulated
from . import attention, prompts, tables
from .records import Result, Setting
from .running import TOLERANCES, run
from .variants import ONE_GPU, VARIANTS, default_variants, graphed, has_graphs

FEWEST_TOKENS = 4  # of a reply: the step to the second is not timed, and that to the last not by transformers 4.28
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
        text = tables.in_markdown(Result.from_json(file.read_text()) for file in options.table)
        print(text)
        if options.write:
            tables.write_between_markers(options.write, text)
        return 0
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder.")
    if options.attention:
        if not torch.cuda.is_available():
            parser.error("--attention times kernels of a CUDA GPU, and there is none here.")
        print(attention.run(torch.device("cuda", 0), options.json))
        return 0
    setting = _setting(options, parser)
    transformers.logging.set_verbosity_error()
    if options.prompts and options.check:
        differences = prompts.check(setting)
        print("\n".join(f"{name}: {difference:.2g}" for name, difference in differences.items()))
        allowed = max(TOLERANCES[setting.dtype], 3 * differences["itself"])
        return 1 if max(differences.values()) > allowed else 0
    if options.prompts:
        lengths = options.lengths or (prompts.LENGTHS if setting.devices.startswith("cuda") else (64, 256))
        print(prompts.run(setting, lengths, options.chunks or (), options.json))
        return 0
    result = run(setting, options.check)
    print(tables.in_markdown([result]))
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
    command = "python -m tools.bench"
    parser = argparse.ArgumentParser(prog=command, description=__doc__.split("\n")[0])
    sizes = [*models.REAL_SIZES, *(name for name, family in models.FAMILIES.items() if not family.is_encoder_decoder)]
    parser.add_argument(
        "--size", choices=sizes, metavar="SIZE", help=f"{', '.join(models.REAL_SIZES)}, or a tiny model"
    )
    parser.add_argument("--layers", type=_positive, help="how many of the model's layers (default: all)")
    parser.add_argument("--dtype", choices=tables.DTYPES, help="default: float16, simulated and unquantized float32")
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
    parser.add_argument("--attention", action="store_true", help="time graph mode's attention alone, each way of it")
    parser.add_argument("--prompts", action="store_true", help="time the first token, of prompts and next messages")
    parser.add_argument("--lengths", type=_positive, nargs="+", help="with --prompts: their tokens")
    parser.add_argument("--chunks", type=_positive, nargs="+", help="with --prompts: sizes of chunks to try as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every sample")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="measure nothing: a table of such files")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"with --table: into FILE, between {tables.BEGIN} and {tables.END}"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: the collections between replies need not look through it
    sys.exit(main())
