"""Options and fixtures of the whole suite: above all the devices that a test runs on, simulated ones by default."""

from __future__ import annotations

import os

# Before torch is imported: accelerate picks main_device out of a set, and one thread is enough for tiny models.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import signal
import sys
from collections.abc import Iterator

import pytest

from tests import support


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--devices",
        choices=("sim", "cuda"),
        default="sim",
        help="what device tests run on: simulated GPUs (the default) or real ones",
    )
    parser.addoption(
        "--covered-by",
        default="",
        help="with --cov: the names of the test files during which coverage is measured; all if none is given",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Measuring coverage makes tests up to half slower: it is done only where it finds lines."""
    covering = config.getoption("--covered-by").split()
    for item in items if covering else ():
        if item.path.name not in covering:
            item.add_marker("no_cover")


@pytest.fixture(scope="session")
def devices(request: pytest.FixtureRequest) -> support.Devices:
    """The devices of this run; a test skips where there are too few."""
    return support.Devices(request.config.getoption("--devices"))


def pytest_sessionstart() -> None:
    # A shell has what it starts in the background ignore Ctrl-C, and nohup a closed terminal; some tests send both.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


class _Imports:
    """What was imported stays: collections need not look through it, which takes 0.1 to 0.3 s each time."""

    def __init__(self) -> None:
        self._frozen = 0

    def freeze(self) -> None:
        """After a collection: leave out of later ones what is there, if much of it is new modules."""
        if len(sys.modules) > self._frozen + 20:
            self._frozen = len(sys.modules)
            gc.freeze()


_imports = _Imports()


def pytest_collection_finish() -> None:
    gc.collect()
    _imports.freeze()


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """A model of an earlier test must not be counted in a later one's memory."""
    yield
    gc.collect()
    _imports.freeze()
