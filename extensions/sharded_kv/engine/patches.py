"""Attributes of a model that are ours for a while, and how the model gets back its own."""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

_MISSING = object()


class Wrapped(functools.partial):  # type: ignore[type-arg]
    """A callable of ours in an attribute of a module.

    It owns the record of what stood there before: so only the module itself keeps its own attributes alive, and a
    wrapper around a model dies though the model lives.
    """

    patch: Patch

    def become(self, other: Callable[..., Any]) -> None:
        """Be nothing but another callable, for whoever has kept this one."""
        self.__setstate__((other, (), {}, {"patch": self.patch}))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The deep copy of a model is as the model was before: with what stood here, bound to the copy."""
        return self.patch.before_for(copy.deepcopy(self.patch.owner, memo), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """So is a pickled one."""
        return self.patch.reduced()


class Patch:
    """One attribute of one module.

    Args:
        owner: the module.
        name: the attribute, ``forward`` for most.
        ours: what stands there while it is installed.
    """

    def __init__(self, owner: nn.Module, name: str, ours: Wrapped) -> None:
        self.owner = owner
        self.name = name
        self.ours = ours
        self._before: Any = _MISSING  # what stood among the instance's own attributes; missing if the class's was used
        self._is_installed = False
        ours.patch = self

    @property
    def in_place(self) -> bool:
        """Whether ours is still there."""
        return vars(self.owner).get(self.name) is self.ours

    def install(self) -> None:
        """Put ours there, and keep what was there."""
        self._before = vars(self.owner).get(self.name, _MISSING)
        setattr(self.owner, self.name, self.ours)
        self._is_installed = True

    def restore(self) -> None:
        """Put back what was there. If somebody has replaced ours meanwhile, theirs stays, and calls what was there."""
        if not self._is_installed:
            return
        if not self.in_place:
            before = self._of_class(self.owner) if self._before is _MISSING else self._before
            if vars(self.owner).get("_old_forward") is self.ours:  # a hook of accelerate that came later
                self.owner._old_forward = before
            self.ours.become(before)
        elif self._before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)
        self._is_installed = False

    def before_for(self, owner: nn.Module, memo: dict[int, Any]) -> Any:
        """A deep copy of what was there, for a deep copy of the owner."""
        if self._before is not _MISSING:
            return copy.deepcopy(self._before, memo)
        return self._of_class(owner)

    def reduced(self) -> tuple[Any, tuple[Any, ...]]:
        """What was there, as pickle wants to be told how to make it."""
        if self._before is not _MISSING:
            return _itself, (self._before,)
        attribute = self._of_class(self.owner)
        if isinstance(attribute, types.MethodType):
            return _bound, (attribute.__func__, self.owner)
        return _itself, (attribute,)

    def _of_class(self, owner: nn.Module) -> Any:
        """What the owner's class gives it under the name."""
        return inspect.getattr_static(type(owner), self.name).__get__(owner, type(owner))


class UnhookPatch(Patch):
    """A module's hooked forward, taken away, so that a call finds the one of its class.

    That is the quickest there is: with anything in its place, even the bound method itself, a decode step of Llama took
    0.3 to 0.5 us more for each of a layer's dozen modules (Python 3.11). What was taken away is kept by what stands in
    accelerate's ``_old_forward``, which nobody calls meanwhile.
    """

    def __init__(self, owner: nn.Module) -> None:
        below: Any = owner._old_forward
        super().__init__(owner, "_old_forward", wrap_like(below, like=below))
        self._hooked: Any = None

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether the forward below the hook is the one of the module's class."""
        below: Any = module._old_forward
        of_class = inspect.getattr_static(type(module), "forward")
        return isinstance(below, types.MethodType) and below.__self__ is module and below.__func__ is of_class

    @property
    def _is_away(self) -> bool:
        """Whether nobody has put another there meanwhile."""
        return "forward" not in vars(self.owner)

    def install(self) -> None:
        """Take the hooked forward away, and keep it."""
        super().install()
        self._hooked = vars(self.owner).pop("forward")

    def restore(self) -> None:
        """Put it back, unless somebody else has put another there meanwhile."""
        if self.in_place and self._is_away:
            self.owner.forward = self._hooked
        super().restore()

    def before_for(self, owner: nn.Module, memo: dict[int, Any]) -> Any:
        """A deep copy of what ours stands for, for a deep copy of the owner, which gets its forward on the way."""
        if self._is_away:
            owner.forward = copy.deepcopy(self._hooked, memo)
        return super().before_for(owner, memo)

    def reduced(self) -> tuple[Any, tuple[Any, ...]]:
        """The same for pickle."""
        return (_with_forward, (self._before, self.owner, self._hooked)) if self._is_away else super().reduced()


def _with_forward(below: Any, owner: nn.Module, hooked: Any) -> Any:
    vars(owner)["forward"] = hooked  # by name it takes attributes that an owner still being made has not got
    return below


def _itself(value: Any) -> Any:
    return value


def _bound(function: Any, owner: nn.Module) -> Any:
    return types.MethodType(function, owner)


class PatchSet:
    """All that is installed together on one model. It refers to the model weakly.

    Args:
        patches: in the order in which they may take effect one by one, while another thread runs the model.
    """

    def __init__(self, patches: Iterable[Patch] = ()) -> None:
        patches = list(patches)
        self._patches = [weakref.ref(patch) for patch in patches]
        try:
            for patch in patches:
                patch.install()
        except BaseException:  # all or none
            self.restore()
            raise

    @property
    def are_in_place(self) -> bool:
        """Whether all are still there."""
        patches = [reference() for reference in self._patches]
        return all(patch is not None and patch.in_place for patch in patches)

    def restore(self) -> None:
        """Put back all that was there, in the opposite order."""
        for reference in reversed(self._patches):
            patch = reference()
            if patch is not None:
                patch.restore()


def wrap_like(run: Callable[..., Any], *first: Any, like: Callable[..., Any]) -> Wrapped:
    """`run` with its first arguments, with the name and signature of `like`.

    generate() asks `model.forward` for its signature (position_ids, logits_to_keep): it must see the model's own.
    """
    ours = wrap(run, *first)
    functools.update_wrapper(ours, like)
    return ours


def wrap(run: Callable[..., Any], *first: Any) -> Wrapped:
    """`run` with its first arguments and nothing around it.

    Of a bound method its function and owner are taken, which spares every call one more.
    """
    if isinstance(run, types.MethodType):
        return Wrapped(run.__func__, run.__self__, *first)
    return Wrapped(run, *first)
