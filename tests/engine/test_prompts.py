"""Prompts: in chunks through the stages, and only what a kept cache does not hold."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from transformers import GenerationConfig, StoppingCriteriaList

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine import compat
from extensions.sharded_kv.engine.eager import Runtime
from extensions.sharded_kv.engine.prompts import aligned, pace, prompt
from extensions.sharded_kv.engine.prompts.pace import Pace
from extensions.sharded_kv.engine.transfers import ForwardState
from tests import support
from tools import models, simulated
from tools.traffic import between_gpus

if not compat.has_cache_objects():
    pytest.skip("this transformers keeps caches in tuples", allow_module_level=True)

MODES = ["eager", "graph"]
PROMPT = 40
NEW = 8
HAS_CHUNKS = find_spec("transformers.masking_utils") is not None
FAMILIES = list(filter(models.available, models.DECODERS if HAS_CHUNKS else ("llama", "bloom", "mixtral")))
# Recurrent states have no past, and some models keep what they know elsewhere.
KEEPS_NOTHING = frozenset(
    "qwen3-next qwen3.5 granite-hybrid falcon-h1 nemotron-h jamba bamba lfm2 mamba mamba2 minimax "
    "recurrent-gemma".split()
)
in_chunks = pytest.mark.skipif(not HAS_CHUNKS, reason="with this transformers a prompt is read as a whole")


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    """A text, [1, tokens]."""
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


def reply(model: Any, text: torch.Tensor, place: str, new: int = NEW, **options: Any) -> list[int]:
    """What it adds to a text, greedily."""
    given = text.to(place)
    with torch.no_grad():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            **options,
        )
    replied: list[int] = out[0, text.shape[1] :].tolist()
    return replied


@functools.cache
def right(family: str, tokens: int, seed: int = 0) -> list[int]:
    """The reply of the whole model on the CPU."""
    return reply(models.build(family), ids(tokens, seed), "cpu")


@pytest.mark.parametrize("chunk", [5, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_gives_the_cpus_tokens(devices: support.Devices, family: str, chunk: int) -> None:
    places = devices(2)
    model = support.spread(models.build(family), places)
    sharding = shard(model)
    sharding.prompt_chunk = chunk
    assert reply(model, ids(PROMPT), places[0]) == right(family, PROMPT)
    assert sharding.failure == ""
    sharding.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_message_has_the_cpus_tokens(devices: support.Devices, family: str, mode: str) -> None:
    places = devices(2)
    model, whole = support.spread(models.build(family), places), models.build(family)
    sharding = shard(model)
    sharding.mode, sharding.kept_conversations = mode, 1
    text, kept = ids(9), []
    for _ in range(3):
        new = reply(model, text, places[0])
        assert new == reply(whole, text, "cpu")
        kept.append(sharding.meter.snapshot().current.kept_tokens)
        text = torch.cat([text, torch.tensor([new]), ids(3, seed=text.shape[1])], 1)
    assert sharding.failure == ""
    # The reply's last token was never read, and the one before is read again.
    usual = [0, 9 + NEW - 2, 9 + 2 * NEW + 3 - 2]
    assert kept == ([0, 0, 0] if family in KEEPS_NOTHING else usual)
    sharding.detach()


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


@pytest.fixture
def model(places: list[str]) -> Any:
    return support.spread(models.build("llama-gqa"), places)


@pytest.fixture
def sharding(model: Any) -> Any:
    sharding = shard(model)
    sharding.kept_conversations = 1
    return sharding


def kept(sharding: Any) -> int:
    """How many tokens of the latest prompt were not computed."""
    count: int = sharding.meter.snapshot().current.kept_tokens
    return count


def test_the_meter_says_how_many_tokens_were_read(model: Any, sharding: Any, places: list[str]) -> None:
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    text = ids(30)
    reply(model, text, places[0])
    reply(model, torch.cat([text, ids(5, 1)], 1), places[0])
    hook.remove()
    assert [count for count in read if count > 1] == [30, 6]
    now = sharding.meter.snapshot().current
    assert (now.prompt_tokens, now.kept_tokens) == (35, 29)


def test_a_reply_is_written_again_from_its_prompts_last_token_on(model: Any, sharding: Any, places: list[str]) -> None:
    first = reply(model, ids(30), places[0])
    assert reply(model, ids(30), places[0]) == first == right("llama-gqa", 30)
    assert kept(sharding) == 29


def test_what_comes_after_an_edit_is_computed(model: Any, sharding: Any, places: list[str]) -> None:
    reply(model, ids(30), places[0])
    edited = ids(30)
    edited[0, 12] += 1
    assert reply(model, edited, places[0]) == reply(models.build("llama-gqa"), edited, "cpu")
    assert kept(sharding) == 11


def test_of_one_conversation_another_takes_the_place(model: Any, sharding: Any, places: list[str]) -> None:
    for seed in (0, 1, 0):
        assert reply(model, ids(30, seed), places[0]) == right("llama-gqa", 30, seed)
        assert kept(sharding) == 0


def test_of_two_conversations_each_goes_on(model: Any, sharding: Any, places: list[str]) -> None:
    sharding.kept_conversations = 2
    for seed, count in ((0, 0), (1, 0), (0, 29), (1, 29), (2, 0), (0, 0), (2, 29)):
        assert reply(model, ids(30, seed), places[0]) == right("llama-gqa", 30, seed)
        assert kept(sharding) == count


def test_a_conversation_that_is_mostly_other_is_left_for_itself(model: Any, sharding: Any, places: list[str]) -> None:
    sharding.kept_conversations = 2
    system = ids(10, 9)
    texts = [torch.cat([system, ids(30, seed)], 1) for seed in (0, 1)]
    found = []
    for text in (*texts, *texts):
        reply(model, text, places[0])
        found.append(kept(sharding))
    assert found == [0, 0, 39, 39]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_is_counted_as_cache(model: Any, sharding: Any, places: list[str], mode: str) -> None:
    sharding.mode = mode
    reply(model, ids(30), places[0])
    snapshot = sharding.meter.snapshot()
    assert snapshot.kept_tokens == 30 + NEW - 1
    assert all(memory.cache > 0 for memory in snapshot.memory)
    sharding.drop_kept()
    snapshot = sharding.meter.snapshot()
    assert (snapshot.kept_tokens, [memory.cache for memory in snapshot.memory]) == (0, [0, 0])


@pytest.mark.parametrize(
    "let_go",
    [
        lambda sharding: sharding.drop_kept(),
        lambda sharding: sharding.disable(),
        lambda sharding: sharding.detach(),
        lambda sharding: setattr(sharding, "kept_conversations", 0),
    ],
    ids=["dropped", "off", "detached", "setting"],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_goes_without_a_byte_left(
    devices: support.Devices, model: Any, sharding: Any, places: list[str], mode: str, let_go: Any
) -> None:
    if devices.kind != "sim":
        pytest.skip("counts bytes of simulated devices")
    sharding.kept_conversations = 0
    reply(model, ids(30), places[0])
    gc.collect()
    before = [simulated.allocated(index) for index in range(2)]
    sharding.kept_conversations, sharding.mode = 1, mode
    reply(model, ids(30), places[0])
    assert [simulated.allocated(index) for index in range(2)] > before
    let_go(sharding)
    gc.collect()
    assert [simulated.allocated(index) for index in range(2)] == before


def test_nothing_is_kept_unless_asked_for(model: Any, places: list[str]) -> None:
    sharding = shard(model)
    reply(model, ids(30), places[0])
    assert sharding.meter.snapshot().kept_tokens == 0


def test_a_negative_number_of_conversations_is_no_setting(sharding: Any) -> None:
    with pytest.raises(ValueError, match="0 keeps none"):
        sharding.kept_conversations = -1
    with pytest.raises(ValueError, match="0 reads a prompt as a whole"):
        sharding.prompt_chunk = -1


# --- right or not used ------------------------------------------------------------------------------------------------


def exchange(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.data * -1)


def change_in_place(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)


def change_the_last_layer(model: Any) -> None:
    model.model.layers[-1].self_attn.v_proj.weight.data.mul_(1.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [exchange, change_in_place, change_the_last_layer])
def test_what_another_model_has_computed_is_not_used(
    model: Any, sharding: Any, places: list[str], change: Callable[[Any], None], mode: str
) -> None:
    sharding.mode = mode
    reply(model, ids(30), places[0])
    whole = models.build("llama-gqa")
    for each in (model, whole):
        change(each)
    assert reply(model, ids(30), places[0]) == reply(whole, ids(30), "cpu")
    assert kept(sharding) == 0
    assert reply(model, ids(30), places[0]) == reply(whole, ids(30), "cpu")
    assert kept(sharding) == 29


def test_a_lora_that_is_put_on_and_taken_off_has_its_own_tokens(model: Any, places: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = support.save_lora("llama-gqa", tmp_path)
    whole = peft.PeftModel.from_pretrained(models.build("llama-gqa"), str(folder))
    tuned = peft.PeftModel.from_pretrained(model, str(folder))
    sharding = shard(tuned)
    sharding.kept_conversations = 1
    text = ids(30)
    with_it = reply(whole, text, "cpu")
    with whole.disable_adapter():
        without = reply(whole, text, "cpu")
    assert with_it != without
    assert reply(tuned, text, places[0]) == with_it
    with tuned.disable_adapter():
        assert reply(tuned, text, places[0]) == without
        assert kept(sharding) == 0
        assert reply(tuned, text, places[0]) == without
        assert kept(sharding) == 29
    assert reply(tuned, text, places[0]) == with_it
    assert kept(sharding) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_replies_of_other_kinds_neither_keep_nor_use_anything(
    model: Any, sharding: Any, places: list[str], options: dict[str, Any]
) -> None:
    if not all(hasattr(GenerationConfig(), name) for name in options):
        pytest.skip("this transformers does not know it")
    reply(model, ids(30), places[0])
    before = sharding.meter.snapshot().kept_tokens
    with torch.no_grad():
        model.generate(ids(30).to(places[0]), max_new_tokens=4, **{"do_sample": False, **options})
    assert kept(sharding) == 0
    assert sharding.meter.snapshot().kept_tokens == before


def test_padding_and_batches_neither_keep_nor_use_anything(model: Any, sharding: Any, places: list[str]) -> None:
    mask = torch.ones(1, 30, dtype=torch.int64)
    mask[0, :3] = 0
    for text, given in ((ids(30), mask), (ids(30).repeat(2, 1), torch.ones(2, 30, dtype=torch.int64))):
        with torch.no_grad():
            ours = model.generate(
                text.to(places[0]), attention_mask=given.to(places[0]), max_new_tokens=4, do_sample=False
            )
            theirs = models.build("llama-gqa").generate(text, attention_mask=given, max_new_tokens=4, do_sample=False)
        assert ours.tolist() == theirs.tolist()
        assert sharding.meter.snapshot().kept_tokens == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_that_was_stopped_by_an_error_is_kept_as_far_as_it_came(
    model: Any, sharding: Any, places: list[str], mode: str
) -> None:
    sharding.mode = mode
    said: list[torch.Tensor] = []

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        said.append(input_ids.cpu())
        if len(said) == 5:
            raise ValueError("the webui's way to stop a reply")
        return False

    with pytest.raises(ValueError, match="the webui's way"):
        reply(model, ids(30), places[0], stopping_criteria=StoppingCriteriaList([stop]))
    assert sharding.meter.snapshot().kept_tokens == 34
    text = torch.cat([said[-1], ids(4, 1)], 1)
    assert reply(model, text, places[0]) == reply(models.build("llama-gqa"), text, "cpu")
    assert kept(sharding) == 33


def test_a_reply_that_fails_within_the_model_leaves_the_next_one_right(
    model: Any, sharding: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, steps = model.model.layers[-1].mlp, itertools.count()
    forward = block.forward

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        if next(steps) == 3:
            raise ArithmeticError("the model's own")
        return forward(hidden)

    monkeypatch.setattr(block, "forward", fail)
    with pytest.raises(ArithmeticError):
        reply(model, ids(30), places[0])
    assert reply(model, ids(30), places[0]) == right("llama-gqa", 30)


@in_chunks
def test_a_cache_that_the_caller_keeps_is_the_callers(model: Any, sharding: Any, places: list[str]) -> None:
    with torch.no_grad():
        out = model.generate(ids(30).to(places[0]), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert sharding.meter.snapshot().kept_tokens == 0
    before = [layer.keys.clone() for layer in out.past_key_values.layers]
    reply(model, ids(30), places[0])
    assert support.same(before, [layer.keys for layer in out.past_key_values.layers])


def test_a_caller_who_changes_the_returned_ids_changes_nothing_that_is_kept(
    model: Any, sharding: Any, places: list[str]
) -> None:
    with torch.no_grad():
        out = model.generate(ids(30).to(places[0]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    text = ids(30, 1)
    out[0, :30] = text[0].to(places[0])
    assert reply(model, text, places[0]) == right("llama-gqa", 30, 1)
    assert kept(sharding) == 0


@in_chunks
def test_memory_that_runs_out_behind_what_is_kept_has_all_of_it_computed(
    monkeypatch: pytest.MonkeyPatch, places: list[str]
) -> None:
    monkeypatch.setattr(prompt, "_SMALL_CHUNK", 8)
    model, whole = support.spread(models.build("mistral-sliding"), places), models.build("mistral-sliding")
    sharding = shard(model)
    sharding.kept_conversations, sharding.prompt_chunk = 1, 20
    text = torch.cat([ids(12), torch.tensor([reply(model, ids(12), places[0], 2)]), ids(60, 3)], 1)
    block, read = model.model.layers[-1].mlp, []
    forward = block.forward

    def run_out(hidden: torch.Tensor) -> torch.Tensor:
        read.append(hidden.shape[1])
        if hidden.shape[1] > 8 and len(read) > 1:
            raise torch.cuda.OutOfMemoryError("no memory for so much at once")
        return forward(hidden)

    monkeypatch.setattr(block, "forward", run_out)
    assert reply(model, text, places[0]) == reply(whole, text, "cpu")
    assert sharding.failure == ""


@in_chunks
def test_a_window_that_has_moved_on_goes_back_only_a_little(places: list[str]) -> None:
    model, whole = support.spread(models.build("mistral-sliding"), places), models.build("mistral-sliding")
    sharding = shard(model)
    sharding.kept_conversations = 1
    text = ids(60)
    new = reply(model, text, places[0], 30)
    near, far = torch.cat([text, torch.tensor([new[:26]])], 1), torch.cat([text, torch.tensor([new[:4]])], 1)
    assert reply(model, near, places[0]) == reply(whole, near, "cpu")
    assert kept(sharding) > 0
    assert reply(model, far, places[0]) == reply(whole, far, "cpu")
    assert kept(sharding) == 0


# --- chunks -----------------------------------------------------------------------------------------------------------


@in_chunks
def test_chunks_move_what_their_tokens_need_and_one_tokens_logits(
    devices: support.Devices, model: Any, places: list[str]
) -> None:
    sharding = shard(model)
    sharding.prompt_chunk = 10
    with devices.traffic() as traffic, torch.no_grad():
        model.generate(ids(40).to(places[0]), max_new_tokens=1, do_sample=False)
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    there = 40 * (4 * (config.hidden_size + 2 * head) + 8)  # tokens: hidden states, two rotary tables, a position
    home = 4 * config.vocab_size
    assert between_gpus(traffic.bytes) == {(places[0], places[1]): there, (places[1], places[0]): home}


@in_chunks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chunks_in_16_bits_have_nearly_the_same_logits(places: list[str], dtype: torch.dtype) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = support.spread(models.build("llama-gqa", dtype, **sizes), places)
    sharding, text, logits = shard(model), ids(200).to(places[0]), {}
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 1}
    for chunk in (0, 50):
        sharding.prompt_chunk = chunk
        with torch.no_grad():
            logits[chunk] = model.generate(text, attention_mask=torch.ones_like(text), **options).logits[0].float()
    assert (logits[50] - logits[0]).abs().max() < 0.02 * logits[0].abs().max()


@in_chunks
def test_a_window_takes_no_more_memory_after_a_prompt_in_chunks(places: list[str]) -> None:
    model = support.spread(models.build("mistral-sliding"), places)
    sharding, sizes = shard(model), {}
    for chunk in (0, 50):
        sharding.prompt_chunk = chunk
        with torch.no_grad():
            out = model.generate(
                ids(200).to(places[0]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
            )
        sizes[chunk] = out.past_key_values.bytes_by_device()
    assert sizes[50] == sizes[0]


@in_chunks
def test_chunks_take_less_memory_than_the_whole(devices: support.Devices, model: Any, places: list[str]) -> None:
    if devices.kind != "sim":
        pytest.skip("peaks are of simulated devices")
    sharding, peaks = shard(model), {}
    for chunk in (0, 32):
        sharding.prompt_chunk = chunk
        for index in range(2):
            devices.runtime.reset_peak_memory_stats(index)
        reply(model, ids(256), places[0])
        peaks[chunk] = [devices.runtime.max_memory_allocated(index) for index in range(2)]
    assert all(chunked < whole for chunked, whole in zip(peaks[32], peaks[0], strict=True))


@in_chunks
@pytest.mark.parametrize("chunk", [0, 16])
def test_memory_that_runs_out_has_the_prompt_read_in_chunks(
    devices: support.Devices, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(prompt, "_SMALL_CHUNK", 8)
    places = devices.up_to(2)
    model = support.spread(models.build("llama-gqa"), places)
    sharding = shard(model)
    sharding.prompt_chunk = chunk
    sharding.mode = "graph"
    block = model.model.layers[-1].mlp
    forward = block.forward

    def run_out(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] > 8:
            raise torch.cuda.OutOfMemoryError("no memory for so much at once")
        return forward(hidden)

    monkeypatch.setattr(block, "forward", run_out)
    assert reply(model, ids(40), places[0]) == right("llama-gqa", 40)
    assert sharding.failure == ""


def test_a_model_that_does_not_understand_our_masks_gets_its_own(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = support.spread(models.build("llama-gqa"), places)
    if not aligned.can_align(model):
        pytest.skip("here masks are its own")
    sharding = shard(model)
    sharding.prompt_chunk = 16
    attention = model.model.layers[-1].self_attn
    forward = attention.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["attention_mask"] is None or kwargs["attention_mask"].dim() == 4
        return forward(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", look)
    assert reply(model, ids(40), places[0]) == right("llama-gqa", 40)
    assert sharding.failure == ""


def test_sharding_switched_in_the_midst_of_a_prompt_changes_no_token(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = shard(model)
    sharding.prompt_chunk = 8
    step, switches = Runtime._run_step, iter([sharding.disable, sharding.enable, sharding.disable])

    def run(*args: Any) -> Any:
        output = step(*args)
        next(switches, lambda: None)()
        return output

    monkeypatch.setattr(Runtime, "_run_step", run)
    assert reply(model, ids(40), places[0]) == right("llama-gqa", 40)
    assert sharding.failure == ""


def test_an_error_of_ours_in_a_chunk_costs_no_reply(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = shard(model)
    sharding.prompt_chunk = 8
    entered, count = ForwardState.enter, itertools.count()

    def fail(self: Any, device: Any) -> None:
        if next(count) == 5:
            raise ZeroDivisionError("ours")
        entered(self, device)

    monkeypatch.setattr(ForwardState, "enter", fail)
    assert reply(model, ids(40), places[0]) == right("llama-gqa", 40)
    assert "ours" in sharding.failure


def test_an_error_of_ours_while_all_is_computed_anew_is_raised_and_gives_no_wrong_token(
    model: Any, sharding: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reply(model, ids(30), places[0])
    change_in_place(model)  # so that what is kept is found to be wrong
    inputs, count = prompt.Prompt._inputs, itertools.count()

    def fail(self: Any, *args: Any) -> Any:
        if next(count) == 1:
            raise ZeroDivisionError("ours")
        return inputs(self, *args)

    monkeypatch.setattr(prompt.Prompt, "_inputs", fail)
    with pytest.raises(ZeroDivisionError):
        reply(model, ids(30), places[0])
    assert "ours" in sharding.failure


def test_replies_at_once_keep_their_own_conversations(model: Any, sharding: Any, places: list[str]) -> None:
    sharding.kept_conversations, sharding.prompt_chunk = 2, 7
    found: dict[int, list[list[int]]] = {0: [], 1: []}

    def chat(seed: int) -> None:
        for _ in range(4):
            found[seed].append(reply(model, ids(30, seed), places[0]))

    threads = [threading.Thread(target=chat, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [right("llama-gqa", 30, seed)] * 4 for seed in found}


@in_chunks
def test_chunks_go_through_any_placement(devices: support.Devices) -> None:
    places = devices(2)
    names = list(models.device_map(models.build("llama-gqa"), places))

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(st.lists(st.sampled_from(places), min_size=len(names), max_size=len(names)), st.integers(1, 25))
    def check(of_names: list[str], chunk: int) -> None:
        whole = models.build("llama-gqa")
        hypothesis.assume(len(set(of_names)) > 1)
        model = support.spread(whole, places, device_map=dict(zip(names, of_names, strict=True)))
        sharding = shard(model)
        sharding.prompt_chunk, sharding.kept_conversations = chunk, 1
        for seed in (0, 0):
            assert reply(model, ids(PROMPT, seed), places[0]) == right("llama-gqa", PROMPT, seed)
        assert (sharding.failure, kept(sharding)) == ("", PROMPT - 1)
        sharding.detach()

    check()


def test_what_is_kept_goes_before_memory_runs_out(devices: support.Devices, places: list[str]) -> None:
    if devices.kind != "sim":
        pytest.skip("needs devices whose size one can set")
    model = support.spread(models.build("llama-gqa"), places)
    sharding = shard(model)
    # A reply of another kind, which does not use what is kept, and leaves it where it is.
    another = {"prefill_chunk_size": 96} if HAS_CHUNKS else {"penalty_alpha": 0.6, "top_k": 1}
    gc.collect()
    simulated.reset_peak()
    alone = reply(model, ids(96, 1), places[0], **another)
    peaks = [simulated.peak(index) for index in range(2)]
    sharding.kept_conversations = 1
    reply(model, ids(90), places[0])
    assert sharding.meter.snapshot().kept_tokens > 0
    gc.collect()
    with contextlib.ExitStack() as stack:
        for index, peak in enumerate(peaks):
            simulated.set_capacity(index, peak)
            stack.callback(simulated.set_capacity, index, None)
        assert reply(model, ids(96, 1), places[0], **another) == alone
    assert sharding.meter.snapshot().kept_tokens == 0


# --- how many chunks --------------------------------------------------------------------------------------------------


def paced(launch: float, per_token: float, prompts: int = 2) -> Pace:
    measured = Pace()
    for _ in range(prompts):
        measured.note_launch(launch)
        measured.note_whole(4096, 4096 * per_token)
    return measured


def test_a_prompt_is_whole_until_two_were_timed() -> None:
    assert paced(0.02, 1e-3, prompts=1).chunks(4096, 2) == 1
    assert paced(0.02, 1e-3, prompts=2).chunks(4096, 2) > 1


def test_a_short_prompt_says_nothing_of_the_pace() -> None:
    measured = Pace()
    for _ in range(3):
        measured.note_launch(0.02)
        measured.note_whole(100, 0.1)
    assert measured.chunks(8192, 2) == 1


@in_chunks
def test_prompts_that_are_read_as_a_whole_are_timed_and_those_after_them_are_cut(
    model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "_SMALL_CHUNK", 16)
    monkeypatch.setattr(pace, "_LEAST_TIMED", 16)
    monkeypatch.setattr(pace, "_LEAST_CHUNK", 10)
    monkeypatch.setattr(Pace, "note_launch", lambda self, seconds: setattr(self, "_launch", 0.0))
    shard(model)
    read: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    for seed in range(3):
        assert reply(model, ids(40, seed), places[0]) == right("llama-gqa", 40, seed)
    assert [count for count in read if count > 1] == [40, 40, 10, 10, 10, 10]


def test_slow_gpus_get_small_chunks() -> None:
    assert paced(0.02, 1e-3).chunks(4096, 2) == 16


def test_quick_gpus_get_chunks_that_take_longer_than_their_launches() -> None:
    chunks = paced(0.0225, 32e-6).chunks(8192, 2)  # as measured: Llama-7B on two H200s
    assert 3 <= chunks <= 6


def test_what_would_gain_nothing_is_read_as_a_whole() -> None:
    assert paced(0.0225, 32e-6).chunks(1024, 2) == 1
    assert paced(0.02, 1e-3).chunks(4096, 1) == 1


# --- any conversation -------------------------------------------------------------------------------------------------


class AnyChat(RuleBasedStateMachine):
    """Messages, regenerations, edits, other conversations and changed weights, in any order.

    Attributes:
        most: how many conversations are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        devices = support.Devices("sim")
        self.places = devices(2)
        self.model = support.spread(models.build("llama-gqa"), self.places)
        self.whole = models.build("llama-gqa")
        self.sharding = shard(self.model)
        self.sharding.kept_conversations = self.most = 2
        self.expected: list[list[int]] = []  # what is kept, the latest last
        self.is_stale = False
        self.texts: list[list[int]] = [[7, 8, 9], [7, 8, 10]]

    def _best(self, text: list[int]) -> tuple[int | None, int]:
        shared = [
            next((i for i, (a, b) in enumerate(zip(each, text, strict=False)) if a != b), min(len(each), len(text)))
            for each in self.expected
        ]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and 2 * shared[best] < len(self.expected[best]):
            best = 0 if len(self.expected) >= self.most else None
        return best, 0 if best is None else max(0, min(shared[best], len(text)) - 1)

    def _reply(self, which: int) -> None:
        text = self.texts[which]
        best, count = self._best(text)
        if best is not None:
            del self.expected[best]
        given = torch.tensor([text])
        new = reply(self.model, given, self.places[0], 5)
        assert new == reply(self.whole, given, "cpu", 5)
        assert kept(self.sharding) == (0 if self.is_stale else count)
        self.is_stale = False
        self.expected = [*self.expected, [*text, *new[:-1]]][-self.most :]
        self.texts[which] = [*text, *new]

    @rule(which=st.integers(0, 1), message=st.lists(st.integers(5, 90), min_size=1, max_size=6))
    def message(self, which: int, message: list[int]) -> None:
        self.texts[which] = [*self.texts[which], *message]
        self._reply(which)

    @rule(which=st.integers(0, 1))
    def regenerate(self, which: int) -> None:
        self.texts[which] = self.texts[which][:-5] if len(self.texts[which]) > 8 else self.texts[which]
        self._reply(which)

    @rule(which=st.integers(0, 1), at=st.integers(2, 40), token=st.integers(5, 90))
    def edit(self, which: int, at: int, token: int) -> None:
        self.texts[which] = [*self.texts[which][:at], token]
        self._reply(which)

    @rule(mode=st.sampled_from(MODES), chunk=st.sampled_from([None, 0, 4]))
    def change_the_mode(self, mode: str, chunk: int | None) -> None:
        self.sharding.mode, self.sharding.prompt_chunk = mode, chunk

    @rule()
    def switch_off_and_on(self) -> None:
        self.sharding.disable()
        self.sharding.enable()
        self.expected = []

    @rule()
    def exchange_a_weight(self) -> None:
        for each in (self.model, self.whole):
            exchange(each)
        self.sharding.drop_kept()
        self.expected = []

    def teardown(self) -> None:
        assert self.sharding.failure == ""
        self.sharding.detach()


def test_any_chat_has_the_cpus_tokens_and_computes_what_it_must(devices: support.Devices) -> None:
    if devices.kind != "sim":
        pytest.skip("any chat is tried on simulated devices")
    settings = hypothesis.settings(max_examples=12, stateful_step_count=14, deadline=None, print_blob=True)
    run_state_machine_as_test(AnyChat, settings=settings)
