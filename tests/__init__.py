"""The project's own tests. They are about the project's own variants: a user's may lie beside them."""

import json
from pathlib import Path

OWN_VARIANTS = sorted(json.loads((Path(__file__).parent / "fixtures/golden.json").read_text(encoding="utf-8")))
