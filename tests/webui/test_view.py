"""What the panel's HTML says, for which facts."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.sharded_kv.engine.metering.compare import Comparison, Measured
from extensions.sharded_kv.engine.metering.figures import DeviceMemory, Figures, Snapshot, Token
from extensions.sharded_kv.engine.placement import Block, Placement, Stage
from extensions.sharded_kv.engine.transfers import Traffic
from extensions.sharded_kv.webui import view
from extensions.sharded_kv.webui.state import Measurement, PanelState

CSS = (Path(view.__file__).parent / "panel.css").read_text(encoding="utf-8")
GIB = 1024**3
any_time = settings(deadline=None)  # other tests may have the machine busy
DASH = "\u2013"
ON = Figures(seconds_per_token=0.0214, first_token_seconds=0.312, bytes_per_token=33280, copies_per_token=5, tokens=32)
OFF = Figures(0.0289, 0.402, 111206, 19.8, 32)


# --- facts to draw, and ways to read what was drawn -------------------------------------------------------------------


def tokens(*runs: tuple[bool, int], seconds: float = 0.02) -> tuple[Token, ...]:
    """Tokens of runs like (sharded, how many)."""
    return tuple(Token(0.0, seconds, sharded) for sharded, count in runs for _ in range(count))


def memory(device: str = "cuda:0", name: str = "NVIDIA H100", **amounts: int) -> DeviceMemory:
    shares = {"weights": 6 * GIB, "cache": GIB // 2, "rest": GIB, "others": 0, "free": 16 * GIB} | amounts
    peak = shares.pop("peak", 7 * GIB)
    return DeviceMemory(device, name, **shares, total=sum(shares.values()), peak=peak)


def placed(*stages: tuple[str, list[str]]) -> Placement:
    """A placement of stages like ("cuda:0", ["model.embed", "model.layers.0"])."""
    places = [(torch.device(device), names) for device, names in stages]
    return Placement(tuple(Stage(place, tuple(Block(name, place) for name in names)) for place, names in places))


def layers(first: int, last: int) -> list[str]:
    return [f"model.layers.{number}" for number in range(first, last + 1)]


SPREAD = placed(("cuda:0", ["model.embed", *layers(0, 15)]), ("cuda:1", [*layers(16, 31), "model.norm", "lm_head"]))


def snapshot(**facts: Any) -> Snapshot:
    default = Snapshot(
        sharded=ON,
        unsharded=OFF,
        current=ON,
        generating=True,
        memory=(memory("cuda:0"), memory("cuda:1")),
        tokens=tokens((False, 20), (True, 30)),
        traffic=Traffic({}, {}),
    )
    return dataclasses.replace(default, **facts)


def state(**facts: Any) -> PanelState:
    default = PanelState(
        activate=True,
        mode="eager",
        tone="on",
        sentence="It is on.",
        model="llama",
        placement=SPREAD,
        snapshot=snapshot(),
    )
    return dataclasses.replace(default, **facts)


def compared(off: float | None = 0.0289, on: float | None = 0.0214, **facts: Any) -> Measurement:
    comparison = Comparison(
        off=Measured(off, 0.402, 111206, 19.8, {"cuda:0": 8 * GIB, "cuda:1": 8 * GIB}, (1, 2)),
        on=Measured(on, 0.312, 33280, 5, {"cuda:0": 7 * GIB, "cuda:1": 7 * GIB}, (1, 2)),
    )
    default = Measurement(phase="done", done=12, of=12, gpu="2x H100", model="llama", comparison=comparison)
    return dataclasses.replace(default, **facts)


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    text: str = ""

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class Page(HTMLParser):
    """HTML as a browser would understand it; fails on a tag that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open[-1] if self.open else None)
        assert len(element.attributes) == len(attrs)
        self.elements.append(element)
        self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, name: str) -> list[Element]:
        """Elements of a class, or of a tag."""
        return [element for element in self.elements if name in (*element.classes, element.tag)]

    def one(self, name: str) -> Element:
        (element,) = self.all(name)
        return element

    @property
    def text(self) -> str:
        return "".join(element.text for element in self.elements if element.parent is None)

    @property
    def shape(self) -> list[tuple[str, list[str], tuple[str, ...]]]:
        """Everything but the words."""
        return [(element.tag, element.classes, tuple(element.attributes)) for element in self.elements]


def live(**facts: Any) -> Page:
    return Page(view.live(state(snapshot=snapshot(**facts))))


def tile(page: Page, label: str) -> str:
    return next(element.text for element in page.all("skv-tile") if element.text.startswith(label))


def blocks(*stages: tuple[str, list[str]]) -> list[str]:
    page = Page(view.live(state(placement=placed(*stages))))
    return [element.text for element in page.all("skv-blocks")]


def style(element: Element, name: str) -> float:
    """The number in ``style="width:12.5%"``."""
    match = re.search(rf"(?:^|;){name}:([-0-9.e]+)", element.attributes["style"])
    assert match
    return float(match[1])


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [view.status, view.live, view.measurement])
def test_everything_is_inside_one_element_that_the_style_sheet_knows(draw: Any) -> None:
    page = Page(draw(state(measurement=compared())))
    assert [element.classes for element in page.elements if element.parent is None] == [["sharded_kv-panel"]]


@pytest.mark.parametrize("draw", [view.status, view.live, view.measurement])
def test_html_is_a_plain_string_to_which_more_html_can_be_added(draw: Any) -> None:
    assert (draw(state(measurement=compared())) + "<b>").endswith("<b>")


NASTY = st.text(min_size=1) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "\"' onmouseover='x",
        "&lt;b&gt;&amp;amp;",
        "{0.__class__}",
        "%s%d",
        "</div>",
        "<!--",
        "a\nb",
    ]
)


@any_time
@given(nasty=NASTY)
def test_a_text_from_outside_stays_text(nasty: str) -> None:
    def draw(text: str) -> Page:
        facts = state(
            sentence=text,
            model=text,
            placement=placed(("cuda:0", [text]), ("cuda:1", ["other"])),
            snapshot=snapshot(memory=(memory(name=text),)),
            measurement=compared(phase="failed", message=text, model=text, gpu=text),
        )
        return Page(view.status(facts) + view.live(facts) + view.measurement(facts))

    page = draw(nasty)
    assert page.shape == draw("plain").shape
    assert page.one("skv-sentence").text == nasty
    assert page.one("skv-model").text == page.one("skv-model").attributes["title"] == nasty
    assert page.one("skv-product").text == page.one("skv-product").attributes["title"] == nasty
    assert page.one("skv-message").text == nasty
    assert page.all("skv-stage")[0].attributes["title"] == nasty
    assert page.all("td")[0].text == nasty
    assert page.all("td")[1].text == f"{nasty}, accelerate"


def test_a_full_chart_and_two_gpus_are_under_20_kilobytes() -> None:
    noisy = tuple(Token(0.0, 0.02 + 0.0001 * (i * 37 % 101), i // 32 % 2 == 0) for i in range(512))
    assert len(view.live(state(snapshot=snapshot(tokens=noisy))).encode()) < 20_000


def test_a_thousand_stages_are_under_20_kilobytes() -> None:
    stages = [(f"cuda:{number % 2}", [f"model.layers.{number}"]) for number in range(1000)]
    assert len(view.live(state(placement=placed(*stages))).encode()) < 20_000


# --- the sentence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tone", "word"), [("on", "On"), ("off", "Off"), ("idle", "Idle"), ("failed", "Failed")])
def test_the_tone_is_said_in_a_word(tone: str, word: str) -> None:
    assert Page(view.status(state(tone=tone))).one("skv-sign").text == word


def test_the_sentence_is_announced() -> None:
    assert Page(view.status(state())).one("skv-status").attributes["role"] == "status"


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("Seconds / token", "0.0214 s"),
        ("Tokens / second", "46.7"),
        ("First token", "0.312 s"),
        ("Between GPUs / token", "32.5 KiB"),
    ],
)
def test_each_latest_figure_has_a_tile(label: str, value: str) -> None:
    assert value in tile(live(), label)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("Seconds / token", "off 0.0289 s"),
        ("Tokens / second", "off 34.6"),
        ("First token", "off 0.402 s"),
        ("Between GPUs / token", "off 109 KiB"),
    ],
)
def test_each_figure_stands_beside_its_last_value_with_sharding_off(label: str, value: str) -> None:
    assert value in tile(live(), label)


def test_with_sharding_off_the_figures_stand_beside_the_last_ones_with_it_on() -> None:
    seconds = tile(live(current=OFF), "Seconds / token")
    assert "sharding off0.0289 s" in seconds
    assert "on 0.0214 s" in seconds


@pytest.mark.parametrize(
    ("on", "off", "words"),
    [
        (0.02, 0.027, "1.35x faster"),
        (0.027, 0.02, "1.35x slower"),
        (0.02, 0.16, "8.00x faster"),
        (0.02, 0.25, "12.5x faster"),
        (0.02, 0.02001, "no difference"),
    ],
)
def test_how_much_faster_is_said_in_words(on: float, off: float, words: str) -> None:
    page = live(sharded=Figures(on), unsharded=Figures(off), current=Figures(on))
    assert page.one("skv-remark").text == words


@pytest.mark.parametrize("unsharded", [None, Figures()])
def test_nothing_is_faster_than_what_was_not_measured(unsharded: Figures | None) -> None:
    page = live(unsharded=unsharded)
    assert page.one("skv-remark").text == "No reply with sharding off yet."
    assert f"off {DASH}" in tile(page, "Seconds / token")


def test_a_reply_of_one_token_was_too_short_to_compare() -> None:
    page = live(unsharded=Figures(first_token_seconds=0.07))
    assert page.one("skv-remark").text == "The last reply with sharding off was too short to compare."


def test_before_the_first_reply_there_are_dashes_and_what_to_do() -> None:
    page = live(sharded=None, unsharded=None, current=Figures(), generating=False, tokens=())
    assert {element.text for element in page.all("skv-value")} == {DASH}
    assert page.one("skv-remark").text == "Ask the model something."


def test_before_the_second_token_nobody_is_told_to_ask_again() -> None:
    page = live(sharded=Figures(), unsharded=None, current=Figures())
    assert page.one("skv-remark").text == "The first tokens are on their way."


@pytest.mark.parametrize(("generating", "word"), [(True, "replying"), (False, "at rest")])
def test_it_says_whether_a_reply_is_being_written(generating: bool, word: str) -> None:
    assert live(generating=generating).one("skv-pulse").text == word


@pytest.mark.parametrize("missing", ["placement", "snapshot"])
def test_without_a_spread_model_there_are_no_figures_at_all(missing: str) -> None:
    assert not re.search(r"\d", Page(view.live(state(**{missing: None}))).text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0214, "0.0214 s"),
        (0.02, "0.0200 s"),
        (0.0099996, "0.0100 s"),
        (0.00084, "0.000840 s"),
        (1.234, "1.23 s"),
        (12.34, "12.3 s"),
        (123.4, "123 s"),
        (0.0, "0 s"),
    ],
)
def test_seconds_have_three_digits_that_count(seconds: float, text: str) -> None:
    page = live(current=Figures(first_token_seconds=seconds))
    assert tile(page, "First token").startswith(f"First token{text}off")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (512.4, "512 B"),
        (1698, "1.66 KiB"),
        (111206, "109 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (54.3 * 1024**2, "54.3 MiB"),
        (700 * 1024**2, "700 MiB"),
        (6.2 * GIB, "6.20 GiB"),
        (16.14 * GIB, "16.1 GiB"),
        (139.8 * GIB, "139.8 GiB"),
        (4096 * GIB, "4\u202f096.0 GiB"),
    ],
)
def test_bytes_are_in_the_unit_that_suits_them(size: float, text: str) -> None:
    page = live(current=Figures(bytes_per_token=size))
    assert tile(page, "Between GPUs / token").startswith(f"Between GPUs / token{text}off")


def test_thousands_are_grouped_by_thin_spaces() -> None:
    assert "1\u202f250.0" in tile(live(current=Figures(0.0008)), "Tokens / second")


# --- chart ------------------------------------------------------------------------------------------------------------


def points(page: Page, tone: str) -> list[tuple[int, int]]:
    """Where the chart's line of one setting goes: from the left, and from the top (0) to the bottom (1000)."""
    (line,) = (path for path in page.all("path") if path.classes == ["skv-line", f"skv-is-{tone}"])
    return [(int(x), int(y)) for x, y in re.findall(r"[ML ](\d+) (\d+)", line.attributes["d"])]


def test_on_and_off_are_lines_of_their_own() -> None:
    page = live(tokens=tokens((False, 20), (True, 30)))
    assert [x for x, _ in points(page, "off")] == list(range(14, 34))
    assert [x for x, _ in points(page, "on")] == list(range(34, 64))


def test_runs_are_marked_by_words_where_they_are() -> None:
    page = live(tokens=tokens((False, 16), (True, 32), (False, 16)))
    runs = [(run.text, style(run, "left"), style(run, "width")) for run in page.all("skv-run")]
    assert runs == [("off", 0, 25), ("on", 25, 50), ("off", 75, 25)]


def test_a_run_without_the_room_for_it_has_no_word() -> None:
    page = live(tokens=tokens((True, 510), (False, 2)))
    assert [run.text for run in page.all("skv-run")] == ["on"]


def test_a_single_token_is_a_dot() -> None:
    assert points(live(tokens=tokens((True, 1))), "on") == [(63, 0), (63, 0)]


def test_a_line_of_one_setting_alone_has_no_other() -> None:
    page = live(tokens=tokens((True, 9)))
    assert not [path for path in page.all("path") if "skv-is-off" in path.classes]


def test_the_latest_token_is_at_the_right_edge() -> None:
    assert points(live(tokens=tokens((True, 70))), "on")[-1][0] == 127


def test_the_axis_begins_at_zero() -> None:
    assert live().all("skv-tick")[0].text == "0"


@any_time
@given(seconds=st.floats(1e-5, 1e3))
def test_the_axis_has_few_round_ticks_with_their_unit(seconds: float) -> None:
    zero, *ticks = [tick.text for tick in live(tokens=tokens((True, 3), seconds=seconds)).all("skv-tick")]
    assert 2 <= len(ticks) <= 4
    assert all(tick.endswith(" s") for tick in ticks)
    assert len({*ticks, zero}) == len(ticks) + 1


@any_time
@given(seconds=st.floats(1e-5, 1e3))
def test_what_always_takes_the_same_is_on_the_scale(seconds: float) -> None:
    assert not live(tokens=tokens((True, 3), (False, 3), seconds=seconds)).all("skv-spike")


def with_spike() -> tuple[Token, ...]:
    return (*tokens((True, 40)), Token(0.0, 1.0, True), *tokens((True, 23)))


def test_a_spike_does_not_flatten_the_line() -> None:
    assert live(tokens=with_spike()).all("skv-tick")[-1].text == "0.02 s"


def test_a_spike_is_cut_off_at_the_top() -> None:
    assert points(live(tokens=with_spike()), "on")[40] == (40, 0)


def test_a_spike_is_marked_where_it_is() -> None:
    spike = live(tokens=with_spike()).one("skv-spike")
    assert spike.attributes["title"] == "1.00 s"
    assert style(spike, "left") == pytest.approx(100 * 40.5 / 64, abs=0.01)


def test_spikes_are_counted_in_words() -> None:
    assert "1 token off the scale, up to 1.00 s" in live(tokens=with_spike()).one("skv-legend").text


def test_a_few_tokens_with_sharding_off_are_no_spikes_however_slow() -> None:
    slow = tokens((False, 8), seconds=0.16)
    page = live(tokens=(*tokens((True, 504)), *slow))
    assert not page.all("skv-spike")
    assert page.all("skv-tick")[-1].text == "0.2 s"


def test_the_chart_is_said_in_words() -> None:
    label = live(tokens=tokens((False, 20), (True, 1))).one("svg").attributes["aria-label"]
    assert label == (
        "Seconds per token: 1 token with sharding on, 0.0200 s to 0.0200 s;"
        " 20 tokens with sharding off, 0.0200 s to 0.0200 s."
    )


def test_without_tokens_there_is_no_chart() -> None:
    assert not live(tokens=()).all("svg")


# --- memory -----------------------------------------------------------------------------------------------------------

AMOUNTS = st.integers(0, 200 * GIB)


@any_time
@given(weights=AMOUNTS, cache=AMOUNTS, rest=AMOUNTS, others=AMOUNTS, free=st.integers(1, 200 * GIB))
def test_the_segments_of_a_bar_fill_it(**amounts: int) -> None:
    page = live(memory=(memory(**amounts),))
    *segments, _ = [element for element in page.elements if element.parent is page.one("skv-bar")]
    widths = [style(segment, "width") for segment in segments]
    assert len(widths) == 5
    assert min(widths) >= 0
    assert sum(widths) == pytest.approx(100, abs=0.001)


@any_time
@given(peak=st.integers(0, 100 * GIB))
def test_the_peak_is_marked_on_the_bar(peak: int) -> None:
    page = live(memory=(memory(peak=peak),))
    assert 0 <= style(page.one("skv-mark"), "left") <= 100


def test_the_peak_is_measured_from_where_this_process_begins() -> None:
    page = live(memory=(memory(weights=2 * GIB, cache=GIB, rest=GIB, others=2 * GIB, free=2 * GIB, peak=4 * GIB),))
    order = [element.classes for element in page.elements if element.parent is page.one("skv-bar")]
    assert order == [["skv-weights"], ["skv-cache"], ["skv-rest"], ["skv-others"], ["skv-free"], ["skv-mark"]]
    assert style(page.one("skv-mark"), "left") == 50


def test_a_bar_is_said_in_words() -> None:
    bar = live(memory=(memory(),)).one("skv-bar")
    words = "weights 6.00 GiB, cache 512 MiB, rest of process 1.00 GiB, other programs 0, free 16.0 GiB, peak 7.00 GiB"
    assert bar.attributes["aria-label"] == bar.attributes["title"] == words


def test_the_numbers_stand_below_the_words_of_the_legend() -> None:
    heads, numbers = live(memory=(memory(),)).all("skv-shares")
    assert heads.text == "weightscacherest of processother programsfreepeak"
    assert numbers.text == "6.00 GiB512 MiB1.00 GiB016.0 GiB7.00 GiB"


def test_one_legend_serves_all_bars() -> None:
    page = live(memory=tuple(memory(f"cuda:{index}") for index in range(4)))
    assert len(page.all("skv-heads")) == 1
    assert len(page.all("skv-bar")) == 4


def test_a_bar_says_whose_it_is_and_how_full() -> None:
    assert live(memory=(memory("cuda:1"),)).one("skv-name").text == "GPU 1NVIDIA H1007.50 GiB of 23.5 GiB"


def test_simulated_gpus_are_called_gpus() -> None:
    assert live(memory=(memory("sim:1"),)).one("skv-name").text.startswith("GPU 1")


# --- what runs where --------------------------------------------------------------------------------------------------


def test_a_stage_is_as_wide_as_it_has_blocks() -> None:
    assert [style(stage, "flex-grow") for stage in Page(view.live(state())).all("skv-stage")] == [17, 18]


def test_a_stage_has_the_colour_of_its_gpu() -> None:
    page = Page(view.live(state()))
    assert [rail.classes[1] for rail in page.all("skv-rail")] == [chip.classes[1] for chip in page.all("skv-chip")]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["model.embed", *layers(0, 15)], f"embed, layers 0{DASH}15"),
        (layers(3, 3), "layers 3"),
        (["transformer.h.0", "transformer.h.1", "transformer.ln_f"], f"h 0{DASH}1, ln_f"),
        ([*layers(0, 1), *layers(4, 5), *layers(9, 9)], f"layers 0{DASH}1, 4{DASH}5, 9"),
        ([*layers(2, 2), *layers(1, 1)], "layers 2, 1"),
        (["lm_head"], "lm_head"),
        (["model.layers.0.mlp"], "mlp"),
        (["model.layers.007"], "007"),
    ],
)
def test_runs_of_blocks_have_compact_names(names: list[str], text: str) -> None:
    assert blocks(("cuda:0", names), ("cuda:1", ["other"]))[0] == text


def test_names_that_end_alike_are_told_apart() -> None:
    assert blocks(("cuda:0", ["encoder.block.0", "encoder.norm"]), ("cuda:1", ["decoder.block.0", "decoder.norm"])) == [
        "encoder.block 0, encoder.norm",
        "decoder.block 0, decoder.norm",
    ]


def test_a_stage_has_its_blocks_full_names_in_its_tooltip() -> None:
    stages = Page(view.live(state())).all("skv-stage")
    assert stages[0].attributes["title"] == f"model.embed, model.layers.0{DASH}15"


def test_a_gpu_that_has_several_turns_has_several_stages() -> None:
    turns = [("cuda:0", layers(0, 1)), ("cuda:1", layers(2, 3)), ("cuda:0", layers(4, 5)), ("cuda:1", layers(6, 7))]
    page = Page(view.live(state(placement=placed(*turns))))
    assert [stage.text for stage in page.all("skv-stage")] == [
        f"GPU 0 layers 0{DASH}1",
        f"GPU 1 layers 2{DASH}3",
        f"GPU 0 layers 4{DASH}5",
        f"GPU 1 layers 6{DASH}7",
    ]


def test_more_stages_than_can_be_seen_are_summed_up_by_gpu() -> None:
    stages = [(f"cuda:{number % 2}", layers(number, number)) for number in range(1000)]
    page = Page(view.live(state(placement=placed(*stages))))
    assert [stage.text for stage in page.all("skv-stage")] == [
        "GPU 0 layers 0, 2, 4, 6, 8, 10 and 494 more",
        "GPU 1 layers 1, 3, 5, 7, 9, 11 and 494 more",
    ]
    assert "What runs where, summed up by GPU" in page.text


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [("cuda:0", ["embed", *layers(0, 2)]), ("cuda:1", [*layers(3, 5), "norm"])],
            "GPU 0: layers 0-2, GPU 1: layers 3-5",
        ),
        ([("cuda:0", layers(0, 0)), ("cuda:1", layers(1, 1))], "GPU 0: layers 0, GPU 1: layers 1"),
        (
            [("cuda:0", layers(0, 1)), ("cuda:1", layers(2, 3)), ("cuda:0", layers(4, 5))],
            "GPU 0: layers 0-1, 4-5; GPU 1: layers 2-3",
        ),
        (
            [("cuda:0", ["embed"]), ("cuda:1", layers(0, 3)), ("cpu", ["norm", "lm_head"])],
            "GPU 0: embed; GPU 1: layers 0-3; CPU: norm, lm_head",
        ),
    ],
)
def test_the_split_names_layers(stages: list[tuple[str, list[str]]], words: str) -> None:
    assert view.split(placed(*stages)) == words.replace("-", DASH)


def test_the_cpu_is_called_cpu() -> None:
    page = Page(view.live(state(placement=placed(("cuda:0", ["embed"]), ("cpu", ["lm_head"])))))
    assert page.all("skv-stage")[1].text == "CPU lm_head"


# --- measuring on and off ---------------------------------------------------------------------------------------------


def measured(measurement: Measurement) -> Page:
    return Page(view.measurement(state(measurement=measurement)))


def test_before_anything_was_measured_there_is_nothing() -> None:
    assert view.measurement(state()) == ""


def test_progress_is_a_bar_and_words() -> None:
    page = measured(Measurement(phase="running", done=3, of=12))
    bar = page.one("skv-track").attributes
    assert bar["role"] == "progressbar"
    assert (bar["aria-valuemin"], bar["aria-valuenow"], bar["aria-valuemax"]) == ("0", "3", "12")
    assert style(page.one("span"), "width") == 25
    assert page.text == "3 of 12 replies"


def test_it_says_that_it_waits() -> None:
    assert "Waiting for the reply that is being written" in measured(Measurement(phase="waiting", of=12)).text


@pytest.mark.parametrize("phase", ["failed", "cancelled"])
def test_it_says_why_it_ended(phase: Any) -> None:
    page = measured(Measurement(phase=phase, message="It ran out of memory."))
    assert page.text == "It ran out of memory."
    assert not page.all("skv-progress")


def test_the_table_has_the_columns_of_the_issue_and_ours() -> None:
    assert [head.text for head in measured(compared()).all("th")] == [
        "model",
        "configuration",
        "seconds/token",
        "first token",
        "between GPUs/token",
        "total peak VRAM usage",
    ]


def test_the_table_has_a_row_without_and_one_with_sharding() -> None:
    cells = [cell.text for cell in measured(compared()).all("td")]
    assert cells[:6] == [
        "llama",
        "2x H100, accelerate",
        "0.0289 s (1.35x slower)",
        "0.402 s",
        "109 KiB",
        "16\u202f384 MiB",
    ]
    assert cells[6:] == ["llama", "2x H100, sharded_kv", "0.0214 s", "0.312 s", "32.5 KiB", "14\u202f336 MiB"]


def test_the_slower_one_is_called_so_when_it_is_ours() -> None:
    cells = [cell.text for cell in measured(compared(off=0.02, on=0.03)).all("td")]
    assert cells[2] == "0.0200 s"
    assert cells[8] == "0.0300 s (1.50x slower)"


@pytest.mark.parametrize(("off", "on"), [(0.02, 0.02), (None, 0.02), (None, None)])
def test_neither_is_called_slower_where_there_is_nothing_to_tell_them_apart(
    off: float | None, on: float | None
) -> None:
    assert "slower" not in measured(compared(off=off, on=on)).text


@pytest.mark.parametrize(
    ("reply", "words"), [((1, 2), "Both wrote the same"), ((1, 3), "the same 1 tokens, then others")]
)
def test_it_says_whether_the_replies_are_the_same(reply: tuple[int, ...], words: str) -> None:
    comparison = compared().comparison
    assert comparison
    changed = dataclasses.replace(comparison, on=dataclasses.replace(comparison.on, reply=reply))
    assert words in measured(compared(comparison=changed)).text


def test_the_last_table_stays_while_the_next_is_made() -> None:
    page = measured(compared(phase="running", done=1))
    assert page.all("skv-progress")
    assert page.all("table")


def test_each_cell_can_say_its_column_where_there_is_no_room_for_columns() -> None:
    page = measured(compared())
    heads = [head.text for head in page.all("th")]
    assert [cell.attributes["data-label"] for cell in page.all("td")] == heads * 2


# --- the style sheet --------------------------------------------------------------------------------------------------


def selectors() -> list[str]:
    bare = re.sub(r"/\*.*?\*/", "", CSS, flags=re.DOTALL)
    bare = re.sub(r"@keyframes[^{]*\{(?:[^{}]*\{[^}]*\})*[^}]*\}", "", bare)
    preludes = [prelude.strip() for prelude in re.findall(r"([^{};]+)\{", bare)]
    lists = [prelude for prelude in preludes if not prelude.startswith("@")]
    return [selector.strip() for prelude in lists for selector in re.split(r",(?![^(]*\))", prelude)]


def test_the_style_sheet_reaches_nothing_outside_the_panel() -> None:
    assert [s for s in selectors() if not re.match(r"(\.dark )?(\.sharded_kv-panel(?![\w-])|#sharded_kv\b)", s)] == []


def test_every_class_in_the_style_sheet_is_drawn() -> None:
    facts = [
        state(snapshot=snapshot(tokens=with_spike()), measurement=compared(phase="running")),
        state(snapshot=snapshot(current=OFF, tokens=())),
        state(snapshot=snapshot(sharded=None, current=Figures(), generating=False, memory=())),
        state(tone="idle", placement=placed(*[(f"cuda:{i}", [f"b{i}"]) for i in range(8)], ("cpu", ["c"]))),
        state(tone="failed", measurement=compared(phase="failed", message="Why.")),
    ]
    html = "".join(view.status(each) + view.live(each) + view.measurement(each) for each in facts)
    drawn = {name for element in Page(html).elements for name in element.classes}
    styled = set(re.findall(r"\.(skv-[\w-]+)", " ".join(selectors())))
    assert styled - drawn == set()


def test_the_first_token_says_how_many_tokens_of_its_prompt_were_kept() -> None:
    figures = Figures(first_token_seconds=0.3, prompt_tokens=1870, kept_tokens=1840)
    assert tile(live(sharded=figures, current=figures), "First token").endswith("1\u202f870 tokens, 1\u202f840 kept")
    nothing = Figures(first_token_seconds=0.3, prompt_tokens=1)
    assert tile(live(sharded=nothing, current=nothing), "First token").endswith("1 token")


@pytest.mark.parametrize(("tokens", "words"), [(1840, "kept: 1\u202f840 tokens"), (1, "kept: 1 token"), (0, None)])
def test_the_memory_says_how_many_tokens_are_kept(tokens: int, words: str | None) -> None:
    (memory,) = live(kept_tokens=tokens).all("skv-memory")
    assert memory.text.endswith(words) if words else "kept" not in memory.text
