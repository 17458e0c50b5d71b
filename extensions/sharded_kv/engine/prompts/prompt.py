"""A reply's prompt: which of its tokens have to be computed, and in which chunks.

While a chunk is on the second stage, the next one is on the first: launches are asynchronous, so one thread is enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import compat, interfaces, text
from ..graphs.fingerprint import Fingerprint
from ..transfers import is_plain
from .aligned import aligned, can_align
from .kept import Conversation, Conversations
from .pace import Pace

logger = logging.getLogger(__name__)

# Which part of a prompt a forward reads.
Part = Literal["chunk", "last"]
# Runs a forward of the model with these keyword arguments.
Run = Callable[[dict[str, Any], Part], Any]

# Where memory does not suffice for more tokens at once.
_SMALL_CHUNK = 512
# How far a token's keys and values may be from what was kept of it, to the norm of the latter: alone it is computed by
# other kernels than among others. Their rounding grows from layer to layer: with random weights, which are worse than
# any others, to 27 epsilons after 32 layers in float16, and 24 in bfloat16 (Llama-7B, Llama-3-8B, 2x H200).
_LEAST_TOLERANCE = 1e-3
_EPSILONS, _EPSILONS_A_LAYER = 8, 2
_ROPES_WITH_A_BOUND = frozenset({"dynamic", "longrope", "su"})
_ROPE_BOUNDS = ("original_max_position_embeddings", "max_position_embeddings")
_KNOWN_TENSORS = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position"})


class _CannotBeCutError(Exception):
    """The model keeps something of the tokens before that is not in its cache."""


class Prompts:
    """How the prompts of one model are read.

    Attributes:
        kept: the conversations that prompts may go on with.
        chunk: how many tokens of a prompt are read at once; 0 for all, None for what is quickest.
        stages: on how many devices the model is.
        pace: how quickly they are read.
        cuts: all that it keeps of the tokens before is in its cache, as far as is known.
        aligns: its attention takes a `CausalBias` for a mask, as far as is known.
    """

    def __init__(self) -> None:
        self.kept = Conversations()
        self.chunk: int | None = None
        self.stages = 1
        self.pace = Pace()
        self.cuts = self.aligns = True

    def concern(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens may be read otherwise than as a whole, or kept."""
        return bool(self.kept.most or self.chunk) or tokens > _SMALL_CHUNK

    def chunks(self, tokens: int) -> int:
        """In how many chunks so many tokens are read."""
        if self.chunk is not None:
            return -(-tokens // self.chunk) if self.chunk else 1
        return self.pace.chunks(tokens, self.stages)


def suits(model: nn.Module, tokens: int) -> bool:
    """Whether so many tokens have the same keys and values whenever they are computed: not where the model turns them
    by angles that change once a text is longer than a bound (dynamic NTK, LongRoPE).
    """
    config: Any = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return True
    each = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    if not any(part.get("rope_type", part.get("type")) in _ROPES_WITH_A_BOUND for part in each):
        return True
    owners = [getattr(config, name, None) for name in _ROPE_BOUNDS]
    bounds = [*owners, *[part.get(name) for part in each for name in _ROPE_BOUNDS]]
    return tokens <= min((bound for bound in bounds if isinstance(bound, int)), default=0)


class Prompt:
    """What a reply reads first: one text without padding.

    Args:
        prompts: of the model.
        model: whose generate() was called.
        generator: its name.
        ids: [1, tokens].

    Attributes:
        tokens: how many it has.
        generator: as above.
        cache: the reply's KVCache, once that is there.
        kept: how many of its tokens need not be computed.
        is_begun: somebody reads it, or has read it.
        in_forward: the model runs, or has raised an error.
        is_known: its forward was called with nothing that its parts could not be called with.
    """

    def __init__(self, prompts: Prompts, model: nn.Module, generator: str, ids: Tensor) -> None:
        self.tokens = ids.shape[1]
        self.generator = generator
        self.cache: Any = None
        self.kept = 0
        self.is_begun = self.is_known = self.in_forward = False
        self._prompts, self._model, self._ids = prompts, model, ids
        self._token: dict[Any, Tensor] = {}  # keys and values of the last token that was kept, see _at
        self._distances: dict[Any, Tensor] = {}  # how far they are from those that it has now
        self._fingerprint: Fingerprint | None = None  # of the model as it reads the prompt
        self._is_whole = False

    def take_kept(self) -> Any:
        """The kept cache with which the prompt goes on; None if there is none of use, and no other is kept then."""
        conversation, shared = self._prompts.kept.take(self.generator, self._ids)
        if conversation is None:
            return None
        cache = conversation.cache
        # The last one is computed again: the logits are of the prompt's last token, and what was kept is compared.
        kept = min(shared, self.tokens) - 1
        if kept < 1 or not cache.can_go_back_to(kept + 1):
            return None
        cache.truncate(kept + 1)
        token = _at(cache, kept)
        if not cache.can_go_back_to(kept):
            return None
        cache.truncate(kept)
        self.cache, self.kept, self._token, self._fingerprint = cache, kept, token, conversation.fingerprint
        return cache

    def run(self, kwargs: dict[str, Any], run: Run) -> Any:
        """Run the forward that reads it: in chunks where that is quicker, or where memory does not suffice for all.

        Args:
            kwargs: what generate() calls the model with.
            run: see `Run`.

        Returns:
            What the model returned for the last part.

        Raises:
            torch.OutOfMemoryError: there is not even memory for a small chunk.
        """
        self.is_begun, self.is_known = True, self._knows(kwargs)
        if not self.is_known:
            output = self._forward(kwargs, "last", run)
            self._measure()
            if not self._is_right():
                self.in_forward = True  # an answer to the caller, and no error of ours
                raise RuntimeError("The model has changed since it computed what is kept of this prompt: reply again.")
            return output
        output = self._run_from(self.kept, kwargs, run)
        if not self._is_right():
            logger.info("The model has changed since it computed what was kept: the prompt is computed as a whole.")
            del output
            self._begin_anew()
            output = self._run_from(0, kwargs, run)
        self.cache.end_prompt()
        return output

    def go_back(self, kwargs: dict[str, Any]) -> bool:
        """Have the cache be as the forward that was called with these arguments found it. Returns whether it is."""
        found = self.tokens - kwargs["input_ids"].shape[1]
        return found == self.kept and bool(compat.truncate_cache(self.cache, found))

    def end(self, ids: Tensor | None, first_seconds: float | None) -> None:
        """The reply is over. Its cache is kept for the next, if nobody else has it and a prompt may go on with it.

        Args:
            ids: [1, tokens], of prompt and reply; the last one is not in the cache. None if nobody knows.
            first_seconds: how long it took to the first token; None if nobody knows.
        """
        if self._is_whole and first_seconds is not None:
            self._prompts.pace.note_whole(self.tokens, first_seconds)
        if (
            self._prompts.kept.most
            and self.is_known
            and ids is not None
            and sys.getrefcount(self.cache) == 2  # ours, and the question's
            and (cache := self.cache)
            and cache.keeps_tokens_only
            and cache.is_whole
            and not cache.room.is_tight
            and not cache.is_held
            and 0 < cache.length <= ids.shape[1]
            and suits(self._model, cache.length)
            and self._fingerprint is not None
            and self._fingerprint.holds_throughout()
        ):
            own = ids[:, : cache.length].clone()  # the caller has the others, and may change them
            self._prompts.kept.keep(Conversation(self.generator, cache, own, self._fingerprint))

    def _knows(self, kwargs: dict[str, Any]) -> bool:
        """Whether it can be called for a part of the prompt, since nothing but its tokens matters."""
        ids, new = kwargs.get("input_ids"), self.tokens - self.kept
        shapes = {"attention_mask": (1, self.tokens), "position_ids": (1, new), "cache_position": (new,)}
        return (
            isinstance(ids, Tensor)
            and ids.shape == (1, new)
            and torch.equal(ids, self._ids[:, self.kept :].to(ids.device))  # some settings change the prompt
            and all(getattr(kwargs.get(name), "shape", shape) == shape for name, shape in shapes.items())
            and all(
                name in _KNOWN_TENSORS if isinstance(value, Tensor) else value is self.cache or is_plain(value)
                for name, value in kwargs.items()
            )
        )

    def _run_from(self, begin: int, kwargs: dict[str, Any], run: Run) -> Any:
        """Read all tokens from `begin` on, with less at once if memory runs out."""
        count = self._prompts.chunks(self.tokens - begin) if self._can_be_cut() else 1
        while True:
            tokens, aligns = self.tokens - begin, self._prompts.aligns and can_align(self._model)
            try:
                return self._run_parts(begin, count, aligns, kwargs, run)
            except torch.cuda.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # where it was raised, views of buffers are at hand
                if -(-tokens // count) <= _SMALL_CHUNK or not self._can_be_cut():
                    raise
                logger.info("There is no memory for %d tokens at once: the prompt is read in chunks.", tokens // count)
                count = -(-tokens // _SMALL_CHUNK)
            except _CannotBeCutError:
                self._prompts.cuts, count = False, 1
            except Exception as error:
                # The model's own code may not have known what to do with such a mask.
                if not self.in_forward or not aligns or (begin == 0 and count == 1):
                    raise
                logger.info("Its prompts are read with masks of all tokens: %s", text.of_error(error))
                self._prompts.aligns = False
            self.in_forward = False
            if begin and not self.cache.can_go_back_to(begin):  # a window has moved on
                self._begin_anew()
                begin = 0
            self.cache.truncate(begin)

    def _begin_anew(self) -> None:
        """Compute all of it."""
        self._token, self._distances, self.kept = {}, {}, 0
        self.cache.truncate(0)

    def _forward(self, kwargs: dict[str, Any], part: Part, run: Run) -> Any:
        self.in_forward = True
        output = run(kwargs, part)
        self.in_forward = False
        return output

    def _can_be_cut(self) -> bool:
        """Whether it may be read in chunks: recurrent states begin anew with each."""
        return self._prompts.cuts and self.cache.keeps_tokens_only and interfaces.table("mask") is not None

    def _run_parts(self, begin: int, count: int, aligns: bool, kwargs: dict[str, Any], run: Run) -> Any:
        size = -(-(self.tokens - begin) // count)
        self.cache.room.prompt = self.tokens
        for start in range(begin, self.tokens, size):
            end = min(start + size, self.tokens)
            is_last = end == self.tokens
            began = time.perf_counter()
            with aligned() if aligns else contextlib.nullcontext():
                inputs = self._inputs(kwargs, start, end, aligns)
                output = self._forward(inputs, "last" if is_last else "chunk", run)
            if not is_last and self.cache.own_layers and not self.cache.is_whole:
                raise _CannotBeCutError
            if start == begin:
                self._prompts.pace.note_launch(time.perf_counter() - began)
                self._is_whole = is_last and not begin
                self._measure()
                if self._prompts.kept.most and self._fingerprint is None:
                    self._fingerprint = Fingerprint(self._model)  # while the GPUs work
            if not is_last:
                del output
        return output

    def _inputs(self, kwargs: dict[str, Any], start: int, end: int, aligns: bool) -> dict[str, Any]:
        """What the model is called with for the tokens from `start` to `end`."""
        if end - start == kwargs["input_ids"].shape[1] == self.tokens:
            return kwargs
        inputs = {**kwargs, "input_ids": self._ids[:, start:end].to(kwargs["input_ids"].device)}
        positions = torch.arange(start, end, device=inputs["input_ids"].device)
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                inputs[name] = positions.to(kwargs[name].dtype).expand(*kwargs[name].shape[:-1], end - start)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = None if aligns else mask[:, :end]
        if end < self.tokens:
            names = inspect.signature(self._model.forward).parameters
            inputs.update({name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in names})
        return inputs

    # --- whether what was kept is right ---------------------------------------------------------------------------

    def _measure(self) -> None:
        """The last kept token was computed again: see how far it is from what was kept, without waiting for a GPU."""
        now = _at(self.cache, self.kept) if self._token else {}
        self._distances = {
            kind: (now[kind].float() - then.float()).norm(dim=1) / then.float().norm(dim=1).clamp_min(1e-30)
            for kind, then in self._token.items()
            if kind in now
        }

    def _is_right(self) -> bool:
        """Whether the kept tokens are what the model would make of them now."""
        if not self._token:
            return True
        apart = [
            (distance, depth, kind.dtype)
            for kind, distances in self._distances.items()
            for distance, depth in zip(distances.tolist(), kind.depths, strict=True)
        ]
        return bool(apart) and all(distance <= _tolerance(depth, dtype) for distance, depth, dtype in apart)


def _tolerance(depth: int, dtype: torch.dtype) -> float:
    return max(_LEAST_TOLERANCE, torch.finfo(dtype).eps * (_EPSILONS + _EPSILONS_A_LAYER * depth))


@dataclasses.dataclass(frozen=True)
class _Alike:
    """Layers whose tokens can be stacked.

    Attributes:
        keep: which tokens they keep.
        depths: their numbers, once for the keys and once for the values of each.
        device, dtype: of their keys and values.
    """

    keep: str
    depths: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


def _at(cache: Any, token: int) -> dict[_Alike, Tensor]:
    """The keys and values of a token: of layers that are alike a copy, [keys and values, numbers]."""
    found: dict[Any, list[tuple[int, Tensor]]] = {}
    for depth, layer in enumerate(cache.own_layers):
        for each in layer.at(token) or ():
            found.setdefault((layer.kind, each.device, each.dtype, each.numel()), []).append((depth, each.flatten()))
    return {
        _Alike(keep, tuple(depth for depth, _ in each), device, dtype): torch.stack([numbers for _, numbers in each])
        for (keep, device, dtype, _), each in found.items()
    }
