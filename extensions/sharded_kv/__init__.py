"""sharded_kv: generation on several GPUs without the traffic and the hooks that accelerate adds. The headless door."""

from .engine.sharding import Sharding, shard

__all__ = ["Sharding", "shard"]
