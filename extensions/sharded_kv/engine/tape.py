"""One decode step as CUDA graphs: its operators captured in the order in which they ran, a graph for each run of them
on one device, with copies from device to device between the graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import vram
from .transfers import tensors_in

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
# Values of tensors on the host are compared from step to step; a larger one is none that a forward makes anew.
_MOST_HOST_VALUES = 1024


class CannotCapture(Exception):
    """A step does what a graph cannot repeat. The message is one sentence for people."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A copy from device to device, repeated at each replay."""

    source: Tensor
    target: Tensor

    def replay(self) -> None:
        """Copy again. Streams order it behind the graph before and ahead of the one after."""
        self.target.copy_(self.source, non_blocking=True)


@dataclasses.dataclass(frozen=True)
class Segment:
    """The operators between two transfers: one CUDA graph on one device."""

    device: torch.device
    graph: Any

    def replay(self) -> None:
        """Launch it on the device's current stream."""
        self.graph.replay()


class Tape:
    """A captured step.

    Args:
        parts: graphs and transfers in their order.
        constants: tensors that the graphs read and nobody else holds.

    Attributes:
        transfers: those among the parts.
    """

    def __init__(self, parts: list[Segment | Transfer], constants: list[Tensor] | None = None) -> None:
        self._parts = tuple(parts)
        self._constants = constants or []
        self.transfers = tuple(part for part in parts if isinstance(part, Transfer))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The graphs."""
        return tuple(part for part in self._parts if isinstance(part, Segment))

    def replay(self) -> None:
        """Run the step again, on what its inputs hold now. Waits for nothing."""
        for part in self._parts:
            part.replay()

    def free(self) -> None:
        """Give the graphs' memory back."""
        for segment in self.segments:
            segment.graph.reset()
        self._parts = self.transfers = ()
        self._constants = []


class Watch(TorchDispatchMode):
    """Notes of each operator all that a captured graph would fix: which tensors, which shapes, which Python values.

    Two steps with the same notes differ in nothing but the contents of tensors, which is what a replay reads anew. So
    the notes of two steps decide whether a graph captured in the second is right for the third. No list of
    architectures is needed.

    Attributes:
        notes: of each operator in turn.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes: list[tuple[Any, ...]] = []
        self._here = object()
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # operators that consist of others come whole there, views among them
            raise CannotCapture("Part of its forward runs in inference mode.")
        self._check(func, args, kwargs)
        self.notes.append((func, self._note(args), self._note(tuple(kwargs.items()))))
        out = self.run(func, args, kwargs)
        for tensor in tensors_in(out):
            if not any(tensor is operand for operand in tensors_in(args)):
                tensor._sharded_kv_made = (self._here, self._made)  # type: ignore[attr-defined]
                self._made += 1
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator."""
        return func(*args, **kwargs)

    @staticmethod
    def _check(func: Any, args: Any, kwargs: Any) -> None:
        """Refuse what no graph can hold."""
        if _draws(func) and _argument(func, args, kwargs, "dropout_p") != 0:
            raise CannotCapture(f"Its forward draws random numbers ({func}).")
        if func is _aten.lift_fresh.default and not args[0].is_cpu:  # torch.tensor(), which copies out of our sight
            raise CannotCapture("Its forward makes a tensor of Python's numbers on a GPU.")
        depends = _depends(func)
        if func is _aten.index.Tensor:  # only a mask's result has as many elements as it has
            depends = any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
        if depends and any(not tensor.is_cpu for tensor in tensors_in(args)):
            raise CannotCapture(f"What its forward does depends on values that it reads back from a GPU ({func}).")

    def _note(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._note_tensor(value)
        if isinstance(value, (list, tuple)):
            return tuple([self._note(item) for item in value])
        # 1, 1.0 and True are equal, but not the same to an operator. NaN is not equal to itself.
        return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)

    def _note_tensor(self, tensor: Tensor) -> Any:
        made = getattr(tensor, "_sharded_kv_made", None)
        look = tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device
        if tensor.is_cpu:
            if tensor.numel() > _MOST_HOST_VALUES:
                raise CannotCapture(f"Its forward uses a tensor on the CPU, of the shape {tuple(tensor.shape)}.")
            return (*look, tuple(map(repr, tensor.flatten().tolist())))
        if made is not None and made[0] is self._here:
            return (*look, made[1])
        return (*look, tensor.data_ptr())


class Capture(Watch):  # type: ignore[no-untyped-call]
    """Captures what runs within `recording()`. Nothing of it is computed until the first replay.

    Args:
        pools: of each device the pool that the graphs' memory comes from.
    """

    def __init__(self, pools: dict[torch.device, Any]) -> None:
        super().__init__()
        self._pools = pools
        self._parts: list[Segment | Transfer] = []
        self._constants: list[Tensor] = []
        self._open: Segment | None = None
        self._stream: Any = None
        self._read: set[int] = set()  # the memory that operators read

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Capture what this thread runs within. One capture at a time: others wait, they share streams.

        No garbage is collected meanwhile: a CUDA graph among it would be destroyed during the capture, which fails it.
        """
        with _one_at_a_time, _current_devices_kept(self._pools):
            collects = gc.isenabled()
            gc.disable()
            try:
                with self:
                    yield
                self._end()
            except BaseException:
                with contextlib.suppress(Exception):  # a capture that failed says so again when it is ended
                    self._end()
                Tape(self._parts).free()
                raise
            finally:
                if collects:
                    gc.enable()

    def tape(self, outputs: list[Tensor]) -> Tape:
        """What was captured, but for copies that neither an operator nor the step's caller reads."""
        read = self._read | {_memory(tensor) for tensor in outputs}
        parts = [part for part in self._parts if isinstance(part, Segment) or _memory(part.target) in read]
        return Tape(parts, self._constants)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator in the graph of its device, or between two graphs if it copies from one to the other."""
        if func in _COPIES and (copied := self._transfer(func, args, kwargs)) is not None:
            return copied
        if _is_view(func):
            return func(*args, **kwargs)
        operands = list(tensors_in((args, kwargs)))
        devices = {tensor.device for tensor in operands}
        if isinstance(kwargs.get("device"), torch.device):
            devices.add(_indexed(kwargs["device"]))
        devices = {device for device in devices if device.type not in ("cpu", "meta")}
        if len(devices) > 1:
            raise CannotCapture(f"An operator of its forward meets several GPUs at once ({func}).")
        if devices:
            self._turn_to(devices.pop())
            self._read.update(map(_memory, operands))
        return func(*args, **kwargs)

    def _transfer(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Copy between two graphs; None if `func` stays on one device."""
        into: Tensor | None = args[0] if func is _aten.copy_.default else None
        source: Tensor = args[0] if into is None else args[1]
        device = _indexed(kwargs.get("device") or source.device) if into is None else into.device
        if device == source.device:
            return None
        if device.type == "cpu":
            raise CannotCapture(f"Its forward copies a tensor of the shape {tuple(source.shape)} back to the CPU.")
        self._end()
        if source.is_cpu:  # a constant, or the notes differ: it goes there once, and to where it is wanted each time
            with torch.inference_mode(False):
                constant = source.to(device)
            self._constants.append(constant)
            self._turn_to(device)
            args = (constant, *args[1:]) if into is None else (into, constant, *args[2:])
            return cast(Tensor, func(*args, **kwargs))
        if into is None:
            layout = kwargs.get("memory_format") or torch.preserve_format
            with torch.inference_mode(False):
                dtype = kwargs.get("dtype") or source.dtype
                into = torch.zeros_like(source, device=device, dtype=dtype, memory_format=layout)
        else:
            self._read.add(_memory(into))
        self._read.add(_memory(source))
        self._parts.append(Transfer(source, into))
        return into

    def _turn_to(self, device: torch.device) -> None:
        """Go on in a graph of `device`."""
        if self._open is not None and self._open.device == device:
            return
        self._end()
        runtime = vram.runtime(device)
        stream = runtime.stream(_capture_stream(device))
        stream.__enter__()
        try:
            segment = Segment(device, runtime.CUDAGraph())
            # Other threads may do with CUDA what they like meanwhile: only a mistake of this one fails the capture.
            segment.graph.capture_begin(self._pools[device], capture_error_mode="thread_local")
        except BaseException:
            stream.__exit__(None, None, None)
            raise
        self._open, self._stream = segment, stream
        self._parts.append(segment)

    def _end(self) -> None:
        """End the graph that is being captured, if any."""
        segment, self._open = self._open, None
        if segment is None:
            return
        try:
            # A block may have made its own device the current one by now.
            with vram.runtime(segment.device).device(segment.device):
                segment.graph.capture_end()
        finally:
            self._stream.__exit__(None, None, None)


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _current_devices_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """The current device of each kind of `devices` is afterwards as it was."""
    runtimes = {device.type: vram.runtime(device) for device in devices}
    before = {kind: runtime.current_device() for kind, runtime in runtimes.items()}
    try:
        yield
    finally:
        for kind, runtime in runtimes.items():
            runtime.set_device(before[kind])


@functools.lru_cache(maxsize=64)
def _capture_stream(device: torch.device) -> Any:
    """The stream that captures on `device`: one for all captures, for cuBLAS keeps a workspace for each stream.

    It gets the workspace here, so that it is not in the memory of the first graph, which may be freed before others.
    """
    runtime = vram.runtime(device)
    stream = runtime.Stream(device)
    with torch.inference_mode(False), runtime.stream(stream):
        square = torch.zeros(16, 16, device=device)
        torch.mm(square, square)
    return stream


def _memory(tensor: Tensor) -> int:
    """Which memory it lies in: the same for a tensor and its views."""
    return tensor.untyped_storage().data_ptr()


@functools.lru_cache(maxsize=4096)
def _draws(func: Any) -> bool:
    """Whether it may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


@functools.lru_cache(maxsize=4096)
def _depends(func: Any) -> bool:
    """Whether what it gives depends on values in such a way that a GPU is waited for."""
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@functools.lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    """Whether it computes nothing but only looks at its operand's memory in another way."""
    returns = [result.alias_info for result in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """What an operator was given for an argument, or its default; None if it has none of that name."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None


def _indexed(device: torch.device) -> torch.device:
    if device.index is None and device.type not in ("cpu", "meta"):
        return torch.device(device.type, vram.runtime(device).current_device())
    return device
