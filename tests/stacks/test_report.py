"""What the summary of a test run says, and when it says that something failed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).with_name("report.py")

PASSED = '<testcase name="a"/>'
FAILED = '<testcase name="b"><failure message="no"/></testcase>'
ERROR = '<testcase name="c"><error message="no fixture"/></testcase>'
SKIPPED = '<testcase name="d"><skipped message="no GPU"/></testcase>'


@pytest.fixture
def report(tmp_path):
    """Runs the report on steps and junit test cases; gives its exit status and its lines."""

    def run(*steps: str, **cases: str) -> tuple[int, list[str]]:
        (tmp_path / "steps.tsv").write_text("".join(step.replace(" | ", "\t") + "\n" for step in steps))
        for stack, xml in cases.items():
            (tmp_path / f"{stack}.xml").write_text(f"<testsuites><testsuite>{xml}</testsuite></testsuites>")
        done = subprocess.run([sys.executable, REPORT, tmp_path], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    return run


def test_the_last_line_is_the_totals_alone(report):
    status, lines = report("stack | now | 9 | 0", "stack | 2024 | 8 | 0", **{"now": PASSED + SKIPPED, "2024": PASSED})
    assert (status, lines[-1]) == (0, "2 passed, 0 failed, 1 skipped")


def test_a_stack_has_its_versions_counts_and_seconds_in_one_line(report):
    _, lines = report("stack | 2023 | 95 | 0", **{"2023": PASSED + PASSED + SKIPPED})
    assert re.fullmatch(r"2023 +transformers 4\.28\.1  accelerate 0\.19\.0 +2 passed, 1 skipped +95 s", lines[-2])


@pytest.mark.parametrize("case", [FAILED, ERROR], ids=["failure", "error"])
def test_a_test_that_did_not_pass_fails_the_run(report, case):
    status, lines = report("stack | now | 9 | 1", now=PASSED + case)
    assert (status, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


@pytest.mark.parametrize("cases", ["", SKIPPED], ids=["none", "all skipped"])
def test_a_stack_that_ran_no_test_fails_the_run(report, cases):
    status, lines = report("stack | now | 1 | 0", now=cases)
    assert status == 1
    assert "ran 0 tests" in lines[-2]


def test_a_pytest_that_crashed_fails_the_run_though_its_tests_passed(report):
    status, lines = report("stack | now | 9 | 3", now=PASSED)
    assert (status, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def test_a_pytest_that_left_no_results_fails_the_run(report):
    status, lines = report("stack | now | 9 | 4")
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")


def test_a_stack_without_a_python_counts_as_one_skip(report):
    status, lines = report("skip | 2023 | 0 | 0", "stack | now | 9 | 0", now=PASSED)
    assert (status, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")


def test_a_stack_that_could_not_be_installed_fails_the_run(report):
    status, lines = report("broken | 2024 | 9 | 1", "stack | now | 9 | 0", now=PASSED)
    assert (status, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def test_a_check_adds_nothing_unless_it_failed(report):
    status, lines = report("check | ruff check | 1 | 0", "check | mypy | 2 | 1", "stack | now | 9 | 0", now=PASSED)
    assert (status, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def test_a_run_of_nothing_is_a_failure(report):
    status, _ = report()
    assert status == 1
