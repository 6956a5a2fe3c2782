"""Two speeds: `python -m pytest -m "not slow"` leaves out what is marked slow, and has something of every file."""

import ast

import pytest

from tests import PROJECT

FILES = sorted((PROJECT / "tests").rglob("test_*.py"))


def is_slow(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in function.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_has_a_quick_test(file):
    """Fails if all tests of a file are marked slow: a mistake in what it tests would wait for the full suite."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    tests = [part for part in body if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")]
    assert not all(is_slow(test) for test in tests)
    marked = [part for part in body if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "pytestmark"]
    assert "slow" not in " ".join(ast.unparse(part.value) for part in marked)
