"""Training a sharded model: loss and gradients are accelerate's to the last bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from torch import Tensor, nn

from extensions.sharded_kv import Sharding, shard
from tests import support
from tools import models


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


@pytest.fixture
def model(places: list[str]) -> Any:
    return support.spread(models.build("llama"), places).train()


def backward(model: Any, place: str, seed: int = 0) -> Tensor:
    """The loss of one batch, whose gradients are added to the model's."""
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(seed=seed).items()}
    loss: Tensor = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach().cpu()


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradient of every parameter that is trained. None may be missing."""
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert found
    missing = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert not missing
    return [grad.cpu().clone() for grad in found if grad is not None]


def steps(model: Any, place: str, count: int = 1) -> list[Tensor]:
    """Losses of `count` batches and the gradients that they add up to."""
    model.zero_grad(set_to_none=True)
    losses = [backward(model, place, seed) for seed in range(count)]
    return [*losses, *gradients(model)]


def assert_trains_like_accelerate(model: Any, sharding: Sharding, place: str, count: int = 1) -> None:
    assert sharding.enabled
    ours = steps(model, place, count)
    assert sharding.enabled, sharding.failure
    sharding.disable()
    theirs = steps(model, place, count)
    sharding.enable()
    assert any(bool(tensor.any()) for tensor in theirs[count:])
    assert support.same(ours, theirs)


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_step_and_two_accumulated_have_accelerates_gradients(model: Any, places: list[str], count: int) -> None:
    assert_trains_like_accelerate(model, shard(model), places[0], count)


def test_tied_weights_gather_the_gradients_of_both_their_uses(places: list[str]) -> None:
    model = support.spread(models.build("llama", tie_word_embeddings=True), places).train()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_trains_like_accelerate(model, shard(model), places[0])


def test_a_lora_step_has_accelerates_gradients(model: Any, places: list[str]) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    lora = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.parameters():
        if parameter.requires_grad:  # half of them begin as zeros, which give the other half no gradients
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    assert_trains_like_accelerate(lora, shard(lora), places[0])


class Shared(nn.Module):
    """Two layers on the other device take the same input, as every layer takes the same mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.left(hidden) * self.right(hidden) + self.left(x)


def test_one_copy_for_two_blocks_carries_the_gradients_of_both(devices: support.Devices, places: list[str]) -> None:
    torch.manual_seed(0)
    model = dispatch_model(Shared(), {"first": places[0], "left": places[1], "right": places[1]}, main_device=places[0])
    sharding = shard(model)

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        x = torch.arange(8.0).reshape(2, 4).to(places[0]).requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None
        return [x.grad.cpu(), *gradients(model)]

    with devices.traffic() as ours_moved:
        ours = step()
    sharding.disable()
    with devices.traffic() as theirs_moved:
        theirs = step()
    there = (places[0], places[1])
    assert ours_moved.copies[there] < theirs_moved.copies[there]
    assert support.same(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_has_accelerates_gradients(model: Any, places: list[str], reentrant: bool) -> None:
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    elif reentrant:
        model.gradient_checkpointing_enable()
    else:
        pytest.skip("this transformers checkpoints with reentrant backwards only")
    model.enable_input_require_grads()
    assert_trains_like_accelerate(model, shard(model), places[0])


def test_graph_mode_trains_eagerly_and_says_why(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    sharding.mode = "graph"
    assert_trains_like_accelerate(model, sharding, places[0])
    ids = support.prompts(batch=1)["input_ids"].to(places[0])
    cache_of = getattr(transformers, "DynamicCache", None)  # before, caches were tuples: a reason that comes first
    cache = model(ids, use_cache=True, past_key_values=cache_of and cache_of()).past_key_values
    model(ids[:, :1], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert ("training" if cache_of else "tuples") in sharding.reason_for_eager


def test_training_mode_and_back_changes_no_reply(model: Any, places: list[str]) -> None:
    shard(model)
    model.eval()
    before = support.GREEDY.run(model, places[0])
    steps(model.train(), places[0])
    after = support.GREEDY.run(model.eval(), places[0])
    assert support.same(after.scores, before.scores)


def test_a_reply_after_an_optimizers_step_is_accelerates(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    before = support.GREEDY.run(model.eval(), places[0])
    steps(model.train(), places[0])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ours = support.GREEDY.run(model.eval(), places[0])
    sharding.disable()
    theirs = support.GREEDY.run(model, places[0])
    assert support.same(ours.scores, theirs.scores)
    assert not support.same(ours.scores, before.scores)
