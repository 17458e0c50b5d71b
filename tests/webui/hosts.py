"""A stand-in for the webui: what an extension meets of it, by the rules of its versions, in words of our own.

It needs nothing but Python: test_loading.py runs it in processes of their own, where the extension is what imports
PyTorch first.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "sharded_kv"
TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tools(name: str) -> Any:
    """A module of ours under another name: whether the extension loads by itself is what tests ask."""
    if "tools_of_the_tests" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "tools_of_the_tests", TOOLS / "__init__.py", submodule_search_locations=[str(TOOLS)]
        )
        sys.modules["tools_of_the_tests"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"tools_of_the_tests.{name}")


@dataclasses.dataclass(frozen=True)
class Version:
    """What differs between the versions of the webui that extensions can tell apart (its modules/extensions.py).

    Attributes:
        name: of the version, for the names of tests.
        loads: how it gets hold of script.py.
        applies_settings: whether settings.yaml goes over `params` at each start of the interface or before setup().
        keeps_defaults: whether it notes `params` as defaults, which it does not save.
        saves_params: whether "Save settings" looks at `params`.
        forgets: whether an extension that is not loaded again loses its ui().
        own_logger: whether it has a logger.
        root_level: from which level on the root logger takes what others log.
        has_lock: whether replies take a lock.
        stops_without_libraries: whether a library that an extension lacks ends the webui.
    """

    name: str
    loads: str
    applies_settings: str = "before setup"
    keeps_defaults: bool = True
    saves_params: bool = True
    forgets: bool = True
    own_logger: bool = True
    root_level: int = logging.ERROR
    has_lock: bool = True
    stops_without_libraries: bool = False

    def __str__(self) -> str:
        return self.name


MAY_2023 = Version(
    "may-2023",
    "exec",
    applies_settings="each start",
    keeps_defaults=False,
    saves_params=False,
    forgets=False,
    own_logger=False,
    root_level=logging.INFO,
    has_lock=False,
)
OCTOBER_2023 = Version(
    "october-2023",
    "exec",
    applies_settings="each start",
    keeps_defaults=False,
    saves_params=False,
    root_level=logging.WARNING,
)
V2 = Version("v2.8", "import")
V4 = Version("v4.7.3", "path", stops_without_libraries=True)
VERSIONS = (MAY_2023, OCTOBER_2023, V2, V4)


class Lines(logging.Handler):
    """What people see in the webui's log.

    Attributes:
        seen: (level's name, message, whether a traceback came with it).
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.levelname, record.getMessage(), bool(record.exc_info)))

    def of(self, level: str) -> list[str]:
        """The messages of one level."""
        return [message for name, message, _ in self.seen if name == level]

    @property
    def tracebacks(self) -> int:
        """How many messages came with one."""
        return sum(with_traceback for _, _, with_traceback in self.seen)


class Script:
    """The extension as the webui has it, where no file is loaded: params, setup() and ui()."""

    def __init__(self, extension: Any) -> None:
        self.params = extension.params
        self.setup = extension.setup
        self.ui = extension.build_panel


class Webui:
    """One process of the webui.

    Args:
        version: one of `VERSIONS`.
        settings: what settings.yaml says.
        ticked: the extensions in use: --extensions, or the Session tab's ticks.
        root: its folder, with `extensions/` in it; None where no file is loaded.
        extension: what is found in place of a file.

    Attributes:
        shared: its `modules.shared`.
        lines: what its log shows.
        extension: as above.
        scripts: the script of each extension that is in its interface.
        built: how often ui() was called.
    """

    def __init__(
        self,
        version: Version,
        *,
        settings: dict[str, Any] | None = None,
        ticked: Sequence[str] = (NAME,),
        root: Path | None = None,
        extension: Any = None,
    ) -> None:
        self.version = version
        self.root = root
        self.extension = extension
        self.lines = Lines()
        self.scripts: dict[str, Any] = {}
        self.built = 0
        self._set_up: list[Any] = []
        self._found: dict[str, Any] = {}
        own: dict[str, Any] = {"mode": "instruct", "preset": "min_p", "default_extensions": []}
        self.shared: Any = ModuleType("modules.shared")
        self.shared.__dict__.update(
            model=None,
            tokenizer=None,
            model_name="None",
            lora_names=[],
            args=SimpleNamespace(extensions=list(ticked)),
            settings={**copy.deepcopy(own), **(settings or {})},
            need_restart=False,
            generation_lock=None,
        )
        if version.keeps_defaults:
            self.shared.default_settings = own
        self._colors: Any = ModuleType("modules.logging_colors")
        if version.own_logger:
            self._colors.logger = logging.Logger("text-generation-webui", logging.DEBUG)
            self._colors.logger.addHandler(self.lines)

    @property
    def modules(self) -> dict[str, ModuleType]:
        """What belongs into `sys.modules`."""
        package: Any = ModuleType("modules")
        package.__path__ = []
        package.shared, package.logging_colors = self.shared, self._colors
        return {"modules": package, "modules.shared": self.shared, "modules.logging_colors": self._colors}

    # --- server.py ----------------------------------------------------------------------------------------------------

    def start(self, interface: bool = True) -> None:
        """What it does once the model of --model is there.

        Args:
            interface: whether it has one; False for --nowebui.
        """
        if self.version.has_lock and self.shared.generation_lock is None:
            self.shared.generation_lock = threading.Lock()
        if self.shared.args.extensions:  # with none at all, what was in use before stays in the interface
            self._load_extensions()
        if interface:
            for script in self.scripts.values():
                self.built += 1
                script.ui()

    def restart(self, ticked: Sequence[str] = (NAME,), interface: bool = True) -> None:
        """The Session tab's "Apply flags/extensions and restart"."""
        self.shared.args.extensions = list(ticked)
        self.shared.need_restart = True  # by the button; the main loop goes on
        self.shared.need_restart = False
        self.start(interface)

    # --- modules/extensions.py ----------------------------------------------------------------------------------------

    def _load_extensions(self) -> None:
        if self.version.forgets:
            self.scripts = {}
        for name in self.shared.args.extensions:
            if name not in self._available:
                continue
            try:
                script = self._find(name)
                is_new = not any(script is known for known in self._set_up)
                if is_new or self.version.applies_settings == "each start":
                    self._apply_settings(script, name)
                if is_new:
                    self._set_up.append(script)
                    script.setup()
                self.scripts[name] = script
            except ModuleNotFoundError:
                self._log_failure(name)
                if self.version.stops_without_libraries:
                    raise
            except Exception:
                self._log_failure(name)

    @property
    def _available(self) -> set[str]:
        if self.root is None:
            return {NAME}
        return {path.parent.name for path in self.root.glob("**/extensions/*/script.py")}

    def _find(self, name: str) -> Any:
        if self.extension is not None:
            if self.version.loads == "path" or name not in self._found:  # by its path, it is executed anew
                self._found[name] = Script(self.extension)
            return self._found[name]
        assert self.root is not None
        if self.version.loads == "exec":
            exec(f"import extensions.{name}.script")
            return getattr(sys.modules["extensions"], name).script
        of_user = self.root / "user_data" / "extensions" / name / "script.py"
        if self.version.loads == "path" and of_user.exists():
            spec: Any = importlib.util.spec_from_file_location(f"user_ext_{name}", str(of_user))
            script = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = script
            spec.loader.exec_module(script)
            return script
        return importlib.import_module(f"extensions.{name}.script")

    def _apply_settings(self, script: Any, name: str) -> None:
        for param, value in script.params.items():
            key = f"{name}-{param}"
            if self.version.keeps_defaults:
                self.shared.default_settings[key] = value
            if key in self.shared.settings:
                script.params[param] = self.shared.settings[key]

    def _log_failure(self, name: str) -> None:
        self.lines.seen.append(("ERROR", f"Failed to load {name}: {traceback.format_exc()}", True))

    # --- modules/ui.py ------------------------------------------------------------------------------------------------

    def save_settings(self) -> dict[str, Any]:
        """What its button writes into settings.yaml."""
        saved: dict[str, Any] = copy.deepcopy(self.shared.settings)
        saved["default_extensions"] = list(self.shared.args.extensions)
        if not self.version.saves_params:
            return saved
        defaults = self.shared.default_settings
        for name, script in self.scripts.items():
            for param, value in script.params.items():
                if param not in defaults or value != defaults[param]:
                    saved[f"{name}-{param}"] = value
        return {key: value for key, value in saved.items() if key not in defaults or value != defaults[key]}

    # --- wherever models come and go ----------------------------------------------------------------------------------

    def load(self, model: Any, tokenizer: Any = None, name: str = "tiny") -> None:
        """The Model tab's Load, over whatever is loaded."""
        self.shared.model_name = name
        self.shared.model, self.shared.tokenizer = model, tokenizer

    def unload(self, keep_name: bool = False) -> None:
        """The Model tab's Unload; with the name kept, the one of a model that nobody uses."""
        self.shared.model = self.shared.tokenizer = None
        if not keep_name:
            self.shared.model_name = "None"


class AskedLock:
    """A lock that tells when somebody asks for it.

    Attributes:
        asked: set once somebody has.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As of threading.Lock."""
        self.asked.set()
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """As of threading.Lock."""
        self._lock.release()

    def __enter__(self) -> AskedLock:
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


class Traces:
    """Whether anything of ours is on a model, or was left there. Made before the extension sees it.

    Args:
        model: a torch model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before = self._read()

    def _read(self) -> dict[tuple[str, ...], Any]:
        """All attributes of all modules' own, and what is in those that are dicts: parameters, children, hooks."""
        found: dict[tuple[str, ...], Any] = {}
        for name, module in self._model.named_modules():
            for key, value in vars(module).items():
                found[name, key] = value
                if isinstance(value, dict):
                    found.update({(name, key, str(inner)): item for inner, item in value.items()})
        return found

    @property
    def left(self) -> list[str]:
        """Which attributes are not the very same as before."""
        now = self._read()
        keys = self._before.keys() | now.keys()
        missing = object()
        return sorted(".".join(key) for key in keys if self._before.get(key, missing) is not now.get(key, missing))


@contextlib.contextmanager
def root_logger_of(webui: Webui) -> Iterator[None]:
    """The root logger as a webui has it: in May 2023 it shows what others log, and later swallows it."""
    root = logging.getLogger()
    level = root.level
    handler = logging.NullHandler() if webui.version.own_logger else webui.lines
    root.setLevel(webui.version.root_level)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def in_thread(run: Callable[[], Any]) -> Any:
    """What `run` gives in a thread of its own; its error is raised here."""
    outcome: dict[str, Any] = {}

    def record() -> None:
        try:
            outcome["value"] = run()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "it does not end"
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
