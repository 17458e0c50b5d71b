"""Hooks, wrappers, dispatches, switches and lack of memory in any order: the model ends as one that never met us."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from packaging.version import Version
from torch import nn

from extensions.sharded_kv import Sharding, shard
from extensions.sharded_kv.engine.sharding import attach
from tests import support
from tools import models, simulated

VERSION = Version(transformers.__version__)
HAS_GRAPHS = Version("4.44") <= VERSION
MODULES = ["model.layers.0", "model.layers.1", "model.layers.3", "model.layers.1.mlp", "model", "model.norm"]
MODES = ["eager", "graph"] if HAS_GRAPHS else ["eager"]
TOKENS = 6


class Scaled(ModelHook):
    """A hook of accelerate's kind that somebody adds."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return scaled(output)


def scaled(output: Any) -> Any:
    """What a module has returned, with its first tensor a little larger."""
    if isinstance(output, torch.Tensor):
        return output * 1.25
    if isinstance(output, tuple):
        return (scaled(output[0]), *output[1:])
    first = next(iter(output))
    output[first] = scaled(output[first])
    return output


def reply(model: Any) -> list[list[int]]:
    ids = support.prompts(1)["input_ids"].to("sim:0")
    with torch.no_grad():
        replied: list[list[int]] = model.generate(
            ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        ).tolist()
    return replied


def looks(model: nn.Module) -> dict[str, Any]:
    """Of each module the names and kinds of its attributes, and its hooks."""
    found = {}
    for name, module in model.named_modules():
        attributes = {each: kind_of(value) for each, value in vars(module).items()}
        # accelerate leaves that behind where it had put a hook: the same as none.
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del attributes["forward"]
        found[name] = attributes, len(module._forward_hooks), len(module._forward_pre_hooks)
    return found


def kind_of(value: Any) -> str:
    """Whose a value is: by its class, and where it is a function, by what it does."""
    called = value.func if isinstance(value, functools.partial) else value
    return f"{type(value).__name__} {getattr(called, '__qualname__', '')}"


class AnyOrder(RuleBasedStateMachine):
    """The same is done to two models; one of them is ours at times."""

    def __init__(self) -> None:
        super().__init__()
        places = support.Devices("sim")(2)
        self.models = [support.spread(models.build("llama", num_hidden_layers=4), places) for _ in range(2)]
        self.ours, self.theirs = self.models
        self.sharding: Sharding | None = None
        self.handles: list[tuple[Any, Any]] = []
        self.is_wrapped = False
        self.is_hooked = False  # by accelerate's kind of hooks

    def both(self, do: Callable[[Any], Any]) -> list[Any]:
        return [do(model) for model in self.models]

    @initialize(mode=st.sampled_from(MODES))
    def shard(self, mode: str) -> None:
        self.sharding = shard(self.ours)
        self.sharding.mode = mode

    @rule(mode=st.sampled_from(MODES))
    def shard_again(self, mode: str) -> None:
        self.shard(mode)

    @rule()
    def attach(self) -> None:
        self.sharding = attach(self.ours)

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        self.sharding.enable() if on else self.sharding.disable()

    @rule(mode=st.sampled_from(MODES))
    def choose(self, mode: str) -> None:
        self.sharding.mode = mode

    @rule()
    def detach(self) -> None:
        self.sharding.detach()

    @rule()
    def reply(self) -> None:
        replied, expected = self.both(reply)
        assert replied == expected
        if self.sharding.mode == "graph" and self.sharding.enabled and not self.handles and not self.is_hooked:
            assert self.sharding.reason_for_eager == "" or self.is_wrapped

    @rule(name=st.sampled_from(MODULES), before=st.booleans())
    def hook(self, name: str, before: bool) -> None:
        def register(model: Any) -> Any:
            module = model.get_submodule(name)
            if before:
                return module.register_forward_pre_hook(lambda module, inputs: scaled(inputs) if inputs else None)
            return module.register_forward_hook(lambda module, inputs, output: scaled(output))

        self.handles.append(tuple(self.both(register)))

    @precondition(lambda self: self.handles)
    @rule()
    def unhook(self) -> None:
        for handle in self.handles.pop():
            handle.remove()

    @rule(name=st.sampled_from(["", *MODULES]))
    def append_a_hook_of_accelerates(self, name: str) -> None:
        self.is_hooked = True
        self.both(lambda model: add_hook_to_module(model.get_submodule(name), Scaled(), append=True))

    @rule(name=st.sampled_from(["", "model", "model.layers.0", "model.layers.3"]))
    def wrap(self, name: str) -> None:
        self.is_wrapped = True

        def wrapped(forward: Any, *args: Any, **kwargs: Any) -> Any:
            return scaled(forward(*args, **kwargs))

        def put(model: Any) -> None:
            module = model.get_submodule(name)
            module.forward = functools.update_wrapper(functools.partial(wrapped, module.forward), module.forward)

        self.both(put)

    @rule(cut=st.integers(1, 3))
    def dispatch_anew(self, cut: int) -> None:
        def dispatch(model: Any) -> None:
            remove_hook_from_module(model, recurse=True)
            device_map = {"model.embed_tokens": "sim:0", "model.norm": "sim:1", "lm_head": "sim:1"}
            device_map |= {f"model.layers.{index}": f"sim:{int(index >= cut)}" for index in range(4)}
            if hasattr(model.model, "rotary_emb"):
                device_map["model.rotary_emb"] = "sim:0"
            support.spread(model, ["sim:0", "sim:1"], device_map=device_map)

        self.both(dispatch)
        self.is_hooked = False

    @rule(index=st.integers(0, 1), spare=st.sampled_from([0, 5_000, 50_000]))
    def run_out_of_memory(self, index: int, spare: int) -> None:
        expected = reply(self.theirs)
        gc.collect()
        simulated.set_capacity(index, simulated.allocated(index) + spare)
        try:
            assert reply(self.ours) == expected
        except torch.OutOfMemoryError:
            pass
        finally:
            simulated.set_capacity(index, None)

    @invariant()
    def nothing_has_failed(self) -> None:
        assert self.sharding is None or self.sharding.failure == ""

    def teardown(self) -> None:
        self.sharding.detach()
        found, expected = self.both(looks)
        assert found == expected
        replied, expected = self.both(reply)
        assert replied == expected
        if HAS_GRAPHS and not self.is_wrapped:
            self.graphs_are_back()

    def graphs_are_back(self) -> None:
        """With nothing in their way any more."""
        while self.handles:
            self.unhook()
        self.dispatch_anew(2)
        self.shard("graph")
        self.reply()
        self.sharding.detach()


def test_a_model_ends_as_one_that_never_met_us(devices: support.Devices) -> None:
    if devices.kind != "sim":
        pytest.skip("capacities can be set on simulated devices")
    settings = hypothesis.settings(max_examples=25, stateful_step_count=12, deadline=None, print_blob=True)
    run_state_machine_as_test(AnyOrder, settings=settings)
