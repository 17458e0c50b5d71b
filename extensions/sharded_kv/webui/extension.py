"""What the extension does inside the webui: follows the loaded model, the switches and the Session tab's tick."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from ..engine import compat, text
from ..engine.sharding import MODES, Sharding, attach
from . import settings, view
from .host import NAME, Host, logger
from .measuring import Measuring
from .state import PanelState
from .watch import watch

_HELP = "To use several GPUs, load a model with the Transformers loader and give it memory on each (Model tab)."
_GRAPHS = "Graph mode makes it faster all the same."
_ACCELERATE = "accelerate runs the model with its own hooks"


class Extension:
    """The one of this process. None of its methods raises: a failure of ours is logged, and switches us off.

    Attributes:
        params: what the webui reads and saves; in step with the panel.
    """

    def __init__(self) -> None:
        self.params = settings.defaults()
        self._lock = threading.RLock()
        self._host: Host | None = None
        self._sharding: Sharding | None = None
        self._activate: bool = self.params["activate"]
        self._mode: str = self.params["mode"]
        self._kept: int = self.params["kept_conversations"]
        self._usually_kept = self._kept  # as the settings say, if they do
        self._has_told = False  # of the model, in the log
        self._failure = ""
        self._measuring = Measuring(switched=self._apply)

    # --- what the webui tells us --------------------------------------------------------------------------------------

    def setup(self) -> None:
        """The webui has loaded us, perhaps again: v4 does at each restart of its interface."""
        with self._guarded("setting up"), self._lock:
            self._find_host()
            self.restarted()

    def _find_host(self) -> None:
        if self._host is None:
            host = Host.find()
            host.show_our_log()
            settings.correct(self.params, NAME, host.logger.warning)
            self._activate, self._mode = self.params["activate"], self.params["mode"]
            self._kept = self.params["kept_conversations"]
            self._usually_kept = self._kept or self._usually_kept
            watch(host.shared, {"model": self._model_assigned, "need_restart": self._restart_asked})
            self._host = host

    def restarted(self) -> None:
        """The interface is built again: we may have been ticked or unticked, and `params` read from the file again."""
        with self._guarded("following a restart"), self._lock:
            self._keep_in_step()
            self._follow()

    def build_panel(self) -> None:
        """The webui builds its interface, inside whose `gr.Blocks` we are. Without an interface it is never called."""
        self.restarted()
        with self._guarded("building its panel"):
            from . import panel  # not before: Gradio may be missing where there is no interface

            panel.build(self)
            return
        with contextlib.suppress(Exception):  # where even that is too much, the log has it
            import gradio as gr

            gr.Textbox(self._failure, label=NAME, interactive=False)

    def _model_assigned(self, _: Any) -> None:
        with self._guarded("following a model that was loaded"), self._lock:
            self._has_told = False
            self._follow()

    def _restart_asked(self, needed: bool) -> None:
        if not needed:  # the webui's main loop has taken note, and begins
            self.restarted()

    # --- what the user tells us ---------------------------------------------------------------------------------------

    def set_activate(self, activate: bool) -> None:
        """Sharding on or off, at once: between two tokens where a reply is being written."""
        with self._guarded("switching"), self._lock:
            self._measuring.cancel("Cancelled: sharding was switched meanwhile.")
            self._find_host()  # switching on is how one tries again after a failure
            self._activate = bool(activate)
            self._failure = ""
            self._keep_in_step()
            self._follow(again=True)

    def set_mode(self, mode: str) -> None:
        """How the model runs while sharding is on. Whoever can reach the webui may ask for anything."""
        with self._guarded("changing the mode"), self._lock:
            if mode not in MODES:
                logger().warning("There is no mode %s: choose %s.", text.of_value(mode), " or ".join(MODES))
                return
            self._measuring.cancel("Cancelled: the mode was changed meanwhile.")
            self._mode = mode
            self._keep_in_step()
            self._apply()

    def set_keep(self, keep: bool) -> None:
        """Whether a conversation's cache is kept for its next message; if so, as many as the settings say."""
        with self._guarded("changing what is kept"), self._lock:
            self._kept = self._usually_kept if keep else 0
            self._keep_in_step()
            self._apply()

    def drop_kept(self) -> None:
        """Free what is kept of conversations."""
        with self._guarded("letting go of a cache"), self._lock:
            if self._sharding is not None:
                self._sharding.drop_kept()

    def measure(self) -> None:
        """Begin "Measure on and off", if there is something to measure and none is under way."""
        with self._guarded("measuring"), self._lock:
            if self._host is not None and self._sharding is not None and self._sharding.active:
                self._measuring.start(self._host, self._sharding)

    def cancel_measuring(self) -> None:
        """Stop it at the next token."""
        with self._guarded("cancelling"):
            self._measuring.cancel("Cancelled.")

    # --- what the panel shows -----------------------------------------------------------------------------------------

    def state(self) -> PanelState:
        """All of it as of now. From any thread."""
        with self._guarded("reading the meter"):
            return self._read_state()
        return PanelState(self._activate, self._mode, "failed", self._failure)

    def _read_state(self) -> PanelState:
        host, sharding = self._host, self._sharding
        sharded = sharding if sharding is not None and sharding.active else None
        return PanelState(
            self._activate,
            self._mode,
            *self._verdict(),
            keep=self._kept > 0,
            model=host.model_name if host is not None else "",
            placement=sharded.placement if sharded else None,
            snapshot=sharded.meter.snapshot() if sharded else None,
            measurement=self._measuring.state,
        )

    def _verdict(self) -> tuple[Any, str]:
        host, sharding = self._host, self._sharding
        if self._failure:
            return "failed", self._failure
        if host is None:
            return "idle", "The webui has not set the extension up yet."
        if not host.ticked:
            return "idle", f"Unticked in the Session tab: the model runs as if {NAME} was not there."
        if sharding is None:
            return "idle", f"No model is loaded. {_HELP}"
        if sharding.failure:
            return "failed", f"{sharding.failure} Tick the box to try again; the log has the details."
        if not sharding.active:
            has_graphs = sharding.placement.is_one_block and compat.has_cache_objects()
            return "idle", f"{sharding.reason} {_GRAPHS if has_graphs else _HELP}"
        unmeasured = f" {sharding.meter.failure} The log has the details." if sharding.meter.failure else ""
        if not sharding.enabled:
            alone = sharding.placement.is_one_block
            return "off", f"{'The model runs as ever' if alone else _ACCELERATE}: {_split(sharding)}{unmeasured}"
        why = f" The latest token came without graphs. {sharding.reason_for_eager}" if sharding.reason_for_eager else ""
        return "on", f"{NAME} runs the model ({sharding.mode} mode): {_split(sharding)}{why}{unmeasured}"

    # --- how it is done -----------------------------------------------------------------------------------------------

    def _follow(self, again: bool = False) -> None:
        """Take up the model that the webui has now, and let go of the one before; `again` after a failure, too."""
        if self._host is None:
            return
        self._measuring.cancel("Cancelled: a model was loaded or unloaded, or the interface restarted.")
        before, sharding = self._sharding, None
        model = self._host.model  # of two threads that load at once, the later one's
        if model is not None and self._host.ticked:
            sharding = attach(model)  # the same model, after a restart: then it is the same Sharding, too
        self._sharding = sharding
        if before is not None and before is not sharding:
            before.detach()
        self._failure = ""
        self._apply(again)
        if sharding is not None and not self._has_told:
            tone, sentence = self._verdict()
            self._host.logger.info("%s", text.one_line(f"{NAME}: {tone}. {sentence}"))
        self._has_told = sharding is not None

    def _apply(self, again: bool = False) -> None:
        """Put the model's switches to what the user asked for."""
        with self._guarded("switching"), self._lock:
            sharding = self._sharding
            if sharding is None:
                return
            sharding.mode = self._mode
            if sharding.kept_conversations != self._kept:  # setting it lets go of what is kept
                sharding.kept_conversations = self._kept
            if not self._activate:
                sharding.disable()
            elif again or not sharding.failure:
                sharding.enable()

    def _keep_in_step(self) -> None:
        self.params.update(activate=self._activate, mode=self._mode, kept_conversations=self._kept)
        if self._host is not None:
            self._host.keep_in_step(self.params, settings.defaults())

    @contextlib.contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        """Nothing of ours may stop the webui from loading or generating."""
        try:
            yield
        except Exception as error:
            failure = f"{NAME} has failed while {doing}, and switched itself off: {text.of_error(error)}"
            was_told, self._failure = failure == self._failure, failure
            sharding, self._sharding = self._sharding, None
            with contextlib.suppress(Exception):
                if not was_told:  # the panel asks once a second
                    logger().error("%s", failure, exc_info=error)
            with contextlib.suppress(Exception):
                if sharding is not None:
                    sharding.detach()


def _split(sharding: Sharding) -> str:
    """How the model is split, for people."""
    if sharding.placement.is_one_block:
        return f"all of it on GPU {sharding.placement.devices[0].index}."
    return f"{view.split(sharding.placement)}."


extension = Extension()
