"""Quantized random-weight models: 8 and 4 bits of bitsandbytes, 4 bits of GPTQ, in place or as a checkpoint.

What holds and runs the weights are the libraries' own layers. GPTQ's correction of errors is left out, which takes data
and CUDA: weights are rounded to the nearest number, which is the same to every layer that runs them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import models, simulated

_BITS = 4
_MIDDLE = 2 ** (_BITS - 1)  # the number that stands for 0
_GROUP_SIZE = 128  # columns that share a scale, as most GPTQ checkpoints have it
_TINY_GROUP_SIZE = 32  # of a tiny model, whose layers have 64 columns


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way of quantizing.

    Attributes:
        label: in tables, as accelerate issue 1394 writes it.
        libraries: any of them makes it.
        layer: makes a layer of a linear one, on its device.
        has_graphs: no layer waits for its device, so that decode steps can be graphs.
    """

    label: str
    libraries: tuple[str, ...]
    layer: Callable[[nn.Linear], nn.Module]
    has_graphs: bool = True

    def library(self) -> str:
        """The name of the one that is installed.

        Raises:
            ModuleNotFoundError: there is none. The message says what to install.
        """
        for name in self.libraries:
            if importlib.util.find_spec(name):
                return name
        newest = self.libraries[-1]
        raise ModuleNotFoundError(f"{self.label} needs a library that is not here: pip install {newest}", name=newest)


def quantize(model: nn.Module, kind: str) -> None:
    """Replace the linear layers of a model's blocks, each on its device, as from_pretrained() would have loaded them.

    Args:
        model: without accelerate's hooks so far.
        kind: one of `KINDS`.

    Raises:
        ModuleNotFoundError: its library is not installed.
    """
    KINDS[kind].library()
    for name, linear in list(_linears(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, KINDS[kind].layer(linear).train(linear.training))
    if kind == "8-bnb":
        model.is_loaded_in_8bit = True  # as transformers marks it


def weights(model: nn.Module) -> Iterator[Tensor]:
    """All that a token reads of a model: parameters, what bitsandbytes keeps beside them, and GPTQ's packed numbers."""
    seen: set[int] = set()
    for module in model.modules():
        packed = module.buffers(recurse=False) if hasattr(module, "qweight") else ()
        for tensor in (*module.parameters(recurse=False), *packed):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
                yield from _beside(tensor)


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """All that a model's memory is made of: its weights and its other buffers."""
    read = list(weights(model))
    yield from read
    known = {id(tensor) for tensor in read}
    yield from (buffer for buffer in model.buffers() if id(buffer) not in known)


def _beside(weight: Tensor) -> Iterator[Tensor]:
    """The scales and tables of a weight of bitsandbytes."""
    state = getattr(weight, "quant_state", None)
    for part in filter(None, (state, getattr(state, "state2", None))):
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))
    if getattr(weight, "SCB", None) is not None:
        yield weight.SCB


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are quantized: all linear ones inside the blocks, so not the head."""
    blocks = tuple(f"{block}." for block in models.block_names(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(blocks):
            yield name, module


# bitsandbytes --------------------------------------------------------------------------------------------------------


def bitsandbytes() -> ModuleType:
    """bitsandbytes, whose parameters can be quantized onto simulated devices as well."""
    library = importlib.import_module("bitsandbytes")
    for kind in (library.nn.Params4bit, library.nn.Int8Params):
        if not hasattr(kind._quantize, "__wrapped__"):
            kind._quantize = _onto_simulated_devices(kind._quantize)
    return library


def _onto_simulated_devices(quantize: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A parameter on the CPU becomes one on CUDA in place, which between the CPU and simulated devices nothing can."""

    def onto_device(parameter: Any, device: Any) -> Any:
        if torch.device(device).type == "sim" and not isinstance(parameter, simulated.SimTensor):
            parameter = type(parameter)(parameter.data.to(device), **{"requires_grad": False, **vars(parameter)})
        return quantize(parameter, device)

    onto_device.__wrapped__ = quantize  # type: ignore[attr-defined]
    return onto_device


def _to_8bit(linear: nn.Linear) -> nn.Module:
    """LLM.int8(), as `load_in_8bit` has it."""
    library = bitsandbytes()
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
    weight = library.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.weight = weight._quantize(linear.weight.device)  # its to() does that for what comes from the CPU alone
    layer.bias = linear.bias
    return layer


def _to_4bit(linear: nn.Linear) -> nn.Module:
    """nf4 with double quantization, as `load_in_4bit` has it with these options."""
    library, device = bitsandbytes(), linear.weight.device
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = library.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
    weight = library.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(device)
    layer.bias = linear.bias
    return layer


# GPTQ ----------------------------------------------------------------------------------------------------------------


def save_gptq(name: str, folder: str | Path, **build_options: Any) -> Path:
    """Writes a 4-bit GPTQ checkpoint with a tokenizer, as AutoGPTQ, GPTQModel and transformers' GPTQConfig load it.

    Args:
        name: one of `models.FAMILIES`.
        folder: made if it is not there.
        build_options: passed to `models.build`.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder = models.save(name, folder, shards=1, **build_options)
    model = models.build(name, **build_options)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    for layer, linear in _linears(model):
        del state[f"{layer}.weight"]
        state |= {f"{layer}.{key}": tensor for key, tensor in pack(linear.weight.data, _TINY_GROUP_SIZE).items()}
    for file in (*folder.glob("*.safetensors*"), *folder.glob("*.bin*")):
        file.unlink()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": _BITS,
        "group_size": _TINY_GROUP_SIZE,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2) + "\n")
    (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def pack(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """A weight in GPTQ's format: 4-bit numbers, eight to an int32, symmetric around 8.

    Args:
        weight: (outputs, inputs), outputs a multiple of 8.
        group_size: of which inputs are a multiple.

    Returns:
        qweight (inputs / 8, outputs), qzeros (groups, outputs / 8; of 8 - 1, as the format has it), scales (groups,
        outputs) in the weight's dtype and g_idx (inputs), the group of each column.
    """
    columns = weight.t().float()
    groups = columns.reshape(-1, group_size, weight.shape[0])
    scales = groups.abs().amax(1, keepdim=True) / (_MIDDLE - 1)
    numbers = (torch.round(groups / scales).int() + _MIDDLE).view_as(columns)
    zeros = torch.full((weight.shape[0], len(groups)), _MIDDLE - 1, dtype=torch.int32, device=weight.device)
    return {
        "qweight": _eight_in_one(numbers),
        "qzeros": _eight_in_one(zeros).t().contiguous(),
        "scales": scales.squeeze(1).to(weight.dtype),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // group_size,
    }


def _eight_in_one(numbers: Tensor) -> Tensor:
    """Eight rows of 4-bit numbers in each row of int32."""
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32, device=numbers.device)[:, None]
    return (numbers.reshape(-1, 32 // _BITS, numbers.shape[1]) << shifts).sum(1, dtype=torch.int32)


def _to_gptq(linear: nn.Linear) -> nn.Module:
    """GPTQModel's layer, or AutoGPTQ's where that is installed: on CUDA its kernel in Triton, else plain torch."""
    group_size = _GROUP_SIZE if linear.in_features % _GROUP_SIZE == 0 else _TINY_GROUP_SIZE
    packed = pack(linear.weight.data, group_size)
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    is_cuda = linear.weight.is_cuda
    if KINDS["4-gptq"].library() == "auto_gptq":
        module = importlib.import_module(
            "auto_gptq.nn_modules.qlinear.qlinear_" + ("tritonv2" if is_cuda else "cuda_old")
        )
        layer = module.QuantLinear(_BITS, group_size, *sizes, weight_dtype=linear.weight.dtype)
    else:
        module = importlib.import_module("gptqmodel.nn_modules.qlinear." + ("tritonv2" if is_cuda else "torch"))
        kind = module.TritonV2Linear if is_cuda else module.TorchLinear
        layer = kind(_BITS, group_size, False, True, *sizes, dtype=linear.weight.dtype)
        packed["qzeros"] += 0x11111111  # inside, it keeps 8 itself
    for name, tensor in packed.items():
        setattr(layer, name, tensor)
    layer.bias = linear.bias
    layer.post_init()
    return layer


# ---------------------------------------------------------------------------------------------------------------------


KINDS: Mapping[str, Kind] = {
    "8-bnb": Kind("8 w/bnb", ("bitsandbytes",), _to_8bit, has_graphs=False),
    "4-bnb": Kind("4 w/bnb", ("bitsandbytes",), _to_4bit),
    "4-gptq": Kind("4 w/gptq", ("auto_gptq", "gptqmodel"), _to_gptq),
}
