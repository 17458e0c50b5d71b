"""What accelerate promises of a dispatched model holds for a sharded one: to save it, copy it, move it, unhook it."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from extensions.sharded_kv import shard
from tests import support
from tools import models


class Plain(nn.Module):
    """No language model: a stack with statistics, and a buffer that no checkpoint holds."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.last.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)) * 2)


X = torch.arange(8.0).reshape(2, 4)


def plain(**options: Any) -> Plain:
    torch.manual_seed(0)
    return Plain(**options).eval()


def spread(model: nn.Module, places: list[str], **options: Any) -> Any:
    """`model` over two devices, or `options["where"]`."""
    where = options.pop("where", places)
    device_map = {"first": where[0], "norm": where[0], "last": where[1]}
    return dispatch_model(model, device_map, main_device=places[0], **options)


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


def test_a_plain_module_gives_the_cpus_output_from_an_input_anywhere(places: list[str]) -> None:
    model = spread(plain(), places)
    assert shard(model).enabled
    right = plain()(X)
    for place in ("cpu", *places):
        torch.testing.assert_close(model(X.to(place)).cpu(), right)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_part_is_still_loaded_and_dropped_by_accelerate(
    places: list[str], where: str, tmp_path: Path
) -> None:
    right = plain()(X)
    model = spread(plain(), places, where=(places[1], where), offload_dir=tmp_path)
    shard(model)
    torch.testing.assert_close(model(X.to(places[0])).cpu(), right)
    assert model.last.weight.device == torch.device("meta")


def test_a_model_offloaded_whole_runs_as_before(places: list[str]) -> None:
    model = cpu_offload(plain(), torch.device(places[0]))
    shard(model)
    torch.testing.assert_close(model(X).cpu(), plain()(X))


def test_tied_weights_stay_one_tensor(places: list[str]) -> None:
    model = support.spread(models.build("llama", tie_word_embeddings=True), places)
    shard(model)
    support.GREEDY.run(model, places[0])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_buffer_outside_checkpoints_is_where_its_module_runs(places: list[str]) -> None:
    model = spread(plain(), places)
    shard(model)
    model(X.to(places[0]))
    assert str(model.last.scale.device) == places[1]
    assert "last.scale" not in model.state_dict()


def test_hooks_removed_after_shard_leave_plain_modules(places: list[str]) -> None:
    model = spread(plain(), places)
    sharding = shard(model)
    remove_hook_from_submodules(model)
    sharding.detach()
    assert not any({"_hf_hook", "_old_forward"} & vars(module).keys() for module in model.modules())
    torch.testing.assert_close(nn.Module.to(model, "cpu")(X), plain()(X))


def test_a_deep_copy_shares_no_weights_and_runs_alone(places: list[str]) -> None:
    model = spread(plain(), places)
    if not hasattr(model.first.forward, "func"):
        pytest.skip("accelerate 0.19 binds the forwards of a copy to the original")
    shard(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(X.to(places[0])).cpu(), plain()(X))


def test_a_state_dict_has_the_models_own_names_and_loads_back(places: list[str]) -> None:
    model = spread(plain(), places)
    shard(model)
    saved = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert saved.keys() == plain().state_dict().keys()
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in saved.items()})
    assert not model(X.to(places[0])).any()
    model.load_state_dict(saved)
    torch.testing.assert_close(model(X.to(places[0])).cpu(), plain()(X))


def test_a_saved_sharded_model_loads_and_replies_the_same(places: list[str], tmp_path: Path) -> None:
    model = support.spread(models.build("llama"), places)
    shard(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    right = support.on_cpu("llama", support.GREEDY).tokens.tolist()
    assert support.GREEDY.run(loaded, "cpu").tokens.tolist() == right
    assert support.GREEDY.run(model, places[0]).tokens.tolist() == right


def test_moving_a_sharded_model_warns_as_accelerate_does(places: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def warnings_of(model: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="accelerate.big_modeling"):
            model.to(places[1])
        return [record.getMessage() for record in caplog.records]

    theirs = warnings_of(spread(plain(), places))
    model = spread(plain(), places)
    shard(model)
    assert warnings_of(model) == theirs


def test_pickling_fails_as_under_accelerate_and_harms_nothing(places: list[str]) -> None:
    """A forward that accelerate has hooked is a local function: no such model can be pickled, only its weights."""
    errors = (TypeError, AttributeError, pickle.PicklingError)
    model = spread(plain(), places)
    with pytest.raises(errors):
        pickle.dumps(model)
    sharding = shard(model)
    with pytest.raises(errors):
        pickle.dumps(model)
    assert sharding.enabled
    torch.testing.assert_close(model(X.to(places[0])).cpu(), plain()(X))


def test_a_model_on_one_device_can_be_pickled_in_graph_mode_too(places: list[str]) -> None:
    model = models.build("llama", num_hidden_layers=2).to(places[0])
    inputs = support.prompts()["input_ids"].to(places[0])
    expected = model(inputs).logits
    sharding = shard(model)
    sharding.mode = "graph"
    assert sharding.enabled
    unpickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(unpickled(inputs).logits, expected)
    assert not shard(unpickled).enabled


def test_a_compiled_sharded_module_gives_the_same_output(places: list[str]) -> None:
    if not places[0].startswith("cuda"):
        pytest.skip("torch.compile cannot trace simulated devices")
    model = spread(plain(), places)
    shard(model)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X.to(places[0])).cpu(), plain()(X))
