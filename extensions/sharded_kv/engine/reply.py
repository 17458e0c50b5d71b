"""Reply: one call of generate() in one thread, from its prompt to its end."""

from __future__ import annotations

import inspect
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import compat
from .eager import Runtime, ThisThread
from .metering.meter import Meter
from .patches import Patch, PatchSet, wrap_like
from .placement import Placement, cache_in, cache_name
from .prompts.prompt import Prompt, suits
from .transfers import is_plain

if TYPE_CHECKING:
    from .metering.recorder import Recording

# Where `generate` of transformers takes them if they are given by position, in every version.
_CONFIG_POSITION = 1
_CRITERIA_POSITION = 3
# What generate() takes beside its settings that changes nothing of how a prompt is read.
_HARMLESS = frozenset(
    {
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "streamer",
        "tokenizer",
        "synced_gpus",
        "prefix_allowed_tokens_fn",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        "attention_mask",
    }
)
# Settings with which a prompt is more than one text that is read once, or its hidden states are asked for.
_OTHER_WAYS = {
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "prefill_chunk_size": None,
    "output_hidden_states": False,
    "output_attentions": False,
    "is_assistant": False,
    "use_mtp": False,
    "cache_implementation": None,
}


class Reply:
    """One call of `generate()`: what its cache shall be, and who measures it.

    Args:
        recording: the meter's, of this reply.
        model: whose `generate` was called.
        args, kwargs: what it was called with.

    Attributes:
        recording: as above.
        awaits_cache: generate() has not made its cache yet.
        longest: for how many tokens its cache needs room ahead; None if nobody knows.
        ids: [1, tokens], of the one text that is its prompt; None for other replies.
        prompt: what it has to read first, once its cache is made; None if that is not one text.
    """

    def __init__(self, recording: Recording, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.recording = recording
        # A cache that the caller has made stays the caller's.
        self.awaits_cache = cache_in(kwargs) is None and compat.has_cache_objects()
        settings = _Settings(model, args, kwargs)
        self.longest = _longest(settings, args, kwargs)
        self.ids: Tensor | None = _one_text(settings, args, kwargs) if self.awaits_cache else None
        self.prompt: Prompt | None = None
        kept: Any = cache_in(kwargs)
        if compat.is_own_cache(kept):
            kept.begin_reply(self.longest)

    def begin_prompt(self, runtime: Runtime, model: Any, generator: str, given: dict[str, Any]) -> Any:
        """Its cache, in the place of the one that generate() has made; with it, what is to be read.

        Args:
            runtime: of the model.
            model: whose generate() it is.
            generator: its name.
            given: what the model will be called with, beside ids; among it the cache that was made.
        """
        self.awaits_cache = False
        made, mask = cache_in(given), given.get("attention_mask")
        if (
            self.ids is None
            or not runtime.prompts.concern(self.ids.shape[1])
            or not suits(model, self.ids.shape[1])
            or not (mask is None or bool(mask.all()))
        ):
            return runtime.own_cache(made, generator, "generate")
        prompt = Prompt(runtime.prompts, model, generator, self.ids)
        cache = prompt.take_kept() if compat.own_cache_class().can_replace(made) else None
        if cache is None:
            cache = prompt.cache = runtime.own_cache(made, generator, "generate")
        else:
            cache.begin_reply(self.longest)
        if compat.is_own_cache(cache):
            self.prompt = prompt
        return cache

    def end(self, ids: Tensor | None) -> None:
        """It is over: its cache may serve the next. `ids`, [rows, tokens], are of prompt and reply."""
        prompt, self.prompt = self.prompt, None
        if prompt is not None:
            prompt.end(ids, self.recording.first_seconds)


class _Settings:
    """What a call of `generate()` says of its settings, or else the generation config that it uses."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[_CONFIG_POSITION] if len(args) > _CONFIG_POSITION else kwargs.get("generation_config")
        self._kwargs, self._config = kwargs, given or getattr(model, "generation_config", None)

    def __getitem__(self, name: str) -> Any:
        value = self._kwargs.get(name)
        return getattr(self._config, name, None) if value is None else value

    def __contains__(self, name: str) -> bool:
        """Whether it is the name of a setting."""
        return hasattr(self._config, name)


def _one_text(settings: _Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The ids, [1, tokens], of a reply whose prompt is one text without padding, and nothing but that; else None."""
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    mask = kwargs.get("attention_mask")
    others = [
        name
        for name, value in kwargs.items()
        if value is not None
        and name not in ("input_ids", "inputs", *_HARMLESS)
        and not (name in settings and is_plain(value))
    ]
    if (
        others
        or not isinstance(ids, Tensor)
        or ids.dim() != 2
        or ids.shape[0] != 1
        or ids.is_floating_point()
        or any(settings[name] not in (None, usual) for name, usual in _OTHER_WAYS.items())
        or any(each is not None for each in args[_CRITERIA_POSITION + 3 :])
        or not (mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape))
    ):
        return None
    return ids


def _longest(settings: _Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """For how many tokens a reply's cache needs room ahead; None if nobody knows how long the reply may get.

    Its last token is not read again. The one before makes room for itself: so no more memory is taken at any time than
    transformers takes at the end, to the byte.
    """
    new_tokens, tokens = settings["max_new_tokens"], settings["max_length"]
    if isinstance(new_tokens, int):
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        tokens = ids.shape[1] + new_tokens if isinstance(ids, Tensor) and ids.dim() == 2 else None
    return tokens - 2 if isinstance(tokens, int) else None


class ReplyPatches(PatchSet):
    """What sees the replies of one model, with sharding on and off alike.

    Args:
        model: held weakly.
        placement: names the modules that have a `generate`.
        runtime: knows the reply of each thread.
        meter: measures them.
    """

    def __init__(self, model: nn.Module, placement: Placement, runtime: Runtime, meter: Meter) -> None:
        compat.keep_untraced(Reply, _ForwardBegins, sys.modules[__name__])
        modules = [model.get_submodule(container.name) for container in placement.containers]
        repliers = [module for module in modules if writes_replies(type(module))]
        names = {module: container.name for module, container in zip(modules, placement.containers, strict=True)}
        self._modules = [weakref.ref(module) for module in modules]
        patches = [patch for module in repliers for patch in _patches(module, names[module], runtime, meter)]
        self._hooks: list[Any] = []
        super().__init__([*patches, *compat.tuple_cache_patches(modules, runtime.counter)])
        begins = _ForwardBegins(runtime.thread)
        self._hooks += [module.register_forward_pre_hook(begins, with_kwargs=True) for module in repliers]

    def suit(self, model: nn.Module, placement: Placement) -> bool:
        """Whether they are still there, on the modules that would get them now."""
        modules = [model.get_submodule(container.name) for container in placement.containers]
        return modules == [module() for module in self._modules] and self.are_in_place

    def restore(self) -> None:
        """Leave the model as it was."""
        super().restore()
        for hook in self._hooks:
            hook.remove()


def _patches(module: Any, name: str, runtime: Runtime, meter: Meter) -> Iterator[Patch]:
    generate = module.generate
    yield Patch(module, "generate", wrap_like(_run_reply, runtime, meter, generate, like=generate))
    method = compat.cache_preparing_method(type(module))
    if method:
        prepare = getattr(module, method)
        yield Patch(module, method, wrap_like(_prepare_cache, runtime, name, prepare, like=prepare))
    method = compat.mask_growing_method(module)
    if method:
        grow = getattr(module, method)
        yield Patch(module, method, wrap_like(_grow_mask, runtime, grow, like=grow))


def _prepare_cache(runtime: Runtime, name: str, prepare: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Have generate() make its cache, and have ours in its place from the first token on.

    Args:
        runtime: of the model.
        name: of the container that generates.
        prepare: generate()'s own method.
    """
    reply = runtime.thread.reply

    def take_place() -> None:
        if reply is not None and reply.awaits_cache:
            try:
                model_kwargs = next(value for value in (*args, *kwargs.values()) if type(value) is dict)
                if runtime.is_on() and cache_in(model_kwargs) is not None:
                    module = getattr(prepare, "__self__", None)
                    model_kwargs[cache_name(model_kwargs)] = reply.begin_prompt(runtime, module, name, model_kwargs)
            except Exception as error:  # the reply goes on with generate()'s own
                runtime.note_failure(error)

    take_place()  # before transformers 4.45 it is there, and asked at once how much it holds
    prepared = prepare(*args, **kwargs)
    take_place()
    return prepared


def _grow_mask(
    runtime: Runtime, grow: Callable[..., Any], /, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any
) -> Any:
    """Have generate() put ones behind its attention mask, and tell the graphs, which need not have it again.

    Args:
        runtime: of the model.
        grow: generate()'s own method.
    """
    before = model_kwargs.get("attention_mask")
    grown = grow(outputs, model_kwargs, *args, **kwargs)
    cache, after = cache_in(grown), grown.get("attention_mask")
    try:
        if compat.is_own_cache(cache) and cache.graphs is not None and before is not None and after is not before:
            cache.graphs.watch.note_growth(before, after)
    except Exception as error:  # the reply goes on without us
        runtime.note_failure(error)
    return grown


def _run_reply(runtime: Runtime, meter: Meter, generate: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run `generate()`. Of a wrapper's and that of the model in it (Peft, AutoGPTQ), the outer one is the reply."""
    thread = runtime.thread
    if thread.reply is not None:
        return generate(*args, **kwargs)
    recording, reply = meter.begin(), None
    try:
        reply = Reply(recording, getattr(generate, "__self__", None), args, kwargs)
        if len(args) > _CRITERIA_POSITION and _takes_criteria_by_position(generate):
            criteria = _with(args[_CRITERIA_POSITION], recording)
            args = (*args[:_CRITERIA_POSITION], criteria, *args[_CRITERIA_POSITION + 1 :])
        else:
            kwargs = {**kwargs, "stopping_criteria": _with(kwargs.get("stopping_criteria"), recording)}
        thread.reply = reply
    except Exception as error:  # the reply goes on without us
        recording.fail(error)
    try:
        return generate(*args, **kwargs)
    except Exception as error:
        # The webui stops a reply by an error in a stopping criterion. generate()'s frames would hold the cache.
        if reply is not None and reply.prompt is not None:
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        thread.reply = None
        recording.end()
        ids, recording.ids = recording.ids, None
        try:
            if reply is not None and runtime.is_on():
                reply.end(ids)
        except Exception as error:  # the next reply begins anew
            runtime.note_failure(error)


def _takes_criteria_by_position(generate: Callable[..., Any]) -> bool:
    """Whether the fourth argument is `stopping_criteria`, or is passed on to a `generate` where it is."""
    parameters = list(inspect.signature(generate).parameters.values())
    passes_on = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters[: _CRITERIA_POSITION + 1])
    return passes_on or [each.name for each in parameters][_CRITERIA_POSITION:][:1] == ["stopping_criteria"]


def _with(criteria: Any, recording: Recording) -> Any:
    """Stopping criteria, with the recording at the end."""
    if criteria is None:
        criteria = sys.modules["transformers"].StoppingCriteriaList()
    return type(criteria)([*criteria, recording])


def writes_replies(of: type) -> bool:
    """Whether modules of this type have a `generate` of transformers' kind, and not one of their own."""
    generate = getattr(of, "generate", None)
    if not callable(generate) or "transformers" not in sys.modules:
        return False
    parameters = inspect.signature(generate).parameters
    return "stopping_criteria" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class _ForwardBegins:
    """The hook by which a module says that a forward begins. A copy of the module tells nobody."""

    def __init__(self, thread: ThisThread | None) -> None:
        self._thread = thread

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        reply = None if self._thread is None else self._thread.reply
        if reply is not None:
            reply.recording.forward_begins(cache_in(kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardBegins:
        return _ForwardBegins(None)

    def __reduce__(self) -> Any:
        return _ForwardBegins, (None,)
