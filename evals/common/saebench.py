"""SAEBench's result files: its JSON schema, with our corrected metrics, standard errors and problems beside it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
import uuid
from pathlib import Path

from evals import Result


def write(folder, result: Result, eval_type_id: str, eval_config: dict, sae_name: str, release: str,
          sae_cfg: dict) -> Path:
    """Write `<release>_<sae_name>_eval_results.json` in `folder`, whole or not at all; NaN and infinity become null."""
    content = {
        "eval_type_id": eval_type_id,
        "eval_config": eval_config,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": time.time_ns() // 1_000_000,
        "eval_result_metrics": result.metrics,
        "eval_result_details": result.details,
        "sae_bench_commit_hash": "",
        "sae_lens_id": sae_name,
        "sae_lens_release_id": release,
        "sae_lens_version": _sae_lens_version(),
        "sae_cfg_dict": sae_cfg,
        "eval_result_unstructured": result.unstructured,
        "corrected_metrics": result.corrected,
        "stderrs": result.stderrs,
        "problems": result.problems,
    }
    path = Path(folder) / (f"{release}_{sae_name}_eval_results.json".replace("/", "_"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(_plain(content), indent=2, allow_nan=False), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(path) -> Result:
    """The Result of a file written by `write`, or by SAEBench itself (whose files lack our keys)."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return Result(
        metrics=content["eval_result_metrics"],
        corrected=content.get("corrected_metrics", {}),
        stderrs=content.get("stderrs", {}),
        details=content.get("eval_result_details") or [],
        unstructured=content.get("eval_result_unstructured") or {},
        problems=content.get("problems", []),
    )


def flatten(result: Result, eval_name: str) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means and standard errors by flat name, `<eval>.<metric>`; a metric that could not be measured stays None."""
    means: dict[str, float | None] = {}
    for group in (*result.metrics.values(), result.corrected):
        for name, value in group.items():
            if f"{eval_name}.{name}" in means:
                raise ValueError(f"{eval_name} returns the metric {name!r} twice\ngive one of the two another name")
            means[f"{eval_name}.{name}"] = value
    return means, {f"{eval_name}.{name}": value for name, value in result.stderrs.items()}


def _plain(value):
    """The same in JSON's types: tuples as lists, numbers of numpy and torch as Python's, non-finite ones as None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sae_lens_version() -> str | None:
    try:
        return importlib.metadata.version("sae_lens")
    except importlib.metadata.PackageNotFoundError:
        return None
