"""What one decode step moves: hidden states, each shared input once per device, and logits; nothing of the cache."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from extensions.sharded_kv import shard
from tests import support
from tools import models
from tools.traffic import between_gpus

FAMILIES = (
    "llama",
    "llama-gqa",
    "gptj",
    "gpt-neox",
    "opt",
    "bloom",
    "mpt",
    "falcon",
    "mistral-sliding",
    "mixtral",
    "gemma2",
)
READ_POSITIONS = ("gptj",)  # in their layers
Pair = tuple[str, str]


def decode_step(model: nn.Module, inputs: dict[str, Tensor], cache: Any, **options: Any) -> Any:
    """One forward with one new token per prompt and the cache of all before it."""
    step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"], **options}
    with torch.no_grad():
        return model(**step, past_key_values=cache, use_cache=True)


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The cache of all tokens but the last."""
    with torch.no_grad():
        return model(**{name: tensor[:, :-1] for name, tensor in inputs.items()}, use_cache=True).past_key_values


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Inputs:
    """What each layer of the unspread model gets in one decode step: the hidden states, and inputs shared by layers.

    Args:
        model: the model, on the CPU.
        layers: names of the layers that run in the step.
        step: runs it, and returns the model's output.
    """

    def __init__(self, model: nn.Module, layers: list[str], step: Callable[[], Any]) -> None:
        self.hidden: list[Tensor] = []
        self.others: list[list[Tensor]] = []
        hooks = [model.get_submodule(name).register_forward_pre_hook(self._note, with_kwargs=True) for name in layers]
        self.output = step()
        for hook in hooks:
            hook.remove()
        seen_by = Counter(id(tensor) for layer in self.others for tensor in layer)
        # Handed to all layers: masks, positions, rotary tables. Handed to one alone: that layer's cache.
        self.shared = {id(t): t for layer in self.others for t in layer if seen_by[id(t)] > 1}

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = list(_tensors((args, kwargs)))
        self.hidden.append(tensors[0])
        self.others.append(tensors[1:])

    def expected(self, owners: list[str], main: str, head: str) -> tuple[Counter[Pair], Counter[Pair]]:
        """Copies and bytes for layers on `owners`; shared inputs are made on `main`, and the logits wanted there."""
        copies: Counter[Pair] = Counter()
        sizes: Counter[Pair] = Counter()

        def cross(tensor: Tensor, source: str, target: str) -> None:
            if source != target:
                copies[source, target] += 1
                sizes[source, target] += size(tensor)

        here, reached = main, {(key, main) for key in self.shared}
        for owner, hidden, others in zip(owners, self.hidden, self.others, strict=True):
            cross(hidden, here, owner)
            here = owner
            for tensor in others:
                if id(tensor) in self.shared and (id(tensor), owner) not in reached:
                    reached.add((id(tensor), owner))
                    cross(tensor, main, owner)
        cross(self.hidden[-1], here, head)
        cross(self.output.logits, head, main)
        return copies, sizes


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@pytest.mark.parametrize("order", ["01", "012", "0123", "0101", "011000"], ids=lambda order: "-".join(order))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_moves_hidden_states_shared_inputs_and_logits_once_and_no_cache(
    devices: support.Devices, family: str, order: str
) -> None:
    inputs = support.prompts()
    plain = models.build(support.family_or_skip(family))
    cache = prefill(plain, inputs)
    expected = Inputs(plain, list(models.block_names(plain)), lambda: decode_step(plain, inputs, cache))
    places = [devices(int(max(order)) + 1)[int(digit)] for digit in order]
    model = models.build(family)
    device_map = models.device_map(model, places)
    owners = [str(device_map[name]) for name in models.block_names(model)]
    model = support.spread(model, places, device_map=device_map)
    shard(model)
    on_main = {name: tensor.to(places[0]) for name, tensor in inputs.items()}
    cache = prefill(model, on_main)

    with devices.traffic() as traffic:
        output = decode_step(model, on_main, cache)

    last_norm_and_head = str(model.get_output_embeddings().weight.device)
    copies, sizes = expected.expected(owners, places[0], last_norm_and_head)
    assert between_gpus(traffic.copies) == dict(copies)
    assert between_gpus(traffic.bytes) == dict(sizes)
    assert torch.equal(output.logits.argmax(-1).cpu(), expected.output.logits.argmax(-1))


def last_token(model: nn.Module, inputs: dict[str, Tensor], traffic: Any, tokens: int = 6) -> tuple[Any, Any]:
    """What a reply's last token has moved: copies and bytes of each pair of devices."""
    seen: list[tuple[Counter[Pair], Counter[Pair]]] = []

    def note(*_: Any) -> Any:
        seen.append((Counter(between_gpus(traffic.copies)), Counter(between_gpus(traffic.bytes))))
        return False

    with torch.no_grad():
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([note]),
        )
    (copies_before, bytes_before), (copies, sizes) = seen[-2:]
    return dict(copies - copies_before), dict(sizes - bytes_before)


@pytest.mark.parametrize("order", ["01", "0123", "011000"], ids=lambda order: "-".join(order))
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "gptj", "gpt-neox", "opt", "mixtral", "mistral-sliding"])
def test_a_step_in_graph_mode_moves_no_mask_and_nothing_that_nobody_reads(
    devices: support.Devices, family: str, order: str, is_padded: bool
) -> None:
    inputs = support.prompts()
    if not is_padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    plain = models.build(support.family_or_skip(family))
    cache = prefill(plain, inputs)
    positions = inputs["attention_mask"].cumsum(-1)[:, -1:] - 1
    given = {"position_ids": positions} if "position_ids" in inspect.signature(plain.forward).parameters else {}
    expected = Inputs(plain, list(models.block_names(plain)), lambda: decode_step(plain, inputs, cache, **given))
    rotary = {key: tensor for key, tensor in expected.shared.items() if tensor.is_floating_point() and tensor.dim() < 4}
    expected.shared = {**rotary, **({id(positions): positions} if family in READ_POSITIONS else {})}
    places = [devices(int(max(order)) + 1)[int(digit)] for digit in order]
    model = models.build(family)
    device_map = models.device_map(model, places)
    owners = [str(device_map[name]) for name in models.block_names(model)]
    model = support.spread(model, places, device_map=device_map)
    sharding = shard(model)
    sharding.mode = "graph"

    with devices.traffic() as traffic:
        copies, sizes = last_token(model, {name: tensor.to(places[0]) for name, tensor in inputs.items()}, traffic)

    if sharding.reason_for_eager:
        pytest.skip(sharding.reason_for_eager)
    head = str(model.get_output_embeddings().weight.device)
    assert (copies, sizes) == tuple(map(dict, expected.expected(owners, places[0], head)))


# BLOOM's blocks read what it makes of the mask on one GPU: that crosses, for as many tokens as there is room for.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_a_step_in_graph_mode_moves_less_than_accelerates(devices: support.Devices, family: str) -> None:
    places = devices(2)
    model = support.spread(models.build(support.family_or_skip(family)), places)
    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts().items()}
    with devices.traffic() as traffic:
        theirs = last_token(model, inputs, traffic)
    sharding = shard(model)
    sharding.mode = "graph"
    with devices.traffic() as traffic:
        ours = last_token(model, inputs, traffic)
    if sharding.reason_for_eager:
        pytest.skip(sharding.reason_for_eager)
    assert all(sum(mine.values()) < sum(its.values()) for mine, its in zip(ours, theirs, strict=True))


def test_a_decode_step_of_an_encoder_decoder_model_moves_the_encoders_output_once_too(devices: support.Devices) -> None:
    inputs, places = support.prompts(), devices(2)
    plain, model = models.build("t5"), models.build("t5")
    layers = [name for name in models.block_names(plain) if name.startswith("decoder")]
    device_map = models.device_map(model, places)
    device_map.update({name: places[index * 2 // len(layers)] for index, name in enumerate(layers)})
    owners = [device_map[name] for name in layers]
    model = support.spread(model, places, device_map=device_map)
    shard(model)

    def encode(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            encoded = model.get_encoder()(**inputs)[0].to(inputs["input_ids"].device)
        return {"encoder_outputs": (encoded,), "attention_mask": inputs["attention_mask"]}

    def decode(model: Any, encoded: dict[str, Any], ids: Tensor, cache: Any = None) -> Any:
        with torch.no_grad():
            return model(**encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)

    ids, encoded = inputs["input_ids"], encode(plain, inputs)
    cache = decode(plain, encoded, ids[:, :-1]).past_key_values
    expected = Inputs(plain, layers, lambda: decode(plain, encoded, ids[:, -1:], cache))
    on_main = {name: tensor.to(places[0]) for name, tensor in inputs.items()}
    encoded = encode(model, on_main)
    cache = decode(model, encoded, on_main["input_ids"][:, :-1]).past_key_values
    with devices.traffic() as traffic:
        decode(model, encoded, on_main["input_ids"][:, -1:], cache)
    copies, sizes = expected.expected(owners, places[0], str(model.get_output_embeddings().weight.device))
    assert between_gpus(traffic.copies) == dict(copies)
    assert between_gpus(traffic.bytes) == dict(sizes)


def test_llama_on_two_devices_moves_these_bytes_per_token(devices: support.Devices) -> None:
    """The same by hand, for one prompt and seven tokens of context."""
    first, second = devices(2)
    model = support.spread(models.build("llama"), [first, second])
    shard(model)
    inputs = {name: tensor.to(first) for name, tensor in support.prompts(batch=1, length=8).items()}
    cache = prefill(model, inputs)
    with devices.traffic() as traffic:
        decode_step(model, inputs, cache)
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    moved = between_gpus(traffic.bytes)
    assert moved[second, first] == vocabulary * 4
    assert moved[first, second] >= hidden * 4
    assert moved[first, second] <= hidden * 4 + 2 * (hidden // 4) * 4 + 8 + 8 * 4  # + cos, sin, position, mask


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_off_again_moves_what_accelerate_moves_to_the_byte(devices: support.Devices, family: str) -> None:
    places = devices(2)
    model = support.spread(models.build(family), places)

    def replied() -> tuple[dict[Pair, int], dict[Pair, int]]:
        with devices.traffic() as traffic:
            support.GREEDY.run(model, places[0])
        return between_gpus(traffic.copies), between_gpus(traffic.bytes)

    before = replied()
    sharding = shard(model)
    on = replied()
    sharding.disable()
    assert replied() == before
    sharding.enable()
    assert replied() == on
    assert sum(on[1].values()) < sum(before[1].values())


def test_the_meter_counts_what_crossed(devices: support.Devices) -> None:
    places = devices(3)
    model = support.spread(models.build("llama"), places)
    meter = shard(model).meter
    with devices.traffic() as traffic:
        support.GREEDY.run(model, places[0])
    counted = meter.snapshot().traffic
    assert dict(counted.copies) == between_gpus(traffic.copies)
    assert dict(counted.bytes) == between_gpus(traffic.bytes)


def test_entering_a_stage_switches_the_current_device_once(devices: support.Devices) -> None:
    if devices.kind != "sim":
        pytest.skip("switches are counted on simulated devices")
    places = devices(2)
    model = support.spread(models.build("llama"), places)
    shard(model)
    inputs = {name: tensor.to(places[0]) for name, tensor in support.prompts().items()}
    cache = prefill(model, inputs)
    with devices.traffic() as traffic:
        decode_step(model, inputs, cache)
    assert traffic.switches == 2  # into the second stage, and home
    assert devices.runtime.current_device() == 0


@pytest.mark.parametrize("way", ["beams", "contrastive"])
def test_a_cache_of_tuples_stays_through_beams_and_contrastive_search(devices: support.Devices, way: str) -> None:
    """On the stack of 2023; later ones keep the cache in an object."""
    chosen = next(one for one in support.WAYS if one.name == way)
    places = devices(2)
    model = support.spread(models.build("llama"), places)
    if not chosen.needs(model):
        pytest.skip(f"no {way} on this stack")
    shard(model)
    with devices.traffic() as traffic:
        chosen.run(model, places[0])
    rows = chosen.batch * (3 if way == "beams" else 4)  # beams, or candidates
    prompt = support.prompts()["input_ids"].shape[1]
    smallest_cache = 3 * 2 * rows * prompt * model.config.hidden_size * 4  # of the second device, after the prompt
    assert traffic.bytes[places[0], places[1]] < smallest_cache


def test_metering_and_moving_never_wait_for_a_device(devices: support.Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    places = devices(2)
    model = support.spread(models.build("llama"), places)
    meter = shard(model).meter

    def synchronize(device: object = None) -> None:
        raise AssertionError("waited for a device")

    monkeypatch.setattr(type(devices.runtime) if devices.kind == "sim" else devices.runtime, "synchronize", synchronize)
    support.GREEDY.run(model, places[0])
    meter.snapshot()
