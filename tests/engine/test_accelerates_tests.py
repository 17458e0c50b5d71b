"""accelerate's own tests of hooks and big models, with every dispatched model sharded: those of the installed version.

`./install.sh --test` lays them beside each stack's packages, out of accelerate's source distribution.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import support

ROOT = Path(__file__).parents[2]
SOURCE = Path(sys.prefix) / "src" / f"accelerate-{importlib.metadata.version('accelerate')}"

# It wants a dispatched model that was moved as a whole to one device to fail, as its hooks make it. With ours there is
# nothing to do any more, and the model runs where it is (README, Limits).
WANTS_A_FAILURE = "test_dispatch_model_move_model_warning"


def passed(folder: Path, devices: support.Devices, shard: str) -> tuple[set[str], str]:
    """The names of the tests that pass, and the run's last line."""
    report = folder / f"report{shard}.xml"
    tests = [SOURCE / "tests" / name for name in ("test_hooks.py", "test_big_modeling.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", SOURCE, "-p", "no:cacheprovider"]
    command += ["-p", "tests.engine.accelerates_tests", "--junitxml", report, *tests]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "SHARDED_KV_DEVICES": devices.kind, "SHARDED_KV_SHARD": shard},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), finished.stdout + finished.stderr
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('name')}" for case in cases if len(case) == 0}, finished.stdout.splitlines()[-1]


@pytest.mark.skipif(not SOURCE.is_dir(), reason=f"needs accelerate's tests in {SOURCE}: ./install.sh --test lays them")
def test_accelerates_own_tests_pass_with_every_dispatched_model_sharded(
    devices: support.Devices, tmp_path: Path
) -> None:
    devices(2)
    without_us, _ = passed(tmp_path, devices, shard="")
    with_us, models = passed(tmp_path, devices, shard="1")
    assert len(without_us) > 20
    assert without_us - with_us <= {WANTS_A_FAILURE}
    words = models.split()  # "dispatched 16 sharded 5"
    assert int(words[3]) >= 4
