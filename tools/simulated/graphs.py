"""CUDA graphs of simulated devices: a capture notes operators, a replay runs them again on the same memory.

What a real capture would refuse is refused: the default stream, reading a value back, an operator on another device. A
captured operator has not run: what it would have computed reads as NaN until the first replay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._copy_from)
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Stream:
    """A stream of one device. Simulated devices run everything at once, so it only says that it is not the default."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


class CurrentStream:
    """``torch.sim.stream(s)``: makes a stream and its device the current ones inside ``with``."""

    def __init__(self, stream: Stream, device: Callable[[torch.device], Any]) -> None:
        self._stream = stream
        self._device = device(stream.device)
        self._before: Stream | None = None

    def __enter__(self) -> None:
        self._before = _thread.stream
        self._device.__enter__()
        _thread.stream = self._stream

    def __exit__(self, *error: Any) -> None:
        _thread.stream = self._before
        self._device.__exit__(*error)


@dataclass(frozen=True)
class _Step:
    """One operator of a graph, with its operands and where its results went when it was captured.

    Not the results themselves: torch detaches a new tensor from what else holds it, which it does in no real capture.
    """

    run: Callable[..., Any]
    func: Any
    args: Any
    kwargs: dict[str, Any]
    results: list[torch.Tensor]
    memory: list[Any]


# Devices whose random numbers cannot be drawn: torch takes their generator for one in a capture since one has failed.
stuck: set[torch.device | None] = set()


class CUDAGraph:
    """As torch.cuda.CUDAGraph. Every tensor of a capture lives as long as it: there is no pool that reuses memory."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._device: torch.device | None = None
        self._is_broken = False
        self._made: set[int] = set()  # memory that operators of the capture made
        self._before: dict[
            int, tuple[torch.UntypedStorage, torch.UntypedStorage]
        ] = {}  # other memory, and a copy of it

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """From now on this thread's operators are captured."""
        if _thread.graph is not None:
            raise RuntimeError("This thread captures a graph already.")
        if _thread.stream is None:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self._device = _thread.stream.device
        _thread.graph = self

    def capture_end(self) -> None:
        """The capture is complete."""
        if _thread.graph is not self:
            raise RuntimeError("This graph is not being captured.")
        _thread.graph = None
        if self._is_broken:
            stuck.add(self._device)
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        stuck.discard(self._device)
        for memory, before in self._before.values():
            memory.copy_(before)
        self._before = {}
        for step in self._steps:
            known = {_place(tensor) for tensor in _simulated((step.args, step.kwargs))}
            for raw in step.results:
                if raw.is_floating_point() and _address(raw) not in known:
                    raw.fill_(float("nan"))

    def replay(self) -> None:
        """Run all that was captured again, on the same memory."""
        _thread.is_replaying = True
        try:
            with torch.inference_mode():  # in which tensors of both kinds may be written to
                for step in self._steps:
                    result = step.run(step.func, step.args, dict(step.kwargs))
                    for old, new in zip(step.results, _simulated(result), strict=True):
                        if _address(old) != _place(new):
                            old.copy_(new.raw)
        finally:
            _thread.is_replaying = False

    def reset(self) -> None:
        """Forget what was captured."""
        self._steps = []

    def capture(self, run: Callable[..., Any], func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note one operator.

        Raises:
            RuntimeError: a real capture would not take it in.
        """
        kept = dict(kwargs)  # the backend rewrites a factory's device in place
        try:
            self._refuse(func, args)
        except RuntimeError:
            self._is_broken = True
            raise
        self._keep_what_is_written(func, args, kwargs)
        _thread.graph = None  # what the operator consists of belongs to it
        try:
            result = run(func, args, kwargs)
        finally:
            _thread.graph = self
        known = {_place(tensor) for tensor in _simulated((args, kept))}
        results = _simulated(result)
        if results and not _writes(func) and all(_place(tensor) in known for tensor in results):
            return result  # a view, which launches nothing
        places = {tensor.device for tensor in _simulated((args, kept, result))}
        if places - {self._device}:
            raise RuntimeError(f"{func} on {places} while a graph of {self._device} is captured")
        if any(isinstance(item, (bool, int, float)) or _is_on_host(item) for item in _leaves(result)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} reads a value back")
        self._made.update(_place(tensor) for tensor in results if _place(tensor) not in known)
        self._steps.append(
            _Step(run, func, args, kept, [tensor.raw for tensor in results], [tensor.block for tensor in results])
        )
        return result

    @staticmethod
    def _refuse(func: Any, args: Any) -> None:
        """What a stream that captures cannot do: it would have to wait."""
        refused = "operation not permitted when stream is capturing:"
        if func.overloadpacket in _COPIES and any(_is_on_host(item) for item in _leaves(args)):
            raise RuntimeError(f"{refused} {func} from or to the host")
        if func.overloadpacket in _INDEXING:
            indices = [item for item in _leaves(args[1]) if isinstance(item, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) or index.is_cpu for index in indices):
                raise RuntimeError(f"{refused} {func} with a mask, or with indices on the host")
        elif torch.Tag.dynamic_output_shape in func.tags:
            raise RuntimeError(f"{refused} {func} has to know how many")

    def _keep_what_is_written(self, func: Any, args: Any, kwargs: Any) -> None:
        """A capture leaves alone what was there before."""
        if not _writes(func):
            return
        for tensor in _simulated((args, kwargs)):
            memory = _place(tensor)
            if memory not in self._made and memory not in self._before:
                storage = tensor.raw.untyped_storage()
                self._before[memory] = storage, storage.clone()


class _Thread(threading.local):
    """Streams and captures are a thread's own."""

    stream: Stream | None = None
    graph: CUDAGraph | None = None
    is_replaying = False


_thread = _Thread()


def captured(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(func, args, kwargs)`, the way an operator runs, such that a capture that is under way notes it."""

    def noted(func: Any, args: Any, kwargs: Any) -> Any:
        graph = _thread.graph
        return run(func, args, kwargs) if graph is None else graph.capture(run, func, args, kwargs)

    return noted


def is_capturing() -> bool:
    """Whether this thread captures a graph."""
    return _thread.graph is not None


def is_replaying() -> bool:
    """Whether this thread replays a graph, which takes no memory: results go where those of the capture went."""
    return _thread.is_replaying


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _simulated(value: Any) -> list[Any]:
    return [item for item in _leaves(value) if hasattr(item, "raw")]


def _place(tensor: Any) -> int:
    return _address(tensor.raw)


def _address(raw: torch.Tensor) -> int:
    return raw.untyped_storage().data_ptr()


def _writes(func: Any) -> bool:
    return any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)


def _is_on_host(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.is_cpu
