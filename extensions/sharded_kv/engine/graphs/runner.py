"""Runs the decode steps of a model as CUDA graphs.

The first decode step of a kind runs as in eager mode, on static inputs, and is traced; the second is captured, traced
too, and replayed at once; all that follow are replayed. Two traces that differ in anything but the contents of tensors
rule a capture out. The first step of a later reply is traced again: graphs that would not do the same, after a LoRA was
taken off or weights were exchanged, are captured anew. What operators do that cannot be traced shows in the logits,
which are compared each time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import traceback
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .. import text
from ..patches import Wrapped
from ..placement import Placement
from ..transfers import TrafficCounter
from . import eligible
from .attention import over_buffers
from .decode import DecodeGraph, Run
from .eligible import DecodeStep, NotEligible
from .fingerprint import Fingerprint
from .kinds import LayerKind, MaskWatch
from .trace import CannotCapture

logger = logging.getLogger(__name__)

# Room for tokens comes in such steps, so that the next reply finds graphs that suit.
ROOM_STEP = 256
# How many kinds of steps keep their graphs at once: usually a model is called in one way, or two. Each number of tokens
# is a kind.
_MOST_KINDS = 8
# Steps of several tokens are captured when they come so often, for each number of them is seldom alone. A capture takes
# as long as some steps.
_OFTEN = 3
_MOST_COUNTED = 256
_steps = itertools.count(1)


class GraphRunner:
    """The decode steps of one model as CUDA graphs.

    Args:
        model: the module whose forward a step is. Held weakly.
        placement: where its parts are.
        counter: counts what crosses between devices.

    Attributes:
        reason: one sentence on why the latest step ran without graphs; "" if it ran with them, or was a prompt.
        latest: counts up with each step of any model, to see whose was the latest.
    """

    def __init__(self, model: nn.Module, placement: Placement, counter: TrafficCounter) -> None:
        self.reason = ""
        self.latest = 0
        self._model = weakref.ref(model)
        self._rules = eligible.Rules(model, placement)
        self._devices = placement.devices
        self._counter = counter
        self._known: dict[Any, Any] = {}  # see DecodeGraph
        self._refusals: dict[Any, str] = {}  # by a step's graph key, while the model is as it was then
        self._refused: Fingerprint | None = None
        self._logged: set[str] = set()
        self._living: weakref.WeakSet[CacheGraphs] = weakref.WeakSet()
        self._spares: dict[str, CacheGraphs] = {}  # by who made the cache, of the latest that is gone, with its buffers

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> Any:
        """Run one forward of the model.

        Args:
            args, kwargs: what the model was called with.
            run: see `Run`.

        Raises:
            NotEligible: it is no step for graphs. The model's cache is as before.
            torch.OutOfMemoryError: there is no memory for room or graphs.
        """
        step = None
        self.latest = next(_steps)
        try:
            model = self._model()
            assert model is not None  # it is being called
            step = self._rules.read(model, args, kwargs)
            output = self._graphs_for(step).step(step, run, self._counter)
        except NotEligible as reason:
            self._say(str(reason), logging.INFO)
            raise
        except torch.cuda.OutOfMemoryError as error:  # the step is run again without room ahead
            if step is None or not step.cache.states():
                raise
            traceback.clear_frames(error.__traceback__)  # where it was raised, views of buffers are at hand
            self.drop_spare()
            step.cache.give_room_back(None)  # from outside it could not be: states do not go back
            self._say(eligible.NO_ROOM, logging.INFO)
            raise NotEligible(eligible.NO_ROOM) from None
        except Exception as error:  # neither a defect of ours nor what cannot be captured costs anybody a reply
            raise NotEligible(self._refuse(step, error)) from error
        self.reason = ""
        return output

    def note_prompt(self) -> None:
        """A part of a prompt is read, which is no step for graphs."""
        self.latest, self.reason = next(_steps), ""

    def note_missed(self) -> None:
        """A part of the model runs in a reply, and the model's forward did not come here."""
        model = self._model()
        if model is not None and not isinstance(vars(model).get("forward"), Wrapped):
            self.latest, self.reason = next(_steps), eligible.GENERATES_HOOKED

    def offer_spare(self, room: Any) -> CacheGraphs | None:
        """Have a new cache's buffers be those of an earlier reply, if there are any.

        Args:
            room: the new cache's. Who has made that tells of which kind its steps are: the second pass of guidance has
                a forward make one.

        Returns:
            The graphs on them, for the new cache to keep.
        """
        room.step = ROOM_STEP
        spare = self._spares.pop(room.made_by, None)
        for name, other in list(self._spares.items()):  # of another thread's doing they may be fewer meanwhile
            other.passed_over += 1
            if other.passed_over > 1 and self._spares.pop(name, None) is not None:  # no reply has wanted it since
                other.let_go()
        if spare is not None:
            spare.passed_over = 0
            room.spare, room.let_go = list(spare.tensors), spare.let_go
        return spare

    def inherit(self, graphs: CacheGraphs, made_by: str) -> None:
        """A cache is gone, and nobody has a part of its buffers: the next that is made so may have them."""
        before, self._spares[made_by] = self._spares.get(made_by), graphs
        if before is not None:
            before.let_go()

    def drop_spare(self) -> bool:
        """Free the buffers that no reply has, and the graphs on them. Returns whether there were any."""
        spares, self._spares = self._spares, {}
        for spare in spares.values():
            spare.let_go()
        return bool(spares)

    def close(self) -> None:
        """Free all graphs, and the buffers that no reply has. No step runs meanwhile."""
        self.drop_spare()
        for graphs in list(self._living):
            graphs.let_go()

    def _say(self, reason: str, level: int) -> None:
        self.reason = reason
        if reason and reason not in self._logged:
            self._logged.add(reason)
            logger.log(level, "Without graphs: %s", text.one_line(reason))

    def _refuse(self, step: DecodeStep | None, error: Exception) -> str:
        """What to do without graphs for, after an error: one sentence."""
        if step is None:
            reason = eligible.failed(error)
        else:
            reason = eligible.not_captured(error)
            with contextlib.suppress(Exception):  # what does not let itself be freed may be what has failed
                if isinstance(error, (CannotCapture, RuntimeError)):
                    self._refusals[step.graph_key], self._refused = reason, Fingerprint(step.model)
                else:  # somebody's own error, which the step will raise in eager mode as well
                    step.cache.graphs.refusal = reason
                step.cache.graphs.drop(step)
        logger.debug("A step has failed in graph mode.", exc_info=error)
        self._say(reason, logging.WARNING)
        return reason

    def _graphs_for(self, step: DecodeStep) -> CacheGraphs:
        """The graphs of the step's cache, which has room for its tokens.

        Raises:
            NotEligible: the step or the cache cannot be used in graphs, or there is no memory for room.
        """
        graphs: CacheGraphs | None = step.cache.graphs
        if graphs is None or graphs.runner() is not self or not graphs.are_on(step.cache):
            graphs = self._new_graphs(step)
        if graphs.refusal is None:
            if self._refusals and self._refused != Fingerprint(step.model):
                self._refusals = {}
            graphs.refusal = self._rules.against_model(step.model) or eligible.against_cache(step.cache)
            graphs.window = eligible.window(step.cache, step.model)
        if reason := graphs.refusal or self._refusals.get(step.graph_key) or eligible.against_layers(step.cache):
            raise NotEligible(reason)
        if step.cache.room.is_tight:
            raise NotEligible(eligible.NO_ROOM)
        if graphs.window is not None and step.length + step.tokens > graphs.window:
            raise NotEligible(eligible.past_window(graphs.window))
        if not graphs.are_level(step.cache):
            if not step.cache.level():
                raise NotEligible(eligible.UNEVEN)
        elif graphs.have_room(step.cache, step.tokens):
            return graphs
        else:
            graphs.let_go()  # or old buffers would be there beside the new ones
            step.cache.make_room(step.tokens)
        return self._graphs_for(step)

    def _new_graphs(self, step: DecodeStep) -> CacheGraphs:
        cache = step.cache
        if cache.graphs is not None:
            cache.graphs.let_go()
        cache.graphs = graphs = CacheGraphs(self, cache, step.tensors["input_ids"].device, self._devices, self._known)
        self._living.add(graphs)
        return graphs


class CacheGraphs:
    """The graphs on the buffers of one cache.

    Attributes:
        runner: who has made them, held weakly.
        tensors: the buffers.
        refusal: what speaks against graphs for this cache; "" if nothing does, None if nobody has asked yet.
        window: how many tokens the reply may have; None for any number.
        watch: of the masks of the cache's reply.
        passed_over: how many new caches have left them to the next, since their own is gone.
    """

    def __init__(
        self,
        runner: GraphRunner,
        cache: Any,
        main_device: torch.device,
        of_devices: tuple[torch.device, ...],
        known: dict[Any, Any],
    ) -> None:
        self.runner = weakref.ref(runner)
        self.tensors = cache.tensors()
        self.refusal: str | None = None
        self.window: int | None = None
        self._devices, self._known = of_devices, known
        self.watch = MaskWatch()
        self._latest_tokens = 0  # of the latest step
        self.passed_over = 0
        self._steps: dict[Any, DecodeGraph] = {}
        self._came: Counter[Any] = Counter()  # how often each kind of step that has no graphs
        self._kinds = {name: LayerKind(layers, main_device) for name, layers in cache.kinds().items()}
        cache.room.let_go = self.let_go  # when the cache makes other buffers

    def are_on(self, cache: Any) -> bool:
        """Whether these are still the buffers of the cache, and its states, which come here from where they are."""
        buffers = [buffer.tensor for buffer in cache.buffers()]
        count = len(buffers)
        is_whole = len(self.tensors) >= count and all(map(is_, buffers, self.tensors))
        return is_whole and cache.move_states(self.tensors[count:])

    def are_level(self, cache: Any) -> bool:
        """Whether the layers of a kind hold their tokens in the same place, as all do whose tokens nobody has set."""
        places = cache.places()
        for name, *place in places:
            self._kinds[name].place = tuple(place)
        return len(places) == len(self._kinds)

    def have_room(self, cache: Any, tokens: int) -> bool:
        """Whether so many more fit into the same buffers, in which a window may have to move to the front."""
        full = [kind for kind in self._kinds.values() if sum(kind.place) + tokens > kind.width]
        if full and all(kind.place[1] + tokens <= kind.width for kind in full):
            cache.make_room(tokens)
            return self.are_on(cache) and self.are_level(cache)
        return not full

    def outlive(self, cache: Any) -> None:
        """The cache is gone: its buffers serve the next reply, unless somebody may hold a part of them."""
        runner = self.runner()
        if runner is None or cache.is_held or not self._steps or not self.are_on(cache):
            return
        self.distrust()
        runner.inherit(self, cache.room.made_by)

    def distrust(self) -> None:
        """A new reply: ask anew what speaks against graphs, and compare a step before they are replayed."""
        self.refusal, self.watch = None, MaskWatch()
        for graph in self._steps.values():
            graph.distrust()

    def step(self, step: DecodeStep, run: Run, counter: TrafficCounter) -> Any:
        """Run one step on the buffers."""
        graph = self._steps.pop(step.graph_key, None)
        if graph is not None:
            self._steps[step.graph_key] = graph  # as the latest
        else:
            self._count(step)
        places = {name: kind.of_step(step.tokens) for name, kind in self._kinds.items()}
        if graph is None:
            while len(self._steps) >= _MOST_KINDS:  # the one that ran longest ago goes
                oldest = next(iter(self._steps))
                self._steps.pop(oldest).free()
                self._came[oldest] = 0
            masks = {name: each.masks for name, each in places.items()}
            graph = self._steps[step.graph_key] = DecodeGraph(step, masks, self._devices, self._known)

        def begin(mask: Tensor | None, *, is_one_longer: bool = False) -> None:
            for name, kind in self._kinds.items():
                places[name].begin(kind.place, mask, is_one_longer, counter)

        is_one_longer = self.watch.is_one_longer(step.mask) and step.tokens == self._latest_tokens
        self._latest_tokens = step.tokens
        try:
            begin(step.mask, is_one_longer=is_one_longer)
            output = graph.run(step, begin, functools.partial(self._run_on_buffers, step, run), run, counter)
        except BaseException:
            for each in places.values():
                each.forget()
            raise
        for layer in step.cache.own_layers:
            layer.advance(step.tokens)
        return output

    def _count(self, step: DecodeStep) -> None:
        """Raise an error unless steps of this kind have come often enough to be worth a capture."""
        self._came[step.graph_key] += 1
        if step.tokens > 1 and self._came[step.graph_key] < _OFTEN:
            raise NotEligible(eligible.SELDOM)
        if len(self._came) > _MOST_COUNTED:
            self._came.clear()

    def _run_on_buffers(
        self,
        step: DecodeStep,
        run: Run,
        arguments: Mapping[str, Any],
        counter: TrafficCounter,
        copies: Sequence[tuple[Tensor, Tensor]],
    ) -> Any:
        """Run the model's forward; each layer writes where its device's positions say, and shows all of its buffers."""
        mask = arguments["attention_mask"]
        is_of_tokens = isinstance(mask, Tensor) and mask.dim() == 2  # then the model asks where the new token is
        try:
            for layer in step.cache.own_layers:
                kind = self._kinds[layer.kind]
                positions = kind.of_step(step.tokens).positions
                layer.position, layer.width = positions[layer.device], kind.width
                layer.shown_length = positions[mask.device][0] if is_of_tokens else None
            with over_buffers(eligible.attention_of(step.model)):
                return run(arguments, counter, copies)
        finally:
            for layer in step.cache.own_layers:
                layer.position = layer.shown_length = None

    def drop(self, step: DecodeStep) -> None:
        """Free the graphs of steps like this one."""
        graph = self._steps.pop(step.graph_key, None)
        if graph is not None:
            graph.free()

    def free(self) -> None:
        """Free the graphs."""
        for graph in self._steps.values():
            graph.free()
        self._steps = {}

    def let_go(self) -> None:
        """Free the graphs, and let go of the buffers: it is not used again."""
        self.free()
        self.tensors.clear()
        self._kinds.clear()
