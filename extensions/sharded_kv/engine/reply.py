"""Reply: one call of generate() in one thread, from its prompt to its end."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import compat
from .eager import Runtime, ThisThread
from .metering.meter import Meter
from .patches import Patch, PatchSet, wrap_like
from .placement import CACHE_NAME, Placement

if TYPE_CHECKING:
    from .metering.recorder import Recording

# Where `generate` of transformers takes them if they are given by position, in every version.
_CONFIG_POSITION = 1
_CRITERIA_POSITION = 3


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
    """

    def __init__(self, recording: Recording, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.recording = recording
        # A cache that the caller has made stays the caller's.
        self.awaits_cache = kwargs.get(CACHE_NAME) is None and compat.has_cache_objects()
        self.longest = _longest(model, args, kwargs)
        kept: Any = kwargs.get(CACHE_NAME)
        if compat.is_own_cache(kept):
            kept.begin_reply(self.longest)


def _longest(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """For how many tokens a reply's cache needs room ahead; None if nobody knows how long the reply may get.

    Its last token is not read again. The one before makes room for itself: so no more memory is taken at any time than
    transformers takes at the end, to the byte.
    """
    given = args[_CONFIG_POSITION] if len(args) > _CONFIG_POSITION else kwargs.get("generation_config")
    config = given or getattr(model, "generation_config", None)

    def limit(name: str) -> int | None:
        value = kwargs.get(name)
        value = getattr(config, name, None) if value is None else value
        return value if isinstance(value, int) else None

    new_tokens, tokens = limit("max_new_tokens"), limit("max_length")
    if new_tokens is not None:
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        tokens = ids.shape[1] + new_tokens if isinstance(ids, Tensor) and ids.dim() == 2 else None
    return None if tokens is None else tokens - 2


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
    yield Patch(module, "generate", wrap_like(_run_reply, runtime.thread, meter, generate, like=generate))
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
    prepared = prepare(*args, **kwargs)
    reply = runtime.thread.reply
    if reply is not None and reply.awaits_cache:
        try:
            model_kwargs = next(value for value in (*args, *kwargs.values()) if type(value) is dict)
            if runtime.is_on() and model_kwargs.get(CACHE_NAME) is not None:
                reply.awaits_cache = False
                model_kwargs[CACHE_NAME] = runtime.own_cache(model_kwargs[CACHE_NAME], name, "generate")
        except Exception as error:  # the reply goes on with generate()'s own
            runtime.note_failure(error)
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
    cache, after = grown.get(CACHE_NAME), grown.get("attention_mask")
    try:
        if compat.is_own_cache(cache) and cache.graphs is not None and before is not None and after is not before:
            cache.graphs.watch.note_growth(before, after)
    except Exception as error:  # the reply goes on without us
        runtime.note_failure(error)
    return grown


def _run_reply(thread: ThisThread, meter: Meter, generate: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run `generate()`. Of a wrapper's and that of the model in it (Peft, AutoGPTQ), the outer one is the reply."""
    if thread.reply is not None:
        return generate(*args, **kwargs)
    recording = meter.begin()
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
    finally:
        thread.reply = None
        recording.end()


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
            reply.recording.forward_begins(kwargs.get(CACHE_NAME))

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardBegins:
        return _ForwardBegins(None)

    def __reduce__(self) -> Any:
        return _ForwardBegins, (None,)
