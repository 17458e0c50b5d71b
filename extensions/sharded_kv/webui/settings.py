"""The extension's parameters, as `params` of script.py and as `sharded_kv-NAME` in the webui's settings.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..engine import text
from ..engine.sharding import MODES


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its default, which values it takes, and these in words."""

    default: Any
    takes: Callable[[Any], bool]
    allowed: str


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_MOST_KEPT = 16
PARAMETERS = {
    "activate": Parameter(True, _is_bool, "true or false"),
    "mode": Parameter("graph", lambda value: value in MODES, " or ".join(MODES)),
    "kept_conversations": Parameter(
        1, lambda value: type(value) is int and 0 <= value <= _MOST_KEPT, f"a whole number from 0 to {_MOST_KEPT}"
    ),
    "display_name": Parameter("Sharded KV", lambda value: isinstance(value, str) and value.strip() != "", "a text"),
    "is_tab": Parameter(True, _is_bool, "true or false"),
}


def defaults() -> dict[str, Any]:
    """A fresh `params`."""
    return {name: parameter.default for name, parameter in PARAMETERS.items()}


def correct(params: dict[str, Any], extension: str, warn: Callable[[str], None]) -> None:
    """Replace each bad value in `params` by its default, with one warning for each.

    Args:
        params: as the webui has filled it from settings.yaml.
        extension: the extension's name, which its keys in settings.yaml begin with.
        warn: takes the warning.
    """
    for name, parameter in PARAMETERS.items():
        value = params[name]
        if not parameter.takes(value):
            warn(
                f"settings.yaml: {extension}-{name} is {text.of_value(value)}, but takes {parameter.allowed}. "
                f"Going on with {parameter.default!r}."
            )
            params[name] = parameter.default
