"""The project's own tests. They are about the project's own variants: a user's may lie beside them."""

import json
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FIXTURES = PROJECT / "tests/fixtures"
OWN_VARIANTS = sorted(json.loads((FIXTURES / "golden.json").read_text(encoding="utf-8")))
