""" "Measure on and off": runs beside the webui, one short reply at a time, each when nobody else replies."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..engine import devices, text
from ..engine.metering import compare
from ..engine.sharding import Sharding
from .host import Host
from .state import Measurement

PROMPT = "Two hikers reach a fork in the mountain path. The older one looks at the map and says:"
# How often a measurement that waits for its turn looks whether it may, or was cancelled.
_WAIT_SECONDS = 0.1
# After each reply of ours, so that a reply that waits for the lock gets it before our next one.
_PAUSE_SECONDS = 0.05


class Measuring:
    """One measurement at a time, of the model that is loaded when it starts.

    Args:
        switched: called after each reply, to put the switch back to what the user asked for.
    """

    def __init__(self, switched: Callable[[], None]) -> None:
        self._switched = switched
        self._lock = threading.Lock()
        self._state = Measurement()
        self._cancelled = ""

    @property
    def state(self) -> Measurement:
        """How far it has got."""
        return self._state

    def start(self, host: Host, sharding: Sharding) -> None:
        """Begin, unless one is under way."""
        with self._lock:
            if self._state.under_way:
                return
            self._cancelled = ""
            thread = threading.Thread(target=self._run, args=(host, sharding), name="sharded_kv measuring", daemon=True)
            self._set(phase="waiting", done=0, of=2 * (compare.ROUNDS + 1), message="")
            try:
                thread.start()
            except RuntimeError:
                self._set(phase="idle")
                raise

    def cancel(self, why: str) -> None:
        """Stop at the next token. Does nothing if none is under way.

        Args:
            why: one sentence for the panel.
        """
        with self._lock:
            if self._state.under_way and not self._cancelled:
                self._cancelled = why

    def _run(self, host: Host, sharding: Sharding) -> None:
        try:
            comparison = self._measure(host, sharding)
            names = Counter(devices.name(device) for device in sharding.placement.devices)
            gpu = " + ".join(f"{n}x {name}" for name, n in names.items())
            self._set(phase="done", gpu=gpu, model=host.model_name, comparison=comparison)
        except compare.Cancelled:
            self._set(phase="cancelled", message=self._cancelled)
        except Exception as error:
            host.logger.exception("sharded_kv: measuring failed.")
            self._set(phase="failed", message=f"Measuring failed: {text.of_error(error)}")

    def _measure(self, host: Host, sharding: Sharding) -> compare.Comparison:
        model, tokenizer = host.model, host.tokenizer

        def goes_on() -> bool:
            if host.model is not model:
                self.cancel("Cancelled: another model was loaded, or none.")
            return not self._cancelled

        @contextlib.contextmanager
        def turn() -> Iterator[None]:
            self._set(phase="waiting")
            with self._turn(host.generation_lock, sharding, goes_on):
                self._set(phase="running")
                try:
                    yield
                finally:
                    self._switched()
            time.sleep(_PAUSE_SECONDS)

        inputs = tokenizer(PROMPT, return_tensors="pt").to(sharding.placement.main_device)
        return compare.compare(
            model, sharding, inputs, turn=turn, goes_on=goes_on, progress=lambda done, of: self._set(done=done, of=of)
        )

    @staticmethod
    @contextlib.contextmanager
    def _turn(lock: Any, sharding: Sharding, goes_on: Callable[[], bool]) -> Iterator[None]:
        """Hold `lock`, if there is one, while nobody else replies: not every reply takes it.

        Raises:
            compare.Cancelled: `goes_on` said no while we waited.
        """
        lock = lock or threading.Lock()
        while goes_on():
            if lock.acquire(timeout=_WAIT_SECONDS):
                try:
                    if not sharding.meter.snapshot().generating:
                        yield
                        return
                finally:
                    lock.release()
            time.sleep(_WAIT_SECONDS)
        raise compare.Cancelled

    def _set(self, **changes: Any) -> None:
        self._state = dataclasses.replace(self._state, **changes)
