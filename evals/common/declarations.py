"""What an eval's file declares, read from its text without running it, and what keeps that file from being an eval."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Iterable, Iterator

# what an eval must define, with an example of each
LITERALS = {"EVAL_TYPE_ID": 'EVAL_TYPE_ID = "my_eval"', "METRICS": 'METRICS = {"my_score": "higher"}',
            "CONFIG": 'CONFIG = {"gemma": {"rows": 100}, "embedded": {"rows": 100}, "tiny": {"rows": 10}}'}
FUNCTIONS = {"requirements": "def requirements(config, facts): return []",
             "run": 'def run(setup, saes): return {name: Result({"my_category": {"my_score": 1.0}}) for name in saes}'}
OPTIONAL = ("NOTE", "INSTRUCT", "RANGES", "RECORDED", "MASKED")
# what an eval may define and must define in this form, with an example of each
FORMED = {"COST": 'COST = {"gemma": (2000, 800), "embedded": (30, 10), "tiny": (1, 1)}',
          "COST_BY": 'COST_BY = (("rows",), ("context_size",))'}
WAYS = ("higher", "lower", "")


def value(source: bytes, label: str, constant: str):
    """The value of a literal that a file's text assigns to a name, or None; ValueError with file and line.

    `label`: how messages call the file.
    """
    statement = read(source, label).get(constant)
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or statement.value is None:
        return None
    node = statement if isinstance(statement, ast.AugAssign) else statement.value
    try:
        return ast.literal_eval(node)  # a fresh value each time: it may be changed
    except (ValueError, TypeError, RecursionError):
        example = LITERALS.get(constant, f"{constant} = ...")
        raise ValueError(f"{label}:{statement.lineno}: {constant} must be a literal: it is read without running the "
                         f"file\nwrite it out, without names, calls and comprehensions: {example}") from None


def problem(source: bytes, label: str) -> str:
    """What keeps a file's text from being an eval, as "file:line: what\\nwhat to do"; "" if nothing."""
    try:
        found = read(source, label)
        values = {name: value(source, label, name) for name in (*LITERALS, *OPTIONAL, *FORMED)}
    except ValueError as error:
        return str(error)
    start = found["EVAL_TYPE_ID"].lineno if "EVAL_TYPE_ID" in found else 1
    for name, example in LITERALS.items():
        if values[name] is None:
            return f"{label}:{start}: an eval defines {name}, and this file does not\nadd {example}"
        if not _fits(name, values[name]):
            return f"{label}:{found[name].lineno}: {name} has another form than an eval's\nwrite {example}"
    for name, example in FORMED.items():
        if name in found and not _fits(name, values[name]):
            return f"{label}:{found[name].lineno}: {name} has another form than an eval's\nwrite {example}"
    for name, example in FUNCTIONS.items():
        if name not in found and "*" not in found:
            return f"{label}:{start}: an eval defines {name}, and this file does not\nadd {example}"
    return ""


def _fits(name: str, given) -> bool:
    """Whether the value of a constant has the form that it must have."""
    if name == "EVAL_TYPE_ID":
        return isinstance(given, str) and bool(given)
    if name == "COST_BY":
        return isinstance(given, (tuple, list)) and all(map(_are_names, given))
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        return False
    if name == "METRICS":
        return all(way in WAYS for way in given.values())
    if name == "COST":
        return all(map(_are_two_costs, given.values()))
    return all(isinstance(settings, dict) for settings in given.values())


def _are_names(given) -> bool:
    """Whether a value is names of settings, at least one, and no bare text, which Python takes for its letters."""
    return isinstance(given, (tuple, list)) and bool(given) and all(isinstance(name, str) for name in given)


def _are_two_costs(given) -> bool:
    """Whether a value is two thousands of tokens."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    return all(type(tokens) in (int, float) and 0 <= tokens < math.inf for tokens in given)


@functools.lru_cache(64)
def read(source: bytes, label: str) -> dict[str, ast.AST]:
    """{name: the last statement that binds it} outside functions and classes; ValueError for what Python cannot read.

    "*" is bound where a file imports everything of another.
    """
    try:
        tree = ast.parse(source, label)
    except (ValueError, SyntaxError, RecursionError) as error:  # bytes that are no UTF-8, too
        line = getattr(error, "lineno", None) or 1
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"{label}:{line}: Python cannot read this file: {what}\n"
                         "mend it, or take the file out of evals/") from None
    return {name: statement for statement in _statements(tree.body) for name in _bound(statement)}


def _statements(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What runs when a module is loaded: also inside `if`, `try` and `with`, not inside functions and classes."""
    for node in nodes:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            yield from _statements(ast.iter_child_nodes(node))


def _bound(statement: ast.AST) -> list[str]:
    """The names that one statement binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in statement.names]
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
