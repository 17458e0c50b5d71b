"""Starts the stand-in for the webui as a process of its own, and prints what was found there as JSON.

Usage: python starts.py START FOLDER

FOLDER is the webui's, START one of the functions below. Nothing of this repository is imported but hosts.py and what
the webui itself loads.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts

Facts = dict[str, Any]
# What lasts as long as the process.
ENTERED = contextlib.ExitStack()


def may_2023(root: Path) -> Facts:
    """From a symbolic link in extensions/, by exec() of an import."""
    webui = opened(hosts.MAY_2023, root)
    webui.start(interface=False)
    script = webui.scripts["sharded_kv"]
    model = loaded(webui)
    facts = {"script": script.__name__, "loaded": seen(webui, model)}
    webui.restart(ticked=[], interface=False)
    facts["unticked"] = seen(webui, model)
    webui.restart(interface=False)
    facts["ticked again"] = seen(webui, model)
    facts["same script"] = webui.scripts["sharded_kv"] is script
    return {**facts, **around(webui)}


def another_name(root: Path) -> Facts:
    """Webui 2.8, from a copy whose folder has another name, which settings.yaml and the ticks use."""
    webui = opened(hosts.V2, root, ticked=["my_kv"], settings={"my_kv-activate": False})
    webui.start(interface=False)
    script = webui.scripts["my_kv"]
    model = loaded(webui)
    facts = {"script": script.__name__, "params": dict(script.params), "loaded": seen(webui, model)}
    webui.restart(ticked=["sharded_kv"], interface=False)
    facts["unticked"] = seen(webui, model)
    return {**facts, **around(webui)}


def v4(root: Path) -> Facts:
    """From a copy in user_data/extensions, while there is one in extensions/, too; executed anew at each restart."""
    webui = opened(hosts.V4, root)
    scripts = []
    for _ in range(3):
        webui.restart(interface=False)
        scripts.append(webui.scripts["sharded_kv"])
    model = loaded(webui)
    return {
        "script": scripts[0].__name__,
        "package": scripts[0].__package__,
        "different scripts": len({id(script) for script in scripts}),
        "different params": len({id(script.params) for script in scripts}),
        "loaded": seen(webui, model),
        "shard is": sys.modules["extensions.sharded_kv"].shard is headless_shard(),
        **around(webui),
    }


def headless(root: Path) -> Facts:
    """--nowebui --api without Gradio, from user_data/extensions, after somebody has imported our package elsewhere."""
    shard = headless_shard()
    webui = opened(hosts.V4, root)
    webui.start(interface=False)
    model = loaded(webui)
    facts = {"loaded": seen(webui, model)}
    webui.load(Server())
    return {
        **facts,
        "shard is": sys.modules["extensions.sharded_kv"].shard is shard,
        "gradio": sys.modules.get("gradio") is not None,
        **around(webui),
    }


def name_with_a_dot(root: Path) -> Facts:
    """Webui 4, from a symbolic link of such a name in user_data/extensions."""
    webui = opened(hosts.V4, root, ticked=["sharded_kv-1.0"], settings={"sharded_kv-1.0-mode": "turbo"})
    webui.start(interface=False)
    return {"params": dict(webui.scripts["sharded_kv-1.0"].params), **around(webui)}


def without_torch(root: Path) -> Facts:
    """A portable webui 4, which has no PyTorch, from user_data/extensions, with its interface."""
    import gradio

    webui = opened(hosts.V4, root)
    with gradio.Blocks() as page:
        webui.start()
    texts = [part.get("props", {}) for part in page.get_config_file()["components"] if part["type"] == "textbox"]
    return {"built": webui.built, "texts": [props.get("value") for props in texts], **around(webui)}


def without_torch_from_extensions(root: Path) -> Facts:
    """Webuis that have no PyTorch, from extensions/."""
    facts: Facts = {}
    for version in (hosts.V4, hosts.V2, hosts.MAY_2023):
        webui = opened(version, root)
        with contextlib.suppress(ModuleNotFoundError):
            webui.start(interface=False)
            facts[version.name] = list(webui.scripts)
        facts[f"{version.name} lines"] = webui.lines.seen
    return facts


class Server:
    """A client of another program."""


def opened(version: hosts.Version, root: Path, **options: Any) -> hosts.Webui:
    """The webui of `version`, before it loads its extensions."""
    webui = hosts.Webui(version, root=root, **options)
    sys.modules.update(webui.modules)
    ENTERED.enter_context(hosts.root_logger_of(webui))
    return webui


def loaded(webui: hosts.Webui) -> Any:
    """A tiny model, spread over two simulated GPUs, once the webui has loaded it."""
    from accelerate import dispatch_model

    hosts.tools("simulated").start(2)
    models = hosts.tools("models")
    model = models.build("llama")
    model = dispatch_model(model, models.device_map(model, ["sim:0", "sim:1"]), main_device="sim:0")
    webui.load(model)
    return model


def seen(webui: hosts.Webui, model: Any) -> Facts:
    """Whether the model runs by forwards of ours, and what the log has said since one last asked."""
    lines, webui.lines.seen = webui.lines.seen, []
    forwards = [vars(module).get("forward") for module in model.modules()]
    return {"ours": any(type(forward).__name__ == "Wrapped" for forward in forwards), "lines": lines}


def headless_shard() -> Any:
    """What `from extensions.sharded_kv import shard` gives."""
    from extensions.sharded_kv import shard

    return shard


def around(webui: hosts.Webui) -> Facts:
    """What became of the process."""
    ours = [name for name, module in sys.modules.items() if _is_ours(getattr(module, "__file__", None))]
    found = importlib.util.find_spec("openai")
    return {
        "copies": sorted(ours),
        "on the path": [entry for entry in sys.path if webui.root in (Path(entry), *Path(entry).parents)],
        "root": str(webui.root),
        "openai": None if found is None else found.origin,
        "rest": webui.lines.seen,
    }


def _is_ours(file: str | None) -> bool:
    return file is not None and Path(file).parts[-2:] == ("webui", "extension.py")


STARTS: dict[str, Callable[[Path], Facts]] = {
    start.__name__: start
    for start in (may_2023, another_name, v4, headless, name_with_a_dot, without_torch, without_torch_from_extensions)
}


def main() -> None:
    name, folder = sys.argv[1:]
    sys.path[0] = folder  # as of `python server.py`
    os.chdir(folder)
    print(json.dumps(STARTS[name](Path(folder))))


if __name__ == "__main__":
    main()
