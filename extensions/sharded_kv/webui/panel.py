"""The panel: Gradio's controls around what the view draws. Holds no state: every browser sees the extension's."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from ..engine.sharding import MODES
from . import view
from .extension import Extension

_FOLDER = Path(__file__).parent


def build(extension: Extension) -> None:
    """Build the panel inside the `gr.Blocks` that is being built."""
    state = extension.state()
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
                info="How a model runs while sharding is on.",
                elem_id="sharded_kv-mode",
            )
        status = gr.HTML(view.status(state))
        live = gr.HTML(view.live(state))
        with gr.Row():
            measure = gr.Button("Measure on and off", elem_id="sharded_kv-measure")
            cancel = gr.Button("Cancel", elem_id="sharded_kv-cancel", interactive=False)
        measurement = gr.HTML(view.measurement(state))
        tick = gr.Button("Refresh", elem_id="sharded_kv-tick")

    shown = [activate, mode, status, live, measure, cancel, measurement]

    def refresh(activate: bool, mode: str) -> list[Any]:
        state = extension.state()
        return [
            # What the browser has already stays: it may be newer than this answer.
            gr.update() if activate == state.activate else gr.update(value=state.activate),
            gr.update() if mode == state.mode else gr.update(value=state.mode),
            f'<i id="sharded_kv-beat" data-time="{time.time()}" hidden></i>{view.status(state)}',
            view.live(state),
            gr.update(interactive=state.placement is not None and not state.measurement.under_way),
            gr.update(interactive=state.measurement.under_way),
            view.measurement(state),
        ]

    def after(action: Callable[[bool, str], None]) -> Callable[[bool, str], list[Any]]:
        def handle(activate: bool, mode: str) -> list[Any]:
            action(activate, mode)
            return refresh(activate, mode)

        return handle

    for event, handle in (
        (Context.root_block.load, refresh),
        (tick.click, refresh),
        (activate.input, after(lambda activate, mode: extension.set_activate(activate))),
        (mode.input, after(lambda activate, mode: extension.set_mode(mode))),
        (measure.click, after(lambda activate, mode: extension.measure())),
        (cancel.click, after(lambda activate, mode: extension.cancel_measuring())),
    ):
        # Not in the queue, where replies are: neither waits for the other.
        event(handle, [activate, mode], shown, queue=False, **_quietly(event))
    Context.root_block.load(
        None, None, None, **{_name_of_js(Context.root_block.load): (_FOLDER / "panel.js").read_text(encoding="utf-8")}
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
