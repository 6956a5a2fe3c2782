"""The one file that holds all a resume needs, while a run trains."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def write(out: Path, state: dict) -> None:
    """checkpoint.pt in the run's folder anew, whole or not at all."""
    temporary = out / "checkpoint.pt.tmp"
    torch.save(state, temporary)
    os.replace(temporary, out / "checkpoint.pt")


def read(out: Path, device: torch.device | str, view: bool) -> dict | None:
    """The state, on `device`, or as a `view` of the file, of which only the recent losses are moved there; None if there is no file."""
    file = out / "checkpoint.pt"
    if not file.exists():
        return None
    state = torch.load(file, map_location="cpu" if view else device, weights_only=True, mmap=view)
    state["recent"] = {name: [(loss.to(device), {k: v.to(device) for k, v in terms.items()}) for loss, terms in rows]
                       for name, rows in state["recent"].items()}
    return state
