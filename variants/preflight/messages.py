"""Where in a variant's file something is wrong, and the one clear message about it.

A message is "file.py:line: what is wrong\\nwhat to do". What the variant itself raised keeps its type.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

import variants
from variants.kit import imperative
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
    """`file.py:line` of the last frame inside `file`, along the chain of causes; None if the error never was there."""
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


ADVICE = (  # (what is said, what helps a variant, what helps a trainer where that differs)
    (r"before Module.__init__", "call super().__init__(d_in, d_sae) first", "call super().__init__() first"),
    (r"second time|already been freed", "a tensor kept from an earlier step still carries its graph: store it with "
                                        ".detach()", ""),
    (r"inplace operation",
     "a tensor that the gradient needs was changed in place: write y = y + … instead of y += …, or .clone() first", ""),
    (r"does not require grad",
     "the loss was detached (.item(), .detach(), torch.no_grad()): keep it a tensor computed from parameters", ""),
    (r"[Aa]ccumulate|view.*leaf|leaf [Vv]ariable", "change parameters only in after_step, or under torch.no_grad()",
     "change parameters only under torch.no_grad(), or through .data"),
    (r"cannot pickle", "what cannot be copied (an open file, a lock) does not belong on the SAE: keep it outside",
     "what cannot be copied (an open file, a lock) belongs on the trainer, not on ae"),
)
OF_SIZES = re.compile("shape|size|dimension|unpack|index|broadcast|mat1|match|rank|stack|dim ")
# that a step of the preflight may take; importing a file twice that, for what it imports from a cold disk
SECONDS = 20.0


class TooSlow(BaseException):
    """A step of the variant's own code went on and on; not an Exception, which such code may well swallow."""


@contextmanager
def limited(seconds: float, doing: str):
    """Raise TooSlow inside the code that runs after so many seconds; no limit on Windows and in threads."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    begun = time.monotonic()

    def stop(number, frame):
        if outer and time.monotonic() - begun > outer - 0.05:  # the alarm of a whole run (--minutes)
            before(number, frame)
        raise TooSlow(f"nothing came of it within {seconds:.0f} s ({doing})\na loop without an end, or work that "
                      "belongs outside: data is read and scripts are run before the import")

    before = signal.signal(signal.SIGALRM, stop)
    outer, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    if 0 < outer < seconds:
        signal.setitimer(signal.ITIMER_REAL, outer, again)
    try:
        yield
    finally:
        left = max(1e-3, outer - (time.monotonic() - begun)) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, again)
        signal.signal(signal.SIGALRM, before)


def explained(error: BaseException, file: Path, doing: str, sizes: Sizes | None = None, line: int | None = None,
              trainer: bool = False) -> Exception:
    """The variant's own exception again, of the same type, with the place, what was being done and what helps."""
    error = behind(error)
    message, _, advice = said(error).strip().partition("\n")
    place = where(error, file) or (f"{file.name}:{line}" if line else file.name)
    if isinstance(error, SyntaxError):
        message = error.msg + (f": {error.text.strip()}" if error.text else "")
        advice = "save the file as UTF-8" if "utf-8" in message.lower() else "correct that line"
    elif not (advice and isinstance(error, (ValueError, AttributeError, TypeError, TooSlow))
              and len(advice.split("\n")) == 1):
        message = f"{message if len(message) <= 240 else message[:239] + '…'} ({doing})"
        advice = advice_for(error, sizes, trainer)
    text = f"{message}\n{advice}" if message.startswith(file.name) else f"{place}: {message}\n{advice}"
    kind = type(error)
    if not isinstance(error, Exception):
        kind = TimeoutError if isinstance(error, TooSlow) else RuntimeError
    # of the same type, whatever its own signature and its own way to show itself (KeyError quotes)
    worded = type(kind.__name__, (kind,), {"__str__": lambda self: text, "__init__": lambda self, *_: None,
                                           "__module__": kind.__module__})
    again = worded.__new__(worded, text)
    if isinstance(error, SyntaxError):
        again.filename, again.lineno = error.filename, error.lineno
    return again


def behind(error: BaseException) -> BaseException:
    """The error inside a property: Python and torch report one as if the object had no such attribute."""
    owner = getattr(error, "obj", None)
    if not isinstance(error, AttributeError) or owner is None or not error.name:
        return error
    getter = inspect.getattr_static(type(owner), error.name, None)
    if not isinstance(getter, property):
        return error
    try:
        getter.fget(owner)
    except Exception as inner:  # noqa: BLE001
        return behind(inner)
    return error


def said(error: BaseException) -> str:
    """What an error says; of values that are no words, what they are."""
    if isinstance(error, SystemExit):
        return "the file ends the whole program (sys.exit, exit or argparse)"
    if isinstance(error, KeyError) and len(error.args) == 1:
        key = error.args[0]
        return f"{described(key)} is no key" if isinstance(key, Tensor) else f"there is no key {key!r}"
    plain = isinstance(error, (OSError, UnicodeError)) or not error.args or isinstance(error.args[0], (str, int, float))
    if not plain:
        return ", ".join(described(value) for value in error.args)
    return str(error) or type(error).__name__


def advice_for(error: BaseException, sizes: Sizes | None, trainer: bool) -> str:
    """What helps against an error of the variant's own code."""
    if isinstance(error, SystemExit):
        return 'take it out, or put it below if __name__ == "__main__":'
    moved = moved_to_kit(error) if isinstance(error, ImportError) else None
    if moved:
        return f"it lies in variants/kit now: from variants.kit import {moved}"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "it").partition(".")[0]
        return f"install the package (pip install {package.replace('_', '-')}), or take the import out"
    if isinstance(error, ImportError):
        return "check the name and the package's version, or take the import out"
    if isinstance(error, ZeroDivisionError):
        return "a count or a length in steps came to 0 here: max(1, …)"
    if isinstance(error, UnboundLocalError):
        return "give it a value on every path that leads there"
    if isinstance(error, NameError):
        return f"import or define {error.name or 'it'} above that line, or check its spelling"
    if isinstance(error, KeyError) and any(isinstance(key, Tensor) for key in error.args):
        return "a state dict has names or numbers as keys; an optimiser's own .state has its parameters"
    for pattern, words, of_trainer in ADVICE:
        if re.search(pattern, str(error)):
            return of_trainer if trainer and of_trainer else words
    near = nearest(error)
    if near:
        return near
    if sizes and OF_SIZES.search(str(error)):
        return f"correct that line; here B = {sizes.B} tokens, d_in = {sizes.D}, d_sae = {sizes.F}"
    return "correct that line"


def moved_to_kit(error: ImportError) -> str | None:
    """The module of variants/kit that a failed import looked for directly in variants/, where it once lay."""
    name = re.search(r"cannot import name '(\w+)' from 'variants'|No module named 'variants\.(\w+)'", str(error))
    module = name and (name[1] or name[2])
    return module if module and (variants.FOLDER / "kit" / f"{module}.py").is_file() else None


def nearest(error: BaseException) -> str | None:
    """For a misspelt attribute, the nearest one that exists."""
    if not isinstance(error, AttributeError) or getattr(error, "obj", None) is None or not error.name:
        return None
    kind, own, told = type(error.obj).__name__, [], []
    if isinstance(error.obj, nn.Module):
        own = [name for name, _ in error.obj.named_parameters()]
    close = difflib.get_close_matches(error.name, own, 1, 0.5)
    close = close or difflib.get_close_matches(error.name, dir(error.obj), 1, 0.5)
    if close:
        told.append(f"the nearest attribute of {kind} is {close[0]!r}")
    if own:
        told.append(f"its parameters are {', '.join(own)}")
    return "; ".join(told) or None


@contextmanager
def attempting(v: Variant, doing: str, sizes: Sizes | None = None, line: int | Callable[[], int | None] | None = None):
    """Run the variant's own code, for SECONDS at most; what it raises gets its place and some advice."""
    try:
        compiles = b"torch.compile" in variants.text(v.file)  # which takes its time in the first step
        with limited(SECONDS * (10 if compiles else 1), doing):
            yield
    except (Exception, SystemExit, TooSlow) as error:
        line = line() if callable(line) and not where(error, v.file) else line
        raise explained(error, v.file, doing, sizes, line if isinstance(line, int) else None, v.is_trainer) from error


def defined(v: Variant, method: str) -> int | None:
    """Line of `def method` in the class SAE, else of the class; of a trainer, in its class before any other."""
    wanted = v.module.SAE.trainer_class.__name__ if v.is_trainer else "SAE"
    classes = [node for node in v.tree.body if isinstance(node, ast.ClassDef)]
    first = [node for node in classes if node.name == wanted]
    others = classes if v.is_trainer else []
    for node in first + others:
        for f in node.body:
            if isinstance(f, ast.FunctionDef) and f.name == method:
                return f.lineno
    return first[0].lineno if first else None


def assigned(v: Variant, name: str) -> int | None:
    """Line that creates or registers `self.name` (`gate.weight`: self.gate; a trainer's `ae.gate`: in the ae's class).

    None if base.SAE does.
    """
    parts = [part for part in name.split(".") if not (v.is_trainer and part == "ae")]
    for attribute in parts[:1] + parts[-1:]:
        for node in ast.walk(v.tree):
            parts_of_targets = (t for target in targets(node) for t in ast.walk(target))
            if any(isinstance(t, ast.Attribute) and t.attr == attribute for t in parts_of_targets):
                return node.lineno
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                registers, first = node.func.attr.startswith("register_"), node.args[0]
                if registers and isinstance(first, ast.Constant) and first.value == attribute:
                    return node.lineno
    return None


def targets(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def zeroed(v: Variant, name: str) -> int | None:
    """Line that makes a weight zero, else the one that creates it."""
    parts = [part for part in name.split(".") if not (v.is_trainer and part == "ae")]
    statements = [node for node in ast.walk(v.tree) if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr))]
    for node in statements:
        words = ast.unparse(node)
        if "zero" in words and any(re.search(rf"\.{re.escape(part)}\b", words) for part in parts):
            return node.lineno
    return assigned(v, name)


def computed(v: Variant, term: str) -> int | None:
    """Line where a loss term is computed: the last assignment of the variable beside its name in the dict."""
    for function in ast.walk(v.tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            pairs = zip(node.keys, node.values) if isinstance(node, ast.Dict) else ()
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):  # terms["name"] = …
                pairs = [(node.targets[0].slice, node.value)]
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value == term:
                    names = [a.lineno for a in ast.walk(function) if isinstance(a, ast.Assign)
                             and isinstance(value, ast.Name)
                             and any(isinstance(t, ast.Name) and t.id == value.id for t in a.targets)]
                    return names[-1] if names else key.lineno
    return defined(v, "loss")


def declared(v: Variant, name: str) -> int | None:
    lines = [n.lineno for n in ast.walk(v.tree) for t in targets(n)
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


def hold(name: str) -> None:
    """Read a variant's files once for the whole run; the error names the line of one that Python cannot read."""
    try:
        variants.hold(name)
    except FileNotFoundError:
        raise
    except (SyntaxError, OSError) as error:
        raise explained(error, variants.path(name), "when it is read") from error
