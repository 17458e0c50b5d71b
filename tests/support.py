"""What the tests of the engine share: devices to run on, spread models, and ways of generating."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from extensions.sharded_kv.engine.transfers import tensors_in
from tools import models, simulated, traffic

PAD, BOS, EOS = models.PAD_ID, models.BOS_ID, models.EOS_ID


class Devices:
    """Simulated or real GPUs: the same tests run on both.

    Args:
        kind: "sim" or "cuda".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "sim":
            simulated.start(4)

    def __call__(self, count: int) -> list[str]:
        """The first `count` devices, as ["sim:0", "sim:1"]. Skips the test where there are fewer."""
        there = self.runtime.device_count()
        if there < count:
            pytest.skip(f"needs {count} {self.kind} devices, there are {there}")
        return [f"{self.kind}:{index}" for index in range(count)]

    def up_to(self, count: int) -> list[str]:
        """The first `count` devices, or all where there are fewer: for what runs on one GPU as well."""
        return self(max(1, min(count, self.runtime.device_count())))

    @property
    def runtime(self) -> Any:
        """torch.cuda or its like."""
        return getattr(torch, self.kind)

    def traffic(self) -> contextlib.AbstractContextManager[traffic.Traffic]:
        """Counts what crosses between devices inside the block: `.copies` and `.bytes` by (from, to)."""
        return traffic.record(self.kind)


def family_or_skip(name: str) -> str:
    """`name`, or a skipped test where this stack does not have the family."""
    if not models.available(name):
        pytest.skip(f"this transformers has no {name}")
    return name


def spread(model: PreTrainedModel, devices: Sequence[str], **options: Any) -> PreTrainedModel:
    """`model`, dispatched by accelerate over `devices` as `from_pretrained(device_map=...)` does it.

    Args:
        options: for `models.device_map`, or `device_map` itself.
    """
    device_map = options.pop("device_map", None) or models.device_map(model, devices, **options)
    skip_keys = {}
    if "skip_keys" in inspect.signature(dispatch_model).parameters:
        skip_keys = {"skip_keys": getattr(model, "_skip_keys_device_placement", None)}
    return dispatch_model(model, device_map, main_device=devices[0], **skip_keys)


def simple_dispatch(model: nn.Module, device_map: dict[str, str]) -> nn.Module:
    """Hooks as AutoGPTQ's and GPTQModel's own dispatcher sets them: on each entry, each sending its output back."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils.modeling import find_tied_parameters, retie_parameters

    tied = find_tied_parameters(model)
    for name, device in device_map.items():
        hook = AlignDevicesHook(torch.device(device), io_same_device=True, place_submodules=True)
        add_hook_to_module(model.get_submodule(name), hook)
    retie_parameters(model, tied)
    model.hf_device_map = device_map
    return model


def prompts(batch: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and attention mask of `batch` prompts, the shorter ones padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, models.VOCAB_SIZE - 5, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : row * 2] = PAD
        mask[row, : row * 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def save_lora(family: str, folder: Path, seed: int = 0) -> Path:
    """A LoRA on the attention of a tiny model, with weights that are not zero. Skips the test without peft."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(models.build(family), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    tuned.save_pretrained(str(folder))
    return folder


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a generation gave.

    Attributes:
        tokens: token ids, on the CPU.
        scores: logits or scores of each step, on the CPU.
        states: hidden states and attentions of all steps, on the CPU, where they were asked for.
        places: the devices on which `states` were.
    """

    tokens: Tensor
    scores: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    places: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """One way of generating.

    Attributes:
        name: of the test's parameter.
        options: for `generate()`.
        batch, length: how many prompts, of how many tokens.
        needs: whether this stack and model can do it.
        prepare: makes further options from the model and its inputs.
    """

    name: str
    options: dict[str, Any]
    batch: int = 3
    needs: Callable[[PreTrainedModel], bool] = lambda model: True
    prepare: Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Any]] = lambda model, inputs: {}
    new_tokens: int = 10
    length: int = 9

    def __str__(self) -> str:
        return self.name

    def run(self, model: PreTrainedModel, device: str) -> Reply:
        """Generate on `model`, whose inputs enter at `device`."""
        inputs = {name: tensor.to(device) for name, tensor in prompts(self.batch, self.length).items()}
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                **self.options,
                **self.prepare(model, inputs),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                return_dict_in_generate=True,
                output_scores=True,
            )
        states = [
            tensor
            for key, value in out.items()
            if key.endswith(("hidden_states", "attentions")) and value is not None
            for tensor in tensors_in(value)
        ]
        return Reply(
            out.sequences.cpu(),
            tuple(score.cpu() for score in out.scores),
            tuple(tensor.cpu() for tensor in states),
            tuple(str(tensor.device) for tensor in states),
        )


def _knows(option: str) -> Callable[[PreTrainedModel], bool]:
    return lambda model: hasattr(GenerationConfig(), option) and not model.config.is_encoder_decoder


def _can_continue(model: PreTrainedModel) -> bool:
    return not model.config.is_encoder_decoder


def _earlier_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The cache of all but the last token of the prompts: from a generate before, where that gives its cache."""
    before = {name: tensor[:, :-1] for name, tensor in inputs.items()}
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    cache = getattr(model.generate(**before, **options), "past_key_values", None)
    return {"past_key_values": cache or model(**before, use_cache=True).past_key_values}


def _negative_prompt(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"negative_prompt_ids": inputs["input_ids"].flip(1)[:, :5]}


def _has_static_cache(model: PreTrainedModel) -> bool:
    declared = getattr(model, "_supports_static_cache", None)
    return _knows("cache_implementation")(model) and (declared is None or declared)


_UNCOMPILED = {"disable_compile": True} if hasattr(GenerationConfig(), "disable_compile") else {}
GREEDY = Way("greedy", {"do_sample": False})
WAYS = (
    GREEDY,
    Way("sampling", {"do_sample": True, "temperature": 1.5, "top_k": 20}),
    Way("beams", {"do_sample": False, "num_beams": 3}),
    Way("no-cache", {"do_sample": False, "use_cache": False}),
    Way("states", {"do_sample": False, "output_hidden_states": True, "output_attentions": True}),
    Way("earlier-cache", {"do_sample": False}, needs=_can_continue, prepare=_earlier_cache),
    Way("contrastive", {"penalty_alpha": 0.6, "top_k": 4}, needs=lambda model: hasattr(model, "contrastive_search")),
    Way("prompt-lookup", {"do_sample": False, "prompt_lookup_num_tokens": 3}, 1, _knows("prompt_lookup_num_tokens")),
    Way("guidance", {"do_sample": False, "guidance_scale": 1.5}, 3, _knows("guidance_scale"), _negative_prompt),
    # Compiled blocks round otherwise than compiled modules inside them: equal bits are promised uncompiled.
    Way("static-cache", {"do_sample": False, "cache_implementation": "static", **_UNCOMPILED}, needs=_has_static_cache),
)


@functools.lru_cache(maxsize=64)
def on_cpu(family: str, way: Way) -> Reply:
    """The reply of the same model on the CPU, without hooks."""
    return way.run(models.build(family), "cpu")


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two sequences of tensors are equal to the last bit."""
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class FailsLater:
    """In place of a method: from one call on it raises, before it has done anything.

    Args:
        owner, name: whose method.
        calls: how many go well.
        error: what it raises then.
    """

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: BaseException) -> None:
        original, self.failures = vars(owner)[name], 0

        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls >= 0:
                return original(*args, **kwargs)
            self.failures += 1
            raise error

        patch.setattr(owner, name, fail)
