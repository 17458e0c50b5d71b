"""sharded_kv: generation on several GPUs without the traffic and hooks that accelerate adds. Needs no webui."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.sharding import Sharding, shard

__all__ = ["Sharding", "shard"]


def __getattr__(name: str) -> Any:
    # Only when asked for: the webui imports this package first, and its portable builds have no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .engine import sharding

    return getattr(sharding, name)
