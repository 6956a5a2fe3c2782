"""Digests of code: what counts as the same code in a cache key."""

import pytest

from evals.common import pooling
from evals.storage.identity import code_digest

CODE = '''"""What a module says of itself."""

LIMIT = 2**20  # bytes


class Kept:
    """What is kept."""

    def room(self, used, *, spare=0):
        """Bytes left."""
        return max(0, LIMIT - used - spare)  # never below nothing
'''


def digest_of(tmp_path, source):
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    return code_digest(file)


@pytest.mark.parametrize("old, new", [
    ("  # bytes", ""), ("  # never below nothing", "  # whatever is used"), ("\n\n\nclass", "\n# a comment\nclass"),
    ('"""What a module says of itself."""\n', ""), ('"""What is kept."""', '"""What is\n    kept."""'),
    ('"""Bytes left."""', '"""Room, in bytes."""'), ("LIMIT - used - spare)", "LIMIT - used\n- spare)"),
    ("return max(0, LIMIT - used - spare)", "return (max(0, LIMIT - used - spare))"), ("spare=0):", "spare=0,):")])
def test_words_and_layout_are_no_code(tmp_path, old, new):
    """Fails if a comment, a docstring, a line break or brackets make caches worthless."""
    assert CODE.count(old) == 1
    assert digest_of(tmp_path, CODE.replace(old, new)) == digest_of(tmp_path, CODE)


@pytest.mark.parametrize("old, new", [
    ("2**20", "2**21"), ("max(", "min("), ("used -", "used +"), ("spare=0", "spare=1"), ("*, spare", "spare"),
    ("class Kept", "class Found"), ("    def room", "    cached = None\n\n    def room")])
def test_a_number_or_a_name_is_code(tmp_path, old, new):
    """Fails if code that may give another result has the same digest."""
    assert CODE.count(old) == 1
    assert digest_of(tmp_path, CODE.replace(old, new)) != digest_of(tmp_path, CODE)


def test_a_function_is_digested_alone_and_a_module_is_its_file(tmp_path):
    """Fails if a function's digest takes in what stands beside it, or depends on how the module is named."""
    def within():
        """Indented, with a docstring."""
        return 1

    assert code_digest(pooling) == code_digest(pooling.__file__) != code_digest(pooling.pool)
    assert code_digest(within) == digest_of(tmp_path, "def within():\n    return 1\n")


def test_a_docstring_is_not_all_there_is(tmp_path):
    """Fails if a function that has nothing but a docstring, or a text that is no docstring, is treated otherwise."""
    assert digest_of(tmp_path, 'def f():\n    """Nothing."""\n') == digest_of(tmp_path, 'def f():\n    """All."""\n')
    assert digest_of(tmp_path, 'x = 1\n"""a"""\n') != digest_of(tmp_path, 'x = 1\n"""b"""\n')
