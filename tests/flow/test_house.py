"""The house: which room may import which. Every import counts, wherever in a file it stands."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter

import pytest

from tests import PROJECT

PACKAGES = ("evals", "runs", "variants")
# what the modules of a place may not import: experiment → runs → evals, variants; texts know no model
CLOSED = {"evals": ("experiment", "runs", "variants"), "variants": ("experiment", "runs", "evals"),
          "runs": ("experiment",),
          "evals.texts": ("evals.model", "evals.common"), "evals.model": ("evals.common",),
          "evals.storage": ("evals.texts", "evals.model", "evals.common"), "evals.cache": ("evals",)}


def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of the program's own modules."""
    files = [PROJECT / "experiment.py", *(file for package in PACKAGES for file in (PROJECT / package).rglob("*.py"))]
    inside = [file for file in files if "baseline" not in file.parts]
    named = {".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): file
             for file in inside}
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in named.items()}


@functools.cache
def imports() -> dict[str, set[str]]:
    """{module: the modules of this project that it imports}; of `from a import b` a.b where that is one, else a."""
    trees = modules()
    found = {}
    for name, tree in trees.items():
        asked = [(alias.name, "") for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        asked += [(node.module or "", alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                  for alias in node.names]
        assert not any(node.level for node in ast.walk(tree)
                       if isinstance(node, ast.ImportFrom)), f"{name}: a relative import"
        found[name] = {f"{a}.{b}" if f"{a}.{b}" in trees else a for a, b in asked} & trees.keys()
    return found


def test_no_circle():
    """Fails if two modules import each other, directly or through others."""
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("place", CLOSED)
def test_imports_run_one_way(place):
    """Fails if a module imports one of a place that it must not know."""
    def lies_in(module, where):
        return module == where or module.startswith(f"{where}.")

    wrong = [f"{module} imports {other}" for module, others in imports().items() if lies_in(module, place)
             for other in others if any(lies_in(other, closed) for closed in CLOSED[place])]
    assert not wrong
