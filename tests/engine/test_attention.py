"""Attention of one token over a buffer: by every way the same, and transformers' own wherever it is not right."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine.graphs import attention
from tests import support
from tools import models

AttentionInterface = getattr(transformers, "AttentionInterface", None)
pytestmark = pytest.mark.skipif(AttentionInterface is None, reason="this transformers has no attention interface")
STEPS = 128
# Batch, heads, key heads, head size, room, begin and end of what is filled.
CASES = {
    "ungrouped": (1, 8, 8, 64, 512, 0, 300),
    "grouped": (1, 8, 2, 128, 1024, 0, 1000),
    "one-key-head": (3, 8, 1, 96, 768, 0, 500),
    "large-heads": (2, 4, 2, 256, 256, 0, 77),
    "window": (1, 6, 2, 64, 512, 300, 320),
    "odd-sizes": (2, 3, 3, 80, 272, 7, 210),
    "one-token": (1, 4, 4, 16, 256, 255, 256),
}


def given(place: str, dtype: torch.dtype, case: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Query, keys, values, mask and scale. The first row of a batch is padded on the left."""
    batch, heads, key_heads, size, room, begin, end = CASES[case]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, 1, size, generator=generator)
    keys, values = (torch.randn(batch, key_heads, room, size, generator=generator) for _ in range(2))
    mask = torch.full((batch, 1, 1, room), torch.finfo(dtype).min)
    mask[..., begin:end] = 0
    if batch > 1:
        mask[0, ..., : begin + 9] = torch.finfo(dtype).min
    query, keys, values, mask = (each.to(dtype).to(place) for each in (query, keys, values, mask))
    return query, keys, values, mask, size**-0.5


def expected(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[batch, 1, heads, head size], written out in float64."""
    query, keys, values, mask = (each.cpu().double() for each in (query, keys, values, mask))
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, 1) for each in (keys, values))
    scores = query @ keys.transpose(2, 3) * scale + mask
    return (scores.softmax(-1) @ values).transpose(1, 2)


TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float16", "bfloat16"])


@every_case
@every_dtype
def test_the_operator_attends_to_what_the_mask_shows(devices: support.Devices, dtype: torch.dtype, case: str) -> None:
    tensors = given(devices(1)[0], dtype, case)
    seen = torch.ops.sharded_kv.attend(*tensors)
    torch.testing.assert_close(seen.cpu().double(), expected(*tensors), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@every_case
@every_dtype
def test_every_way_of_a_gpu_gives_the_same(devices: support.Devices, dtype: torch.dtype, case: str) -> None:
    if devices.kind != "cuda":
        pytest.skip("these are kernels of real GPUs")
    tensors = given(devices(1)[0], dtype, case)
    ways = attention.ways_for(*tensors[:4])
    assert {"rows", "grouped", "split keys"} <= set(ways)
    for way in ways.values():
        seen = way(*tensors).cpu().double()
        torch.testing.assert_close(seen, expected(*tensors), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@every_case
def test_the_kernel_never_reads_what_is_masked(devices: support.Devices, case: str) -> None:
    if devices.kind != "cuda":
        pytest.skip("without a GPU the interpreter tries the kernel")
    from extensions.sharded_kv.engine.graphs import split_keys

    check_that_nan_is_not_read(split_keys, devices(1)[0], case)


def test_the_interpreted_kernel_gives_the_same_and_reads_nothing_that_is_masked(devices: support.Devices) -> None:
    if devices.kind == "cuda":
        pytest.skip("a real GPU tries the kernel itself")
    if find_spec("triton") is None:  # not imported here: it complains when a process ends
        pytest.skip("this stack has no Triton")
    code = "from tests.engine import test_attention as t; t.check_all_interpreted()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-5000:]


def check_all_interpreted() -> None:
    """Of the test above, in a process whose Triton interprets."""
    from extensions.sharded_kv.engine.graphs import split_keys

    for case in CASES:
        check_that_nan_is_not_read(split_keys, "cpu", case)


def check_that_nan_is_not_read(split_keys: Any, place: str, case: str) -> None:
    query, keys, values, mask, scale = given(place, torch.float32, case)
    right = expected(query, keys, values, mask, scale)
    is_masked = (mask < 0)[:, 0, 0, :, None].expand(-1, -1, keys.shape[3])[:, None]
    for tensor in (keys, values):
        tensor.masked_fill_(is_masked, torch.nan)
    seen = split_keys.attend(query, keys, values, mask, scale)
    torch.testing.assert_close(seen.cpu().double(), right, rtol=1e-5, atol=1e-5)


# --- which way ------------------------------------------------------------------------------------------------------


class Ways:
    """Ways of one's own in the place of a GPU's, each as long as `times` says.

    Args:
        monkeypatch: takes them back.
        times: milliseconds by name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
        self.times = times
        self.ways = {name.replace("_", " "): self.right for name in times}
        self.is_capturing = False
        monkeypatch.setattr(attention, "_by_speed", {})
        monkeypatch.setattr(attention, "ways_for", lambda *tensors: self.ways)
        monkeypatch.setattr(attention, "measure", self.measure)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        self.measured: list[str] = []

    def add(self, name: str, way: attention.Way) -> None:
        """One more, the quickest of all."""
        self.ways[name] = way
        self.times[name] = 0

    def measure(self, run: Any, device: torch.device) -> float:
        """What attention.measure() would say."""
        name = next(name for name, way in self.ways.items() if way is run.func)
        self.measured.append(name)
        return self.times[name.replace(" ", "_")]

    @property
    def right(self) -> attention.Way:
        """A function of its own each time."""
        return lambda *tensors: attention.as_rows(*tensors)

    def choose(self, room: int = 512) -> str:
        """The name of the way that is chosen over so many tokens."""
        query, keys, values, mask, scale = given("cpu", torch.float32, "grouped")
        seen = [each[:, :, :room] for each in (keys, values)]
        way = attention.quickest(query, *seen, mask[..., :room], scale)
        return next((name for name, each in self.ways.items() if each is way), "torch's own")


def test_the_quickest_way_is_chosen_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, rows=3, grouped=1, pieces=2)
    assert [ways.choose(), ways.choose()] == ["grouped", "grouped"]
    assert ways.measured == ["rows", "grouped", "pieces"]


def test_more_tokens_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, rows=1, grouped=2)
    assert ways.choose() == "rows"
    ways.times["rows"] = 3
    assert ways.choose(1024) == "grouped"


def test_split_keys_that_were_quickest_once_are_chosen_for_more_tokens_unmeasured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = Ways(monkeypatch, rows=2, split_keys=1)
    assert ways.choose() == "split keys"
    ways.measured.clear()
    assert ways.choose(1024) == "split keys"
    assert not ways.measured


def test_a_way_that_gives_something_else_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, rows=2, grouped=1)
    ways.add("wrong", lambda *tensors: attention.as_rows(*tensors) * 1.01)
    assert ways.choose() == "grouped"


def test_a_way_that_gives_nan_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, rows=2)
    ways.add("wrong", lambda *tensors: attention.as_rows(*tensors) * torch.nan)
    assert ways.choose() == "rows"


def test_a_way_that_fails_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tensors: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    ways = Ways(monkeypatch, rows=2)
    ways.add("broken", fail)
    assert ways.choose() == "rows"


def test_without_memory_to_measure_torchs_own_is_taken_until_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tensors: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    ways = Ways(monkeypatch, grouped=1)
    ways.add("large", fail)
    assert ways.choose() == "torch's own"
    del ways.ways["large"]
    assert ways.choose() == "grouped"


def test_nothing_is_measured_while_a_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(monkeypatch, grouped=1)
    ways.is_capturing = True
    assert ways.choose() == "torch's own"
    assert not ways.measured


@every_case
def test_torchs_ways_give_the_same_on_any_device(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(attention, "_kernel", lambda: None)
    tensors = given("cpu", torch.float32, case)
    ways = attention.ways_for(*tensors[:4])
    for name in ("rows", "grouped"):
        seen = ways[name](*tensors).double()
        torch.testing.assert_close(seen, expected(*tensors), rtol=1e-5, atol=1e-5)


# --- in models ------------------------------------------------------------------------------------------------------


def forced(model: Any, sharding: Sharding, mode: str, place: str) -> Tensor:
    """The logits of a reply whose tokens are given, [steps, vocabulary]."""
    sharding.mode = mode
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, models.VOCAB_SIZE - 5, (1, 9 + STEPS), generator=generator).to(place)
    cache = sharding.new_cache()
    logits = []
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache, use_cache=True)
        for index in range(9, 9 + STEPS):
            out = model(ids[:, index : index + 1], past_key_values=cache, use_cache=True)
            logits.append(out.logits[0, -1].float().cpu())
    return torch.stack(logits)


FAMILIES = [name for name, family in models.FAMILIES.items() if not family.is_encoder_decoder]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_of_a_long_reply_are_those_of_eager_mode(devices: support.Devices, name: str) -> None:
    places = devices.up_to(2)
    model = support.spread(models.build(support.family_or_skip(name)), places)
    sharding = shard(model)
    eager, graph = (forced(model, sharding, mode, places[0]) for mode in ("eager", "graph"))
    assert (graph - eager).abs().max() <= 1e-5 * eager.abs().max()
    sharding.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding"])
def test_16_bit_logits_are_no_further_from_float32s_than_in_eager_mode(
    devices: support.Devices, name: str, dtype: torch.dtype
) -> None:
    places = devices.up_to(2)
    exact, model = (
        support.spread(models.build(support.family_or_skip(name), of), places) for of in (torch.float32, dtype)
    )
    whole, sharding = shard(exact), shard(model)
    right = forced(exact, whole, "eager", places[0])
    eager, graph = ((forced(model, sharding, mode, places[0]) - right).abs() for mode in ("eager", "graph"))
    assert graph.mean() <= 1.1 * eager.mean()
    assert graph.max() <= 1.5 * eager.max()


@pytest.fixture
def registered() -> Iterator[Any]:
    """What transformers has for sdpa; it is there afterwards."""
    theirs = AttentionInterface()["sdpa"]
    yield theirs
    assert AttentionInterface()["sdpa"] is theirs


def test_transformers_has_its_own_attention_back_after_each_step(devices: support.Devices, registered: Any) -> None:
    places = devices.up_to(2)
    model = support.spread(models.build("llama-gqa"), places)
    sharding = shard(model)
    sharding.mode = "graph"
    ids = support.prompts(1)["input_ids"].to(places[0])
    cache = sharding.new_cache()
    with torch.no_grad():
        for _ in range(6):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            assert AttentionInterface()["sdpa"] is registered
    assert sharding.reason_for_eager == ""


def test_another_thread_has_transformers_attention_meanwhile(registered: Any) -> None:
    tensors = given("cpu", torch.float32, "grouped")
    query, keys, values, mask, scale = tensors
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    calls: list[str] = []
    with attention.over_buffers("sdpa"):
        there = AttentionInterface()["sdpa"]

        def attend() -> None:
            with _Names(calls):
                there(module, query, keys, values, mask, scaling=scale)

        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
        assert not any("sharded_kv" in call for call in calls)
        attend()
        assert calls[-1] == "sharded_kv::attend"


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.5}, {"position_bias": torch.zeros(1, 8, 1, 1024)}, {"attention_mask": None}],
    ids=["dropout", "position-bias", "no-mask"],
)
def test_what_the_operator_does_not_know_is_transformers_own(registered: Any, options: dict[str, Any]) -> None:
    query, keys, values, mask, scale = given("cpu", torch.float32, "grouped")
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    calls: list[str] = []
    with attention.over_buffers("sdpa"), _Names(calls):
        AttentionInterface()["sdpa"](
            module, query, keys, values, **{"attention_mask": mask, "scaling": scale, **options}
        )
    assert calls
    assert "sharded_kv::attend" not in calls


def without_a_mask(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Any:
    """Attention as flash attention has it: causal, with a window, and of a mask only which tokens count."""
    assert attention_mask is None or attention_mask.dim() == 2
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    new, all_tokens = scores.shape[2:]
    own, place = torch.arange(new)[:, None] + all_tokens - new, torch.arange(all_tokens)
    is_seen = (place <= own) & (place > own - (sliding_window or all_tokens))
    is_seen = is_seen.to(query.device)[None, None]
    if attention_mask is not None:
        is_seen = is_seen & (attention_mask[:, None, None, -all_tokens:] != 0)
    weights = scores.masked_fill(~is_seen, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "mistral-sliding"])
def test_attention_that_takes_no_mask_has_graphs(
    devices: support.Devices, monkeypatch: pytest.MonkeyPatch, family: str, batch: int
) -> None:
    masks = pytest.importorskip("transformers.masking_utils")
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash", without_a_mask)
    monkeypatch.setitem(masks.AttentionMaskInterface._global_mapping, "flash", masks.flash_attention_mask)

    def replied(model: Any) -> list[list[int]]:
        model.config._attn_implementation = "flash"
        place = next(model.parameters()).device
        inputs = {name: tensor.to(place) for name, tensor in support.prompts(batch).items()}
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=30, min_new_tokens=30)
        return list(tokens.tolist())

    right = replied(models.build(support.family_or_skip(family)))
    model = support.spread(models.build(family), devices.up_to(2))
    sharding = shard(model)
    sharding.mode = "graph"
    for _ in range(2):
        assert replied(model) == right
    assert sharding.reason_for_eager == ""
    assert AttentionInterface()["flash"] is without_a_mask


class _Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Takes down the names of the operators that run."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
