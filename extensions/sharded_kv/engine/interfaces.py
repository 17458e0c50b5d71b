"""transformers' attention and mask functions, which one thread's forwards have replaced for a while.

transformers looks both up by the name of the model's attention. What is registered under a name serves all threads: so
ours asks first whether the thread that calls wants it, and hands on everything else.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

if find_spec("torch.nn.attention.bias"):  # since torch 2.3
    from torch.nn.attention import bias

    CausalBias: Any = bias.CausalBias
else:
    CausalBias = ()

# Takes the name, the function that it is in the place of, and what that was called with.
Instead = Callable[..., Any]

_TABLES = {
    "attention": ("transformers.modeling_utils", "AttentionInterface"),  # since transformers 4.51
    "mask": ("transformers.masking_utils", "AttentionMaskInterface"),  # since transformers 4.53
}


def causal_mask(new: int, tokens: int) -> Any:
    """A mask of the last `new` of some tokens, each of which sees all that are before it: torch's `CausalBias`.

    torch's own constructor also makes numbers for each two tokens, which nobody reads. Without any, whoever takes it
    for an ordinary mask gets an error.
    """
    mask = torch.Tensor._make_subclass(CausalBias, torch.empty(0))
    mask.variant, mask.seq_len_q, mask.seq_len_kv = bias.CausalVariant.LOWER_RIGHT, new, tokens
    return mask


_installing = threading.Lock()
_users: Counter[tuple[str, str]] = Counter()  # by table and name


class _Here(threading.local):
    """Of this thread: what takes the place of the functions of each table."""

    def __init__(self) -> None:
        self.instead: dict[str, Instead] = {}


_here = _Here()


def table(of: str) -> Any:
    """Where transformers has its "attention" or "mask" functions by name; None in versions that have no such place."""
    module, name = _TABLES[of]
    return getattr(sys.modules.get(module), name, None)


def has(of: str, name: Any) -> bool:
    """Whether transformers has a function of this name there."""
    functions = table(of)
    return functions is not None and name in functions()


@contextlib.contextmanager
def replaced(of: str, name: str, instead: Instead) -> Iterator[None]:
    """Within, this thread's forwards have `instead` in the place of transformers' own function.

    Args:
        of: "attention" or "mask".
        name: of the function, which `has(of, name)`.
        instead: called with the name, transformers' function, and the arguments for that.
    """
    functions, user = table(of), (of, name)
    with _installing:
        if not _users[user]:
            functions.register(name, functools.partial(_choose, of, name, functions()[name]))
        _users[user] += 1
    before = _here.instead
    _here.instead = {**before, of: instead}
    try:
        yield
    finally:
        _here.instead = before
        with _installing:
            _users[user] -= 1
            ours = functions()[name]
            if not _users[user] and _original(ours) is not ours:
                functions.register(name, _original(ours))


def _choose(of: str, name: str, theirs: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    instead = _here.instead.get(of)
    return theirs(*args, **kwargs) if instead is None else instead(name, theirs, *args, **kwargs)


def _original(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ours is in the place of; another's as it is."""
    is_ours = isinstance(function, functools.partial) and function.func is _choose
    return function.args[2] if is_ours else function  # type: ignore[attr-defined]
