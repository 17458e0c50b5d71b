"""A step is noted, captured over several devices, and replayed; what a graph cannot repeat is refused."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from extensions.sharded_kv.engine.graphs.capture import Capture, CapturedStep
from extensions.sharded_kv.engine.graphs.trace import CannotCapture, OpTrace
from extensions.sharded_kv.engine.transfers import tensors_in
from tests import support

NAN = float("nan")

Step = Callable[[], Any]
Recorder = Callable[[Step], tuple[CapturedStep, Any]]


@pytest.fixture
def here(devices: support.Devices) -> torch.device:
    return torch.device(devices(1)[0])


@pytest.fixture
def there(devices: support.Devices) -> torch.device:
    return torch.device(devices(2)[1])


@pytest.fixture
def recorder(devices: support.Devices) -> Callable[[], Capture]:
    """Makes a capture with pools of its own: CUDA knows none any more whose graphs are all gone."""
    places = [torch.device(devices.kind, index) for index in range(devices.runtime.device_count())]
    return lambda: Capture({place: devices.runtime.graph_pool_handle() for place in places})


@pytest.fixture
def capture(recorder: Callable[[], Capture]) -> Iterator[Recorder]:
    """Captures a step: the captured, and what the step returned."""
    all_captured = []

    def run(step: Step) -> tuple[CapturedStep, Any]:
        under_way = recorder()
        with torch.no_grad(), under_way.recording():
            output = step()
        all_captured.append(under_way.captured(list(tensors_in(output))))
        return all_captured[-1], output

    yield run
    for captured in all_captured:
        captured.free()


def ops(step: Step) -> list[Any]:
    with torch.no_grad(), OpTrace() as trace:
        step()
    return trace.ops


def grid(device: torch.device, rows: int = 4, columns: int = 4) -> Tensor:
    return torch.arange(float(rows * columns), device=device).reshape(rows, columns)


def places(captured: CapturedStep) -> list[torch.device]:
    return [segment.device for segment in captured.segments]


def ways(captured: CapturedStep) -> list[tuple[torch.device, torch.device]]:
    return [(transfer.source.device, transfer.target.device) for transfer in captured.transfers]


def reuse_free_memory(device: torch.device) -> list[Tensor]:
    """Fill what a capture may have given back too early with other numbers."""
    return [torch.full((size,), 1e6, device=device) for size in (1, 4, 16) for _ in range(32)]


# Notes ------------------------------------------------------------------------------------------------------------


def test_two_equal_steps_have_equal_operators(here: torch.device) -> None:
    x, weight = grid(here), grid(here)
    step = lambda: F.softmax((x @ weight + 1)[:, :3], -1).transpose(0, 1).contiguous()  # noqa: E731
    assert ops(step) == ops(step) != []


@pytest.mark.parametrize(
    ("first", "second"), [(1, 2), (1, 1.0), (1, True), (0.5, 0.25), (0.0, -0.0), (1.0, NAN)], ids=str
)
def test_another_number_that_is_added_makes_other_operators(here: torch.device, first: Any, second: Any) -> None:
    x = grid(here)
    assert ops(lambda: x + first) != ops(lambda: x + second)


def test_the_same_number_makes_the_same_operators_even_if_it_is_nan(here: torch.device) -> None:
    x = grid(here)
    assert ops(lambda: x + float("nan")) == ops(lambda: x + float("nan"))


@pytest.mark.parametrize(
    "step",
    [
        lambda x, n: x[:n],
        lambda x, n: x[n],
        lambda x, n: x.narrow(0, 0, n),
        lambda x, n: torch.arange(n, device=x.device),
        lambda x, n: torch.full((2,), n, device=x.device),
        lambda x, n: x.sum(n - 2),
        lambda x, n: x.masked_fill(x > n, 0),
        lambda x, n: x.clone().__setitem__(0, n),
        lambda x, n: torch.cat([x[:1]] * n),
    ],
    ids="slice select narrow arange full dim compare setitem cat".split(),
)
def test_a_number_that_grows_makes_other_operators(here: torch.device, step: Callable[[Tensor, int], Any]) -> None:
    x = grid(here)
    assert ops(lambda: step(x, 2)) != ops(lambda: step(x, 3))


@pytest.mark.parametrize(
    "step",
    [
        lambda x, n: x + torch.tensor([n], device=x.device),
        lambda x, n: x + x.new_tensor([n]),
        lambda x, n: x[:, [0, n]],
    ],
    ids="tensor new_tensor list".split(),
)
def test_a_number_in_a_tensor_made_on_the_device_makes_other_operators_or_is_refused(
    here: torch.device, step: Callable[[Tensor, int], Any]
) -> None:
    x = grid(here)
    try:
        seen = [ops(lambda number=number: step(x, number)) for number in range(4)]
    except CannotCapture:
        return
    assert all(one != other for one, other in itertools.combinations(seen, 2))


def test_another_tensor_of_the_same_shape_makes_other_operators(here: torch.device) -> None:
    x, weight, adapted = grid(here), grid(here), grid(here)
    assert ops(lambda: x @ weight) != ops(lambda: x @ adapted)


def test_a_result_of_the_step_before_makes_other_operators(here: torch.device) -> None:
    x = grid(here)
    kept: list[Tensor] = []

    def step() -> None:
        if not kept:
            kept.append(x * 2)
        x.add(kept[0])

    assert ops(step) != ops(step)


def test_other_contents_make_the_same_operators(here: torch.device) -> None:
    x = grid(here)
    before = ops(lambda: x * 2)
    x.add_(1)
    assert ops(lambda: x * 2) == before


def test_results_in_another_order_make_other_operators(here: torch.device) -> None:
    x = grid(here)

    def step(order: int) -> Tensor:
        pair = (x + 1, x + 2)
        return pair[order] - pair[1 - order]

    assert ops(lambda: step(0)) != ops(lambda: step(1))


def test_another_value_on_the_cpu_makes_other_operators(here: torch.device) -> None:
    x = grid(here)
    assert ops(lambda: x * torch.tensor(2.0)) != ops(lambda: x * torch.tensor(3.0))


def test_the_same_value_on_the_cpu_makes_the_same_operators(here: torch.device) -> None:
    x = grid(here)
    assert ops(lambda: x * torch.tensor(2.0)) == ops(lambda: x * torch.tensor(2.0))


def test_a_large_tensor_on_the_cpu_is_refused(here: torch.device) -> None:
    large = torch.ones(2000)
    with pytest.raises(CannotCapture, match=r"on the CPU, of the shape \(2000,\)"):
        ops(lambda: large.to(here))


# What a graph cannot repeat ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0, 0].item(),
        lambda x: bool(x[0, 0] > 0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
    ],
    ids="item bool nonzero where mask masked_select equal unique".split(),
)
def test_what_depends_on_values_of_a_gpu_is_refused(here: torch.device, read: Callable[[Tensor], Any]) -> None:
    x = grid(here)
    with pytest.raises(CannotCapture, match="reads back"):
        ops(lambda: read(x))


@pytest.mark.parametrize(
    "read", [lambda x: x[0, 0].item(), lambda x: x.nonzero(), lambda x: x[x > 0]], ids="item nonzero mask".split()
)
def test_what_depends_on_values_of_the_cpu_is_not_refused(here: torch.device, read: Callable[[Tensor], Any]) -> None:
    assert ops(lambda: read(torch.ones(2, 2)))


@pytest.mark.parametrize(
    "index", [lambda x, i: x[i], lambda x, i: x[:, i], lambda x, i: x.index_select(0, i), lambda x, i: x[i, i]]
)
def test_an_index_of_integers_is_not_refused(here: torch.device, index: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, rows = grid(here), torch.tensor([2, 0], device=here)
    assert ops(lambda: index(x, rows))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        torch.rand_like,
        lambda x: torch.rand(3, device=x.device),
        lambda x: torch.multinomial(x.softmax(-1), 1),
        lambda x: x.clone().uniform_(),
    ],
    ids="dropout rand_like rand multinomial uniform_".split(),
)
def test_random_numbers_are_refused(here: torch.device, draw: Callable[[Tensor], Any]) -> None:
    x = grid(here)
    with pytest.raises(CannotCapture, match="random numbers"):
        ops(lambda: draw(x))


def test_dropout_in_a_model_that_is_not_training_is_not_refused(here: torch.device) -> None:
    x, dropout = grid(here), torch.nn.Dropout(0.5).eval()
    assert ops(lambda: dropout(x) + 1)


def test_attention_without_dropout_is_not_refused(here: torch.device) -> None:
    x = grid(here, 8, 8)[None, None]
    assert ops(lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0))


def test_attention_with_dropout_is_refused(here: torch.device) -> None:
    x = grid(here, 8, 8)[None, None]
    with pytest.raises(CannotCapture, match="random numbers"):
        ops(lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5))


@pytest.mark.parametrize(
    "fetch", [Tensor.cpu, lambda x: x.tolist(), lambda x: torch.ones(4, 4).copy_(x)], ids="cpu tolist copy_".split()
)
def test_a_copy_to_the_cpu_is_refused(here: torch.device, capture: Recorder, fetch: Callable[[Tensor], Any]) -> None:
    x = grid(here)
    with pytest.raises(CannotCapture, match="back to the CPU"):
        capture(lambda: fetch(x + 1))


def test_an_operator_on_two_devices_is_refused(here: torch.device, there: torch.device, capture: Recorder) -> None:
    x, y = grid(here), grid(there)
    with pytest.raises(CannotCapture, match="several GPUs at once"):
        capture(lambda: x + y)


# Captured steps on one device -------------------------------------------------------------------------------------


def test_a_step_on_one_device_is_one_segment(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, _ = capture(lambda: (x * 2 + 1).softmax(-1))
    assert places(captured) == [here]
    assert captured.transfers == ()


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x @ x + 1,
        lambda x: x.transpose(0, 1).reshape(-1),
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.half(),
        lambda x: x.transpose(0, 1).flatten(),
        lambda x: torch.cat([x, torch.zeros(1, 4, device=x.device)]),
        lambda x: x[torch.arange(2, device=x.device)],
    ],
    ids="matmul reshape contiguous half flatten factory index".split(),
)
def test_a_replay_computes_from_what_inputs_hold_now(
    here: torch.device, capture: Recorder, step: Callable[[Tensor], Tensor]
) -> None:
    x = grid(here)
    step(x)
    captured, output = capture(lambda: step(x))
    x.sub_(3)
    captured.replay()
    assert torch.equal(output.cpu(), step(x).cpu())


@pytest.mark.parametrize("view", [lambda x: x[1], lambda x: x.t(), lambda x: x.view(-1), lambda x: x.expand(2, 4, 4)])
def test_views_alone_open_no_segment(here: torch.device, capture: Recorder, view: Any) -> None:
    x = grid(here)
    captured, output = capture(lambda: view(x))
    x.sub_(3)
    captured.replay()
    assert captured.segments == ()
    assert torch.equal(output.cpu(), view(x).cpu())


def test_a_trace_and_a_capture_of_one_step_have_equal_operators(
    here: torch.device, there: torch.device, recorder: Callable[[], Capture]
) -> None:
    x, weight = grid(here), grid(there)
    step = lambda: ((x + 1).to(there) @ weight).to(here) + x  # noqa: E731
    under_way = recorder()
    with torch.no_grad(), under_way.recording():
        step()
    assert under_way.ops == ops(step)


def test_a_static_buffer_is_written_at_each_replay(here: torch.device, capture: Recorder) -> None:
    buffer, position, new = torch.zeros(4, device=here), torch.tensor([1], device=here), torch.ones(1, device=here)
    captured, output = capture(lambda: buffer.index_copy_(0, position, new * 2).sum())
    sums = []
    for place in (1, 3):
        position.fill_(place)
        new.fill_(place)
        captured.replay()
        sums.append(output.item())
    assert buffer.tolist() == [0, 2, 0, 6]
    assert sums == [2, 8]


# A simulated capture writes it once more than a real one: engine/graphs is right, tools/simulated/graphs.py is not.
def test_what_adds_to_a_static_buffer_adds_once_for_each_replay(here: torch.device, capture: Recorder) -> None:
    total, x = torch.zeros(2, device=here), torch.ones(2, device=here)
    captured, _ = capture(lambda: total.add_(x * 1))
    captured.replay()
    captured.replay()
    assert total.tolist() == [2, 2]


def test_a_replay_inside_inference_mode_of_a_capture_outside(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, output = capture(lambda: (x + 1) * 2)
    x.add_(1)
    with torch.inference_mode():
        captured.replay()
    assert torch.equal(output.cpu(), (x.cpu() + 1) * 2)


# Graph mode itself captures outside of inference mode (graphs._plain_mode); a model's own code may enter it.
def test_a_step_that_enters_inference_mode_is_right_or_refused(here: torch.device, capture: Recorder) -> None:
    x = grid(here)

    def step() -> Tensor:
        with torch.inference_mode():
            return x.t().reshape(-1)

    try:
        captured, output = capture(step)
    except CannotCapture:
        return
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), step().cpu())


# Captured steps on several devices --------------------------------------------------------------------------------


def test_a_step_over_two_devices_is_a_segment_for_each_and_a_transfer_between(
    here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, _ = capture(lambda: (x + 1).to(there) * 2)
    assert places(captured) == [here, there]
    assert ways(captured) == [(here, there)]


def test_going_back_to_the_first_device_opens_another_segment(
    here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, output = capture(lambda: ((x + 1).to(there) * 2).to(here) + x)
    x.sub_(5)
    captured.replay()
    assert places(captured) == [here, there, here]
    assert ways(captured) == [(here, there), (there, here)]
    assert torch.equal(output.cpu(), (x.cpu() + 1) * 2 + x.cpu())


def test_a_third_device_has_its_own_segment(devices: support.Devices, capture: Recorder) -> None:
    first, second, third = map(torch.device, devices(3))
    x = grid(first)
    captured, output = capture(lambda: ((x + 1).to(second) * 2).to(third) - 3)
    x.mul_(2)
    captured.replay()
    assert places(captured) == [first, second, third]
    assert ways(captured) == [(first, second), (second, third)]
    assert torch.equal(output.cpu(), (x.cpu() + 1) * 2 - 3)


def test_an_input_that_crosses_first_needs_no_segment_before(
    here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, output = capture(lambda: x.to(there) * 2)
    x.sub_(5)
    captured.replay()
    assert places(captured) == [there]
    assert torch.equal(output.cpu(), x.cpu() * 2)


def test_what_crosses_and_is_reshaped_is_computed_at_each_replay(
    here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, output = capture(lambda: (x + 1).to(there).transpose(0, 1).reshape(-1) * 2)
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), (x.cpu() + 1).t().reshape(-1) * 2)


def test_a_transfer_that_nobody_reads_is_dropped(here: torch.device, there: torch.device, capture: Recorder) -> None:
    x = grid(here)

    def step() -> Tensor:
        (x + 1).to(there)
        return x + 2

    assert capture(step)[0].transfers == ()


def test_a_transfer_that_is_only_an_output_is_kept(here: torch.device, there: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, output = capture(lambda: (x + 1).to(there))
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() + 1)


def test_a_transfer_of_which_only_a_view_is_read_is_kept(
    here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, output = capture(lambda: (x + 1).to(there)[1:, 2] * 2)
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), (x.cpu() + 1)[1:, 2] * 2)


def test_a_transfer_of_which_only_a_view_is_an_output_is_kept(
    here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, output = capture(lambda: (x + 1).to(there)[2])
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), (x.cpu() + 1)[2])


def test_a_transfer_into_a_static_buffer_is_kept(here: torch.device, there: torch.device, capture: Recorder) -> None:
    x, buffer = grid(here), torch.zeros(4, 4, device=there)

    def step() -> None:
        buffer.copy_(x + 1)

    captured, _ = capture(step)
    x.sub_(5)
    captured.replay()
    assert torch.equal(buffer.cpu(), x.cpu() + 1)


def test_a_transfer_may_change_the_type(here: torch.device, there: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, output = capture(lambda: (x + 1).to(there, torch.float64) * 2)
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), (x.cpu().double() + 1) * 2)


@pytest.mark.parametrize(
    "cross",
    [
        lambda x, there: x.t().to(there),
        lambda x, there: x.expand(2, 4, 4).to(there),
        lambda x, there: x[:, :2].t().to(there),
        lambda x, there: x.t().to(there, memory_format=torch.contiguous_format),
    ],
    ids="transposed expanded slice contiguous".split(),
)
def test_a_captured_transfer_has_the_layout_of_an_eager_copy(
    here: torch.device, there: torch.device, capture: Recorder, cross: Callable[[Tensor, torch.device], Tensor]
) -> None:
    x = grid(here)
    _, output = capture(lambda: cross(x, there))
    assert output.stride() == cross(x, there).stride()


# Constants --------------------------------------------------------------------------------------------------------


def test_a_constant_that_comes_from_the_cpu_is_there_at_every_replay(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, output = capture(lambda: x + torch.tensor([1.0, 2, 3, 4]).to(here))
    kept = reuse_free_memory(here)
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() + torch.tensor([1.0, 2, 3, 4]))
    del kept


def test_a_constant_made_on_the_device_is_there_at_every_replay_or_refused(
    here: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    try:
        captured, output = capture(lambda: x + torch.tensor([1.0, 2, 3, 4], device=here))
    except CannotCapture:
        return
    kept = reuse_free_memory(here)
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() + torch.tensor([1.0, 2, 3, 4]))
    del kept


def test_a_constant_from_the_cpu_that_is_changed_in_place_is_itself_again_at_the_next_replay(
    here: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    captured, output = capture(lambda: torch.ones(4, 4).to(here).add_(x) * 1)
    captured.replay()
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() + 1)


def test_a_buffer_that_is_set_from_the_cpu_is_set_at_each_replay(here: torch.device, capture: Recorder) -> None:
    x, buffer = grid(here), torch.zeros(4, 4, device=here)

    def step() -> Tensor:
        buffer.copy_(torch.ones(4, 4))
        return buffer.add_(x) * 1

    captured, output = capture(step)
    captured.replay()
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() + 1)


def test_a_scalar_on_the_cpu_may_stand_beside_a_tensor(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, output = capture(lambda: x * torch.tensor(3.0))
    x.sub_(5)
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() * 3)


# How a capture ends -----------------------------------------------------------------------------------------------


def fail(x: Tensor) -> None:
    x.add(1)
    raise ValueError("a mistake of the model's")


def test_an_exception_comes_through(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    with pytest.raises(ValueError, match="a mistake of the model's"):
        capture(lambda: fail(x))


@pytest.mark.parametrize("end", [fail, lambda x: (x + 1).sum().item()], ids="exception refusal".split())
def test_after_an_exception_no_capture_is_under_way(
    devices: support.Devices, here: torch.device, capture: Recorder, end: Callable[[Tensor], Any]
) -> None:
    x = grid(here)
    with pytest.raises((ValueError, CannotCapture)):
        capture(lambda: end(x))
    assert not devices.runtime.is_current_stream_capturing()
    captured, output = capture(lambda: x + 1)
    captured.replay()
    assert torch.equal(output.cpu(), x.cpu() + 1)


def test_no_garbage_is_collected_within_and_it_is_again_afterwards(here: torch.device, capture: Recorder) -> None:
    _, collects = capture(gc.isenabled)
    assert not collects
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_exception(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    with pytest.raises(ValueError, match="mistake"):
        capture(lambda: fail(x))
    assert gc.isenabled()


def test_garbage_that_was_not_collected_before_is_not_afterwards(here: torch.device, capture: Recorder) -> None:
    gc.disable()
    try:
        capture(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_current_device_is_afterwards_as_before(
    devices: support.Devices, here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    with devices.runtime.device(there):
        capture(lambda: (x + 1).to(there) + 1)
        assert devices.runtime.current_device() == there.index
    capture(lambda: (x + 1).to(there) + 1)
    assert devices.runtime.current_device() == here.index


def test_the_current_device_is_as_before_where_a_block_has_made_its_own_the_current_one(
    devices: support.Devices, here: torch.device, there: torch.device, capture: Recorder
) -> None:
    x = grid(here)

    def step() -> Tensor:
        moved = (x + 1).to(there)
        with devices.runtime.device(there):
            return moved + 1

    try:
        capture(step)
        assert devices.runtime.current_device() == here.index
    finally:
        devices.runtime.set_device(here)


def test_the_current_stream_is_afterwards_the_default_one(
    devices: support.Devices, here: torch.device, capture: Recorder
) -> None:
    x = grid(here)
    capture(lambda: x + 1)
    with pytest.raises(RuntimeError, match="non-default stream"):
        devices.runtime.CUDAGraph().capture_begin()
    capture(lambda: x + 1)  # after a capture that has failed torch draws no random numbers, till one succeeds


def test_random_numbers_can_be_drawn_after_a_capture_that_has_failed(here: torch.device, capture: Recorder) -> None:
    x = grid(here)
    mask = x > 3
    with pytest.raises((RuntimeError, CannotCapture)):
        capture(lambda: torch.ops.aten.index_put_(x + 1, [mask], x[0]))
    torch.multinomial(torch.ones(4, device=here), 1)


def test_what_is_freed_gives_its_memory_back(devices: support.Devices, here: torch.device, capture: Recorder) -> None:
    x = torch.ones(1 << 18, device=here)
    capture(lambda: x + 1)[0].free()  # makes what is made once for each device
    gc.collect()
    before = devices.runtime.memory_allocated(here)
    captured, output = capture(lambda: ((x + 1) * 2).sqrt())
    captured.replay()
    assert devices.runtime.memory_allocated(here) > before
    del output
    captured.free()
    gc.collect()
    assert devices.runtime.memory_allocated(here) == before


def test_a_freed_step_has_no_parts(here: torch.device, there: torch.device, capture: Recorder) -> None:
    x = grid(here)
    captured, _ = capture(lambda: (x + 1).to(there) + 1)
    captured.free()
    assert captured.segments == captured.transfers == ()


# Threads ----------------------------------------------------------------------------------------------------------


def together(*steps: Callable[[threading.Barrier], None]) -> list[BaseException]:
    """Run each in a thread of its own. They meet at a barrier. Returns what they raised."""
    barrier = threading.Barrier(len(steps), timeout=10)
    errors: list[BaseException] = []

    def run(step: Callable[[threading.Barrier], None]) -> None:
        try:
            step(barrier)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_captures_of_several_threads_wait_for_each_other(here: torch.device, capture: Recorder) -> None:
    under_way: list[bool] = []

    def repeatedly(factor: float, barrier: threading.Barrier) -> None:
        x = grid(here)

        def step() -> Tensor:
            under_way.append(True)
            first = x * factor
            time.sleep(0.002)
            assert under_way == [True]
            assert not gc.isenabled()
            under_way.pop()
            return first + factor

        barrier.wait()
        for _ in range(10):
            captured, output = capture(step)
            x.add_(1)
            captured.replay()
            assert torch.equal(output.cpu(), x.cpu() * factor + factor)

    assert not together(*(functools.partial(repeatedly, factor) for factor in (2.0, 3.0, 5.0)))
    assert gc.isenabled()


def test_two_threads_capture_one_after_the_other_on_one_device(here: torch.device, capture: Recorder) -> None:
    def alone(x: Tensor, turn: int, barrier: threading.Barrier) -> None:
        if turn:
            barrier.wait()
        captured, output = capture(lambda: x * 2)
        captured.replay()
        assert torch.equal(output.cpu(), x.cpu() * 2)
        if not turn:
            barrier.wait()

    assert not together(functools.partial(alone, grid(here), 0), functools.partial(alone, grid(here) + 1, 1))
