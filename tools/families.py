"""Which families of `tools.models` have graphs, and why the others have none: a table for the documents.

`python -m tools.families --write docs/models.md` tries each of them on two simulated GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import dispatch_model
from tqdm import tqdm

from extensions.sharded_kv import shard

from . import models, simulated
from .bench.tables import write_between_markers

HEADER = ("family", "architecture", "graph mode")
YES = "yes"
# Windows have 16 tokens: they slide.
_PROMPT, _TOKENS = 8, 24


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        family: its name in `tools.models`.
        architecture: what transformers calls it, a config's `model_type`.
        graph_mode: "yes", or one sentence on why its steps run eagerly.
    """

    family: str
    architecture: str
    graph_mode: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; always 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.families", description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this file's markers")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    simulated.start(2)
    names = [name for name in models.DECODERS if models.available(name)]
    table = in_markdown([tried(name) for name in tqdm(names, file=sys.stderr, leave=False, disable=None)])
    if options.write is None:
        print(table)
    else:
        write_between_markers(options.write, table)
    return 0


def tried(family: str) -> Row:
    """What becomes of a reply of this family in graph mode, on two simulated GPUs."""
    model = models.build(family)
    model = dispatch_model(model, models.device_map(model, ["sim:0", "sim:1"]), main_device="sim:0")
    sharding = shard(model)
    sharding.mode = "graph"
    prompt = torch.arange(10, 10 + _PROMPT, device="sim:0")[None]
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=_TOKENS,
            max_new_tokens=_TOKENS,
        )
    reason = sharding.failure or sharding.reason_for_eager
    sharding.detach()
    return Row(family, model.config.model_type, reason or YES)


def in_markdown(rows: Iterable[Row]) -> str:
    """A table with one line for each family, and what it was made with beneath."""
    cells = [HEADER, ("---",) * len(HEADER), *((row.family, row.architecture, row.graph_mode) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{table}\n\nWith transformers {transformers.__version__}."


def from_markdown(text: str) -> list[Row]:
    """The rows of the table in a document."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [Row(*cells) for cells in lines[lines.index(["---"] * len(HEADER)) + 1 :]]


if __name__ == "__main__":
    sys.exit(main())
