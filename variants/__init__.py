"""SAE variants, one file each; `load` turns a name or a path into the module, with clear words where that fails."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

SHARED = {"__init__", "base", "compat", "saving"}  # modules of this package that are no variants


def names() -> list[str]:
    """Names of the variants in this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in SHARED and p.stem[0] not in "._")


def path(name: str) -> Path:
    """The file of a variant given by name or by path; FileNotFoundError names the nearest valid name."""
    if name.endswith(".py"):
        found = Path(name)
    else:
        found = Path(__file__).parent / f"{name}.py"
        if name in SHARED or not found.exists():
            near = difflib.get_close_matches(name, names(), 1, 0)
            raise FileNotFoundError(f"no variant named {name!r}; the nearest is {near[0]!r}\n"
                                    f"choose one of {', '.join(names())}, or write variants/{name}.py")
    if not found.exists():
        raise FileNotFoundError(f"no file {name}\ngive the name of a variant ({', '.join(names())}) or an existing file")
    return found


def load(name: str) -> ModuleType:
    """Import a variant by name or file path. Raises SyntaxError or ImportError as Python does, AttributeError without `SAE`."""
    file = path(name)
    name = f"variants.{file.stem}"
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look their module up there
    # compiled from the source each time: Python's own cache takes an edit of equal length within a second for no edit
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    from variants import base

    if not (inspect.isclass(getattr(module, "SAE", None)) and issubclass(module.SAE, base.SAE)):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        near = difflib.get_close_matches("SAE", classes, 1, 0)
        raise AttributeError(f"{file.name} defines no class SAE that derives from variants.base.SAE"
                             + (f" (it defines {', '.join(classes)})" if classes else "") + "\n"
                             + (f"rename {near[0]} to SAE, " if near else "write ") + "class SAE(base.SAE): …; see variants/topk.py")
    return module


def hyperparameters(module: ModuleType) -> dict[str, object]:
    """Names and defaults of a variant's hyper-parameters: the keyword arguments of its SAE."""
    parameters = list(inspect.signature(module.SAE.__init__).parameters.values())[3:]
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def split(text: str) -> list[str]:
    """At the commas outside brackets: "a=(0,1),b=2" -> ["a=(0,1)", "b=2"]."""
    return re.split(r",(?![^(\[{]*[)\]}])", text)


def parse_hyper(module: ModuleType, text: str) -> dict[str, object]:
    """`k=64,auxk_alpha=0` -> {"k": 64, "auxk_alpha": 0}, checked against the variant's own names."""
    known, given = hyperparameters(module), {}
    for item in filter(None, (part.strip() for part in split(text))):
        key, _, value = item.partition("=")
        if key not in known or not value:
            near = difflib.get_close_matches(key, known, 1, 0) if known else []
            raise ValueError(f"--hyper {item}: {Path(module.__file__).stem} has no hyper-parameter {key!r}" + (
                             f"; the nearest is {near[0]!r}" if near and key not in known else "") + "\n"
                             f"write name=value with one of: {', '.join(f'{k}={v}' for k, v in known.items()) or 'none'}")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value  # a bare word is a string
    return given


def build(module: ModuleType, d_in: int, d_sae: int, hyper: dict[str, object]):
    """A freshly initialised SAE of the variant, [d_in, d_sae], in fp32 on the CPU."""
    return module.SAE(d_in, d_sae, **hyper).float()
