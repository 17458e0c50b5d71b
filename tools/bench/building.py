"""Builds models of real size with random weights, on their devices at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import accelerate
import torch
import transformers
from torch import nn

from .. import models, quantized
from .memory import give_back_memory, require_room
from .records import device_of
from .variants import knows_skip_keys


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
        module: device_of(place)
        for name, place in device_map.items()
        for module in skeleton.get_submodule(name).modules()
    }
    require_room(homes)
    home = (homes.get(module, device_of(places[0])) for module in registered)

    def send_home(module: nn.Module, name: str) -> None:
        old, device = module._parameters[name], next(home)
        if old.device != device:
            # A norm's ones count, what is in a matrix does not: it is drawn anew.
            new = old.data.to(device) if old.dim() == 1 else torch.empty_like(old.data, device=device)
            module._parameters[name] = nn.Parameter(new, old.requires_grad)

    with _each_parameter(send_home):
        model = models.build(config, dtype)
    if len(places) == 1:
        model = model.to(device_of(places[0]))
    if quantization:
        quantized.quantize(model, quantization)
        give_back_memory(homes.values())
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
