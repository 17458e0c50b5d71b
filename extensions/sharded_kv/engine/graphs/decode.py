"""One kind of decode step on one cache's buffers: traced at first, then captured, then replayed."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..transfers import TrafficCounter, is_plain, tensors_in
from .capture import Capture, CapturedStep
from .eligible import DecodeStep
from .fingerprint import Fingerprint
from .trace import NUMBERS, CannotCapture, NumbersByHost, OpTrace, hooks_that_run, module_tensors

# How far a replay's logits may be from the step's own, relative to the largest: in 16 bits one GPU differs from itself
# by up to 0.008 (tests/gpu/results), while another token, weight or position makes logits with little in common.
_TOLERANCE = 0.05
_TOLERANCE_OF_FLOAT32 = 0.01  # TensorFloat-32 included

# What a mask may be: what is added to the scores, as most models take it; or which tokens count, of which some make
# ALiBi.
_OF_SCORES, _OF_TOKENS = "scores", "tokens"
_MOST_KNOWN = 64
# By what a model refuses a mask that it does not take.
_REFUSALS = (CannotCapture, ValueError, TypeError, IndexError, RuntimeError)
_OTHER_TOKENS = "Its forward makes something else of a buffer that is filled in part."
_OTHER_PLACES = "Without position_ids the model has its tokens in places of its own: pass them."

# Runs the model's forward block by block with keyword arguments, and counts what crosses with the counter given. Of
# pairs of tensors it takes the second for a copy of the first.
Run = Callable[[Mapping[str, Any], TrafficCounter, Sequence[tuple[Tensor, Tensor]]], Any]


class State(enum.Enum):
    """How far a kind of step has got."""

    COLD = enum.auto()  # it has not run
    TRACED = enum.auto()  # the operators of one step are known
    CAPTURED = enum.auto()  # there are graphs; whether they are right for this reply is not known
    VERIFIED = enum.auto()  # the graphs have been compared with a step of this reply


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model can be captured.

    Attributes:
        mask: what its mask is.
        by_host: its tensors of Python's numbers are made on the host, see `NumbersByHost`.
    """

    mask: str
    by_host: bool


# In this order they are tried.
_WAYS = [Way(mask, by_host) for mask in (_OF_SCORES, _OF_TOKENS) for by_host in (False, True)]


class DecodeGraph:
    """One kind of decode step on one cache's buffers.

    Args:
        step: the first of its kind.
        masks: of each kind of layers a mask, [batch, 1, tokens, width], on the main device and on those of the layers.
        of_devices: where the model is.
        known: of kinds of steps that were captured before, the way, and the model's fingerprint then. They need not be
            traced again before they are captured on other buffers.
    """

    def __init__(
        self,
        step: DecodeStep,
        masks: Mapping[str, Mapping[torch.device, Tensor]],
        of_devices: tuple[torch.device, ...],
        known: dict[Any, tuple[Way, Fingerprint]],
    ) -> None:
        self._state = State.COLD
        self._devices = of_devices
        self._known = known
        self._ways = [way for way in _WAYS if way.mask == _OF_SCORES or (step.tokens == 1 and len(masks) == 1)]
        self._way = _WAYS[0]
        self._ops: list[Any] | None = None  # of the traced step
        self._hooked: list[str] = []  # modules whose hooks the traced step has run
        self._changed: list[str] = []  # of each traced step a module in which it changed a tensor
        self._fingerprint: Fingerprint | None = None  # of the model, when it was traced or the graphs were verified
        self._captured: CapturedStep | None = None
        self._output: Any = None
        main_device = step.tensors["input_ids"].device
        self._masks = {kind: each[main_device] for kind, each in masks.items()}
        self._copies = [(self._masks[kind], mask) for kind, each in masks.items() for mask in each.values()]
        with torch.inference_mode(False):
            self._tensors = {name: torch.empty_like(tensor) for name, tensor in step.tensors.items()}
        if step.graph_key in known:
            (self._way, before), now = known[step.graph_key], Fingerprint(step.model)
            if before == now and self._way in self._ways:
                self._state, self._fingerprint = State.TRACED, now

    def run(
        self,
        step: DecodeStep,
        begin: Callable[[Tensor | None], None],
        run: Run,
        run_plainly: Run,
        counter: TrafficCounter,
    ) -> Any:
        """The step's output.

        Args:
            step: what the model was called with. The masks are ready for it.
            begin: has the masks be ready for the same step with another mask.
            run: see `Run`; over the buffers of the cache.
            run_plainly: the same as in eager mode.
            counter: counts what crosses.
        """
        for name, tensor in step.tensors.items():
            self._tensors[name].copy_(tensor)
        if self._fingerprint is not None and not self._fingerprint.holds():
            self.distrust()
        if self._state is State.VERIFIED:
            self._replay(counter)
            return _copied(self._output, step.cache)
        before = step.cache.mark()
        try:
            if self._state is State.COLD:
                return self._begin(step, begin, run, run_plainly, counter, before)
            if self._state is State.CAPTURED:
                return self._trace(step, run, counter, before)
            if self._hooked:
                raise CannotCapture(f"Somebody's hook is on {self._hooked[0]}, which a graph would not run.")
            output = self._run(step, run, counter)  # before a capture, in which no way of attention can be timed
            self._capture(step, run)
            self._verify(step, output, counter, before)
            return _copied(self._output, step.cache)
        except BaseException:
            step.cache.go_back_to(before)
            raise

    def distrust(self) -> None:
        """Trace a step before the graphs are captured, or replayed."""
        self._fingerprint = None
        if self._state is State.VERIFIED:
            self._state = State.CAPTURED
        elif self._state is State.TRACED:
            self._state = State.COLD

    def free(self) -> None:
        """Free the graphs."""
        if self._captured is not None:
            self._captured.free()
        self._captured = self._output = self._fingerprint = None
        self._state = State.COLD

    def _run(self, step: DecodeStep, run: Run, counter: TrafficCounter) -> Any:
        with _plain_mode(), NumbersByHost() if self._way.by_host else contextlib.nullcontext():
            # Models whose layers are of several kinds take a mask for each, by transformers' names of the kinds.
            mask: Any = self._masks if len(self._masks) > 1 else next(iter(self._masks.values()), None)
            if self._way.mask == _OF_TOKENS:
                mask = (mask[:, 0, -1] == 0).to(torch.int64)
            arguments = {**step.plain, **self._tensors, "attention_mask": mask, step.cache_name: step.cache}
            before = [mask._version for _, mask in self._copies]
            output = run(arguments, counter, self._copies)
            if [mask._version for _, mask in self._copies] != before:
                raise CannotCapture("Its forward writes over its attention mask.")
            return output

    def _begin(
        self,
        step: DecodeStep,
        begin: Callable[[Tensor | None], None],
        run: Run,
        run_plainly: Run,
        counter: TrafficCounter,
        before: Any,
    ) -> Any:
        """Trace the first step of the kind, in the way that is right for the model."""
        refusals: list[Exception] = []
        for way in self._ways:
            if way.by_host and refusals and str(refusals[-1]) != NUMBERS:
                continue
            self._way = way
            try:
                output = self._trace(step, run, counter, before)
                if self._state is State.TRACED and not self._hooked and self._masks:
                    self._compare_with_model(step, output, begin, run, run_plainly, counter, before)
            except torch.cuda.OutOfMemoryError:
                raise
            except _REFUSALS as error:
                # With its traceback, whose frames hold this list, the cache would live until garbage is collected.
                refusals.append(error.with_traceback(None))
                self.free()
                step.cache.go_back_to(before)
                begin(step.mask)
            else:
                self._ways.sort(key=way.__ne__)  # the next time it is the first
                if self._fingerprint is not None:
                    self._fingerprint = Fingerprint(step.model)  # modules may count their calls
                return output
        refusal = next((error for error in refusals if str(error) != NUMBERS), refusals[0])
        refusals.clear()
        try:
            raise refusal
        finally:
            del refusal  # or it would hold this frame, and that the cache

    def _trace(self, step: DecodeStep, run: Run, counter: TrafficCounter, before: Any) -> Any:
        if len(self._changed) > 1:  # one may have made what the next ones only read
            raise CannotCapture(f"Each step changes what {self._changed[-1]} keeps, beside the cache.")
        trace, kept = OpTrace(), module_tensors(step.model)
        with _plain_mode(), hooks_that_run(step.model) as self._hooked, trace:
            output = self._run(step, run, counter)
        if self._state is State.CAPTURED and trace.ops == self._ops and not self._hooked:
            self._verify(step, output, counter, before)
        else:
            self.free()
            changes = _changes(kept, module_tensors(step.model), trace.read)
            self._changed += changes[:1]
            if not changes:
                self._state, self._fingerprint = State.TRACED, Fingerprint(step.model)
        self._ops = trace.ops
        return output

    def _compare_with_model(
        self,
        step: DecodeStep,
        output: Any,
        begin: Callable[[Tensor | None], None],
        run: Run,
        run_plainly: Run,
        counter: TrafficCounter,
        before: Any,
    ) -> None:
        """Raise an error if the model, left to itself, makes something else of the step than over the buffers.

        It may attend to other tokens, or place the new ones elsewhere where we have said where. Some models count those
        that a mask shows: so they are asked with the first half of them hidden.
        """
        after, given = step.cache.mark(), step.given
        step.cache.go_back_to(before)
        hidden = step.mask.clone() if step.positions_are_ours and step.mask is not None else None
        if hidden is not None:
            hidden[:, : (hidden.shape[1] + 1) // 2] = 0
            given = {**given, "attention_mask": hidden}
            begin(hidden)
            output = self._run(step, run, counter)
            step.cache.go_back_to(before)
        is_rough = next(iter(self._masks.values())).element_size() < 4
        if _are_apart(output, run_plainly(given, counter, ()), _TOLERANCE if is_rough else _TOLERANCE_OF_FLOAT32):
            raise CannotCapture(_OTHER_PLACES if step.positions_are_ours else _OTHER_TOKENS)
        if hidden is not None:
            step.cache.go_back_to(before)
            begin(step.mask)
            self._run(step, run, counter)
        step.cache.go_back_to(after)

    def _capture(self, step: DecodeStep, run: Run) -> None:
        # A pool whose graphs are all gone cannot be used again.
        capture = Capture({device: devices.runtime(device).graph_pool_handle() for device in self._devices})
        with _plain_mode(), capture.recording():
            output = self._run(step, run, TrafficCounter())  # nothing crosses before the replay
        self._output = _template(output, step.cache)
        self._captured = capture.captured(list(tensors_in(self._output)))
        self._state = State.CAPTURED
        step.cache.room.has_grown = True
        if self._ops is not None and capture.ops != self._ops:
            raise CannotCapture(_difference(self._ops, capture.ops))
        self._ops = capture.ops

    def _replay(self, counter: TrafficCounter) -> None:
        assert self._captured is not None
        self._captured.replay()
        counter.add_all(self._captured.crossing)

    def _verify(self, step: DecodeStep, output: Any, counter: TrafficCounter, before: Any) -> None:
        """Replay the step that gave `output`, from what the cache was before it, and compare."""
        step.cache.go_back_to(before)
        self._replay(counter)
        if _are_apart(self._output, output):
            raise CannotCapture("Its graphs compute something else than its forward, though they look the same.")
        self._state, self._fingerprint = State.VERIFIED, Fingerprint(step.model)
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        self._known[step.graph_key] = self._way, self._fingerprint


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """No gradients, but not inference mode, where operators that consist of others are not taken apart."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _changes(
    before: Mapping[tuple[str, str], tuple[Tensor, int]], after: Mapping[tuple[str, str], Any], read: Container[int]
) -> list[str]:
    """The names of the modules that keep something else than before in the place of a tensor that the step has read."""
    return [
        place[0] or "the model"
        for place, (tensor, version) in before.items()
        if (after.get(place, (None, 0))[0] is not tensor or after[place][1] != version) and tensor.data_ptr() in read
    ]


def _are_apart(ours: Any, theirs: Any, tolerance: float = _TOLERANCE) -> bool:
    """Whether two outputs of a step differ by more than rounding."""
    for one, other in zip(tensors_in(ours), tensors_in(theirs), strict=True):
        difference, largest = (x.abs().max() for x in (_finite(one) - _finite(other), _finite(other)))
        if bool((difference > tolerance * largest) | (one.isnan() != other.isnan()).any()):
            return True
    return False


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.float(), posinf=0.0, neginf=0.0)


def _template(output: Any, cache: Any) -> Any:
    """A step's output, with a stand-in for the cache.

    Raises:
        CannotCapture: there is something in it of which the next step's could not be made.
    """
    if output is cache:
        return _CACHE
    if isinstance(output, Mapping):
        return type(output)(**{key: _template(value, cache) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)([_template(value, cache) for value in output])
    if isinstance(output, Tensor) or is_plain(output):
        return output
    raise CannotCapture(f"The model returned a {type(output).__name__}.")


def _copied(template: Any, cache: Any) -> Any:
    """A step's output for its caller to keep: the next replay would write over the graph's own."""
    if template is _CACHE:
        return cache
    if isinstance(template, Tensor):
        return template.clone()
    if isinstance(template, Mapping):
        return type(template)(**{key: _copied(value, cache) for key, value in template.items()})
    if isinstance(template, (tuple, list)):
        return type(template)([_copied(value, cache) for value in template])
    return template


_CACHE = "the reply's cache"  # stands for it in a template


def _difference(before: list[Any], after: list[Any]) -> str:
    """One sentence on where two steps differ."""
    for old, new in zip(before, after, strict=False):
        if old != new:
            return f"Its forward differs from step to step, from {new[0]} on: a graph would repeat one step's values."
    return f"Its forward ran {len(before)} operators in one step and {len(after)} in the next."
