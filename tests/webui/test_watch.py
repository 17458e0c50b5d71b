"""The model-load callback: sees every assignment to an attribute of a module, and changes nothing else of it."""

from __future__ import annotations

import gc
import importlib
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from extensions.sharded_kv.webui.watch import watch


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that was imported from a file, with `model` and `tokenizer` in it."""
    (tmp_path / "watched_module.py").write_text("model = None\ntokenizer = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("watched_module")
    del sys.modules["watched_module"]


class Seen(list[Any]):
    """The values that a watcher was told of."""

    def on(self, module: Any) -> Callable[[], None]:
        return watch(module, {"model": self.append})


@pytest.mark.parametrize(
    "assign",
    [
        pytest.param("module.model = 1", id="plainly"),
        pytest.param("module.model, module.tokenizer = 1, 2", id="as-one-of-a-pair"),
        pytest.param("module.model = module.tokenizer = 1", id="in-a-chain"),
        pytest.param("setattr(module, 'model', 1)", id="by-setattr"),
        pytest.param("for module.model in [1]: pass", id="as-a-loop-variable"),
        pytest.param("del module.model; module.model = 1", id="after-a-deletion"),
        pytest.param("import watched_module as shared; shared.model = 1", id="under-another-name"),
    ],
)
def test_an_assignment_is_seen(module: Any, assign: str) -> None:
    seen = Seen()
    seen.on(module)
    exec(assign, {"module": module})
    assert seen == [1]
    assert module.model == 1


def test_the_new_value_is_there_when_one_is_told(module: Any) -> None:
    there = []
    watch(module, {"model": lambda value: there.append(module.model is value)})
    module.model = object()
    assert there == [True]


def test_the_same_value_again_is_an_assignment_too(module: Any) -> None:
    seen = Seen()
    seen.on(module)
    module.model = module.model = None
    assert seen == [None, None]


def test_other_attributes_are_nobodys_business(module: Any) -> None:
    seen = Seen()
    seen.on(module)
    module.tokenizer = module.models = module.new = 1
    assert seen == []


def test_assignments_from_threads_are_all_seen(module: Any) -> None:
    seen = Seen()
    seen.on(module)

    def assign(first: int) -> None:
        for value in range(first, first + 100):
            module.model = value

    threads = [threading.Thread(target=assign, args=(100 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(seen) == list(range(800))


def test_it_is_told_in_the_thread_that_assigns(module: Any) -> None:
    told: list[threading.Thread] = []
    watch(module, {"model": lambda value: told.append(threading.current_thread())})
    thread = threading.Thread(target=lambda: setattr(module, "model", 1))
    thread.start()
    thread.join(timeout=30)
    assert told == [thread]


def test_after_the_end_nothing_is_seen_and_the_class_is_as_before(module: Any) -> None:
    seen = Seen()
    end = seen.on(module)
    end()
    module.model = 1
    assert seen == []
    assert type(module) is ModuleType


def test_ending_twice_does_nothing_more(module: Any) -> None:
    first, second = Seen(), Seen()
    end = first.on(module)
    end()
    second.on(module)
    end()
    module.model = 1
    assert second == [1]


def test_two_watchers_both_see_it(module: Any) -> None:
    inner, outer = Seen(), Seen()
    inner.on(module)
    outer.on(module)
    module.model = 1
    assert (inner, outer) == ([1], [1])


@pytest.mark.parametrize("first_to_end", [0, 1], ids=["the-inner-ends-first", "the-outer-ends-first"])
def test_of_two_watchers_one_goes_on_when_the_other_ends(module: Any, first_to_end: int) -> None:
    seen = [Seen(), Seen()]
    ends = [one.on(module) for one in seen]
    ends[first_to_end]()
    module.model = 1
    assert (seen[first_to_end], seen[1 - first_to_end]) == ([], [1])
    ends[1 - first_to_end]()
    module.model = 2
    assert (seen[first_to_end], seen[1 - first_to_end]) == ([], [1])
    assert module.model == 2


def test_a_class_that_the_module_had_already_goes_on_working(module: Any) -> None:
    class Doubling(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value * 2 if name == "model" else value)

        @property
        def computed(self) -> str:
            return "theirs"

    module.__class__ = Doubling
    seen = Seen()
    end = seen.on(module)
    module.model = 1
    assert module.model == 2
    assert module.computed == "theirs"
    end()
    assert type(module) is Doubling


def test_it_is_still_a_module_of_the_same_name_and_repr(module: Any) -> None:
    before = repr(module)
    Seen().on(module)
    assert isinstance(module, ModuleType)
    assert type(module).__name__ == "module"
    assert type(module).__qualname__ == "module"
    assert repr(module) == before


def test_it_pickles_as_little_as_any_module(module: Any) -> None:
    with pytest.raises(TypeError) as before:
        pickle.dumps(module)
    Seen().on(module)
    with pytest.raises(TypeError) as after:
        pickle.dumps(module)
    assert str(after.value) == str(before.value)


def test_it_can_be_reloaded_and_is_watched_on(module: Any) -> None:
    seen = Seen()
    seen.on(module)
    module.model = 1
    assert importlib.reload(module) is module
    assert module.model is None
    module.model = 2
    assert seen == [1, 2]


def test_no_value_is_kept_alive(module: Any) -> None:
    class Model:
        pass

    watch(module, {"model": lambda value: None})
    module.model = Model()
    dead = weakref.ref(module.model)
    module.model = None
    gc.collect()
    assert dead() is None
