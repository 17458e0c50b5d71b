"""The panel in a real browser, on the demo's page: headless Chromium looks, clicks and takes pictures."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(__file__).parent / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: sudo apt-get install chromium")


class Demo:
    """`demo` in a process of its own, up to its page."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.demo", "--tokens", "4", "--port", str(self.port)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(timeout=120), "".join(self.lines)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if self.url in line:
                self._ready.set()

    def interrupt(self) -> int:
        """Ctrl-C. Returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        return status


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    demo = Demo()
    yield demo
    if demo.process.poll() is None:
        demo.process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, demo: Demo) -> Iterator[Callable[..., Any]]:
    """Opens the demo's page as another browser would, and looks for errors at the end."""
    contexts, errors = [], []

    def open_page(width: int = 1280, height: int = 900) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.route(lambda url: not url.startswith(demo.url), lambda route: route.abort())  # fonts from the net
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(demo.url)
        page.wait_for_selector("#sharded_kv-beat", state="attached", timeout=30_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Iterator[Any]:
    """The demo's page, with sharding on and nobody replying, before and after."""
    page = open_page()
    yield page
    page.click("#demo-stop")
    set_switch(page, True)
    wait_until(page, lambda: "replying" not in panel(page))


def panel(page: Any) -> str:
    return page.inner_text("#sharded_kv")


def wait_until(page: Any, holds: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, panel(page)
        page.wait_for_timeout(100)


def is_shown(page: Any, selector: str) -> bool:
    return page.locator(f"#sharded_kv {selector}").first.is_visible()


def box(page: Any) -> Any:
    return page.locator("#sharded_kv-activate input[type=checkbox]")


def set_switch(page: Any, on: bool) -> None:
    if box(page).is_checked() != on:
        box(page).click()
    wait_until(page, lambda: says_on(page) == on)


def says_on(page: Any) -> bool:
    return "sharded_kv runs the model" in panel(page)


def big_number(page: Any) -> str:
    return page.inner_text("#sharded_kv .skv-main .skv-value")


def test_the_page_is_for_this_machine_alone(demo: Demo) -> None:
    listening = "0A"
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{demo.process.pid}/net/{table}").read_text().splitlines()[1:]
    ]
    addresses = [row[1].split(":") for row in rows if row[3] == listening]
    assert [address for address, port in addresses if int(port, 16) == demo.port] == ["0100007F"]  # 127.0.0.1


def test_the_state_is_there_as_soon_as_the_page_is(page: Any) -> None:
    assert says_on(page)
    assert "GPU 0" in panel(page)
    assert "GPU 1" in panel(page)


def test_a_click_switches_at_once_and_back(page: Any) -> None:
    box(page).click()
    wait_until(page, lambda: "accelerate runs the model" in panel(page), seconds=5)
    box(page).click()
    wait_until(page, lambda: says_on(page), seconds=5)


def test_the_switch_survives_a_reload_of_the_page(page: Any) -> None:
    set_switch(page, False)
    page.reload()
    page.wait_for_selector("#sharded_kv-beat", state="attached")
    wait_until(page, lambda: not box(page).is_checked())
    assert not says_on(page)


def test_another_browser_follows(page: Any, open_page: Callable[..., Any]) -> None:
    other = open_page()
    set_switch(page, False)
    wait_until(other, lambda: not says_on(other), seconds=5)
    wait_until(other, lambda: not box(other).is_checked(), seconds=5)


def test_live_numbers_change_while_replies_are_written(page: Any) -> None:
    page.locator("#demo-keep input").click()
    wait_until(page, lambda: "replying" in panel(page))
    wait_until(page, lambda: re.search(r"\d", big_number(page)))  # none while the first prompt is computed
    seen = set()
    wait_until(page, lambda: seen.add(big_number(page)) or len(seen) >= 3)
    assert all(re.search(r"\d", number) for number in seen)


def test_a_reply_goes_on_when_sharding_is_switched_in_its_midst(page: Any) -> None:
    page.click("#demo-reply")
    wait_until(page, lambda: "replying" in panel(page))
    box(page).click()
    wait_until(page, lambda: not says_on(page) and "replying" in panel(page), seconds=5)
    written = len(page.input_value("#demo-chat textarea"))
    wait_until(page, lambda: len(page.input_value("#demo-chat textarea")) > written)
    for tone in ("on", "off"):
        assert page.locator(f"#sharded_kv svg .skv-band.skv-is-{tone}").count() > 0


def test_graph_mode_is_chosen_until_somebody_chooses(page: Any) -> None:
    assert page.locator("#sharded_kv-mode input[value=graph]").is_checked()
    assert "(graph mode)" in panel(page)


def test_eager_and_graph_mode_can_be_chosen_while_a_reply_is_written(page: Any) -> None:
    page.locator("#demo-keep input").click()
    wait_until(page, lambda: "replying" in panel(page))
    for mode in ("eager", "graph"):
        page.locator(f"#sharded_kv-mode input[value={mode}]").click()
        wait_until(page, lambda mode=mode: f"({mode} mode)" in panel(page), seconds=5)
        written = page.input_value("#demo-chat textarea")
        wait_until(page, lambda written=written: page.input_value("#demo-chat textarea") not in ("", written))


def test_keep_generating_writes_one_reply_after_the_other(page: Any) -> None:
    page.locator("#demo-keep input").click()
    texts: list[str] = []

    def began_anew() -> bool:
        texts.append(page.input_value("#demo-chat textarea"))
        return any(
            later and not later.startswith(earlier[:5]) for earlier, later in itertools.pairwise(texts) if earlier
        )

    wait_until(page, began_anew, seconds=150)


def test_measuring_ends_in_a_table_of_both(page: Any) -> None:
    page.click("#sharded_kv-measure")
    wait_until(page, lambda: is_shown(page, "[role=progressbar]"))
    wait_until(page, lambda: is_shown(page, "table"), seconds=200)
    wait_until(page, lambda: page.locator("#sharded_kv [role=progressbar]").count() == 0, seconds=60)
    table = page.inner_text("#sharded_kv table").lower()
    for words in ("configuration", "seconds/token", "peak vram", "accelerate", "sharded_kv"):
        assert words in table


def test_measuring_can_be_cancelled(page: Any) -> None:
    page.click("#sharded_kv-measure")
    wait_until(page, lambda: is_shown(page, "[role=progressbar]"))
    page.click("#sharded_kv-cancel")
    wait_until(page, lambda: "Cancelled" in panel(page), seconds=10)
    assert says_on(page)


def test_measuring_can_only_be_cancelled_while_it_is_under_way(page: Any) -> None:
    assert page.is_visible("#sharded_kv-measure")
    assert page.is_hidden("#sharded_kv-cancel")
    page.click("#sharded_kv-measure")
    page.wait_for_selector("#sharded_kv-cancel", state="visible")
    assert page.is_hidden("#sharded_kv-measure")
    page.click("#sharded_kv-cancel")
    page.wait_for_selector("#sharded_kv-measure", state="visible")


def test_what_is_shown_does_not_fade_at_every_update(page: Any) -> None:
    faded = page.evaluate(
        """async () => {
            const end = performance.now() + 2500;
            let least = 1;
            while (performance.now() < end) {
                for (let at = document.querySelector(".skv-main"); at !== null; at = at.parentElement)
                    least = Math.min(least, Number(getComputedStyle(at).opacity));
                await new Promise(requestAnimationFrame);
            }
            return least;
        }"""
    )
    assert faded == 1


def test_nobody_is_asked_while_the_panel_cannot_be_seen(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("document.getElementById('sharded_kv').parentElement.style.display = 'none'")
    page.wait_for_timeout(300)
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    page.evaluate("document.getElementById('sharded_kv').parentElement.style.display = ''")
    page.wait_for_timeout(500)
    assert asked != []


def test_it_asks_once_a_second_while_it_can_be_seen(page: Any) -> None:
    asked: list[float] = []
    page.on("request", lambda request: asked.append(time.monotonic()) if "predict" in request.url else None)
    page.wait_for_timeout(5000)
    assert 4 <= len(asked) <= 6


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_at_every_width_in_both_themes(page: Any, theme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.evaluate(f"document.body.classList.toggle('dark', {str(theme == 'dark').lower()})")
    page.click("#demo-reply")
    wait_until(page, lambda: "replying" in panel(page))
    wait_until(page, lambda: re.search(r"\d", big_number(page)) is not None)
    page.wait_for_timeout(1500)
    SCREENSHOTS.mkdir(exist_ok=True)
    stack = Path(sys.prefix).name
    page.screenshot(path=SCREENSHOTS / f"{stack}-{theme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.querySelector('.skv-main .skv-value')).color")
    lightness = sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert (lightness > 3 * 150) == (theme == "dark")


def test_ctrl_c_ends_it_cleanly_and_no_open_page_asks_it_over_and_over(browser: Any) -> None:
    demo = Demo()
    page = browser.new_page()
    assert page.goto(demo.url).status == 200
    page.wait_for_selector("#sharded_kv-beat", state="attached", timeout=30_000)
    assert demo.interrupt() == 0
    assert "Traceback" not in "".join(demo.lines)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", demo.port)) != 0
    posted: list[str] = []
    page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
    page.wait_for_timeout(5000)
    page.close()
    assert len(posted) <= 1
