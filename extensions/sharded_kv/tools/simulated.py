"""N simulated GPUs on the CPU, with an exact count of what moves between them and of the memory they hold.

A PrivateUse1 backend named "sim", in Python. A tensor on ``sim:1`` is a :class:`SimTensor`: a shell that says it lives
on ``sim:1`` around a CPU tensor that holds the numbers. Every operator runs on the CPU tensors; what a machine with
several GPUs would refuse (operands on two devices, memory that is not there) is refused with the words CUDA uses. So
what several GPUs show about *correctness* and *traffic* can be tested on any computer; what they show about speed
cannot.

What it cannot do raises NotImplementedError with the operator's name. Nothing happens at import: see :func:`start`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import simulated_autocast, simulated_graphs

aten = torch.ops.aten

Pair = tuple[str, str]
DeviceLike = int | str | torch.device | None

# What mem_get_info() and "out of memory" name as a device's size where no capacity is set.
_NOMINAL_CAPACITY = 80 << 30


# ---------------------------------------------------------------------------------------------------------------------
# Public
# ---------------------------------------------------------------------------------------------------------------------


def start(devices: int = 4) -> None:
    """Registers the backend once per process and sets the number of devices.

    A later call only changes the number. Tensors on devices that are gone stay usable.

    Args:
        devices: number of simulated GPUs, at least 1.

    Raises:
        ValueError: for fewer than one device.
        RuntimeError: another PrivateUse1 backend is registered in this process (torch allows one).
    """
    if devices < 1:
        raise ValueError(f"{devices} simulated devices were asked for; there must be at least one.")
    _backend.devices = devices
    if not _backend.registered:
        _register()
        _backend.registered = True


@contextlib.contextmanager
def record() -> Iterator[Traffic]:
    """Counts what happens between devices inside the ``with``, in all threads; may be nested.

    Yields:
        Traffic: readable while the block runs and after it has ended, when it stays as it was at the end.
    """
    traffic = Traffic(_backend.counts)
    try:
        yield traffic
    finally:
        traffic._freeze()


def allocated(index: int) -> int:
    """Bytes that tensors on ``sim:<index>`` hold now. Views cost nothing; nothing is rounded."""
    return _backend.memory.used(index)


def peak(index: int) -> int:
    """The most bytes ``sim:<index>`` held since the start or the last :func:`reset_peak`.

    What an operator needs inside itself is not in it, only what it returns.
    """
    return _backend.memory.most(index)


def reset_peak(index: int | None = None) -> None:
    """Sets the peak of a device, or of all, to what it holds now."""
    _backend.memory.reset_most(index)


def set_capacity(index: int, bytes: int | None) -> None:
    """Sets how many bytes ``sim:<index>`` can hold; None (the default) for no limit.

    An allocation past it raises ``torch.OutOfMemoryError`` and changes nothing.
    """
    _backend.memory.capacity[index] = bytes


@dataclass(frozen=True)
class _Counts:
    """What has been counted since the process started; a difference of two is what happened in between."""

    bytes: Mapping[Pair, int]
    copies: Mapping[Pair, int]
    reads: int
    switches: int


class Traffic:
    """What moved between devices during a :func:`record` block.

    A copy counts in the dtype it crosses in: the source's, except from the CPU, where it is the target's (CUDA converts
    before it sends to a GPU and after it has fetched from one, ``copy_kernel_cuda`` in ATen/native/cuda/Copy.cu).
    """

    def __init__(self, counter: _Counter) -> None:
        self._counter = counter
        self._before = counter.read()
        self._end: _Counts | None = None

    def _freeze(self) -> None:
        self._end = self._counter.read()

    def _now(self) -> _Counts:
        return self._end or self._counter.read()

    @property
    def bytes(self) -> dict[Pair, int]:
        """Bytes per (from, to), e.g. ``{("sim:0", "sim:1"): 8192, ("cpu", "sim:0"): 64}``; no pair has none."""
        return _difference(self._now().bytes, self._before.bytes)

    @property
    def copies(self) -> dict[Pair, int]:
        """Copies per (from, to). A tensor without elements crosses without one, as in CUDA."""
        return _difference(self._now().copies, self._before.copies)

    @property
    def total_bytes(self) -> int:
        """Bytes between two different simulated GPUs."""
        return _total(self.bytes, host=False)

    @property
    def total_copies(self) -> int:
        """Copies between two different simulated GPUs."""
        return _total(self.copies, host=False)

    @property
    def host_bytes(self) -> int:
        """Bytes between the CPU and simulated GPUs, both ways."""
        return _total(self.bytes, host=True)

    @property
    def host_copies(self) -> int:
        """Copies between the CPU and simulated GPUs, both ways."""
        return _total(self.copies, host=True)

    @property
    def reads(self) -> int:
        """Values that Python read off a device: ``.item()``, ``bool(tensor)``, ``torch.equal``. No copies."""
        return self._now().reads - self._before.reads

    @property
    def switches(self) -> int:
        """Changes of a thread's current device; setting the one that is current is none."""
        return self._now().switches - self._before.switches

    def __repr__(self) -> str:
        return f"Traffic(bytes={self.bytes}, copies={self.copies}, reads={self.reads}, switches={self.switches})"


def _difference(now: Mapping[Pair, int], before: Mapping[Pair, int]) -> dict[Pair, int]:
    return {pair: n - before.get(pair, 0) for pair, n in now.items() if n != before.get(pair, 0)}


def _total(per_pair: Mapping[Pair, int], *, host: bool) -> int:
    return sum(n for pair, n in per_pair.items() if ("cpu" in pair) is host)


# ---------------------------------------------------------------------------------------------------------------------
# State: counters, memory, random numbers, the current device
# ---------------------------------------------------------------------------------------------------------------------


class _Counter:
    """Counts copies, reads and switches from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: collections.Counter[Pair] = collections.Counter()
        self._copies: collections.Counter[Pair] = collections.Counter()
        self._reads = 0
        self._switches = 0

    def copy(self, source: str, target: str, nbytes: int) -> None:
        with self._lock:
            self._bytes[source, target] += nbytes
            self._copies[source, target] += 1

    def one_read(self) -> None:
        with self._lock:
            self._reads += 1

    def one_switch(self) -> None:
        with self._lock:
            self._switches += 1

    def read(self) -> _Counts:
        with self._lock:
            return _Counts(dict(self._bytes), dict(self._copies), self._reads, self._switches)


class _Block:
    """One allocation on a device: what the tensors on one storage share. It is free when the last of them dies."""

    __slots__ = ("_freed", "index", "nbytes", "storage_id")

    def __init__(self, index: int, nbytes: int, storage_id: int, freed: collections.deque[tuple[int, int]]) -> None:
        self.index = index
        self.nbytes = nbytes
        self.storage_id = storage_id
        self._freed = freed

    def __del__(self) -> None:
        # The garbage collector may run this anywhere, also where this thread holds the memory's lock: leave a note.
        self._freed.append((self.index, self.nbytes))


class _Memory:
    """Bytes in use per device, now and at most."""

    def __init__(self) -> None:
        self.capacity: dict[int, int | None] = {}
        self._lock = threading.Lock()
        self._used: dict[int, int] = {}
        self._most: dict[int, int] = {}
        self._freed: collections.deque[tuple[int, int]] = collections.deque()

    def allocate(self, index: int, storage: torch.UntypedStorage) -> _Block:
        """A block for a CPU storage that stands for memory of a device.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        nbytes = storage.nbytes()
        self._take(index, nbytes)
        return _Block(index, nbytes, storage._cdata, self._freed)

    def check(self, index: int, nbytes: int) -> None:
        """Raises torch.OutOfMemoryError if so many bytes would not fit."""
        self._take(index, nbytes, keep=False)

    def grow(self, block: _Block, nbytes: int) -> None:
        """Notes that a block's storage has another size now."""
        self._take(block.index, nbytes - block.nbytes)
        block.nbytes = nbytes

    def used(self, index: int) -> int:
        with self._lock:
            self._settle()
            return self._used.get(index, 0)

    def most(self, index: int) -> int:
        with self._lock:
            return self._most.get(index, 0)

    def reset_most(self, index: int | None) -> None:
        with self._lock:
            self._settle()
            for device in list(self._most) if index is None else [index]:
                self._most[device] = self._used.get(device, 0)

    def free(self, index: int) -> int:
        """Bytes left on a device; of the nominal capacity where none is set."""
        return max(0, self.total(index) - self.used(index))

    def total(self, index: int) -> int:
        capacity = self.capacity.get(index)
        return _NOMINAL_CAPACITY if capacity is None else capacity

    def _take(self, index: int, nbytes: int, *, keep: bool = True) -> None:
        with self._lock:
            if self._freed:
                self._settle()
            before = self._used.get(index, 0)
            after = before + nbytes
            capacity = self.capacity.get(index)
            if capacity is not None and after > max(before, capacity) and not simulated_graphs.is_replaying():
                raise torch.OutOfMemoryError(
                    f"sim:{index} out of memory. Tried to allocate {_size(nbytes)}. GPU {index} has a total capacity "
                    f"of {_size(capacity)} of which {_size(max(0, capacity - before))} is free."
                )
            if keep:
                self._used[index] = after
                if after > self._most.get(index, 0) and not simulated_graphs.is_replaying():
                    self._most[index] = after

    def _settle(self) -> None:
        while self._freed:
            index, nbytes = self._freed.popleft()
            self._used[index] -= nbytes


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


class _RandomNumbers:
    """A generator per device, and which other generators are simulated devices'.

    torch cannot make a generator for a backend written in Python (torch/csrc/acc/Module.cpp, 2.13: getNewGenerator "not
    supported from python yet"), so a device's is a CPU generator known by its address. One consequence is useful: with
    the same seed a simulated device draws the same numbers as the CPU.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._defaults: dict[int, torch.Generator] = {}
        self._ours: set[int] = set()
        self._seed = torch.default_generator.initial_seed()

    def default(self, index: int) -> torch.Generator:
        with self._lock:
            if index not in self._defaults:
                self._defaults[index] = torch._C.Generator().manual_seed(self._seed)
            return self._defaults[index]

    def seed_all(self, seed: int) -> None:
        with self._lock:
            self._seed = seed
            for generator in self._defaults.values():
                generator.manual_seed(seed)

    def own(self, generator: torch.Generator) -> None:
        self._ours.add(_address(generator))

    def disown(self, address: int) -> None:
        self._ours.discard(address)

    def for_op(self, given: torch.Generator | None, index: int) -> torch.Generator:
        """The generator an operator on a device draws from.

        Raises:
            RuntimeError: the one it was given is no simulated device's.
        """
        if given is None:
            return self.default(index)
        if _address(given) not in self._ours:
            raise RuntimeError(f"Expected a 'sim' device type for generator but found '{given.device.type}'")
        return given

    def lend_to_cpu(self, index: int, draw: Callable[[], Any]) -> Any:
        """Runs an operator that takes no generator and would draw from the CPU's, with a device's numbers."""
        generator, cpu = self.default(index), torch.default_generator
        with self._lock:
            before = cpu.get_state()
            cpu.set_state(generator.get_state())
            try:
                return draw()
            finally:
                generator.set_state(cpu.get_state())
                cpu.set_state(before)


def _address(generator: torch.Generator) -> int:
    """What stays the same of a generator when torch hands it on: operators get another Python object."""
    return cast(Any, generator)._cdata


class _CurrentDevice(threading.local):
    """The calling thread's current device: 0 in a new thread, as in CUDA."""

    def __init__(self) -> None:
        self.index = 0
        self.mode = _BareDevices()

    def set(self, index: int) -> None:
        if index == self.index:
            return
        if self.index == 0:
            self.mode.install()
        elif index == 0:
            self.mode.remove()
        self.index = index
        _backend.counts.one_switch()


class _BareDevices(TorchFunctionMode):
    """Gives "sim" without an index the current device's.

    C++ code of torch asks the device guard before an operator gets here, and the guard's Python version always answers
    0 (torch/csrc/acc/Module.cpp, 2.13, getDevice). So while another device is current in a thread, the thread's calls
    of torch go through this mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            args = [_indexed(value) for value in args]
        if "device" in kwargs and func is not torch.device:
            kwargs = {**kwargs, "device": _indexed(kwargs["device"])}
        return func(*args, **kwargs)

    def install(self) -> None:
        # At the bottom of the stack, like torch's own device mode: other modes leave in their own order.
        self._restack([*self._stack(), self])

    def remove(self) -> None:
        self._restack([mode for mode in self._stack() if mode is not self])

    @staticmethod
    def _stack() -> list[Any]:
        """All modes of this thread, taken off, the last entered first."""
        return [torch.overrides._pop_mode() for _ in range(torch.overrides._len_torch_function_stack())]

    @staticmethod
    def _restack(modes: list[Any]) -> None:
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)


def _indexed(value: Any) -> Any:
    if isinstance(value, torch.device):
        bare = value.type == "sim" and value.index is None
    else:
        bare = isinstance(value, str) and value == "sim"
    return _device(_backend.current.index) if bare else value


class _Backward(threading.local):
    """Runs the autograd engine with a backend in Python, which it is not made for (torch 2.13).

    It has a thread for device 0 only, because the guard's deviceCount() is always 1: so backward runs in the caller's
    thread. And a Python error from an operator would end the process: while it unwinds, the engine restores its stream,
    for which the guard calls Python once more, which fails, in a function that must not (exchangeStream in
    torch/csrc/acc/Module.cpp). So inside backward an operator keeps its error and returns what torch rejects with a C++
    error; that one unwinds well, and makes way for the true one at the end.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._error: Exception | None = None

    def shielded(self, run: Callable[..., Any], func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return run(func, args, kwargs)
        except Exception as error:
            if not self._depth:
                raise
            self._error = error
            return _Failed()

    def wrapped(self, engine: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(engine)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                with torch.autograd.set_multithreading_enabled(False):
                    return engine(*args, **kwargs)
            except RuntimeError as error:
                if self._error is None or _Failed.__name__ not in str(error):
                    raise
                raise self._error from None
            finally:
                self._depth -= 1
                self._error = None

        return run


class _Failed:
    """No tensor: what an operator that has failed inside backward returns."""


class _Backend:
    """The one simulated backend of this process."""

    def __init__(self) -> None:
        self.registered = False
        self.devices = 0
        self.counts = _Counter()
        self.memory = _Memory()
        self.random = _RandomNumbers()
        self.current = _CurrentDevice()
        self.backward = _Backward()
        self.libraries: list[torch.library.Library] = []  # a registration lasts as long as its Library object

    def index(self, device: DeviceLike) -> int:
        """The index of a simulated device.

        Raises:
            ValueError: it is no simulated device.
            RuntimeError: there is none with this index, in CUDA's words.
        """
        if isinstance(device, str):
            device = torch.device(device)
        if isinstance(device, torch.device):
            if device.type != "sim":
                raise ValueError(f"Expected a simulated device, but got: {device}")
            device = device.index
        if device is None:
            return self.current.index
        if not 0 <= device < self.devices:
            raise RuntimeError(
                f"sim error: invalid device ordinal. sim:{device} was asked for; there are {self.devices} devices."
            )
        return device


@functools.cache
def _device(index: int) -> torch.device:
    return torch.device("sim", index)


@functools.cache
def _name(index: int) -> str:
    return f"sim:{index}"


# ---------------------------------------------------------------------------------------------------------------------
# The tensor
# ---------------------------------------------------------------------------------------------------------------------


class SimTensor(torch.Tensor):
    """A tensor on a simulated device: a shell without memory around a CPU tensor.

    Attributes:
        raw: the CPU tensor with the numbers. Never has ``requires_grad``: autograd works on the shell.
        device_index: the device's index.
        block: the allocation it lies in.
    """

    raw: torch.Tensor
    device_index: int
    block: _Block
    __slots__ = ("block", "device_index", "raw")
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = True, **_: Any) -> torch.Tensor:  # type: ignore[misc]
        """A parameter: accelerate's set_module_tensor_to_device makes a new one by calling the class of the old."""
        return torch.nn.Parameter(data, requires_grad=requires_grad)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _backend.backward.shielded(_run, func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = repr(self.raw)[: -len(")")]
        gradient = ", requires_grad=True" if self.requires_grad else ""
        return f"{text}, device='{_name(self.device_index)}'{gradient})"

    def data_ptr(self) -> int:
        """The address of the numbers: equal for tensors on the same memory, as accelerate and transformers expect."""
        return self.raw.data_ptr()

    def untyped_storage(self) -> _Storage:  # type: ignore[override]
        return _Storage(self)

    def storage(self) -> Any:
        raise NotImplementedError("Tensor.storage() is not there for simulated devices; use untyped_storage().")

    _typed_storage = storage

    @property
    def data(self) -> torch.Tensor:
        return cast(torch.Tensor, torch._C.TensorBase.data.__get__(self))  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        if isinstance(new, SimTensor):
            self.raw, self.device_index, self.block = new.raw, new.device_index, new.block

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
    ) -> torch.Tensor:
        # torch asks the device guard for the index, see _BareDevices.
        place = self.device if device is None else device
        return torch.tensor(data, dtype=dtype or self.dtype, device=place, requires_grad=requires_grad)

    def new(self, *args: Any, device: Any = None) -> torch.Tensor:  # type: ignore[override]
        sizes = args[0] if len(args) == 1 and isinstance(args[0], torch.Size) else args
        if all(isinstance(size, int) for size in sizes):
            return self.new_empty(tuple(sizes), device=device)
        if len(args) == 1 and isinstance(args[0], (list, tuple)):
            return self.new_tensor(args[0], device=device)
        raise NotImplementedError("Tensor.new() takes sizes or a list of numbers on simulated devices")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("DLPack is not there for simulated devices; use cpu().")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {_name(self.device_index)} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            return cast(torch.Tensor, memo[id(self)])
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol. "
                "Detach this one first."
            )
        with torch.no_grad():
            clone = _deepcopy_data(self, memo)
        memo[id(self)] = clone
        clone.__dict__ = copy.deepcopy(self.__dict__, memo)  # also what makes it a parameter
        clone.requires_grad_(self.requires_grad)
        clone.grad = copy.deepcopy(self.grad, memo)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, torch.nn.Parameter):
            data = self.detach()
            return torch._utils._rebuild_parameter, (data, self.requires_grad, collections.OrderedDict())
        # The way torch saves devices without storages; it knows map_location and weights_only.
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (
            self.detach().cpu(),
            self.dtype,
            _name(self.device_index),
            self.requires_grad,
        )


@functools.cache
def _subclass_on_devices(cls: Any) -> Any:
    """`cls`, a class of parameters (of bitsandbytes, say), for parameters on simulated devices."""

    def new(kind: Any, data: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # A copy begins without data, which is then set: that cannot be on the CPU.
        return cls.__new__(kind, torch.empty(0, device="sim") if data is None else data, *args, **kwargs)

    members = {"__slots__": (), "__module__": cls.__module__, "__new__": new}
    return type(cls.__name__, (cls, SimTensor), members)


def _make_subclass(cls: Any, data: torch.Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    """`Tensor._make_subclass` for simulated tensors as well: torch's own takes none that is of a subclass already."""
    if not isinstance(data, SimTensor):
        return _make_subclass_in_torch(cls, data, requires_grad, **kwargs)
    kind = cls if issubclass(cls, SimTensor) else _subclass_on_devices(cls)
    return _shell(data.raw, data.device_index, data.block, kind).requires_grad_(requires_grad)


_make_subclass_in_torch = torch.Tensor._make_subclass


class _Storage:
    """What other code asks a storage for: where it is and how large. Its numbers are reached through tensors only."""

    def __init__(self, tensor: SimTensor) -> None:
        self._storage = tensor.raw.untyped_storage()
        self.device = _device(tensor.device_index)

    def data_ptr(self) -> int:
        return self._storage.data_ptr()

    def nbytes(self) -> int:
        return self._storage.nbytes()

    size = nbytes
    __len__ = nbytes


def _deepcopy_data(tensor: SimTensor, memo: dict[int, Any]) -> SimTensor:
    """A copy of a tensor's numbers; views of one storage stay views of one storage, as in torch's own deepcopy."""
    key = id(tensor.block)
    if key not in memo:
        storage = tensor.raw.untyped_storage().clone()
        block = _backend.memory.allocate(tensor.device_index, storage)
        memo[key] = storage, block, tensor.block  # the last: no other object takes its id meanwhile
    storage, block, _ = memo[key]
    raw = torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return _shell(raw, tensor.device_index, block)


def _shell(raw: torch.Tensor, index: int, block: _Block, kind: type[SimTensor] = SimTensor) -> SimTensor:
    tensor = torch.Tensor._make_wrapper_subclass(
        kind, raw.shape, raw.stride(), raw.storage_offset(), None, raw.dtype, torch.strided, _device(index)
    )
    tensor.raw = raw
    tensor.device_index = index
    tensor.block = block
    return tensor


def _outside_inference_mode(raw: torch.Tensor, index: int, block: _Block) -> SimTensor:
    """A view of a tensor from outside inference mode is one from outside, too."""
    with torch.inference_mode(False):
        return _shell(raw, index, block)


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """What is known about an operator before it runs, read once from its schema.

    Attributes:
        func: the operator.
        special: runs it instead of the general way; None for most.
        scalars: CPU tensors without dimensions may stand beside tensors on a device.
        generator: position of its generator argument; -1 without one.
        draws: it draws random numbers without taking a generator.
        writes: names and positions of the arguments it writes to.
        reshapes: it may change their shape and the size of their storage.
    """

    func: Any
    special: Callable[[_Op, Any, Any], Any] | None
    scalars: bool
    generator: int
    draws: bool
    writes: tuple[tuple[str, int], ...]
    reshapes: bool


class _Call:
    """One operator call: its operands, which lie on one device, and its results.

    Args:
        op: the operator.
        index: the device's index where no operand tells it.
    """

    __slots__ = ("device", "index", "op", "operands")

    def __init__(self, op: _Op, index: int | None = None) -> None:
        self.op = op
        self.device: torch.device | None = None
        self.index = index
        self.operands: list[SimTensor] = []

    def unwrap(self, value: Any) -> Any:
        """An argument with CPU tensors in the place of simulated ones.

        Raises:
            RuntimeError: it lies on another device than those before it.
        """
        kind = type(value)
        if kind is SimTensor or isinstance(value, SimTensor):
            if value.device_index != self.index or self.device is None:
                self.meet(_device(value.device_index))
                self.index = value.device_index
            self.operands.append(value)
            return value.raw
        if kind in _PLAIN:
            return value
        if isinstance(value, (list, tuple)):
            return [self.unwrap(item) for item in value]
        if isinstance(value, torch.Tensor) and not (self.op.scalars and value.dim() == 0 and value.is_cpu):
            self.meet(value.device)
        return value

    def wrap(self, result: Any) -> Any:
        """A result with simulated tensors in the place of CPU ones.

        Raises:
            torch.OutOfMemoryError: what is new in it does not fit.
            NotImplementedError: a tensor that is not strided.
        """
        if isinstance(result, torch.Tensor):
            for operand in self.operands:
                if operand.raw is result:
                    return operand
            return self._shell(result)
        if isinstance(result, (list, tuple)):
            self._check([item for item in result if isinstance(item, torch.Tensor)])
            return type(result)([self.wrap(item) for item in result])
        return result

    def _shell(self, raw: torch.Tensor) -> SimTensor:
        if raw.layout is not torch.strided or raw.is_quantized:
            raise NotImplementedError(
                f"{self.op.func}: a result that is no plain strided tensor, on a simulated device"
            )
        index, storage = cast(int, self.index), raw.untyped_storage()
        block = self._block(storage)
        if block is None:
            shell = _shell(raw, index, _backend.memory.allocate(index, storage))
            self.operands.append(shell)  # another result may be a view of it
            return shell
        if torch.is_inference_mode_enabled() and not all(operand.is_inference() for operand in self.operands):
            return _outside_inference_mode(raw, index, block)
        return _shell(raw, index, block)

    def _block(self, storage: torch.UntypedStorage) -> _Block | None:
        """The allocation that an operand has on this storage, of which a result is a view then."""
        address = storage._cdata
        for operand in self.operands:
            if operand.block.storage_id == address:
                return operand.block
        return None

    def _check(self, raws: Sequence[torch.Tensor]) -> None:
        """All results of an operator fit, or none is made."""
        storages = [raw.untyped_storage() for raw in raws]
        new = {storage._cdata: storage.nbytes() for storage in storages if self._block(storage) is None}
        if new:
            _backend.memory.check(cast(int, self.index), sum(new.values()))

    def meet(self, device: torch.device) -> None:
        """Notes where an operand lies; RuntimeError, in CUDA's words, if others lie elsewhere."""
        if self.device is None:
            self.device = device
        elif self.device != device:
            if "_foreach_" in str(self.op.func):
                raise NotImplementedError(f"{self.op.func}: lists over several simulated devices")
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.device} and {device}! (when checking the arguments of {self.op.func})"
            )


_PLAIN = frozenset(
    {
        int,
        float,
        bool,
        str,
        type(None),
        complex,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch._C.Generator,
    }
)


@simulated_graphs.captured
def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operator that has at least one simulated tensor among its operands."""
    op = _facts(func)
    return _compute(op, args, kwargs) if op.special is None else op.special(op, args, kwargs)


def _compute(op: _Op, args: Any, kwargs: Any) -> Any:
    """The general way: the operator on the CPU tensors, its results back in shells."""
    call = _Call(op)
    raw_args = [call.unwrap(value) for value in args]
    raw_kwargs = {name: call.unwrap(value) for name, value in kwargs.items()} if kwargs else {}
    if raw_kwargs.get("device") is not None and not _to_cpu(call, raw_kwargs):
        return op.func(*raw_args, **raw_kwargs)  # a new tensor on the CPU or the meta device, shaped like this one
    written = [args[position] if position < len(args) else kwargs.get(name) for name, position in op.writes]
    for value in written:
        if not isinstance(value, SimTensor) and isinstance(value, torch.Tensor):
            call.meet(value.device)
    result = _draw(op, cast(int, call.index), raw_args, raw_kwargs)
    if op.reshapes:
        for value in written:
            _follow(value)
    return call.wrap(result)


def _view(op: _Op, args: Any, kwargs: Any) -> Any:
    """A view of the only operand: about half of what a model runs, so it goes a short way."""
    tensor = args[0]
    raw = op.func(tensor.raw, *args[1:], **kwargs)
    if raw is tensor.raw:
        return tensor
    if torch.is_inference_mode_enabled() and not tensor.is_inference():
        return _outside_inference_mode(raw, tensor.device_index, tensor.block)
    return _shell(raw, tensor.device_index, tensor.block)


def _to_cpu(call: _Call, kwargs: dict[str, Any]) -> bool:
    """Points a factory's ``device`` at the CPU, and its results at the device it named.

    Returns:
        False, and nothing has changed, where the device is no simulated one.
    """
    device = kwargs["device"]
    if device.type != "sim":
        return False
    call.index = _backend.index(device)
    kwargs["device"] = _CPU
    if kwargs.pop("pin_memory", None):
        raise RuntimeError(f"Only dense CPU tensors can be pinned, not one on {device}")
    return True


def _draw(op: _Op, index: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Runs an operator, with the device's random numbers if it needs any."""
    if op.generator >= 0:
        if op.generator < len(args):
            args[op.generator] = _backend.random.for_op(args[op.generator], index)
        else:
            kwargs["generator"] = _backend.random.for_op(kwargs.get("generator"), index)
    elif op.draws:
        return _backend.random.lend_to_cpu(index, lambda: op.func(*args, **kwargs))
    return op.func(*args, **kwargs)


def _follow(tensor: Any) -> None:
    """Brings a shell up to date after its CPU tensor may have taken another shape, or its storage another size.

    Raises:
        torch.OutOfMemoryError: its storage has grown past the device's capacity; it is as before then.
    """
    if isinstance(tensor, (list, tuple)):
        for item in tensor:
            _follow(item)
    if not isinstance(tensor, SimTensor):
        return
    raw, block = tensor.raw, tensor.block
    storage = raw.untyped_storage()
    if storage.nbytes() != block.nbytes:
        try:
            _backend.memory.grow(block, storage.nbytes())
        except torch.OutOfMemoryError:
            raw.as_strided_(tensor.shape, tensor.stride(), tensor.storage_offset())
            storage.resize_(block.nbytes)
            raise
    tensor.data = _shell(raw, tensor.device_index, block)


def _facts(func: Any) -> _Op:
    op = _ops.get(func)
    if op is None:
        op = _ops[func] = _describe(func)
    return op


def _describe(func: Any) -> _Op:
    """Reads an operator's facts from its schema."""
    arguments = func._schema.arguments
    names = [argument.name for argument in arguments]
    generator = names.index("generator") if "generator" in names else -1
    written = [
        i for i, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _Op(
        func=func,
        special=_SPECIAL.get(func.overloadpacket)
        or (_decompose if _is_composite(func) else _view if _is_view(func) else None),
        scalars=torch.Tag.pointwise in func.tags or func.overloadpacket in _TAKE_SCALARS or "_foreach_" in str(func),
        generator=generator,
        draws=generator < 0 and torch.Tag.nondeterministic_seeded in func.tags,
        writes=tuple((names[i], i) for i in written),
        reshapes=torch.Tag.inplace_view in func.tags or any(arguments[i].kwarg_only for i in written),
    )


def _is_composite(func: Any) -> bool:
    # They arrive whole in inference mode only. Those that are safe to run whole stay whole, because that is faster.
    return func.overloadpacket not in _WHOLE and func._can_decompose()


def _is_view(func: Any) -> bool:
    """Whether it takes one tensor, beside numbers, and returns nothing but a view of it."""
    kinds = [str(argument.type) for argument in func._schema.arguments]
    takes_one = kinds[:1] == ["Tensor"] and not any("Tensor" in kind for kind in kinds[1:])
    returns_one = [str(result.type) for result in func._schema.returns] == ["Tensor"]
    return takes_one and returns_one and (func.is_view or func.overloadpacket is aten._unsafe_view)


def _decompose(op: _Op, args: Any, kwargs: Any) -> Any:
    return op.func.decompose(*args, **kwargs)


# Between devices ----------------------------------------------------------------------------------------------------


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.raw if isinstance(tensor, SimTensor) else tensor


def _count_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Counts a copy that has been made; see Traffic for the dtype it counts in."""
    if source.device == target.device or source.is_meta or target.is_meta or not target.numel():
        return
    width = target.element_size() if source.is_cpu else source.element_size()
    _backend.counts.copy(str(source.device), str(target.device), target.numel() * width)


def _to_copy(op: _Op, args: Any, kwargs: Any) -> Any:
    source = args[0]
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    device = kwargs.get("device") or source.device
    if device.type == "sim":
        target = _Call(op, _backend.index(device)).wrap(op.func(source.raw, **options))
    else:
        target = op.func(source.raw, device=device, **options)
    _count_copy(source, target)
    return target


def _copy_into(op: _Op, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    _raw(target).copy_(_raw(source))
    _count_copy(source, target)
    return target


def _copy_from(op: _Op, args: Any, kwargs: Any) -> Any:
    return _copy_into(op, (args[1], args[0]), kwargs)


def _read(op: _Op, args: Any, kwargs: Any) -> Any:
    result = _compute(op, args, kwargs)
    _backend.counts.one_read()
    return result


def _index(op: _Op, args: Any, kwargs: Any) -> Any:
    """index and index_put: CUDA also takes indices from the CPU and scalar values from anywhere, and copies them."""
    target, indices, *rest = args
    indices = [_index_on(target.device, index) for index in indices]
    return _compute(op, (target, indices, *[_brought(value, target.device) for value in rest]), kwargs)


def _index_on(device: torch.device, index: torch.Tensor | None) -> torch.Tensor | None:
    if index is None or index.device == device:
        return index
    if not index.is_cpu:
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({device})")
    if index.dtype not in (torch.bool, torch.uint8):
        return index.to(device)
    index.nonzero().to(device)  # to count what CUDA sends for a mask: expandTensors in ATen/native/IndexingUtils.h
    storage = index.untyped_storage()
    return _shell(index, device.index, _backend.memory.allocate(device.index, storage))


def _where(op: _Op, args: Any, kwargs: Any) -> Any:
    device = next(value.device for value in args if isinstance(value, SimTensor))
    return _compute(op, [_brought(value, device) for value in args], kwargs)


def _brought(value: Any, device: torch.device) -> Any:
    """An operand that CUDA copies to the others' device if it has no dimensions; a number in Python stays one."""
    moves = isinstance(value, torch.Tensor) and value.dim() == 0 and value.device != device
    return value.to(device) if moves else value


def _masked_fill(op: _Op, args: Any, kwargs: Any) -> Any:
    tensor, mask, value = args
    if isinstance(value, SimTensor) and isinstance(tensor, SimTensor) and value.dim() == 0:
        return _compute(op, (tensor, mask, _host_scalar(value)), kwargs)
    return _compute(op, args, kwargs)


def _fill(op: _Op, args: Any, kwargs: Any) -> Any:
    tensor, value = args
    if isinstance(value, SimTensor) and value.dim() == 0 and value.device != tensor.device:
        return op.func(tensor, _host_scalar(value))
    return _compute(op, args, kwargs)


def _host_scalar(value: SimTensor) -> torch.Tensor:
    _backend.counts.one_read()
    return value.raw


# Other special cases ------------------------------------------------------------------------------------------------


def _histc(op: _Op, args: Any, kwargs: Any) -> Any:
    # Mixture-of-experts models count tokens per expert with an integer histc, which exists on GPUs only.
    tensor, *rest = args
    if tensor.is_floating_point():
        return _compute(op, args, kwargs)
    call = _Call(op)
    return call.wrap(op.func(call.unwrap(tensor).double(), *rest, **kwargs).to(tensor.dtype))


def _linear(op: _Op, args: Any, kwargs: Any) -> Any:
    tensor, weight, bias = [*args, kwargs.get("bias")][:3]
    if tensor.is_contiguous() or not weight.requires_grad:
        return _compute(op, args, kwargs)
    # As of a tensor without gaps, torch makes one matrix of all rows where the weight wants a gradient (should_fold in
    # ATen/native/LinearAlgebra.cpp), which the CPU tensors do not show.
    product = op.func(tensor.contiguous(), weight)
    return product if bias is None else product.add_(bias)


def _attention(op: _Op, args: Any, kwargs: Any) -> Any:
    # To the same bits as where it is taken apart. The fused kernel that CPU tensors would get rounds otherwise in 16
    # bit, and otherwise again where keys lie in a buffer with room to spare: enough to turn a near tie of two tokens.
    given = dict(zip(_ATTENTION_OPERANDS, args, strict=False)) | kwargs
    query, mask = given["query"], given.get("attn_mask")
    is_usual = query.dtype is given["key"].dtype is given["value"].dtype and not given.get("dropout_p")
    if not is_usual or (mask is not None and mask.dtype not in (torch.bool, query.dtype)):
        return _decompose(op, args, kwargs)
    call = _Call(op)
    operands = {name: call.unwrap(value) for name, value in given.items()}
    if mask is not None and mask.dtype is torch.bool:
        operands["attn_mask"] = torch.where(operands["attn_mask"], 0.0, -torch.inf)
    return call.wrap(aten._scaled_dot_product_attention_math.default(**operands)[0])


def _nothing(op: _Op, args: Any, kwargs: Any) -> Any:
    return None


def _unchanged(op: _Op, args: Any, kwargs: Any) -> Any:
    return args[0]


def _false(op: _Op, args: Any, kwargs: Any) -> Any:
    return False


def _cannot(op: _Op, args: Any, kwargs: Any) -> Any:
    raise NotImplementedError(f"{op.func} is not there for simulated devices")


_CPU = torch.device("cpu")
_ATTENTION_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # by position
_ops: dict[Any, _Op] = {}

_SPECIAL: dict[Any, Callable[[_Op, Any, Any], Any]] = {
    aten._to_copy: _to_copy,
    aten.copy_: _copy_into,
    aten._copy_from: _copy_from,
    aten._local_scalar_dense: _read,
    aten.equal: _read,
    aten.allclose: _read,
    aten.index: _index,
    aten._unsafe_index: _index,
    aten.index_put: _index,
    aten.index_put_: _index,
    aten._index_put_impl_: _index,
    aten._unsafe_index_put: _index,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.masked_fill_: _masked_fill,
    aten.fill_: _fill,
    aten.histc: _histc,
    aten.linear: _linear,
    aten.scaled_dot_product_attention: _attention,
    aten.record_stream: _nothing,
    aten.detach_: _unchanged,
    aten.is_pinned: _false,
    aten._conj: _cannot,  # a shell does not show that its numbers are to be read conjugated or negated
    aten._neg_view: _cannot,
    aten.set_: _cannot,
    aten.set: _cannot,
    aten._copy_from_and_resize: _cannot,
    aten._pin_memory: _cannot,
}

# Composite operators that compute nothing but from their operands: no device, no random number, no read hides in them.
# They arrive whole in inference mode, and the largest ones of a model, which _register names, without gradients, too.
_WHOLE = frozenset({aten.linear, aten.matmul, aten.reshape, aten.contiguous, aten.scaled_dot_product_attention})

# Operators without the pointwise tag that take a CPU tensor without dimensions beside tensors on a GPU.
_TAKE_SCALARS = frozenset({aten.masked_fill, aten.masked_fill_, aten.fill_})

# Factories that torch would otherwise build out of several operators; all others work too, by torch's own recipes.
_FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "zeros",
    "ones",
    "full",
    "scalar_tensor",
    "arange",
    "arange.start",
    "arange.start_step",
)


@simulated_graphs.captured
def _factory(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operator without tensors among its operands: it makes a new one."""
    op = _facts(func)
    if kwargs.get("device") is None:
        raise NotImplementedError(f"{func} without a tensor or a device, on a simulated device")
    call = _Call(op)
    _to_cpu(call, kwargs)
    return call.wrap(_draw(op, cast(int, call.index), list(args), kwargs))


def _kernel(run: Callable[..., Any], func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _backend.backward.shielded(run, func, args, kwargs)


def _kept_whole(func: Any) -> Callable[..., Any]:
    """A composite operator in front of autograd, which else takes it apart where no gradient is wanted either."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return func.decompose(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return func(*args, **kwargs)

    return run


def _fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _backend.backward.shielded(_factory, func, args, kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# What torch asks a backend for
# ---------------------------------------------------------------------------------------------------------------------


class _Device:
    """``torch.sim.device(d)``: makes a device the current one and puts the one before back; None changes nothing."""

    def __init__(self, device: DeviceLike) -> None:
        self._index = None if device is None else _backend.index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = _backend.current.index
        if self._index is not None:
            _backend.current.set(self._index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _backend.current.set(self._before)


class _Module:
    """``torch.sim``, the module that generic code gets from ``torch.get_device_module``."""

    device = _Device
    CUDAGraph = simulated_graphs.CUDAGraph
    Stream = simulated_graphs.Stream

    def stream(self, stream: simulated_graphs.Stream) -> simulated_graphs.CurrentStream:
        return simulated_graphs.CurrentStream(stream, _Device)

    def graph_pool_handle(self) -> object:
        return object()

    def is_current_stream_capturing(self) -> bool:
        return simulated_graphs.is_capturing()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return _backend.devices

    def current_device(self) -> int:
        return _backend.current.index

    def set_device(self, device: DeviceLike) -> None:
        _backend.current.set(_backend.index(device))

    def get_device_name(self, device: DeviceLike = None) -> str:
        _backend.index(device)
        return "Simulated GPU"

    def synchronize(self, device: DeviceLike = None) -> None:
        _backend.index(device)

    def empty_cache(self) -> None:
        """Nothing: memory is free as soon as nobody holds it."""

    def memory_allocated(self, device: DeviceLike = None) -> int:
        return allocated(_backend.index(device))

    def memory_reserved(self, device: DeviceLike = None) -> int:
        return allocated(_backend.index(device))

    def max_memory_allocated(self, device: DeviceLike = None) -> int:
        return peak(_backend.index(device))

    def max_memory_reserved(self, device: DeviceLike = None) -> int:
        return peak(_backend.index(device))

    def reset_peak_memory_stats(self, device: DeviceLike = None) -> None:
        reset_peak(_backend.index(device))

    def mem_get_info(self, device: DeviceLike = None) -> tuple[int, int]:
        """Free and total bytes; of 80 GiB where no capacity is set."""
        index = _backend.index(device)
        return _backend.memory.free(index), _backend.memory.total(index)

    def manual_seed(self, seed: int) -> None:
        _backend.random.default(_backend.current.index).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        _backend.random.seed_all(seed)

    def get_rng_state(self, device: DeviceLike = None) -> torch.Tensor:
        return _backend.random.default(_backend.index(device)).get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: DeviceLike = None) -> None:
        _backend.random.default(_backend.index(device)).set_state(new_state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _SimGenerator(torch._C.Generator):
    """A generator that says it is a simulated device's; see _RandomNumbers."""

    _index: int

    @classmethod
    def on(cls, index: int) -> _SimGenerator:
        generator = cls()
        generator._index = index
        _backend.random.own(generator)
        weakref.finalize(generator, _backend.random.disown, _address(generator))
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _device(self._index)

    def clone_state(self) -> _SimGenerator:
        clone = _SimGenerator.on(self._index)
        clone.set_state(self.get_state())
        return clone


class _GeneratorType(type(torch._C.Generator)):  # type: ignore[misc]
    """Lets ``torch.Generator(device="sim:1")`` make a simulated device's generator and everything else be as before."""

    def __call__(cls, device: DeviceLike = "cpu") -> torch.Generator:
        place = torch.device("cpu" if device is None else device)
        return _SimGenerator.on(_backend.index(place)) if place.type == "sim" else torch._C.Generator(place)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


def _register() -> None:
    _setup_privateuseone_for_python_backend(rename="sim", backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, _kernel(_factory, func), "PrivateUse1")
    for packet in (aten.linear, aten.scaled_dot_product_attention):
        library.impl(packet.default, _kept_whole(packet.default), "AutogradPrivateUse1")
    # torch.tensor() switches Python dispatch off inside, so its copy to the device comes as the backend's own operator.
    library.impl("_copy_from", _kernel(_run, aten._copy_from.default), "PrivateUse1")
    # So does its reading of scalars out of a list of tensors, as transformers 4's beam search ends.
    library.impl("_local_scalar_dense", _kernel(_run, aten._local_scalar_dense.default), "PrivateUse1")
    fallbacks = torch.library.Library("_", "IMPL")
    fallbacks.fallback(_fallback, "PrivateUse1")
    _backend.libraries += [library, fallbacks, *simulated_autocast.register()]
    _replace_in_torch()


def _replace_in_torch() -> None:
    """What torch answers in C++ without asking a backend written in Python (torch/csrc/acc/Module.cpp, 2.13)."""
    torch.Generator = _GeneratorType("Generator", (torch._C.Generator,), {})  # type: ignore[misc, assignment]
    backward = _backend.backward.wrapped(torch.autograd.graph._engine_run_backward)
    torch.autograd.graph._engine_run_backward = backward
    torch.autograd._engine_run_backward = backward  # type: ignore[attr-defined]
    torch.Tensor._make_subclass = staticmethod(_make_subclass)  # type: ignore[assignment]
    module = torch.get_device_module("sim")
    torch.accelerator.current_device_index = module.current_device
    torch.accelerator.set_device_index = module.set_device
    torch.accelerator.synchronize = module.synchronize


_backend = _Backend()
