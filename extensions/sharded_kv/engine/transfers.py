"""Moves tensors between devices: each at most once per device and forward, however many blocks ask for it."""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .interfaces import CausalBias

_version = operator.attrgetter("_version")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What has crossed between devices.

    Attributes:
        copies: number of copies for each (from, to) pair of devices, as ``{("cuda:0", "cuda:1"): 3}``.
        bytes: bytes for each pair.
    """

    copies: Mapping[tuple[str, str], int]
    bytes: Mapping[tuple[str, str], int]

    @property
    def total_copies(self) -> int:
        """Copies over all pairs."""
        return sum(self.copies.values())

    @property
    def total_bytes(self) -> int:
        """Bytes over all pairs."""
        return sum(self.bytes.values())


class _ThreadTotals(threading.local):
    """What this thread has counted so far."""

    bytes = 0
    copies = 0


class TrafficCounter:
    """Counts copies between devices; threads may count at the same time.

    Attributes:
        of_this_thread: `bytes` and `copies` that the thread that asks has counted so far.
    """

    def __init__(self) -> None:
        self.of_this_thread = _ThreadTotals()
        self._lock = threading.Lock()
        self._copies: dict[tuple[torch.device, torch.device], int] = {}
        self._bytes: dict[tuple[torch.device, torch.device], int] = {}

    def add(self, source: torch.device, target: torch.device, size: int) -> None:
        """Count one copy of `size` bytes."""
        pair = (source, target)
        with self._lock:
            self._copies[pair] = self._copies.get(pair, 0) + 1
            self._bytes[pair] = self._bytes.get(pair, 0) + size
        mine = self.of_this_thread
        mine.bytes += size
        mine.copies += 1

    def add_all(self, crossing: list[tuple[torch.device, torch.device, int]]) -> None:
        """Count copies: of each the devices, from and to, and the bytes."""
        for source, target, size in crossing:
            self.add(source, target, size)

    def read(self) -> Traffic:
        """All that has been counted so far."""
        with self._lock:
            return Traffic(_named(self._copies), _named(self._bytes))


def _named(counts: dict[tuple[torch.device, torch.device], int]) -> dict[tuple[str, str], int]:
    return {(str(source), str(target)): count for (source, target), count in counts.items()}


@dataclasses.dataclass(slots=True)
class _Copy:
    """A tensor, its copy on another device, and how both looked when the copy was made.

    The source is held weakly: a hidden state that has crossed dies as early as under accelerate, and its copy with it.

    Attributes:
        source_version, copy_version: count the changes in place; None for inference tensors, which do not count them.
        visit: the number of the visit to a device in which the copy was made.
    """

    source: weakref.ref[Tensor]
    source_version: int | None
    copy: Tensor
    copy_version: int | None
    visit: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    """Keyword arguments of a module, and its tensors on its device: what every block of a model is given.

    Attributes:
        device: where the module is.
        given: what it was given.
        moved: what that became.
        tensors: those that were copied, and their copies.
        versions: how each of `tensors` looked when the copy was made.
    """

    device: torch.device
    given: dict[str, Any]
    moved: dict[str, Any]
    tensors: list[Tensor]
    versions: list[int]


class ForwardState:
    """One forward of a model in one thread: its memo of transfers and its current device.

    Whoever makes one closes it, after an exception too.

    Args:
        owner: identity of what opened it.
        counter: counts the copies.
    """

    def __init__(self, owner: object, counter: TrafficCounter) -> None:
        self.owner = owner
        self.home: torch.device | None = None  # where the code between the blocks has its tensors
        self.skipped: object = None  # a block that is not run: the next gets what this one was given
        self.keeps_output = False  # nobody asks for the model's output: it stays where it is
        self._counter = counter
        self._memo: dict[tuple[int, torch.device], _Copy] = {}
        self._home: tuple[Any, int] | None = None  # torch.cuda or its like, and the caller's current device
        self.device: torch.device | None = None  # the current one
        self._visits = 0
        self._shared: _Inputs | None = None

    def close(self) -> None:
        """Drop the memo and make the caller's current device current again."""
        self._memo.clear()
        self._shared = None
        if self._home is not None:
            runtime, index = self._home
            self._home = self.device = None
            runtime.set_device(index)

    def enter(self, device: torch.device) -> None:
        """Make `device` current, so that no kernel launched there has to switch."""
        if device == self.device:
            return
        self._visits += 1
        self.device = device
        self._shared = None
        if device.type == "cpu":
            return
        runtime = getattr(torch, device.type)
        if self._home is None:
            self._home = (runtime, runtime.current_device())
        runtime.set_device(device.index)

    def move(self, value: Any, device: torch.device, keep: frozenset[str] = frozenset()) -> Any:
        """`value` with every tensor in it on `device`.

        Args:
            value: a tensor, or what accelerate's `send_to_device` takes: nested tuples, lists, mappings and objects
                with a ``to`` method. Anything else, caches of transformers among it, is returned as it is.
            device: where to.
            keep: keys of mappings whose values stay where they are.

        Returns:
            `value` itself where nothing had to move.
        """
        kind = _kinds[type(value)]
        if kind == "inert":
            return value
        if kind == "tensor":
            return value if value.device == device else self._copy(value, device)
        if kind == "sequence":
            items, is_moved = [], False
            for item in value:
                new = self.move(item, device, keep)
                items.append(new)
                is_moved = is_moved or new is not item
            if not is_moved:
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if kind == "mapping":
            changed = {}
            for key, item in value.items():
                if key not in keep and (new := self.move(item, device, keep)) is not item:
                    changed[key] = new
            return _with_changed(value, changed) if changed else value
        for tensor in tensors_in(value):
            if tensor.device != device:
                self._counter.add(tensor.device, device, tensor.numel() * tensor.element_size())
        return value.to(device)

    def move_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, keep: frozenset[str] = frozenset()
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a module, on its device. Keyword arguments named in `keep` stay where they are.

        Every block comes here: that an input stays, as most do, is found out without a call, and what every block of a
        model is given is looked up as a whole. What was given is as before, should anything fail midway.
        """
        for value in args:
            if _kinds[type(value)] != "tensor" or value.device != device:
                moved_args = []
                for each in args:
                    moved_args.append(self.move(each, device, keep))
                args = tuple(moved_args)
                break
        shared = self._shared
        if (
            shared is not None
            and not keep
            and shared.device == device
            and len(shared.given) == len(kwargs)  # the same objects under the same names, in the same order
            and all(map(operator.is_, shared.given.values(), kwargs.values()))
            and all(map(operator.eq, shared.given, kwargs))
            and all(map(operator.eq, map(_version, shared.tensors), shared.versions))
        ):
            return args, shared.moved
        known = len(self._memo)
        moved = kwargs
        for key, value in kwargs.items():
            kind = _kinds[type(value)]
            if kind == "inert" or (kind == "tensor" and value.device == device) or key in keep:
                continue
            new = self.move(value, device, keep)
            if new is not value:
                if moved is kwargs:
                    moved = dict(kwargs)
                moved[key] = new
        # What crossed just now may be a hidden state, which is not ours to hold, and will not come again.
        is_known = not keep and len(self._memo) == known
        self._shared = self._as_shared(kwargs, moved, device) if is_known else None
        return args, moved

    def _as_shared(self, given: dict[str, Any], moved: dict[str, Any], device: torch.device) -> _Inputs | None:
        """What to look up as a whole when it comes again; None where that takes more than to look at the copies."""
        tensors: list[Tensor] = []
        versions: list[int] = []
        for key, value in given.items():
            kind = _kinds[type(value)]
            if kind == "inert":
                continue
            if kind != "tensor" and type(value) is not tuple:
                return None
            pairs = [(value, moved[key])] if kind == "tensor" else zip(value, moved[key], strict=True)
            for source, copy in pairs:
                if source is copy and isinstance(source, Tensor):
                    continue  # it is there
                record = self._memo.get((id(source), device))
                if (
                    record is None
                    or record.copy is not copy
                    or record.source_version is None
                    or record.copy_version is None
                    or (source.requires_grad and not copy.requires_grad)
                ):
                    return None
                tensors += [source, copy]
                versions += [record.source_version, record.copy_version]
        return _Inputs(device, given, moved, tensors, versions)

    def move_home(self, output: Any, device: torch.device, keep: frozenset[str] = frozenset()) -> Any:
        """An output on `device`, but for what `keep` names in it.

        A tensor that was brought home is known where it came from: the next block there takes that.
        """
        if isinstance(output, Tensor):
            moved: Tensor = self.move(output, device)
            if moved is not output:
                self.remember(moved, output)
            return moved
        if type(output) is tuple:
            return tuple([self.move_home(item, device, keep) for item in output])
        return self.move(output, device, keep)

    def _copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        known = self._memo.get((id(tensor), device))
        if known is not None and self._is_good(known):
            copy: Tensor = known.copy
            return copy
        # Between two GPUs a copy is ordered by streams alone; only a copy to or from the host has to be waited for.
        copy = tensor.to(device, non_blocking=tensor.device.type == device.type)
        self._counter.add(tensor.device, device, tensor.numel() * tensor.element_size())
        self.remember(tensor, copy)
        return copy

    def _is_good(self, known: _Copy) -> bool:
        """Whether neither the source nor the copy was changed, and the copy carries the gradient that is wanted now.

        Of what does not count its changes a copy is good while one device is current: what runs there cannot have
        changed it on the others.
        """
        source, copy, is_same_visit = known.source(), known.copy, known.visit == self._visits
        return (
            source is not None
            and (is_same_visit if known.source_version is None else source._version == known.source_version)
            and (
                is_same_visit and torch.is_inference_mode_enabled()
                if known.copy_version is None
                else copy._version == known.copy_version
            )
            and (not source.requires_grad or copy.requires_grad or not torch.is_grad_enabled())
        )

    def remember(self, tensor: Tensor, copy: Tensor) -> None:
        """Take `copy` for a copy of `tensor` from now on, as long as neither is changed."""
        key = (id(tensor), copy.device)
        # The record ends with its source, before the id can be another tensor's.
        source = weakref.ref(tensor, functools.partial(self._memo.pop, key))  # the weak reference is the default
        version = None if tensor.is_inference() else tensor._version
        copy_version = None if copy.is_inference() else copy._version
        self._memo[key] = _Copy(source, version, copy, copy_version, self._visits)


_PLAIN = frozenset({type(None), bool, int, float, str})


def is_plain(value: Any) -> bool:
    """Whether `value` is a Python value without a tensor or another object in it."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return type(value) in _PLAIN or isinstance(value, (torch.dtype, torch.device))


class _Kinds(dict[type, Literal["tensor", "sequence", "self-moving", "mapping", "inert"]]):
    """How values of a type move. Asked for every input of every block, so it is found out once for each type."""

    def __missing__(self, of: type) -> str:
        if len(self) >= 1024:  # somebody makes types as he goes: they must not stay
            self.clear()
        self[of] = kind = self._find_out(of)
        return kind

    @staticmethod
    def _find_out(of: type) -> Literal["tensor", "sequence", "self-moving", "mapping", "inert"]:
        if issubclass(of, CausalBias):  # it has no numbers
            return "inert"
        if issubclass(of, Tensor):
            return "tensor"
        # Before other containers: BatchEncoding and the KVSharingDict of transformers 5 are shared, and move in place.
        # No modules: caches are modules in transformers 4.45 to 4.47, and a module is nobody's input.
        if hasattr(of, "to") and not issubclass(of, nn.Module):
            return "self-moving"
        if issubclass(of, (tuple, list)):
            return "sequence"
        if issubclass(of, Mapping):
            return "mapping"
        return "inert"


_kinds = _Kinds()


def _with_changed(old: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    """A mapping like `old` with some items changed."""
    fields = getattr(type(old), "__dataclass_fields__", None)
    is_plain_output = fields is not None and isinstance(old, dict) and vars(old).keys() == fields.keys()
    if is_plain_output:  # an output of transformers: is nothing in it but its fields, each of them an item or None?
        for name, value in vars(old).items():
            is_plain_output = is_plain_output and (value is None or old.get(name) is value)
    if not is_plain_output:
        return type(old)({**old, **changed})  # type: ignore[call-arg]
    # Its constructor takes 40 us: as long as the copy of the logits.
    new: Any = type(old).__new__(type(old))
    vars(new).update(vars(old))
    for key, item in old.items():
        new[key] = changed.get(key, item)
    return new


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in the order in which accelerate's `find_device` meets them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def first_device(value: Any) -> torch.device | None:
    """The device of the first tensor in `value`, as `tensors_in` meets them; None if there is none."""
    if isinstance(value, Tensor):
        return value.device
    tensor = next(tensors_in(value), None)
    return None if tensor is None else tensor.device
