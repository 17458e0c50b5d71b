"""What torch asks a backend for: the module `torch.sim`, generators, and where its operators are."""

from __future__ import annotations

import weakref
from types import TracebackType

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import autocast, graphs
from .machine import DeviceLike, address_of, device_of, machine
from .operators import FACTORIES, fallback, kept_whole, kernel, run_factory, run_operator
from .tensor import make_subclass

aten = torch.ops.aten


class _Device:
    """``torch.sim.device(d)``: makes a device the current one and puts the one before back; None changes nothing."""

    def __init__(self, device: DeviceLike) -> None:
        self._index = None if device is None else machine.index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = machine.current.index
        if self._index is not None:
            machine.current.set(self._index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        machine.current.set(self._before)


class _Module:
    """``torch.sim``, the module that generic code gets from ``torch.get_device_module``."""

    device = _Device
    CUDAGraph = graphs.CUDAGraph
    Stream = graphs.Stream

    def stream(self, stream: graphs.Stream) -> graphs.CurrentStream:
        return graphs.CurrentStream(stream, _Device)

    def graph_pool_handle(self) -> object:
        return object()

    def is_current_stream_capturing(self) -> bool:
        return graphs.is_capturing()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return machine.devices

    def current_device(self) -> int:
        return machine.current.index

    def set_device(self, device: DeviceLike) -> None:
        machine.current.set(machine.index(device))

    def get_device_name(self, device: DeviceLike = None) -> str:
        machine.index(device)
        return "Simulated GPU"

    def synchronize(self, device: DeviceLike = None) -> None:
        machine.index(device)

    def empty_cache(self) -> None:
        """Nothing: memory is free as soon as nobody holds it."""

    def memory_allocated(self, device: DeviceLike = None) -> int:
        return machine.memory.used(machine.index(device))

    def memory_reserved(self, device: DeviceLike = None) -> int:
        return machine.memory.used(machine.index(device))

    def max_memory_allocated(self, device: DeviceLike = None) -> int:
        return machine.memory.most(machine.index(device))

    def max_memory_reserved(self, device: DeviceLike = None) -> int:
        return machine.memory.most(machine.index(device))

    def reset_peak_memory_stats(self, device: DeviceLike = None) -> None:
        machine.memory.reset_most(machine.index(device))

    def mem_get_info(self, device: DeviceLike = None) -> tuple[int, int]:
        """Free and total bytes; of 80 GiB where no capacity is set."""
        index = machine.index(device)
        return machine.memory.free(index), machine.memory.total(index)

    def manual_seed(self, seed: int) -> None:
        machine.random.default(machine.current.index).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        machine.random.seed_all(seed)

    def get_rng_state(self, device: DeviceLike = None) -> torch.Tensor:
        return machine.random.default(machine.index(device)).get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: DeviceLike = None) -> None:
        machine.random.default(machine.index(device)).set_state(new_state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _SimGenerator(torch._C.Generator):
    """A generator that says it is a simulated device's; see RandomNumbers."""

    _index: int

    @classmethod
    def on(cls, index: int) -> _SimGenerator:
        generator = cls()
        generator._index = index
        machine.random.own(generator)
        weakref.finalize(generator, machine.random.disown, address_of(generator))
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return device_of(self._index)

    def clone_state(self) -> _SimGenerator:
        clone = _SimGenerator.on(self._index)
        clone.set_state(self.get_state())
        return clone


class _GeneratorType(type(torch._C.Generator)):  # type: ignore[misc]
    """Lets ``torch.Generator(device="sim:1")`` make a simulated device's generator and everything else be as before."""

    def __call__(cls, device: DeviceLike = "cpu") -> torch.Generator:
        place = torch.device("cpu" if device is None else device)
        return _SimGenerator.on(machine.index(place)) if place.type == "sim" else torch._C.Generator(place)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


def register() -> None:
    """Registers the backend "sim" in this process."""
    _setup_privateuseone_for_python_backend(rename="sim", backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, kernel(run_factory, func), "PrivateUse1")
    for packet in (aten.linear, aten.scaled_dot_product_attention):
        library.impl(packet.default, kept_whole(packet.default), "AutogradPrivateUse1")
    # torch.tensor() switches Python dispatch off inside, so its copy to the device comes as the backend's own operator.
    library.impl("_copy_from", kernel(run_operator, aten._copy_from.default), "PrivateUse1")
    # So does its reading of scalars out of a list of tensors, as transformers 4's beam search ends.
    library.impl("_local_scalar_dense", kernel(run_operator, aten._local_scalar_dense.default), "PrivateUse1")
    fallbacks = torch.library.Library("_", "IMPL")
    fallbacks.fallback(fallback, "PrivateUse1")
    machine.libraries += [library, fallbacks, *autocast.register()]
    machine.run = run_operator
    _replace_in_torch()


def _replace_in_torch() -> None:
    """What torch answers in C++ without asking a backend written in Python (torch/csrc/acc/Module.cpp, 2.13)."""
    torch.Generator = _GeneratorType("Generator", (torch._C.Generator,), {})  # type: ignore[misc, assignment]
    backward = machine.backward.wrapped(torch.autograd.graph._engine_run_backward)
    torch.autograd.graph._engine_run_backward = backward
    torch.autograd._engine_run_backward = backward  # type: ignore[attr-defined]
    torch.Tensor._make_subclass = staticmethod(make_subclass)  # type: ignore[assignment]
    module = torch.get_device_module("sim")
    torch.accelerator.current_device_index = module.current_device
    torch.accelerator.set_device_index = module.set_device
    torch.accelerator.synchronize = module.synchronize
