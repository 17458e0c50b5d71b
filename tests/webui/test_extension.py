"""The extension follows the webui's model, the Session tab's tick and the user's switch, and never is in the way."""

from __future__ import annotations

import gc
import importlib
import re
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from extensions.sharded_kv.engine.metering.meter import Meter
from extensions.sharded_kv.engine.patches import Patch
from extensions.sharded_kv.engine.sharding import MODES, Sharding
from extensions.sharded_kv.engine.transfers import ForwardState
from extensions.sharded_kv.webui import extension as extension_module
from extensions.sharded_kv.webui import host as host_module
from extensions.sharded_kv.webui import settings
from extensions.sharded_kv.webui.watch import watch
from tests import loaders, support
from tests.webui import hosts
from tools import models

Build = Callable[..., Any]
IsOurs = Callable[[Any], bool]
OpenWebui = Callable[..., hosts.Webui]
Reply = Callable[[Any], list[list[int]]]
Right = list[list[int]]

each_version = pytest.mark.parametrize("version", hosts.VERSIONS, ids=str)


class Wrapper(nn.Module):
    """A model in a wrapper, as AutoGPTQ's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.model.generate(**kwargs)


needs_graphs = pytest.mark.skipif(
    not hasattr(transformers, "DynamicCache"), reason="no graph mode with this transformers"
)


# --- every way in which a model comes and goes ------------------------------------------------------------------------


def by_startup_before_setup(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = open_webui()
    webui.load(model)
    webui.start()
    return webui


def by_load(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = open_webui()
    webui.start()
    webui.load(model)
    return webui


def by_reload(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = by_load(open_webui, models.build("llama"))
    webui.unload()
    webui.load(model)
    return webui


def over_another(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = by_load(open_webui, models.build("llama"))
    webui.load(model)
    return webui


def by_the_api(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = open_webui()
    webui.start()
    hosts.in_thread(lambda: webui.load(model))
    return webui


def by_a_reply_after_idle_unload(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = by_load(open_webui, model)
    with webui.shared.generation_lock:
        webui.unload(keep_name=True)
    with webui.shared.generation_lock:
        webui.load(model)
    return webui


def by_assigning_it_again(open_webui: OpenWebui, model: Any) -> hosts.Webui:
    webui = by_load(open_webui, model)
    webui.shared.model = webui.shared.model.eval()
    return webui


WAYS_IN = [
    by_startup_before_setup,
    by_load,
    by_reload,
    over_another,
    by_the_api,
    by_a_reply_after_idle_unload,
    by_assigning_it_again,
]


@pytest.mark.parametrize("way_in", WAYS_IN, ids=lambda way: way.__name__)
def test_a_model_that_gets_there_is_sharded_and_replies_the_same(
    way_in: Callable[..., hosts.Webui], open_webui: OpenWebui, model: Any, reply: Reply, right: Right, is_ours: IsOurs
) -> None:
    webui = way_in(open_webui, model)
    assert webui.shared.model is model
    assert webui.extension.state().tone == "on"
    assert is_ours(model)
    assert reply(model) == right


def test_the_panel_says_which_model_it_is_and_how_it_is_split(
    webui: hosts.Webui, model: Any, places: list[str]
) -> None:
    webui.load(model, name="tiny-llama")
    state = webui.extension.state()
    assert state.model == "tiny-llama"
    assert state.placement is not None
    assert [str(stage.device) for stage in state.placement.stages] == places
    assert re.search(r"GPU 0: layers 0\u2013\d+, GPU 1: layers \d+\u2013\d+\.", state.sentence)


def test_an_unloaded_model_is_as_if_we_had_never_been_there(webui: hosts.Webui, model: Any, reply: Reply) -> None:
    traces = hosts.Traces(model)
    webui.load(model)
    reply(model)
    webui.unload()
    assert traces.left == []
    assert webui.extension.state().tone == "idle"
    assert "No model is loaded" in webui.extension.state().sentence
    assert webui.extension.state().model == ""


def test_a_model_that_another_one_replaces_is_let_go_of(webui: hosts.Webui, build: Build, is_ours: IsOurs) -> None:
    before, after = build(), build(seed=1)
    traces = hosts.Traces(before)
    webui.load(before)
    webui.load(after)
    assert traces.left == []
    assert is_ours(after)


@pytest.mark.parametrize("replaced", [False, True], ids=["unloaded", "replaced"])
def test_nobody_keeps_a_model_alive(webui: hosts.Webui, build: Build, reply: Reply, replaced: bool) -> None:
    webui.load(build())
    reply(webui.shared.model)
    webui.extension.state()
    dead = weakref.ref(webui.shared.model)
    webui.load(build(seed=1)) if replaced else webui.unload()
    gc.collect()
    assert dead() is None


def test_none_again_and_again_is_no_model(webui: hosts.Webui) -> None:
    webui.unload()
    webui.unload()
    assert webui.extension.state().tone == "idle"
    assert webui.lines.of("ERROR") == []


def test_a_wrapper_around_a_wrapper_and_back_is_followed_at_each_step(
    webui: hosts.Webui, model: Any, reply: Reply, right: Right, is_ours: IsOurs
) -> None:
    traces = hosts.Traces(model)
    once = Wrapper(model)
    for what in (model, once, Wrapper(once), once, model):
        webui.load(what)
        assert webui.extension.state().tone == "on"
        assert is_ours(model)
        assert reply(what) == right
    webui.unload()
    assert traces.left == []


def test_a_model_that_leaves_its_wrapper_takes_nothing_along(webui: hosts.Webui, model: Any) -> None:
    wrapper = Wrapper(model)
    traces = hosts.Traces(wrapper)
    webui.load(wrapper)
    webui.load(model)
    webui.unload()
    assert traces.left == []


def test_assignments_from_many_threads_leave_one_model_sharded(
    webui: hosts.Webui, build: Build, is_ours: IsOurs
) -> None:
    several = [build(seed=seed) for seed in range(4)]
    threads = [
        threading.Thread(target=lambda model=model: [webui.load(model) for _ in range(5)], daemon=True)
        for model in several
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert [model is webui.shared.model for model in several] == [is_ours(model) for model in several]


def test_of_two_models_assigned_at_once_the_one_that_stays_is_sharded(
    open_webui: OpenWebui, build: Build, is_ours: IsOurs
) -> None:
    """The thread of the earlier assignment is the later one to tell of it."""
    webui, first, last = open_webui(), build(), build(seed=1)
    assigned = threading.Event()
    watch(webui.shared, {"model": lambda model: assigned.set()})  # is told before the extension is
    webui.start()
    with webui.extension._lock:
        slow = threading.Thread(target=webui.load, args=(first,), daemon=True)
        slow.start()
        assert assigned.wait(timeout=60)
        webui.load(last)
    slow.join(timeout=60)
    assert webui.shared.model is last
    assert [is_ours(first), is_ours(last)] == [False, True]


# --- what is no torch model -------------------------------------------------------------------------------------------


class LlamaServer:
    """A client of another program."""

    def generate(self) -> None: ...


class ExLlama:
    """Neither weak references nor hashes, as objects of C++ libraries."""

    __slots__ = ("cache",)
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


class Unreadable:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"the server that knows {name} is gone")


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    def __hash__(self) -> int:
        return 1


class Unhashable:
    def __hash__(self) -> int:
        raise RuntimeError("not now")


class Empty:
    def __len__(self) -> int:
        return 0


class Truthless:
    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __len__(self) -> int:
        raise ValueError("endless")


class EqualToAll:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


NO_MODELS = [LlamaServer, ExLlama, Unreadable, Incomparable, Unhashable, Empty, Truthless, EqualToAll]
no_model = pytest.mark.parametrize("kind", NO_MODELS, ids=lambda kind: kind.__name__)


@no_model
def test_what_is_no_torch_model_gets_a_reason_and_nothing_else(webui: hosts.Webui, kind: type) -> None:
    what = kind()
    webui.load(what)
    state = webui.extension.state()
    assert webui.shared.model is what
    assert state.tone == "idle"
    assert kind.__name__ in state.sentence
    assert (state.placement, state.snapshot) == (None, None)
    assert webui.lines.of("ERROR") == []


@no_model
def test_what_is_no_torch_model_stays_none_whatever_is_switched(webui: hosts.Webui, kind: type) -> None:
    webui.load(kind())
    webui.extension.set_activate(False)
    webui.extension.set_activate(True)
    webui.extension.set_mode("eager")
    webui.extension.measure()
    webui.restart()
    state = webui.extension.state()
    assert state.tone == "idle"
    assert kind.__name__ in state.sentence
    assert state.measurement.phase == "idle"
    assert webui.lines.of("ERROR") == []


@no_model
def test_a_model_after_what_was_none_is_sharded(webui: hosts.Webui, kind: type, model: Any) -> None:
    what = kind()  # somebody else keeps it: webui 4 takes llama.cpp's client for the tokenizer, too
    webui.load(what)
    webui.load(model)
    assert webui.lines.of("ERROR") == []
    assert webui.extension.state().tone == "on"
    webui.load(what)
    assert webui.extension.state().tone == "idle"
    assert webui.lines.of("ERROR") == []


def test_a_model_on_one_gpu_gets_a_reason_in_eager_mode_and_is_left_alone(
    webui: hosts.Webui, places: list[str]
) -> None:
    webui.extension.set_mode("eager")
    model = models.build("llama").to(places[0])
    traces = hosts.Traces(model)
    webui.load(model)
    assert webui.extension.state().tone == "idle"
    assert "one device" in webui.extension.state().sentence
    assert traces.left == []


@needs_graphs
def test_a_model_on_one_gpu_runs_by_graphs(webui: hosts.Webui, places: list[str], reply: Reply, right: Right) -> None:
    model = models.build("llama").to(places[0])
    webui.load(model)
    assert webui.extension.state().tone == "on"
    assert "graph mode" in webui.extension.state().sentence
    assert reply(model) == right
    assert webui.extension.state().snapshot.sharded.tokens > 0
    webui.extension.set_mode("eager")
    assert webui.extension.state().tone == "idle"
    assert "Graph mode" in webui.extension.state().sentence


def test_a_model_in_tuple_caches_runs_eager_by_default_and_the_panel_says_why(
    webui: hosts.Webui, build: Build, places: list[str], reply: Reply, right: Right
) -> None:
    if hasattr(transformers, "DynamicCache"):
        pytest.skip("this transformers keeps this model's cache in an object")
    for model in (build(), models.build("llama").to(places[0])):
        webui.load(model)
        assert reply(model) == right
        state = webui.extension.state()
        assert (state.mode, state.tone) == ("graph", "on")
        assert "without graphs. This version of transformers keeps this model's cache in tuples" in state.sentence
    webui.extension.set_mode("eager")
    state = webui.extension.state()
    assert state.tone == "idle"
    assert "Graph mode" not in state.sentence


@needs_graphs
def test_a_model_runs_by_graphs_where_nobody_has_chosen(
    webui: hosts.Webui, model: Any, reply: Reply, right: Right
) -> None:
    webui.load(model)
    assert webui.extension.state().mode == "graph"
    assert reply(model) == right
    assert "(graph mode)" in webui.extension.state().sentence
    assert "without graphs" not in webui.extension.state().sentence


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_stays_for_the_next_model(
    webui: hosts.Webui, build: Build, reply: Reply, right: Right, mode: str
) -> None:
    webui.extension.set_mode(mode)
    for _ in range(2):
        model = build()
        webui.load(model)
        assert f"{mode} mode" in webui.extension.state().sentence
        assert reply(model) == right
    assert webui.lines.of("ERROR") == []


@needs_graphs
def test_the_panel_says_why_a_token_came_without_graphs(webui: hosts.Webui, model: Any, places: list[str]) -> None:
    webui.load(model)
    ids = torch.tensor([[5, 6, 7]], device=places[0])
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    assert "without graphs. output_attentions" in webui.extension.state().sentence


# --- one line in the log for each model -------------------------------------------------------------------------------


@each_version
def test_one_line_says_what_was_done_with_a_model(version: hosts.Version, open_webui: OpenWebui, model: Any) -> None:
    webui = open_webui(version)
    webui.start()
    webui.load(model)
    webui.restart()
    webui.extension.set_activate(False)
    webui.extension.set_activate(True)
    webui.extension.state()
    (line,) = webui.lines.of("INFO")
    assert line.startswith("sharded_kv: on")
    assert "GPU 1" in line


@no_model
def test_one_line_says_why_nothing_was_done(webui: hosts.Webui, kind: type) -> None:
    webui.load(kind())
    webui.restart()
    webui.extension.set_activate(False)
    webui.extension.set_activate(True)
    (line,) = webui.lines.of("INFO")
    assert line.startswith("sharded_kv: ")
    assert kind.__name__ in line


def test_a_class_whose_name_has_line_breaks_gets_one_line(webui: hosts.Webui) -> None:
    webui.load(type("Client\nERROR all is lost", (), {})())
    (line,) = webui.lines.of("INFO")
    assert "Client ERROR all is lost" in line


def test_an_error_whose_message_has_line_breaks_gets_one_line(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forge(*_: Any) -> Any:
        raise RuntimeError("at\nERROR all is lost")

    monkeypatch.setattr(extension_module, "attach", forge)
    webui.load(model)
    (line,) = webui.lines.of("ERROR")
    assert line.endswith("RuntimeError: at ERROR all is lost")


def test_each_model_has_its_line(webui: hosts.Webui, build: Build) -> None:
    for seed in range(3):
        webui.load(build(seed=seed))
    webui.unload()
    assert len(webui.lines.of("INFO")) == 3


def test_a_model_that_is_loaded_while_switched_off_has_a_line_that_says_so(webui: hosts.Webui, model: Any) -> None:
    webui.extension.set_activate(False)
    webui.load(model)
    (line,) = webui.lines.of("INFO")
    assert line.startswith("sharded_kv: off")


def test_a_model_that_is_loaded_while_switched_off_gets_no_forward_of_ours(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui.extension.set_activate(False)
    installed: list[str] = []
    install = Patch.install
    monkeypatch.setattr(Patch, "install", lambda patch: (installed.append(patch.name), install(patch))[1])
    webui.load(model)
    for_caches = {"_prepare_cache_for_generation", "_get_initial_cache_position", "_reorder_cache"}
    for_replies = {"generate", "_update_model_kwargs_for_generation", "contrastive_search"}
    assert set(installed) <= for_caches | for_replies
    assert webui.extension.state().tone == "off"


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs for the tiny model."""
    return [support.save_lora("llama", tmp_path_factory.mktemp("lora"), seed) for seed in (3, 4)]


def add_lora(shared: Any, folder: Path) -> None:
    """As modules/LoRA.py of every version puts one on: with the device map of the model below."""
    from peft import PeftModel

    device_map = {f"base_model.model.{name}": place for name, place in shared.model.hf_device_map.items()}
    options = {"dtype": shared.model.dtype, "device_map": device_map}
    shared.model = PeftModel.from_pretrained(shared.model, str(folder), adapter_name="tuned", **options)
    shared.model.half()


def add_another_lora(shared: Any, folder: Path) -> None:
    """As it puts another one on: nothing is assigned."""
    shared.model.load_adapter(str(folder), "another")
    shared.model.set_adapter("another")


def remove_loras(shared: Any) -> None:
    """As it takes them off: with peft's unload(), and before that was there by looking inside."""
    if hasattr(type(shared.model.base_model), "unload"):
        shared.model = shared.model.unload()
    else:
        shared.model.disable_adapter()
        shared.model = shared.model.base_model.model


def test_loras_added_and_removed_reply_as_with_accelerate_at_each_step(
    webui: hosts.Webui, build: Build, loras: list[Path], reply: Reply, is_ours: IsOurs
) -> None:
    alone = SimpleNamespace(model=build())  # another process, without us
    webui.extension.set_mode("eager")  # to the bit as accelerate: with half precision, tokens tie
    webui.load(build())
    seen = [reply(webui.shared.model)]
    assert seen[0] == reply(alone.model)
    steps: list[Callable[[Any], None]] = [
        lambda shared: add_lora(shared, loras[0]),
        lambda shared: add_another_lora(shared, loras[1]),
        remove_loras,
    ]
    for step in steps:
        for shared in (alone, webui.shared):
            step(shared)
        assert webui.extension.state().tone == "on"
        assert is_ours(webui.shared.model)
        seen.append(reply(webui.shared.model))
        assert seen[-1] == reply(alone.model)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("load", [loaders.bitsandbytes_8bit, loaders.bitsandbytes_4bit])
def test_a_lora_on_a_quantized_model_replies_as_with_accelerate(
    webui: hosts.Webui,
    load: Any,
    places: list[str],
    loras: list[Path],
    reply: Reply,
    is_ours: IsOurs,
    tmp_path: Path,
) -> None:
    """There modules/LoRA.py leaves types and device map to peft."""
    peft = pytest.importorskip("peft")
    if load is loaders.bitsandbytes_8bit and peft.__version__ == "0.12.0":
        pytest.skip("this peft wants an older bitsandbytes, which has no kernels for the CPU")
    device_map = loaders.spread_over("llama", places)
    alone, ours = (load("llama", tmp_path / name, device_map) for name in ("alone", "ours"))
    others = SimpleNamespace(model=alone)
    webui.extension.set_mode("eager")  # to the bit as accelerate: with half precision, tokens tie
    webui.load(ours)
    seen = [reply(webui.shared.model)]
    assert seen[0] == reply(others.model)
    for shared in (others, webui.shared):
        shared.model = peft.PeftModel.from_pretrained(shared.model, str(loras[0]), adapter_name="tuned")
    assert is_ours(webui.shared.model)
    seen.append(reply(webui.shared.model))
    assert seen[1] == reply(others.model) != seen[0]
    for shared in (others, webui.shared):
        remove_loras(shared)
    assert is_ours(webui.shared.model)
    assert reply(webui.shared.model) == reply(others.model)


def test_a_lora_on_a_model_with_a_layer_on_the_cpu_replies_as_with_accelerate(
    webui: hosts.Webui, places: list[str], loras: list[Path], reply: Reply, is_ours: IsOurs
) -> None:
    """There peft takes off accelerate's hooks and spreads the model a second time."""
    device_map = {**models.device_map(models.build("llama"), places), "model.layers.3": "cpu"}
    alone = SimpleNamespace(model=support.spread(models.build("llama"), places, device_map=device_map))
    add_lora(alone, loras[0])
    try:
        right = reply(alone.model)
    except RuntimeError:
        pytest.skip("with accelerate alone it fails on this stack")
    webui.load(support.spread(models.build("llama"), places, device_map=device_map))
    plain = reply(webui.shared.model)
    add_lora(webui.shared, loras[0])
    assert is_ours(webui.shared.model)
    assert reply(webui.shared.model) == right
    remove_loras(webui.shared)
    assert is_ours(webui.shared.model)
    remove_loras(alone)
    assert reply(webui.shared.model) == reply(alone.model)
    assert plain != right


def test_a_model_with_a_lora_dies_when_it_is_unloaded(webui: hosts.Webui, build: Build, loras: list[Path]) -> None:
    webui.load(build())
    add_lora(webui.shared, loras[0])
    dead = weakref.ref(webui.shared.model), weakref.ref(webui.shared.model.base_model.model)
    webui.unload()
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


# --- the Session tab --------------------------------------------------------------------------------------------------


@each_version
def test_unticked_and_restarted_the_model_is_as_if_we_were_not_there(
    version: hosts.Version, open_webui: OpenWebui, model: Any, reply: Reply, right: Right
) -> None:
    webui = open_webui(version)
    traces = hosts.Traces(model)
    webui.start()
    webui.load(model)
    webui.restart(ticked=["gallery"])
    assert traces.left == []
    assert reply(model) == right
    assert webui.extension.state().tone == "idle"
    assert "Session tab" in webui.extension.state().sentence


@each_version
def test_with_the_last_tick_gone_the_model_is_as_if_we_were_not_there(
    version: hosts.Version, open_webui: OpenWebui, model: Any, panel: Any
) -> None:
    """Then the webui builds our panel all the same: it loads no extensions, and shows those that it had."""
    webui = open_webui(version)
    traces = hosts.Traces(model)
    webui.start()
    webui.load(model)
    webui.restart(ticked=[])
    assert webui.built == 2
    assert panel.states[-1].tone == "idle"
    assert traces.left == []


def test_in_may_2023_the_panel_of_an_unticked_extension_says_so(open_webui: OpenWebui, model: Any, panel: Any) -> None:
    webui = open_webui(hosts.MAY_2023)
    webui.start()
    webui.load(model)
    webui.restart(ticked=["gallery"])
    assert webui.built == 2
    assert panel.states[-1].tone == "idle"


@each_version
def test_ticked_again_it_is_on_again_without_loading_the_model_again(
    version: hosts.Version, open_webui: OpenWebui, model: Any, reply: Reply, right: Right, is_ours: IsOurs
) -> None:
    webui = open_webui(version)
    webui.start()
    webui.load(model)
    webui.restart(ticked=["gallery"])
    webui.restart()
    assert webui.shared.model is model
    assert webui.extension.state().tone == "on"
    assert is_ours(model)
    assert reply(model) == right


@each_version
def test_a_model_loaded_while_unticked_is_left_alone_until_the_tick_is_back(
    version: hosts.Version, open_webui: OpenWebui, build: Build, is_ours: IsOurs
) -> None:
    webui = open_webui(version)
    webui.start()
    webui.load(build())
    webui.restart(ticked=["gallery"])
    model = build(seed=1)
    traces = hosts.Traces(model)
    webui.load(model)
    assert traces.left == []
    webui.restart()
    assert is_ours(model)


def test_unticked_nobody_hears_of_us(webui: hosts.Webui, build: Build) -> None:
    webui.restart(ticked=[])
    webui.load(build())
    webui.unload()
    assert webui.lines.seen == []


def test_the_switch_survives_the_tick(webui: hosts.Webui, model: Any) -> None:
    webui.load(model)
    webui.extension.set_activate(False)
    webui.restart(ticked=[])
    webui.restart()
    assert webui.extension.state().tone == "off"


@each_version
def test_a_restart_of_the_interface_changes_nothing_on_the_model(
    version: hosts.Version, open_webui: OpenWebui, model: Any
) -> None:
    webui = open_webui(version)
    webui.start()
    webui.load(model)
    traces = hosts.Traces(model)
    webui.restart()
    assert traces.left == []


# --- the switch -------------------------------------------------------------------------------------------------------


def test_switched_off_the_model_has_the_very_hooks_of_accelerate(
    webui: hosts.Webui, model: Any, reply: Reply, right: Right
) -> None:
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    webui.load(model)
    webui.extension.set_activate(False)
    assert webui.extension.state().tone == "off"
    assert all(vars(module).get("forward") is forwards[name] for name, module in model.named_modules())
    assert reply(model) == right


def test_a_model_loaded_while_switched_off_stays_off(webui: hosts.Webui, model: Any, is_ours: IsOurs) -> None:
    webui.extension.set_activate(False)
    webui.load(model)
    assert webui.extension.state().tone == "off"
    assert not is_ours(model)


def test_the_meter_goes_on_while_switched_off(webui: hosts.Webui, model: Any, reply: Reply) -> None:
    webui.extension.set_mode("eager")
    webui.load(model)
    reply(model)
    webui.extension.set_activate(False)
    reply(model)
    snapshot = webui.extension.state().snapshot
    assert snapshot is not None
    assert snapshot.sharded is not None
    assert snapshot.unsharded is not None
    assert snapshot.unsharded.bytes_per_token > snapshot.sharded.bytes_per_token


def test_the_mode_can_be_chosen(webui: hosts.Webui, model: Any) -> None:
    webui.load(model)
    webui.extension.set_mode("eager")
    assert webui.extension.state().mode == "eager"
    assert webui.extension.state().tone == "on"


@pytest.mark.parametrize("mode", ["turbo", "", None, ["eager"], "<script>", "eager\nERROR all is lost"])
def test_what_is_no_mode_is_refused_in_one_line_and_changes_nothing(webui: hosts.Webui, model: Any, mode: Any) -> None:
    webui.load(model)
    before = webui.extension.state()
    webui.extension.set_mode(mode)
    now = webui.extension.state()
    assert (now.mode, now.tone, now.sentence) == (before.mode, before.tone, before.sentence)
    (line,) = webui.lines.of("WARNING")
    assert line.startswith("There is no mode ")
    assert line.endswith(": choose eager or graph.")
    assert "\n" not in line


class Pause:
    """A stopping criterion that holds a reply between two tokens until one says go.

    Args:
        token: after which one.
    """

    def __init__(self, token: int) -> None:
        self.there, self.go = threading.Event(), threading.Event()
        self._left = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        self._left -= 1
        if self._left == 0:
            self.there.set()
            assert self.go.wait(timeout=60)
        return False


class Replying(threading.Thread):
    """A reply in a thread of its own, as the webui writes them."""

    def __init__(self, model: Any, place: str, pause: Pause) -> None:
        super().__init__(daemon=True)
        from transformers import StoppingCriteriaList

        options = {**support.GREEDY.options, "stopping_criteria": StoppingCriteriaList([pause])}
        self._way = support.Way("paused", options)
        self._model, self._place = model, place
        self.tokens: list[list[int]] = []
        self.start()

    def run(self) -> None:
        self.tokens = self._way.run(self._model, self._place).tokens.tolist()


@pytest.mark.parametrize("activate", [False, True], ids=["off", "on"])
def test_the_switch_takes_effect_between_two_tokens_of_a_reply_that_goes_on_the_same(
    webui: hosts.Webui, model: Any, places: list[str], right: Right, activate: bool
) -> None:
    webui.load(model)
    webui.extension.set_activate(not activate)
    pause = Pause(token=5)
    replying = Replying(model, places[0], pause)
    assert pause.there.wait(timeout=60)
    webui.extension.set_activate(activate)
    assert webui.extension.state().tone == ("on" if activate else "off")
    pause.go.set()
    replying.join(timeout=60)
    assert replying.tokens == right
    snapshot = webui.extension.state().snapshot
    assert snapshot is not None
    sharded = [token.sharded for token in snapshot.tokens]
    switched = sharded.index(activate)
    assert sharded == [not activate] * switched + [activate] * (len(sharded) - switched)
    # Not timed are the first token, the one at the switch, and the one whose bytes were counted with sharding off; of
    # the last one, transformers 4.28 tells nobody.
    assert (switched, len(sharded)) in [(2 if activate else 3, 7), (2 if activate else 3, 6)]


def test_a_reply_goes_on_the_same_when_its_model_is_unloaded_meanwhile(
    webui: hosts.Webui, model: Any, places: list[str], right: Right
) -> None:
    webui.load(model)
    pause = Pause(token=4)
    replying = Replying(model, places[0], pause)
    assert pause.there.wait(timeout=60)
    webui.unload()
    pause.go.set()
    replying.join(timeout=60)
    assert replying.tokens == right


# --- the panel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradio() -> Any:
    return pytest.importorskip("gradio")


@pytest.mark.parametrize("version", [hosts.MAY_2023, hosts.V4], ids=str)
def test_the_panel_is_in_the_webuis_interface_at_each_start(
    version: hosts.Version, gradio: Any, open_webui: OpenWebui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = open_webui(version)
    name = f"{extension_module.__package__}.panel"
    monkeypatch.setitem(sys.modules, "gradio", gradio)  # the real one, as the panel below
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules[extension_module.__package__], "panel", importlib.import_module(name))
    webui.load(model)
    for start in (webui.start, webui.restart):
        with gradio.Blocks() as page:
            start()
        parts = [part.get("props", {}) for part in page.get_config_file()["components"]]
        ids = [part.get("elem_id") for part in parts]
        assert ids.count("sharded_kv-activate") == 1
        assert ids.count("sharded_kv-mode") == 1
        assert parts[ids.index("sharded_kv-mode")]["value"] == "graph"
    assert webui.extension.state().tone == "on"
    assert webui.lines.of("ERROR") == []


# --- failures of ours -------------------------------------------------------------------------------------------------


class Ours(Exception):
    """A failure of ours, made by a test."""


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Ours("made by a test")


def has_failed(webui: hosts.Webui) -> bool:
    """Whether the panel says so, and the log just once, with what is needed to find the cause."""
    state = webui.extension.state()
    return (
        state.tone == "failed"
        and "made by a test" in state.sentence
        and len(webui.lines.of("ERROR")) == 1
        and webui.lines.tracebacks == 1
    )


def fail_halfway() -> Callable[[Patch], None]:
    """An install() of forwards of which the fourth fails."""
    original, calls = Patch.install, iter(range(3))

    def install(patch: Patch) -> None:
        if next(calls, None) is None:
            fail()
        original(patch)

    return install


BREAKABLE: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "attaching": (extension_module, "attach", lambda: fail),
    "reading the placement": (sys.modules[Sharding.__module__], "read_placement", lambda: fail),
    "installing the forwards": (Patch, "install", fail_halfway),
    "reading the weights": (Meter, "read", lambda: fail),
}
breaks = pytest.mark.parametrize("broken", BREAKABLE)


def break_down(patch: pytest.MonkeyPatch, what: str) -> None:
    """Let one part of ours fail."""
    owner, name, make = BREAKABLE[what]
    patch.setattr(owner, name, make())


@breaks
def test_a_failure_while_loading_leaves_the_model_to_accelerate(
    webui: hosts.Webui,
    model: Any,
    reply: Reply,
    right: Right,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    traces = hosts.Traces(model)
    break_down(monkeypatch, broken)
    webui.load(model)
    assert webui.shared.model is model
    assert has_failed(webui)
    assert traces.left == []
    assert reply(model) == right


@breaks
def test_ticking_the_box_again_recovers_from_a_failure_while_loading(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch, is_ours: IsOurs, broken: str
) -> None:
    with monkeypatch.context() as patch:
        break_down(patch, broken)
        webui.load(model)
    webui.extension.set_activate(True)
    assert webui.extension.state().tone == "on"
    assert is_ours(model)


@breaks
def test_a_failure_with_a_new_model_lets_go_of_the_one_before(
    webui: hosts.Webui, build: Build, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = build()
    traces = hosts.Traces(before)
    webui.load(before)
    break_down(monkeypatch, broken)
    webui.load(build(seed=1))
    assert traces.left == []


def test_a_failure_at_a_restart_leaves_the_model_to_accelerate(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = hosts.Traces(model)
    webui.load(model)
    with monkeypatch.context() as patch:
        patch.setattr(extension_module, "attach", fail)
        webui.restart()
    assert webui.extension.state().tone == "failed"
    assert traces.left == []


@breaks
def test_after_a_failure_the_next_model_is_shown_as_it_runs(
    webui: hosts.Webui, build: Build, monkeypatch: pytest.MonkeyPatch, is_ours: IsOurs, broken: str
) -> None:
    with monkeypatch.context() as patch:
        break_down(patch, broken)
        webui.load(build())
    webui.load(build(seed=1))
    assert (webui.extension.state().tone == "on") == is_ours(webui.shared.model)


def test_a_meter_that_cannot_be_read_is_said_once_and_the_model_is_left_to_accelerate(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch, reply: Reply, right: Right
) -> None:
    traces = hosts.Traces(model)
    webui.load(model)
    monkeypatch.setattr(Meter, "snapshot", fail)
    for _ in range(3):  # as the panel asks
        webui.extension.state()
    assert has_failed(webui)
    assert traces.left == []
    assert reply(model) == right


def test_a_verdict_that_fails_is_logged_once_however_often_the_panel_asks(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui.load(model)
    monkeypatch.setattr(type(webui.extension), "_verdict", fail)
    states = [webui.extension.state() for _ in range(3)]
    assert [state.tone for state in states] == ["failed"] * 3
    assert len(webui.lines.of("ERROR")) == 1


def test_a_log_that_fails_as_well_leaves_the_model_to_accelerate(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = hosts.Traces(model)
    webui.load(model)
    monkeypatch.setattr(Meter, "snapshot", fail)
    monkeypatch.setattr(extension_module, "logger", fail)
    assert webui.extension.state().tone == "failed"
    assert traces.left == []


def test_watching_for_models_that_failed_is_done_by_the_next_tick(
    open_webui: OpenWebui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = open_webui()
    with monkeypatch.context() as patch:
        patch.setattr(extension_module, "watch", fail)
        webui.start()
    webui.extension.set_activate(True)
    webui.load(model)
    assert webui.extension.state().tone == "on"


def test_ticking_the_box_again_recovers_from_a_meter_that_could_not_be_read(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui.load(model)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "snapshot", fail)
        webui.extension.state()
    webui.extension.set_activate(True)
    assert webui.extension.state().tone == "on"


@pytest.mark.parametrize("switch", ["enable", "disable"])
def test_a_switch_that_fails_leaves_the_model_to_accelerate(
    webui: hosts.Webui, model: Any, monkeypatch: pytest.MonkeyPatch, is_ours: IsOurs, switch: str
) -> None:
    webui.load(model)
    webui.extension.set_activate(switch == "disable")
    monkeypatch.setattr(Sharding, switch, fail)
    webui.extension.set_activate(switch == "enable")
    assert has_failed(webui)
    assert not is_ours(model)


@each_version
def test_settings_that_cannot_be_read_do_not_stop_the_webui(
    version: hosts.Version, open_webui: OpenWebui, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = open_webui(version)
    traces = hosts.Traces(model)
    monkeypatch.setattr(settings, "correct", fail)
    webui.load(model)
    webui.start()
    assert webui.built == 1
    assert webui.extension.state().tone == "failed"
    assert traces.left == []


def test_ticking_the_box_again_recovers_from_settings_that_could_not_be_read(
    open_webui: OpenWebui, model: Any, monkeypatch: pytest.MonkeyPatch, is_ours: IsOurs
) -> None:
    webui = open_webui()
    webui.load(model)
    with monkeypatch.context() as patch:
        patch.setattr(settings, "correct", fail)
        webui.start()
    webui.extension.set_activate(True)
    assert webui.extension.state().tone == "on"
    assert is_ours(model)


def test_where_there_is_no_webui_setting_up_says_so_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modules.shared", None)
    extension = extension_module.Extension()
    extension.setup()
    assert extension.state().tone == "failed"


@each_version
def test_a_panel_that_cannot_be_built_does_not_stop_the_webui(
    version: hosts.Version, open_webui: OpenWebui, panel: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = open_webui(version)
    traces = hosts.Traces(model)
    webui.load(model)
    monkeypatch.setattr(panel, "build", fail)
    webui.start()
    assert list(webui.scripts) == ["sharded_kv"]
    assert ["made by a test" in text for text in panel.texts] == [True]
    assert has_failed(webui)
    assert traces.left == []


def test_ticking_the_box_again_recovers_from_a_panel_that_could_not_be_built(
    open_webui: OpenWebui, panel: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = open_webui()
    webui.load(model)
    with monkeypatch.context() as patch:
        patch.setattr(panel, "build", fail)
        webui.start()
    webui.extension.set_activate(True)
    assert webui.extension.state().tone == "on"


def test_an_error_in_our_part_of_a_forward_is_shown_and_ticking_the_box_again_recovers(
    webui: hosts.Webui, model: Any, reply: Reply, right: Right, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui.load(model)
    with monkeypatch.context() as patch:
        patch.setattr(ForwardState, "_copy", None)
        assert reply(model) == right
    state = webui.extension.state()
    assert state.tone == "failed"
    assert "TypeError" in state.sentence
    assert reply(model) == right
    webui.extension.set_activate(True)
    assert webui.extension.state().tone == "on"


@each_version
def test_the_webuis_log_has_the_details_of_an_error_in_our_part_of_a_forward(
    version: hosts.Version, open_webui: OpenWebui, model: Any, reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui = open_webui(version)
    webui.start()
    webui.load(model)
    monkeypatch.setattr(ForwardState, "_copy", None)
    reply(model)
    (line,) = webui.lines.of("ERROR")
    assert "TypeError" in line
    assert webui.lines.tracebacks == 1


@each_version
def test_the_webuis_log_has_our_warnings(
    version: hosts.Version, open_webui: OpenWebui, places: list[str], model: Any
) -> None:
    webui = open_webui(version)
    webui.start()
    webui.load(model)
    model.to(places[1])
    support.GREEDY.run(model, places[1])
    assert len([line for line in webui.lines.of("WARNING") if "The model was moved" in line]) == 1


def test_a_logger_that_is_none_is_done_without(
    open_webui: OpenWebui, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    webui = open_webui()
    sys.modules["modules.logging_colors"].logger = "print"  # type: ignore[attr-defined]
    with caplog.at_level("INFO"):
        webui.start()
        webui.load(model)
    assert f"{host_module.NAME}: on" in caplog.text
