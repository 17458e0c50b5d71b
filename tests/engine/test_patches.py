"""What stood in a module's attributes comes back, and a copy of the module has it meanwhile."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from extensions.sharded_kv.engine.patches import Patch, PatchSet, UnhookPatch, wrap


class Doubling(nn.Module):
    """A module under a hook that adds one to what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self._old_forward = self.forward
        self.forward = functools.partial(hooked, self)

    def forward(self, x: int) -> int:
        return 2 * x


def hooked(module: Any, x: int) -> int:
    result: int = module._old_forward(x) + 1
    return result


def another(x: int) -> int:
    return x


@pytest.fixture(params=["taken away", "replaced"])
def unhooked(request: pytest.FixtureRequest) -> tuple[Doubling, PatchSet]:
    """A module whose hook is out of the way, in both ways that there are, and the record of it."""
    module = Doubling()
    patch = (
        UnhookPatch(module) if request.param == "taken away" else Patch(module, "forward", wrap(module._old_forward))
    )
    return module, PatchSet([patch])


Unhooked = tuple[Doubling, PatchSet]


def test_a_hook_that_is_out_of_the_way_does_not_run(unhooked: Unhooked) -> None:
    assert unhooked[0](3) == 6


def test_a_restored_module_has_its_own_attributes(unhooked: Unhooked) -> None:
    module, installation = unhooked
    installation.restore()
    assert module(3) == 7
    assert module.forward.func is hooked
    assert module._old_forward == Doubling.forward.__get__(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_hooked_as_the_module_was(unhooked: Unhooked, copied: Callable[[Any], Any]) -> None:
    module, installation = unhooked
    twin = copied(module)
    assert twin(3) == 7
    assert twin.forward.args == (twin,)
    assert twin._old_forward == Doubling.forward.__get__(twin)
    assert vars(twin).keys() == vars(Doubling()).keys()
    installation.restore()
    assert twin(3) == module(3) == 7


def test_a_forward_that_somebody_put_there_meanwhile_stays(unhooked: Unhooked) -> None:
    module, installation = unhooked
    module.forward = another
    installation.restore()
    assert module(3) == 3
    assert copy.deepcopy(module)(3) == 3


def test_a_hook_removed_as_accelerate_does_leaves_the_module_plain(unhooked: Unhooked) -> None:
    module, installation = unhooked
    module.forward = module._old_forward
    del module._old_forward
    assert module(3) == copy.deepcopy(module)(3) == pickle.loads(pickle.dumps(module))(3) == 6
    installation.restore()
    assert module(3) == 6


def test_a_forward_of_its_own_below_the_hook_is_not_the_classs() -> None:
    module = Doubling()
    assert UnhookPatch.suits(module)
    for below in (another, module.forward, Doubling()._old_forward):
        module._old_forward = below
        assert not UnhookPatch.suits(module)
