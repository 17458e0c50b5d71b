"""What the simulated CUDA graphs promise: a capture computes nothing, a replay everything, and CUDA's refusals."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tools import simulated

SIM0, SIM1 = "sim:0", "sim:1"
MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@pytest.fixture(autouse=True)
def two_devices() -> Iterator[None]:
    simulated.start(4)
    yield
    torch.sim.set_device(0)


@contextlib.contextmanager
def capturing(device: str = SIM0) -> Iterator[Any]:
    """Captures what runs inside on a stream of the device."""
    graph = torch.sim.CUDAGraph()
    with torch.sim.stream(torch.sim.Stream(torch.device(device))):
        graph.capture_begin(torch.sim.graph_pool_handle(), capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """What runs inside is refused in a capture, which then fails at its end; the next one succeeds."""
    refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="due to a previous error"), capturing(), refused:
        yield
    with capturing():
        pass


def on(device: str, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


# Captures and replays ---------------------------------------------------------------------------------------------


def test_what_was_captured_is_not_a_number_until_the_first_replay() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        y = x + 1
    assert y.isnan().all()
    graph.replay()
    assert y.tolist() == [2, 3]


def test_what_a_captured_operator_needs_from_one_before_is_not_a_number_either() -> None:
    x = on(SIM0, 1, 2)
    with capturing():
        x.mul(2)
        y = x + 1
        z = y * 2
    assert y.isnan().all()
    assert z.isnan().all()


def test_a_replay_computes_from_what_inputs_hold_now() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        y = (x + 1) * 2
    results = []
    for values in ([3.0, 4.0], [5.0, 6.0]):
        x.copy_(torch.tensor(values))
        graph.replay()
        results.append(y.tolist())
    assert results == [[8, 10], [12, 14]]


def test_a_replay_writes_to_the_same_memory() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        y = x + 1
    address = y.data_ptr()
    graph.replay()
    assert y.data_ptr() == address


def test_operators_after_a_capture_run_at_once() -> None:
    x = on(SIM0, 1, 2)
    with capturing():
        x.add(1)
    assert (x + 1).tolist() == [2, 3]


def test_a_graph_reads_what_another_graph_has_computed() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as first:
        y = x + 1
    with capturing() as second:
        z = y * 2
    first.replay()
    second.replay()
    assert z.tolist() == [4, 6]


@pytest.mark.parametrize(
    "view",
    [lambda x: x[1], lambda x: x.t(), lambda x: x.view(4), lambda x: x.detach(), lambda x: x.split(1)[0]],
    ids="select t view detach split".split(),
)
def test_a_view_is_no_work(view: Callable[[Tensor], Tensor]) -> None:
    x = on(SIM0, 1, 2, 3, 4).view(2, 2)
    expected = view(x).tolist()
    with capturing():
        seen = view(x)
    assert seen.tolist() == expected


def test_views_of_other_devices_are_allowed() -> None:
    x = on(SIM1, 1, 2, 3, 4)
    with capturing(SIM0):
        seen = x[1:]
    assert seen.tolist() == [2, 3, 4]


def test_a_captured_view_shows_what_a_replay_computes() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        y = (x + 1)[1:]
    graph.replay()
    assert y.tolist() == [3]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.zeros(2, device=SIM0), [0, 0]),
        (lambda: torch.ones(2, device=SIM0), [1, 1]),
        (lambda: torch.full((2,), 3.0, device=SIM0), [3, 3]),
        (lambda: torch.arange(2.0, device=SIM0), [0, 1]),
    ],
    ids="zeros ones full arange".split(),
)
def test_factories_are_captured(make: Callable[[], Tensor], expected: list[float]) -> None:
    with capturing() as graph:
        made = make()
    assert made.isnan().all()
    graph.replay()
    assert made.tolist() == expected


def test_what_a_factory_made_is_fresh_at_each_replay() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        total = torch.zeros(2, device=SIM0)
        total.add_(x)
    graph.replay()
    graph.replay()
    assert total.tolist() == [1, 2]


def test_writes_in_place_are_replayed() -> None:
    buffer, x = torch.zeros(3, device=SIM0), on(SIM0, 1)
    position = torch.tensor([0], device=SIM0)
    with capturing() as graph:
        buffer.index_copy_(0, position, x * 2)
    for place in (0, 2):
        position.fill_(place)
        x.fill_(place + 1)
        graph.replay()
    assert buffer.tolist() == [2, 0, 6]


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer: buffer.add_(1),
        lambda buffer: buffer[0].fill_(3),
        lambda buffer: torch.add(buffer, 1, out=buffer),
        lambda buffer: buffer.copy_(buffer + 1),
        lambda buffer: buffer.index_copy_(0, torch.arange(1, device=SIM0), torch.ones(1, device=SIM0)),
    ],
    ids="add_ fill_ out copy_ index_copy_".split(),
)
def test_a_capture_writes_nothing(write: Callable[[Tensor], Any]) -> None:
    buffer = torch.zeros(2, device=SIM0)
    with capturing():
        write(buffer)
    assert buffer.tolist() == [0, 0]


def test_what_adds_in_place_adds_once_for_each_replay() -> None:
    buffer = torch.zeros(2, device=SIM0)
    with capturing() as graph:
        buffer.add_(1)
    graph.replay()
    graph.replay()
    assert buffer.tolist() == [2, 2]


@MODES
def test_a_replay_may_be_in_another_mode_than_the_capture(mode: Any) -> None:
    x = on(SIM0, 1, 2)
    other = torch.no_grad if mode is torch.inference_mode else torch.inference_mode
    with mode(), capturing() as graph:
        y = (x + 1) * 2
    x.add_(1)
    with other():
        graph.replay()
    assert y.tolist() == [6, 8]


@MODES
def test_writes_in_place_may_be_replayed_in_another_mode(mode: Any) -> None:
    buffer = torch.zeros(2, device=SIM0)
    position, x = torch.tensor([1], device=SIM0), on(SIM0, 2)
    other = torch.no_grad if mode is torch.inference_mode else torch.inference_mode
    with mode(), capturing() as graph:
        made = torch.zeros(2, device=SIM0)
        buffer.index_copy_(0, position, x * 2)
        made.add_(buffer)
    with other():
        graph.replay()
    assert made.tolist() == [0, 4]


# Memory -----------------------------------------------------------------------------------------------------------


def test_a_graph_holds_what_it_computes() -> None:
    x = torch.zeros(1024, device=SIM0)
    gc.collect()
    before = simulated.allocated(0)
    with capturing() as graph:
        (x + 1).mul(2)
    assert simulated.allocated(0) == before + 2 * 4096
    graph.reset()


def test_a_reset_gives_its_memory_back() -> None:
    x = torch.zeros(1024, device=SIM0)
    gc.collect()
    before = simulated.allocated(0)
    with capturing() as graph:
        (x + 1).mul(2)
    graph.reset()
    gc.collect()
    assert simulated.allocated(0) == before


def test_a_replay_takes_no_memory() -> None:
    x = torch.ones(1024, device=SIM0)
    with capturing() as graph:
        y = x + 1
    simulated.reset_peak(0)
    peak = simulated.peak(0)
    simulated.set_capacity(0, simulated.allocated(0))
    try:
        graph.replay()
    finally:
        simulated.set_capacity(0, None)
    assert simulated.peak(0) == peak
    assert y.sum() == 2 * 1024


def test_a_capture_that_does_not_fit_is_out_of_memory() -> None:
    x = torch.zeros(1024, device=SIM0)
    gc.collect()
    simulated.set_capacity(0, simulated.allocated(0) + 4096)
    try:
        with capturing(), pytest.raises(torch.OutOfMemoryError):
            (x + 1).mul(2)
    finally:
        simulated.set_capacity(0, None)


# Refusals ---------------------------------------------------------------------------------------------------------


def test_the_default_stream_is_refused() -> None:
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.sim.CUDAGraph().capture_begin()
    assert not torch.sim.is_current_stream_capturing()


def test_after_a_stream_the_default_one_is_the_current_one_again() -> None:
    with torch.sim.stream(torch.sim.Stream(torch.device(SIM0))):
        pass
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.sim.CUDAGraph().capture_begin()


def test_a_stream_makes_its_device_the_current_one_and_puts_the_one_before_back() -> None:
    with torch.sim.stream(torch.sim.Stream(torch.device(SIM1))):
        assert torch.sim.current_device() == 1
    assert torch.sim.current_device() == 0


def test_streams_nest() -> None:
    outer, inner = (torch.sim.Stream(torch.device(device)) for device in (SIM0, SIM1))
    graph = torch.sim.CUDAGraph()
    with torch.sim.stream(outer):
        with torch.sim.stream(inner):
            pass
        graph.capture_begin()
        made = torch.zeros(1, device=SIM0)
        graph.capture_end()
    graph.replay()
    assert made.tolist() == [0]


def test_a_capture_inside_a_capture_is_refused() -> None:
    with capturing(), pytest.raises(RuntimeError, match="captures a graph already"):
        torch.sim.CUDAGraph().capture_begin()


def test_the_end_of_a_capture_that_has_not_begun_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not being captured"):
        torch.sim.CUDAGraph().capture_end()


@pytest.mark.parametrize(
    "operate",
    [lambda x: x + 1, lambda x: x.add_(1), lambda x: x.to(SIM0), lambda x: torch.zeros(2, device=SIM1)],
    ids="add add_ to zeros".split(),
)
def test_an_operator_on_another_device_is_refused(operate: Callable[[Tensor], Any]) -> None:
    x = on(SIM1, 1, 2)
    with capturing(SIM0), pytest.raises(RuntimeError, match="while a graph of sim:0 is captured"):
        operate(x)


@MODES
@pytest.mark.parametrize(
    "read",
    [lambda x: x[0].item(), lambda x: bool(x[0] > 0), lambda x: torch.equal(x, x), Tensor.cpu, lambda x: x.tolist()],
    ids="item bool equal cpu tolist".split(),
)
def test_reading_a_value_back_is_refused(mode: Any, read: Callable[[Tensor], Any]) -> None:
    x = on(SIM0, 1, 2)
    with mode(), capturing(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        read(x)


@pytest.mark.parametrize(
    "fetch",
    [
        lambda x: torch.ones(2).to(SIM0),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: torch.tensor([1.0, 2.0], device=SIM0),
        lambda x: x.new_tensor([1.0, 2.0]),
    ],
    ids="to copy_ tensor new_tensor".split(),
)
def test_a_copy_from_the_host_is_refused(fetch: Callable[[Tensor], Any]) -> None:
    x = on(SIM0, 1, 2)
    with failing():
        fetch(x)


@pytest.mark.parametrize(
    "read",
    [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.masked_select(x > 0)],
    ids="nonzero mask select".split(),
)
def test_a_result_whose_size_depends_on_values_is_refused(read: Callable[[Tensor], Any]) -> None:
    x = on(SIM0, 1, 2)
    with failing():
        read(x)


def test_after_a_capture_that_has_failed_no_random_numbers_are_drawn_till_one_succeeds() -> None:
    x = on(SIM0, 1, 2)
    with pytest.raises(RuntimeError, match="due to a previous error"), capturing(), contextlib.suppress(RuntimeError):
        x.nonzero()
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        torch.multinomial(x, 1)
    torch.multinomial(on(SIM1, 1, 2), 1)
    with capturing():
        pass
    torch.multinomial(x, 1)


def test_a_scalar_on_the_host_may_stand_beside_a_tensor() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        y = x * torch.tensor(3.0)
    graph.replay()
    assert y.tolist() == [3, 6]


def test_what_runs_on_the_host_is_not_captured() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        number = torch.ones(2).sum().item()
        y = x * number
    graph.replay()
    assert y.tolist() == [2, 4]


def test_after_a_refusal_a_capture_can_end_and_another_begin() -> None:
    x = on(SIM0, 1, 2)
    with contextlib.suppress(RuntimeError), capturing():
        x.cpu()
    assert not torch.sim.is_current_stream_capturing()
    with capturing() as graph:
        y = x + 1
    graph.replay()
    assert y.tolist() == [2, 3]


# Threads ----------------------------------------------------------------------------------------------------------


def in_another_thread(run: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_a_thread_captures_what_it_runs_itself() -> None:
    x = on(SIM0, 1, 2)
    seen: list[Any] = []
    with capturing():
        x.add(1)
        in_another_thread(lambda: seen.extend([torch.sim.is_current_stream_capturing(), (x + 1).tolist()]))
        assert torch.sim.is_current_stream_capturing()
    assert seen == [False, [2, 3]]


def test_a_stream_is_the_current_one_of_its_thread_only() -> None:
    def begin() -> None:
        with pytest.raises(RuntimeError, match="non-default stream"):
            torch.sim.CUDAGraph().capture_begin()

    with torch.sim.stream(torch.sim.Stream(torch.device(SIM0))):
        in_another_thread(begin)


def test_another_thread_may_capture_meanwhile() -> None:
    x, z = on(SIM0, 1, 2), on(SIM1, 3, 4)
    results: list[Any] = []

    def other() -> None:
        with capturing(SIM1) as graph:
            y = z + 1
        graph.replay()
        results.append(y.tolist())

    with capturing(SIM0) as graph:
        y = x + 1
        in_another_thread(other)
        w = y * 2
    graph.replay()
    assert results == [[4, 5]]
    assert w.tolist() == [4, 6]


def test_a_graph_is_replayed_in_another_thread() -> None:
    x = on(SIM0, 1, 2)
    with capturing() as graph:
        y = x + 1
    in_another_thread(graph.replay)
    assert y.tolist() == [2, 3]
