"""One decode step as CUDA graphs: its operators captured in the order in which they ran, a graph for each run of them
on one device, with copies from device to device between the graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ..devices import runtime as runtime_of
from ..transfers import tensors_in
from .trace import CannotCapture, OpTrace

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A copy from device to device, repeated at each replay. Streams order it behind the graph before, ahead of the one
    after.
    """

    source: Tensor
    target: Tensor


@dataclasses.dataclass(frozen=True)
class Segment:
    """The operators between two transfers: one CUDA graph on one device."""

    device: torch.device
    graph: Any


class CapturedStep:
    """A captured step.

    Args:
        parts: graphs and transfers in their order.
        constants: tensors that the graphs read and nobody else holds.

    Attributes:
        segments, transfers: those among the parts.
        crossing: of each transfer the devices, from and to, and the bytes.
    """

    def __init__(self, parts: list[Segment | Transfer], constants: list[Tensor] | None = None) -> None:
        self._constants = constants or []
        self.segments = tuple(part for part in parts if isinstance(part, Segment))
        self.transfers = tuple(part for part in parts if isinstance(part, Transfer))
        self.crossing = [
            (part.source.device, part.target.device, part.target.numel() * part.target.element_size())
            for part in self.transfers
        ]
        self._launches: list[Callable[[], Any]] = [
            part.graph.replay
            if isinstance(part, Segment)
            else functools.partial(part.target.copy_, part.source, non_blocking=True)
            for part in parts
        ]

    def replay(self) -> None:
        """Run the step again, on what its inputs hold now. Waits for nothing."""
        for launch in self._launches:
            launch()

    def free(self) -> None:
        """Give the graphs' memory back."""
        for segment in self.segments:
            segment.graph.reset()
        self.segments = self.transfers = ()
        self._constants, self._launches, self.crossing = [], [], []


class Capture(OpTrace):  # type: ignore[no-untyped-call]
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
        """Capture what this thread runs within. One capture at a time: others wait, they share streams."""
        with _one_at_a_time, _current_devices_kept(self._pools), without_collections():
            try:
                with self:
                    yield
                self._end()
            except BaseException:
                with contextlib.suppress(Exception):  # a capture that failed says so again when it is ended
                    self._end()
                CapturedStep(self._parts).free()
                raise

    def captured(self, outputs: list[Tensor]) -> CapturedStep:
        """What was captured, but for copies that neither an operator nor the step's caller reads."""
        read = self._read | {_memory(tensor) for tensor in outputs}
        parts = [part for part in self._parts if isinstance(part, Segment) or _memory(part.target) in read]
        return CapturedStep(parts, self._constants)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator in the graph of its device, or between two graphs if it copies from one to the other."""
        if func in _COPIES and (copied := self._transfer(func, args, kwargs)) is not None:
            return copied
        if _is_view(func):
            return func(*args, **kwargs)
        operands = list(tensors_in((args, kwargs)) if kwargs else tensors_in(args))
        devices = {tensor.device for tensor in operands}
        if kwargs and isinstance(kwargs.get("device"), torch.device):
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
        if (
            source.is_cpu
        ):  # a constant, or the traces differ: uploaded once, copied to where it is wanted at each replay
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
        runtime = runtime_of(device)
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
            with runtime_of(segment.device).device(segment.device):
                segment.graph.capture_end()
        except Exception:
            _failed.append(segment.graph)
            free_generator(segment.device)
            raise
        finally:
            self._stream.__exit__(None, None, None)


_one_at_a_time = threading.Lock()
# Graphs whose capture has failed: torch's allocator goes on asking them whether memory is theirs.
_failed: list[Any] = []


def free_generator(device: torch.device) -> None:
    """Have random numbers be drawn on a device again, as sampling does.

    When a capture fails at its end, torch (2.11) does not tell the device's generator, which then refuses whatever is
    drawn outside of a capture. The end of the next one that succeeds tells it.
    """
    with contextlib.suppress(Exception):
        runtime = runtime_of(device)
        with runtime.device(device):
            graph = runtime.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=device)
            graph.capture_end()
            graph.reset()


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage is collected: a CUDA graph among it would be destroyed during a capture, which fails that."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _current_devices_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """The current device of each kind of `devices` is afterwards as it was."""
    runtimes = {device.type: runtime_of(device) for device in devices}
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
    runtime = runtime_of(device)
    stream = runtime.Stream(device)
    with torch.inference_mode(False), runtime.stream(stream):
        square = torch.zeros(16, 16, device=device)
        torch.mm(square, square)
    return stream


def _memory(tensor: Tensor) -> int:
    """Which memory it lies in: the same for a tensor and its views."""
    return tensor.untyped_storage().data_ptr()


@functools.lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    """Whether it computes nothing but only looks at its operand's memory in another way."""
    returns = [result.alias_info for result in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _indexed(device: torch.device) -> torch.device:
    if device.index is None and device.type not in ("cpu", "meta"):
        return torch.device(device.type, runtime_of(device).current_device())
    return device
