"""What several of the engine's tests watch."""

from __future__ import annotations

import pytest

from extensions.sharded_kv.engine.graphs import capture


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every step that is replayed, of any model."""
    replayed: list[object] = []

    class CapturedStep(capture.CapturedStep):
        def replay(self) -> None:
            replayed.append(self)
            super().replay()

    monkeypatch.setattr(capture, "CapturedStep", CapturedStep)
    return replayed
