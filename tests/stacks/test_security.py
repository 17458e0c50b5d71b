"""What the extension asks for and what it must never do: read in its own files, once for all stacks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTENSION = ROOT / "extensions" / "sharded_kv"
REQUIREMENTS = [
    Requirement(line)
    for line in (EXTENSION / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
# A pickle may run anything when it is loaded; so may a text that is evaluated.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_requirement_is_a_range_that_the_tested_version_is_in(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {">=", "<"}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "tests/stacks/tools.txt").read_text(), re.MULTILINE))
    assert requirement.specifier.contains(pins[requirement.name])


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_readme_has_one_install_by_hand_what_the_installer_does(requirement: Requirement) -> None:
    by_hand = re.findall(r'`pip install "([^"]+)"`', (ROOT / "README.md").read_text())
    assert requirement in map(Requirement, by_hand)


@pytest.mark.parametrize("file", sorted(EXTENSION.rglob("*.py")), ids=lambda file: str(file.relative_to(EXTENSION)))
def test_no_file_loads_a_pickle_or_runs_a_text(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert FORBIDDEN_MODULES.isdisjoint(_imported(tree))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert FORBIDDEN_CALLS.isdisjoint(calls)


def _imported(tree: ast.AST) -> Iterator[str]:
    """The first part of each module's name that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
