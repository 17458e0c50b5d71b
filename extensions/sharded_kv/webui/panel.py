"""The panel: Gradio's controls around what the view draws. Holds no state: every browser sees the extension's."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from ..engine import text
from ..engine.sharding import MODES
from . import view
from .host import logger
from .state import Controls, PanelState

_FOLDER = Path(__file__).parent


def build(extension: Controls) -> None:
    """Build the panel inside the `gr.Blocks` that is being built."""
    draw = Drawing()
    state = extension.state()
    first_status, first_live, first_measurement = draw(state)
    with gr.Column(elem_id="sharded_kv"):
        gr.HTML(f"<style>{(_FOLDER / 'panel.css').read_text(encoding='utf-8')}</style>", elem_id="sharded_kv-style")
        with gr.Row():
            activate = gr.Checkbox(
                value=state.activate,
                label="Sharding on",
                info="Takes effect at once, between two tokens where a reply is being written. The model stays loaded.",
                elem_id="sharded_kv-activate",
            )
            mode = gr.Radio(
                choices=list(MODES),
                value=state.mode,
                label="Mode",
                info="eager: block by block. graph: tokens as CUDA graphs, which is faster and takes more memory.",
                elem_id="sharded_kv-mode",
            )
        keep = gr.Checkbox(
            value=state.keep,
            label="Keep the conversation's cache",
            info="The next message then reads only what is new. It stays in GPU memory between replies.",
            elem_id="sharded_kv-keep",
        )
        status = gr.HTML(first_status)
        live = gr.HTML(first_live)
        with gr.Row():
            measure = gr.Button("Measure on and off", elem_id="sharded_kv-measure")
            cancel = gr.Button("Cancel measuring", elem_id="sharded_kv-cancel")
            drop = gr.Button("Let go of the kept cache", elem_id="sharded_kv-drop")
        measurement = gr.HTML(first_measurement)
        tick = gr.Button(elem_id="sharded_kv-tick")
        sync = gr.Button(elem_id="sharded_kv-sync")

    def drawn() -> tuple[str, str, str]:
        state = extension.state()
        now_status, now_live, now_measurement = draw(state)
        return _beat(state) + now_status, now_live, now_measurement

    def switches() -> tuple[bool, str, bool]:
        state = extension.state()
        return state.activate, state.mode, state.keep

    def after(action: Callable[..., None]) -> Callable[..., tuple[str, str, str]]:
        def handle(*values: Any) -> tuple[str, str, str]:
            action(*values)
            return drawn()

        return handle

    page = Context.root_block
    for event, handle, inputs, outputs in (
        (page.load, drawn, [], [status, live, measurement]),
        (page.load, switches, [], [activate, mode, keep]),
        (tick.click, drawn, [], [status, live, measurement]),
        (sync.click, switches, [], [activate, mode, keep]),
        (activate.input, after(extension.set_activate), [activate], [status, live, measurement]),
        (mode.input, after(extension.set_mode), [mode], [status, live, measurement]),
        (keep.input, after(extension.set_keep), [keep], [status, live, measurement]),
        (drop.click, after(extension.drop_kept), [], [status, live, measurement]),
        (measure.click, after(extension.measure), [], [status, live, measurement]),
        (cancel.click, after(extension.cancel_measuring), [], [status, live, measurement]),
    ):
        # Not in the queue, where replies are: neither waits for the other. Whole values and no gr.update(), for which
        # Gradio makes a component anew: that took two thirds of a tick's time.
        event(handle, inputs, outputs, queue=False, **_quietly(event))
    page.load(None, None, None, **{_name_of_js(page.load): (_FOLDER / "panel.js").read_text(encoding="utf-8")})


class Drawing:
    """Draws states as the status, what is live, and the measurement, each as HTML.

    What cannot be drawn is said in its place, and in the log once.
    """

    def __init__(self) -> None:
        self._told = ""

    def __call__(self, state: PanelState) -> tuple[str, str, str]:
        """Draw one state."""
        try:
            return view.status(state), view.live(state), view.measurement(state)
        except Exception as error:
            words = f"The panel cannot be drawn: {text.of_error(error)}"
            if words != self._told:
                self._told = words
                with contextlib.suppress(Exception):
                    logger().error("%s", words, exc_info=error)
            return str(view.html("<p>{words}</p>", words=words)), "", ""


def _beat(state: PanelState) -> str:
    """What panel.js reads: that an answer came, and how the switches stand."""
    # A plain string: what is added to it must not be escaped.
    return str(
        view.html(
            '<i id="sharded_kv-beat" data-time="{time}" data-activate="{activate}" data-mode="{mode}"'
            ' data-keep="{keep}" hidden></i>',
            time=time.time(),
            activate=str(state.activate).lower(),
            mode=state.mode,
            keep=str(state.keep).lower(),
        )
    )


def _quietly(event: Callable[..., Any]) -> dict[str, Any]:
    """The options by which this Gradio shows no spinner for an event, and does not list it in its API's docs."""
    known = inspect.signature(event).parameters
    hidden = "hidden" if "trigger_mode" in known else False  # Gradio 3 took a bool
    if "api_visibility" in known:  # Gradio 6
        return {"show_progress": hidden, "api_visibility": "private"}
    return {"show_progress": hidden, "api_name": False} if "show_api" in known else {"show_progress": hidden}


def _name_of_js(event: Callable[..., Any]) -> str:
    return "js" if "js" in inspect.signature(event).parameters else "_js"  # Gradio 3
