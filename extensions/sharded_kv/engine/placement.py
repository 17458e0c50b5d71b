"""Reads what runs where: the blocks and stages of a model that accelerate, AutoGPTQ or GPTQModel spread over devices.

Everything is taken from the hooks that are there and from the devices of the weights, never from the names of modules
or classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn


@dataclasses.dataclass(frozen=True)
class Block:
    """A largest submodule that is called as a whole and runs on one device.

    Attributes:
        name: its qualified name in the model, as in ``model.named_modules()``.
        device: where it runs.
        keeps_hooks: accelerate's hooks inside it stay, because weights are offloaded or somebody else's hook is there.
        io_same_device: its dispatcher promised to bring its output back to where its input came from.
        returns_to: where it brings its output in a forward of ours: "input", the device of its own input; "model", the
            device of the model's input; or "", nowhere: the next block takes it from where it is.
        weight: name of one parameter or buffer inside, to notice that the block was moved; None where all is offloaded.
    """

    name: str
    device: torch.device
    keeps_hooks: bool = False
    io_same_device: bool = False
    returns_to: str = ""
    weight: str | None = None


@dataclasses.dataclass(frozen=True)
class Container:
    """A module with blocks below it, whose own code runs between them.

    Attributes:
        name: its qualified name, "" for the model itself.
        device: where its hook sends its inputs; None if it has no hook and takes them as they come.
        returns: its output, but for caches, goes back to the device its input came from.
        cache_names: keyword arguments and output fields that hold caches and never move.
    """

    name: str
    device: torch.device | None
    returns: bool
    cache_names: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive blocks on one device, in the sense of pipeline parallelism."""

    device: torch.device
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """What of a model runs where.

    Attributes:
        stages: in the order of execution, as far as the order of registration tells it.
        containers: outermost first.
        unhooked: names of the modules inside blocks whose hooks have nothing to do there.
        entry_points: modules inside blocks that may be called from outside as well: embeddings
            (``get_input_embeddings()``), and all of a submodel on one device but the insides of its layers. They align
            their inputs too.
        reason: one sentence on why there is nothing to shard; "" if there is.
        hooks_are_stale: weights are not where the hooks send the inputs, as after ``model.to()``: only we can run it.
    """

    stages: tuple[Stage, ...] = ()
    containers: tuple[Container, ...] = ()
    unhooked: tuple[str, ...] = ()
    entry_points: tuple[Block, ...] = ()
    reason: str = ""
    hooks_are_stale: bool = False

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, stage by stage."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices in use, in the order of their first stage."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def is_one_block(self) -> bool:
        """Whether all of it is one block on one GPU: there is nothing to shard, but decode steps may be graphs."""
        return bool(self.containers) and self.blocks[0].name == ""

    @property
    def main_device(self) -> torch.device | None:
        """Where the inputs enter: what the model's hook says, else the first stage's device. None without stages."""
        hooked = (container.device for container in self.containers if container.device is not None)
        return next(hooked, self.stages[0].device if self.stages else None)

    def describe(self) -> str:
        """One line for people: ``cuda:0: 18 blocks, cuda:1: 16 blocks``."""
        return ", ".join(f"{stage.device}: {_count(len(stage.blocks), 'block')}" for stage in self.stages)


# The keywords and output fields that carry the cache through transformers' models, whatever they declare: most models
# have the first, Mamba's the second. Before transformers 4.30 and accelerate 0.20 there is no
# `_skip_keys_device_placement` to declare it with.
CACHE_NAMES = ("past_key_values", "cache_params")


def cache_name(values: Mapping[str, Any]) -> str:
    """Under which name a forward's arguments, or what it returns, have a cache; the usual name where they have none."""
    return next((name for name in CACHE_NAMES if values.get(name) is not None), CACHE_NAMES[0])


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments, or in what it returns; None without one."""
    return values.get(cache_name(values))


def read_placement(model: nn.Module) -> Placement:
    """Read what of `model` runs where.

    Args:
        model: a model as `dispatch_model`, `from_pretrained(device_map=...)` or a `simple_dispatch_model` left it, or a
            wrapper around one.

    Returns:
        The placement. One without stages, and with a reason, where there is nothing to shard.
    """
    return _Reader(model).placement()


def align_hooks(hook: ModelHook | None) -> Iterator[AlignDevicesHook]:
    """accelerate's own alignment hooks in `hook`, also those inside a `SequentialHook`."""
    if isinstance(hook, SequentialHook):
        for inner in hook.hooks:
            yield from align_hooks(inner)
    elif type(hook) is AlignDevicesHook:
        yield hook


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a module and all below it need: where its weights are, and where hooks make it run."""

    weights: frozenset[torch.device]
    execution: frozenset[torch.device]
    meta: bool
    offload: bool
    stale: bool
    weight: str | None

    @property
    def device(self) -> torch.device | None:
        """The one device all of it runs on; None if there are several, or none is known.

        Weights that lie somewhere say more than a hook does: after `model.to()`, or with a parameter tied to one on
        another device, the hook's device is out of date.
        """
        devices = self.weights | self.execution if self.offload or not self.weights else self.weights
        return next(iter(devices)) if len(devices) == 1 else None


class _Reader:
    """One reading of one model: facts bottom-up, then blocks and containers top-down."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.facts: dict[nn.Module, _Facts] = {}
        self.modules: dict[Block, nn.Module] = {}  # in the order of registration
        self.containers: list[Container] = []
        self.unhooked: list[str] = []
        self.entry_points: list[Block] = []
        self.seen: set[nn.Module] = set()

    def placement(self) -> Placement:
        self._gather(self.model)
        self._walk(self.model, "")
        self._settle_returns()
        reason, alone = self._reason(), self._alone_on()
        if alone is not None:
            block = Block("", alone, weight=self.facts[self.model].weight)
            return Placement((Stage(alone, (block,)),), self._repliers(), reason=reason)
        return Placement(
            stages=self._stages(),
            containers=self._containers_that_return(),
            unhooked=tuple(self.unhooked),
            entry_points=tuple(self.entry_points),
            reason=reason,
            hooks_are_stale=self.facts[self.model].stale,
        )

    def _gather(self, module: nn.Module) -> _Facts:
        if module in self.facts:
            return self.facts[module]
        aligned = list(align_hooks(getattr(module, "_hf_hook", None)))
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        weight = next((name for name, tensor in own if not tensor.is_meta), None)
        weights = {tensor.device for _, tensor in own if not tensor.is_meta}
        execution = {_device(hook.execution_device) for hook in aligned if hook.execution_device is not None}
        meta = any(tensor.is_meta for _, tensor in own)
        offload = any(hook.offload for hook in aligned)
        stale = False
        for name, child in module.named_children():
            facts = self._gather(child)
            weights |= facts.weights
            execution |= facts.execution
            meta, offload, stale = meta or facts.meta, offload or facts.offload, stale or facts.stale
            if weight is None and facts.weight is not None:
                weight = f"{name}.{facts.weight}"
        stale = stale or (not offload and len(weights) == 1 and bool(execution - weights))
        self.facts[module] = _Facts(frozenset(weights), frozenset(execution), meta, offload, stale, weight)
        return self.facts[module]

    def _walk(self, module: nn.Module, name: str) -> bool:
        """Note the blocks and containers at and below `module`; True if there is a block among them."""
        if module in self.seen:
            return True
        self.seen.add(module)
        is_called = _is_called(module)
        hooked = any(True for _ in align_hooks(getattr(module, "_hf_hook", None)))
        if is_called and hooked and self.facts[module].device is not None:
            self._add_block(module, name)
            return True
        position = len(self.containers)
        found = False
        for child_name, child in module.named_children():
            found |= self._walk(child, join(name, child_name))
        if found and is_called and (not hasattr(module, "_hf_hook") or is_plainly_hooked(module)):
            self.containers.insert(position, _container(module, name))
        return found

    def _add_block(self, module: nn.Module, name: str) -> None:
        facts = self.facts[module]
        assert facts.device is not None
        keeps = facts.offload or not is_plainly_hooked(module)
        io_same_device = any(hook.io_same_device for hook in align_hooks(module._hf_hook))
        block = Block(name, facts.device, keeps, io_same_device, weight=facts.weight)
        self.modules[block] = module
        for inner_name, inner in module.named_modules():
            if inner in self.seen:
                continue
            self.seen.add(inner)
            if keeps or not is_plainly_hooked(inner):
                continue
            full_name = join(name, inner_name)
            list_above = self._outermost_list(full_name)
            inside_a_layer = bool(list_above) and full_name.count(".") > list_above.count(".") + 1
            if isinstance(inner, nn.Embedding) or (_is_called(inner) and not inside_a_layer):
                self.entry_points.append(Block(full_name, facts.device))
            else:
                self.unhooked.append(full_name)

    def _settle_returns(self) -> None:
        """Decide which outputs return, for the dispatchers that send each block's output back to where its input was.

        Where layers form one chain, each feeds the next, then the final norm, then the head: there only the head's
        output returns. accelerate's own `dispatch_model` relies on that chain. Elsewhere an output meets others outside
        any block: token and position embeddings are added up, parts of a layer around its residual, an encoder's output
        feeds each layer of the decoder. It returns then, and the block that comes next finds the original where it was.
        """
        names = [block.name for block, module in self.modules.items() if _has_parameters(module)]
        lists = {self._outermost_list(name) for name in names} - {""}
        chains = {name: layers for name in lists if set(layers := self._layers(name)) <= set(names)}
        tail: list[str] = []
        if len(lists) == len(chains) == 1:
            layers = next(iter(chains.values()))
            tail = names[names.index(layers[-1]) :][:-1]
        stays = {name for layers in chains.values() for name in layers[:-1]} | set(tail)
        returns = {}
        for block in self.modules:
            if block.io_same_device and block.name not in stays:
                within_a_layer = self._outermost_list(block.name) not in ("", *chains)
                returns[block.name] = "input" if within_a_layer else "model"
        self.modules = {
            dataclasses.replace(block, returns_to=returns.get(block.name, "")): module
            for block, module in self.modules.items()
        }

    def _outermost_list(self, name: str) -> str:
        """The name of the outermost list of modules above the module, or ""."""
        parts = name.split(".")
        prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((p for p in prefixes if isinstance(self.model.get_submodule(p), nn.ModuleList)), "")

    def _layers(self, name: str) -> list[str]:
        """The names of a list's elements; none where they are no layers but single modules (a list of heads)."""
        elements = self.model.get_submodule(name).named_children()
        return [f"{name}.{key}" for key, element in elements if any(True for _ in element.children())] or [""]

    def _stages(self) -> tuple[Stage, ...]:
        """Runs of blocks on one device. What has no parameters (rotary tables), registered anywhere, joins a run."""
        runs: list[list[Block]] = []
        for block, module in self.modules.items():
            if _has_parameters(module):
                if not runs or runs[-1][0].device != block.device:
                    runs.append([])
                runs[-1].append(block)
        for block, module in self.modules.items():
            if not _has_parameters(module):
                run = next((run for run in runs if run[0].device == block.device), None)
                if run is None:
                    runs.insert(0, [block])
                else:
                    run.append(block)
        return tuple(Stage(run[0].device, tuple(run)) for run in runs)

    def _containers_that_return(self) -> tuple[Container, ...]:
        """Where every block used to bring its output back, the model as a whole still does: its logits come home.

        `simple_dispatch_model` of AutoGPTQ and GPTQModel hooks the entries of the device map and nothing above them.
        """
        blocks_return = any(block.io_same_device for block in self.modules)
        return tuple(dataclasses.replace(each, returns=each.returns or blocks_return) for each in self.containers)

    def _alone_on(self) -> torch.device | None:
        """The one GPU that all of a model is on that writes replies; else None."""
        facts = self.facts[self.model]
        device = facts.device
        if device is None or facts.meta or facts.offload or facts.stale or not facts.weights:
            return None
        is_gpu = device.type != "cpu" and hasattr(getattr(torch, device.type), "set_device")
        return device if is_gpu and self._repliers() else None

    def _repliers(self) -> tuple[Container, ...]:
        """The modules that have a `generate` of their own, as containers that move nothing."""
        named = self.model.named_modules()
        return tuple(
            dataclasses.replace(_container(module, name), device=None, returns=False)
            for name, module in named
            if callable(getattr(type(module), "generate", None))
        )

    def _reason(self) -> str:
        facts = self.facts[self.model]
        if not self.modules:
            if facts.meta:
                return "Its weights are on the meta device: it is not loaded yet."
            if not facts.weights:
                return "It has no weights."
            if len(facts.weights) > 1:
                places = ", ".join(sorted(map(str, facts.weights)))
                return (
                    f"It is on {places} without accelerate's hooks: load it with device_map='auto' to have it sharded."
                )
            return f"It is on one device ({next(iter(facts.weights))}): there is nothing to shard."
        devices = {block.device for block in self.modules}
        for kind in sorted({device.type for device in devices} - {"cpu"}):
            if not hasattr(getattr(torch, kind, None), "set_device"):
                return f"It runs on {kind}, of which there is one device only: there is nothing to shard."
        if len(devices) > 1:
            return ""
        where = f"It runs on one device ({next(iter(devices))})"
        if facts.offload:
            return f"{where}, with weights offloaded to the CPU or disk: it takes a second GPU to shard it."
        return f"{where}: there is nothing to shard."


def plain_hook(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's alignment hook on `module`; None if there is none, another's, or one that fetches weights."""
    hook: Any = vars(module).get("_hf_hook")
    return hook if type(hook) is AlignDevicesHook and not hook.offload else None


def is_plainly_hooked(module: nn.Module) -> bool:
    """Whether `module` runs under an alignment hook of accelerate's and nothing else.

    That is: nobody else's hook, nobody's wrapper around it, and no weights to fetch.
    """
    hook = plain_hook(module)
    if hook is None:
        return False
    # Up to accelerate 0.20 `forward` is a function, later a partial of one; both are made in accelerate.hooks.
    forward = module.__dict__.get("forward")
    function = getattr(forward, "func", forward)
    return bool(getattr(function, "__globals__", {}).get("__name__") == AlignDevicesHook.__module__)


def _container(module: nn.Module, name: str) -> Container:
    hook = getattr(module, "_hf_hook", None)
    names = set(CACHE_NAMES)
    for declared in (getattr(hook, "skip_keys", None), getattr(module, "_skip_keys_device_placement", None)):
        names.update([declared] if isinstance(declared, str) else declared or ())
    execution = None if hook is None else hook.execution_device
    return Container(
        name=name,
        device=None if execution is None else _device(execution),
        returns=hook is not None and hook.io_same_device,
        cache_names=frozenset(names),
    )


def _is_called(module: nn.Module) -> bool:
    """Whether the module has a forward; lists of modules have none."""
    return type(module).forward is not nn.Module.forward


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _device(device: int | str | torch.device) -> torch.device:
    """`device` as hooks spell it (0, "cuda", "cuda:1", ...) with its index."""
    device = torch.device(device)
    if device.index is None and device.type not in ("cpu", "meta"):
        device = torch.empty(0, device=device).device
    return device


def join(prefix: str, name: str) -> str:
    """The qualified name of a submodule or parameter `name` of the module `prefix`."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
