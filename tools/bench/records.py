"""What goes into a run of the benchmark and what comes out of it, and how a file keeps that."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import torch

from .. import models

# The libraries whose versions make a stack.
STACK = ("torch", "transformers", "accelerate")


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
        return [device_of(place) for place in self.places]

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


def device_of(place: int | str) -> torch.device:
    """The device that `device_map` writes so."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def microseconds(seconds: float) -> float:
    """Seconds, rounded to microseconds: clocks tell no more."""
    return round(seconds, 6)
