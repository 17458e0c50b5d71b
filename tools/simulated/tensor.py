"""The tensor of a simulated device: a shell around a CPU tensor."""

from __future__ import annotations

import collections
import copy
import functools
from typing import Any, cast

import torch

from .machine import Block, device_of, machine, name_of


class SimTensor(torch.Tensor):
    """A tensor on a simulated device: a shell without memory around a CPU tensor.

    Attributes:
        raw: the CPU tensor with the numbers. Never has ``requires_grad``: autograd works on the shell.
        device_index: the device's index.
        block: the allocation it lies in.
    """

    raw: torch.Tensor
    device_index: int
    block: Block
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
        return machine.backward.shielded(machine.run, func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = repr(self.raw)[: -len(")")]
        gradient = ", requires_grad=True" if self.requires_grad else ""
        return f"{text}, device='{name_of(self.device_index)}'{gradient})"

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
            f"can't convert {name_of(self.device_index)} device type tensor to numpy. "
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
            name_of(self.device_index),
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


def make_subclass(cls: Any, data: torch.Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    """`Tensor._make_subclass` for simulated tensors as well: torch's own takes none that is of a subclass already."""
    if not isinstance(data, SimTensor):
        return _make_subclass_in_torch(cls, data, requires_grad, **kwargs)
    kind = cls if issubclass(cls, SimTensor) else _subclass_on_devices(cls)
    return shell_of(data.raw, data.device_index, data.block, kind).requires_grad_(requires_grad)


_make_subclass_in_torch = torch.Tensor._make_subclass


class _Storage:
    """What other code asks a storage for: where it is and how large. Its numbers are reached through tensors only."""

    def __init__(self, tensor: SimTensor) -> None:
        self._storage = tensor.raw.untyped_storage()
        self.device = device_of(tensor.device_index)

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
        block = machine.memory.allocate(tensor.device_index, storage)
        memo[key] = storage, block, tensor.block  # the last: no other object takes its id meanwhile
    storage, block, _ = memo[key]
    raw = torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return shell_of(raw, tensor.device_index, block)


def shell_of(raw: torch.Tensor, index: int, block: Block, kind: type[SimTensor] = SimTensor) -> SimTensor:
    """The simulated tensor around a CPU tensor that lies in `block` of a device."""
    tensor = torch.Tensor._make_wrapper_subclass(
        kind, raw.shape, raw.stride(), raw.storage_offset(), None, raw.dtype, torch.strided, device_of(index)
    )
    tensor.raw = raw
    tensor.device_index = index
    tensor.block = block
    return tensor


def outside_inference_mode(raw: torch.Tensor, index: int, block: Block) -> SimTensor:
    """A view of a tensor from outside inference mode is one from outside, too."""
    with torch.inference_mode(False):
        return shell_of(raw, index, block)
