"""A chat in the webui: what is said already is not read again, and the panel says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from extensions.sharded_kv.engine import compat
from tests import support
from tests.webui import hosts
from tools import models

if not compat.has_cache_objects():
    pytest.skip("this transformers keeps caches in tuples", allow_module_level=True)

Text = list[int]
SYSTEM, NEW = list(range(10, 22)), 6


class Chat:
    """Somebody who chats with a model, as the webui asks it: each prompt is all that was said.

    Args:
        model: replies.
        place: where it takes its prompts.
        start: what comes first.
    """

    def __init__(self, model: Any, place: str, start: Text) -> None:
        self.model, self.place, self.said = model, place, list(start)
        self.prompt: Text = []

    def say(self, message: Text) -> Text:
        self.said += message
        return self.reply()

    def reply(self) -> Text:
        """What the model adds."""
        self.prompt = list(self.said)
        given = torch.tensor([self.prompt], device=self.place)
        with torch.no_grad():
            out = self.model.generate(
                inputs=given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
            )
        new: Text = out[0, given.shape[1] :].tolist()
        self.said += new
        return new

    def regenerate(self) -> Text:
        self.said = list(self.prompt)
        return self.reply()

    def right(self) -> Text:
        """The latest reply, of the same model on the CPU."""
        given = torch.tensor([self.prompt])
        with torch.no_grad():
            out = models.build("llama").generate(given, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        new: Text = out[0, given.shape[1] :].tolist()
        return new


@pytest.fixture
def chat(webui: hosts.Webui, model: Any, places: list[str]) -> Chat:
    webui.load(model)
    return Chat(model, places[0], SYSTEM)


@pytest.fixture
def read(webui: hosts.Webui) -> Callable[[], tuple[int, int]]:
    """How many tokens the latest prompt had, and how many of them were kept."""

    def figures() -> tuple[int, int]:
        now = webui.extension.state().snapshot.current
        return now.prompt_tokens, now.kept_tokens

    return figures


def test_the_next_message_reads_only_what_is_new(chat: Chat, read: Any, webui: hosts.Webui) -> None:
    assert chat.say([30, 31, 32]) == chat.right()
    assert read() == (15, 0)
    assert chat.say([33, 34]) == chat.right()
    assert read() == (23, 15 + NEW - 2)
    assert webui.lines.of("ERROR") == []


def test_a_reply_is_regenerated_from_its_prompt(chat: Chat, read: Any) -> None:
    first = chat.say([30, 31, 32])
    assert chat.regenerate() == first == chat.right()
    assert read() == (15, 14)


def test_a_reply_goes_on_where_it_ended(chat: Chat, read: Any) -> None:
    chat.say([30, 31, 32])
    assert chat.reply() == chat.right()
    assert read() == (21, 15 + NEW - 2)


def test_a_message_is_written_in_the_users_name(chat: Chat, read: Any) -> None:
    chat.say([30, 31, 32])
    assert chat.say([40]) == chat.right()  # "You:", and the model goes on
    assert read() == (22, 15 + NEW - 2)


def test_two_conversations_over_the_api_are_both_kept_if_one_says_so(
    open_webui: Any, model: Any, places: list[str]
) -> None:
    webui = open_webui(hosts.V4, settings={"sharded_kv-kept_conversations": 2})
    webui.start()
    webui.load(model)
    chats = [Chat(model, places[0], [seed, *SYSTEM]) for seed in (5, 6)]
    found = []
    for _ in range(3):
        for chat in chats:
            assert chat.say([50]) == chat.right()
            found.append(webui.extension.state().snapshot.current.kept_tokens > 0)
    assert found == [False, False, True, True, True, True]


def test_by_default_one_conversation_is_kept(webui: hosts.Webui, model: Any, places: list[str]) -> None:
    webui.load(model)
    chats = [Chat(model, places[0], [seed, *SYSTEM]) for seed in (5, 6)]
    for chat in (*chats, *chats):
        assert chat.say([50]) == chat.right()
        assert webui.extension.state().snapshot.current.kept_tokens == 0
    chats[1].say([51])
    assert webui.extension.state().snapshot.current.kept_tokens > 0


def test_unticked_nothing_is_kept(chat: Chat, read: Any, webui: hosts.Webui) -> None:
    webui.extension.set_keep(False)
    assert webui.extension.state().keep is False
    chat.say([30, 31, 32])
    assert webui.extension.state().snapshot.kept_tokens == 0
    chat.say([33])
    assert read()[1] == 0


def test_ticked_again_as_many_are_kept_as_the_settings_say(open_webui: Any, model: Any) -> None:
    webui = open_webui(hosts.V4, settings={"sharded_kv-kept_conversations": 3})
    webui.start()
    webui.load(model)
    assert webui.extension.params["kept_conversations"] == 3
    webui.extension.set_keep(False)
    assert webui.extension.params["kept_conversations"] == 0
    webui.extension.set_keep(True)
    assert webui.extension.params["kept_conversations"] == 3


def test_the_button_lets_go_of_what_is_kept(chat: Chat, webui: hosts.Webui) -> None:
    chat.say([30, 31, 32])
    assert webui.extension.state().snapshot.kept_tokens == 15 + NEW - 1
    webui.extension.drop_kept()
    assert webui.extension.state().snapshot.kept_tokens == 0


@pytest.mark.parametrize("what", ["unload", "other"])
def test_a_model_that_goes_takes_what_is_kept_with_it(
    chat: Chat, webui: hosts.Webui, build: Callable[..., Any], devices: support.Devices, what: str
) -> None:
    sharding = webui.extension._sharding
    chat.say([30, 31, 32])
    assert sharding.meter.snapshot().kept_tokens > 0
    webui.load(None if what == "unload" else build(seed=1))
    assert sharding.meter.snapshot().kept_tokens == 0
