"""Models with recurrent states in graph mode: what a step adds to them is added once, whatever becomes of the step."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine import compat
from extensions.sharded_kv.engine.graphs import capture
from extensions.sharded_kv.engine.graphs.decode import DecodeGraph
from extensions.sharded_kv.engine.placement import CACHE_NAMES
from extensions.sharded_kv.engine.transfers import ForwardState
from tests import support
from tools import models, simulated

pytestmark = pytest.mark.skipif(
    Version("5.14") > Version(transformers.__version__), reason="older recurrent layers stay transformers' own"
)
TOKENS = 24
_COMMON = {
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": models.MAX_POSITIONS,
    "pad_token_id": models.PAD_ID,
    "bos_token_id": models.BOS_ID,
    "eos_token_id": models.EOS_ID,
}
_BY_TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_DELTA = {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
# A convolution alone, state space, gated delta rule, states and keys in one layer, experts, no keys at all.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "bamba": ("BambaConfig", {"attn_layer_indices": [1, 3], **_MAMBA}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **_BY_TURNS,
            **_DELTA,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "falcon-h1": (
        "FalconH1Config",
        {**_MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 64, "head_dim": 16},
    ),
    "jamba": (
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 8, "use_associative_scan": False}),
    "mamba2": ("Mamba2Config", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "granite": (
        "GraniteMoeHybridConfig",
        {**_BY_TURNS, **_MAMBA, "shared_intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}
WITH_EXPERTS = ("qwen3-next", "jamba", "granite")
every_model = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices.up_to(2)


def build(name: str, places: list[str]) -> Any:
    config, settings = CONFIGS[name]
    made = getattr(transformers, config)(**{**_COMMON, **settings})
    return support.spread(models.build(made), places)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every step that is captured."""
    made: list[object] = []

    class CapturedStep(capture.CapturedStep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(capture, "CapturedStep", CapturedStep)
    return made


def reply(model: Any, tokens: int = TOKENS, **options: Any) -> list[list[int]]:
    place = model.get_input_embeddings().weight.device
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(2).items()}
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    replied: list[list[int]] = out.tolist()
    return replied


def in_graph_mode(model: Any) -> Sharding:
    sharding = shard(model)
    sharding.mode = "graph"
    return sharding


@every_model
def test_replies_come_from_graphs_and_the_next_reply_finds_them(
    places: list[str], captures: list[object], name: str
) -> None:
    model = build(name, places)
    right = reply(model)
    sharding = in_graph_mode(model)
    assert reply(model) == right
    assert sharding.reason_for_eager == ""
    assert len(captures) == 1
    assert reply(model) == right
    assert len(captures) == 1
    sharding.detach()
    assert reply(model) == right


@every_model
def test_beams_take_their_states_along(devices: support.Devices, places: list[str], name: str) -> None:
    model = build(name, places)
    right = reply(model, num_beams=2)
    sharding = in_graph_mode(model)
    assert reply(model, num_beams=2) == right
    # Outside of plain decoding transformers groups experts, and torch's kernel for that waits where it is float32.
    if devices.kind == "sim" or name not in WITH_EXPERTS:
        assert sharding.reason_for_eager == ""


@every_model
@pytest.mark.parametrize("method", ["_capture", "_verify"])
def test_a_step_that_fails_in_graph_mode_leaves_the_states_as_they_were(
    places: list[str], monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    def fail(graph: DecodeGraph, *args: Any) -> None:
        original(graph, *args)
        raise RuntimeError("no graphs today")

    model = build(name, places)
    right = reply(model)
    sharding = in_graph_mode(model)
    original: Callable[..., None] = getattr(DecodeGraph, method)
    monkeypatch.setattr(DecodeGraph, method, fail)
    assert reply(model) == right
    assert "no graphs today" in sharding.reason_for_eager
    assert sharding.enabled


@every_model
def test_memory_that_runs_out_in_graph_mode_costs_no_reply(devices: support.Devices, name: str) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities can be set on simulated devices")
    model = build(name, devices(2))
    simulated.reset_peak()
    right = reply(model)
    room = [int(simulated.peak(index) * 1.02) for index in range(2)]
    sharding = in_graph_mode(model)
    try:
        for index, size in enumerate(room):
            simulated.set_capacity(index, size)
        assert reply(model) == right
    finally:
        for index in range(2):
            simulated.set_capacity(index, None)
    assert sharding.failure == ""


@every_model
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_prompt_that_runs_out_of_memory_halfway_is_read_again(places: list[str], name: str, mode: str) -> None:
    def once(*args: Any, **kwargs: Any) -> Any:
        later.forward = forward
        raise torch.cuda.OutOfMemoryError("today there is none")

    model = build(name, places)
    right = reply(model)
    sharding = shard(model)
    sharding.mode = mode
    later: Any = model.base_model.layers[3]
    forward, later.forward = later.forward, once
    assert reply(model) == right
    assert reply(model) == right
    assert sharding.failure == ""


@every_model
def test_an_error_of_ours_costs_no_reply_in_a_prompt_and_gives_no_wrong_token_in_a_step(
    places: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = build(name, places)
    right = reply(model)
    sharding = shard(model)
    with monkeypatch.context() as patch:
        support.FailsLater(patch, ForwardState, "move_inputs", 3, TypeError("of ours"))
        assert reply(model) == right
    sharding.enable()
    with monkeypatch.context() as patch:  # states have no past to go back to
        support.FailsLater(patch, ForwardState, "move_inputs", 60, TypeError("of ours"))
        with pytest.raises(TypeError, match="of ours"):
            reply(model)
    sharding.enable()
    assert reply(model) == right


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_so_does_one_in_a_step_on_a_cache_of_the_callers_own(
    places: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = build(name, places)
    shard(model)
    takes = inspect.signature(model.forward).parameters
    argument = next(each for each in CACHE_NAMES if each in takes)
    support.FailsLater(monkeypatch, ForwardState, "move_inputs", 60, TypeError("of ours"))
    with pytest.raises(TypeError, match="of ours"):
        reply(model, **{argument: transformers.DynamicCache(config=model.config)})


@pytest.mark.parametrize("kind", ["conv", "recurrent"])
def test_a_cache_of_states_alone_has_no_length_once_it_holds_any(kind: str) -> None:
    from transformers import cache_utils

    cache, states = transformers.DynamicCache(), cache_utils.LinearAttentionLayer()
    empty = getattr(
        cache_utils, "DummyLayer", cache_utils.LinearAttentionLayer
    )()  # 5.17 has no layer that keeps nothing
    cache.layers = [empty, states]
    assert compat.cache_length(cache) == 0
    getattr(states, f"update_{kind}_state")(torch.ones(1, 4, 4))
    assert compat.cache_length(cache) is None


def test_a_copy_of_the_cache_goes_on_by_itself(places: list[str]) -> None:
    def tokens_of(cache: Any, ids: Tensor, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            tokens += ids.flatten().tolist()
        return tokens

    model = build("falcon-h1", places)
    sharding = in_graph_mode(model)
    ids = support.prompts(1)["input_ids"].to(places[0])
    cache = sharding.new_cache()
    with torch.no_grad():
        last = tokens_of(cache, ids, 8)[-1]
        next_id = torch.full((1, 1), last, device=ids.device)
        copied, saved = copy.deepcopy(cache), io.BytesIO()
        torch.save(cache, saved)
        right = tokens_of(cache, next_id, 8)
        assert sharding.reason_for_eager == ""
        assert tokens_of(copied, next_id, 8) == right
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        assert type(loaded) is transformers.DynamicCache
        assert tokens_of(loaded, next_id, 8) == right


def test_a_model_that_counts_its_tokens_in_its_own_way_has_its_own_positions(places: list[str]) -> None:
    def tokens_of(cache: Any) -> list[int]:
        ids, tokens = support.prompts(1)["input_ids"].to(places[0]), []
        for _ in range(10):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            tokens += ids.flatten().tolist()
        return tokens

    model = build("bamba", places)  # in transformers 5.23 each token without position_ids is at the text's beginning
    with torch.no_grad():
        right = tokens_of(transformers.DynamicCache(config=model.config))
        sharding = in_graph_mode(model)
        assert tokens_of(sharding.new_cache()) == right
    assert "pass them" in sharding.reason_for_eager


def test_a_model_that_keeps_its_states_elsewhere_stays_eager(places: list[str]) -> None:
    config = transformers.RecurrentGemmaConfig(
        **{**_COMMON, "num_hidden_layers": 6}, lru_width=64, attention_window_size=16
    )
    model = support.spread(models.build(config), places)
    right = reply(model)
    sharding = in_graph_mode(model)
    assert reply(model) == right
    assert sharding.reason_for_eager


class Remembers(nn.Module):
    """Adds what it was given before, which it keeps itself."""

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner, self.way = inner, way
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        last = out[:, -1:].detach()
        if self.seen is None or self.seen.shape != last.shape:
            self.seen = last.clone()
        elif self.way == "anew":
            self.seen = self.seen * 0.5 + last
        else:
            self.seen.mul_(0.5).add_(last)
        return out + self.seen


@pytest.mark.parametrize("way", ["anew", "in-place"])
def test_what_a_module_remembers_from_step_to_step_is_added_once(places: list[str], way: str) -> None:
    model = models.build("llama", num_hidden_layers=4)
    layer: Any = model.model.layers[2]
    layer.mlp = Remembers(layer.mlp, way)
    model = support.spread(model, places)
    right = reply(model)
    layer.mlp.seen = None
    sharding = in_graph_mode(model)
    assert reply(model) == right
    assert "keeps" in sharding.reason_for_eager
