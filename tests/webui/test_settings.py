"""The extension's parameters: read from settings.yaml, kept in step with the panel, and saved as one sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from extensions.sharded_kv.engine.sharding import MODES
from extensions.sharded_kv.webui import settings
from tests.webui import hosts

OpenWebui = Callable[..., hosts.Webui]

each_version = pytest.mark.parametrize("version", hosts.VERSIONS, ids=str)
DEFAULTS = {"activate": True, "mode": "graph", "display_name": "Sharded KV", "is_tab": True, "kept_conversations": 1}
# Where settings.yaml names a parameter with its default, every version of the webui saves it.
IN_THE_FILE = {f"{hosts.NAME}-{name}": value for name, value in DEFAULTS.items()}


def test_the_defaults_are_on_and_graph_in_a_tab_of_its_own() -> None:
    assert settings.defaults() == DEFAULTS


def test_nobody_else_changes_the_defaults() -> None:
    settings.defaults()["activate"] = False
    assert settings.defaults()["activate"] is True


BAD = [
    ("activate", "yes", "true or false"),
    ("activate", 1, "true or false"),
    ("activate", None, "true or false"),
    ("mode", "turbo", " or ".join(MODES)),
    ("mode", "EAGER", " or ".join(MODES)),
    ("mode", ["eager"], " or ".join(MODES)),
    ("mode", None, " or ".join(MODES)),
    ("kept_conversations", True, "a whole number from 0 to 16"),
    ("kept_conversations", -1, "a whole number from 0 to 16"),
    ("kept_conversations", "2", "a whole number from 0 to 16"),
    ("display_name", "  ", "a text"),
    ("display_name", 7, "a text"),
    ("is_tab", "true", "true or false"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_bad_value_gives_one_warning_and_the_default(name: str, value: Any, allowed: str) -> None:
    params = {**settings.defaults(), name: value}
    warnings: list[str] = []
    settings.correct(params, "sharded_kv", warnings.append)
    assert params == DEFAULTS
    (warning,) = warnings
    assert f"sharded_kv-{name}" in warning
    assert allowed in warning
    assert repr(DEFAULTS[name]) in warning


def test_each_bad_value_gets_its_own_warning() -> None:
    params = {**settings.defaults(), "activate": "no", "mode": 3}
    warnings: list[str] = []
    settings.correct(params, "sharded_kv", warnings.append)
    assert len(warnings) == 2


def test_a_long_bad_value_does_not_flood_the_log() -> None:
    params = {**settings.defaults(), "mode": "x" * 10_000}
    warnings: list[str] = []
    settings.correct(params, "sharded_kv", warnings.append)
    assert len(warnings[0]) < 300


def test_a_bad_value_that_yamls_aliases_make_endless_is_not_written_out() -> None:
    bomb: list[Any] = ["lol"]
    for _ in range(40):  # 10 ** 40 words
        bomb = [bomb] * 10
    warnings: list[str] = []
    settings.correct({**settings.defaults(), "mode": bomb}, "sharded_kv", warnings.append)
    assert len(warnings[0]) < 300


def test_good_values_stay_without_a_word() -> None:
    good = {"activate": False, "mode": "eager", "display_name": "Many GPUs", "is_tab": False, "kept_conversations": 3}
    params, warnings = dict(good), list[str]()
    settings.correct(params, "sharded_kv", warnings.append)
    assert params == good
    assert warnings == []


@each_version
def test_settings_yaml_is_heard(version: hosts.Version, open_webui: OpenWebui, model: Any) -> None:
    webui = open_webui(version, settings={"sharded_kv-activate": False, "sharded_kv-display_name": "Many GPUs"})
    webui.start()
    webui.load(model)
    assert webui.extension.params == {**DEFAULTS, "activate": False, "display_name": "Many GPUs"}
    assert webui.extension.state().activate is False
    assert webui.extension.state().tone == "off"


@each_version
def test_whoever_has_eager_in_settings_yaml_keeps_it(version: hosts.Version, open_webui: OpenWebui, model: Any) -> None:
    webui = open_webui(version, settings={"sharded_kv-mode": "eager"})
    webui.start()
    webui.load(model)
    webui.restart()
    assert webui.extension.state().mode == "eager"
    assert "(eager mode)" in webui.extension.state().sentence


@pytest.mark.parametrize("in_file", [None, *MODES])
@pytest.mark.parametrize("shown", MODES)
@pytest.mark.parametrize("version", [hosts.V2, hosts.V4], ids=str)
def test_the_mode_that_one_saves_is_the_one_that_one_sees(
    version: hosts.Version, open_webui: OpenWebui, in_file: str | None, shown: str
) -> None:
    webui = open_webui(version, settings={} if in_file is None else {"sharded_kv-mode": in_file})
    webui.start()
    webui.extension.set_mode(shown)
    webui.restart()
    assert reopened(open_webui, webui).extension.state().mode == shown


@each_version
def test_a_bad_value_in_settings_yaml_is_warned_of_once_however_often_the_interface_starts(
    version: hosts.Version, open_webui: OpenWebui, model: Any
) -> None:
    webui = open_webui(version, settings={"sharded_kv-activate": "perhaps"})
    webui.start()
    webui.load(model)
    webui.restart()
    webui.restart()
    (warning,) = webui.lines.of("WARNING")
    assert "sharded_kv-activate" in warning
    assert webui.extension.state().tone == "on"


@each_version
@pytest.mark.parametrize("in_file", [True, False])
def test_after_a_restart_of_the_interface_the_live_switch_wins(
    version: hosts.Version, open_webui: OpenWebui, in_file: bool
) -> None:
    webui = open_webui(version, settings={"sharded_kv-activate": in_file})
    webui.start()
    webui.extension.set_activate(not in_file)
    webui.restart()
    assert webui.extension.state().activate is not in_file
    assert webui.extension.params["activate"] is not in_file
    assert all(script.params["activate"] is not in_file for script in webui.scripts.values())


def test_the_webui_sees_the_switch_move(webui: hosts.Webui) -> None:
    (script,) = webui.scripts.values()
    webui.extension.set_activate(False)
    assert script.params["activate"] is False
    webui.extension.set_activate(True)
    assert script.params["activate"] is True


def reopened(open_webui: OpenWebui, webui: hosts.Webui) -> hosts.Webui:
    """The next process of the webui, after the user has saved what is in this one."""
    after = open_webui(webui.version, settings=webui.save_settings())
    after.start()
    return after


@pytest.mark.parametrize("in_file", [None, True, False], ids=["not-in-the-file", "on-in-the-file", "off-in-the-file"])
@pytest.mark.parametrize("shown", [True, False], ids=["switched-on", "switched-off"])
@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("version", [hosts.V2, hosts.V4], ids=str)
def test_what_one_saves_is_what_one_sees(
    version: hosts.Version, open_webui: OpenWebui, in_file: bool | None, shown: bool, restarts: int
) -> None:
    webui = open_webui(version, settings={} if in_file is None else {"sharded_kv-activate": in_file})
    webui.start()
    webui.extension.set_activate(not shown)
    webui.extension.set_activate(shown)
    for _ in range(restarts):
        webui.restart()
    assert reopened(open_webui, webui).extension.state().activate is shown


@pytest.mark.parametrize("shown", [True, False], ids=["switched-on", "switched-off"])
@pytest.mark.parametrize("version", [hosts.MAY_2023, hosts.OCTOBER_2023], ids=str)
def test_in_2023_what_one_saves_is_what_one_sees_if_the_file_names_it(
    version: hosts.Version, open_webui: OpenWebui, shown: bool
) -> None:
    webui = open_webui(version, settings=dict(IN_THE_FILE))
    webui.start()
    webui.extension.set_activate(shown)
    assert reopened(open_webui, webui).extension.state().activate is shown


@pytest.mark.parametrize("version", [hosts.V2, hosts.V4], ids=str)
def test_nothing_is_saved_that_nobody_changed(version: hosts.Version, open_webui: OpenWebui) -> None:
    webui = open_webui(version)
    webui.start()
    webui.restart()
    assert not [key for key in webui.save_settings() if key.startswith("sharded_kv-")]


@pytest.mark.parametrize("version", [hosts.V2, hosts.V4], ids=str)
def test_a_bad_value_is_saved_as_the_default_that_stands_for_it(version: hosts.Version, open_webui: OpenWebui) -> None:
    webui = open_webui(version, settings={"sharded_kv-mode": "turbo"})
    webui.start()
    after = reopened(open_webui, webui)
    assert after.extension.params == DEFAULTS
    assert after.lines.of("WARNING") == []


def test_settings_of_others_stay_as_they_are(open_webui: OpenWebui) -> None:
    others = {"silero_tts-activate": True, "activate": "theirs"}
    webui = open_webui(settings=others)
    webui.start()
    webui.extension.set_activate(False)
    assert {key: webui.shared.settings[key] for key in others} == others
    assert webui.shared.settings["mode"] == "instruct"
