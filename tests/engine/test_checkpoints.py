"""From a checkpoint on disk: what people do, from `from_pretrained(device_map=...)` to the reply."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from extensions.sharded_kv import shard
from tests import support
from tools import models
from tools.traffic import between_gpus, total


def load(family: str, folder: Path, places: list[str]) -> Any:
    device_map = models.device_map(models.build(family), [torch.device(place) for place in places])
    return AutoModelForCausalLM.from_pretrained(models.save(family, folder), device_map=device_map).eval()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_checkpoint_loaded_over_several_devices_replies_as_on_the_cpu_with_less_traffic(
    devices: support.Devices, family: str, count: int, tmp_path: Path
) -> None:
    places = devices(count)
    model = load(family, tmp_path, places)
    with devices.traffic() as before:
        theirs = support.GREEDY.run(model, places[0])
    sharding = shard(model)
    with devices.traffic() as after:
        ours = support.GREEDY.run(model, places[0])
    assert len(sharding.placement.stages) == count
    assert support.same(ours.scores, theirs.scores)
    assert ours.tokens.tolist() == support.on_cpu(family, support.GREEDY).tokens.tolist()
    assert total(after.bytes) < total(before.bytes)
    assert total(after.copies) < total(before.copies)


def test_no_python_of_accelerates_runs_inside_a_stage(devices: support.Devices, tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook

    places = devices(2)
    model = load("llama", tmp_path, places)
    calls = []
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        if isinstance(hook, AlignDevicesHook):
            inner = hook.pre_forward
            hook.pre_forward = lambda *args, _inner=inner, **kwargs: (calls.append(1), _inner(*args, **kwargs))[1]
    shard(model)
    support.GREEDY.run(model, places[0])
    assert calls == []


def test_two_replies_at_once_do_not_mix(devices: support.Devices, tmp_path: Path) -> None:
    places = devices(2)
    model = load("llama", tmp_path, places)
    shard(model)
    seeds = (1, 2)
    replies: dict[int, list[list[int]]] = {}

    def reply(seed: int) -> None:
        inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts(seed=seed).items()}
        with torch.no_grad():
            replies[seed] = model.generate(**inputs, do_sample=False, max_new_tokens=20, min_new_tokens=20).tolist()

    for seed in seeds:
        reply(seed)
    alone, threads = dict(replies), [threading.Thread(target=reply, args=(seed,)) for seed in seeds]
    replies.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == alone


def test_under_auto_gptqs_own_dispatcher_and_inference_mode_the_cache_stays(devices: support.Devices) -> None:
    utils = pytest.importorskip("auto_gptq.modeling._utils")
    places = devices(2)
    model = models.build("gptj")
    model = utils.simple_dispatch_model(model, models.device_map(model, places))
    theirs = support.GREEDY.run(model, places[0])
    shard(model)
    with torch.inference_mode(), devices.traffic() as traffic:
        ours = support.GREEDY.run(model, places[0])
    assert support.same(ours.scores, theirs.scores)
    hidden = 4 * model.config.n_embd * 3  # bytes of one token of three prompts
    prompt = support.prompts()["input_ids"].shape[1]
    cache_of_a_layer = 2 * hidden * prompt
    assert between_gpus(traffic.bytes)[places[0], places[1]] < hidden * (prompt + 9) + cache_of_a_layer
