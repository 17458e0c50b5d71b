"""The operators: each runs on the CPU tensors inside, and refuses what several GPUs would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from . import graphs
from .machine import Block, device_of, machine
from .tensor import SimTensor, outside_inference_mode, shell_of

aten = torch.ops.aten


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
                self.meet(device_of(value.device_index))
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
            shell = shell_of(raw, index, machine.memory.allocate(index, storage))
            self.operands.append(shell)  # another result may be a view of it
            return shell
        if torch.is_inference_mode_enabled() and not all(operand.is_inference() for operand in self.operands):
            return outside_inference_mode(raw, index, block)
        return shell_of(raw, index, block)

    def _block(self, storage: torch.UntypedStorage) -> Block | None:
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
            machine.memory.check(cast(int, self.index), sum(new.values()))

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


@graphs.captured
def run_operator(func: Any, args: Any, kwargs: Any) -> Any:
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
        return outside_inference_mode(raw, tensor.device_index, tensor.block)
    return shell_of(raw, tensor.device_index, tensor.block)


def _to_cpu(call: _Call, kwargs: dict[str, Any]) -> bool:
    """Points a factory's ``device`` at the CPU, and its results at the device it named.

    Returns:
        False, and nothing has changed, where the device is no simulated one.
    """
    device = kwargs["device"]
    if device.type != "sim":
        return False
    call.index = machine.index(device)
    kwargs["device"] = _CPU
    if kwargs.pop("pin_memory", None):
        raise RuntimeError(f"Only dense CPU tensors can be pinned, not one on {device}")
    return True


def _draw(op: _Op, index: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Runs an operator, with the device's random numbers if it needs any."""
    if (op.generator >= 0 or op.draws) and device_of(index) in graphs.stuck:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
    if op.generator >= 0:
        if op.generator < len(args):
            args[op.generator] = machine.random.for_op(args[op.generator], index)
        else:
            kwargs["generator"] = machine.random.for_op(kwargs.get("generator"), index)
    elif op.draws:
        return machine.random.lend_to_cpu(index, lambda: op.func(*args, **kwargs))
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
            machine.memory.grow(block, storage.nbytes())
        except torch.OutOfMemoryError:
            raw.as_strided_(tensor.shape, tensor.stride(), tensor.storage_offset())
            storage.resize_(block.nbytes)
            raise
    tensor.data = shell_of(raw, tensor.device_index, block)


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
    machine.counts.copy(str(source.device), str(target.device), target.numel() * width)


def _to_copy(op: _Op, args: Any, kwargs: Any) -> Any:
    source = args[0]
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    device = kwargs.get("device") or source.device
    if device.type == "sim":
        target = _Call(op, machine.index(device)).wrap(op.func(source.raw, **options))
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
    machine.counts.one_read()
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
    return shell_of(index, device.index, machine.memory.allocate(device.index, storage))


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
    machine.counts.one_read()
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
# They arrive whole in inference mode, and the largest ones of a model, which register names, without gradients, too.
_WHOLE = frozenset({aten.linear, aten.matmul, aten.reshape, aten.contiguous, aten.scaled_dot_product_attention})

# Operators without the pointwise tag that take a CPU tensor without dimensions beside tensors on a GPU.
_TAKE_SCALARS = frozenset({aten.masked_fill, aten.masked_fill_, aten.fill_})

# Factories that torch would otherwise build out of several operators; all others work too, by torch's own recipes.
FACTORIES = (
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


@graphs.captured
def run_factory(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operator without tensors among its operands: it makes a new one."""
    op = _facts(func)
    if kwargs.get("device") is None:
        raise NotImplementedError(f"{func} without a tensor or a device, on a simulated device")
    call = _Call(op)
    _to_cpu(call, kwargs)
    return call.wrap(_draw(op, cast(int, call.index), list(args), kwargs))


def kernel(run: Callable[..., Any], func: Any) -> Callable[..., Any]:
    """What torch calls for the operator `func`: `run` with it."""
    return lambda *args, **kwargs: machine.backward.shielded(run, func, args, kwargs)


def kept_whole(func: Any) -> Callable[..., Any]:
    """A composite operator in front of autograd, which else takes it apart where no gradient is wanted either."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return func.decompose(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return func(*args, **kwargs)

    return run


def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch calls for every operator that has no kernel of its own and no simulated operand."""
    return machine.backward.shielded(run_factory, func, args, kwargs)
