"""Masks of steps in graph mode stay on their GPUs; one that is not the last one and a one is made anew."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine import compat
from extensions.sharded_kv.engine.graphs.kinds import MaskWatch
from tests import support
from tools import models

TOKENS = 24
FAMILIES = ("llama-gqa", "mistral-sliding", "gptj")


def replied(model: Any, place: str, **options: Any) -> list[list[int]]:
    inputs = {name: tensor.to(place) for name, tensor in support.prompts().items()}
    limits = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    with torch.no_grad():
        tokens: list[list[int]] = model.generate(**inputs, **limits, **options).tolist()
    return tokens


def hide_tokens(mask: Tensor) -> Tensor:
    """Some tokens in the midst of the reply, and in place."""
    if mask.shape[1] == TOKENS:
        mask[:, -5:-1] = 0
    return mask


def hide_tokens_in_a_copy(mask: Tensor) -> Tensor:
    return hide_tokens(mask.clone())


def hide_others_in_each_step(mask: Tensor) -> Tensor:
    shown = mask.clone()
    shown[:, -4 - mask.shape[1] % 3 : -2] = 0
    return shown


def with_masks_changed(model: Any, change: Any) -> Any:
    """A model whose steps get another mask than generate() has for them."""
    prepare = model.prepare_inputs_for_generation

    def changed(_: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        return {**inputs, "attention_mask": change(inputs["attention_mask"])}

    model.prepare_inputs_for_generation = MethodType(changed, model)
    return model


@pytest.mark.parametrize("change", [hide_tokens, hide_tokens_in_a_copy, hide_others_in_each_step])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_that_somebody_changes_in_a_reply_is_obeyed(devices: support.Devices, family: str, change: Any) -> None:
    places = devices(2)
    right = replied(with_masks_changed(models.build(support.family_or_skip(family)), change), "cpu")
    model = with_masks_changed(support.spread(models.build(family), places), change)
    sharding = shard(model)
    sharding.mode = "graph"
    assert replied(model, places[0]) == right
    assert replied(model, places[0]) == right
    assert right != replied(models.build(family), "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_right_in_inference_mode(devices: support.Devices, family: str) -> None:
    places = devices(2)
    right = replied(models.build(support.family_or_skip(family)), "cpu")
    model = support.spread(models.build(family), places)
    shard(model).mode = "graph"
    with torch.inference_mode():
        assert replied(model, places[0]) == right


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_grows_its_mask_in_its_own_way_is_obeyed(devices: support.Devices, family: str) -> None:
    def forgetful(kind: Any) -> Any:
        def grow(self: Any, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
            grown = kind._update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs)
            mask = grown["attention_mask"].clone()
            mask[:, : mask.shape[1] // 2] = 0
            return {**grown, "attention_mask": mask}

        return type(kind.__name__, (kind,), {"_update_model_kwargs_for_generation": grow})

    places = devices(2)
    models_of = [models.build(support.family_or_skip(family)) for _ in range(2)]
    for each in models_of:
        each.__class__ = forgetful(type(each))
    right = replied(models_of[0], "cpu")
    model = support.spread(models_of[1], places)
    shard(model).mode = "graph"
    assert replied(model, places[0]) == right
    assert right != replied(models.build(family), "cpu")


def longer(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def test_the_mask_that_generate_has_made_longer_is_known() -> None:
    watch, first = MaskWatch(), torch.ones(2, 5, dtype=torch.int64)
    second = longer(first)
    assert not watch.is_one_longer(first)
    watch.note_growth(first, second)
    assert watch.is_one_longer(second)
    assert not watch.is_one_longer(longer(second))


def test_a_mask_that_was_changed_before_or_after_it_got_longer_is_not_known() -> None:
    for change_before, change_after in ((True, False), (False, True)):
        watch, first = MaskWatch(), torch.ones(2, 5, dtype=torch.int64)
        watch.is_one_longer(first)
        if change_before:
            first[0, 0] = 0
        second = longer(first)
        watch.note_growth(first, second)
        if change_after:
            second[0, 0] = 0
        assert not watch.is_one_longer(second)


def test_a_step_without_a_mask_follows_one_without() -> None:
    watch, mask = MaskWatch(), torch.ones(1, 3, dtype=torch.int64)
    answers = [watch.is_one_longer(each) for each in (None, None, mask, None, None)]
    assert answers == [False, True, False, False, True]


def test_no_mask_is_kept_alive() -> None:
    watch, mask = MaskWatch(), torch.ones(1, 3, dtype=torch.int64)
    watch.is_one_longer(mask)
    grown = longer(mask)
    watch.note_growth(mask, grown)
    del mask, grown
    assert not watch.is_one_longer(torch.ones(1, 4, dtype=torch.int64))


def test_what_does_not_count_its_changes_is_not_known() -> None:
    with torch.inference_mode():
        watch, mask = MaskWatch(), torch.ones(1, 3, dtype=torch.int64)
        watch.is_one_longer(mask)
        grown = longer(mask)
        watch.note_growth(mask, grown)
        assert not watch.is_one_longer(grown)


def own_loop(model: Any, cache: Any, steps: list[dict[str, Any]]) -> list[Tensor]:
    """The logits of steps behind a padded prompt.

    Args:
        model, cache: what runs.
        steps: of each how many tokens it has ("tokens", 1), whether it gives positions ("positions") and a mask
            ("mask": "ours", "hides" some, or None), and how many tokens are taken back after it ("crop").
    """
    place = next(model.parameters()).device
    ids, mask = support.prompts(2).values()
    ids = torch.cat([ids, torch.randint(5, 150, (2, 64), generator=torch.manual_seed(0))], 1)
    mask = torch.cat([mask, torch.ones(2, 64, dtype=torch.int64)], 1)
    positions, logits, begin = (mask.cumsum(-1) - 1).clamp(min=0), [], 0
    for step in [{"tokens": 9, "positions": True, "mask": "ours"}, *steps]:
        end = begin + step.get("tokens", 1)
        given = {"input_ids": ids[:, begin:end]}
        if step.get("positions"):
            given["position_ids"] = positions[:, begin:end]
        if step.get("mask"):
            given["attention_mask"] = mask[:, :end].clone()
            if step["mask"] == "hides":
                given["attention_mask"][:, 3:8] = 0
        with torch.no_grad():
            given = {name: tensor.to(place) for name, tensor in given.items()}
            logits.append(model(**given, past_key_values=cache, use_cache=True).logits.float().cpu())
        if step.get("crop"):
            cache.crop(-step["crop"])
        begin = end - step.get("crop", 0)
    return logits


GIVEN = {"positions": True, "mask": "ours"}
NOT_GIVEN = {"mask": "ours"}
LOOPS: dict[str, list[dict[str, Any]]] = {
    "positions-come-and-go": [GIVEN] * 5 + [NOT_GIVEN] * 3 + [GIVEN] * 5,
    "a-mask-comes-late": [{}] * 4 + [{"mask": "hides"}] * 4 + [{}] * 3,
    "other-numbers-of-tokens-between": [
        *[{"positions": True, "tokens": 3}] * 4,
        *[{"positions": True, "mask": "hides"}] * 4,
        {"positions": True, "tokens": 3, "crop": 3},
        *[{"positions": True}] * 4,
    ],
}


@pytest.mark.skipif(Version("5") > Version(transformers.__version__), reason="this transformers has caches of tuples")
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])  # the second counts the tokens that a mask shows
@pytest.mark.parametrize("steps", LOOPS.values(), ids=LOOPS)
def test_a_step_is_given_what_it_was_called_with(
    devices: support.Devices, family: str, steps: list[dict[str, Any]]
) -> None:
    plain = models.build(family)
    model = support.spread(models.build(family), devices.up_to(2))
    sharding = shard(model)
    sharding.mode = "graph"
    expected = own_loop(plain, compat.empty_dynamic_cache(plain), steps)
    for ours, right in zip(own_loop(model, sharding.new_cache(), steps), expected, strict=True):
        assert torch.allclose(ours, right, atol=1e-3)


def test_an_own_way_of_growing_masks_on_the_model_itself_is_obeyed(devices: support.Devices) -> None:
    def with_own_way(model: Any) -> Any:
        grow = type(model)._update_model_kwargs_for_generation

        def forget(self: Any, *args: Any, **kwargs: Any) -> Any:
            grown = grow(self, *args, **kwargs)
            mask = grown["attention_mask"].clone()
            mask[:, : mask.shape[1] // 2] = 0
            return {**grown, "attention_mask": mask}

        model._update_model_kwargs_for_generation = MethodType(forget, model)
        return model

    places = devices(2)
    right = replied(with_own_way(models.build("llama")), "cpu")
    model = support.spread(with_own_way(models.build("llama")), places)
    shard(model).mode = "graph"
    assert replied(model, places[0]) == right
    assert right != replied(models.build("llama"), "cpu")
