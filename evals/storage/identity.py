"""What a file holds, as a hash of its bytes (never its name, its size or its time), and what code does."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import textwrap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read once a process as long as nothing touches the file."""
    found = os.stat(path)
    return _digest(os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@functools.cache
def _digest(path: str, *changes) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest_310(file)


def _digest_310(file) -> str:
    total = hashlib.sha256()
    while block := file.read(1 << 22):
        total.update(block)
    return total.hexdigest()


def files_digest(paths: Iterable[str | Path], root: Path | None = None) -> str:
    """SHA-256 (hex) of files: of bytes and names from `root` on (without it: last parts); ValueError for no files."""
    paths = [Path(path) for path in paths]
    if not paths:
        raise ValueError("a hash of no files says nothing\ngive a folder that holds the files")
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter's lock
        sums = list(pool.map(file_digest, paths))
    named = sorted((os.path.relpath(path, root) if root else path.name, total) for path, total in zip(paths, sums))
    return hashlib.sha256(repr(named).encode()).hexdigest()


def code_digest(code) -> str:
    """SHA-256 (hex) of the syntax of a Python file (its path), a module, a class or a function, for cache keys: another
    comment, docstring or layout is the same code.
    """
    if isinstance(code, (str, Path)):
        source = Path(code).read_text(encoding="utf-8")
    else:
        source = textwrap.dedent(inspect.getsource(code))
    return _syntax_digest(source)


@functools.lru_cache(64)
def _syntax_digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(repr(_fields(tree)).encode()).hexdigest()


def _fields(value):
    """A syntax tree as plain lists of what is there: `ast.dump` writes one tree in other words from one Python to the
    next, as fields are added that are empty.
    """
    if isinstance(value, list):
        return [_fields(part) for part in value]
    if not isinstance(value, ast.AST):
        return value
    filled = [(name, part) for name, part in ast.iter_fields(value) if part is not None and part != []]
    return [type(value).__name__, *((name, _fields(part)) for name, part in filled)]
