"""A plugin for pytest that has accelerate's own tests run on simulated devices, and on models that are sharded.

`SHARDED_KV_DEVICES=sim` puts the simulated devices where the tests look for GPUs. `SHARDED_KV_SHARD=1` calls `shard()`
on every model that `dispatch_model` returns, for `load_checkpoint_and_dispatch` as well. The last line printed says how
many models that were, and for how many of them there was something to do.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import accelerate
import torch
from accelerate import big_modeling, test_utils
from accelerate.test_utils import testing

from extensions.sharded_kv import shard
from tools import simulated

DEVICES = 4
# What accelerate's decorators ask of the machine, by the names that they have in any of the stacks' versions.
NEEDS_GPUS = (
    *("require_cuda", "require_cuda_or_xpu", "require_non_cpu"),
    *("require_multi_device", "require_multi_gpu", "require_multi_gpu_or_xpu"),
)

_were_active: list[bool] = []


def _simulate_gpus() -> None:
    simulated.start(DEVICES)
    found = {"torch_device": "sim", "device_count": DEVICES, "memory_allocated_func": torch.sim.memory_allocated}
    found.update(dict.fromkeys(NEEDS_GPUS, lambda test: test))
    for module in (testing, test_utils):
        for name in found.keys() & vars(module).keys():
            setattr(module, name, found[name])


def _shard_what_is_dispatched() -> None:
    dispatch_model = big_modeling.dispatch_model

    @functools.wraps(dispatch_model)
    def dispatch_and_shard(*args: Any, **kwargs: Any) -> Any:
        model = dispatch_model(*args, **kwargs)
        _were_active.append(shard(model).active)
        return model

    accelerate.dispatch_model = big_modeling.dispatch_model = dispatch_and_shard


if os.environ.get("SHARDED_KV_DEVICES") == "sim":
    _simulate_gpus()
if os.environ.get("SHARDED_KV_SHARD"):
    _shard_what_is_dispatched()


def pytest_unconfigure() -> None:
    print(f"\ndispatched {len(_were_active)} sharded {sum(_were_active)}")
