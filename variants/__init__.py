"""SAE variants, one file each; `load` turns a name or a path into the module, with clear words where that fails.

A variant has one of two forms: a class `SAE` (variants/base.py), or a trainer with `.ae` and `.update`
(variants/kit/imperative.py).
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import inspect
import itertools
import json
import linecache
import re
import sys
from collections.abc import Iterator
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
        raise FileNotFoundError(f"no file {name}\ngive the name of a variant ({', '.join(names())}) or an existing file")
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
            places = {place / f"{n.rpartition('.')[2]}.py" for n in named for place in (FOLDER, FOLDER / "research")}
            new = {place for place in places if place.exists()} - found
            found |= new
            pending += new
    return sorted(found)


def training_sources(name: str) -> dict[str, str]:
    """{label: code} of what decides a variant's training:
    its sources without what only its `report` needs, comments and docstrings.
    """
    trees: dict[Path, ast.Module] = {}

    def tree_of(file: Path) -> ast.Module:
        trees[file] = _without_report(parsed(file))
        return trees[file]

    return {label(file): ast.dump(trees[file]) for file in _imported([path(name).resolve(), *_shared()], tree_of)}


def _without_report(tree: ast.Module) -> ast.Module:
    """A module whose classes have no `report`, without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") != "report"] or [ast.Pass()]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def load(name: str) -> ModuleType:
    """Import a variant by name or file path; its class is `module.SAE` in either form.

    Raises SyntaxError or ImportError as Python does, AttributeError where there is neither `SAE` nor a trainer.
    """
    from variants import base
    from variants.kit import imperative

    file = path(name)
    name = f"variants.{file.stem}"
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), package_of(file)
    sys.modules[name] = module  # dataclasses look their module up there
    # compiled from the source each time: Python's own cache takes an edit of equal length within a second for no edit
    tree = parsed(file)
    module.__dict__.update(imperative.lent(tree))
    exec(compile(tree, str(file), "exec"), module.__dict__)
    if inspect.isclass(getattr(module, "SAE", None)) and issubclass(module.SAE, base.SAE):
        return module
    trainer = imperative.trainer_of(module, tree)
    if trainer:  # in a module of its own: the file may have a class SAE, which its trainer makes
        beside = ModuleType(name)
        beside.__dict__.update(vars(module), SAE=imperative.adapted(trainer))
        return beside
    else:
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        near = difflib.get_close_matches("SAE", classes, 1, 0)
        raise AttributeError(f"{file.name} defines no class SAE that derives from variants.base.SAE, and no class with "
                             "an update method"
                             + (f" (it defines {', '.join(classes)})" if classes else "") + "\n"
                             + (f"rename {near[0]} to SAE, " if near else "write ")
                             + "class SAE(base.SAE): …; see variants/topk.py")
    return module


def package_of(file: Path) -> str:
    """The package a file lies in, so that its relative imports work; the file of an installed library is one, too."""
    folders = list(itertools.takewhile(lambda folder: (folder / "__init__.py").exists(), file.resolve().parents))
    package = ".".join(folder.name for folder in reversed(folders))
    if package:
        importlib.import_module(package)
    return package


def hyperparameters(module: ModuleType) -> dict[str, object]:
    """Names and defaults of a variant's hyper-parameters: the keyword arguments of its SAE or trainer."""
    from variants.kit import imperative

    if issubclass(module.SAE, imperative.Imperative):
        return imperative.hyperparameters(module.SAE.trainer_class)
    parameters = list(inspect.signature(module.SAE.__init__).parameters.values())[3:]
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def split(text: str) -> list[str]:
    """At the commas outside brackets: "a=(0,1),b=2" -> ["a=(0,1)", "b=2"]."""
    return re.split(r",(?![^(\[{]*[)\]}])", text)


def parse_hyper(module: ModuleType, text: str, flag: str = "--hyper") -> dict[str, object]:
    """`k=64,auxk_alpha=0` -> {"k": 64, "auxk_alpha":
    0}, checked against the variant's own names and the kinds of their defaults.
    """
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
        if wanted := lacking(given[key], known[key], annotation(module, key)):
            raise ValueError(f"{flag} {item}: {key} must be {wanted}\nits default is {known[key]!r}")
    return given


def annotation(module: ModuleType, key: str) -> str:
    """What the variant's author wrote of the kind of a hyper-parameter, "" for nothing."""
    from variants.kit import imperative

    trainer = issubclass(module.SAE, imperative.Imperative)
    parameters = inspect.signature(module.SAE.trainer_class if trainer else module.SAE.__init__).parameters
    written = parameters[key].annotation
    return "" if written is inspect.Parameter.empty else getattr(written, "__name__", str(written))


NUMBERS = {"int", "float"}


def lacking(value, default, annotated: str = "") -> str:
    """What a hyper-parameter's value would have to be and surely is not, judged by its default; "" where that may be
    what it takes.

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
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ():
        yield from _numbers(item)


def parse_sweep(module: ModuleType, text: str) -> dict[str, dict[str, object]]:
    """`k=20,40` -> {".k_20": {"k": 20}, ".k_40": {"k": 40}}; of several, `k=20,40,auxk_alpha=0,0.03`, every
    combination; "" -> {"": {}}.

    The names become those of folders and files: what has no place there is replaced, see `file_name`.
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


def file_name(text: str, most: int = 160) -> str:
    """A text as (part of) the name of one file: ASCII letters, digits and `. _ - + = ( ) ,` and spaces, at most `most`
    of them.

    Anything else becomes "-", the middle of what is too long is left out; a digest of the text then tells it from its
    like.
    """
    plain = re.sub(r"[^A-Za-z0-9._+=(), -]", "-", text)
    if plain == text and len(text) <= most:
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: most - 9]}-{mark}"


def build(module: ModuleType, d_in: int, d_sae: int, hyper: dict[str, object], setting: dict | None = None):
    """A freshly initialised SAE of the variant, [d_in, d_sae], in fp32, on the CPU unless a trainer puts it elsewhere.

    `setting` is what trainers are told of the run: steps, lr (or None), seed, device, layer, lm_name.
    """
    from variants.kit import imperative

    if issubclass(module.SAE, imperative.Imperative):
        return module.SAE(d_in, d_sae, imperative.SETTING | (setting or {}), **hyper)
    return module.SAE(d_in, d_sae, **hyper).float()
