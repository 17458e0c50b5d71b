"""A page for the panel without a webui: a chat box over a model, and beside it what `script.py` shows in the webui."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

# Before Gradio is imported: it asks its makers' server for news otherwise.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

FIRST_PROMPT = "Two GPUs meet on a bus. One of them says:"
REPLY_TOKENS = 200


def serve(model: Any, tokenizer: Any, name: str, port: int, remark: str) -> None:
    """Show the page on 127.0.0.1 until Ctrl-C.

    Args:
        model: loaded and spread.
        tokenizer: its tokenizer.
        name: what to call it.
        port: where the page is.
        remark: a sentence for the top of the page, or "".
    """
    host = _stand_in(tokenizer, name)
    from extensions.sharded_kv import script

    script.setup()
    host.model = model
    writer = Writer(host)
    page = build(script, writer, remark)
    page.queue(**_several_at_once(page.queue))
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    print(f"\nThe panel is on http://127.0.0.1:{port}. Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nEnding.", flush=True)
    finally:
        writer.close()
        page.close(verbose=False)


def build(script: ModuleType, writer: Writer, remark: str) -> gr.Blocks:
    """The page: the chat box, and what the extension's `ui()` builds. `remark` stands above both."""
    with gr.Blocks(title="sharded_kv", analytics_enabled=False) as page:
        gr.Markdown(f"## sharded_kv\nThe panel as it is in the webui, and a model to keep it busy. {remark}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(FIRST_PROMPT, label="You say", elem_id="demo-prompt")
                with gr.Row():
                    reply = gr.Button("Reply", variant="primary", elem_id="demo-reply")
                    stop = gr.Button("Stop", elem_id="demo-stop")
                keep = gr.Checkbox(label="Keep generating", value=lambda: writer.keeps_on, elem_id="demo-keep")
                chat = gr.Textbox(
                    lines=12, label="The model says (random weights: no sense)", interactive=False, elem_id="demo-chat"
                )
            with gr.Column(scale=2, min_width=360):
                script.ui()

        def write(prompt: str) -> Iterator[str]:
            writer.write(prompt)
            yield from writer.follow()

        def keep_on(keeps_on: bool, prompt: str) -> Iterator[str]:
            writer.keep_on(keeps_on, prompt)
            yield from writer.follow()

        reply.click(write, [prompt], [chat])
        keep.input(keep_on, [keep, prompt], [chat])
        stop.click(writer.stop, None, [keep], queue=False)
        page.load(writer.follow, None, [chat])
    return page


class Writer:
    """Writes replies in a thread of its own, as the webui does, whoever looks.

    Args:
        host: the stand-in for `modules.shared`.
    """

    def __init__(self, host: Any) -> None:
        self._host = host
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._prompt = ""
        self._asked = False
        self._stopped = False
        self._closed = False
        self._text = ""
        self._busy = False
        self.keeps_on = False
        self._thread = threading.Thread(target=self._run, name="demo writer", daemon=True)
        self._thread.start()

    def write(self, prompt: str) -> None:
        """Write a reply, after the one that is being written."""
        self._prompt, self._asked, self._stopped, self._busy = prompt, True, False, True
        self._wake.set()

    def keep_on(self, keeps_on: bool, prompt: str) -> None:
        """Write one reply after the other, or no more after this one."""
        self.keeps_on = keeps_on
        if keeps_on:
            self.write(prompt)

    def stop(self) -> bool:
        """Stop at the next token. Returns whether another reply follows: no."""
        self.keeps_on, self._stopped = False, True
        return self.keeps_on

    def close(self) -> None:
        """Stop for good."""
        self._closed = True
        self.stop()
        self._wake.set()
        self._thread.join(timeout=10)

    def follow(self) -> Iterator[str]:
        """The text as it grows, until no reply is being written."""
        yield self._text
        while self._busy:
            with self._changed:
                self._changed.wait(timeout=0.2)
            yield self._text

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while not self._closed and (self._asked or self.keeps_on):
                self._asked = False
                try:
                    with self._host.generation_lock:
                        self._reply()
                except Exception as error:
                    self._text = f"The reply failed: {error}"
                    self.keeps_on = False
            self._busy = False
            if self._closed:
                return

    def _reply(self) -> None:
        model, tokenizer = self._host.model, self._host.tokenizer
        inputs = tokenizer(self._prompt, return_tensors="pt").to(model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generating = threading.Thread(
            target=self._generate, args=(model, inputs, streamer), name="demo reply", daemon=True
        )
        generating.start()
        self._text = ""
        for piece in streamer:
            with self._changed:
                self._text += piece
                self._changed.notify_all()
        generating.join()

    def _generate(self, model: Any, inputs: Any, streamer: TextIteratorStreamer) -> None:
        try:
            with torch.no_grad():
                model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    streamer=streamer,
                    do_sample=True,
                    max_new_tokens=REPLY_TOKENS,
                    min_new_tokens=REPLY_TOKENS,
                    stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: self._stopped]),
                )
        finally:
            streamer.end()


def _stand_in(tokenizer: Any, name: str) -> Any:
    """What of the webui the extension looks at: `modules.shared`."""
    shared: Any = ModuleType("modules.shared")
    shared.model = None
    shared.tokenizer = tokenizer
    shared.model_name = name
    shared.args = argparse.Namespace(extensions=["sharded_kv"])
    shared.settings = {}
    shared.generation_lock = threading.Lock()
    shared.need_restart = False
    modules: Any = ModuleType("modules")
    modules.shared = shared
    sys.modules.update({"modules": modules, "modules.shared": shared})
    return shared


def _several_at_once(queue: Callable[..., Any]) -> dict[str, int]:
    """The option by which one browser that follows a reply does not keep another one waiting."""
    name = "default_concurrency_limit"
    return {name if name in inspect.signature(queue).parameters else "concurrency_count": 16}  # Gradio 3: the latter
