"""Reading what runs where, from the hooks that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine.placement import Placement, read_placement
from tests import support
from tools import models
from tools.traffic import between_gpus, total


def devices_of(placement: Placement) -> list[str]:
    return [str(stage.device) for stage in placement.stages]


def names(placement: Placement) -> list[list[str]]:
    return [[block.name for block in stage.blocks] for stage in placement.stages]


def test_layers_on_two_devices_make_two_stages(devices: support.Devices) -> None:
    placement = read_placement(support.spread(models.build("gptj"), devices(2)))
    assert devices_of(placement) == devices(2)
    assert names(placement)[0][:4] == ["transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert names(placement)[1] == [f"transformer.h.{i}" for i in (3, 4, 5)] + ["transformer.ln_f", "lm_head"]


def test_layers_that_return_to_an_earlier_device_make_a_stage_each(devices: support.Devices) -> None:
    first, second = devices(2)
    placement = read_placement(support.spread(models.build("llama"), [first, second, first, second]))
    assert devices_of(placement) == [first, second, first, second]


@pytest.mark.parametrize("head", ["first", "last"])
def test_the_head_may_be_on_either_end(devices: support.Devices, head: str) -> None:
    placement = read_placement(support.spread(models.build("llama"), devices(2), head=head))
    home = next(str(block.device) for block in placement.blocks if block.name == "lm_head")
    assert home == devices(2)[0 if head == "first" else -1]


def test_a_submodel_on_one_entry_is_one_block(devices: support.Devices) -> None:
    first, second = devices(2)
    model = support.spread(models.build("llama"), [first, second], device_map={"model": first, "lm_head": second})
    placement = read_placement(model)
    assert names(placement) == [["model"], ["lm_head"]]
    inner = [name for name in models.device_map(model, [first]) if name != "lm_head"]
    assert set(inner) - {"model.rotary_emb"} == {door.name for door in placement.entry_points}


def test_entries_for_parts_of_a_layer_are_blocks_of_their_own(devices: support.Devices) -> None:
    first, second = devices(2)
    model = models.build("gptj")
    device_map = models.device_map(model, [first, second])
    for part in ("ln_1", "attn", "mlp"):
        device_map[f"transformer.h.0.{part}"] = device_map["transformer.h.0"]
    del device_map["transformer.h.0"]
    placement = read_placement(support.spread(model, [first, second], device_map=device_map))
    assert names(placement)[0][1:4] == ["transformer.h.0.ln_1", "transformer.h.0.attn", "transformer.h.0.mlp"]


def test_a_tied_head_is_where_its_embedding_is(devices: support.Devices) -> None:
    model = support.spread(models.build("opt"), devices(2))
    blocks = {block.name: str(block.device) for block in read_placement(model).blocks}
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert blocks["lm_head"] == blocks["model.decoder.embed_tokens"] == devices(2)[0]


def test_an_encoder_decoder_model_has_scopes_for_both(devices: support.Devices) -> None:
    placement = read_placement(support.spread(models.build("t5"), devices(2)))
    assert [scope.name for scope in placement.containers] == ["", "encoder", "decoder"]


def test_no_hook_inside_a_block_stays(devices: support.Devices) -> None:
    model = support.spread(models.build("llama"), devices(2))
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    placement = read_placement(model)
    assert set(placement.unhooked) == hooked - {block.name for block in placement.blocks} - {""}


def test_the_main_device_is_read_not_assumed(devices: support.Devices) -> None:
    first, second = devices(2)
    model = models.build("llama")
    model = dispatch_model(model, models.device_map(model, [first, second]), main_device=second)
    assert str(read_placement(model).main_device) == second


@pytest.mark.parametrize("offload_to", ["cpu", "disk"])
def test_offloaded_blocks_keep_their_hooks_and_caches_still_stay(
    devices: support.Devices, offload_to: str, tmp_path: Path
) -> None:
    places = devices(2)
    model = models.build("llama")
    device_map = models.device_map(model, places)
    device_map["model.layers.1"] = device_map["model.layers.4"] = offload_to
    model = dispatch_model(model, device_map, main_device=places[0], offload_dir=str(tmp_path))
    theirs = support.GREEDY.run(model, places[0])
    sharding = shard(model)
    offloaded = [block.name for block in sharding.placement.blocks if block.keeps_hooks]
    assert offloaded == ["model.layers.1", "model.layers.4"]
    with devices.traffic() as traffic:
        ours = support.GREEDY.run(model, places[0])
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.tokens.tolist() == support.on_cpu("llama", support.GREEDY).tokens.tolist()
    # Hidden states: 0 -> 1, back to 0 for layer 4, again to 1; logits home; at most 5 shared inputs. Nothing of the
    # cache.
    assert total(traffic.copies) <= support.GREEDY.new_tokens * 9


def test_a_module_with_somebody_elses_hook_keeps_it(devices: support.Devices) -> None:
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> object:
            Counting.calls += 1
            return args, kwargs

    places = devices(2)
    model = support.spread(models.build("llama"), places)
    add_hook_to_module(model.model.layers[1].mlp, Counting(), append=True)
    add_hook_to_module(model.model.layers[4], Counting(), append=True)
    sharding = shard(model)
    support.GREEDY.run(model, places[0])
    assert Counting.calls == 2 * support.GREEDY.new_tokens
    assert [block.name for block in sharding.placement.blocks if block.keeps_hooks] == ["model.layers.4"]
    assert "model.layers.1.mlp" not in sharding.placement.unhooked


def test_a_wrapper_that_somebody_put_around_a_hooked_forward_still_runs(devices: support.Devices) -> None:
    places = devices(2)
    model = support.spread(models.build("llama"), places)
    layer, calls = model.model.layers[2], []
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    wrapper = layer.forward
    sharding = shard(model)
    reply = support.GREEDY.run(model, places[0])
    assert len(calls) == support.GREEDY.new_tokens
    assert reply.tokens.tolist() == support.on_cpu("llama", support.GREEDY).tokens.tolist()
    sharding.detach()
    assert layer.forward is wrapper


@pytest.mark.parametrize("family", ["llama", "gptj", "opt"])
def test_a_simple_dispatched_model_replies_the_same_and_its_hidden_states_stay(
    devices: support.Devices, family: str
) -> None:
    places = devices(2)
    model = models.build(family)
    model = support.simple_dispatch(model, models.device_map(model, places))
    with devices.traffic() as before:
        theirs = support.GREEDY.run(model, places[0])
    shard(model)
    with devices.traffic() as after:
        ours = support.GREEDY.run(model, places[0])
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert support.same(ours.scores, theirs.scores)
    assert total(after.copies) < total(before.copies)
    assert total(after.bytes) < total(before.bytes)


@pytest.mark.parametrize("family", ["llama", "gptj", "opt", "t5"])
def test_a_simple_dispatched_model_has_the_stages_of_a_dispatched_one(devices: support.Devices, family: str) -> None:
    places = [torch.device(place) for place in devices(2)]
    stages = []
    for dispatch in (support.simple_dispatch, dispatch_model):
        model = models.build(family)
        device_map = models.device_map(model, places)
        stages.append(names(read_placement(dispatch(model, device_map))))
    assert stages[0] == stages[1]


def test_a_simple_dispatched_llama_moves_as_little_as_a_dispatched_one(devices: support.Devices) -> None:
    places = devices(2)
    counts = []
    for dispatch in (support.simple_dispatch, dispatch_model):
        model = models.build("llama")
        model = dispatch(model, models.device_map(model, [torch.device(place) for place in places]))
        shard(model)
        with devices.traffic() as traffic:
            support.GREEDY.run(model, places[0])
        counts.append(between_gpus(traffic.bytes))
    assert counts[0] == counts[1]


def test_embeddings_of_a_simple_dispatched_model_may_be_on_two_devices(devices: support.Devices) -> None:
    """OPT adds token and position embeddings up: only because each comes back can they be on different devices."""
    places = devices(2)
    model = models.build("opt")
    device_map = models.device_map(model, places)
    device_map["model.decoder.embed_positions"] = places[1]
    model = support.simple_dispatch(model, device_map)
    theirs = support.GREEDY.run(model, places[0])
    shard(model)
    assert support.same(support.GREEDY.run(model, places[0]).scores, theirs.scores)


def test_parts_of_a_layer_on_two_devices_still_meet_their_residual(devices: support.Devices) -> None:
    first, second = devices(2)
    model = models.build("llama")
    device_map = models.device_map(model, [first, second])
    layer = device_map.pop("model.layers.1")
    for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
        device_map[f"model.layers.1.{part}"] = layer
    device_map["model.layers.1.mlp"] = second
    model = support.simple_dispatch(model, device_map)
    theirs = support.GREEDY.run(model, first)
    shard(model)
    assert support.same(support.GREEDY.run(model, first).scores, theirs.scores)


def test_an_inner_embedding_takes_ids_from_anywhere(devices: support.Devices) -> None:
    """`get_input_embeddings()` is called from outside, with ids on the CPU; accelerate's hook used to fetch them."""
    first, second = devices(2)
    model = support.spread(models.build("llama"), [first, second], device_map={"model": second, "lm_head": first})
    shard(model)
    ids = support.prompts()["input_ids"]
    with torch.no_grad():
        assert str(model.get_input_embeddings()(ids).device) == second


def test_a_model_offloaded_as_a_whole_has_nothing_to_shard(devices: support.Devices) -> None:
    model = cpu_offload(models.build("llama"), execution_device=torch.device(devices(1)[0]))
    sharding = shard(model)
    assert not sharding.active
    assert "one device" in sharding.reason


@pytest.mark.parametrize("by", ["hook", "wrapper"])
def test_a_block_with_somebody_elses_hook_still_sends_its_output_back(devices: support.Devices, by: str) -> None:
    """OPT's position embedding on another device than its token embedding, and not plainly hooked."""
    places = devices(2)
    model = models.build("opt")
    device_map = models.device_map(model, places)
    device_map["model.decoder.embed_positions"] = places[1]
    model = support.simple_dispatch(model, device_map)
    positions = model.model.decoder.embed_positions
    if by == "hook":
        add_hook_to_module(positions, ModelHook(), append=True)
    else:
        inner = positions.forward
        positions.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    theirs = support.GREEDY.run(model, places[0])
    shard(model)
    assert support.same(support.GREEDY.run(model, places[0]).scores, theirs.scores)


def test_a_model_on_the_cpu_is_nothing_for_any_mode() -> None:
    model = models.build("llama")
    sharding = shard(model)
    for mode in ("eager", "graph"):
        sharding.mode = mode
        assert not sharding.active
        assert not sharding.enabled
        assert sharding.reason == "It is on one device (cpu): there is nothing to shard."
        assert not sharding.placement.is_one_block
