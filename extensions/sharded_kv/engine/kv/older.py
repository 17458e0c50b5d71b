"""What caches lack before transformers 4.54, when a cache was two lists of tensors and knew no layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class DynamicLayer:
    """A layer as later versions have it, as far as `FullLayer` goes on with it."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Concatenate."""
        is_first = self.keys is None
        self.keys = key_states if is_first else torch.cat([self.keys, key_states], dim=-2)
        self.values = value_states if is_first else torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have the rows in another order."""
        if self.keys is not None:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))


class ListedCache(DynamicCache):  # type: ignore[misc]
    """A cache with layers, which also has `key_cache` and `value_cache`: lists in which anybody may set tensors.

    What was set is taken over by its layer before that is read again.

    Attributes:
        layers: of each layer what it keeps; more are made as the model writes to them.
    """

    layers: list[Any]

    def __init__(self, *args: Any) -> None:
        self._lists: dict[str, list[Any]] = {"keys": [], "values": []}  # what people see, and may set
        self._given: dict[str, list[Any]] = {"keys": [], "values": []}  # what we have put there
        self.layers = []
        super().__init__(*args)

    @property
    def key_cache(self) -> list[Any]:
        """The keys of each layer, [batch, heads, tokens, head size]; an empty list of one that was skipped."""
        return self._list("keys")

    @key_cache.setter
    def key_cache(self, tensors: list[Any]) -> None:
        self._lists["keys"], self._given["keys"] = tensors, [None] * len(tensors)

    @property
    def value_cache(self) -> list[Any]:
        """The values likewise."""
        return self._list("values")

    @value_cache.setter
    def value_cache(self, tensors: list[Any]) -> None:
        self._lists["values"], self._given["values"] = tensors, [None] * len(tensors)

    @property
    def _seen_tokens(self) -> int:
        return self.get_seq_length()

    @_seen_tokens.setter
    def _seen_tokens(self, _: int) -> None:
        """The layers know."""

    def __len__(self) -> int:
        return len(self.layers)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """How many tokens a layer holds."""
        index = layer_idx or 0
        if index >= len(self.layers):
            return 0
        self._take_over(index)
        return int(self.layers[index].get_seq_length())

    def _take_over(self, index: int) -> None:
        """Have a layer hold what somebody has set in one of the lists."""
        for name, shown in self._lists.items():
            given = self._given[name]
            if index < len(given) and shown[index] is not given[index]:
                given[index] = shown[index]
                setattr(self.layers[index], name, shown[index])

    def _list(self, name: str) -> list[Any]:
        shown, given = self._lists[name], self._given[name]
        for index, layer in enumerate(self.layers):
            self._take_over(index)
            if index == len(given):
                given.append(None)
                shown.append(None)
            if given[index] is None or not layer.shows(name, given[index]):
                value = getattr(layer, name)
                given[index] = shown[index] = [] if value is None else value
        return shown
