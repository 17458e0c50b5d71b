"""Eager mode: how blocks and containers run by our forwards, each on its device.

An error of ours costs nobody a reply, and there is one place that sees to it: the step, a forward of the model. What it
has written to the cache is taken back, the model is left to accelerate, and accelerate runs the step again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from . import compat, devices, errors, text
from .errors import is_ours, mark_as_ours, our_part
from .gate import Gate
from .graphs.eligible import NotEligible
from .patches import Patch, PatchSet, UnhookPatch, wrap, wrap_like
from .placement import CACHE_NAMES, Block, Container, Placement, cache_in, cache_name, join
from .prompts.prompt import Part, Prompt, Prompts
from .transfers import ForwardState, TrafficCounter, first_device, tensors_in

if TYPE_CHECKING:
    from .graphs.runner import GraphRunner
    from .reply import Reply

_CACHES = frozenset(CACHE_NAMES)
# Beam search, which takes most, keeps so many tensors of the size of the logits, and of the replies' token ids.
_TENSORS_BETWEEN_STEPS = 16
Forward = Callable[..., Any]


class ThisThread(threading.local):
    """What is under way in this thread.

    Attributes:
        state: of the forward that runs; None outside of one.
        reply: the reply that is being written, if any.
    """

    state: ForwardState | None = None
    reply: Reply | None = None


class Switches(Protocol):
    """What a step asks of the model's Sharding."""

    def renew(self) -> None:
        """Read the placement of a model that was moved or dispatched again, and go on with that."""

    def step_aside(self, error: BaseException) -> None:
        """Leave the model to accelerate after an error of ours. Raises nothing."""


class Runtime:
    """What our forwards on one model share. It refers to nothing of the model, so it may outlive it.

    Attributes:
        patches: our forwards, while they are on the model; else None.
        runners: by a container's name, what runs its decode steps as graphs.
        prompts: how prompts are read, and what is kept of them.
        is_given_up: our forwards could not be taken off after an error: those that are left do nothing.
    """

    def __init__(self, gate: Gate, counter: TrafficCounter, switches: Switches) -> None:
        self.gate = gate
        self.counter = counter
        self.thread = ThisThread()
        self.patches: EagerPatches | None = None
        self.runners: dict[str, GraphRunner] = {}
        self.prompts = Prompts()
        self.is_given_up = False
        self._switches = weakref.ref(switches)

    def note_failure(self, error: Exception) -> None:
        """Something of ours has failed between two forwards: leave the model to accelerate."""
        self._step_aside(error)

    def is_on(self) -> bool:
        """Whether the model runs by our forwards."""
        return self.patches is not None

    def own_cache(self, cache: Any, name: str, made_by: str) -> Any:
        """A KVCache in place of the DynamicCache that generate() or a forward has just made; another kind as it is.

        Args:
            cache: what was made.
            name: of the container that it was made for.
            made_by: "generate" or "forward".
        """
        own = compat.own_cache_class()
        if not own.can_replace(cache):
            return cache
        from .kv.buffer import Room

        reply, runner = self.thread.reply, self.runners.get(name)
        room = Room(None if reply is None else reply.longest, made_by=made_by)
        ours = own.in_place_of(cache, room)
        if runner is not None:
            ours.graphs = runner.offer_spare(room)
            if ours.graphs is not None and ours.length:  # a forward has filled it
                ours.make_room(1)
        return ours

    def drop_spare(self) -> bool:
        """Free the buffers that no reply has just now: of kept conversations first, whose graphs would take them over.

        Returns:
            Whether there were any.
        """
        dropped = [self.prompts.kept.drop(), *[runner.drop_spare() for runner in self.runners.values()]]
        return any(dropped)

    # --- blocks -------------------------------------------------------------------------------------------------------

    def run_block(self, block: Block, inner: Forward, hooked: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run one block on its device. Most blocks come here in every step, so every call counts.

        Args:
            inner: the block's own forward.
            hooked: what accelerate had there.
        """
        state = self.thread.state
        if state is None:
            return self._run_block_alone(block, inner, hooked, args, kwargs)
        if block is state.skipped:
            return next(tensors_in((args, kwargs)))
        try:
            device = block.device
            if device != state.device:
                state.enter(device)
            args, kwargs = state.move_inputs(args, kwargs, device)
        except Exception as error:
            mark_as_ours(error)
            raise
        return inner(*args, **kwargs)

    def run_block_home(self, block: Block, inner: Forward, hooked: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run one block whose output has to go back."""
        state = self.thread.state
        if state is None:
            return self._run_block_alone(block, inner, hooked, args, kwargs)
        if block is state.skipped:
            return self.run_block(block, inner, hooked, *args, **kwargs)
        with our_part():
            home = state.home if block.returns_to == "model" else first_device((args, kwargs))
        output = self.run_block(block, inner, hooked, *args, **kwargs)
        with our_part():
            return output if home is None else state.move_home(output, home, _CACHES)

    def _run_block_alone(self, block: Block, inner: Forward, hooked: Forward, args: Any, kwargs: Any) -> Any:
        """Run a block that somebody calls by itself, or in a forward that was under way when we were switched on."""
        if self.is_given_up:
            return hooked(*args, **kwargs)
        self.thread.state = state = ForwardState(block, self.counter)
        try:
            try:
                home = first_device((args, kwargs)) if block.io_same_device else None
                state.enter(block.device)
                moved_args, moved_kwargs = state.move_inputs(args, kwargs, block.device)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # the block has not run yet
                self._step_aside(error)
                return hooked(*args, **kwargs)
            output = inner(*moved_args, **moved_kwargs)
            return output if home is None else state.move_home(output, home, _CACHES)
        finally:
            self.thread.state = None
            state.close()

    # --- containers ---------------------------------------------------------------------------------------------------

    def run_container(self, container: Container, inner: Forward, hooked: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or a part of it that has blocks below and code of its own between them."""
        state = self.thread.state
        if state is not None and state.owner is not container:
            if container.device is None:
                return inner(*args, **kwargs)
            return self._run_within(state, container, inner, args, kwargs)
        if self.is_given_up:
            return hooked(*args, **kwargs)
        reply = self.thread.reply
        if (
            reply is not None
            and (prompt := reply.prompt) is not None
            and not prompt.is_begun
            and cache_in(kwargs) is prompt.cache
            and self.is_on()
        ):
            output = self._run_prompt(prompt, container, inner, hooked, kwargs)
            reply.recording.kept_tokens = prompt.kept
            return output
        return self._run_step(container, inner, hooked, args, kwargs)

    def _run_prompt(self, prompt: Prompt, container: Container, inner: Forward, hooked: Forward, kwargs: Any) -> Any:
        """Run the forward that reads a reply's prompt, in several steps perhaps.

        If we fail between them, accelerate reads what the forward was called with.
        """
        try:
            return prompt.run(kwargs, functools.partial(self._run_step, container, inner, hooked, ()))
        except Exception as error:
            if prompt.in_forward:  # it has been dealt with, or is the model's own
                raise
            self._step_aside(error)
            if not prompt.go_back(kwargs):
                raise
            prompt.cache.become_plain()
            return hooked(**kwargs)

    def _run_step(
        self,
        container: Container,
        inner: Forward,
        hooked: Forward,
        args: Any,
        kwargs: Any,
        part: Part | None = None,
    ) -> Any:
        """Run a forward of the model, which may read a part of a prompt.

        If memory runs out, it is run again without room ahead in the cache; if we fail in it, accelerate runs it again.
        """
        cache = cache_in(kwargs)
        if args and cache is None:  # it may be given by position
            cache = cache_in(dict(zip(inspect.signature(hooked).parameters, args, strict=False)))
        length = compat.cache_length(cache)
        for is_last_try in (False, True):
            try:
                with self.gate:
                    patches = self.patches
                    if patches is None or patches.hold:
                        runner, output = self.runners.get(container.name), None
                        if runner is not None and part is not None:
                            runner.note_prompt()
                        elif runner is not None:
                            with contextlib.suppress(NotEligible):
                                run = functools.partial(self._run_eager, container, inner, ())
                                output = runner.step(args, kwargs, run)
                        elif self.runners and self.thread.reply is not None:
                            for missed in self.runners.values():
                                missed.note_missed()
                        if output is None:
                            output = self._run_eager(container, inner, args, kwargs, self.counter, part=part)
                        with our_part():
                            if cache is None:
                                self._take_cache(output, container.name)
                            elif compat.is_own_cache(cache) and cache.room.has_grown:
                                _leave_free(cache, output)
                        return output
            except torch.cuda.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # where it was raised, views of buffers are at hand
                if is_last_try or not self._has_given_room_back(cache, length):
                    raise
            except Exception as error:
                # A forward within another is a part of the step that is run again.
                if self.gate.is_in_forward or not (is_ours(error) or _met_on_two_devices(error)):
                    raise
                self._step_aside(error)
                if not compat.truncate_cache(cache, length):
                    raise
                if compat.is_own_cache(cache):
                    cache.become_plain()  # what has failed may be a part of it
                return hooked(*args, **kwargs)
            else:
                return self._renewed(patches, container, hooked)(*args, **kwargs)
        raise AssertionError("the last try returns or raises")

    def _run_eager(
        self,
        container: Container,
        inner: Forward,
        args: Any,
        kwargs: Any,
        counter: TrafficCounter,
        copies: Sequence[tuple[Tensor, Tensor]] = (),
        part: Part | None = None,
    ) -> Any:
        """Run a forward of the model block by block. Of `copies` the second of a pair is a copy of the first."""
        thread = self.thread
        outer, state = thread.state, ForwardState(container, counter)
        for tensor, copy in copies:
            state.remember(tensor, copy)
        if part == "chunk" and self.patches is not None:
            state.keeps_output, state.skipped = True, self.patches.head
        thread.state = state
        try:
            return self._run_within(state, container, inner, args, kwargs)
        finally:
            thread.state = outer
            try:
                state.close()
            except Exception as error:
                mark_as_ours(error)
                raise

    def _run_within(self, state: ForwardState, container: Container, inner: Forward, args: Any, kwargs: Any) -> Any:
        """Run a container as a part of the forward that is under way."""
        try:
            home = _home(container, args, kwargs) if container.returns else None
            if container.device is not None:
                args, kwargs = state.move_inputs(args, kwargs, container.device, container.cache_names)
        except Exception as error:
            mark_as_ours(error)
            raise
        outer_home, state.home = state.home, container.device or state.home or home
        try:
            output = inner(*args, **kwargs)
        finally:
            state.home = outer_home
        if home is None or (state.keeps_output and state.owner is container):
            return output
        try:
            # After the model's own output there is no other block to take it from where it was.
            bring = state.move if state.owner is container else state.move_home
            return bring(output, home, container.cache_names)
        except Exception as error:
            mark_as_ours(error)
            raise

    def _take_cache(self, output: Any, name: str) -> None:
        """Have ours in place of a cache that the model's forward has made, which nobody else has seen."""
        made = cache_in(output) if isinstance(output, dict) and not torch.is_grad_enabled() else None
        if made is not None:
            output[cache_name(output)] = self.own_cache(made, name, "forward")

    def _has_given_room_back(self, cache: Any, length: int | None) -> bool:
        """Memory has run out in a step: whether there is more now, and the step can be run again.

        Given back are the buffers that no reply has, and the room ahead in the cache.
        """
        had_spare = self.drop_spare()
        if compat.is_own_cache(cache) and length is not None and cache.give_room_back(length):
            return True
        return had_spare and compat.truncate_cache(cache, length)

    # --- when the model was moved, or we have failed ------------------------------------------------------------------

    def _renewed(self, stale: EagerPatches, container: Container, hooked: Forward) -> Forward:
        """The container's forward once the placement was read again."""
        switches, model = self._switches(), stale.model()
        if switches is None or model is None:
            return hooked
        if self.patches is stale:
            try:
                switches.renew()
            except Exception as error:
                switches.step_aside(error)
                return hooked
        if self.gate.is_in_forward:  # of another model: our forwards are still there, and renewed after it
            return hooked
        forward: Forward = model.get_submodule(container.name).forward
        return forward

    def _step_aside(self, error: BaseException) -> None:
        switches = self._switches()
        if switches is not None:
            switches.step_aside(error)


def _home(container: Container, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where the first tensor among a container's inputs is, but for caches: there its output goes back to."""
    for name, value in (*enumerate(args), *kwargs.items()):
        device = None if name in container.cache_names else first_device(value)
        if device is not None:
            return device
    return None


def _leave_free(cache: Any, output: Any) -> None:
    """See to it that the room ahead in a cache, and graphs, leave memory for what generate() does between two steps.

    Memory that runs out there is nothing that we could make up for.

    Args:
        cache: a KVCache.
        output: of the step; the logits come first in it, [batch, tokens, vocabulary].
    """
    cache.room.has_grown = False
    logits = next(tensors_in(output), None)
    if logits is not None and logits.dim() == 3 and logits.device.type != "cpu":
        of_a_row = 4 * logits.shape[-1] + 8 * max(cache.length, cache.room.longest or 0)  # float32, int64
        if devices.free(logits.device) < _TENSORS_BETWEEN_STEPS * logits.shape[0] * of_a_row:
            cache.give_room_back(cache.length)


def _met_on_two_devices(error: Exception) -> bool:
    """Whether tensors met that are on different devices: then one is where accelerate would not have it."""
    return isinstance(error, RuntimeError) and "same device" in text.of_error(error)


@dataclasses.dataclass(frozen=True)
class _Anchor:
    """One block of a stage, to see at little cost that it is where it was and that its forward is still ours.

    Attributes:
        patch: of its forward, held weakly.
        holder: what has one of its weights, held weakly; None for a block without.
        weight: the weight's name there.
        device: where the weight was.
    """

    patch: weakref.ref[Patch]
    holder: weakref.ref[nn.Module] | None
    weight: str
    device: torch.device


class EagerPatches(PatchSet):
    """Our forwards on one model.

    Attributes:
        model: as below, held weakly.
        head: the block that makes the logits; None if it is a part of one.
    """

    def __init__(self, model: nn.Module, placement: Placement, runtime: Runtime) -> None:
        compat.keep_untraced(Runtime, ForwardState, Gate, compat, errors)
        self.model = weakref.ref(model)
        modules = dict(model.named_modules())
        patches = list(_forward_patches(modules, placement, runtime))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = next(
            (block for block in placement.blocks if head is not None and modules[block.name] is head), None
        )
        by_owner = {patch.owner: patch for patch in patches}
        self._anchors = []
        for stage in placement.stages:
            block = stage.blocks[0]
            patch = patches[0] if placement.is_one_block else by_owner[model.get_submodule(block.name)]
            holder, _, weight = join(block.name, block.weight or "").rpartition(".")
            holds = weakref.ref(model.get_submodule(holder)) if block.weight else None
            self._anchors.append(_Anchor(weakref.ref(patch), holds, weight, block.device))
        super().__init__(patches)

    @property
    def hold(self) -> bool:
        """Whether the model is still placed as it was read and still runs by these forwards."""
        for anchor in self._anchors:
            patch, holder = anchor.patch(), None if anchor.holder is None else anchor.holder()
            if patch is None or vars(patch.owner).get(patch.name) is not patch.ours:
                return False
            if holder is not None:
                tensor: Tensor | None = holder._parameters.get(anchor.weight)
                if tensor is None:
                    tensor = holder._buffers.get(anchor.weight)
                if tensor is None or tensor.device != anchor.device:
                    return False
        return True


def _forward_patches(modules: dict[str, nn.Module], placement: Placement, runtime: Runtime) -> Iterator[Patch]:
    for block in () if placement.is_one_block else (*placement.blocks, *placement.entry_points):
        run = runtime.run_block_home if block.returns_to else runtime.run_block
        yield _forward_patch(modules[block.name], run, block, keeps_hook=block.keeps_hooks)
    for container in placement.containers:
        module = modules[container.name]
        yield _forward_patch(module, runtime.run_container, container, keeps_hook=container.device is None)
    for name in placement.unhooked:
        module = modules[name]
        if UnhookPatch.suits(module):
            yield UnhookPatch(module)
        else:
            inner: Any = module._old_forward
            yield Patch(module, "forward", wrap(inner))


def _forward_patch(module: nn.Module, run: Forward, what: Block | Container, *, keeps_hook: bool) -> Patch:
    inner: Any = module.forward if keeps_hook else module._old_forward
    return Patch(module, "forward", wrap_like(run, what, inner, module.forward, like=module.forward))
