"""Whatever of ours fails: the webui loads, replies, switches and unloads as if it had not."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from extensions.sharded_kv.engine import caches, graphs, measure, meter, observer, transfers, vram
from extensions.sharded_kv.webui import host, measuring, settings
from tests import support
from tests.webui import hosts
from tools import models


class Broken(Exception):
    """What a part of ours raises in these tests."""


def fail(*_: Any, **__: Any) -> Any:
    raise Broken("a <b>part</b> of ours")


def functions_of(*owners: Any) -> dict[str, tuple[Any, str]]:
    """Every function that is written in a module or class, those for its own use among them."""
    found = {}
    for owner in owners:
        of_module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and value.__module__ == of_module and name not in CONSTRUCTORS:
                found[f"{owner.__name__.rpartition('.')[2]}.{name}"] = owner, name
    return found


# An object that could not be made fails whoever makes it, which these tests let fail as well.
CONSTRUCTORS = ("__init__", "__deepcopy__", "__reduce__")
# What stands between a failing part and the webui's own code, and how the panel is told; that an import fails, as
# without defaults, is in test_loading.py.
GUARDS = {
    *("Meter._run_reply", "Meter.before_forward", "Meter._has_failed", "Meter._look_at_memory"),
    *("_Reply.__call__", "_Reply.spared", "Observer.__torch_dispatch__"),
    # How looking at operators ends, and what the model itself reads of a cache in graph mode's buffers.
    *("Observer.stop", "_Reply._stop_observing", "Buffers.filled"),
    *("Measuring._run", "Measuring._set", "settings.defaults"),
}
# What the log alone speaks of: the panel shows what it still knows.
SILENT = {"_MemoryMarks.begin", "_MemoryMarks.end", "_MemoryMarks.look"}
PARTS = functions_of(
    *(vram, meter, meter.Meter, meter._Reply, meter._Recorder, meter._MemoryMarks, observer.Observer),
    *(transfers.Forward, transfers.TrafficCounter, measuring.Measuring, measure, settings, host.Host),
)
PARTS_OF_GRAPHS = functions_of(graphs, graphs._Held, graphs._Step, caches, caches.Buffers)


@pytest.fixture(autouse=True)
def _current_device(devices: support.Devices) -> Iterator[None]:
    """What fails here may leave another device the current one, which is nothing for the next test."""
    with devices.runtime.device(0):
        yield


@pytest.fixture
def model(devices: support.Devices) -> Any:
    return support.spread(models.build("llama", num_hidden_layers=2), devices(2))


def use(webui: hosts.Webui, model: Any, reply: Callable[[Any], Any], right: Any, mode: str) -> list[str]:
    """What people do, with all that the panel says meanwhile."""
    said = []
    webui.start()
    webui.load(model)
    webui.extension.set_mode(mode)
    for activate in (True, False, True):
        webui.extension.set_activate(activate)
        said.append(webui.extension.state().sentence)
        assert reply(model) == right
        said.append(webui.extension.state().sentence)
    webui.extension.measure()
    webui.extension.cancel_measuring()
    end = time.monotonic() + 10
    while (measured := webui.extension.state().measurement) is not None and measured.under_way:
        assert time.monotonic() < end
        time.sleep(0.05)
    said.append(measured.message if measured is not None else "")
    said.append(webui.extension.state().sentence)
    webui.unload()
    said.append(webui.extension.state().sentence)
    return said


@pytest.mark.parametrize("part", [part for part in PARTS if part not in GUARDS])
def test_a_part_that_fails_costs_nobody_a_reply(
    open_webui: Callable[..., hosts.Webui],
    model: Any,
    reply: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    right = reply(model)
    called = []
    monkeypatch.setattr(*PARTS[part], lambda *_, **__: (called.append(1), fail()))
    said = use(open_webui(), model, reply, right, "eager")
    if called and part not in SILENT:
        assert any("a <b>part</b> of ours" in sentence for sentence in said), said


@pytest.mark.parametrize("part", [part for part in PARTS_OF_GRAPHS if part not in GUARDS])
def test_a_part_of_graph_mode_that_fails_costs_nobody_a_reply(
    open_webui: Callable[..., hosts.Webui],
    model: Any,
    reply: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    right = reply(model)
    monkeypatch.setattr(*PARTS_OF_GRAPHS[part], fail)
    use(open_webui(), model, reply, right, "graph")
