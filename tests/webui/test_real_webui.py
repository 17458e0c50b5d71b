"""The extension in a real text-generation-webui: the one in the folder WEBUI_DIR, run by the Python WEBUI_PYTHON.

It runs on simulated GPUs (real_webui.py) in copies of that folder, with tiny models, and is used as people use it: in a
browser and over its API. What it should write, and what has to move between GPUs meanwhile, is learnt from the same
webui without the extension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools import models

WEBUI = Path(os.environ.get("WEBUI_DIR") or "/nowhere").absolute()
PYTHON = os.environ.get("WEBUI_PYTHON") or WEBUI / "installer_files" / "env" / "bin" / "python"
if not (WEBUI / "server.py").is_file():
    pytest.skip("WEBUI_DIR points at no text-generation-webui", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(__file__).parent / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

MODEL, OTHER_MODEL, LORA = "tiny-llama", "tiny-llama-2", "tiny-lora"
ON = "sharded_kv: on. sharded_kv runs the model"  # in the log
# Long enough to switch twice while it is being written, and within the model's 512 positions.
LONG = 450


# --- the webui --------------------------------------------------------------------------------------------------------

# A copy has the webui's own files, and none of the user's.
_LEFT_OUT = {
    *(".git", "__pycache__", "installer_files", "venv", ".venv"),
    *("settings.yaml", "settings.json", "CMD_FLAGS.txt"),
    *("sharded_kv", ".sharded_kv.installed"),
}
_EMPTIED = {"models", "loras", "image_models", "mmproj", "logs", "cache"}


def copy_webui(folder: Path) -> Path:
    """A copy of the webui in `folder`, as fresh as a new clone."""
    places = (WEBUI, WEBUI / "user_data")
    emptied = [str(place / name) for place in places for name in _EMPTIED]

    def ignored(path: str, names: list[str]) -> set[str]:
        return {name for name in names if name in _LEFT_OUT or (path in emptied and not name.endswith(".yaml"))}

    shutil.copytree(WEBUI, folder, ignore=ignored, ignore_dangling_symlinks=True)
    return folder


def user_data(folder: Path) -> Path:
    """Where this version keeps models, LoRAs and settings.yaml."""
    return folder / "user_data" if (folder / "user_data").is_dir() else folder


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a reply says, and what moved between GPUs while it was written."""

    text: str
    copies: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Right:
    """The replies of a webui that does not use the extension.

    Attributes:
        reply, long: of the first model, a short one and a long one.
        other: of the other model.
        with_lora: of the first model with the LoRA.
    """

    reply: Reply
    long: Reply
    other: Reply
    with_lora: Reply


class Webui:
    """A webui in a process of its own.

    Args:
        folder: a copy of it.
        options: for server.py. Those for a tiny model on simulated GPUs are there already.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            port, api_port = one.getsockname()[1], other.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._api = f"http://127.0.0.1:{api_port}"
        self._log = folder.parent / f"{port}.log"
        given = ["--cpu", "--loader", "Transformers", "--model", MODEL]
        given += ["--api", "--api-port", str(api_port), "--listen-port", str(port)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [PYTHON, Path(__file__).with_name("real_webui.py"), *given, *options],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "500", "PYTHONUNBUFFERED": "1"},
            )
        self._pages = [f"{self._api}/v1/models", *([] if "--nowebui" in options else [self.url])]

    def wait(self) -> None:
        """Until it answers."""
        self.wait_for(lambda: all(_answers(page) for page in self._pages), seconds=180)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def loads(self) -> int:
        """How many times it has loaded a model."""
        return len(re.findall(r"Loaded \"", self.log))

    def wait_for(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds; meanwhile this process must not end."""
        end = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    def get(self, path: str) -> Any:
        """What its API answers."""
        with urllib.request.urlopen(f"{self._api}/v1/{path}", timeout=120) as answer:
            return json.load(answer)

    def post(self, path: str, **data: Any) -> Any:
        """What its API answers."""
        request = urllib.request.Request(
            f"{self._api}/v1/{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def reply(self, tokens: int = 40) -> Reply:
        """A completion over the API, always of the same prompt."""
        answer = self.post(
            "completions", prompt="The cache of a layer", max_tokens=tokens, temperature=0, ban_eos_token=True
        )
        copies, size = re.findall(r"Between GPUs: (\d+) copies, (\d+) bytes", self.log)[-1]
        return Reply(answer["choices"][0]["text"], int(copies), int(size))

    @property
    def model(self) -> str:
        """The name of the model that is loaded; "None" without one."""
        return self.get("internal/model/info")["model_name"]

    def load(self, model: str) -> None:
        """Load a model over the API."""
        self.post("internal/model/load", model_name=model, args={"loader": "Transformers", "cpu": True})

    def interrupt(self) -> int:
        """Ctrl-C. Returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def save_lora(folder: Path) -> None:
    """A LoRA of random weights, in the files that peft reads."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, module in models.build("llama").named_modules():
        if name.endswith("q_proj"):
            for part, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                weights[f"base_model.model.{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that write different texts, and a LoRA of the first."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models.save("llama", folder / "models" / MODEL)
    models.save("llama", folder / "models" / OTHER_MODEL, seed=1)
    save_lora(folder / "loras" / LORA)
    return folder


@pytest.fixture(scope="module")
def start(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Webui]]:
    """Starts a webui with some options: a new one with the extension in it, or another process of the one `like`."""
    started: list[Webui] = []

    def start(*options: str, like: Webui | None = None) -> Webui:
        if like is not None:
            folder = like.folder
        else:
            folder = copy_webui(tmp_path_factory.mktemp("webui") / "webui")
            environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
            subprocess.run([ROOT / "install.sh", folder], env=environment, check=True, stdout=subprocess.DEVNULL)
            shutil.copytree(checkpoints, user_data(folder), dirs_exist_ok=True)
            # Replies in the chat that are long, within the model's 512 positions.
            settings = "mode: instruct\nmax_new_tokens: 64\nban_eos_token: true\n"
            (user_data(folder) / "settings.yaml").write_text(settings)
        started.append(Webui(folder, *options))
        return started[-1]

    yield start
    for webui in started:
        if webui.process.poll() is None:
            webui.process.kill()
            webui.process.wait()


@pytest.fixture(scope="module")
def three(start: Callable[..., Webui]) -> tuple[Webui, Webui, Webui]:
    """`unticked`, `flagged` and `headless`, started side by side."""
    flag = ("--extensions", "sharded_kv")
    webuis = start(), start(*flag), start(*flag, "--nowebui", "--idle-timeout", "1")
    for webui in webuis:
        webui.wait()
    return webuis


@pytest.fixture(scope="module")
def unticked(three: tuple[Webui, Webui, Webui]) -> Webui:
    """A webui that has the extension and does not use it."""
    return three[0]


@pytest.fixture(scope="module")
def flagged(three: tuple[Webui, Webui, Webui]) -> Webui:
    """A webui started with the flag."""
    return three[1]


@pytest.fixture
def webui(flagged: Webui) -> Webui:
    """The same, with the first model loaded."""
    if flagged.model != MODEL:
        flagged.load(MODEL)
    return flagged


@pytest.fixture(scope="module")
def headless(three: tuple[Webui, Webui, Webui]) -> Webui:
    """A webui without an interface, which unloads its model when nobody has asked for a minute."""
    return three[2]


@pytest.fixture(scope="module")
def right(unticked: Webui) -> Right:
    """What is written without us."""
    reply, long = unticked.reply(), unticked.reply(LONG)
    unticked.post("internal/lora/load", lora_names=[LORA])
    with_lora = unticked.reply()
    unticked.load(OTHER_MODEL)
    other = unticked.reply()
    unticked.load(MODEL)
    return Right(reply, long, other, with_lora)


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no browser: sudo apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # fonts and scripts from the net
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", offline])
        yield browser
        browser.close()


class Requests:
    """Those of one page."""

    def __init__(self) -> None:
        self._unanswered: set[Any] = set()
        self._changed = time.monotonic()

    def begin(self, request: Any) -> None:
        self._changed = time.monotonic()
        if "/heartbeat/" not in request.url:
            self._unanswered.add(request)

    def end(self, request: Any) -> None:
        self._changed = time.monotonic()
        self._unanswered.discard(request)

    @property
    def have_ended(self) -> bool:
        """For half a second; or there was no change for longer: Gradio forgets to close a stream now and then."""
        return time.monotonic() > self._changed + (5 if self._unanswered else 0.5)


class Pages:
    """Pages of webuis.

    Attributes:
        latest: the page that was opened last.
        errors: of scripts on any of them.
    """

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.latest: Any = None
        self.errors: list[str] = []

    def open(self, webui: Webui, at: str = "Sharded KV") -> Any:
        """Open a webui's page as another browser would, at one of its tabs."""
        page = self.latest = self._browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.errors.append(error.stack))
        page.requests = requests = Requests()
        page.on("request", requests.begin)
        for event in ("requestfinished", "requestfailed"):
            page.on(event, requests.end)
        page.goto(webui.url)
        page.wait_for_selector("#chat-input textarea")
        settle(page)
        go_to(page, at)
        return page


@pytest.fixture(scope="module")
def all_pages(browser: Any) -> Pages:
    return Pages(browser)


@pytest.fixture
def pages(all_pages: Pages) -> Iterator[Pages]:
    """The same; looks for errors at the end."""
    yield all_pages
    errors, all_pages.errors = all_pages.errors, []
    assert errors == []


@pytest.fixture
def page(pages: Pages, webui: Webui) -> Any:
    """Our tab in the webui that was started with the flag, left open from test to test: on, and nobody replying."""
    page = pages.latest
    if page is None or page.is_closed() or not page.url.startswith(webui.url):
        page = pages.open(webui)
    go_to(page, "Sharded KV")
    wait_until(page, lambda: MODEL in panel(page) and OTHER_MODEL not in panel(page))
    set_switch(page, True)
    wait_until(page, lambda: "at rest" in panel(page))
    return page


def settle(page: Any) -> None:
    """Wait until the webui has answered all, and what its answers brought about: it sets its boxes meanwhile."""
    while not page.requests.have_ended:
        page.wait_for_timeout(50)


def go_to(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()
    if tab == "Sharded KV":
        page.wait_for_selector("#sharded_kv-beat", state="attached")


def has_our_tab(page: Any) -> bool:
    return page.get_by_role("tab", name="Sharded KV", exact=True).count() > 0


def is_gone(page: Any) -> bool:
    """Whether we are; webui 4 goes on showing the tab of the last extension that was unticked, which then says so."""
    if not has_our_tab(page):
        return True
    go_to(page, "Sharded KV")
    return "Unticked in the Session tab" in panel(page)


def panel(page: Any) -> str:
    return page.inner_text("#sharded_kv")


def wait_until(page: Any, holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, panel(page)
        page.wait_for_timeout(100)


def box(page: Any) -> Any:
    return page.locator("#sharded_kv-activate input[type=checkbox]")


def set_switch(page: Any, on: bool) -> None:
    if box(page).is_checked() != on:
        box(page).click()
    wait_until(page, lambda: says_on(page) == on)


def says_on(page: Any) -> bool:
    return "sharded_kv runs the model" in panel(page)


@contextlib.contextmanager
def replying(webui: Webui) -> Iterator[None]:
    """Meanwhile it writes one reply after the other."""
    enough = threading.Event()

    def reply() -> None:
        while not enough.is_set():
            webui.reply(LONG)

    with ThreadPoolExecutor() as pool:
        pool.submit(reply)
        try:
            yield
        finally:
            enough.set()
            webui.post("internal/stop-generation")


def big_number(page: Any) -> str:
    return page.inner_text("#sharded_kv .skv-main .skv-value")


def tick(page: Any, on: bool) -> None:
    """Set the extension's box in the Session tab."""
    page.get_by_label("sharded_kv", exact=True).set_checked(on)


def restart(page: Any, webui: Webui) -> None:
    """Apply what is ticked in the Session tab. The page is closed: it would load again before there is a webui."""
    starts = webui.log.count("Running on local URL")
    page.get_by_role("button", name="Apply flags/extensions and restart").click()
    page.get_by_text("Reloading...").wait_for()
    page.close()
    webui.wait_for(lambda: webui.log.count("Running on local URL") > starts)


def save_settings(page: Any, webui: Webui) -> str:
    """Save as one does in the Session tab. Returns what settings.yaml is then."""
    file = user_data(webui.folder) / "settings.yaml"
    file.unlink(missing_ok=True)
    go_to(page, "Session")
    page.get_by_role("button", name=re.compile(r"^Save .* to .*settings\.yaml$")).click()
    confirm = page.locator(".file-saver").get_by_role("button", name="Save", exact=True).filter(visible=True)
    confirm.click()
    confirm.wait_for(state="hidden")
    return file.read_text()


# --- at startup -------------------------------------------------------------------------------------------------------


def test_the_startup_flag_has_it_run_the_model_at_once(flagged: Webui) -> None:
    assert flagged.log.count(ON) == 1
    assert flagged.loads == 1


def test_it_writes_what_is_written_without_it(webui: Webui, right: Right) -> None:
    assert webui.reply().text == right.reply.text


def test_less_moves_between_the_gpus(webui: Webui, right: Right) -> None:
    reply = webui.reply()
    assert reply.copies < right.reply.copies
    assert reply.bytes < right.reply.bytes


def test_without_an_interface_the_api_writes_the_same(headless: Webui, right: Right) -> None:
    reply = headless.reply()
    assert headless.log.count(ON) == 1
    assert reply.text == right.reply.text
    assert reply.copies < right.reply.copies


# --- the panel --------------------------------------------------------------------------------------------------------


def test_the_panel_says_what_runs_where(page: Any) -> None:
    for words in ("sharded_kv runs the model", MODEL, "GPU 0", "GPU 1", "layers 0\u20132", "layers 3\u20135"):
        assert words in panel(page)


def test_switched_off_in_the_panel_all_is_as_without_it(page: Any, webui: Webui, right: Right) -> None:
    set_switch(page, False)
    assert "accelerate runs the model" in panel(page)
    assert webui.reply() == right.reply


def test_the_numbers_move_while_the_chat_replies(page: Any) -> None:
    go_to(page, "Chat")
    page.fill("#chat-input textarea", "Hello there")
    page.press("#chat-input textarea", "Enter")
    go_to(page, "Sharded KV")
    wait_until(page, lambda: "replying" in panel(page))
    seen: set[str] = set()  # a dash stands there before a reply's second token
    wait_until(page, lambda: seen.add(big_number(page)) or len([text for text in seen if re.search(r"\d", text)]) >= 3)


def test_a_reply_can_be_switched_off_and_on_in_its_midst(page: Any, webui: Webui, right: Right) -> None:
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(webui.reply, LONG)
        wait_until(page, lambda: "replying" in panel(page))
        for on in (False, True):
            set_switch(page, on)
            assert "replying" in panel(page)
        assert reply.result().text == right.long.text


def test_graph_mode_writes_the_same_with_a_lora_too(page: Any, webui: Webui, right: Right) -> None:
    assert page.locator("#sharded_kv-mode input[value=graph]").is_checked()
    assert webui.reply().text == right.reply.text
    assert "without graphs" not in panel(page)
    for call, data, expected in (("load", {"lora_names": [LORA]}, right.with_lora), ("unload", {}, right.reply)):
        webui.post(f"internal/lora/{call}", **data)
        assert webui.reply().text == expected.text
        wait_until(page, lambda: "(graph mode)" in panel(page))
        assert "without graphs" not in panel(page)
    choose_mode(page, "eager")
    assert webui.reply().text == right.reply.text
    choose_mode(page, "graph")


def choose_mode(page: Any, mode: str) -> None:
    page.click(f"#sharded_kv-mode input[value={mode}]")
    wait_until(page, lambda: f"({mode} mode)" in panel(page))


def test_measuring_on_and_off_ends_in_a_table(page: Any) -> None:
    page.click("#sharded_kv-measure")
    page.wait_for_selector("#sharded_kv [role=progressbar]")
    page.wait_for_selector("#sharded_kv table", timeout=180_000)
    table = page.inner_text("#sharded_kv table")
    for words in (MODEL, "2x Simulated GPU", "accelerate", "sharded_kv", "seconds/token"):
        assert words in table
    assert "Both wrote the same tokens." in panel(page)


def test_the_webui_is_asked_once_a_second_and_only_while_the_tab_is_seen(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(5000)
    assert 3 <= len(asked) <= 6
    go_to(page, "Session")
    settle(page)
    asked.clear()
    page.wait_for_timeout(3000)
    assert asked == []
    go_to(page, "Sharded KV")
    wait_until(page, lambda: asked != [])


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_pictures_in_both_themes(page: Any, webui: Webui, theme: str) -> None:
    is_dark = "document.body.classList.contains('dark')"
    if page.evaluate(is_dark) != (theme == "dark"):
        go_to(page, "Session")
        page.get_by_role("button", name=re.compile("^Toggle")).click()
        go_to(page, "Sharded KV")
    wait_until(page, lambda: page.evaluate(is_dark) == (theme == "dark"))
    SCREENSHOTS.mkdir(exist_ok=True)
    with replying(webui):
        for on in (False, True):
            set_switch(page, on)
            number = big_number(page)
            wait_until(page, lambda number=number: "replying" in panel(page) and big_number(page) != number)
        page.screenshot(path=SCREENSHOTS / f"webui-{WEBUI.name}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


# --- models come and go -----------------------------------------------------------------------------------------------


def choose(page: Any, model: str) -> None:
    """In the Model tab, as yet without loading it."""
    go_to(page, "Model")
    page.locator("#model-tab").get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=model, exact=True).click()
    settle(page)


def press(page: Any, button: str) -> None:
    """One of the Model tab's buttons."""
    page.locator("#model-tab").get_by_role("button", name=button, exact=True).click()


def test_a_model_loaded_in_the_model_tab_is_run(page: Any, webui: Webui, right: Right) -> None:
    choose(page, OTHER_MODEL)
    press(page, "Load")
    go_to(page, "Sharded KV")
    wait_until(page, lambda: OTHER_MODEL in panel(page) and says_on(page))
    reply = webui.reply()
    assert reply.text == right.other.text
    assert reply.copies < right.other.copies


def test_a_model_loaded_again_in_the_model_tab_is_run(page: Any, webui: Webui, right: Right) -> None:
    choose(page, MODEL)
    loads = webui.loads
    press(page, "Load")
    webui.wait_for(lambda: webui.loads > loads)
    reply = webui.reply()
    assert reply.text == right.reply.text
    assert reply.copies < right.reply.copies


def test_a_model_unloaded_in_the_model_tab_is_let_go(page: Any) -> None:
    go_to(page, "Model")
    press(page, "Unload")
    go_to(page, "Sharded KV")
    wait_until(page, lambda: "No model is loaded." in panel(page))


def test_a_model_loaded_over_the_api_is_run(page: Any, webui: Webui, right: Right) -> None:
    webui.load(OTHER_MODEL)
    wait_until(page, lambda: OTHER_MODEL in panel(page) and says_on(page))
    reply = webui.reply()
    assert reply.text == right.other.text
    assert reply.copies < right.other.copies


def test_a_model_unloaded_over_the_api_is_let_go(page: Any, webui: Webui) -> None:
    webui.post("internal/model/unload")
    wait_until(page, lambda: "No model is loaded." in panel(page))


def test_a_lora_is_applied_and_taken_off_again(page: Any, webui: Webui, right: Right) -> None:
    assert right.with_lora.text != right.reply.text
    for call, data, expected in (("load", {"lora_names": [LORA]}, right.with_lora), ("unload", {}, right.reply)):
        webui.post(f"internal/lora/{call}", **data)
        reply = webui.reply()
        assert reply.text == expected.text
        assert reply.copies < expected.copies
        assert says_on(page)


# --- the Session tab --------------------------------------------------------------------------------------------------


def test_unticked_all_is_as_without_it_and_ticked_again_as_before(
    page: Any, pages: Pages, webui: Webui, right: Right
) -> None:
    loads = webui.loads
    go_to(page, "Session")
    tick(page, False)
    restart(page, webui)
    page = pages.open(webui, at="Session")
    assert is_gone(page)
    assert webui.reply() == right.reply
    go_to(page, "Session")
    tick(page, True)
    restart(page, webui)
    page = pages.open(webui)
    assert says_on(page)
    assert webui.reply().copies < right.reply.copies
    assert webui.loads == loads


def test_a_switch_turned_off_is_saved_and_off_at_the_next_start(
    page: Any, webui: Webui, start: Callable[..., Webui]
) -> None:
    set_switch(page, False)
    assert "sharded_kv-activate: false" in save_settings(page, webui)
    another = start(like=webui)
    another.wait()
    assert "sharded_kv: off. accelerate runs the model" in another.log


def test_a_switch_turned_off_is_saved_after_a_restart_of_the_interface_too(
    page: Any, pages: Pages, webui: Webui
) -> None:
    set_switch(page, False)
    go_to(page, "Session")
    restart(page, webui)
    page = pages.open(webui)
    assert not says_on(page)
    assert "sharded_kv-activate: false" in save_settings(page, webui)


def test_ticked_in_the_session_tab_it_runs_the_model_that_is_loaded(
    unticked: Webui, right: Right, pages: Pages
) -> None:
    loads = unticked.loads
    page = pages.open(unticked, at="Session")
    assert not has_our_tab(page)
    tick(page, True)
    restart(page, unticked)
    assert says_on(pages.open(unticked))
    reply = unticked.reply()
    assert reply.text == right.reply.text
    assert reply.copies < right.reply.copies
    assert unticked.loads == loads


# --- at the end -------------------------------------------------------------------------------------------------------


def test_a_model_unloaded_when_idle_is_run_when_it_is_loaded_again(headless: Webui, right: Right) -> None:
    headless.wait_for(lambda: "Unloading the model for inactivity" in headless.log, seconds=200)
    reply = headless.reply()
    assert headless.loads == 2
    assert reply.text == right.reply.text
    assert reply.copies < right.reply.copies


def test_nothing_of_it_failed(flagged: Webui, unticked: Webui, headless: Webui) -> None:
    for webui in (flagged, unticked, headless):
        assert "sharded_kv has failed" not in webui.log
        assert "Traceback" not in webui.log


def test_ctrl_c_ends_the_webui(flagged: Webui) -> None:
    assert flagged.interrupt() == 0
