"""What the summary of a test run says, and when it says that something failed."""

from __future__ import annotations

import json
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


def test_what_failed_is_shown_before_the_summary_with_the_end_of_what_pytest_says(report):
    said = "\n".join(f"line {n}" for n in range(100))
    case = f'<testcase classname="tests.test_a" name="test_b"><failure message="no">{said}</failure></testcase>'
    _, lines = report("stack | 2024 | 9 | 1", "stack | now | 9 | 0", **{"2024": PASSED + case, "now": PASSED})
    assert lines[1] == "2024: tests.test_a::test_b failure"
    assert lines[2:28] == [*(f"line {n}" for n in range(75, 100)), ""]
    assert lines[28].startswith("2024 ")


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


def covered(**files: tuple[int, int]) -> str:
    """A coverage report: for each file of the engine how many lines ran, of how many."""
    summaries = {
        f"extensions/sharded_kv/engine/{name}.py": {"summary": {"covered_lines": ran, "num_statements": lines}}
        for name, (ran, lines) in files.items()
    }
    return json.dumps({"files": summaries})


@pytest.fixture
def report_coverage(report, tmp_path):
    """Runs the report on a run in which one test passed, and on what it says of coverage; gives status and its line."""

    def run(coverage: str | None) -> tuple[int, str]:
        if coverage is not None:
            (tmp_path / "coverage.json").write_text(coverage)
        status, lines = report("stack | now | 9 | 0", "coverage | coverage | 0 | 0", now=PASSED)
        return status, lines[-2]

    return run


def test_coverage_is_that_of_all_lines_together(report_coverage):
    status, line = report_coverage(covered(graphs=(98, 100), devices=(390, 400)))
    assert status == 0
    assert re.fullmatch(r"coverage +97\.6 % of the lines of engine/ and webui/ +0 s", line)


def test_files_with_too_little_coverage_are_named_the_lowest_first(report_coverage):
    _, line = report_coverage(covered(graphs=(990, 1000), devices=(9, 10), tape=(8, 10)))
    assert "; below 95 %: engine/tape.py 80.0 %, engine/devices.py 90.0 %" in line


def test_too_little_coverage_fails_the_run(report_coverage):
    status, line = report_coverage(covered(graphs=(9499, 10000)))
    assert status == 1
    assert "failed: 94.9 %" in line


def test_just_enough_coverage_does_not(report_coverage):
    assert report_coverage(covered(graphs=(95, 100)))[0] == 0


@pytest.mark.parametrize("coverage", [None, "", "{"], ids=["missing", "empty", "cut off"])
def test_coverage_that_was_not_written_fails_the_run(report_coverage, coverage):
    assert report_coverage(coverage)[0] == 1
