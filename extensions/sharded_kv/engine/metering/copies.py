"""Sees what crosses between devices whoever moves it: accelerate moves tensors and counts nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..devices import allocated

_aten = torch.ops.aten
# The operators by which a tensor changes devices. `to` is taken apart into `_to_copy` before it is seen here, but for
# inference mode, where it comes whole.
_COPYING = {_aten.to, _aten._to_copy}


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside `with`, sees every operator that this thread runs. Each costs some microseconds more meanwhile.

    Args:
        devices: whose memory is read after each operator.

    Attributes:
        copies: number of copies for each (from, to) pair of devices, the host among them.
        bytes: bytes for each pair.
        peak: the most bytes that tensors of this process held on each of `devices`.
        failure: what went wrong with looking, after which it looked no longer; None if nothing did.
    """

    def __init__(self, devices: tuple[torch.device, ...] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.peak = {device: allocated(device).now for device in devices}
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begin to look, where that and the end do not lie in one function."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Look no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.failure is None:
            try:
                self._look(func, args, out)
            except Exception as error:  # the operator has run: whose it is must not fail by our looking
                self.failure = error
        return out

    def _look(self, func: Any, args: Any, out: Any) -> None:
        if getattr(func, "overloadpacket", None) in _COPYING:  # higher-order operators have none
            self._count(args[0], out)
        elif func is _aten.copy_.default:
            self._count(args[1], out)
        for device, peak in self.peak.items():
            self.peak[device] = max(peak, allocated(device).now)

    @property
    def bytes_between_gpus(self) -> int:
        """Bytes over all pairs but those with the host or the meta device."""
        return sum(self.bytes[pair] for pair in self.bytes if between_gpus(pair))

    @property
    def copies_between_gpus(self) -> int:
        """Copies over all pairs but those with the host or the meta device."""
        return sum(self.copies[pair] for pair in self.copies if between_gpus(pair))

    def _count(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.device != target.device:
            pair = (str(source.device), str(target.device))
            self.copies[pair] += 1
            self.bytes[pair] += target.numel() * target.element_size()


def between_gpus(pair: tuple[str, str]) -> bool:
    """Whether neither end of (from, to) is the host or the meta device."""
    return not {"cpu", "meta"} & set(pair)
