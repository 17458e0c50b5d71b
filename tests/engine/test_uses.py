"""What people do with a spread model besides replying: graphs have accelerate's tokens, or step aside and come back."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from packaging.version import Version
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from extensions.sharded_kv import Sharding, shard
from tests import support
from tools import models, simulated

VERSION = Version(transformers.__version__)
pytestmark = pytest.mark.skipif(Version("4.44") > VERSION, reason="no graph mode with this transformers")
TOKENS = 20


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices.up_to(2)


@pytest.fixture
def model(places: list[str]) -> Any:
    return build(places)


@pytest.fixture
def sharding(model: Any) -> Sharding:
    return in_graph_mode(model)


def build(places: list[str], family: str = "llama", **options: Any) -> Any:
    options = {"num_hidden_layers": 4} | options
    return support.spread(models.build(support.family_or_skip(family), **options), places)


def in_graph_mode(model: Any) -> Sharding:
    sharding = shard(model)
    sharding.mode = "graph"
    return sharding


def reply(model: Any, tokens: int = TOKENS, seed: int = 0, **options: Any) -> list[list[int]]:
    """A greedy reply to one prompt."""
    ids = support.prompts(1, seed=seed)["input_ids"].to(place_of(model))
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | options
    with torch.no_grad():
        replied: list[list[int]] = model.generate(ids, **options).tolist()
    return replied


def place_of(model: Any) -> torch.device:
    return next(parameter.device for parameter in model.parameters())


def loop(
    model: Any, cache: Any, ids: Tensor, tokens: int = TOKENS, at: Callable[[int, Any], None] | None = None
) -> Any:
    """A greedy reply by a loop of one's own.

    Args:
        at: called after each token with its number and the cache.
    """
    replied = []
    with torch.no_grad():
        out = model(ids.to(place_of(model)), past_key_values=cache, use_cache=None)
        for index in range(tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            replied += token.flatten().tolist()
            if at is not None:
                at(index, out.past_key_values)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return replied


def by_accelerate(sharding: Sharding, run: Callable[[], Any]) -> Any:
    """What `run` gives with sharding off."""
    sharding.disable()
    try:
        return run()
    finally:
        sharding.enable()


class At(StoppingCriteria):
    """Does something after some tokens of a reply, and never stops it."""

    def __init__(self, length: int, do: Callable[[], None]) -> None:
        self._length, self._do = length, do

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if input_ids.shape[1] == self._length:
            self._do()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def at_token(number: int, do: Callable[[], None]) -> StoppingCriteriaList:
    """Criteria that do something after so many new tokens."""
    return StoppingCriteriaList([At(support.prompts(1)["input_ids"].shape[1] + number, do)])


# --- a cache that is changed, saved and kept --------------------------------------------------------------------------


def keys_of(cache: Any, layer: int) -> Any:
    return cache.layers[layer].keys if hasattr(transformers.DynamicCache(), "layers") else cache.key_cache[layer]


def values_of(cache: Any, layer: int) -> Any:
    return cache.layers[layer].values if hasattr(transformers.DynamicCache(), "layers") else cache.value_cache[layer]


def set_values(cache: Any, layer: int, values: Tensor) -> None:
    if hasattr(transformers.DynamicCache(), "layers"):
        cache.layers[layer].values = values
    else:
        cache.value_cache[layer] = values


CHANGES: dict[str, Callable[[Any], Any]] = {
    "added to": lambda cache: values_of(cache, 2)[:, :, 2:6].add_(3),
    "zeroed": lambda cache: values_of(cache, 1).zero_(),
    "indexed": lambda cache: keys_of(cache, 3).index_fill_(
        2, torch.tensor([1, 4], device=keys_of(cache, 3).device), 0.5
    ),
    "set": lambda cache: set_values(cache, 0, values_of(cache, 0) * 0.5),
    "cropped": lambda cache: cache.crop(-2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_is_changed_between_tokens_is_read_as_it_is_then(
    model: Any, sharding: Sharding, replays: list[object], change: str
) -> None:
    def at(index: int, cache: Any) -> None:
        if index in (5, 11):
            CHANGES[change](cache)

    ids = support.prompts(1)["input_ids"]
    plain = models.build("llama", num_hidden_layers=4)
    expected = loop(plain, transformers.DynamicCache(), ids, at=at)
    assert expected != loop(plain, transformers.DynamicCache(), ids)
    assert loop(model, sharding.new_cache(), ids, at=at) == expected
    assert replays


@pytest.mark.skipif(Version("4.45") > VERSION, reason="generate() asks an empty cache of the caller's for its length")
def test_a_cache_that_is_changed_before_and_between_replies_is_read_as_it_is_then(
    model: Any, sharding: Sharding, replays: list[object]
) -> None:
    def replies(model: Any, cache: Any) -> list[Any]:
        ids, replied = support.prompts(1)["input_ids"].to(place_of(model)), []
        for _ in range(3):
            with torch.no_grad():
                ids = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=8, min_new_tokens=8)
            replied.append(ids.tolist())
            CHANGES["added to"](cache)
        return replied

    expected = replies(models.build("llama", num_hidden_layers=4), transformers.DynamicCache())
    assert replies(model, sharding.new_cache()) == expected
    assert replays


def test_a_cache_can_be_saved_in_the_midst_of_a_reply(model: Any, sharding: Sharding, replays: list[object]) -> None:
    saved = io.BytesIO()

    def at(index: int, cache: Any) -> None:
        if index == 11:
            torch.save(cache, saved)

    ids = support.prompts(1)["input_ids"]
    plain, cache = models.build("llama", num_hidden_layers=4), transformers.DynamicCache()
    assert loop(model, sharding.new_cache(), ids, at=at) == loop(plain, cache, ids)
    assert replays
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert type(loaded) is transformers.DynamicCache
    assert loaded.get_seq_length() == ids.shape[1] + 11
    for layer in range(4):
        kept = keys_of(cache, layer)[:, :, : ids.shape[1] + 11]
        torch.testing.assert_close(keys_of(loaded, layer).cpu(), kept, rtol=1e-4, atol=1e-4)


def test_conversations_that_take_turns_each_have_graphs(model: Any, sharding: Sharding, replays: list[object]) -> None:
    plain = models.build("llama", num_hidden_layers=4)
    ours = {name: sharding.new_cache() for name in "AB"}
    theirs = {name: transformers.DynamicCache() for name in "AB"}
    for turn, name in enumerate("ABAB"):
        ids = support.prompts(1, seed=turn)["input_ids"]
        before = len(replays)
        assert loop(model, ours[name], ids) == loop(plain, theirs[name], ids)
        assert len(replays) - before >= TOKENS - 3
        assert sharding.reason_for_eager == ""


def test_the_cache_that_a_models_forward_makes_is_served_by_graphs(
    model: Any, sharding: Sharding, replays: list[object]
) -> None:
    if not hasattr(transformers.DynamicCache(), "layers"):
        pytest.skip("forwards of this transformers return a tuple if they were given no cache")
    ids = support.prompts(1)["input_ids"]
    plain = models.build("llama", num_hidden_layers=4)
    right = loop(plain, None, ids)
    for _ in range(2):
        assert loop(model, None, ids) == right
        assert sharding.reason_for_eager == ""
    assert replays


def test_a_reply_that_begins_its_cache_anew_goes_on_by_graphs(places: list[str], replays: list[object]) -> None:
    if Version("5.18") > VERSION:
        pytest.skip("an older Phi 3 is configured otherwise, or reads values back from its GPU")
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, **factors}
    config = transformers.Phi3Config(
        vocab_size=models.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=20,
        rope_parameters=rope,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = support.spread(transformers.Phi3ForCausalLM(config).eval(), places)
    sharding = in_graph_mode(model)
    right = by_accelerate(sharding, lambda: reply(model, tokens=30))
    replays.clear()
    assert reply(model, tokens=30) == right
    assert sharding.reason_for_eager == ""
    assert len(replays) > 20


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_after_a_reply_that_wanted_more_than_tokens_graphs_are_back(
    places: list[str], replays: list[object], wanted: str
) -> None:
    options = {"attn_implementation": "eager"} if wanted == "output_attentions" else {}
    model = build(places, **options)
    sharding = in_graph_mode(model)
    right = by_accelerate(sharding, lambda: reply(model))
    ids = support.prompts(1)["input_ids"].to(place_of(model))
    with torch.no_grad():
        model(ids, **{wanted: True})
        model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **{wanted: True})
    assert reply(model) == right
    assert sharding.reason_for_eager == ""
    assert replays


def test_hooks_that_a_decode_step_does_not_run_do_no_harm(places: list[str], replays: list[object]) -> None:
    model = build(places)
    model.tower = nn.Linear(4, 4).to(places[0])
    model.tower.register_forward_hook(lambda *_: None)
    model.tower.register_forward_pre_hook(functools.partial(lambda *_: None))
    model.tower.register_forward_hook(torch.no_grad()(lambda *_: None))  # decorated as the model's own functions are
    sharding = in_graph_mode(model)
    right = by_accelerate(sharding, lambda: reply(model))
    assert reply(model) == right
    assert sharding.reason_for_eager == ""
    assert replays


class Callable_:
    """A hook that is no function."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("kind", ["function", "partial", "object", "method"])
def test_a_hook_that_a_step_runs_is_run_once_for_each_token(model: Any, sharding: Sharding, kind: str) -> None:
    counted = Callable_()
    hooks: dict[str, Callable[..., Any]] = {
        "function": lambda *_: counted(),
        "partial": functools.partial(lambda *_: counted()),
        "object": counted,
        "method": counted.__call__,
    }
    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(hooks[kind])
    right = by_accelerate(sharding, lambda: reply(model))
    expected, counted.calls = counted.calls, 0
    assert reply(model) == right
    assert counted.calls == expected
    assert "hook is on model.layers.1.mlp" in sharding.reason_for_eager
    handle.remove()
    assert reply(model) == right
    assert sharding.reason_for_eager == ""


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_a_hook_that_comes_in_the_midst_of_a_reply_is_run_for_each_token_from_then_on(
    model: Any, sharding: Sharding, number: int
) -> None:
    def calls() -> int:
        counted, handles = Callable_(), []
        part = model.get_submodule("model.layers.1.mlp")
        reply(model, stopping_criteria=at_token(number, lambda: handles.append(part.register_forward_hook(counted))))
        handles[0].remove()
        return counted.calls

    assert calls() == by_accelerate(sharding, calls)


def test_a_hook_that_comes_and_goes_between_short_replies_leaves_nothing_behind(
    model: Any, sharding: Sharding, replays: list[object]
) -> None:
    right = by_accelerate(sharding, lambda: reply(model))
    reply(model, tokens=2)
    counted = Callable_()
    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(counted)
    reply(model, tokens=2)
    assert counted.calls == 2
    handle.remove()
    assert reply(model) == right
    assert sharding.reason_for_eager == ""
    assert replays


def test_a_hook_of_every_module_is_run_for_each_token(model: Any, sharding: Sharding) -> None:
    part = model.get_submodule("model.layers.1.mlp")

    def calls() -> int:
        counted = Callable_()
        count = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: counted() if module is part else None
        )
        try:
            reply(model)
        finally:
            count.remove()
        return counted.calls

    assert calls() == TOKENS
    assert "hook is on every module" in sharding.reason_for_eager


# --- a reason for everything that runs without graphs -----------------------------------------------------------------


def test_a_reply_without_a_cache_says_so(model: Any, sharding: Sharding) -> None:
    right = by_accelerate(sharding, lambda: reply(model))
    assert reply(model, use_cache=False) == right
    assert "without using its cache" in sharding.reason_for_eager


def test_a_model_without_keys_and_values_says_so(places: list[str]) -> None:
    if len(places) < 2:
        pytest.skip("needs two devices")
    special = {"pad_token_id": models.PAD_ID, "bos_token_id": models.BOS_ID, "eos_token_id": models.EOS_ID}
    config = transformers.OpenAIGPTConfig(vocab_size=models.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, **special)
    small = transformers.OpenAIGPTLMHeadModel(config)
    model = support.spread(small.eval(), places)
    sharding = in_graph_mode(model)
    right = by_accelerate(sharding, lambda: reply(model))
    assert reply(model) == right
    assert "no keys and values" in sharding.reason_for_eager


def test_a_hook_of_accelerates_kind_that_is_put_on_the_model_has_a_reason(model: Any, sharding: Sharding) -> None:
    class Halved(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            output.logits = output.logits / 2
            return output

    reply(model)
    add_hook_to_module(model, Halved(), append=True)
    replied = reply(model)
    # Before transformers 4.50 the part below the hook generates as well: that has graphs.
    has_graphs_below = hasattr(transformers.LlamaModel, "generate")
    assert ("hook is on the model" in sharding.reason_for_eager) != has_graphs_below
    assert replied == by_accelerate(sharding, lambda: reply(model))


def test_a_model_that_generates_nothing_says_so(places: list[str]) -> None:
    if hasattr(transformers.LlamaForSequenceClassification, "generate"):
        pytest.skip("before transformers 4.50 every model has a generate()")
    config = models.build("llama", num_hidden_layers=4).config
    model = support.spread(transformers.LlamaForSequenceClassification(config).eval(), places)
    sharding = in_graph_mode(model)
    with torch.no_grad():
        model(support.prompts(1)["input_ids"].to(places[0]))
    assert "no generate()" in sharding.reason_for_eager


# --- graphs are back once nothing stands in their way -----------------------------------------------------------------


class Noise(nn.Module):
    """A part of the model that draws random numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + 0 * torch.rand_like(x)


class Looks(Noise):
    """One that reads a value back from the GPU."""

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        assert float(y.float().abs().max()) < 1e6
        return y


class OnHost(Noise):
    """One whose weights its owner has left on the CPU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.low_rank = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + 0 * self.low_rank(x.cpu()).to(x.device)


@contextlib.contextmanager
def instead_of_a_block(model: Any, kind: type[Noise]) -> Iterator[None]:
    layer = model.model.layers[1]
    inner = layer.mlp
    layer.mlp = kind(inner)
    yield
    layer.mlp = inner


@pytest.mark.parametrize("kind", [Noise, Looks, OnHost], ids=lambda kind: kind.__name__)
def test_what_kept_a_step_from_being_captured_can_be_taken_out_again(
    model: Any, sharding: Sharding, replays: list[object], kind: type[Noise]
) -> None:
    right = by_accelerate(sharding, lambda: reply(model))
    with instead_of_a_block(model, kind):
        for _ in range(2):
            assert reply(model) == right
            assert sharding.reason_for_eager != ""
    assert not replays
    assert reply(model) == right
    assert sharding.reason_for_eager == ""
    assert replays


class Clips(nn.Module):
    """Sets what is too large to a number, which simulated devices refuse in a capture."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        out[out > 3] = 3
        return out


def test_tokens_are_drawn_after_a_capture_that_has_failed(devices: support.Devices, places: list[str]) -> None:
    model = models.build("llama", num_hidden_layers=4)
    layer: Any = model.model.layers[0]
    layer.mlp = Clips(layer.mlp)
    sharding = in_graph_mode(support.spread(model, places))
    ids = support.prompts(1)["input_ids"].to(places[0])
    with torch.no_grad():
        assert model.generate(ids, do_sample=True, max_new_tokens=9, min_new_tokens=9).shape[1] == ids.shape[1] + 9
    assert devices.kind == "cuda" or "could not be captured" in sharding.reason_for_eager


def test_an_error_of_the_models_own_is_raised_and_refuses_no_later_reply(
    model: Any, sharding: Sharding, replays: list[object]
) -> None:
    class Stops(Noise):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            if 2 <= self.calls <= 3:  # the first step after the prompt, by graphs and without
                raise InterruptedError("stop")
            return self.inner(x)

    right = by_accelerate(sharding, lambda: reply(model))
    with instead_of_a_block(model, Stops):
        with pytest.raises(InterruptedError):
            reply(model)
        assert reply(model) == right
        assert sharding.reason_for_eager == ""
    assert replays


def test_memory_that_was_short_for_one_reply_is_there_for_the_next(
    devices: support.Devices, model: Any, sharding: Sharding, replays: list[object]
) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities can be set on simulated devices")
    right = by_accelerate(sharding, lambda: reply(model))
    simulated.set_capacity(1, simulated.allocated(1) + 150_000)
    try:
        assert reply(model) == right
        assert "no room" in sharding.reason_for_eager
    finally:
        simulated.set_capacity(1, None)
    assert not replays
    assert reply(model) == right
    assert sharding.reason_for_eager == ""
    assert replays


# --- changes in the midst of a reply ----------------------------------------------------------------------------------


class Steered(nn.Module):
    """A layer that adds a vector once somebody has switched it on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.strength, self.table = inner, 0.0, {"on": False}

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y * (1.5 if self.table["on"] else 1 + self.strength)


def strengthen(model: Any) -> None:
    model.model.layers[2].mlp.strength = 0.5


def set_in_table(model: Any) -> None:
    model.model.layers[2].mlp.table["on"] = True


def add_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 1.5)


def exchange_weights(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.register_parameter("marker", None)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().flip(0), requires_grad=False)


def move_weights(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)


def change_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.inner.down_proj.weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [strengthen, set_in_table, add_hook, exchange_weights, move_weights, change_weights],
    ids=lambda it: it.__name__,
)
def test_what_is_changed_in_the_midst_of_a_reply_shows_in_the_next_token(
    places: list[str], replays: list[object], change: Callable[[Any], None]
) -> None:
    def replied(mode: str) -> list[list[int]]:
        model = build(places)
        for layer in model.model.layers:
            layer.mlp = Steered(layer.mlp)
        sharding = shard(model)
        sharding.mode = "graph"
        if mode == "accelerate":
            sharding.disable()
        out = reply(model, stopping_criteria=at_token(9, lambda: change(model)))
        assert sharding.failure == ""
        sharding.detach()
        return out

    expected = replied("accelerate")
    assert not replays
    assert replied("graph") == expected
    assert replays
    untouched = build(places)
    assert reply(untouched) != expected


class Counts(Noise):
    """A part of the model that counts how often it is called."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x)


def test_what_changes_elsewhere_or_by_a_step_itself_costs_no_replay(
    model: Any, sharding: Sharding, replays: list[object]
) -> None:
    right = by_accelerate(sharding, lambda: reply(model))

    def hook(*_: Any, **__: Any) -> bool:
        nn.Linear(2, 2).register_forward_hook(lambda *_: None)
        return False

    with instead_of_a_block(model, Counts):
        reply(model)
        replays.clear()
        assert reply(model, stopping_criteria=StoppingCriteriaList([hook])) == right
    assert sharding.reason_for_eager == ""
    assert len(replays) >= TOKENS - 2


@pytest.mark.parametrize("change", ["scaled", "off"])
def test_a_lora_that_is_changed_in_the_midst_of_a_reply_shows_in_the_next_token(
    places: list[str], replays: list[object], tmp_path: Any, change: str
) -> None:
    peft = pytest.importorskip("peft")
    folder = support.save_lora("llama", tmp_path)

    def replied(mode: str) -> list[list[int]]:
        model = peft.PeftModel.from_pretrained(support.spread(models.build("llama"), places), str(folder))
        sharding = in_graph_mode(model)
        if mode == "accelerate":
            sharding.disable()

        def do() -> None:
            if change == "off":
                model.base_model.disable_adapter_layers()
            for module in model.modules() if change == "scaled" else ():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.scaling["default"] *= 3

        out = reply(model, stopping_criteria=at_token(9, do))
        sharding.detach()
        return out

    expected = replied("accelerate")
    assert replied("graph") == expected
    assert replays
    assert expected != reply(support.spread(models.build("llama"), places))
