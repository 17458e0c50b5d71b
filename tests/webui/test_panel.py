"""What the panel hands to Gradio, where something of it fails or others named it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("gradio")

from extensions.sharded_kv.webui import panel as panel_module
from extensions.sharded_kv.webui import view
from extensions.sharded_kv.webui.panel import Drawing
from extensions.sharded_kv.webui.state import PanelState

STATE = PanelState(activate=True, mode="eager", tone="on", sentence="All is well.")

each_view = pytest.mark.parametrize("name", ["status", "live", "measurement"])


def fail(*_: Any) -> Any:
    raise RuntimeError("a <b>part</b>")


def test_a_state_is_drawn_as_the_view_draws_it() -> None:
    assert Drawing()(STATE) == (view.status(STATE), view.live(STATE), view.measurement(STATE))


@each_view
def test_a_view_that_fails_is_said_in_its_place(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(view, name, fail)
    status, live, measurement = Drawing()(STATE)
    assert status == "<p>The panel cannot be drawn: RuntimeError: a &lt;b&gt;part&lt;/b&gt;</p>"
    assert (live, measurement) == ("", "")


@each_view
def test_a_view_that_fails_is_logged_once_however_often_it_is_drawn(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    log = logging.Logger("the webui's")
    records: list[logging.LogRecord] = []
    log.addFilter(lambda record: records.append(record) or True)
    monkeypatch.setattr(panel_module, "logger", lambda: log)
    monkeypatch.setattr(view, name, fail)
    draw = Drawing()
    for _ in range(3):
        draw(STATE)
    assert [record.getMessage() for record in records] == ["The panel cannot be drawn: RuntimeError: a <b>part</b>"]


def test_a_view_that_fails_is_said_though_the_log_fails_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "status", fail)
    monkeypatch.setattr(panel_module, "logger", fail)
    assert "cannot be drawn" in Drawing()(STATE)[0]


def test_a_mode_from_outside_stays_text() -> None:
    state = PanelState(activate=True, mode="\" onclick='alert(1)' <script>", tone="on", sentence="")
    assert 'data-mode="&#34; onclick=&#39;alert(1)&#39; &lt;script&gt;"' in panel_module._beat(state)


def test_the_beat_is_a_plain_string_to_which_more_html_can_be_added() -> None:
    assert (panel_module._beat(STATE) + "<p>").endswith("<p>")
