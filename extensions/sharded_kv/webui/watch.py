"""The model-load callback, which the webui does not have: sees every assignment to `modules.shared.model`.

A model gets there from a dozen places (startup, Load, Reload, Unload, autoload, idle unload, the API, LoRAs, other
extensions), which import `load_model` by name, so that replacing that function would miss most of them. Every one
assigns to an attribute of the module object, in every version, and a module's class can be replaced by a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def watch(module: ModuleType, callbacks: Mapping[str, Callable[[Any], None]]) -> Callable[[], None]:
    """Tell of assignments to attributes of a module.

    Args:
        module: any module; others may watch it too, before and after.
        callbacks: by the attribute's name, what to call with the new value once it is there, in the thread of whoever
            assigns. It must not raise: that would be an error of the assignment.

    Returns:
        A function that ends it.
    """
    kind: Any = type(module)
    current = dict(callbacks)

    class Watched(kind):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            callback = current.get(name)
            if callback is not None:
                callback(value)

    def end() -> None:
        current.clear()
        if type(module) is Watched:  # else somebody watches who came after us, and inherits from it
            module.__class__ = kind

    Watched.__name__, Watched.__qualname__ = kind.__name__, kind.__qualname__
    module.__class__ = Watched
    return end
