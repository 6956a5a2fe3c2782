"""The project's own tests. They are about the project's own variants: a user's may lie beside them, some be deleted."""

import json
from pathlib import Path

import variants

PROJECT = Path(__file__).resolve().parents[1]
FIXTURES = PROJECT / "tests/fixtures"
GOLDEN = sorted(json.loads((FIXTURES / "golden.json").read_text(encoding="utf-8")))
OWN_VARIANTS = [name for name in GOLDEN if name in variants.names()]
