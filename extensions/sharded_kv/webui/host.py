"""The webui, as far as we need it. The only file that imports its modules."""

from __future__ import annotations

import contextlib
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

# The webui calls an extension by the name of its folder: in --extensions, in the Session tab, in settings.yaml.
NAME = Path(__file__).parent.parent.name


class Host:
    """What the webui tells about itself, always as of now.

    Attributes:
        shared: `modules.shared`, where it keeps its state in every version.
        logger: its own logger, whose lines people see.
    """

    def __init__(self, shared: ModuleType) -> None:
        self.shared: Any = shared
        self.logger = logger()

    def show_our_log(self) -> None:
        """Show the warnings and errors of our other rooms, too, where the webui shows its own."""
        ours = logging.getLogger(str(__package__).rpartition(".")[0])
        ours.handlers[:] = self.logger.handlers
        ours.propagate = not self.logger.handlers
        ours.setLevel(logging.WARNING)  # the root logger may be set to errors only

    @classmethod
    def find(cls) -> Host:
        """The webui that this process is.

        Raises:
            ModuleNotFoundError: it is none.
        """
        return cls(importlib.import_module("modules.shared"))

    @property
    def ticked(self) -> bool:
        """Whether we are among the extensions in use: a tick in the Session tab, or --extensions."""
        return NAME in (getattr(self.shared.args, "extensions", None) or ())

    @property
    def model(self) -> Any:
        """What is loaded: a model, a wrapper around one, another program's client, or None."""
        return getattr(self.shared, "model", None)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.shared, "tokenizer", None)

    @property
    def model_name(self) -> str:
        """As the Model tab shows it; "" without a model."""
        name = str(getattr(self.shared, "model_name", None) or "")
        return "" if name == "None" else name

    @property
    def generation_lock(self) -> contextlib.AbstractContextManager[Any] | Any:
        """The lock of most replies; None where this version has none."""
        return getattr(self.shared, "generation_lock", None)

    def keep_in_step(self, params: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Have it read and save what the panel shows, at each restart of its interface.

        Until October 2023 settings that came from settings.yaml are copied over `params` again at each restart, and
        what is saved begins with them. Later versions take what `params` holds at a restart for its defaults, and do
        not save what equals them.
        """
        for known, values in (("settings", params), ("default_settings", defaults)):
            settings = getattr(self.shared, known, {})
            settings.update({key: value for name, value in values.items() if (key := f"{NAME}-{name}") in settings})


def logger() -> logging.Logger:
    """The webui's logger; in May 2023 it used the root logger, which ours reports to."""
    with contextlib.suppress(Exception):
        found = importlib.import_module("modules.logging_colors").logger
        if isinstance(found, logging.Logger):
            return found
    return logging.getLogger("sharded_kv")
