"""Draws what the panel shows: frozen facts in, HTML out. Knows no Gradio; the look is in panel.css.

All HTML is made by `html`, which escapes what is put into a template. The chart is drawn here and not by
`gr.LinePlot`: its arguments differ between Gradio 4 and 5, and its colours do not follow the theme.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from markupsafe import Markup

from ..engine.metering.compare import ROUNDS, Comparison, Measured
from ..engine.metering.figures import DeviceMemory, Figures, Snapshot, Token
from ..engine.placement import Placement
from .state import Measurement, PanelState

# The en dash stands for a figure that is not there, and between the ends of a range.
_DASH = "\u2013"
_THIN_SPACE = "\u202f"

# What each tone is called. The word carries the meaning, the colour only repeats it.
_TONES = {"on": "On", "off": "Off", "idle": "Idle", "failed": "Failed"}


def status(state: PanelState) -> str:
    """The sentence on what is on, or why nothing can be done, with a sign for its tone."""
    return _panel(
        html(
            '<div class="skv-status" role="status">{sign}<span class="skv-sentence">{sentence}</span></div>',
            sign=_sign(state.tone),
            sentence=state.sentence,
        )
    )


def live(state: PanelState) -> str:
    """What is looked at while a reply is being written: figures, chart, memory, and what runs where."""
    if state.placement is None or state.snapshot is None:
        return _panel(
            html(
                '<div class="skv-empty">Speed, traffic and GPU memory are shown here'
                " once a model is loaded that sharded_kv can run.</div>"
            )
        )
    snapshot = state.snapshot
    return _panel(
        _headline(state.model, snapshot.generating),
        _tiles(snapshot),
        html('<div class="skv-columns">{chart}{memory}</div>', chart=_chart(snapshot.tokens), memory=_memory(snapshot)),
        _strip(state.placement),
    )


def measurement(state: PanelState) -> str:
    """How far "Measure on and off" has got, and the table it ended in; nothing before the first time."""
    of = state.measurement
    parts = [
        *([_progress(of)] if of.under_way else []),
        *([_message(of)] if of.message else []),
        *([_table(of, of.comparison)] if of.comparison else []),
    ]
    return _panel(*parts) if parts else ""


# --- HTML -------------------------------------------------------------------------------------------------------------


def html(template: str, **values: object) -> Markup:
    """`template` with `values` in it; those that are not HTML themselves are escaped, within quotes too."""
    return Markup(template).format(**values)


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _panel(*parts: Markup) -> str:
    # A plain string: whoever adds to it must not have that escaped.
    return str(html('<div class="sharded_kv-panel">{parts}</div>', parts=_joined(parts)))


def _section(kind: str, title: str, *parts: Markup) -> Markup:
    return html(
        '<div class="skv-section skv-{kind}"><div class="skv-title" role="heading" aria-level="3">{title}</div>'
        "{parts}</div>",
        kind=kind,
        title=title,
        parts=_joined(parts),
    )


def _sign(tone: str) -> Markup:
    return html('<span class="skv-sign skv-is-{tone}">{word}</span>', tone=tone, word=_TONES[tone])


# --- figures ----------------------------------------------------------------------------------------------------------


def _headline(model: str, generating: bool) -> Markup:
    return html(
        '<div class="skv-headline"><span class="skv-model" title="{model}">{model}</span>'
        '<span class="skv-pulse skv-{kind}">{word}</span></div>',
        model=model,
        kind="replying" if generating else "resting",
        word="replying" if generating else "at rest",
    )


def _tiles(snapshot: Snapshot) -> Markup:
    """The latest figures, each beside the last one with sharding off; beside those with it off, the last with it on."""
    now, is_on = snapshot.current, snapshot.current_is_sharded
    other = (snapshot.unsharded if is_on else snapshot.sharded) or Figures()
    tone, other_tone = ("on", "off") if is_on else ("off", "on")

    def tile(label: str, figure: Callable[[Figures], str], remark: str = "") -> Markup:
        return html(
            '<div class="skv-tile"><div class="skv-label">{label}</div>{value}{beside}{remark}</div>',
            label=label,
            remark=html('<div class="skv-beside">{remark}</div>', remark=remark) if remark else Markup(),
            value=_value(figure(now)),
            beside=_beside(other_tone, figure(other)),
        )

    return html(
        '<div class="skv-tiles"><div class="skv-tile skv-main"><div class="skv-label">Seconds / token{tag}</div>'
        '{value}<div class="skv-compared">{beside}<div class="skv-remark">{remark}</div></div></div>'
        "{rate}{first}{traffic}</div>",
        tag=_key(tone, f"sharding {tone}") if now.tokens else "",
        value=_value(_seconds(now.seconds_per_token)),
        beside=_beside(other_tone, _seconds(other.seconds_per_token)),
        remark=_remark(snapshot, other, other_tone),
        rate=tile("Tokens / second", lambda figures: _rate(figures.tokens_per_second)),
        first=tile("First token", lambda figures: _seconds(figures.first_token_seconds), _prompt(now)),
        traffic=tile("Between GPUs / token", lambda figures: _size(figures.bytes_per_token)),
    )


def _prompt(figures: Figures) -> str:
    """How many tokens the prompt had, and how many of them were kept from before; "" where nobody knows."""
    if figures.prompt_tokens is None:
        return ""
    kept = f", {_grouped(figures.kept_tokens)} kept" if figures.kept_tokens else ""
    return f"{_tokens(figures.prompt_tokens)}{kept}"


def _value(text: str) -> Markup:
    if text == _DASH:
        return html('<div class="skv-value skv-none">{dash}</div>', dash=_DASH)
    number, space, unit = text.partition(" ")
    return html(
        '<div class="skv-value">{number}<span class="skv-unit">{unit}</span></div>', number=number, unit=space + unit
    )


def _beside(tone: str, value: str) -> Markup:
    return html('<div class="skv-beside">{key} {value}</div>', key=_key(tone, tone), value=value)


def _key(tone: str, text: str) -> Markup:
    """`text` after the line that stands for `tone` in the chart."""
    return html('<span class="skv-key skv-is-{tone}">{text}</span>', tone=tone, text=text)


def _remark(snapshot: Snapshot, other: Figures, other_tone: str) -> str:
    now = snapshot.current
    if now.seconds_per_token and other.seconds_per_token:
        return _times(now.seconds_per_token, other.seconds_per_token) or "no difference"
    if now.seconds_per_token and other.first_token_seconds is not None:
        return f"The last reply with sharding {other_tone} was too short to compare."
    if now.seconds_per_token:
        return f"No reply with sharding {other_tone} yet."
    return "The first tokens are on their way." if snapshot.generating else "Ask the model something."


# --- chart ------------------------------------------------------------------------------------------------------------

# The chart is as wide as the smallest of these that holds all tokens: it does not rescale with every token.
_WINDOWS = (64, 128, 256, 512)
_HEIGHT = 1000
# A run of tokens gets its word where it has the room for it, in per cent of the width.
_NARROWEST_LABELLED = 6
# What is further above the usual of its setting than this is a spike: it would flatten all else.
_USUAL_QUANTILE = 0.95
_SPIKE_FACTOR = 1.5


@dataclasses.dataclass(frozen=True)
class _Run:
    """Consecutive tokens with one setting of the switch; `start` counts from the left edge of the chart."""

    start: int
    sharded: bool
    seconds: tuple[float, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.seconds)


def _chart(tokens: Sequence[Token]) -> Markup:
    """Seconds/token of the recent tokens, the latest at the right edge. Words are HTML, so that they do not stretch."""
    title = "Seconds / token, recent tokens"
    if not tokens:
        empty = html('<div class="skv-plot skv-empty">The line begins with the second token of a reply.</div>')
        return _section("chart", title, empty)
    window = next((size for size in _WINDOWS if size >= len(tokens)), len(tokens))
    start = window - len(tokens)
    runs = list(_runs(tokens, start))
    ticks = _ticks(_usual_limit(tokens))
    spikes = [(place, token.seconds) for place, token in enumerate(tokens, start) if token.seconds > ticks[-1]]
    return _section(
        "chart",
        title,
        _legend(spikes),
        html(
            '<div class="skv-plot"><div class="skv-area">{ticks}{svg}{runs}{spikes}</div></div>'
            '<div class="skv-axis"><span>{window} tokens ago</span><span>latest</span></div>',
            ticks=_joined(_tick_label(tick, ticks) for tick in ticks),
            svg=_plot(runs, window, ticks, _in_words(tokens)),
            runs=_joined(_run_label(run, window) for run in runs),
            spikes=_joined(_spike_mark(place, seconds, window) for place, seconds in spikes),
            window=window,
        ),
    )


def _runs(tokens: Sequence[Token], start: int) -> Iterator[_Run]:
    for sharded, run in itertools.groupby(tokens, key=lambda token: token.sharded):
        seconds = tuple(token.seconds for token in run)
        yield _Run(start, sharded, seconds)
        start += len(seconds)


def _usual_limit(tokens: Sequence[Token]) -> float:
    """What the chart must be high enough for: all tokens but for spikes.

    A spike is what takes over 1.5 times the 95 % quantile of the tokens with the same setting of the switch: of each,
    because the slower one may be rare. With few tokens the quantile leaves out the largest.
    """
    limit = 0.0
    for sharded in {token.sharded for token in tokens}:
        seconds = sorted(token.seconds for token in tokens if token.sharded == sharded)
        usual = seconds[int(_USUAL_QUANTILE * (len(seconds) - 1))]
        limit = max(limit, *(each for each in seconds if each <= _SPIKE_FACTOR * usual))
    return limit


def _ticks(limit: float) -> list[float]:
    """Three or four round numbers from 0 to `limit` or a little above."""
    limit = limit or 1.0
    magnitude = 10.0 ** math.floor(math.log10(limit / 3))
    step = next(step for factor in (1, 2, 5, 10) if 3 * (step := factor * magnitude) >= limit)
    return [step * number for number in range(math.ceil(limit / step) + 1)]


def _tick_label(tick: float, ticks: Sequence[float]) -> Markup:
    """To the digit that the distance of two ticks has."""
    # 1.001: a distance of 0.01 may be a little less than that in binary.
    decimals = max(0, -math.floor(math.log10(ticks[1] * 1.001)))
    return html(
        '<span class="skv-tick" style="bottom:{at:.4g}%">{text}</span>',
        at=100 * tick / ticks[-1],
        text=f"{_grouped(tick, decimals)} s" if tick else "0",
    )


def _plot(runs: Sequence[_Run], window: int, ticks: Sequence[float], description: str) -> Markup:
    """The lines. The picture is stretched to its place; `vector-effect` in the style sheet keeps lines thin."""
    right = window - 0.5
    grid = [f"M-.5 {round(_HEIGHT * (1 - tick / ticks[-1]))}H{right}" for tick in ticks]
    switches = [f"M{run.start - 0.5} 0V{_HEIGHT}" for run in runs[1:]]
    shapes = [_shape("skv-grid", grid), _shape("skv-switch", switches)]
    for sharded, tone in ((True, "on"), (False, "off")):
        mine = [run for run in runs if run.sharded == sharded]
        shapes.append(_shape(f"skv-band skv-is-{tone}", [_band(run) for run in mine]))
        shapes.append(_shape(f"skv-line skv-is-{tone}", [_line(run, ticks[-1]) for run in mine]))
    return html(
        '<svg viewBox="-.5 0 {window} {height}" preserveAspectRatio="none" role="img" aria-label="{description}">'
        "{shapes}</svg>",
        window=window,
        height=_HEIGHT,
        description=description,
        shapes=_joined(shapes),
    )


def _shape(classes: str, path: Sequence[str]) -> Markup:
    return html('<path class="{classes}" d="{path}"/>', classes=classes, path="".join(path)) if path else Markup()


def _band(run: _Run) -> str:
    width = len(run.seconds)
    return f"M{run.start - 0.5} 0h{width}V{_HEIGHT}h-{width}z"


def _line(run: _Run, top: float) -> str:
    heights = [round(_HEIGHT * (1 - min(1.0, seconds / top))) for seconds in run.seconds]
    points = [f"{run.start + index} {height}" for index, height in enumerate(heights)]
    # One token alone is a dot: a line of no length with round ends.
    return f"M{points[0]}L{' '.join(points[1:] or points)}"


def _run_label(run: _Run, window: int) -> Markup:
    width = 100 * len(run.seconds) / window
    if width < _NARROWEST_LABELLED:
        return Markup()
    return html(
        '<span class="skv-run skv-is-{tone}" style="left:{left:.4g}%;width:{width:.4g}%">{tone}</span>',
        left=100 * run.start / window,
        width=width,
        tone="on" if run.sharded else "off",
    )


def _spike_mark(place: int, seconds: float, window: int) -> Markup:
    return html(
        '<span class="skv-spike" style="left:{at:.4g}%" title="{text}"></span>',
        at=100 * (place + 0.5) / window,
        text=_seconds(seconds),
    )


def _legend(spikes: Sequence[tuple[int, float]]) -> Markup:
    note = Markup()
    if spikes:
        noun = "token" if len(spikes) == 1 else "tokens"
        note = html(
            '<span class="skv-key skv-is-spike">{count} {noun} off the scale, up to {longest}</span>',
            count=len(spikes),
            noun=noun,
            longest=_seconds(max(seconds for _, seconds in spikes)),
        )
    return html(
        '<div class="skv-legend">{on}{off}{note}</div>',
        on=_key("on", "on: sharded_kv"),
        off=_key("off", "off: accelerate"),
        note=note,
    )


def _in_words(tokens: Sequence[Token]) -> str:
    """The chart for those who do not see it."""
    parts = []
    for sharded, word in ((True, "on"), (False, "off")):
        seconds = [token.seconds for token in tokens if token.sharded == sharded]
        if seconds:
            noun = "token" if len(seconds) == 1 else "tokens"
            extent = f"{_seconds(min(seconds))} to {_seconds(max(seconds))}"
            parts.append(f"{len(seconds)} {noun} with sharding {word}, {extent}")
    return f"Seconds per token: {'; '.join(parts)}."


# --- memory -----------------------------------------------------------------------------------------------------------

# From the left, so that the peak, which counts this process's tensors, is measured from where they begin.
_SHARES = {
    "weights": ("weights", "the model's parameters and buffers"),
    "cache": ("cache", "the cache of the reply being written, and what is kept for the next"),
    "rest": ("rest of process", "everything else of this process"),
    "others": ("other programs", "what other programs hold"),
    "free": ("free", "not in use"),
}


def _memory(snapshot: Snapshot) -> Markup:
    """One bar for each GPU, under one legend that heads the columns of numbers."""
    if not snapshot.memory:
        return _section("memory", "GPU memory", html('<div class="skv-empty">No GPU is in use.</div>'))
    heads = [
        html('<span class="skv-{kind}" title="{meaning}">{word}</span>', kind=kind, word=word, meaning=meaning)
        for kind, (word, meaning) in _SHARES.items()
    ]
    peak = html(
        '<span class="skv-peak" title="the most this process\'s tensors held since the reply began">peak</span>'
    )
    return _section(
        "memory",
        "GPU memory",
        html('<div class="skv-shares skv-heads">{heads}{peak}</div>', heads=_joined(heads), peak=peak),
        *(_bar(memory) for memory in snapshot.memory),
        _kept(snapshot.kept_tokens),
    )


def _kept(tokens: int) -> Markup:
    """What is kept for the next message; nothing where nothing is."""
    if not tokens:
        return Markup()
    return html('<div class="skv-beside">kept: {tokens}</div>', tokens=_tokens(tokens))


def _tokens(count: int) -> str:
    return f"{_grouped(count)} {'token' if count == 1 else 'tokens'}"


def _bar(memory: DeviceMemory) -> Markup:
    amounts = [getattr(memory, kind) for kind in _SHARES]
    whole = max(1, sum(amounts))
    texts = [_size(amount) for amount in amounts]
    words = ", ".join(f"{word} {text}" for (word, _), text in zip(_SHARES.values(), texts, strict=True))
    return html(
        '<div class="skv-device"><div class="skv-name">{chip}<span class="skv-product" title="{name}">{name}</span>'
        '<span class="skv-used">{used} of {total}</span></div>'
        '<div class="skv-bar" role="img" aria-label="{words}" title="{words}">{segments}'
        '<span class="skv-mark" style="left:{peak:.2f}%"></span></div>'
        '<div class="skv-shares" aria-hidden="true">{numbers}</div></div>',
        chip=_chip(memory.device),
        name=memory.name,
        used=_size(memory.total - memory.free),
        total=_size(memory.total),
        words=f"{words}, peak {_size(memory.peak)}",
        segments=_joined(
            html('<span class="skv-{kind}" style="width:{width:.2f}%"></span>', kind=kind, width=width)
            for kind, width in zip(_SHARES, _widths(amounts), strict=True)
        ),
        peak=100 * min(1.0, memory.peak / whole),
        numbers=_joined(html("<span>{text}</span>", text=text) for text in (*texts, _size(memory.peak))),
    )


def _widths(amounts: Sequence[int]) -> list[float]:
    """Per cent with two decimals that are 100 together."""
    whole = max(1, sum(amounts))
    edges = [0.0, *(round(100 * amount / whole, 2) for amount in itertools.accumulate(amounts))]
    return [right - left for left, right in itertools.pairwise(edges)]


# --- what runs where --------------------------------------------------------------------------------------------------

# With more stages than this they are drawn by device, and of a list with more entries the rest is counted.
_MOST_STAGES = 16
_MOST_RANGES = 6
_COLOURS = 8


def _strip(placement: Placement) -> Markup:
    """What runs where, in the order of execution; as wide as it has blocks."""
    names = [block.name for block in placement.blocks]
    short = _short_stems(names)
    pieces = [(str(stage.device), [block.name for block in stage.blocks]) for stage in placement.stages]
    title = "What runs where"
    if len(pieces) > _MOST_STAGES:
        title = "What runs where, summed up by GPU"
        pieces = _by_device(pieces)
    return _section(
        "strip",
        title,
        html(
            '<div class="skv-stages">{stages}</div>',
            stages=_joined(
                html(
                    '<div class="skv-stage" style="flex-grow:{count}" title="{all}">'
                    '<div class="skv-rail {colour}"></div><b>{device}</b> <span class="skv-blocks">{some}</span></div>',
                    count=len(blocks),
                    colour=_colour(device),
                    device=_device_name(device),
                    some=_listed(blocks, short),
                    all=", ".join(_ranges(blocks, {})),
                )
                for device, blocks in pieces
            ),
        ),
    )


def split(placement: Placement) -> str:
    """Which layers are on which device, for people: "GPU 0: layers 0\u20132, GPU 1: layers 3\u20135".

    What is no layer counts only on a device that has none.
    """
    short = _short_stems(block.name for block in placement.blocks)
    pieces = _by_device((str(block.device), [block.name]) for block in placement.blocks)
    places = {
        _device_name(device): _listed([name for name in names if _split_number(name)[1] >= 0] or names, short)
        for device, names in pieces
    }
    is_list = any(", " in some for some in places.values())
    return ("; " if is_list else ", ").join(f"{place}: {some}" for place, some in places.items())


def _by_device(pieces: Iterable[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    blocks: dict[str, list[str]] = collections.defaultdict(list)
    for device, names in pieces:
        blocks[device] += names
    return list(blocks.items())


def _listed(names: Sequence[str], short: Mapping[str, str]) -> str:
    ranges = _ranges(names, short)
    if len(ranges) <= _MOST_RANGES:
        return ", ".join(ranges)
    return f"{', '.join(ranges[:_MOST_RANGES])} and {len(ranges) - _MOST_RANGES} more"


def _ranges(names: Iterable[str], short: Mapping[str, str]) -> list[str]:
    """["model.embed", "model.layers.0", ..., "model.layers.15"] as ["embed", "layers 0-15"].

    Args:
        names: of blocks, in order.
        short: what to call a name without its number; by default, as it is.
    """
    texts = []
    for (stem, in_list), parts in itertools.groupby(
        map(_split_number, names), key=lambda part: (part[0], part[1] >= 0)
    ):
        if in_list:
            first, *others = _extents(number for _, number in parts)
            texts += [f"{short[stem]} {first}" if stem in short else f"{stem}.{first}", *others]
        else:
            texts.append(short.get(stem, stem))
    return texts


def _extents(numbers: Iterable[int]) -> Iterator[str]:
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *others = (str(number) for _, number in run)
        yield _DASH.join([first, *others[-1:]])


def _split_number(name: str) -> tuple[str, int]:
    """("model.layers", 3) of "model.layers.3"; (name, -1) of what is no element of a list."""
    match = re.fullmatch(r"(.+)\.(0|[1-9][0-9]{0,8})", name, re.DOTALL)
    return (match[1], int(match[2])) if match else (name, -1)


def _short_stems(names: Iterable[str]) -> dict[str, str]:
    """For each name without its number the fewest last parts that no other has: "layers" of "model.layers"."""
    stems = {_split_number(name)[0] for name in names}
    suffixes = {stem: [".".join(stem.split(".")[-depth:]) for depth in range(1, stem.count(".") + 2)] for stem in stems}
    owners = collections.Counter(itertools.chain.from_iterable(suffixes.values()))
    return {stem: next((s for s in suffixes[stem] if owners[s] == 1), stem) for stem in stems}


def _chip(device: str) -> Markup:
    return html(
        '<span class="skv-chip {colour}"></span><b>{name}</b>', colour=_colour(device), name=_device_name(device)
    )


def _device_name(device: str) -> str:
    """ "GPU 1" of "cuda:1", of "sim:1" as well."""
    kind, _, index = device.partition(":")
    return "CPU" if kind == "cpu" else f"GPU {index or 0}"


def _colour(device: str) -> str:
    kind, _, index = device.partition(":")
    return "skv-cpu" if kind == "cpu" else f"skv-gpu{int(index or 0) % _COLOURS}"


# --- measuring on and off ---------------------------------------------------------------------------------------------


def _progress(of: Measurement) -> Markup:
    replies = f"{of.done} of {of.of} replies"
    return html(
        '<div class="skv-progress"><div class="skv-track" role="progressbar" aria-label="Measuring on and off"'
        ' aria-valuemin="0" aria-valuemax="{of}" aria-valuenow="{done}" aria-valuetext="{replies}">'
        '<span style="width:{width:.4g}%"></span></div><div class="skv-note">{replies}{waiting}</div></div>',
        of=of.of,
        done=of.done,
        replies=replies,
        width=100 * of.done / max(1, of.of),
        waiting=" · Waiting for the reply that is being written" if of.phase == "waiting" else "",
    )


def _message(of: Measurement) -> Markup:
    return html('<div class="skv-message skv-{phase}" role="status">{text}</div>', phase=of.phase, text=of.message)


def _table(of: Measurement, comparison: Comparison) -> Markup:
    """In the shape of the table of accelerate issue 1394."""
    return html(
        '<table class="skv-table"><thead><tr>{heads}</tr></thead><tbody>{off}{on}</tbody></table>'
        '<div class="skv-note">{how}</div>',
        heads=_joined(html('<th scope="col">{text}</th>', text=text) for text in _COLUMNS),
        off=_row(of, "accelerate", comparison.off, comparison.on),
        on=_row(of, "sharded_kv", comparison.on, comparison.off),
        how=f"Medians of {ROUNDS} replies each, by turns. {_same_text(comparison)}",
    )


_COLUMNS = (
    "model",
    "configuration",
    "seconds/token",
    "first token",
    "between GPUs/token",
    "total peak VRAM usage",
)


def _row(of: Measurement, by: str, measured: Measured, other: Measured) -> Markup:
    cells = (
        of.model,
        f"{of.gpu}, {by}",
        _seconds(measured.seconds_per_token),
        _seconds(measured.first_token_seconds),
        _size(measured.bytes_per_token),
        _mebibytes(measured.total_peak),
    )
    return html(
        "<tr>{cells}</tr>",
        cells=_joined(
            html(
                '<td data-label="{label}">{text}{remark}</td>',
                label=label,
                text=text,
                remark=_slower(measured, other) if label == "seconds/token" else "",
            )
            for label, text in zip(_COLUMNS, cells, strict=True)
        ),
    )


def _slower(measured: Measured, other: Measured) -> Markup:
    """The issue's remark beside the slower one: "(1.4x slower)"."""
    mine, others = measured.seconds_per_token, other.seconds_per_token
    times = _times(mine, others) if mine and others and mine > others else ""
    return html(' <span class="skv-slower">({times})</span>', times=times) if times else Markup()


def _same_text(comparison: Comparison) -> str:
    on, off = comparison.on.reply, comparison.off.reply
    if on == off:
        return "Both wrote the same tokens."
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(on, off, strict=False)))
    return f"Both wrote the same {same} tokens, then others, as two replies in 16 bits can."


# --- numbers ----------------------------------------------------------------------------------------------------------


def _times(seconds: float, other: float) -> str:
    """How many times faster or slower `seconds` are than `other`; "" where the digits shown make no difference."""
    ratio = max(seconds, other) / min(seconds, other)
    text = f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}"
    return "" if text == "1.00" else f"{text}x {'faster' if seconds < other else 'slower'}"


def _seconds(seconds: float | None) -> str:
    """With three digits that count; always in seconds, so that two of them compare at a glance."""
    if seconds is None:
        return _DASH
    seconds = float(f"{seconds:.2e}")
    decimals = 2 - math.floor(math.log10(seconds)) if seconds else 0
    return f"{_grouped(seconds, max(0, decimals))} s"


def _rate(rate: float | None) -> str:
    return _DASH if rate is None else _grouped(rate, 1)


def _size(size: float | None) -> str:
    """Bytes in the unit that suits them."""
    if size is None:
        return _DASH
    if not size:
        return "0"
    power = next((power for power in range(3) if size / 1024**power < 1023.5), 3)
    value = size / 1024**power
    decimals = 0 if power == 0 else 2 if value < 9.995 else 1 if value < 99.95 or power == 3 else 0
    return f"{_grouped(value, decimals)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _mebibytes(size: int) -> str:
    """As in the issue's table, where differences of some hundred MiB matter."""
    mebibytes = size / 1024**2
    return f"{_grouped(mebibytes, 0 if mebibytes >= 100 else 2)} MiB"


def _grouped(number: float, decimals: int = 0) -> str:
    return f"{number:,.{decimals}f}".replace(",", _THIN_SPACE)
