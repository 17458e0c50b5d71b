"""What of a model decides how its steps run, besides their inputs: to see that somebody has changed it."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..transfers import is_plain
from .trace import hooks_of, hooks_of_all

# Modules of these have no settings that anybody turns in the midst of a reply, as those of an adapter are turned.
_LIBRARIES = frozenset({"torch", "transformers", "transformers_modules", "accelerate", "auto_gptq", "gptqmodel"})
# How many modules are read for each token, of people's own and of all: 7 us for a Llama-7B, 19 us with a LoRA.
_OWN_AT_ONCE = 4
_AT_ONCE = 4


class Fingerprint:
    """A model as it was at one moment: its modules, weights, hooks, and the settings of people's own modules.

    What is changed in a whole model by code of somebody's own (a LoRA that is scaled, switched or taken off) shows
    before the next token. What is changed in one module alone shows once it is that module's turn to be read again.
    Not seen is what a module only refers to.

    Args:
        model: held weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_Module(module) for module in model.modules()]
        own = [module for module in self._modules if module.names]
        self._turns = (_turns(own, _OWN_AT_ONCE), _turns(self._modules, _AT_ONCE))
        self._hooks = RemovableHandle.next_id
        self._of_all = hooks_of_all()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._modules == other._modules and self._of_all == other._of_all

    def holds_throughout(self) -> bool:
        """Whether all of the model is still so."""
        return self._of_all == hooks_of_all() and all(module.is_as_before() for module in self._modules)

    def holds(self) -> bool:
        """Whether the model is still so, as far as the modules tell whose turn it is. Asked for each token."""
        if self._hooks != RemovableHandle.next_id:  # it counts up with each hook that any module of any model gets
            self._hooks = RemovableHandle.next_id
            return self.holds_throughout()
        return all(module.is_as_before() for turns in self._turns for module in next(turns))


def _turns(modules: list[_Module], count: int) -> Iterator[list[_Module]]:
    """So many of them after each other, from the first again after the last."""
    return itertools.cycle([modules[begin : begin + count] for begin in range(0, len(modules), count)] or [[]])


class _Module:
    """One module as it was.

    Attributes:
        names: of its settings, if it is of people's own.
    """

    def __init__(self, module: nn.Module) -> None:
        own = vars(module)
        is_own = type(module).__module__.partition(".")[0] not in _LIBRARIES
        self.names = [name for name, value in own.items() if is_own and is_plain(value)]
        self._module = weakref.ref(module)
        self._settings = copy.deepcopy([own[name] for name in self.names])
        self._parts = _parts(own)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Module)
            and self._parts == other._parts
            and (self.names, self._settings) == (other.names, other._settings)
        )

    def is_as_before(self) -> bool:
        module = self._module()
        if module is None:
            return False
        own = vars(module)
        return _parts(own) == self._parts and (
            not self.names or [own.get(name) for name in self.names] == self._settings
        )


def _parts(own: dict[str, Any]) -> Any:
    """Of a module's attributes those of every module, by identity; a tensor also by where it lies."""
    tensors = (*own["_parameters"].values(), *own["_buffers"].values())
    return (
        own.get("training"),
        *map(id, (own.get("forward"), *own["_modules"].values(), *tensors)),
        *map(id, hooks_of(own)),
        *[tensor.data_ptr() for tensor in tensors if tensor is not None],
    )
