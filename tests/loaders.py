"""How people load models with 8-bit and 4-bit weights over several devices: each library's own door and dispatcher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from tools import models, quantized


def spread_over(family: str, places: list[str]) -> dict[str, Any]:
    """A device map for a tiny model."""
    return models.device_map(models.build(family), [torch.device(place) for place in places])


def bitsandbytes_8bit(family: str, folder: Path, device_map: dict[str, Any], **options: Any) -> Any:
    """As `load_in_8bit`."""
    return _bitsandbytes(family, folder, device_map, load_in_8bit=True, **options)


def bitsandbytes_4bit(family: str, folder: Path, device_map: dict[str, Any]) -> Any:
    """As `load_in_4bit`, with nf4 and double quantization."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return _bitsandbytes(family, folder, device_map, load_in_4bit=True, **options)


def _bitsandbytes(family: str, folder: Path, device_map: dict[str, Any], **options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantized.bitsandbytes()
    checkpoint = models.save(family, folder)
    with _a_gpu_in_transformers_eyes():
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, device_map=device_map, quantization_config=BitsAndBytesConfig(**options)
        )


@contextlib.contextmanager
def _a_gpu_in_transformers_eyes() -> Iterator[None]:
    """transformers 4.44 loads these weights only where CUDA is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        yield


def auto_gptq(family: str, folder: Path, device_map: dict[str, Any]) -> Any:
    """The wrapper, with the model inside `.model`. Loaded on the CPU: safetensors reads onto no simulated device."""
    library = pytest.importorskip("auto_gptq")
    from auto_gptq.modeling._utils import simple_dispatch_model

    checkpoint = str(quantized.save_gptq(family, folder))
    kernels = {"disable_exllama": True, "disable_exllamav2": True, "use_cuda_fp16": False}
    with _weights_are_initialised_afterwards():
        wrapper = library.AutoGPTQForCausalLM.from_quantized(
            checkpoint, device="cpu", torch_dtype=torch.float32, **kernels
        )
    wrapper.model = simple_dispatch_model(wrapper.model, device_map)
    return wrapper


@contextlib.contextmanager
def _weights_are_initialised_afterwards() -> Iterator[None]:
    """AutoGPTQ switches that off in transformers for the whole process: later models would be others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "_init_weights", True)
        yield


def gptqmodel(family: str, folder: Path, device_map: dict[str, Any]) -> Any:
    """Its successor. Its kernel in plain torch takes 16 bit alone."""
    library = pytest.importorskip("gptqmodel")
    from gptqmodel.utils.model import simple_dispatch_model

    checkpoint = str(quantized.save_gptq(family, folder, dtype=torch.float16))
    wrapper = library.GPTQModel.load(checkpoint, device="cpu", backend=library.BACKEND.GPTQ_TORCH, dtype=torch.float16)
    wrapper.model = simple_dispatch_model(wrapper.model, device_map)
    return wrapper


def gptq_config(family: str, folder: Path, device_map: dict[str, Any]) -> Any:
    """transformers' own way, with accelerate's dispatcher."""
    pytest.importorskip("optimum")
    from transformers import GPTQConfig

    is_auto_gptq = quantized.KINDS["4-gptq"].library() == "auto_gptq"
    dtype, options = (torch.float32, {"use_exllama": False}) if is_auto_gptq else (torch.float16, {})
    checkpoint = quantized.save_gptq(family, folder, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map={"": "cpu"}, torch_dtype=dtype, quantization_config=GPTQConfig(bits=4, **options)
    )
    main = next(iter(device_map.values()))
    return dispatch_model(model, device_map, main_device=main, skip_keys=model._skip_keys_device_placement)
