"""The boards of a run's SAEs (evals/dashboards), in features/<SAE>.json.gz of its folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from runs.folder import write_bytes

FOLDER = "features"


def place(out: Path, sae: str) -> Path:
    """Where the board of an SAE lies in a run's folder, there or not."""
    return Path(out) / FOLDER / f"{sae}.json.gz"


def write(out: Path, board: dict) -> Path:
    """Keep a board; the same board gives the same bytes."""
    text = json.dumps(board, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    file = place(out, board["sae"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, gzip.compress(text.encode(), mtime=0))
    return file


def read(out: Path, sae: str) -> dict:
    """The board of an SAE. OSError: there is none. ValueError: damaged."""
    file = place(out, sae)
    try:
        return json.loads(gzip.decompress(file.read_bytes()))
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged: {error}\nrun the experiment again in another folder") from error


def kept(out: Path) -> list[str]:
    """The SAEs of which a run's folder holds a board, in order."""
    return sorted(file.name.removesuffix(".json.gz") for file in (Path(out) / FOLDER).glob("*.json.gz"))
