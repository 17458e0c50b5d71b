"""A cache that forgets its last tokens is as one that never had them, or says that it cannot go back."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from packaging.version import Version
from torch import Tensor

from extensions.sharded_kv import shard
from extensions.sharded_kv.engine.compat import has_cache_objects
from tests import support
from tools import models

DynamicCache: Any = getattr(transformers, "DynamicCache", None)
if not has_cache_objects():
    pytest.skip("this transformers keeps caches in tuples", allow_module_level=True)

from extensions.sharded_kv.engine.kv.buffer import Room  # noqa: E402
from extensions.sharded_kv.engine.kv.cache import IS_LAYERED, KVCache  # noqa: E402
from extensions.sharded_kv.engine.kv.layers import SlidingLayer, can_go_back, is_recurrent  # noqa: E402

VERSION = Version(transformers.__version__)
HAS_WINDOWS = hasattr(transformers.cache_utils, "DynamicSlidingWindowLayer")
HAS_STATES = Version("5.14") <= VERSION  # older recurrent layers stay transformers' own
TAKES_CONFIG = "config" in inspect.signature(DynamicCache).parameters
TAKES_POSITIONS = IS_LAYERED and "cache_position" in inspect.signature(DynamicCache.get_mask_sizes).parameters

LAYERS = 2
BATCH, HEADS, SIZE = 3, 2, 3
CHANNELS, KERNEL = 2, 4
MOST_TOKENS = 40
# What keeps two tokens, few, and more than are added at once.
WINDOWS = [3, 8, 48]


def config_of(kind: str, window: int) -> Any:
    """A config whose layers are of a kind; the first is on the first device, and so on."""
    if kind == "sliding":
        return transformers.MistralConfig(num_hidden_layers=LAYERS, sliding_window=window)
    if kind == "by-turns":
        layer_types = ["sliding_attention", "full_attention"]
        return transformers.Gemma2Config(num_hidden_layers=LAYERS, sliding_window=window, layer_types=layer_types)
    if kind == "recurrent-by-turns":
        layer_types = ["linear_attention", "full_attention"]
        return transformers.Qwen3NextConfig(num_hidden_layers=LAYERS, layer_types=layer_types)
    if kind == "recurrent-and-full":
        return transformers.FalconH1Config(num_hidden_layers=LAYERS)
    return transformers.LlamaConfig(num_hidden_layers=LAYERS)


class Tokens:
    """What a model gives to the layers of its cache for some tokens: one entry for each layer, on the CPU.

    Attributes:
        keys, values: [batch, heads, tokens, head size].
        inputs: [batch, channels, tokens], of a recurrent layer's convolution; its state is their sum.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], inputs: list[Tensor]) -> None:
        self.keys, self.values, self.inputs = keys, values, inputs

    @classmethod
    def drawn(cls, count: int, rows: int, seed: int) -> Tokens:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> list[Tensor]:
            # Whole numbers, whose sums are the same in any order.
            return [torch.randint(-999, 999, shape, generator=generator).float() for _ in range(LAYERS)]

        of_attention = (rows, HEADS, count, SIZE)
        return cls(draw(*of_attention), draw(*of_attention), draw(rows, CHANNELS, count))

    def __len__(self) -> int:
        return self.inputs[0].shape[2]

    def _each(self, change: Any, *others: Tokens) -> Tokens:
        lists = zip(*(vars(each).values() for each in (self, *others)), strict=True)
        return Tokens(*([change(*tensors) for tensors in zip(*same, strict=True)] for same in lists))

    def followed_by(self, others: Tokens) -> Tokens:
        return self._each(lambda first, then: torch.cat([first, then], dim=2), others)

    def first(self, count: int) -> Tokens:
        return self._each(lambda tensor: tensor[:, :, :count])

    def rows(self, index: Tensor) -> Tokens:
        return self._each(lambda tensor: tensor.index_select(0, index))


@torch.no_grad()
def write(cache: Any, new: Tokens, before: Tokens, places: list[str]) -> list[Tensor]:
    """What a forward does: gives each layer what it keeps. Returns the keys and values that attention is shown."""
    shown: list[Tensor] = []
    for index, place in enumerate(places):
        layer = cache.layers[index] if index < len(getattr(cache, "layers", ())) else None
        if layer is not None and is_recurrent(layer):
            state = before.inputs[index].sum(2) + new.inputs[index].sum(2)
            cache.update_conv_state(new.inputs[index].to(place), index, conv_kernel_size=KERNEL)
            cache.update_recurrent_state(state.to(place), index)
        if layer is None or hasattr(layer, "keys"):
            shown += cache.update(new.keys[index].to(place), new.values[index].to(place), index)
    return shown


def anew(config: Any, tokens: Tokens, places: list[str]) -> Any:
    """transformers' own cache that was given these tokens and no others."""
    cache = DynamicCache(config=config) if TAKES_CONFIG else DynamicCache()
    if len(tokens):
        write(cache, tokens, tokens.first(0), places)
    return cache


def layers_of(cache: Any) -> list[Any]:
    """Its layers that have keys and values."""
    return [layer for layer in cache.layers if hasattr(layer, "keys")]


def seen_in(cache: Any) -> list[Tensor]:
    """Keys and values of all layers as anybody sees them; none of an empty layer."""
    if IS_LAYERED:
        seen = [tensor for layer in layers_of(cache) for tensor in (layer.keys, layer.values)]
    else:
        seen = [tensor for both in zip(cache.key_cache, cache.value_cache, strict=True) for tensor in both]
    return [tensor for tensor in seen if isinstance(tensor, Tensor) and tensor.numel()]


def states_in(cache: Any) -> list[Tensor]:
    """The states of its recurrent layers."""
    recurrent = [layer for layer in getattr(cache, "layers", ()) if is_recurrent(layer)]
    held = [states for layer in recurrent for states in (layer.conv_states, layer.recurrent_states)]
    return [state for states in held for state in states.values() if state is not None]


def mask_sizes(cache: Any) -> Iterator[tuple[int, int]]:
    """What it says of the masks that the next tokens need, one or five, in each layer with keys."""
    for index, layer in enumerate(cache.layers if IS_LAYERED else ()):
        if hasattr(layer, "keys"):
            for count in (1, 5):
                yield cache.get_mask_sizes(torch.arange(count) if TAKES_POSITIONS else count, index)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return support.same([tensor.cpu() for tensor in ours], [tensor.cpu() for tensor in theirs])


class Truncated(RuleBasedStateMachine):
    """One cache to which anything is done; after that it is as another made anew with the tokens that remain.

    Args:
        kind: of its layers, for `config_of`.
        places: the device of each layer.
    """

    def __init__(self, kind: str, places: list[str]) -> None:
        super().__init__()
        self.kind, self.places = kind, places
        self.seed = 0
        self.looked: list[tuple[Tensor, Tensor]] = []  # what somebody holds of it, and what that was then

    @initialize(
        window=st.sampled_from(WINDOWS),
        longest=st.sampled_from([None, 12, 60, 400]),
        step=st.sampled_from([1, 32]),
        prompt=st.integers(1, 2 * MOST_TOKENS),
    )
    def begin(self, window: int, longest: int | None, step: int, prompt: int) -> None:
        self.config, self.window = config_of(self.kind, window), window
        self.kept = Tokens.drawn(0, BATCH, 0)
        plain = anew(self.config, self.kept, self.places)
        self.ours = KVCache.in_place_of(plain, Room(longest, step=step))
        self.append(prompt)

    def can_go_back_to(self, length: int) -> bool:
        """What the cache says of that."""
        return length == 0 or all(can_go_back(layer, length) for layer in self.ours.layers)

    def length_back(self, back: int) -> int:
        """How many tokens are left without the last so many."""
        return max(0, len(self.kept) - back)

    def keep(self, length: int) -> None:
        self.kept = self.kept.first(length)

    # --- what is done to it ---------------------------------------------------------------------------------------

    @rule(count=st.one_of(st.just(1), st.integers(1, MOST_TOKENS)))
    def append(self, count: int) -> None:
        self.seed += 1
        new = Tokens.drawn(count, self.kept.inputs[0].shape[0], self.seed)
        before, reference = len(self.kept), anew(self.config, self.kept, self.places)
        shown, expected = (write(cache, new, self.kept, self.places) for cache in (self.ours, reference))
        assert equal(shown, expected)
        self.kept = self.kept.followed_by(new)
        # A step that fails is taken back: that must always be possible, but for states.
        assert self.can_go_back_to(before) or any(map(is_recurrent, self.ours.layers))

    @rule(count=st.integers(1, 30))
    def append_one_by_one(self, count: int) -> None:
        for _ in range(count):
            self.append(1)

    @rule(back=st.one_of(st.integers(0, 12), st.integers(0, 2 * MOST_TOKENS)))
    def truncate(self, back: int) -> None:
        length = self.length_back(back)
        if self.can_go_back_to(length):
            self.ours.truncate(length)
            self.keep(length)
        else:
            assert not self.keeps_all_of(length)
            with pytest.raises(ValueError, match=f"cannot go back to {length} tokens"):
                self.ours.truncate(length)

    @rule()
    def truncate_to_nothing(self) -> None:
        self.ours.truncate(0)
        self.keep(0)

    def keeps_all_of(self, length: int) -> bool:
        """Whether no layer has forgotten anything that one of `length` tokens would keep, whatever was done to it."""
        has_states = any(map(is_recurrent, self.ours.layers))
        has_window = any(isinstance(layer, SlidingLayer) for layer in self.ours.layers)
        return not has_states and (not has_window or len(self.kept) < self.window or length == len(self.kept))

    @rule(back=st.integers(0, 12))
    def crop(self, back: int) -> None:
        """As transformers does it: what it cannot, ours cannot either."""
        reference = anew(self.config, self.kept, self.places)
        back = min(back, max(0, len(self.kept) - 1))
        if back == 0:  # older ones crop to so many tokens
            return
        try:
            reference.crop(-back)
        except (RuntimeError, ValueError) as error:  # by then it may have cropped some layers: so it is tried on a copy
            with pytest.raises(type(error)):
                copy.deepcopy(self.ours).crop(-back)
        else:
            self.ours.crop(-back)
            self.keep(len(self.kept) - back)

    @rule(count=st.integers(1, 4))
    def try_a_step_and_go_back_to_the_mark(self, count: int) -> None:
        """As graph mode tries a step: there is room before, and afterwards the cache is as it was."""
        if len(self.kept) == 0 or not self.has_states_in_all():
            return
        self.ours.make_room(count)
        mark = self.ours.mark()
        self.seed += 1
        write(self.ours, Tokens.drawn(count, self.kept.inputs[0].shape[0], self.seed), self.kept, self.places)
        self.ours.go_back_to(mark)

    def has_states_in_all(self) -> bool:
        return not IS_LAYERED or not HAS_STATES or self.ours.has_all_states

    @precondition(lambda self: len(self.kept))
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = self.kept.inputs[0].shape[0]
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
        self.ours.reorder_cache(index.to(self.places[0]))
        self.kept = self.kept.rows(index)

    # transformers selects no rows of states.
    @precondition(lambda self: len(self.kept) and not any(map(is_recurrent, self.ours.layers)))
    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        rows = self.kept.inputs[0].shape[0]
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
        with torch.no_grad():
            self.ours.batch_select_indices(index)
        self.kept = self.kept.rows(index)

    @rule(back=st.integers(0, 3))
    def run_out_of_memory(self, back: int) -> None:
        length, was_tight = self.length_back(back), self.ours.room.is_tight
        could = self.can_go_back_to(length)
        assert self.ours.give_room_back(length) == (could and not was_tight)
        if could and not was_tight:
            self.keep(length)

    @rule(longest=st.sampled_from([None, 12, 60, 400]))
    def begin_another_reply(self, longest: int | None) -> None:
        self.ours.begin_reply(longest)

    @rule()
    def make_all_layers_level(self) -> None:
        self.ours.level()

    @precondition(lambda self: len(self.looked) < 4)
    @rule()
    def look(self) -> None:
        seen = seen_in(self.ours)
        assert equal(seen, seen_in(anew(self.config, self.kept, self.places)))
        self.looked += [(tensor, tensor.clone()) for tensor in seen]

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.ours = copy.deepcopy(self.ours)

    # --- what holds after each of them ----------------------------------------------------------------------------

    @invariant()
    def it_is_as_one_made_anew(self) -> None:
        reference = anew(self.config, self.kept, self.places)
        # Not by `keys` and `values`: who reads these may have them for ever, and the cache would make others.
        filled = [buffer.filled for buffer in self.ours.buffers() if buffer.length]
        assert equal(filled, seen_in(reference))
        assert self.ours.get_seq_length() == self.ours.length == reference.get_seq_length() == len(self.kept)
        assert list(mask_sizes(self.ours)) == list(mask_sizes(reference))
        if len(self.kept):
            assert equal(states_in(self.ours), states_in(reference))

    @invariant()
    def what_somebody_holds_of_it_is_as_it_was(self) -> None:
        assert all(torch.equal(shown, as_it_was) for shown, as_it_was in self.looked)


@pytest.mark.parametrize(
    "kind",
    [
        "full",
        *(
            pytest.param(kind, marks=pytest.mark.skipif(not HAS_WINDOWS, reason="this transformers keeps no window"))
            for kind in ("sliding", "by-turns")
        ),
        *(
            pytest.param(kind, marks=pytest.mark.skipif(not HAS_STATES, reason="this transformers keeps other states"))
            for kind in ("recurrent-by-turns", "recurrent-and-full")
        ),
    ],
)
def test_a_cache_is_as_one_that_was_given_only_the_tokens_that_remain(devices: support.Devices, kind: str) -> None:
    machine = functools.partial(Truncated, kind, devices(LAYERS))
    settings = hypothesis.settings(max_examples=25, stateful_step_count=20, deadline=None, print_blob=True)
    run_state_machine_as_test(machine, settings=settings)


# With a model ------------------------------------------------------------------------------------------------------

# All layers have a window; every other one has; every other one has states, which go back to nothing alone.
FAMILIES = {"mistral-sliding": 2, "gemma2": 2, "qwen3.5": 4}  # and how many layers they get


def ids_of(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, models.VOCAB_SIZE, (1, count), generator=generator)


@torch.no_grad()
def logits_of(model: Any, cache: Any, ids: Tensor, chunks: list[int]) -> Tensor:
    """The logits of so many tokens in one forward, then of so many in the next, and so on."""
    place = model.get_input_embeddings().weight.device
    # Some models that are not told count from 0 in each forward.
    positions = torch.arange(cache.get_seq_length(), cache.get_seq_length() + ids.shape[1])[None]
    steps = zip(ids.split(chunks, dim=1), positions.split(chunks, dim=1), strict=True)
    given = [{"input_ids": step.to(place), "position_ids": at.to(place)} for step, at in steps]
    return torch.cat([model(**each, past_key_values=cache, use_cache=True).logits.cpu() for each in given], dim=1)


@pytest.mark.skipif(not HAS_STATES, reason="windows and states of this transformers are none for graphs")
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_fresh_cache_that_was_given_the_same_tokens(
    devices: support.Devices, replays: list[object], family: str, mode: str
) -> None:
    support.family_or_skip(family)
    whole = models.build(family, num_hidden_layers=FAMILIES[family])
    model = support.spread(models.build(family, num_hidden_layers=FAMILIES[family]), devices.up_to(2))
    sharding = shard(model)
    sharding.mode = mode

    @hypothesis.settings(max_examples=6, deadline=None, print_blob=True)
    @hypothesis.given(
        prompt=st.integers(1, 40),
        steps=st.lists(st.sampled_from([1, 1, 1, 3]), max_size=20),
        back=st.one_of(st.integers(1, 12), st.just(100)),
        others=st.lists(st.sampled_from([1, 1, 1, 3]), min_size=1, max_size=8),
    )
    @hypothesis.example(prompt=9, steps=[1] * 20, back=5, others=[1] * 8)
    @hypothesis.example(prompt=40, steps=[1] * 20, back=9, others=[3, 1, 3])
    @hypothesis.example(prompt=40, steps=[1] * 20, back=100, others=[9, *[1] * 8])
    def check(prompt: int, steps: list[int], back: int, others: list[int]) -> None:
        cache = sharding.new_cache()
        ids = ids_of(prompt + sum(steps), seed=0)
        logits_of(model, cache, ids, [prompt, *steps])
        length = max(0, ids.shape[1] - back)
        try:
            cache.truncate(length)
        except ValueError:  # then it goes on with all of them
            hypothesis.event("it cannot go back")
            length = ids.shape[1]
        new = ids_of(sum(others), seed=1)
        plain = transformers.DynamicCache(config=whole.config)
        if length:
            logits_of(whole, plain, ids[:, :length], [length])
        ours, expected = logits_of(model, cache, new, others), logits_of(whole, plain, new, others)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == plain.get_seq_length()

    check()
    assert sharding.failure == ""
    assert bool(replays) == (mode == "graph")
