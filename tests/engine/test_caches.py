"""A cache moves into static buffers and out again; lent, it is to everybody else the cache that it was."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from extensions.sharded_kv.engine import caches
from extensions.sharded_kv.engine.caches import Buffers
from tests import support
from tools import simulated

DynamicCache: Any = getattr(transformers, "DynamicCache", None)
if DynamicCache is None:
    pytest.skip("this transformers keeps caches in tuples", allow_module_level=True)

# Since transformers 4.54 a cache is a list of layers.
IS_LAYERED = hasattr(DynamicCache(), "layers")
layered = pytest.mark.skipif(not IS_LAYERED, reason="this transformers knows no layers of caches")

BATCH, HEADS, SIZE, LAYERS = 2, 3, 4, 2
LENGTH, CAPACITY = 5, 8
WINDOW = 8


@pytest.fixture
def here(devices: support.Devices) -> str:
    return devices(1)[0]


def states(tokens: int, device: str, seed: int = 0, batch: int = BATCH, dtype: Any = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, tokens, SIZE, generator=generator).to(device, dtype)


def cache_on(*places: str, tokens: int = LENGTH, config: Any = None, **options: Any) -> Any:
    """A cache with a layer on each device; always the same."""
    cache = DynamicCache() if config is None else DynamicCache(config=config)
    for index, place in enumerate(places):
        cache.update(
            states(tokens, place, 2 * index, **options), states(tokens, place, 2 * index + 1, **options), index
        )
    return cache


def sliding() -> Any:
    return transformers.MistralConfig(sliding_window=WINDOW, num_hidden_layers=LAYERS)


def tensors(cache: Any) -> list[Tensor]:
    """Keys and values of all layers."""
    if IS_LAYERED:
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor for pair in zip(cache.key_cache, cache.value_cache, strict=True) for tensor in pair]


def same(ours: Any, theirs: Any) -> bool:
    return support.same([tensor.cpu() for tensor in tensors(ours)], [tensor.cpu() for tensor in tensors(theirs)])


def lend(cache: Any, capacity: int = CAPACITY) -> Buffers:
    buffers = Buffers(cache, capacity)
    buffers.take(cache)
    return buffers


def attributes(cache: Any) -> list[tuple[type, set[str]]]:
    objects = [cache, *getattr(cache, "layers", ())]
    return [(type(item), set(vars(item))) for item in objects]


def step(cache: Any, buffers: Buffers, token: int) -> list[tuple[Tensor, Tensor]]:
    """What a model does in a decode step: gives each layer the keys and values of one token."""
    buffers.point()
    with buffers.step():
        seen = [
            cache.update(states(1, str(pair[0].device), token), states(1, str(pair[0].device), token + 1), index)
            for index, pair in enumerate(buffers.layers)
        ]
    buffers.length += 1
    return seen


# Lending ----------------------------------------------------------------------------------------------------------


def test_a_lent_cache_shows_the_tensors_it_had(here: str) -> None:
    cache = cache_on(here, here)
    lend(cache)
    assert same(cache, cache_on(here, here))


def test_buffers_hold_the_cache_and_zeros_behind_it(here: str) -> None:
    cache = cache_on(here, here)
    buffers = lend(cache)
    for index, pair in enumerate(buffers.layers):
        for buffer, own in zip(pair, tensors(cache_on(here, here))[2 * index :], strict=False):
            assert tuple(buffer.shape) == (BATCH, HEADS, CAPACITY, SIZE)
            assert torch.equal(buffer[:, :, :LENGTH].cpu(), own.cpu())
            assert not buffer[:, :, LENGTH:].cpu().any()


def test_buffers_are_where_the_layers_are(devices: support.Devices) -> None:
    places = devices(2)
    cache = cache_on(*places)
    buffers = lend(cache)
    assert [str(tensor.device) for pair in buffers.layers for tensor in pair] == [places[0]] * 2 + [places[1]] * 2
    assert same(cache, cache_on(*places))


def test_buffers_know_that_all_of_the_cache_is_in_them(here: str) -> None:
    buffers = lend(cache_on(here, here))
    assert buffers.is_whole
    assert buffers.length == LENGTH


def test_a_lent_cache_is_still_a_dynamic_cache(here: str) -> None:
    cache = cache_on(here, here)
    lend(cache)
    assert isinstance(cache, DynamicCache)


def test_a_lent_cache_knows_its_length(here: str) -> None:
    cache = cache_on(here, here)
    lend(cache)
    assert [cache.get_seq_length(), cache.get_seq_length(1)] == [LENGTH, LENGTH]
    assert len(cache) == LAYERS


def test_a_cache_that_is_lent_lets_go_of_its_own_tensors(here: str) -> None:
    cache = cache_on(here, here)
    own = [weakref.ref(tensor) for tensor in tensors(cache)]
    lend(cache)
    gc.collect()
    assert [ref() for ref in own] == [None] * len(own)


def test_what_a_lent_cache_showed_stays_as_it_was_when_the_buffers_serve_another(here: str) -> None:
    cache = cache_on(here, here)
    buffers = lend(cache)
    buffers.give_back(cache)
    other = cache_on(here, here, tokens=3)
    buffers.take(other)
    step(other, buffers, 7)
    assert same(cache, cache_on(here, here))


def test_buffers_take_one_cache_after_the_other(here: str) -> None:
    first, second = cache_on(here, here), cache_on(here, here, tokens=3)
    buffers = lend(first)
    buffers.give_back(first)
    buffers.take(second)
    assert same(second, cache_on(here, here, tokens=3))
    assert second.get_seq_length() == buffers.length == 3


def test_a_cache_with_tensors_of_its_own_can_be_taken_again(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    for one in (cache, plain):
        one.crop(-2)
    buffers.take(cache)
    assert buffers.is_whole
    assert cache.get_seq_length() == buffers.length == LENGTH - 2
    assert same(cache, plain)


def test_a_cache_made_in_inference_mode_may_be_lent_outside_of_it(here: str) -> None:
    with torch.inference_mode():
        cache = cache_on(here, here)
    buffers = lend(cache)
    step(cache, buffers, 7)
    assert cache.get_seq_length() == LENGTH + 1


def test_a_cache_for_which_there_is_no_room_is_as_it_was(devices: support.Devices, here: str) -> None:
    if devices.kind != "sim":
        pytest.skip("only simulated devices can be made small")
    cache = cache_on(here, here)
    before = attributes(cache)
    bytes_of_a_layer = 2 * BATCH * HEADS * 64 * SIZE * 4
    simulated.set_capacity(0, simulated.allocated(0) + bytes_of_a_layer * 3 // 2)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            lend(cache, 64)
    finally:
        simulated.set_capacity(0, None)
    assert same(cache, cache_on(here, here))
    assert attributes(cache) == before


# Steps ------------------------------------------------------------------------------------------------------------


def test_in_a_step_a_token_is_written_behind_the_last_one(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    for token in (7, 9):
        step(cache, buffers, token)
        for index in range(LAYERS):
            plain.update(states(1, here, token), states(1, here, token + 1), index)
    assert buffers.is_whole
    assert cache.get_seq_length() == LENGTH + 2
    assert same(cache, plain)


def test_in_a_step_the_model_sees_all_of_the_buffers(here: str) -> None:
    cache = cache_on(here, here)
    buffers = lend(cache)
    for seen, own in zip(step(cache, buffers, 7), buffers.layers, strict=True):
        assert [tensor.data_ptr() for tensor in seen] == [tensor.data_ptr() for tensor in own]
        assert tuple(seen[0].shape) == (BATCH, HEADS, CAPACITY, SIZE)


def test_a_step_writes_on_every_device(devices: support.Devices) -> None:
    places = devices(2)
    cache, plain = cache_on(*places), cache_on(*places)
    step(cache, lend(cache), 7)
    for index, place in enumerate(places):
        plain.update(states(1, place, 7), states(1, place, 8), index)
    assert same(cache, plain)


def test_a_step_that_fails_is_over(here: str) -> None:
    buffers = lend(cache_on(here, here))
    with pytest.raises(ValueError, match="mistake"), buffers.step():
        raise ValueError("a mistake of the model's")
    assert not buffers.is_stepping


@pytest.mark.parametrize("tokens", [1, 3])
def test_outside_of_a_step_an_update_concatenates_as_ever(here: str, tokens: int) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    for index in range(LAYERS):
        seen, expected = (one.update(states(tokens, here, 7), states(tokens, here, 8), index) for one in (cache, plain))
        assert support.same([t.cpu() for t in seen], [t.cpu() for t in expected])
    assert same(cache, plain)
    assert cache.get_seq_length() == LENGTH + tokens
    assert not buffers.is_whole


# Giving back ------------------------------------------------------------------------------------------------------


def test_a_cache_that_was_given_back_is_what_it_would_have_been(here: str) -> None:
    cache = cache_on(here, here)
    before = attributes(cache)
    lend(cache).give_back(cache)
    assert same(cache, cache_on(here, here))
    assert attributes(cache) == before
    assert cache.get_seq_length() == LENGTH


def test_a_cache_that_was_given_back_keeps_what_steps_have_written(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    step(cache, buffers, 7)
    buffers.give_back(cache)
    for index in range(LAYERS):
        plain.update(states(1, here, 7), states(1, here, 8), index)
    assert same(cache, plain)
    assert attributes(cache) == attributes(plain)


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_a_cache_that_grew_by_itself_is_given_back_as_it_is(here: str, layers: int) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    for index in range(layers):
        for one in (cache, plain):
            one.update(states(1, here, 7), states(1, here, 8), index)
    buffers.give_back(cache)
    assert same(cache, plain)
    assert attributes(cache) == attributes(plain)


def test_a_cache_can_be_given_back_twice(here: str) -> None:
    cache = cache_on(here, here)
    buffers = lend(cache)
    buffers.give_back(cache)
    buffers.give_back(cache)
    assert same(cache, cache_on(here, here))


def test_a_cache_that_was_given_back_holds_no_buffers(here: str) -> None:
    cache = cache_on(here, here)
    buffers = lend(cache)
    freed = weakref.ref(buffers)
    buffers.give_back(cache)
    del buffers
    gc.collect()
    assert freed() is None


def test_a_cache_that_was_given_back_goes_on(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    lend(cache).give_back(cache)
    for one in (cache, plain):
        for index in range(LAYERS):
            one.update(states(2, here, 7), states(2, here, 8), index)
    assert same(cache, plain)


@layered
def test_a_cache_that_is_reset_while_it_is_lent_is_given_back_as_a_plain_one(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    for one in (cache, plain):
        one.reset()
    buffers.give_back(cache)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert [t if t is None else t.tolist() for t in tensors(cache)] == [
        t if t is None else t.tolist() for t in tensors(plain)
    ]
    assert attributes(cache) == attributes(plain)


# In other hands ---------------------------------------------------------------------------------------------------

CHANGES = {
    "crop": lambda cache, rows: cache.crop(-2),
    "reorder_cache": lambda cache, rows: cache.reorder_cache(rows),
    "batch_select_indices": lambda cache, rows: cache.batch_select_indices(rows[:1]),
    "batch_repeat_interleave": lambda cache, rows: cache.batch_repeat_interleave(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_lent_cache_is_changed_as_a_plain_one(here: str, change: Callable[[Any, Tensor], None]) -> None:
    cache, plain, rows = cache_on(here, here), cache_on(here, here), torch.tensor([1, 0], device=here)
    buffers = lend(cache)
    for one in (cache, plain):
        change(one, rows)
    assert same(cache, plain)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert not buffers.is_whole


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_cache_that_was_changed_is_given_back_as_a_plain_one(
    here: str, change: Callable[[Any, Tensor], None]
) -> None:
    cache, plain, rows = cache_on(here, here), cache_on(here, here), torch.tensor([1, 0], device=here)
    buffers = lend(cache)
    for one in (cache, plain):
        change(one, rows)
    buffers.give_back(cache)
    assert same(cache, plain)
    assert attributes(cache) == attributes(plain)


def test_a_deep_copy_of_a_lent_cache_shows_the_same_and_shares_nothing(here: str) -> None:
    cache = cache_on(here, here)
    buffers = lend(cache)
    twin = copy.deepcopy(cache)
    step(cache, buffers, 7)
    assert twin.get_seq_length() == LENGTH
    assert same(twin, cache_on(here, here))


def test_a_deep_copy_of_a_lent_cache_goes_on_by_itself(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = lend(cache)
    twin = copy.deepcopy(cache)
    for one in (twin, plain):
        for index in range(LAYERS):
            one.update(states(2, here, 7), states(2, here, 8), index)
    assert same(twin, plain)
    assert buffers.is_whole
    assert same(cache, cache_on(here, here))


@pytest.mark.skipif(IS_LAYERED, reason="this transformers keeps a list of layers, not of keys")
@pytest.mark.parametrize(
    "read",
    [lambda keys: [keys[-1]], lambda keys: keys[:1], lambda keys: keys[::-1], list, lambda keys: [*reversed(keys)]],
    ids="last slice backwards list reversed".split(),
)
def test_the_list_of_keys_is_a_list_like_any_other(here: str, read: Callable[[Any], list[Tensor]]) -> None:
    cache = cache_on(here, here)
    lend(cache)
    assert support.same(read(cache.key_cache), read(cache_on(here, here).key_cache))


def test_a_lent_cache_can_be_iterated_over_where_a_plain_one_can(here: str) -> None:
    plain = cache_on(here, here)
    if not hasattr(plain, "__iter__"):
        pytest.skip("this transformers' caches cannot be iterated over")
    cache = cache_on(here, here)
    lend(cache)
    for ours, theirs in zip(cache, plain, strict=True):
        assert support.same([t.cpu() for t in ours if t is not None], [t.cpu() for t in theirs if t is not None])


class _Watched(Buffers):
    """Calls back whenever it is told that it is not whole any more: while a layer takes its tensors back."""

    changes: Callable[[], None] = staticmethod(lambda: None)

    @property
    def is_whole(self) -> bool:
        return self._is_whole

    @is_whole.setter
    def is_whole(self, value: bool) -> None:
        self._is_whole = value
        if not value:
            self.changes()


def test_each_layer_shows_its_tensors_in_the_midst_of_being_given_back(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    buffers = _Watched(cache, CAPACITY)
    buffers.take(cache)
    seen: list[list[Any]] = []
    buffers.changes = lambda: seen.append(tensors(cache))
    buffers.give_back(cache)
    expected = [tensor.cpu() for tensor in tensors(plain)]
    assert seen
    for now in seen:
        assert all(isinstance(tensor, Tensor) for tensor in now)
        assert support.same([tensor.cpu() for tensor in now], expected)


def test_another_thread_may_read_while_a_cache_is_given_back(here: str) -> None:
    cache, plain = cache_on(here, here), cache_on(here, here)
    shapes = [tensor.shape for tensor in tensors(plain)]
    is_being_lent, is_over = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not is_over.is_set():
                with is_being_lent:
                    assert cache.get_seq_length() == LENGTH
                    assert [tensor.shape for tensor in tensors(cache)] == shapes
        except BaseException as error:
            errors.append(error)

    buffers = Buffers(cache, CAPACITY)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    try:
        reader.start()
        for _ in range(30):
            with is_being_lent:
                buffers.take(cache)
            buffers.give_back(cache)
    finally:
        is_over.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert not errors
    assert same(cache, plain)


# Sliding windows --------------------------------------------------------------------------------------------------


@layered
def test_a_sliding_layer_keeps_what_a_plain_one_keeps(here: str) -> None:
    cache, plain = (cache_on(here, here, config=sliding()) for _ in range(2))
    buffers = lend(cache, WINDOW)
    for token in range(7, 7 + WINDOW - LENGTH):
        step(cache, buffers, token)
        for index in range(LAYERS):
            plain.update(states(1, here, token), states(1, here, token + 1), index)
        assert same(cache, plain)
    assert cache.get_seq_length() == plain.get_seq_length() == WINDOW


@layered
def test_a_full_sliding_layer_is_given_back_as_a_plain_one(here: str) -> None:
    cache, plain = (cache_on(here, here, config=sliding()) for _ in range(2))
    buffers = lend(cache, WINDOW)
    for token in range(7, 7 + WINDOW - LENGTH):
        step(cache, buffers, token)
        for index in range(LAYERS):
            plain.update(states(1, here, token), states(1, here, token + 1), index)
    buffers.give_back(cache)
    assert attributes(cache) == attributes(plain)
    for one in (cache, plain):
        for index in range(LAYERS):
            one.update(states(2, here, 7), states(2, here, 8), index)
    assert same(cache, plain)
    assert cache.get_seq_length() == plain.get_seq_length()


@layered
def test_a_lent_sliding_layer_tells_the_sizes_of_masks_as_a_plain_one(here: str) -> None:
    cache, plain = (cache_on(here, here, config=sliding()) for _ in range(2))
    lend(cache, WINDOW)
    assert cache.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)
    assert cache.is_sliding == plain.is_sliding == [True, True]


@layered
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_lent_sliding_layer_concatenates_outside_of_a_step_as_a_plain_one(here: str, tokens: int) -> None:
    cache, plain = (cache_on(here, here, config=sliding()) for _ in range(2))
    lend(cache, WINDOW)
    for one in (cache, plain):
        for index in range(LAYERS):
            one.update(states(tokens, here, 7), states(tokens, here, 8), index)
    assert same(cache, plain)
    assert cache.get_seq_length() == plain.get_seq_length() == LENGTH + tokens


@layered
def test_a_lent_sliding_layer_is_cropped_as_a_plain_one(here: str) -> None:
    cache, plain = (cache_on(here, here, config=sliding()) for _ in range(2))
    buffers = lend(cache, WINDOW)
    for one in (cache, plain):
        one.crop(-2)
    buffers.give_back(cache)
    assert same(cache, plain)
    assert cache.get_seq_length() == plain.get_seq_length() == LENGTH - 2


@layered
def test_the_longest_is_the_smallest_window(here: str) -> None:
    cache = cache_on(here, here, config=sliding())
    cache.layers[1].sliding_window = 6
    assert caches.longest(cache) == 6
    lend(cache, 6)
    assert caches.longest(cache) == 6


def test_without_windows_there_is_no_longest(here: str) -> None:
    assert caches.longest(cache_on(here, here)) is None


# What suits, and what cannot be lent ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, LENGTH, 3 * CAPACITY])
def test_buffers_suit_a_cache_of_another_length(here: str, tokens: int) -> None:
    assert Buffers(cache_on(here, here), CAPACITY).suit(cache_on(here, here, tokens=tokens))


@pytest.mark.parametrize("options", [{"batch": 1}, {"dtype": torch.float16}], ids=["batch", "type"])
def test_buffers_do_not_suit_another_kind_of_cache(here: str, options: dict[str, Any]) -> None:
    assert not Buffers(cache_on(here, here), CAPACITY).suit(cache_on(here, here, **options))


@pytest.mark.parametrize("layers", [1, 3])
def test_buffers_do_not_suit_a_cache_with_another_number_of_layers(here: str, layers: int) -> None:
    assert not Buffers(cache_on(here, here), CAPACITY).suit(cache_on(*[here] * layers))


def test_buffers_do_not_suit_a_cache_on_other_devices(devices: support.Devices) -> None:
    here, there = devices(2)
    assert not Buffers(cache_on(here, here), CAPACITY).suit(cache_on(here, there))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bytes_are_those_of_all_buffers(here: str, dtype: torch.dtype) -> None:
    buffers = lend(cache_on(here, here, dtype=dtype))
    assert buffers.nbytes == 2 * LAYERS * BATCH * HEADS * CAPACITY * SIZE * dtype.itemsize


def test_an_empty_cache_awaits_a_prompt(here: str) -> None:
    assert caches.is_empty(DynamicCache())
    assert not caches.is_empty(cache_on(here, here))


def test_a_lent_cache_is_not_empty(here: str) -> None:
    cache = cache_on(here, here)
    lend(cache)
    assert not caches.is_empty(cache)


def test_nothing_speaks_against_a_dynamic_cache_lent_or_not(here: str) -> None:
    cache = cache_on(here, here)
    assert caches.reason_against(cache) == ""
    lend(cache)
    assert caches.reason_against(cache) == ""


@layered
def test_nothing_speaks_against_sliding_layers(here: str) -> None:
    cache = cache_on(here, here, config=sliding())
    assert caches.reason_against(cache) == ""
    lend(cache, WINDOW)
    assert caches.reason_against(cache) == ""


def test_a_static_cache_is_refused_by_its_name() -> None:
    cache = transformers.StaticCache.__new__(transformers.StaticCache)
    if IS_LAYERED:
        cache.layers = []
    assert caches.reason_against(cache) == "The cache is a StaticCache, not the usual DynamicCache."


def test_a_class_made_from_dynamic_cache_is_refused_by_its_name() -> None:
    assert "Offloaded" in caches.reason_against(type("Offloaded", (DynamicCache,), {})())


def test_no_cache_is_refused() -> None:
    assert "NoneType" in caches.reason_against(None)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_cache_in_tuples_is_refused(here: str, kind: type) -> None:
    layer = (states(LENGTH, here), states(LENGTH, here))
    assert "keeps this model's cache in tuples" in caches.reason_against(kind([layer, layer]))


@layered
def test_an_offloaded_cache_is_refused(here: str) -> None:
    cache = cache_on(here, here)
    cache.offloading = True
    assert caches.reason_against(cache) == "The cache is offloaded to the CPU."


@layered
def test_a_layer_of_another_kind_is_refused_by_its_name(here: str) -> None:
    cache = cache_on(here, here)
    cache.layers[1].__class__ = type("OddLayer", (type(cache.layers[1]),), {})
    assert "OddLayer" in caches.reason_against(cache)


@layered
def test_a_cache_that_is_empty_in_some_layers_is_refused(here: str) -> None:
    assert caches.reason_against(cache_on(here, config=sliding())) == "The cache is empty in some layers."


@layered
def test_a_cache_that_records_what_it_drops_is_refused(here: str) -> None:
    cache = cache_on(here, here, config=sliding())
    cache.activate_past_recording()
    assert "records what it drops" in caches.reason_against(cache)
