"""The simulated machine: what its devices hold, what has moved, random numbers, and each thread's current device."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from . import graphs

Pair = tuple[str, str]
DeviceLike = int | str | torch.device | None

# What mem_get_info() and "out of memory" name as a device's size where no capacity is set.
_NOMINAL_CAPACITY = 80 << 30


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


class Block:
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

    def allocate(self, index: int, storage: torch.UntypedStorage) -> Block:
        """A block for a CPU storage that stands for memory of a device.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        nbytes = storage.nbytes()
        self._take(index, nbytes)
        return Block(index, nbytes, storage._cdata, self._freed)

    def check(self, index: int, nbytes: int) -> None:
        """Raises torch.OutOfMemoryError if so many bytes would not fit."""
        self._take(index, nbytes, keep=False)

    def grow(self, block: Block, nbytes: int) -> None:
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
            if capacity is not None and after > max(before, capacity) and not graphs.is_replaying():
                raise torch.OutOfMemoryError(
                    f"sim:{index} out of memory. Tried to allocate {_size(nbytes)}. GPU {index} has a total capacity "
                    f"of {_size(capacity)} of which {_size(max(0, capacity - before))} is free."
                )
            if keep:
                self._used[index] = after
                if after > self._most.get(index, 0) and not graphs.is_replaying():
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


class RandomNumbers:
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
        self._ours.add(address_of(generator))

    def disown(self, address: int) -> None:
        self._ours.discard(address)

    def for_op(self, given: torch.Generator | None, index: int) -> torch.Generator:
        """The generator an operator on a device draws from.

        Raises:
            RuntimeError: the one it was given is no simulated device's.
        """
        if given is None:
            return self.default(index)
        if address_of(given) not in self._ours:
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


def address_of(generator: torch.Generator) -> int:
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
        machine.counts.one_switch()


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
    return device_of(machine.current.index) if bare else value


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


class Machine:
    """The one simulated machine of this process.

    Attributes:
        run: runs an operator. The tensor calls it here, for operators.py imports the tensor.
        libraries: a registration lasts as long as its Library object.
    """

    run: Callable[[Any, Any, Any], Any]

    def __init__(self) -> None:
        self.registered = False
        self.devices = 0
        self.counts = _Counter()
        self.memory = _Memory()
        self.random = RandomNumbers()
        self.current = _CurrentDevice()
        self.backward = _Backward()
        self.libraries: list[torch.library.Library] = []

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
def device_of(index: int) -> torch.device:
    """The simulated device with this index."""
    return torch.device("sim", index)


@functools.cache
def name_of(index: int) -> str:
    """Its name, as "sim:1"."""
    return f"sim:{index}"


machine = Machine()
