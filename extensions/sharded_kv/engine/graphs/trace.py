"""The trace of a decode step: its operators, with all that a captured graph would fix of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..transfers import tensors_in

_aten = torch.ops.aten
_WRITING_OVER = (_aten.copy_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default)
# Values of tensors on the host are compared from step to step; a larger one is none that a forward makes anew.
_MOST_HOST_VALUES = 1024
# Hooks of these do nothing in a step that may be a graph: our own, and those by which transformers 5 collects hidden
# states and attentions, which it never takes off.
_IDLE_HOOKS = (__name__.rpartition(".graphs")[0], "transformers.utils.output_capturing")


# Why a step is not captured that `NumbersByHost` may let be.
NUMBERS = "Its forward makes a tensor of Python's numbers on a GPU."


class CannotCapture(Exception):
    """A step does what a graph cannot repeat. The message is one sentence for people."""


class OpTrace(TorchDispatchMode):
    """Records of each operator all that a captured graph would fix: which tensors, which shapes, which Python values.

    Two steps with the same operators differ in nothing but the contents of tensors, which is what a replay reads anew.
    So the traces of two steps decide whether a graph captured in the second is right for the third. No list of
    architectures is needed.

    Attributes:
        ops: of each operator in turn, itself, its arguments and its keyword arguments.
        read: where the tensors lie that operators were given and that no operator has made, or written over as a whole.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[tuple[Any, ...]] = []
        self.read: set[int] = set()
        self._written: set[int] = set()
        self._here = object()
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Some thousand operators come here in a step, so what is done for each is written out.
        if torch.is_inference_mode_enabled():  # operators that consist of others come whole there, views among them
            raise CannotCapture("Part of its forward runs in inference mode.")
        known = _operators[func]
        if known.is_suspect:
            _check(func, args, kwargs or {})
        if known.writes_over and args[0].nbytes == args[0].untyped_storage().nbytes():
            self._written.add(args[0].data_ptr())
        record = self._record
        if kwargs:
            self.ops.append((func, record(args), record(tuple(kwargs.items()))))
            out = self.run(func, args, kwargs)
        else:
            self.ops.append((func, record(args), ()))
            out = self.run(func, args, {})
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
            for operand in args:
                if operand is tensor:
                    break  # written in place
            else:
                tensor._sharded_kv_made = (self._here, self._made)  # type: ignore[attr-defined]
                self._made += 1
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator."""
        return func(*args, **kwargs)

    def _record(self, value: Any) -> Any:
        kind = type(value)
        if kind is tuple or kind is list:
            return tuple([self._record(item) for item in value])
        if isinstance(value, Tensor):
            return self._record_tensor(value)
        if isinstance(value, (list, tuple)):
            return tuple([self._record(item) for item in value])
        # 1, 1.0 and True are equal, but not the same to an operator. NaN is not equal to itself.
        return (kind, repr(value)) if kind is float else (kind, value)

    def _record_tensor(self, tensor: Tensor) -> Any:
        is_cpu, made = tensor.is_cpu, vars(tensor).get("_sharded_kv_made")
        if made is not None and made[0] is self._here and not is_cpu:
            return made[1]  # what it looks like follows from the operators before
        look = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        if is_cpu:
            if tensor.numel() > _MOST_HOST_VALUES:
                raise CannotCapture(f"Its forward uses a tensor on the CPU, of the shape {tuple(tensor.shape)}.")
            return look, tuple(map(repr, tensor.flatten().tolist()))
        place = tensor.data_ptr()
        if place not in self._written:
            self.read.add(place)
        return look, place


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse what no graph can hold."""
    if _draws(func) and _argument(func, args, kwargs, "dropout_p") != 0:
        raise CannotCapture(f"Its forward draws random numbers ({func}).")
    if func is _aten.lift_fresh.default and not args[0].is_cpu:  # torch.tensor(), which copies out of our sight
        raise CannotCapture(NUMBERS)
    depends = _depends(func)
    if func is _aten.index.Tensor:  # only a mask's result has as many elements as it has
        depends = any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    if depends and any(not tensor.is_cpu for tensor in tensors_in(args)):
        raise CannotCapture(f"What its forward does depends on values that it reads back from a GPU ({func}).")


@dataclasses.dataclass(frozen=True, slots=True)
class _Operator:
    """What is known of an operator.

    Attributes:
        is_suspect: it may be one that no graph can hold.
        writes_over: it writes over its first operand as a whole.
    """

    is_suspect: bool
    writes_over: bool


class _Operators(dict[Any, _Operator]):
    """By operator. Asked for each in each step that is traced, so it is found out once."""

    def __missing__(self, func: Any) -> _Operator:
        is_suspect = _draws(func) or _depends(func) or func in (_aten.lift_fresh.default, _aten.index.Tensor)
        self[func] = known = _Operator(is_suspect, func in _WRITING_OVER)
        return known


_operators = _Operators()


class NumbersByHost(TorchFunctionMode):
    """Makes tensors of Python's numbers on the host, then moves them, which a trace sees.

    It does not see torch.tensor(numbers, device=gpu), nor an index that is a list. Both hold the same numbers in each
    step, as a rule.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor) and kwargs.get("device"):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and not args[0].is_cpu:
            args = (args[0], _without_lists(args[1], args[0].device), *args[2:])
        return func(*args, **kwargs)


def _without_lists(index: Any, device: torch.device) -> Any:
    """An index, with tensors on a device in place of lists of numbers."""
    if isinstance(index, tuple):
        return tuple([_without_lists(item, device) for item in index])
    return torch.tensor(index).to(device) if isinstance(index, list) else index


def _draws(func: Any) -> bool:
    """Whether it may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _depends(func: Any) -> bool:
    """Whether what it gives depends on values in such a way that a GPU is waited for."""
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """What an operator was given for an argument, or its default; None if it has none of that name."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None


@contextlib.contextmanager
def hooks_that_run(model: nn.Module) -> Iterator[list[str]]:
    """Within, takes down the names of modules below the model whose hooks are run: people's own, which a replay skips.

    Hooks that no step runs, as those on a vision tower, do no harm. Watching every call of a function makes a step
    take twice as long: it is done where there are hooks.
    """
    watched: dict[types.CodeType, str] = {}
    ran: list[str] = []
    hooks = [(name, hook) for name, module in model.named_modules() if name for hook in hooks_of(vars(module))]
    for name, hook in hooks + [("every module", hook) for hook in hooks_of_all()]:
        if not getattr(hook, "__module__", type(hook).__module__).startswith(_IDLE_HOOKS):
            code = _code(hook)
            ran += [name] if code is None else []
            watched |= {} if code is None else {code: name}
    before = sys.getprofile()
    if not watched or before is not None:  # somebody else watches: then all of them count
        yield ran + list(watched.values())
        return

    def note(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in watched:
            ran.append(watched[frame.f_code])

    sys.setprofile(note)
    try:
        yield ran
    finally:
        sys.setprofile(None)


def module_tensors(model: nn.Module) -> dict[tuple[str, str], tuple[Tensor, int]]:
    """The tensors that a model's modules keep, by the names of module and attribute, and how often each was changed."""
    kept: dict[tuple[str, str], tuple[Tensor, int]] = {}
    for name, module in model.named_modules():
        own = vars(module)
        for key, value in (*own.items(), *own["_parameters"].items(), *own["_buffers"].items()):
            if isinstance(value, Tensor):
                kept[name, key] = (value, 0 if value.is_inference() else value._version)
    return kept


def hooks_of(own: dict[str, Any]) -> list[Any]:
    """The hooks that are run before and after a module's forward, from its attributes."""
    return [*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values()]


def hooks_of_all() -> list[Any]:
    """Those of every module of the process."""
    of_all = nn.modules.module
    return [*of_all._global_forward_pre_hooks.values(), *of_all._global_forward_hooks.values()]


def _code(hook: Any) -> types.CodeType | None:
    """What a call of the hook runs first; None if that is not written in Python."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not isinstance(hook, (types.FunctionType, types.MethodType)):
        hook = type(hook).__call__
    hook = inspect.unwrap(hook)  # what a decorator makes is the same code for all that it decorates
    code: types.CodeType | None = getattr(hook, "__code__", None)
    return code
