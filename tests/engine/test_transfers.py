"""One move per tensor, device and forward; in-place changes are noticed; containers keep their type."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import UserDict, namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from extensions.sharded_kv.engine.transfers import ForwardState, TrafficCounter, first_device
from tests import support

Pair = namedtuple("Pair", "left right")


@pytest.fixture
def counter() -> TrafficCounter:
    return TrafficCounter()


@pytest.fixture
def forward(counter: TrafficCounter) -> ForwardState:
    return ForwardState(object(), counter)


@pytest.fixture
def here(devices: support.Devices) -> torch.device:
    return torch.device(devices(2)[0])


@pytest.fixture
def there(devices: support.Devices) -> torch.device:
    return torch.device(devices(2)[1])


def test_a_tensor_crosses_once_however_often_it_is_asked_for(
    forward: ForwardState, counter: TrafficCounter, here: torch.device, there: torch.device
) -> None:
    mask = torch.ones(3, 4, device=here)
    assert forward.move(mask, there) is forward.move(mask, there)
    assert counter.read().copies == {(str(here), str(there)): 1}
    assert counter.read().bytes == {(str(here), str(there)): 48}


def test_a_copy_lives_no_longer_than_its_source(forward: ForwardState, here: torch.device, there: torch.device) -> None:
    hidden = torch.ones(3, device=here)
    copy = weakref.ref(forward.move(hidden, there))
    assert copy() is not None
    del hidden
    assert copy() is None


def test_inputs_that_were_given_stay_as_they_were(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    """Where the second cannot be moved, accelerate gets what we were given, not half of it moved."""
    given = {"mask": torch.ones(2, device=here), "states": torch.ones(3, device=here)}
    _, moved = forward.move_inputs((), given, there)
    assert {name: tensor.device for name, tensor in given.items()} == {"mask": here, "states": here}
    assert {name: tensor.device for name, tensor in moved.items()} == {"mask": there, "states": there}


def test_a_tensor_in_place_is_returned_itself(
    forward: ForwardState, counter: TrafficCounter, here: torch.device
) -> None:
    mask = torch.ones(3, device=here)
    assert forward.move(mask, here) is mask
    assert counter.read().total_copies == 0


def test_inputs_that_every_block_is_given_cross_once(
    forward: ForwardState, counter: TrafficCounter, here: torch.device, there: torch.device
) -> None:
    given = {"mask": torch.ones(2, device=here), "rotary": (torch.ones(3, device=here), torch.zeros(3, device=here))}
    sets = [forward.move_inputs((), dict(given, cache=None), there)[1] for _ in range(4)]
    assert counter.read().total_copies == 3
    assert all(moved["mask"] is sets[0]["mask"] for moved in sets)
    assert all(moved["rotary"][1] is sets[0]["rotary"][1] for moved in sets)


@pytest.mark.parametrize("changed", ["source", "copy"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_inputs_that_every_block_is_given_are_right_after_a_change_in_place(
    forward: ForwardState, here: torch.device, there: torch.device, changed: str, blocks: int
) -> None:
    given = {"mask": torch.ones(2, device=here), "rotary": (torch.ones(1, device=here),)}
    for _ in range(blocks):
        _, moved = forward.move_inputs((), dict(given), there)
    (given if changed == "source" else moved)["rotary"][0].add_(1)
    _, moved = forward.move_inputs((), dict(given), there)
    assert moved["rotary"][0].tolist() == [2 if changed == "source" else 1]
    assert moved["mask"].tolist() == [1, 1]


def test_a_block_is_given_its_own_inputs_after_others_had_the_same(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    mask, own = torch.ones(2, device=here), torch.zeros(2, device=here)
    for _ in range(3):
        forward.move_inputs((), {"mask": mask, "layer": None}, there)
    assert forward.move_inputs((), {"mask": mask, "layer": 3}, there)[1]["layer"] == 3
    assert forward.move_inputs((), {"mask": own, "layer": None}, there)[1]["mask"].tolist() == [0, 0]
    assert forward.move_inputs((), {"bias": mask, "layer": None}, there)[1].keys() == {"bias", "layer"}
    assert forward.move_inputs((), {"mask": mask, "layer": None}, here)[1]["mask"] is mask


def test_inputs_that_came_under_each_others_names_are_told_apart(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    left, right = torch.zeros(1, device=here), torch.ones(1, device=here)
    for _ in range(2):
        forward.move_inputs((), {"left": left, "right": right}, there)
    _, moved = forward.move_inputs((), {"right": left, "left": right}, there)
    assert (moved["left"].item(), moved["right"].item()) == (1, 0)


def test_what_is_to_stay_stays_though_every_block_before_had_it_moved(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    cache = torch.ones(1, device=here)
    for _ in range(2):
        forward.move_inputs((), {"cache": cache}, there)
    assert forward.move_inputs((), {"cache": cache}, there, frozenset({"cache"}))[1]["cache"] is cache


def test_types_that_somebody_makes_as_he_goes_do_not_stay(forward: ForwardState, here: torch.device) -> None:
    made = []
    for number in range(3000):
        kind = type(f"Kind{number}", (), {})
        made.append(weakref.ref(kind))
        forward.move_inputs((), {"value": kind()}, here)
    del kind
    gc.collect()
    assert sum(kind() is not None for kind in made) <= 1024


def test_a_hidden_state_that_crossed_by_name_is_not_held(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    hidden, mask = torch.ones(3, device=here), torch.ones(2, device=here)
    forward.move_inputs((), {"mask": mask}, there)
    forward.move_inputs((), {"mask": mask, "hidden": hidden}, there)
    source = weakref.ref(hidden)
    del hidden
    assert source() is None


def test_a_list_that_was_changed_is_moved_again(forward: ForwardState, here: torch.device, there: torch.device) -> None:
    states = [torch.ones(2, device=here)]
    for length in range(1, 4):
        _, moved = forward.move_inputs((), {"states": states}, there)
        assert len(moved["states"]) == length
        states.append(states[0])


def test_a_source_changed_in_place_crosses_again(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    mask = torch.ones(3, device=here)
    forward.move(mask, there)
    mask.add_(1)
    assert forward.move(mask, there).tolist() == [2, 2, 2]


def test_a_copy_changed_in_place_is_not_given_to_the_next_block(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    mask = torch.ones(3, device=here)
    forward.move(mask, there).add_(1)
    assert forward.move(mask, there).tolist() == [1, 1, 1]


def test_an_inference_tensor_crosses_once_while_one_device_has_its_turn(
    forward: ForwardState, counter: TrafficCounter, here: torch.device, there: torch.device
) -> None:
    with torch.inference_mode():
        mask = torch.ones(3, device=here)
        forward.enter(there)
        forward.move(mask, there)
        forward.move(mask, there)
        assert counter.read().total_copies == 1
        forward.enter(here)
        mask.add_(1)
        forward.enter(there)
        assert forward.move(mask, there).tolist() == [2, 2, 2]
    forward.close()


def test_a_closed_forward_forgets(
    forward: ForwardState, counter: TrafficCounter, here: torch.device, there: torch.device
) -> None:
    mask = torch.ones(3, device=here)
    forward.move(mask, there)
    forward.close()
    forward.move(mask, there)
    assert counter.read().total_copies == 2


def test_gradients_flow_back_through_a_shared_copy(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    weight = torch.ones(2, device=here, requires_grad=True)
    (forward.move(weight, there) + forward.move(weight, there) * 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [4, 4]


def test_nested_containers_keep_their_types(forward: ForwardState, here: torch.device, there: torch.device) -> None:
    def tensor() -> torch.Tensor:
        return torch.ones(2, device=here)

    value = {"list": [tensor(), 1], "pair": Pair(tensor(), None), "tuple": (tensor(), "text"), "none": None}
    moved = forward.move(value, there)
    assert isinstance(moved["list"], list)
    assert isinstance(moved["pair"], Pair)
    assert isinstance(moved["tuple"], tuple)
    assert {str(moved[key][0].device) for key in ("list", "pair", "tuple")} == {str(there)}
    assert moved["tuple"][1] == "text"


def test_containers_with_nothing_to_move_are_the_same_objects(forward: ForwardState, here: torch.device) -> None:
    value = {"list": [torch.ones(2, device=here)], "pair": Pair(1, 2)}
    assert forward.move(value, here) is value


def test_named_caches_stay(forward: ForwardState, here: torch.device, there: torch.device) -> None:
    cache = ((torch.ones(2, device=here),) * 2,)
    _, kwargs = forward.move_inputs((), {"past": cache, "mask": torch.ones(2, device=here)}, there, frozenset({"past"}))
    assert kwargs["past"] is cache
    assert kwargs["mask"].device == there


def test_a_container_that_moves_itself_is_asked_to_and_counted(
    forward: ForwardState, counter: TrafficCounter, here: torch.device, there: torch.device
) -> None:
    class Shared(UserDict):  # as transformers 5 hands keys and values from layer to layer of Gemma 4
        def to(self, device: torch.device) -> Shared:
            for key in list(self):
                self[key] = self[key].to(device)
            return self

    shared = Shared(key=torch.ones(2, device=here))
    assert forward.move(shared, there) is shared
    assert shared["key"].device == there
    assert counter.read().total_bytes == 8


def test_an_output_comes_home_without_its_cache(forward: ForwardState, here: torch.device, there: torch.device) -> None:
    layer = (torch.ones(2, device=there), torch.ones(2, device=there))
    output = CausalLMOutputWithPast(logits=torch.ones(2, device=there), past_key_values=(layer, layer))
    moved = forward.move_home(output, here, frozenset({"past_key_values"}))
    assert isinstance(moved, CausalLMOutputWithPast)
    assert moved.logits.device == here
    assert moved["logits"] is moved.logits
    assert moved.past_key_values[0][0] is layer[0]
    assert moved.loss is None
    assert output.logits.device == there


def test_an_output_of_transformers_comes_home_without_its_constructor(
    forward: ForwardState, here: torch.device, there: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = CausalLMOutputWithPast(logits=torch.ones(2, device=there), past_key_values=((), ()))
    monkeypatch.delattr(CausalLMOutputWithPast, "__init__")
    assert forward.move_home(output, here, frozenset({"past_key_values"})).logits.device == here


def test_an_output_with_more_in_it_than_its_fields_is_made_by_its_class(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    @dataclasses.dataclass
    class WithProbabilities(CausalLMOutputWithPast):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.probabilities = self.logits.softmax(-1)

    moved = forward.move_home(WithProbabilities(logits=torch.ones(2, device=there)), here)
    assert moved.logits.device == moved.probabilities.device == here


def test_every_tensor_of_a_tuple_output_comes_home(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    def tensor() -> torch.Tensor:
        return torch.ones(2, device=there)

    logits, nested = forward.move_home((tensor(), ((tensor(), tensor()), [tensor()])), here)
    assert {tensor.device for tensor in (logits, *nested[0], *nested[1])} == {here}


def test_a_copy_without_gradient_is_not_given_to_who_wants_one(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    weight = torch.ones(2, device=here, requires_grad=True)
    with torch.no_grad():
        forward.move(weight, there)
    forward.move(weight, there).sum().backward()
    assert weight.grad is not None


def test_a_copy_made_in_inference_mode_is_not_given_to_training(
    forward: ForwardState, here: torch.device, there: torch.device
) -> None:
    x = torch.ones(2, device=here)
    with torch.inference_mode():
        forward.move(x, there)
    weight = torch.ones(2, device=there, requires_grad=True)
    (forward.move(x, there) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1]


def test_a_packed_sequence_moves_itself(forward: ForwardState, here: torch.device, there: torch.device) -> None:
    packed = torch.nn.utils.rnn.PackedSequence(torch.ones(2, device=here), torch.tensor([2]))
    assert forward.move(packed, there).data.device == there


def test_what_came_home_is_known_where_it_came_from(
    forward: ForwardState, counter: TrafficCounter, here: torch.device, there: torch.device
) -> None:
    hidden = torch.ones(2, device=there)
    at_home = forward.move_home(hidden, here)
    assert at_home.device == here
    assert forward.move(at_home, there) is hidden
    assert counter.read().total_copies == 1


def test_an_output_that_is_home_is_the_same_object(forward: ForwardState, here: torch.device) -> None:
    output = BaseModelOutput(last_hidden_state=torch.ones(2, device=here))
    assert forward.move_home(output, here) is output


def test_inputs_on_the_host_are_fetched(forward: ForwardState, there: torch.device) -> None:
    assert forward.move(torch.ones(2), there).device == there


def test_the_first_tensor_gives_the_device(here: torch.device, there: torch.device) -> None:
    assert first_device(((1, None), {"a": [torch.ones(1, device=there)], "b": torch.ones(1, device=here)})) == there
    assert first_device((1, {"a": "text"})) is None
