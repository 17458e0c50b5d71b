"""A KVCache answers as transformers' DynamicCache does, whatever is done to it, and writes in place."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from extensions.sharded_kv.engine.compat import has_cache_objects
from tests import support
from tools import simulated

DynamicCache: Any = getattr(transformers, "DynamicCache", None)
if not has_cache_objects():
    pytest.skip("this transformers keeps caches in tuples", allow_module_level=True)

from extensions.sharded_kv.engine.graphs import eligible  # noqa: E402
from extensions.sharded_kv.engine.kv.buffer import Room  # noqa: E402
from extensions.sharded_kv.engine.kv.cache import IS_LAYERED, KVCache  # noqa: E402

layered = pytest.mark.skipif(not IS_LAYERED, reason="this transformers knows no layers of caches")
HAS_WINDOWS = hasattr(transformers.cache_utils, "DynamicSlidingWindowLayer")
windows = pytest.mark.skipif(not HAS_WINDOWS, reason="this transformers keeps no window in its cache")

BATCH, HEADS, SIZE, LAYERS = 2, 3, 4, 2
LENGTH = 5
WINDOW = 8


@pytest.fixture
def here(devices: support.Devices) -> str:
    return devices(1)[0]


def states(tokens: int, device: str, seed: int = 0, batch: int = BATCH, dtype: Any = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, tokens, SIZE, generator=generator).to(device, dtype)


@torch.no_grad()
def write(cache: Any, tokens: int, *places: str, seed: int = 0, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """What a model does in a forward: gives each layer the keys and values of some tokens."""
    return [
        cache.update(
            states(tokens, place, seed + 2 * index, **options),
            states(tokens, place, seed + 2 * index + 1, **options),
            index,
        )
        for index, place in enumerate(places)
    ]


def sliding() -> Any:
    return transformers.MistralConfig(sliding_window=WINDOW, num_hidden_layers=LAYERS)


def pair(*places: str, tokens: int = LENGTH, config: Any = None, room: Room | None = None, **options: Any) -> list[Any]:
    """A KVCache and a DynamicCache, to which the same was written: a layer on each device."""
    plain = DynamicCache() if config is None else DynamicCache(config=config)
    caches = [KVCache.in_place_of(plain, room or Room()), plain]
    for cache in caches:
        write(cache, tokens, *places, **options)
    return caches


def tensors(cache: Any) -> list[Tensor]:
    """Keys and values of all layers."""
    if IS_LAYERED:
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor for both in zip(cache.key_cache, cache.value_cache, strict=True) for tensor in both]


def same(ours: Any, theirs: Any) -> bool:
    return support.same([tensor.cpu() for tensor in tensors(ours)], [tensor.cpu() for tensor in tensors(theirs)])


def memory(cache: Any) -> list[int]:
    return [buffer.tensor.data_ptr() for buffer in cache.buffers()]


# What it is -------------------------------------------------------------------------------------------------------


def test_it_is_a_dynamic_cache(here: str) -> None:
    ours, _ = pair(here, here)
    assert isinstance(ours, DynamicCache)
    assert len(ours) == LAYERS


def test_it_shows_what_was_written(here: str) -> None:
    ours, plain = pair(here, here)
    assert same(ours, plain)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("longest", [None, 6, 400])
def test_a_model_is_given_all_tokens_of_a_layer(here: str, tokens: int, longest: int | None) -> None:
    ours, plain = pair(here, here, room=Room(longest))
    for round_ in range(4):
        seen, expected = (write(cache, tokens, here, here, seed=9 + round_) for cache in (ours, plain))
        for mine, theirs in zip(seen, expected, strict=True):
            assert support.same([t.cpu() for t in mine], [t.cpu() for t in theirs])
    assert same(ours, plain)
    assert ours.get_seq_length() == plain.get_seq_length() == LENGTH + 4 * tokens


def test_its_buffers_are_where_the_layers_are(devices: support.Devices) -> None:
    places = devices(2)
    ours, plain = pair(*places)
    assert [str(buffer.tensor.device) for buffer in ours.buffers()] == [places[0]] * 2 + [places[1]] * 2
    assert same(ours, plain)


def test_an_empty_one_knows_that_it_is(here: str) -> None:
    cache = KVCache()
    assert cache.get_seq_length() == 0
    assert list(cache.buffers()) == []


def test_it_may_be_made_in_inference_mode_and_go_on_outside_of_it(here: str) -> None:
    with torch.inference_mode():
        ours, plain = pair(here, here)
    for cache in (ours, plain):
        write(cache, 1, here, here, seed=7)
    assert same(ours, plain)


def test_a_layer_of_another_type_or_batch_follows_transformers_rules(here: str) -> None:
    ours, plain = pair(here, here)
    for cache in (ours, plain):
        write(cache, 1, here, here, dtype=torch.float64)
    assert same(ours, plain)
    assert tensors(ours)[0].dtype == tensors(plain)[0].dtype
    for cache in (ours, plain):
        with pytest.raises(RuntimeError, match=r"[Ss]izes|match"):
            write(cache, 1, here, here, batch=1, dtype=torch.float64)


# Writing in place -------------------------------------------------------------------------------------------------


class Written(TorchDispatchMode):
    """Counts the bytes that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if func is torch.ops.aten.index_copy_.default:
            out = args[3]  # what is written is the source
        if isinstance(out, Tensor) and (returns[0].alias_info is None or returns[0].alias_info.is_write):
            self.bytes += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize("length", [8, 64, 512])
def test_a_token_writes_its_own_bytes_however_long_the_cache_is(here: str, length: int) -> None:
    ours, plain = pair(here, here, tokens=length - 1)
    for cache in (ours, plain):
        write(cache, 1, here, here)
    new = [states(1, here, seed) for seed in range(4)]
    counted = []
    for cache in (ours, plain):
        with torch.no_grad(), Written() as written:
            for index in range(LAYERS):
                cache.update(new[2 * index], new[2 * index + 1], index)
        counted.append(written.bytes)
    of_a_token, its_place = 2 * LAYERS * BATCH * HEADS * SIZE * 4, 8
    assert counted == [of_a_token + its_place, (length + 1) * of_a_token]


def test_tokens_for_which_there_is_room_move_no_buffer(here: str) -> None:
    ours, _ = pair(here, here, room=Room(longest=20))
    write(ours, 1, here, here)
    before = memory(ours)
    for token in range(14):
        write(ours, 1, here, here, seed=token)
    assert memory(ours) == before
    assert ours.get_seq_length() == 20


def test_there_is_room_for_what_the_reply_may_add_and_no_more(here: str) -> None:
    assert Room(longest=30).capacity(9) == 30
    assert Room(longest=5000).capacity(9) == 9 + 1024
    assert Room(longest=50_000).capacity(8000) == 8000 + 2000
    assert Room().capacity(9) == 9 + 256
    assert Room(longest=30, step=256).capacity(9) == 256
    assert Room(longest=30).capacity(31) == 31  # the reply's last token
    assert Room(longest=30).capacity(40) == 40 + 256  # it was wrong about the reply, or another one goes on
    assert Room(longest=300, most_ahead=64).capacity(9) == 9 + 64


def test_behind_the_last_token_there_are_zeros(here: str) -> None:
    ours, _ = pair(here, here)
    ours.truncate(3)
    for buffer in ours.buffers():
        assert not buffer.tensor[:, :, buffer.length :].cpu().any()


def test_the_bytes_are_those_of_all_buffers(here: str) -> None:
    ours, _ = pair(here, here, room=Room(longest=30), dtype=torch.float16)
    assert sum(ours.bytes_by_device().values()) == 2 * LAYERS * BATCH * HEADS * LENGTH * SIZE * 2
    write(ours, 1, here, here, dtype=torch.float16)
    assert sum(ours.bytes_by_device().values()) == 2 * LAYERS * BATCH * HEADS * 30 * SIZE * 2


def test_where_memory_has_no_room_ahead_it_does_without(devices: support.Devices, here: str) -> None:
    if devices.kind != "sim":
        pytest.skip("only simulated devices can be made small")
    plain = DynamicCache()
    write(plain, LENGTH, here, here)
    ours = KVCache.in_place_of(DynamicCache(), Room(longest=1000))
    of_a_layer = 2 * BATCH * HEADS * 1000 * SIZE * 4
    simulated.set_capacity(0, simulated.allocated(0) + of_a_layer * 3 // 2)
    try:
        write(ours, LENGTH, here, here)
        with pytest.raises(torch.OutOfMemoryError):
            write(ours, 1, here, here, seed=7)
        assert ours.give_room_back(LENGTH)
        for cache in (ours, plain):
            write(cache, 1, here, here, seed=7)
    finally:
        simulated.set_capacity(0, None)
    assert same(ours, plain)
    assert sum(ours.bytes_by_device().values()) == of_a_layer * LAYERS * (LENGTH + 1) // 1000
    assert not ours.give_room_back(LENGTH)


def test_where_there_is_no_memory_at_all_the_cache_is_as_it_was(devices: support.Devices, here: str) -> None:
    if devices.kind != "sim":
        pytest.skip("only simulated devices can be made small")
    ours, plain = pair(here, here, room=Room(longest=LENGTH))
    simulated.set_capacity(0, simulated.allocated(0))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            write(ours, 1, here, here)
    finally:
        simulated.set_capacity(0, None)
    assert same(ours, plain)


@pytest.mark.parametrize("config", [None, "sliding"])
def test_memory_that_runs_out_between_keys_and_values_leaves_both_as_they_were(
    devices: support.Devices, here: str, config: str | None
) -> None:
    if devices.kind != "sim":
        pytest.skip("only simulated devices can be made small")
    if config and not HAS_WINDOWS:
        pytest.skip("this transformers keeps no window in its cache")
    chosen = sliding() if config else None
    ours, plain = pair(here, here, config=chosen, room=Room(longest=100))
    first = next(ours.buffers())
    of_a_buffer = BATCH * HEADS * (WINDOW - 1 + 16 if config else 100) * SIZE * 4
    before = simulated.allocated(0)
    simulated.set_capacity(0, before + of_a_buffer + 1000)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            write(ours, 1, here, here)
    finally:
        simulated.set_capacity(0, None)
    assert first.capacity > LENGTH
    assert ours.give_room_back(LENGTH)
    for cache in (ours, plain):
        write(cache, 1, here, here, seed=7)
    assert same(ours, plain)


@layered
@pytest.mark.parametrize("config", [None, "sliding"])
def test_it_can_go_on_with_layers_of_transformers_own(here: str, config: str | None) -> None:
    if config and not HAS_WINDOWS:
        pytest.skip("this transformers keeps no window in its cache")
    ours, plain = pair(here, here, config=sliding() if config else None, tokens=9)
    ours.become_plain()
    assert [type(layer) for layer in ours.layers] == [type(layer) for layer in plain.layers]
    for cache in (ours, plain):
        write(cache, 2, here, here, seed=7)
        cache.reorder_cache(torch.tensor([1, 0], device=here))
    assert same(ours, plain)
    assert ours.get_seq_length() == plain.get_seq_length()


# Spare buffers of an earlier reply --------------------------------------------------------------------------------


def test_spare_tensors_are_used_in_their_order_and_emptied(here: str) -> None:
    earlier, _ = pair(here, here, tokens=9)
    spare = [buffer.tensor for buffer in earlier.buffers()]
    ours = KVCache.in_place_of(DynamicCache(), Room(spare=spare))
    write(ours, 4, here, here)
    assert [buffer.tensor is tensor for buffer, tensor in zip(ours.buffers(), spare, strict=True)] == [True] * 4
    assert not spare[0][:, :, 4:].cpu().any()
    assert ours.get_seq_length() == 4


@pytest.mark.parametrize("options", [{"batch": 1}, {"dtype": torch.float16}, {"tokens": 30}], ids=str)
def test_spare_tensors_that_do_not_suit_are_let_go(here: str, options: dict[str, Any]) -> None:
    earlier, _ = pair(here, here, tokens=9)
    spare = [buffer.tensor for buffer in earlier.buffers()]
    let_go: list[int] = []
    ours = KVCache.in_place_of(DynamicCache(), Room(spare=spare, let_go=lambda: let_go[:] or let_go.append(1)))
    write(ours, options.pop("tokens", 4), here, here, **options)
    assert let_go == [1]


# What transformers does with a cache ------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any, Tensor], None]] = {
    "crop": lambda cache, rows: cache.crop(-2),
    "reorder_cache": lambda cache, rows: cache.reorder_cache(rows),
    "batch_select_indices": lambda cache, rows: cache.batch_select_indices(rows[:1]),
    "batch_repeat_interleave": lambda cache, rows: cache.batch_repeat_interleave(3),
    "reset": lambda cache, rows: cache.reset() if IS_LAYERED else cache.crop(-5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("again", CHANGES.values(), ids=CHANGES)
def test_it_is_changed_as_a_plain_one_and_goes_on(
    here: str, change: Callable[[Any, Tensor], None], again: Callable[[Any, Tensor], None]
) -> None:
    ours, plain = pair(here, here)
    for step in (change, again):
        batches = []
        for cache in (ours, plain):
            step(cache, torch.arange(tensors(cache)[0].shape[0] - 1, -1, -1, device=here))
            first = tensors(cache)[0]
            batches.append(BATCH if first is None or first.dim() != 4 else first.shape[0])
        assert batches[0] == batches[1]
        for cache in (ours, plain):
            write(cache, 2, here, here, seed=7, batch=batches[0])
        assert same(ours, plain)
        assert ours.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("change", ["crop", "reorder_cache"])
def test_what_keeps_the_shape_keeps_the_buffers(here: str, change: str) -> None:
    if change == "crop" and not IS_LAYERED:
        pytest.skip("this transformers crops what it shows to everybody")
    ours, _ = pair(here, here)
    before = memory(ours)
    with torch.no_grad():
        CHANGES[change](ours, torch.tensor([1, 0], device=here))
    assert memory(ours) == before


def test_a_change_in_place_of_what_it_shows_is_a_change_of_the_cache(here: str) -> None:
    ours, plain = pair(here, here)
    for cache in (ours, plain):
        tensors(cache)[1][:, :, 2:4] += 3
        tensors(cache)[2].zero_()
        write(cache, 1, here, here, seed=7)
    assert same(ours, plain)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_oldest_tokens_can_be_dropped(here: str, tokens: int) -> None:
    ours, plain = pair(here, here)
    for cache in (ours, plain):
        for layer in range(LAYERS):
            for name, cached in (("keys", 0), ("values", 1)):
                shorter = tensors(cache)[2 * layer + cached][:, :, 2:]
                if IS_LAYERED:
                    setattr(cache.layers[layer], name, shorter)
                else:
                    getattr(cache, f"{name.rstrip('s')}_cache")[layer] = shorter
        write(cache, tokens, here, here, seed=7)
        write(cache, 1, here, here, seed=8)
    assert same(ours, plain)
    assert ours.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("config", [None, "sliding"])
@pytest.mark.parametrize("change", ["crop", "reorder_cache", "write"])
def test_what_somebody_has_of_it_stays_as_it_was(here: str, change: str, config: str | None) -> None:
    if config and not HAS_WINDOWS:
        pytest.skip("this transformers keeps no window in its cache")
    ours, _ = pair(here, here, config=sliding() if config else None, room=Room(longest=100))
    write(ours, 1, here, here, seed=7)
    held = tensors(ours)
    before = [tensor.cpu().clone() for tensor in held]
    with torch.no_grad():
        if change != "write":
            CHANGES[change](ours, torch.tensor([1, 0], device=here))
        for token in range(60):
            write(ours, 1, here, here, seed=token)
    assert support.same([tensor.cpu() for tensor in held], before)


def test_a_kept_cache_makes_room_anew_when_it_goes_on(here: str) -> None:
    ours, _ = pair(here, here, room=Room(longest=7))
    write(ours, 1, here, here)
    seen = set()
    for token in range(100):
        write(ours, 1, here, here, seed=token)
        seen.add(tuple(memory(ours)))
    assert len(seen) <= 3


def test_a_tensor_that_somebody_has_set_is_taken_and_never_written_to(here: str) -> None:
    ours, plain = pair(here, here)
    theirs = states(LENGTH + 300, here, seed=42)
    before = theirs.clone()
    for cache in (ours, plain):
        if IS_LAYERED:
            cache.layers[0].keys = cache.layers[0].values = theirs
        else:
            cache.key_cache[0] = cache.value_cache[0] = theirs
        cache.crop(-2)
        write(cache, 1, here, here, seed=7)
    assert support.same([t.cpu() for t in tensors(ours)[:2]], [t.cpu() for t in tensors(plain)[:2]])
    assert torch.equal(theirs.cpu(), before.cpu())


@layered
def test_it_tells_the_sizes_of_masks_as_a_plain_one(here: str) -> None:
    ours, plain = pair(here, here)
    argument = 1 if "query_length" in str(DynamicCache.get_mask_sizes.__code__.co_varnames) else torch.arange(1)
    assert ours.get_mask_sizes(argument, 0) == plain.get_mask_sizes(argument, 0)


def test_with_gradients_it_concatenates_and_carries_them(here: str) -> None:
    ours = KVCache()
    first, second = (states(2, here, seed).requires_grad_() for seed in (1, 2))
    for new in (first, second):
        seen, _ = ours.update(new, new, 0)
    seen.sum().backward()
    assert torch.equal(first.grad.cpu(), torch.ones_like(first).cpu())
    assert torch.equal(second.grad.cpu(), torch.ones_like(second).cpu())


# Copies -----------------------------------------------------------------------------------------------------------


def test_a_deep_copy_shares_nothing_and_goes_on_by_itself(here: str) -> None:
    ours, plain = pair(here, here)
    twin, before = copy.deepcopy(ours), copy.deepcopy(plain)
    write(ours, 1, here, here, seed=7)
    assert same(twin, before)
    for cache in (twin, before):
        write(cache, 2, here, here, seed=8)
    assert same(twin, before)
    assert ours.get_seq_length() == LENGTH + 1


def test_a_deep_copy_takes_no_more_than_what_is_filled(here: str) -> None:
    ours, _ = pair(here, here, room=Room(longest=500))
    assert sum(copy.deepcopy(ours).bytes_by_device().values()) == 2 * LAYERS * BATCH * HEADS * LENGTH * SIZE * 4


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_saved_cache_is_loaded_as_a_plain_one(way: str) -> None:
    ours, plain = pair("cpu", "cpu")
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(loaded) is DynamicCache
    for cache in (loaded, plain):
        write(cache, 1, "cpu", "cpu", seed=7)
    assert same(loaded, plain)
    assert loaded.get_seq_length() == plain.get_seq_length()


def test_a_saved_cache_is_loaded_where_nobody_has_this_package(tmp_path: Path) -> None:
    ours, _ = pair("cpu", "cpu")
    (tmp_path / "cache.pickle").write_bytes(pickle.dumps(ours))
    script = "import pickle; print(pickle.load(open('cache.pickle', 'rb')).get_seq_length())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.split()[-1] == str(LENGTH)


@pytest.mark.parametrize("change", ["crop", "reorder_cache"])
def test_what_was_changed_is_what_its_buffers_hold(here: str, change: str) -> None:
    ours, plain = pair(here, here)
    for cache in (ours, plain):
        CHANGES[change](cache, torch.tensor([1, 0], device=here))
    assert support.same([buffer.filled.cpu() for buffer in ours.buffers()], [t.cpu() for t in tensors(plain)])


# Older transformers -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(IS_LAYERED, reason="this transformers keeps a list of layers, not of keys")
@pytest.mark.parametrize(
    "read",
    [lambda keys: [keys[-1]], lambda keys: keys[:1], lambda keys: keys[::-1], list, lambda keys: [*reversed(keys)]],
    ids="last slice backwards list reversed".split(),
)
def test_the_list_of_keys_is_a_list_like_any_other(here: str, read: Callable[[Any], list[Tensor]]) -> None:
    ours, plain = pair(here, here)
    assert support.same(read(ours.key_cache), read(plain.key_cache))
    write(ours, 1, here, here, seed=7)
    write(plain, 1, here, here, seed=7)
    assert support.same(read(ours.key_cache), read(plain.key_cache))
    assert ours.key_cache[0] is ours.key_cache[0]


def test_it_can_be_iterated_over_where_a_plain_one_can(here: str) -> None:
    ours, plain = pair(here, here)
    if not hasattr(plain, "__iter__"):
        pytest.skip("this transformers' caches cannot be iterated over")
    for mine, theirs in zip(ours, plain, strict=True):
        assert support.same([t.cpu() for t in mine if t is not None], [t.cpu() for t in theirs if t is not None])


# Truncation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 3, LENGTH])
def test_a_truncated_cache_is_as_one_that_never_had_more(here: str, length: int) -> None:
    ours, plain = pair(here, here, tokens=LENGTH)
    ours.truncate(length)
    assert ours.length == length
    if length < LENGTH:
        plain.crop(length - LENGTH)
    for cache in (ours, plain):
        write(cache, 2, here, here, seed=7)
    assert same(ours, plain)


# Sliding windows --------------------------------------------------------------------------------------------------


@windows
@pytest.mark.parametrize("prompt", [1, 3, WINDOW - 1, WINDOW, 3 * WINDOW])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_sliding_layer_keeps_and_gives_what_a_plain_one_does(here: str, prompt: int, tokens: int) -> None:
    ours, plain = pair(here, here, config=sliding(), tokens=prompt)
    for round_ in range(40):
        sizes = [cache.get_mask_sizes(tokens, 0) for cache in (ours, plain)]
        assert sizes[0] == sizes[1]
        seen, expected = (write(cache, tokens, here, here, seed=round_) for cache in (ours, plain))
        for mine, theirs in zip(seen, expected, strict=True):
            assert support.same([t.cpu() for t in mine], [t.cpu() for t in theirs])
        assert same(ours, plain)
        assert ours.get_seq_length() == plain.get_seq_length()
    assert ours.is_sliding == plain.is_sliding == [True, True]


@windows
def test_a_sliding_layers_buffer_follows_its_window_and_not_the_reply(here: str) -> None:
    ours, _ = pair(here, here, config=sliding(), tokens=100, room=Room(longest=4000))
    write(ours, 1, here, here)
    assert {buffer.tensor.shape[2] for buffer in ours.buffers()} == {WINDOW - 1 + 16}


@windows
@pytest.mark.parametrize("prompt", [3, 20])
@pytest.mark.parametrize("back", [1, 2])
def test_a_sliding_layer_can_go_back_a_little(here: str, prompt: int, back: int) -> None:
    ours, plain = pair(here, here, config=sliding(), tokens=prompt)
    for token in range(9):
        for cache in (ours, plain):
            write(cache, 1, here, here, seed=token)
    for token in range(back):
        write(ours, 1, here, here, seed=100 + token)
    ours.truncate(prompt + 9)
    assert same(ours, plain)
    assert ours.get_seq_length() == plain.get_seq_length()


@windows
@pytest.mark.parametrize("prompt", [3, 30])
def test_a_sliding_layer_can_always_go_back_to_nothing(here: str, prompt: int) -> None:
    ours, _ = pair(here, here, config=sliding(), tokens=prompt)
    ours.truncate(0)
    assert ours.length == 0
    fresh = DynamicCache(config=sliding())
    for cache in (ours, fresh):
        write(cache, 12, here, here, seed=5)
        write(cache, 1, here, here, seed=6)
    assert same(ours, fresh)
    assert ours.get_seq_length() == fresh.get_seq_length()


@windows
def test_a_sliding_layer_that_cannot_go_back_says_so(here: str) -> None:
    ours, _ = pair(here, here, config=sliding(), tokens=30)
    before = [tensor.clone() for tensor in tensors(ours)]
    with pytest.raises(ValueError, match="cannot go back to 10 tokens"):
        ours.truncate(10)
    assert support.same([t.cpu() for t in tensors(ours)], [t.cpu() for t in before])
    assert not ours.give_room_back(10)


@windows
def test_a_sliding_layer_that_records_its_past_does_as_a_plain_one(here: str) -> None:
    ours, plain = pair(here, here, config=sliding(), tokens=6)
    if not hasattr(plain, "activate_past_recording"):
        pytest.skip("this transformers has no such recording")
    for cache in (ours, plain):
        cache.activate_past_recording()
        for token in range(9):
            write(cache, 3, here, here, seed=token)
            cache.crop(-2)
    assert same(ours, plain)
    assert ours.get_seq_length() == plain.get_seq_length()


@windows
def test_layers_of_other_kinds_stay_transformers_own(here: str) -> None:
    plain = DynamicCache(config=sliding())
    plain.layers[1] = odd = type("OddLayer", (type(plain.layers[1]),), {})(WINDOW)
    ours = KVCache.in_place_of(plain, Room())
    assert ours.layers[1] is odd
    write(ours, 3, here, here)
    assert eligible.against_cache(ours) == "A layer's cache is a OddLayer, which graph mode does not know."
    with pytest.raises(ValueError, match="OddLayer cannot go back"):
        ours.truncate(2)
    ours.truncate(0)
    assert ours.length == 0


# What is replaced by it -------------------------------------------------------------------------------------------


def test_it_replaces_a_dynamic_cache_and_nothing_else() -> None:
    assert KVCache.can_replace(DynamicCache())
    for other in (None, (), ((1, 2),), KVCache(), type("Offloaded", (DynamicCache,), {})()):
        assert not KVCache.can_replace(other)


@pytest.mark.parametrize("config", [None, "sliding"])
def test_one_in_place_of_a_cache_that_holds_tokens_goes_on_with_them(here: str, config: str | None) -> None:
    if config and not HAS_WINDOWS:
        pytest.skip("this transformers keeps no window in its cache")
    plain, other = (DynamicCache(config=sliding()) if config else DynamicCache() for _ in range(2))
    for cache in (plain, other):
        write(cache, LENGTH, here, here)
    assert KVCache.can_replace(other) == hasattr(other, "layers")
    if not KVCache.can_replace(other):
        return
    ours = KVCache.in_place_of(other, Room())
    assert same(ours, plain)
    for seed in (7, 8):
        for cache in (ours, plain):
            write(cache, 1, here, here, seed=seed)
        assert same(ours, plain)


@layered
def test_it_replaces_no_cache_that_is_offloaded() -> None:
    cache = DynamicCache()
    cache.offloading = True
    assert not KVCache.can_replace(cache)


@layered
def test_a_cache_that_is_empty_in_some_layers_is_none_for_graphs(here: str) -> None:
    plain = DynamicCache(config=transformers.LlamaConfig(num_hidden_layers=LAYERS))
    ours = KVCache.in_place_of(plain, Room())
    write(ours, 1, here)
    if len(ours.layers) < LAYERS:
        pytest.skip("this transformers makes layers as they come")
    assert eligible.against_cache(ours) == "The cache is empty in some layers."
    write(ours, 1, here, here)
    assert eligible.against_cache(ours) == ""
