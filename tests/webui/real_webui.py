"""Starts the text-generation-webui of the current folder with two simulated GPUs, over which its models are spread.

Usage: python real_webui.py OPTION_OF_SERVER_PY... (--cpu and --loader Transformers among them)

The webui runs as it is, but for two functions of transformers. `from_pretrained` spreads the model over the GPUs.
`generate` gets the prompt on the first of them, where the webui has it if there is torch.cuda; and it prints what the
reply has moved between GPUs.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

from hosts import tools

DEVICES = ("sim:0", "sim:1")


def spreading(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def spread(path: Any, **options: Any) -> Any:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        devices = [torch.device(device) for device in DEVICES]
        return from_pretrained(path, **options, device_map=tools("models").device_map(skeleton, devices))

    return spread


def counting(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def counted(model: Any, inputs: Any = None, *args: Any, **options: Any) -> Any:
        with tools("simulated").record() as traffic:
            try:
                return generate(model, inputs if inputs is None else inputs.to(model.device), *args, **options)
            finally:
                copies, size = traffic.total_copies, traffic.total_bytes
                print(f"Between GPUs: {copies} copies, {size} bytes", flush=True)

    return counted


def main() -> None:
    import transformers

    tools("simulated").start(len(DEVICES))
    spread = spreading(transformers.AutoModelForCausalLM.from_pretrained)
    transformers.AutoModelForCausalLM.from_pretrained = spread
    transformers.GenerationMixin.generate = counting(transformers.GenerationMixin.generate)
    sys.argv = ["server.py", *sys.argv[1:]]
    sys.path[0] = os.getcwd()
    runpy.run_path("server.py", run_name="__main__")


if __name__ == "__main__":
    main()
