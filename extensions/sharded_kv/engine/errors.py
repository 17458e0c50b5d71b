"""Whose an error is: one that was raised in our part of a step is marked, and keeps its type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_MARK = "_raised_in_sharded_kv"


def mark_as_ours(error: BaseException) -> None:
    """Say that an error was raised in our part of a step. No memory is nobody's defect, and is never marked."""
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        setattr(error, _MARK, True)


def is_ours(error: BaseException) -> bool:
    """Whether accelerate shall run a step again that ended so: we have failed in it."""
    return getattr(error, _MARK, False)


@contextlib.contextmanager
def our_part() -> Iterator[None]:
    """Within, an error is ours."""
    try:
        yield
    except Exception as error:
        mark_as_ours(error)
        raise
