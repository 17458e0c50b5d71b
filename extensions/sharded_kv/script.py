"""What the webui calls: params, setup() and ui(), as the webui looks for them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def _package() -> ModuleType:
    """The package of this folder: one copy for the process, whichever way the webui has loaded this file.

    webui 4 loads it by its path, as `user_ext_sharded_kv`, which has no package around it. Nothing goes on `sys.path`:
    there the folder `extensions/openai` of webui 1 and 2 would hide the library of that name.
    """
    if __package__ in sys.modules:
        return sys.modules[__package__]
    folder = Path(__file__).parent
    name = "extensions.sharded_kv"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _load() -> Any:
    """The extension; where it cannot be imported, what says so in its place: the webui has to start all the same."""
    package = _package().__name__
    try:
        return importlib.import_module(f"{package}.webui.extension").extension
    except Exception as error:
        host = importlib.import_module(f"{package}.webui.host")
        host.logger().exception("sharded_kv cannot be loaded, and does nothing.")
        return _Broken(error)


class _Broken:
    def __init__(self, error: Exception) -> None:
        self.params = {"display_name": "Sharded KV", "is_tab": True}
        self.reason = "".join(traceback.format_exception_only(type(error), error)).strip()

    def setup(self) -> None:
        """There is nothing to set up."""

    def build_panel(self) -> None:
        """Say why there is no panel."""
        import gradio as gr

        gr.Textbox(self.reason, label="sharded_kv cannot be loaded, and does nothing", interactive=False)


_extension = _load()
params = _extension.params


def setup() -> None:
    """Called once the webui has put settings.yaml into `params`."""
    _extension.setup()


def ui() -> None:
    """Called inside the webui's gr.Blocks, at each start of its interface."""
    _extension.build_panel()
