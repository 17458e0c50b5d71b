"""Quantized weights: what is packed is what the libraries pack, and all of their memory is counted."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tools import models, quantized, simulated

GROUP = 32
has_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes here")


@pytest.fixture(autouse=True)
def simulated_devices() -> None:
    simulated.start(4)


def unpacked(packed: dict[str, Tensor]) -> Tensor:
    """The weight that GPTQ's format says."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = (packed["qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)
    zeros = (packed["qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1
    groups = packed["g_idx"].long()
    return ((numbers - zeros[groups]) * packed["scales"][groups]).t()


def test_a_packed_weight_is_the_weight_rounded_to_4_bits() -> None:
    weight = torch.randn(16, 64)
    half_a_step = weight.abs().view(16, -1, GROUP).amax(2).repeat_interleave(GROUP, 1) / 7 / 2
    error = (unpacked(quantized.pack(weight, GROUP)) - weight).abs()
    assert bool((error <= half_a_step * 1.0001).all())


def test_it_is_packed_as_auto_gptq_packs_it() -> None:
    module = pytest.importorskip("auto_gptq.nn_modules.qlinear.qlinear_cuda_old")
    linear = nn.Linear(64, 96, bias=False)
    ours = quantized.pack(linear.weight.data, GROUP)
    layer = module.QuantLinear(4, GROUP, 64, 96, False, weight_dtype=torch.float32)
    scales = ours["scales"].t()
    layer.pack(linear, scales, torch.full_like(scales, 8), ours["g_idx"])
    assert {name: torch.equal(tensor, getattr(layer, name)) for name, tensor in ours.items()} == dict.fromkeys(
        ours, True
    )


@has_bitsandbytes
@pytest.mark.parametrize("kind", ["8-bnb", "4-bnb"])
def test_all_memory_of_a_quantized_model_is_counted(kind: str) -> None:
    quantized.bitsandbytes()  # what it logs while it is imported, pytest keeps, with all that led to it
    gc.collect()
    before = simulated.allocated(3)
    model = models.build("llama").to("sim:3")
    quantized.quantize(model, kind)
    gc.collect()
    blocks = {id(tensor.block): tensor.block.nbytes for tensor in quantized.tensors(model)}
    a_table_of_the_librarys = 256 * 4  # that older ones keep for each device
    assert simulated.allocated(3) - before - sum(blocks.values()) in (0, a_table_of_the_librarys)


@has_bitsandbytes
@pytest.mark.parametrize(("kind", "bits"), [("8-bnb", 8), ("4-bnb", 4)])
def test_the_layers_weights_have_the_bits_they_are_said_to_have(kind: str, bits: int) -> None:
    model = models.build("llama").to("sim:0")
    count = sum(weight.numel() for name, weight in model.named_parameters() if name.endswith("proj.weight"))
    quantized.quantize(model, kind)
    packed = [weight for name, weight in model.named_parameters() if name.endswith("proj.weight")]
    assert sum(weight.numel() * weight.element_size() for weight in packed) == count * bits // 8


def test_what_has_no_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="4 w/gptq needs a library that is not here: pip install gptqmodel"):
        quantized.quantize(models.build("llama"), "4-gptq")


def test_a_gptq_checkpoint_holds_no_weight_twice(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = quantized.save_gptq("llama", tmp_path)
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    packed = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    assert len(packed) == 6 * 7
    assert not {f"{name}.weight" for name in packed} & names
    assert not list(folder.glob("*.bin"))
