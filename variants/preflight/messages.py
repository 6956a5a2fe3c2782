"""Where in a variant's file something is wrong, and the one clear message about it.

A message is "file.py:line: what is wrong\\nwhat to do". What the variant itself raised keeps its type.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from variants import imperative
from variants.preflight.memory import Sizes


@dataclass(frozen=True)
class Variant:
    """The variant under examination."""

    module: ModuleType
    file: Path
    tree: ast.Module
    given: dict  # hyper-parameters as the user set them
    hyper: dict  # and with the defaults
    setting: dict = field(default_factory=dict)  # what a trainer is told of the run, see variants.build

    @property
    def is_trainer(self) -> bool:
        """Whether it has the imperative form."""
        return issubclass(self.module.SAE, imperative.Imperative)


def where(error: BaseException, file: Path | str) -> str | None:
    """`file.py:line` of the last frame inside `file`, along the chain of causes; None where the error never was there."""
    file, seen = Path(file).resolve(), set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == file:
            return f"{file.name}:{error.lineno}"
        lines, step = [], error.__traceback__
        while step is not None:
            if Path(step.tb_frame.f_code.co_filename).resolve() == file:
                lines.append(step.tb_lineno)
            step = step.tb_next
        if lines:
            return f"{file.name}:{lines[-1]}"
        error = error.__cause__ or error.__context__
    return None


def at(v: Variant, line: int | None) -> str:
    return f"{v.file.name}:{line}" if line else v.file.name


def fail(v: Variant, line: int | None, what: str, advice: str):
    """Raise the one clear message."""
    raise ValueError(f"{at(v, line)}: {what}\n{advice}")


ADVICE = (
    (r"before Module.__init__", "call super().__init__(d_in, d_sae) first"),
    (r"second time|already been freed", "a tensor kept from an earlier step still carries its graph: store it with .detach()"),
    (r"inplace operation", "a tensor that the gradient needs was changed in place: write y = y + … instead of y += …, or .clone() first"),
    (r"does not require grad", "the loss was detached (.item(), .detach(), torch.no_grad()): keep it a tensor computed from parameters"),
    (r"[Aa]ccumulate|view.*leaf|leaf [Vv]ariable", "change parameters only in after_step, or under torch.no_grad()"),
)


def explained(error: Exception, file: Path, doing: str, sizes: Sizes | None = None, line: int | None = None) -> Exception:
    """The variant's own exception again, of the same type, with the place, what was being done and what helps."""
    message, _, advice = (str(error) or type(error).__name__).strip().partition("\n")
    place = where(error, file) or (f"{file.name}:{line}" if line else file.name)
    if isinstance(error, SyntaxError):
        message = error.msg + (f": {error.text.strip()}" if error.text else "")
        advice = "correct that line"
    elif not advice:
        message = f"{message if len(message) <= 240 else message[:239] + '…'} ({doing})"
        advice = next((words for pattern, words in ADVICE if re.search(pattern, str(error))), None) or nearest(error) or (
            "correct that line" + (f"; here B = {sizes.B} tokens, d_in = {sizes.D}, d_sae = {sizes.F}" if sizes else ""))
    text = f"{message}\n{advice}" if message.startswith(file.name) else f"{place}: {message}\n{advice}"
    try:
        again = type(error)(text)
    except Exception:  # noqa: BLE001  an exception class with a signature of its own
        again = None
    if again is None or str(again) != text:  # KeyError would show the message quoted
        again = RuntimeError(text.replace(": ", f": {type(error).__name__}: ", 1))
    return again


def nearest(error: Exception) -> str | None:
    """For a misspelt attribute, the nearest one that exists."""
    if isinstance(error, AttributeError) and getattr(error, "obj", None) is not None and error.name:
        kind, own = type(error.obj).__name__, [n for n, _ in error.obj.named_parameters()] if isinstance(error.obj, nn.Module) else []
        close = difflib.get_close_matches(error.name, own, 1, 0.5) or difflib.get_close_matches(error.name, dir(error.obj), 1, 0.5)
        said = [f"the nearest attribute of {kind} is {close[0]!r}"] if close else []
        said += [f"its parameters are {', '.join(own)}"] if own else []
        return "; ".join(said) or None
    return None


@contextmanager
def attempting(v: Variant, doing: str, sizes: Sizes | None = None, line: int | Callable[[], int | None] | None = None):
    """Run the variant's own code; what it raises gets its place and some advice."""
    try:
        yield
    except Exception as error:
        line = line() if callable(line) and not where(error, v.file) else line
        raise explained(error, v.file, doing, sizes, line if isinstance(line, int) else None) from error


def defined(v: Variant, method: str) -> int | None:
    """Line of `def method` in the class SAE, else of the class; of a trainer, in whichever class has it, the trainer's before others."""
    wanted = v.module.SAE.trainer_class.__name__ if v.is_trainer else "SAE"
    classes = [node for node in v.tree.body if isinstance(node, ast.ClassDef)]
    first = [node for node in classes if node.name == wanted]
    for node in first + classes * v.is_trainer:
        for f in node.body:
            if isinstance(f, ast.FunctionDef) and f.name == method:
                return f.lineno
    return first[0].lineno if first else None


def assigned(v: Variant, name: str) -> int | None:
    """Line that creates `self.name` (for `gate.weight`: self.gate), or registers it; None if base.SAE does."""
    name = name.split(".")[0]
    for node in ast.walk(v.tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(t, ast.Attribute) and t.attr == name for target in targets for t in ast.walk(target)):
            return node.lineno
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("register_")
                and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == name):
            return node.lineno
    return None


def computed(v: Variant, term: str) -> int | None:
    """Line where a loss term is computed: the last assignment of the variable that stands beside its name in the dict."""
    for function in ast.walk(v.tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            pairs = zip(node.keys, node.values) if isinstance(node, ast.Dict) else ()
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):  # terms["name"] = …
                pairs = [(node.targets[0].slice, node.value)]
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value == term:
                    names = [a.lineno for a in ast.walk(function) if isinstance(a, ast.Assign) and isinstance(value, ast.Name)
                             and any(isinstance(t, ast.Name) and t.id == value.id for t in a.targets)]
                    return names[-1] if names else key.lineno
    return defined(v, "loss")


def declared(v: Variant, name: str) -> int | None:
    lines = [n.lineno for n in ast.walk(v.tree) if isinstance(n, (ast.Assign, ast.AnnAssign))
             for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
             if getattr(t, "id", getattr(t, "attr", None)) == name]
    return lines[0] if lines else defined(v, "__init__")


def returns(v: Variant) -> int | None:
    """Line of the last return in loss."""
    lines = [n.lineno for f in ast.walk(v.tree) if isinstance(f, ast.FunctionDef) and f.name == "loss"
             for n in ast.walk(f) if isinstance(n, ast.Return)]
    return max(lines) if lines else defined(v, "loss")


def described(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple ({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"
