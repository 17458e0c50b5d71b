"""Whatever of ours fails: the webui loads, replies, switches and unloads as if it had not."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from extensions.sharded_kv.engine import devices, eager, gate, reply, transfers
from extensions.sharded_kv.engine.compat import has_cache_objects
from extensions.sharded_kv.engine.graphs import decode, eligible, runner
from extensions.sharded_kv.engine.metering import compare, copies, memory, meter, recorder
from extensions.sharded_kv.engine.prompts import kept, pace, prompt
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
    *("Meter.begin", "Meter.note_end", "Meter.note_failure", "Meter._look"),
    *("Recording.__call__", "Recording.forward_begins", "Recording.end", "Recording.fail"),
    *("_ForwardBegins.__call__", "reply._run_reply", "reply._prepare_cache", "reply._grow_mask"),
    "Runtime.note_failure",
    # How observing operators ends.
    *("Observer.stop", "Observer.__torch_dispatch__", "Recording._stop_observing"),
    *("Measuring._run", "Measuring._set", "settings.defaults"),
    # How a step runs, with the model's own forward inside, and how accelerate runs it again.
    *("Runtime.run_block", "Runtime.run_block_home", "Runtime._run_block_alone", "Runtime.run_container"),
    *("Runtime._run_step", "Runtime._run_eager", "Runtime._run_within", "Runtime._step_aside", "Runtime._renewed"),
    *("Gate.alone", "Gate._do_later", "Gate.__enter__", "Gate.__exit__", "GraphRunner.step", "GraphRunner._say"),
    # What a reply's cache is made of, in its midst: there is no other.
    *("Buffer.__deepcopy__", "Buffer.make_room", "FullLayer.get_seq_length", "FullLayer.update", "FullLayer._update"),
    *(
        "FullLayer.get_mask_sizes",
        "KVCache.update",
        "KVCache.__del__",
        "SlidingLayer.get_seq_length",
        "SlidingLayer.update",
    ),
}
# What the log alone speaks of: the panel shows what it still knows.
SILENT = {"MemoryMarks.begin", "MemoryMarks.end", "MemoryMarks.look", "reply.writes_replies"}
PARTS = functions_of(
    *(devices, meter, meter.Meter, recorder.Recording, recorder.Recorder, memory, memory.MemoryMarks, copies.Observer),
    *(transfers.ForwardState, transfers.TrafficCounter, measuring.Measuring, compare, settings, host.Host),
    *(eager, eager.Runtime, gate.Gate, reply, reply.Reply),
)
PARTS_OF_GRAPHS = functions_of(
    eligible, eligible.Rules, runner, runner.GraphRunner, runner.CacheGraphs, decode, decode.DecodeGraph
)
PARTS_OF_PROMPTS = functions_of(kept, kept.Conversations, pace.Pace, prompt, prompt.Prompts, prompt.Prompt)
if has_cache_objects():
    from extensions.sharded_kv.engine.kv import buffer, cache, layers

    PARTS_OF_GRAPHS |= functions_of(buffer, buffer.Buffer, buffer.Room, layers, layers.FullLayer, cache, cache.KVCache)


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


@pytest.mark.skipif(not has_cache_objects(), reason="this transformers keeps caches in tuples")
@pytest.mark.parametrize("part", PARTS_OF_PROMPTS)
def test_a_part_that_reads_prompts_and_fails_costs_nobody_a_reply(
    open_webui: Callable[..., hosts.Webui], model: Any, places: list[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    webui = open_webui()
    webui.start()
    webui.load(model)
    monkeypatch.setattr(prompt, "_SMALL_CHUNK", 4)
    whole, said = models.build("llama", num_hidden_layers=2), list(range(20, 50))

    def reply() -> list[int]:
        found = []
        for each, place in ((model, places[0]), (whole, "cpu")):
            given = torch.tensor([said], device=place)
            with torch.no_grad():
                out = each.generate(
                    given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=5, min_new_tokens=5
                )
            found.append(out[0, len(said) :].tolist())
        assert found[0] == found[1]
        new: list[int] = found[0]
        return new

    said += [*reply(), 60, 61]
    webui.extension._sharding.prompt_chunk = 7
    monkeypatch.setattr(*PARTS_OF_PROMPTS[part], fail)
    for _ in range(2):
        said += [*reply(), 60, 61]
    webui.extension.state()
    webui.extension.drop_kept()
    webui.unload()
