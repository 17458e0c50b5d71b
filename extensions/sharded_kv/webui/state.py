"""What the panel shows, as frozen facts: made by the extension, drawn by the view."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

from ..engine.metering.compare import Comparison
from ..engine.metering.figures import Snapshot
from ..engine.placement import Placement


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How far "Measure on and off" has got.

    Attributes:
        phase: "waiting" for a reply that is being written, or how the latest one ended.
        done, of: replies.
        message: one sentence where there is something to say: why it failed or was cancelled.
        gpu: what it ran on, as "2x NVIDIA GeForce RTX 4090".
        model: its name.
        comparison: of the latest one that was done.
    """

    phase: Literal["idle", "waiting", "running", "done", "cancelled", "failed"] = "idle"
    done: int = 0
    of: int = 0
    message: str = ""
    gpu: str = ""
    model: str = ""
    comparison: Comparison | None = None

    @property
    def under_way(self) -> bool:
        """Whether it can be cancelled."""
        return self.phase in ("waiting", "running")


@dataclasses.dataclass(frozen=True)
class PanelState:
    """All that the panel shows at one moment.

    Attributes:
        activate: the checkbox, what the user asked for.
        mode: "eager" or "graph".
        keep: whether a conversation's cache is kept for its next message.
        tone: whether the model runs by our forwards ("on"), could but does not ("off"), cannot ("idle"), or something
            of ours went wrong ("failed").
        sentence: what is on and how the model is split, or why nothing can be done and what would help.
        model: the model's name, as the webui has it.
        placement: of the model; None without one that is spread.
        snapshot: of its meter; None likewise.
        measurement: of "Measure on and off".
    """

    activate: bool
    mode: str
    tone: Literal["on", "off", "idle", "failed"]
    sentence: str
    keep: bool = True
    model: str = ""
    placement: Placement | None = None
    snapshot: Snapshot | None = None
    measurement: Measurement = dataclasses.field(default_factory=Measurement)


class Controls(Protocol):
    """What the panel's controls do, and where it asks for what to show. None of it raises."""

    def state(self) -> PanelState:
        """All that the panel shows, as of now."""

    def set_activate(self, activate: bool) -> None:
        """Sharding on or off."""

    def set_mode(self, mode: str) -> None:
        """How the model runs while sharding is on."""

    def set_keep(self, keep: bool) -> None:
        """Whether a conversation's cache is kept for its next message."""

    def drop_kept(self) -> None:
        """Free what is kept."""

    def measure(self) -> None:
        """Begin "Measure on and off"."""

    def cancel_measuring(self) -> None:
        """Stop it at the next token."""
