"""The engine's tests on real GPUs: those that are written against the `devices` fixture, unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def test_the_engines_tests_pass_on_real_gpus() -> None:
    command = [sys.executable, "-m", "pytest", "tests/engine", "--devices", "cuda", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-20_000:]
