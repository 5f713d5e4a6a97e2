"""Which package may know which, and what must not be loaded to answer quickly."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "gr": {"ray", "jobs", "cluster", "fit"},
    "jobs": {"ray", "cluster", "fit"},
    "fit": {"ray", "gr", "jobs", "cluster", "torch", "transformers", "accelerate"},
}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield node.lineno, str(node.module)


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files
        for line, name in imports(file)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["cluster.cli", "fit", "cluster.plan", "jobs.config", "jobs.runtime"])
def test_what_answers_quickly_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'ray', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_fit_needs_nothing_of_the_rest() -> None:
    code = "import sys, fit.cli, fit.fitting, fit.formula, fit.paired, fit.verdict; "
    code += "print(*sorted({'gr', 'jobs', 'cluster', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
