"""N simulated GPUs on the CPU, with an exact count of what moves between them and of the memory they hold.

A PrivateUse1 backend named "sim", in Python. A tensor on ``sim:1`` is a :class:`SimTensor`: a shell that says it lives
on ``sim:1`` around a CPU tensor that holds the numbers. Every operator runs on the CPU tensors; what a machine with
several GPUs would refuse (operands on two devices, memory that is not there) is refused with the words CUDA uses. So
what several GPUs show about *correctness* and *traffic* can be tested on any computer; what they show about speed
cannot.

What it cannot do raises NotImplementedError with the operator's name. Nothing happens at import: see :func:`start`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .backend import register
from .machine import Traffic, machine
from .tensor import SimTensor

__all__ = ["SimTensor", "Traffic", "allocated", "peak", "record", "reset_peak", "set_capacity", "start"]


def start(devices: int = 4) -> None:
    """Registers the backend once per process and sets the number of devices.

    A later call only changes the number. Tensors on devices that are gone stay usable.

    Args:
        devices: number of simulated GPUs, at least 1.

    Raises:
        ValueError: for fewer than one device.
        RuntimeError: another PrivateUse1 backend is registered in this process (torch allows one).
    """
    if devices < 1:
        raise ValueError(f"{devices} simulated devices were asked for; there must be at least one.")
    machine.devices = devices
    if not machine.registered:
        register()
        machine.registered = True


@contextlib.contextmanager
def record() -> Iterator[Traffic]:
    """Counts what happens between devices inside the ``with``, in all threads; may be nested.

    Yields:
        Traffic: readable while the block runs and after it has ended, when it stays as it was at the end.
    """
    traffic = Traffic(machine.counts)
    try:
        yield traffic
    finally:
        traffic._freeze()


def allocated(index: int) -> int:
    """Bytes that tensors on ``sim:<index>`` hold now. Views cost nothing; nothing is rounded."""
    return machine.memory.used(index)


def peak(index: int) -> int:
    """The most bytes ``sim:<index>`` held since the start or the last :func:`reset_peak`.

    What an operator needs inside itself is not in it, only what it returns.
    """
    return machine.memory.most(index)


def reset_peak(index: int | None = None) -> None:
    """Sets the peak of a device, or of all, to what it holds now."""
    machine.memory.reset_most(index)


def set_capacity(index: int, bytes: int | None) -> None:
    """Sets how many bytes ``sim:<index>`` can hold; None (the default) for no limit.

    An allocation past it raises ``torch.OutOfMemoryError`` and changes nothing.
    """
    machine.memory.capacity[index] = bytes
