"""How much memory a model takes, and what is said where there is too little."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from extensions.sharded_kv.engine import devices as device_memory

from .. import quantized
from .variants import ONE_GPU

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


def require_room(homes: Mapping[nn.Module, torch.device]) -> None:
    """Make sure that all parameters fit onto the devices that their modules get.

    Raises:
        torch.cuda.OutOfMemoryError: they do not.
    """
    give_back_memory(homes.values())
    for device in set(homes.values()):
        needed = sum(size_of(module.parameters(recurse=False)) for module, home in homes.items() if home == device)
        free, _ = device_memory.runtime(device).mem_get_info(device)
        if needed > free:
            raise torch.cuda.OutOfMemoryError(_missing(device, needed - free))


def give_back_memory(devices: Iterable[torch.device]) -> None:
    """Free on `devices` what nobody holds any more."""
    gc.collect()
    for device in set(devices):
        device_memory.runtime(device).empty_cache()


def bytes_on(device: torch.device, model: nn.Module) -> int:
    """Bytes of a model on one device."""
    return size_of(tensor for tensor in quantized.tensors(model) if tensor.device == device)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
