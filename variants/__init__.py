"""SAE variants, one file each; `load` turns a name or a path into the module, with clear words where that fails.

A variant has one of two forms: a class `SAE` (variants/base.py), or a trainer with `.ae` and `.update`
(variants/kit/imperative.py).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import json
import linecache
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
# {path: text} of the files that a run read at its start: an edit meanwhile is the next run's
HELD: dict[str, bytes] = {}


def names() -> list[str]:
    """Names of the variants: all that stands directly in this folder but the contract, base.py."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "base" and file.stem[0] not in "._")


def path(name: str) -> Path:
    """The file of a variant given by name or by path; FileNotFoundError names the nearest valid name."""
    if name.endswith(".py"):
        found = Path(name)
    else:
        found = FOLDER / f"{name}.py"
        if name == "base" or name[:1] == "_" or not found.exists():
            near = difflib.get_close_matches(name, names(), 1, 0)
            raise FileNotFoundError(f"no variant named {name!r}; the nearest is {near[0]!r}\n"
                                    f"choose one of {', '.join(names())}, or write variants/{name}.py")
    if not found.exists():
        raise FileNotFoundError(f"no file {name}\n"
                                f"give the name of a variant ({', '.join(names())}) or an existing file")
    return found


def title(name: str) -> str:
    """What a variant is called: its file's name, or for the copy in a run's folder the name it had there."""
    record = Path(name).with_name("run_info.json")
    if Path(name).name == "variant.py" and record.is_file():
        name = json.loads(record.read_text(encoding="utf-8"))["settings"]["variant"] or name
    return Path(name).stem


def text(file: Path) -> bytes:
    """The source of a variant's file: as it was when the run began, where that is under way."""
    return HELD.get(str(file.resolve())) or file.read_bytes()


def parsed(file: Path) -> ast.Module:
    """The syntax tree of a variant's file; SyntaxError with file and line for what Python cannot read."""
    source = text(file)
    if b"\0" in source:
        line = source[:source.index(b"\0")].count(b"\n") + 1
        raise SyntaxError("the file holds a NUL byte: it is no text in UTF-8", (str(file), line, 1, None))
    try:
        return ast.parse(source, str(file))
    except UnicodeDecodeError as error:
        line = source[:error.start].count(b"\n") + 1
        raise SyntaxError(f"the byte {source[error.start]:#x} is not UTF-8", (str(file), line, 1, None)) from None


def hold(name: str) -> None:
    """Read a variant's file, and what it imports of this package, once for the whole run. SyntaxError, as `parsed`."""
    HELD.clear()
    for file in sources(name):
        HELD[str(file.resolve())] = file.read_bytes()
    # tracebacks show this text
    linecache.cache.update({file: (len(source), None, source.decode("utf-8", "replace").splitlines(True), file)
                            for file, source in HELD.items()})


def sources(name: str) -> list[Path]:
    """The files a variant's result depends on: its own, what it imports of this package, and what variants share."""
    return _imported([path(name).resolve(), *_shared()], parsed)


def _shared() -> list[Path]:
    """What all variants are made with: this module, the contract and its kit."""
    return [FOLDER / "__init__.py", FOLDER / "base.py", *sorted((FOLDER / "kit").glob("*.py"))]


def label(file: Path) -> str:
    """How a source is named in a record: by its place in this package, one from elsewhere by its name."""
    return file.relative_to(FOLDER).as_posix() if file.is_relative_to(FOLDER) else file.name


def _imported(pending: list[Path], tree_of) -> list[Path]:
    """The files, and those of this package that their trees import, directly or not."""
    found = set(pending)
    while pending:
        for node in ast.walk(tree_of(pending.pop())):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named = module + [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if any(n.startswith("variants.kit") for n in named):  # shared already; kit.topk is not the variant topk
                continue
            places = {place / f"{n.rpartition('.')[2]}.py" for n in named for place in (FOLDER, FOLDER / "research")}
            new = {place for place in places if place.exists()} - found
            found |= new
            pending += new
    return sorted(found)


def training_sources(name: str) -> dict[str, str]:
    """{label: code} of what decides a variant's training: its sources without `report`, comments and docstrings."""
    trees: dict[Path, ast.Module] = {}

    def tree_of(file: Path) -> ast.Module:
        trees[file] = _without_report(parsed(file))
        return trees[file]

    return {label(file): ast.dump(trees[file]) for file in _imported([path(name).resolve(), *_shared()], tree_of)}


def meaning(source: bytes) -> str | bytes:
    """What a source does: its syntax without comments, docstrings and layout; itself where Python cannot read it."""
    try:
        return ast.dump(_without_docstrings(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source


def _without_report(tree: ast.Module) -> ast.Module:
    """A module whose classes have no `report`, without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") != "report"] or [ast.Pass()]
    return _without_docstrings(tree)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def load(name: str) -> ModuleType:
    """Import a variant by name or file path; its class is `module.SAE` in either form.

    Raises SyntaxError or ImportError as Python does, AttributeError where there is neither `SAE` nor a trainer.
    """
    from variants import base
    from variants.kit import imperative, trainers

    file = path(name)
    name = f"variants.{file.stem}"
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), package_of(file)
    sys.modules[name] = module  # dataclasses look their module up there
    # compiled from the source each time: Python's own cache takes an edit of equal length within a second for no edit
    tree = parsed(file)
    module.__dict__.update(trainers.lent(tree))
    exec(compile(tree, str(file), "exec"), module.__dict__)
    if inspect.isclass(getattr(module, "SAE", None)) and issubclass(module.SAE, base.SAE):
        return module
    trainer = trainers.trainer_of(module, tree)
    if not trainer:
        raise AttributeError(_no_class(file, module))
    beside = ModuleType(name)  # in a module of its own: the file may have a class SAE, which its trainer makes
    beside.__dict__.update(vars(module), SAE=imperative.adapted(trainer))
    return beside


def _no_class(file: Path, module: ModuleType) -> str:
    """The message about a file that defines neither form of a variant."""
    classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
    near = difflib.get_close_matches("SAE", classes, 1, 0)
    there = f" (it defines {', '.join(classes)})" if classes else ""
    advice = f"rename {near[0]} to SAE, " if near else "write "
    return (f"{file.name} defines no class SAE that derives from variants.base.SAE, and no class with an update method"
            f"{there}\n{advice}class SAE(base.SAE): …; see variants/topk.py")


def package_of(file: Path) -> str:
    """The package a file lies in, so that its relative imports work; the file of an installed library is one, too."""
    folders = list(itertools.takewhile(lambda folder: (folder / "__init__.py").exists(), file.resolve().parents))
    package = ".".join(folder.name for folder in reversed(folders))
    if package:
        importlib.import_module(package)
    return package


def build(module: ModuleType, d_in: int, d_sae: int, hyper: dict[str, object], setting: dict | None = None):
    """A freshly initialised SAE of the variant, [d_in, d_sae], in fp32, on the CPU unless a trainer puts it elsewhere.

    `setting` is what trainers are told of the run: steps, lr (or None), seed, device, layer, lm_name.
    """
    from variants.kit import imperative, trainers

    if issubclass(module.SAE, imperative.Imperative):
        return module.SAE(d_in, d_sae, trainers.SETTING | (setting or {}), **hyper)
    return module.SAE(d_in, d_sae, **hyper).float()
