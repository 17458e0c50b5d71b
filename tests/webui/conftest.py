"""A webui that has our extension, a model to load there, and what the right reply is."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from extensions.sharded_kv import webui as package
from extensions.sharded_kv.engine.patches import Wrapped
from extensions.sharded_kv.webui.extension import Extension
from tests import support
from tests.webui import hosts
from tools import models


@pytest.fixture
def places(devices: support.Devices) -> list[str]:
    return devices(2)


@pytest.fixture
def build(places: list[str]) -> Callable[..., Any]:
    """Makes a tiny model that accelerate has spread over two devices."""
    return lambda seed=0, **options: support.spread(models.build("llama", seed=seed), places, **options)


@pytest.fixture
def model(build: Callable[..., Any]) -> Any:
    return build()


@pytest.fixture
def reply(places: list[str]) -> Callable[[Any], list[list[int]]]:
    """The tokens with which a model replies to always the same prompts."""
    return lambda model: support.GREEDY.run(model, places[0]).tokens.tolist()


@pytest.fixture
def right() -> list[list[int]]:
    """The reply of `model` without any hooks."""
    return support.on_cpu("llama", support.GREEDY).tokens.tolist()


@pytest.fixture
def is_ours() -> Callable[[Any], bool]:
    """Whether a model runs by forwards of ours."""
    return lambda model: any(isinstance(vars(module).get("forward"), Wrapped) for module in model.modules())


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A panel in place of the real one, which needs Gradio.

    It has the `states` that it was built with, and the `texts` that were shown where it could not be built.
    """
    stand_in: Any = ModuleType(f"{package.__name__}.panel")
    stand_in.states, stand_in.texts = [], []
    stand_in.build = lambda extension: stand_in.states.append(extension.state())
    gradio: Any = ModuleType("gradio")
    gradio.__spec__ = ModuleSpec("gradio", None)
    gradio.Textbox = lambda text, **options: stand_in.texts.append(text)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(package, "panel", stand_in, raising=False)
    return stand_in


@pytest.fixture
def _own_loggers() -> Iterator[None]:
    """One webui's log is not told what happens in the next: our loggers are afterwards as they were."""
    loggers = [logging.getLogger(name) for name in (package.__package__.rpartition(".")[0], hosts.NAME)]
    before = [(logger.handlers[:], logger.propagate, logger.level, logger.parent) for logger in loggers]
    yield
    for logger, (handlers, propagate, level, parent) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate, logger.parent = handlers, propagate, parent
        logger.setLevel(level)


@pytest.fixture
def open_webui(panel: Any, _own_loggers: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., hosts.Webui]]:
    """Begins a process of the webui, which has not loaded its extensions yet. Takes what `hosts.Webui` takes."""
    with contextlib.ExitStack() as stack:

        def open_one(version: hosts.Version = hosts.V2, **options: Any) -> hosts.Webui:
            webui = hosts.Webui(version, extension=Extension(), **options)
            for name, module in webui.modules.items():
                monkeypatch.setitem(sys.modules, name, module)
            stack.enter_context(hosts.root_logger_of(webui))
            return webui

        yield open_one


@pytest.fixture
def webui(open_webui: Callable[..., hosts.Webui]) -> hosts.Webui:
    """The webui once its interface is there, without a model."""
    webui = open_webui()
    webui.start()
    return webui
