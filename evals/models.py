"""Where the weights of a run's language model lie, and how large it is, known before any is read."""

from __future__ import annotations

from pathlib import Path

from evals.language_model import shape_of

EMBEDDED, TINY = "smollm2-135m-instruct", "tiny-gemma2"  # made in the cache at their first use
SHAPES = {EMBEDDED: dict(d_model=576, n_layers=30, block_parameters=3_540_096, bytes=538_000_000),
          TINY: dict(d_model=32, n_layers=4, block_parameters=10_000, bytes=1_000_000)}


def location(name: str, cache_dir: str, data_dir: str) -> str:
    """Hub name or folder of a model's weights."""
    if name == EMBEDDED:
        from evals import embedded

        return str(embedded.model_folder(Path(cache_dir), Path(data_dir) if data_dir else None))
    if name == TINY:
        from evals import tiny

        return str(tiny.model_folder(Path(cache_dir)))
    return name


def shape(name: str, itemsize: int) -> dict:
    """d_model, n_layers, parameters of a block and bytes of a model with parameters of `itemsize` bytes, from its configuration alone."""
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(name).get_text_config(), itemsize)
