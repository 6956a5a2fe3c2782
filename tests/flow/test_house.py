"""The house: which room may import which, wherever in a file it does so; how long what people read may be."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter

import pytest

import variants
from tests import OWN_VARIANTS, PROJECT

PACKAGES = ("evals", "runs", "variants")
# what the modules of a place may not import: experiment → runs → evals, variants; texts know no model
CLOSED = {"evals": ("experiment", "runs", "variants"), "variants": ("experiment", "runs", "evals"),
          "runs": ("experiment",),
          "evals.texts": ("evals.model", "evals.common"), "evals.model": ("evals.common",),
          "evals.storage": ("evals.texts", "evals.model", "evals.common"), "evals.cache": ("evals",)}


def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of the program's own modules."""
    files = [PROJECT / "experiment.py", *(file for package in PACKAGES for file in (PROJECT / package).rglob("*.py"))]
    beside = {PROJECT / f"variants/{name}.py" for name in variants.names() if name not in OWN_VARIANTS}  # a user's
    inside = [file for file in files if "baseline" not in file.parts and file not in beside]
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


LINES = {"experiment.py": 1000, "variants/base.py": 300, "README.md": 130,
         **{f"variants/{name}.py": 150 for name in OWN_VARIANTS}}


@pytest.mark.parametrize("file", LINES)
def test_what_is_read_in_one_sitting_can_be(file):
    """Fails if a file that people read from top to bottom has grown too long for that."""
    assert len((PROJECT / file).read_text(encoding="utf-8").splitlines()) <= LINES[file]


def test_the_flow_is_written_out():
    """Fails if experiment.py has a function longer than a screen, or does in one expression what takes statements."""
    tree = ast.parse((PROJECT / "experiment.py").read_text(encoding="utf-8"))
    functions = [part for part in tree.body if isinstance(part, ast.FunctionDef)]
    found = [f"{part.name} is long" for part in functions if part.end_lineno - part.lineno >= 60]
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)):
            if any(isinstance(part, ast.NamedExpr) for part in ast.walk(node.test)):
                found.append(f"{node.lineno}: an assignment in a condition")
            if isinstance(node, ast.IfExp) and sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1:
                found.append(f"{node.lineno}: a conditional expression in another")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            found += [f"{node.lineno}: a product with a condition" for part in (node.left, node.right)
                      if isinstance(part, (ast.Compare, ast.BoolOp))]
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            found += [f"{node.lineno}: x and y or z" for part in node.values if isinstance(part, ast.BoolOp)]
    assert not found
