""" "Measure on and off" beside a webui in use: it waits its turn, gives way, can be stopped, and changes no switch."""

from __future__ import annotations

import functools
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions.sharded_kv.engine.metering import compare
from extensions.sharded_kv.engine.transfers import ForwardState
from extensions.sharded_kv.webui import measuring
from extensions.sharded_kv.webui.state import Measurement
from tests import support
from tests.webui import hosts

IsOurs = Callable[[Any], bool]
Reply = Callable[[Any], list[list[int]]]

TOKENS = 4
PROMPT_IDS = [7, 8, 9, 10, 11]


class Tokens(dict[str, torch.Tensor]):
    """A tokenizer's output."""

    def to(self, device: Any) -> Tokens:
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})


class Tokenizer:
    """Knows one prompt, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str, return_tensors: str) -> Tokens:
        assert return_tensors == "pt"
        self.asked.append(text)
        ids = torch.tensor([PROMPT_IDS])
        return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


class Replies:
    """Sees the replies of a model begin.

    Attributes:
        count: how many have begun, by whoever.
        on: for each whether it began on forwards of ours.
        prompts: what each began from.
        at_beginning: called as one begins.
    """

    def __init__(self, model: Any, is_ours: IsOurs) -> None:
        self.count = 0
        self.on: list[bool] = []
        self.prompts: list[list[list[int]]] = []
        self.at_beginning: Callable[[], None] = lambda: None
        original = model.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.on.append(is_ours(model))
            self.prompts.append(kwargs["input_ids"].tolist())
            self.at_beginning()
            return original(*args, **kwargs)

        model.generate = generate


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement takes four short replies: each setting is counted once and timed once."""
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setattr(compare, "compare", functools.partial(compare.compare, tokens=TOKENS))


@pytest.fixture(autouse=True)
def _none_goes_on() -> Iterator[None]:
    """No test ends while a measurement goes on, whose errors would be another's."""
    yield
    ended()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def replies(model: Any, is_ours: IsOurs) -> Replies:
    return Replies(model, is_ours)


@pytest.fixture
def loaded(webui: hosts.Webui, model: Any, replies: Replies, tokenizer: Tokenizer) -> hosts.Webui:
    """The webui with a model, and a lock of which one sees that it is asked for."""
    webui.shared.generation_lock = hosts.AskedLock()
    webui.load(model, tokenizer, name="tiny-llama")
    return webui


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sharded_kv measuring"]


def ended() -> None:
    """Wait until no measurement is under way."""
    for thread in threads():
        thread.join(timeout=60)
    assert threads() == []


def measured(webui: hosts.Webui) -> Measurement:
    """Measure, and wait for the end."""
    webui.extension.measure()
    ended()
    return webui.extension.state().measurement


class Held:
    """Measures, and holds a reply of ours at its beginning while in `with`.

    Args:
        on: the first one with this setting.
    """

    def __init__(self, webui: hosts.Webui, replies: Replies, on: bool = False) -> None:
        self._there, self._go = threading.Event(), threading.Event()
        self._webui, self._replies, self._on = webui, replies, on

    def __enter__(self) -> None:
        self._replies.at_beginning = self._wait
        self._webui.extension.measure()
        assert self._there.wait(timeout=60)

    def __exit__(self, *_: Any) -> None:
        self._replies.at_beginning = lambda: None
        self._go.set()
        ended()

    def _wait(self) -> None:
        if self._replies.on[-1] is self._on:
            self._there.set()
            assert self._go.wait(timeout=60)


# --- what it gives ----------------------------------------------------------------------------------------------------


def test_both_settings_get_the_same_prompt_and_give_the_same_reply(
    loaded: hosts.Webui, tokenizer: Tokenizer, replies: Replies
) -> None:
    comparison = measured(loaded).comparison
    assert comparison is not None
    assert tokenizer.asked == [measuring.PROMPT]
    assert replies.prompts == [[PROMPT_IDS]] * 4
    assert len(comparison.off.reply) == TOKENS
    assert comparison.off.reply == comparison.on.reply


def test_it_says_what_it_measured_on(loaded: hosts.Webui) -> None:
    result = measured(loaded)
    assert (result.phase, result.message) == ("done", "")
    assert result.model == "tiny-llama"
    assert (result.done, result.of) == (4, 4)


def test_gpus_of_one_name_are_counted(loaded: hosts.Webui, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.devices, "name", lambda device: "NVIDIA GeForce RTX 4090")
    assert measured(loaded).gpu == "2x NVIDIA GeForce RTX 4090"


def test_off_is_accelerate_and_on_is_ours(loaded: hosts.Webui, replies: Replies) -> None:
    loaded.extension.set_mode("eager")  # of a reply this short, graph mode runs most steps twice
    comparison = measured(loaded).comparison
    assert replies.on == [False, True, False, True]
    assert comparison is not None
    assert comparison.off.bytes_per_token > comparison.on.bytes_per_token


@pytest.mark.parametrize("activate", [True, False], ids=["on", "off"])
def test_it_leaves_the_switch_as_the_user_set_it(
    loaded: hosts.Webui, model: Any, is_ours: IsOurs, activate: bool
) -> None:
    loaded.extension.set_activate(activate)
    assert measured(loaded).phase == "done"
    assert loaded.extension.state().activate is activate
    assert loaded.extension.state().tone == ("on" if activate else "off")
    assert is_ours(model) is activate


def test_the_tokens_of_a_later_reply_are_right(
    loaded: hosts.Webui, model: Any, reply: Reply, right: list[list[int]]
) -> None:
    measured(loaded)
    assert reply(model) == right


def test_it_can_be_done_again_and_keeps_the_last_result_meanwhile(loaded: hosts.Webui, replies: Replies) -> None:
    first = measured(loaded).comparison
    with Held(loaded, replies):
        assert loaded.extension.state().measurement.comparison is first
    second = loaded.extension.state().measurement
    assert second.phase == "done"
    assert second.comparison is not first


def test_without_a_model_that_is_spread_nothing_is_measured(webui: hosts.Webui) -> None:
    assert measured(webui).phase == "idle"
    webui.load(object())
    assert measured(webui).phase == "idle"


def test_without_a_lock_as_in_may_2023_it_measures_all_the_same(
    open_webui: Callable[..., hosts.Webui], model: Any, tokenizer: Tokenizer
) -> None:
    webui = open_webui(hosts.MAY_2023)
    webui.start()
    webui.load(model, tokenizer)
    assert measured(webui).phase == "done"


# --- whose turn it is -------------------------------------------------------------------------------------------------


def test_it_waits_for_a_reply_that_holds_the_lock(loaded: hosts.Webui, replies: Replies) -> None:
    lock = loaded.shared.generation_lock
    with lock:
        lock.asked.clear()
        loaded.extension.measure()
        assert lock.asked.wait(timeout=60)
        state = loaded.extension.state().measurement
        assert (state.phase, state.done, replies.count) == ("waiting", 0, 0)
    ended()
    assert loaded.extension.state().measurement.phase == "done"


class Lockless:
    """A user's reply that takes no lock, and goes on while in `with`, in which a measurement waits for it.

    Attributes:
        go: lets it go on, and end.
    """

    def __init__(self, webui: hosts.Webui, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self._webui, self._monkeypatch = webui, monkeypatch
        self._written, self._waited_for = threading.Event(), threading.Event()
        model = webui.shared.model
        self._hook = model.model.norm.register_forward_pre_hook(self._hold)
        self._thread = threading.Thread(target=support.GREEDY.run, args=(model, place), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._written.wait(timeout=60)
        self._monkeypatch.setattr(measuring, "time", SimpleNamespace(sleep=self._sleep))
        self._webui.extension.measure()
        assert self._waited_for.wait(timeout=60)

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()
        self.go.set()
        self._thread.join(timeout=60)
        ended()

    def _hold(self, *_: Any) -> None:
        self._written.set()
        assert self.go.wait(timeout=60)

    def _sleep(self, seconds: float) -> None:
        self._waited_for.set()
        assert self.go.wait(timeout=60)
        time.sleep(seconds)  # whoever asks without a break keeps Python's lock from the reply, for a minute


def test_it_waits_for_a_reply_that_takes_no_lock(
    loaded: hosts.Webui, replies: Replies, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lockless(loaded, places[0], monkeypatch):
        assert loaded.extension.state().measurement.phase == "waiting"
        assert replies.count == 1  # the user's
    assert loaded.extension.state().measurement.phase == "done"


def test_while_it_waits_it_keeps_nobody_from_replying(
    loaded: hosts.Webui, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = loaded.shared.generation_lock
    with Lockless(loaded, places[0], monkeypatch):
        assert lock.acquire(timeout=1)
        lock.release()


@pytest.mark.parametrize("activate", [True, False], ids=["on", "off"])
def test_a_users_reply_gets_the_lock_between_two_of_ours_and_runs_with_the_users_switch(
    loaded: hosts.Webui,
    model: Any,
    replies: Replies,
    places: list[str],
    right: list[list[int]],
    is_ours: IsOurs,
    activate: bool,
) -> None:
    """It asks for the lock while a reply of ours runs with the other setting."""
    loaded.extension.set_activate(activate)
    lock = loaded.shared.generation_lock
    found: dict[str, Any] = {}

    def users_reply() -> None:
        with lock:
            found["is ours"] = is_ours(model)
            found["replies before"] = replies.count
            found["tokens"] = support.GREEDY.run(model, places[0]).tokens.tolist()
            found["is ours afterwards"] = is_ours(model)

    user = threading.Thread(target=users_reply, daemon=True)

    def ask() -> None:
        if is_ours(model) is not activate and user.ident is None:
            lock.asked.clear()
            user.start()
            assert lock.asked.wait(timeout=60)

    replies.at_beginning = ask
    assert measured(loaded).phase == "done"
    user.join(timeout=60)
    # Off comes first: with the switch on, the first reply of ours is the one that the user waits for.
    assert found == {
        "is ours": activate,
        "replies before": 1 if activate else 2,
        "tokens": right,
        "is ours afterwards": activate,
    }


def test_two_starts_make_one_measurement(loaded: hosts.Webui, replies: Replies) -> None:
    with Held(loaded, replies):
        loaded.extension.measure()
        assert len(threads()) == 1
    assert replies.count == 4


def test_two_browsers_see_the_same(loaded: hosts.Webui, replies: Replies) -> None:
    with Held(loaded, replies):
        one, other = (hosts.in_thread(lambda: loaded.extension.state().measurement) for _ in range(2))
        assert one == other
        assert (one.phase, one.done, one.of) == ("running", 0, 4)


# --- how it ends early ------------------------------------------------------------------------------------------------


def test_it_can_be_cancelled_while_it_waits(loaded: hosts.Webui, replies: Replies) -> None:
    with loaded.shared.generation_lock:
        loaded.extension.measure()
        loaded.extension.cancel_measuring()
        ended()
    state = loaded.extension.state()
    assert (state.measurement.phase, state.measurement.message) == ("cancelled", "Cancelled.")
    assert (state.tone, replies.count) == ("on", 0)


@pytest.mark.parametrize("activate", [True, False], ids=["on", "off"])
def test_it_can_be_cancelled_while_it_runs(
    loaded: hosts.Webui, model: Any, replies: Replies, is_ours: IsOurs, activate: bool
) -> None:
    loaded.extension.set_activate(activate)
    with Held(loaded, replies):
        loaded.extension.cancel_measuring()
    state = loaded.extension.state().measurement
    assert (state.phase, state.message, state.done) == ("cancelled", "Cancelled.", 0)
    assert is_ours(model) is activate
    assert loaded.shared.generation_lock.acquire(timeout=1)


def test_cancelling_when_there_is_nothing_does_nothing(loaded: hosts.Webui) -> None:
    loaded.extension.cancel_measuring()
    assert measured(loaded).phase == "done"
    loaded.extension.cancel_measuring()
    assert loaded.extension.state().measurement.phase == "done"


def test_after_a_cancelled_one_another_can_be_made(loaded: hosts.Webui, replies: Replies) -> None:
    with Held(loaded, replies):
        loaded.extension.cancel_measuring()
    assert (measured(loaded).phase, measured(loaded).message) == ("done", "")


def unload(webui: hosts.Webui) -> None:
    webui.unload()


def load_another(webui: hosts.Webui) -> None:
    webui.load(object())


def untick(webui: hosts.Webui) -> None:
    webui.restart(ticked=[])


def switch_off(webui: hosts.Webui) -> None:
    webui.extension.set_activate(False)


def choose_a_mode(webui: hosts.Webui) -> None:
    webui.extension.set_mode("eager")


@pytest.mark.parametrize(
    ("happens", "word"),
    [(unload, "model"), (load_another, "model"), (untick, ""), (switch_off, "switched"), (choose_a_mode, "mode")],
)
def test_what_changes_the_model_under_it_cancels_it_with_a_message(
    loaded: hosts.Webui, replies: Replies, happens: Callable[[hosts.Webui], None], word: str
) -> None:
    with Held(loaded, replies):
        happens(loaded)
    state = loaded.extension.state().measurement
    assert state.phase == "cancelled"
    assert state.message.startswith("Cancelled")
    assert word in state.message
    assert replies.count == 1
    assert loaded.lines.of("ERROR") == []


@pytest.mark.parametrize("happens", [unload, load_another, untick])
def test_a_model_that_is_let_go_of_while_it_is_measured_has_nothing_of_ours_left(
    webui: hosts.Webui,
    model: Any,
    replies: Replies,
    tokenizer: Tokenizer,
    happens: Callable[[hosts.Webui], None],
) -> None:
    traces = hosts.Traces(model)
    webui.load(model, tokenizer)
    with Held(webui, replies):
        happens(webui)
    assert traces.left == []


@pytest.mark.parametrize("happens", [unload, untick])
def test_a_model_that_is_let_go_of_while_its_measurement_waits_has_nothing_of_ours_left(
    webui: hosts.Webui, model: Any, tokenizer: Tokenizer, happens: Callable[[hosts.Webui], None]
) -> None:
    traces = hosts.Traces(model)
    webui.load(model, tokenizer)
    with webui.shared.generation_lock:
        webui.extension.measure()
        happens(webui)
    ended()
    assert traces.left == []


def test_switching_off_while_the_on_setting_is_measured_leaves_it_off(
    loaded: hosts.Webui, model: Any, replies: Replies, is_ours: IsOurs
) -> None:
    def switch_when_on() -> None:
        if is_ours(model):
            loaded.extension.set_activate(False)

    replies.at_beginning = switch_when_on
    assert measured(loaded).phase == "cancelled"
    assert loaded.extension.state().tone == "off"
    assert not is_ours(model)


def test_a_model_that_was_measured_dies_when_it_is_unloaded(
    webui: hosts.Webui, build: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    webui.load(build(), tokenizer)
    assert measured(webui).phase == "done"
    dead = weakref.ref(webui.shared.model)
    webui.unload()
    gc.collect()
    assert dead() is None


def restart(webui: hosts.Webui) -> None:
    webui.restart()


def assign_again(webui: hosts.Webui) -> None:
    webui.shared.model = webui.shared.model.eval()


@pytest.mark.parametrize("activate", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("happens", [restart, assign_again])
def test_what_leaves_the_model_as_it_is_does_not_falsify_it(
    loaded: hosts.Webui, replies: Replies, happens: Callable[[hosts.Webui], None], activate: bool
) -> None:
    """Either it goes on as if nothing had happened, or it is cancelled."""
    undisturbed = measured(loaded).comparison
    assert undisturbed is not None
    loaded.extension.set_activate(activate)
    with Held(loaded, replies, on=not activate):
        happens(loaded)
    state = loaded.extension.state().measurement
    comparison = state.comparison
    assert comparison is not None
    assert state.phase == "cancelled" or (
        comparison.off.copies_per_token == undisturbed.off.copies_per_token
        and comparison.on.copies_per_token == undisturbed.on.copies_per_token
    )


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_fails_is_said(loaded: hosts.Webui, model: Any, is_ours: IsOurs) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no vocabulary")

    loaded.shared.tokenizer = fail
    state = measured(loaded)
    assert state.phase == "failed"
    assert "no vocabulary" in state.message
    assert is_ours(model)
    assert (len(loaded.lines.of("ERROR")), loaded.lines.tracebacks) == (1, 1)


def test_no_tokenizer_at_all_is_said(loaded: hosts.Webui) -> None:
    loaded.shared.tokenizer = None
    state = measured(loaded)
    assert state.phase == "failed"
    assert state.message.startswith("Measuring failed")


@pytest.mark.parametrize("activate", [True, False], ids=["on", "off"])
def test_a_reply_that_fails_is_said_and_the_switch_is_as_the_user_set_it(
    loaded: hosts.Webui, model: Any, replies: Replies, is_ours: IsOurs, activate: bool
) -> None:
    def fail() -> None:
        raise MemoryError("no room for the cache")

    loaded.extension.set_activate(activate)
    replies.at_beginning = fail
    state = measured(loaded)
    assert state.phase == "failed"
    assert "no room for the cache" in state.message
    assert is_ours(model) is activate
    assert loaded.shared.generation_lock.acquire(timeout=1)


def test_sharding_that_gives_up_meanwhile_is_said_and_not_switched_on_again(
    loaded: hosts.Webui, model: Any, is_ours: IsOurs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ForwardState, "move_inputs", None)
    assert "Switched off after an error" in measured(loaded).message
    assert loaded.extension.state().tone == "failed"
    assert not is_ours(model)


def test_after_one_that_failed_another_can_be_made(loaded: hosts.Webui, tokenizer: Tokenizer) -> None:
    loaded.shared.tokenizer = None
    assert measured(loaded).phase == "failed"
    loaded.shared.tokenizer = tokenizer
    assert (measured(loaded).phase, measured(loaded).message) == ("done", "")


def test_one_that_cannot_begin_does_not_stand_in_the_way_of_another(
    loaded: hosts.Webui, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "threading", SimpleNamespace(Thread=fail))
        loaded.extension.measure()
    assert not loaded.extension.state().measurement.under_way
    loaded.extension.set_activate(True)
    assert measured(loaded).phase == "done"
