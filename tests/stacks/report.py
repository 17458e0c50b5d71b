"""Sums up what `./install.sh --test` did: what failed and how, one line per step, and the totals as the last line."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

STACKS_FOLDER = Path(__file__).parent
# How many of the lines of engine/ and webui/ a whole run has to run.
LEAST_COVERAGE = 95
# How much of what pytest says of a failed test is shown again: its end names the line and the error.
LAST_LINES = 25


@dataclass(frozen=True)
class Counts:
    """How many tests ended how. A check that failed and a stack that could not run count as one failure, too."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True)
class Line:
    """One line of the summary.

    Args:
        name: the stack's or the check's.
        about: the versions, or nothing.
        outcome: the counts or a remark, in words.
        seconds: how long it took.
        counts: what it adds to the totals.
        failures: for each failed test its name and the end of what pytest says of it.
    """

    name: str
    about: str
    outcome: str
    seconds: int
    counts: Counts
    failures: tuple[str, ...] = ()


def main() -> int:
    """Prints the summary of a results folder; the exit status is 1 if anything failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the folder with steps.tsv and each stack's junit XML")
    lines = read_lines(parser.parse_args().results)
    totals = sum((line.counts for line in lines), Counts())
    for line in lines:
        for failure in line.failures:
            print(f"\n{line.name}: {failure}")
    print()
    print(*layout(lines), sep="\n")
    print(totals)
    return 1 if totals.failed or not lines else 0


def read_lines(results: Path) -> list[Line]:
    """The summary's lines from the steps that install.sh wrote down: kind, name, seconds and exit status, by tabs."""
    steps = results / "steps.tsv"
    rows = steps.read_text().splitlines() if steps.exists() else []
    return [_line(results, *row.split("\t")) for row in rows]


def layout(lines: Iterable[Line]) -> list[str]:
    """The lines in columns."""
    rows = [(line.name, line.about, line.outcome, f"{line.seconds} s") for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def count_tests(cases: Iterable[ElementTree.Element]) -> Counts:
    """Test cases by how they ended. Errors (in a fixture, in collecting) count as failures; xfail counts as skipped."""
    counts = Counts()
    for case in cases:
        if _complaints(case):
            counts += Counts(failed=1)
        elif case.find("skipped") is not None:
            counts += Counts(skipped=1)
        else:
            counts += Counts(passed=1)
    return counts


def _complaints(case: ElementTree.Element) -> list[ElementTree.Element]:
    return [*case.iter("failure"), *case.iter("error")]


def _failures(cases: Iterable[ElementTree.Element]) -> Iterator[str]:
    for case in cases:
        for complaint in _complaints(case):
            said = (complaint.text or complaint.get("message", "")).rstrip().splitlines()[-LAST_LINES:]
            yield "\n".join([f"{case.get('classname', '')}::{case.get('name')} {complaint.tag}", *said])


def _line(results: Path, kind: str, name: str, seconds: str, status: str) -> Line:
    if kind == "check":
        ok = status == "0"
        return Line(name, "", "clean" if ok else "failed", int(seconds), Counts(failed=0 if ok else 1))
    if kind == "skip":
        return Line(name, _versions(name), "skipped: no Python for it here", int(seconds), Counts(skipped=1))
    if kind == "broken":
        return Line(name, _versions(name), "failed: could not be installed", int(seconds), Counts(failed=1))
    if kind == "stack":
        return _suite_line(results, name, int(seconds), int(status))
    if kind == "coverage":
        return _coverage_line(results, int(seconds))
    raise ValueError(f"steps.tsv has a line of an unknown kind: {kind!r}.")


def _suite_line(results: Path, name: str, seconds: int, status: int) -> Line:
    try:
        cases = list(ElementTree.parse(results / f"{name}.xml").iter("testcase"))
    except (FileNotFoundError, ElementTree.ParseError):  # pytest ended before it could write the file, or meanwhile
        return Line(name, _versions(name), f"failed: pytest ended with {status}", seconds, Counts(failed=1))
    counts = count_tests(cases)
    outcome = ", ".join(f"{n} {word}" for word, n in vars(counts).items() if n) or "no tests"
    if counts.passed + counts.failed == 0:
        counts, outcome = counts + Counts(failed=1), f"failed: ran 0 tests ({outcome})"
    elif status != 0 and counts.failed == 0:
        counts, outcome = counts + Counts(failed=1), f"{outcome}, but pytest ended with {status}"
    return Line(name, _versions(name), outcome, seconds, counts, tuple(_failures(cases)))


def _coverage_line(results: Path, seconds: int) -> Line:
    try:
        files = json.loads((results / "coverage.json").read_text())["files"]
    except (FileNotFoundError, ValueError):
        return Line("coverage", "", "failed: pytest left none", seconds, Counts(failed=1))
    shares = {name.removeprefix("extensions/sharded_kv/"): _share(file["summary"]) for name, file in files.items()}
    total = _share(*(file["summary"] for file in files.values()))
    low = sorted((share, name) for name, share in shares.items() if share < LEAST_COVERAGE)
    outcome = f"{total} % of the lines of engine/ and webui/"
    if low:
        outcome += f"; below {LEAST_COVERAGE} %: " + ", ".join(f"{name} {share} %" for share, name in low)
    if total < LEAST_COVERAGE:
        return Line("coverage", "", f"failed: {outcome}", seconds, Counts(failed=1))
    return Line("coverage", "", outcome, seconds, Counts())


def _share(*summaries: dict[str, int]) -> float:
    """How many of 100 lines ran, rounded down: what is too little must not look like enough."""
    lines = sum(summary["num_statements"] for summary in summaries)
    ran = sum(summary["covered_lines"] for summary in summaries)
    return math.floor(1000 * ran / lines) / 10 if lines else 100.0


def _versions(stack: str) -> str:
    """The two versions that make a stack, from its requirements."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (STACKS_FOLDER / f"{stack}.txt").read_text(), re.MULTILINE))
    return "  ".join(f"{package} {pins[package]}" for package in ("transformers", "accelerate"))


if __name__ == "__main__":
    sys.exit(main())
