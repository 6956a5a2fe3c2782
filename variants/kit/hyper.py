"""Hyper-parameters of a variant: their names, and what `--hyper` and `--sweep` say of them."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from variants.kit import imperative, trainers
from variants.kit.files import file_name


def hyperparameters(module: ModuleType) -> dict[str, object]:
    """Names and defaults of a variant's hyper-parameters: the keyword arguments of its SAE or trainer."""
    if issubclass(module.SAE, imperative.Imperative):
        return trainers.hyperparameters(module.SAE.trainer_class)
    parameters = list(inspect.signature(module.SAE.__init__).parameters.values())[3:]
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def split(text: str) -> list[str]:
    """At the commas outside brackets: "a=(0,1),b=2" -> ["a=(0,1)", "b=2"]."""
    return re.split(r",(?![^(\[{]*[)\]}])", text)


def parse_hyper(module: ModuleType, text: str, flag: str = "--hyper") -> dict[str, object]:
    """`k=64,auxk_alpha=0` -> {"k": 64, "auxk_alpha": 0}, checked against the names and kinds that the variant knows."""
    known, given = hyperparameters(module), {}
    for item in filter(None, (part.strip() for part in split(text))):
        key, equals, value = (part.strip() for part in item.partition("="))
        forms = f"write name=value with one of: {', '.join(f'{k}={v}' for k, v in known.items()) or 'none'}"
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            nearest = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{flag} {item}: {Path(module.__file__).stem} has no hyper-parameter {key!r}{nearest}\n"
                             f"{forms}")
        if not value:
            raise ValueError(f"{flag} {item}: {key} is given no value\n{forms}")
        if key in given:
            raise ValueError(f"{flag} {text}: {key} is given twice\n"
                             f"keep one of the two; --sweep {key}=… trains an SAE for each value")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            given[key] = value  # a bare word is a string
        wanted = lacking(given[key], known[key], annotation(module, key))
        if wanted:
            raise ValueError(f"{flag} {item}: {key} must be {wanted}\nits default is {known[key]!r}")
    return given


def annotation(module: ModuleType, key: str) -> str:
    """What the variant's author wrote of the kind of a hyper-parameter, "" for nothing."""
    trainer = issubclass(module.SAE, imperative.Imperative)
    parameters = inspect.signature(module.SAE.trainer_class if trainer else module.SAE.__init__).parameters
    written = parameters[key].annotation
    return "" if written is inspect.Parameter.empty else getattr(written, "__name__", str(written))


NUMBERS = {"int", "float"}


def lacking(value, default, annotated: str = "") -> str:
    """What a hyper-parameter's value would have to be, judged by its default, and surely is not; else "".

    A default of None or of text, and an annotation other than of one plain kind, leave all kinds open. Whether a number
    will do is the variant's own to say: a k of 1.5 is meant in one and senseless in another.
    """
    numbers = list(_numbers(value))
    if any(not -1e300 < number < 1e300 for number in numbers):
        return "finite"
    kind = type(default).__name__
    if annotated not in ("", kind) and not {annotated, kind} <= NUMBERS:
        return ""
    if kind == "bool":
        return "" if isinstance(value, (bool, int)) and value in (0, 1) else "True or False"
    if kind in NUMBERS:
        return "" if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    if kind in ("tuple", "list"):
        if not isinstance(value, (tuple, list)):
            return "several values in brackets, (1, 2); one alone is (1,)"
        alike = {type(item).__name__ for item in default} <= NUMBERS and bool(default)
        return "several numbers" if alike and len(numbers) < len(value) else ""
    return "a dict" if kind == "dict" and not isinstance(value, dict) else ""


def _numbers(value) -> Iterator[int | float]:
    """The numbers in a value, at any depth."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple, set)):
        for part in parts:
            yield from _numbers(part)


def parse_sweep(module: ModuleType, text: str) -> dict[str, dict[str, object]]:
    """`k=20,40` -> {".k_20": {"k": 20}, ".k_40": {"k": 40}}; `k=20,40,auxk_alpha=0,0.03`: every combination.

    "" -> {"": {}}. The names become those of folders and files: what has no place there is replaced, see `file_name`.
    """
    axes: dict[str, list[dict]] = {}
    for item in (part.strip() for part in split(text)) if text else []:
        if "=" in item:  # the next hyper-parameter begins
            key = item.partition("=")[0].strip()
            if key in axes:
                raise ValueError(f"--sweep {text}: {key} is given twice\nname all of its values at once: {key}=20,40")
            axes[key] = []
        elif not axes:
            raise ValueError(f"--sweep {text} does not begin with a name\n"
                             "write --sweep k=20,40,80 or --sweep k=20,40,auxk_alpha=0,0.03")
        key = next(reversed(axes))
        values = parse_hyper(module, item if "=" in item else f"{key}={item}", "--sweep")
        if values in axes[key]:
            raise ValueError(f"--sweep {text}: {key} is given the value {values[key]} twice\nname each value once")
        axes[key].append(values)
    combined = [{k: v for h in each for k, v in h.items()} for each in itertools.product(*axes.values())]
    return {file_name("".join(f".{k}_{v}" for k, v in h.items())): h for h in combined}
