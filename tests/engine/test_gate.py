"""Forwards pass the gate together, a switch passes alone, and nobody waits for himself."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from extensions.sharded_kv.engine.gate import Gate

# Whoever takes so long waits for ever.
PATIENCE_SECONDS = 60


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], Any]], threading.Thread]]:
    """Starts a function in a thread of its own; all of them have to end."""
    threads: list[threading.Thread] = []

    def start(run: Callable[[], Any]) -> threading.Thread:
        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a thread waits for ever"


InThread = Callable[[Callable[[], Any]], threading.Thread]


def wait_until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(PATIENCE_SECONDS * 100):
        if is_so():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to that")


def test_a_switch_without_a_forward_is_done_at_once(gate: Gate) -> None:
    done: list[str] = []
    gate.alone(lambda: done.append("switched"))
    assert done == ["switched"]


def test_two_forwards_run_together(gate: Gate, in_thread: InThread) -> None:
    both = threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def forward() -> None:
        with gate:
            both.wait()

    in_thread(forward)
    forward()


def test_a_switch_waits_for_the_forward_of_another_thread(gate: Gate, in_thread: InThread) -> None:
    order: list[str] = []
    with gate:
        in_thread(lambda: gate.alone(lambda: order.append("switch")))
        wait_until(lambda: gate._switches == 1)
        order.append("forward")
    wait_until(lambda: len(order) == 2)
    assert order == ["forward", "switch"]


def test_a_forward_that_comes_later_waits_for_the_switch(gate: Gate, in_thread: InThread) -> None:
    order: list[str] = []
    goes_on = threading.Event()

    def later() -> None:
        with gate:
            order.append("forward")

    def switch() -> None:
        in_thread(later)
        goes_on.wait(0.2)
        order.append("switch")

    gate.alone(switch)
    wait_until(lambda: len(order) == 2)
    assert order == ["switch", "forward"]


def test_a_switch_within_a_forward_is_done_after_it(gate: Gate) -> None:
    order: list[str] = []
    with gate:
        gate.alone(lambda: order.append("switch"))
        with gate:  # a forward within the forward
            gate.alone(lambda: order.append("another"))
        order.append("forward")
    assert order == ["forward", "switch", "another"]


def test_it_is_done_after_a_forward_that_fails_as_well(gate: Gate) -> None:
    done: list[int] = []

    def fail_in_forward() -> None:
        with gate:
            gate.alone(lambda: done.append(1))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_in_forward()
    assert done == [1]
    assert not gate.is_in_forward


def test_a_switch_that_fails_is_over_and_raises(gate: Gate) -> None:
    def fail() -> None:
        raise ArithmeticError("of the switch")

    with pytest.raises(ArithmeticError):
        gate.alone(fail)
    with gate:
        assert gate.is_in_forward
    gate.alone(lambda: None)


def test_a_postponed_switch_that_fails_is_logged_and_costs_no_forward(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ArithmeticError("of the switch")

    done: list[int] = []
    with gate:
        gate.alone(fail)
        gate.alone(lambda: done.append(1))
    assert "of the switch" in caplog.text
    assert done == [1]


def test_a_switch_within_a_switch_is_done_at_once(gate: Gate) -> None:
    order: list[str] = []

    def outer() -> None:
        gate.alone(lambda: order.append("inner"))
        order.append("outer")

    gate.alone(outer)
    assert order == ["inner", "outer"]


def test_a_forward_within_a_switch_does_not_wait(gate: Gate) -> None:
    done: list[int] = []

    def switch() -> None:
        with gate:
            done.append(1)

    gate.alone(switch)
    assert done == [1]


def test_what_dies_in_a_forward_may_ask_for_a_switch(gate: Gate) -> None:
    class Wrapper:
        pass

    done: list[int] = []
    wrapper = Wrapper()
    wrapper.itself = wrapper  # only a collection frees it
    weakref.finalize(wrapper, gate.alone, lambda: done.append(1))
    del wrapper
    with gate:
        gc.collect()
        assert done == []
    assert done == [1]


def test_what_may_not_wait_does_not_wait_for_the_forward_of_another_thread(gate: Gate, in_thread: InThread) -> None:
    done: list[int] = []
    inside, goes_on = threading.Event(), threading.Event()

    def forward() -> None:
        with gate:
            inside.set()
            goes_on.wait(PATIENCE_SECONDS)

    in_thread(forward)
    inside.wait(PATIENCE_SECONDS)
    gate.soon(lambda: done.append(1))
    assert done == []
    goes_on.set()
    wait_until(lambda: done == [1])


def test_what_may_not_wait_is_done_at_once_where_nothing_runs(gate: Gate) -> None:
    done: list[int] = []
    gate.soon(lambda: done.append(1))
    assert done == [1]


def test_switches_come_through_however_many_forwards_there_are(gate: Gate, in_thread: InThread) -> None:
    over, forwards = threading.Event(), [0, 0, 0]

    def forward(which: int) -> None:
        while not over.is_set():
            with gate:
                forwards[which] += 1

    for which in range(3):
        in_thread(lambda which=which: forward(which))
    inside: list[int] = []
    try:
        for _ in range(300):
            gate.alone(lambda: inside.append(gate._forwards))
        wait_until(lambda: min(forwards) > 0)
    finally:
        over.set()
    assert inside == [0] * 300
