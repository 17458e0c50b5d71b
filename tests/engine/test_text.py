"""What others named, put into words of ours."""

from __future__ import annotations

import pytest

from extensions.sharded_kv.engine import text


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\u2028", "\x0b", "\x1b[2K\r"])
def test_a_text_is_one_line_whatever_breaks_it(line_break: str) -> None:
    line = text.one_line(f"all is well{line_break}ERROR all is lost")
    assert line.isprintable()
    assert line.splitlines() == [line]


def test_a_text_of_one_line_stays_as_it_is() -> None:
    assert text.one_line("8 blocks on GPU 0, \u00e9") == "8 blocks on GPU 0, \u00e9"


def test_an_error_is_its_kind_and_message() -> None:
    assert text.of_error(ValueError("no\nroom")) == "ValueError: no room"


def test_an_error_whose_message_cannot_be_had_is_its_kind() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise TypeError

    assert text.of_error(Mute()) == "Mute: its message cannot be read"


def test_a_value_is_as_python_writes_it() -> None:
    assert text.of_value(["eager", 3]) == "['eager', 3]"


def test_a_long_value_is_cut_short() -> None:
    assert len(text.of_value(["x" * 1000] * 1000)) <= 60
