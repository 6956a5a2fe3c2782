"""Which features of a run come back: under another seed (PW-MCC), and in the baseline; the others there are new.

    python -m runs.stability run_1 runs/baseline/<model>/<name>    keeps the SAEs of run_1 with that baseline

Decoders are read from sae/<SAE>/ of a run's folder. A stored baseline has them in one byte a number, and what encoding
takes in two (runs/beside.py).

Seeds: all features are matched one to one (runs/matching.py), as the published figure has it, so a dead feature, which
still points where it was initialised, counts against stability. Where `core` has said which features fire, the figures
are given once more for the matching among those alone. Beside them stands what as many random directions reach
(arXiv 2606.12138): cosines to be compared with, since the best of many is never 0.

New features: those whose nearest row in the baseline's decoder, dead or alive there, has a cosine below `NEW`; of a run
with `core` only features that fire count.

Only what is asked for is read, torch too.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean

from runs.beside import DECODER, folder_of, keep_encoder, row_bytes
from runs.comparison import New
from runs.frontier import l0_of
from runs.reading import Run, read
from runs.wording import first_line, in_a_line, number

NEW = 0.7
SEEDS = 5  # of a setting that are matched with each other at most: ten pairs


# ------------------------------------------------------------------------------------------------ reading


def decoder(folder: Path):
    """The decoder [F, D] in an SAE's folder, a tensor. ValueError, OSError: damaged, or of code that is not ours."""
    W_dec_FD = _stored(folder)
    if not bool(W_dec_FD.isfinite().all()):
        raise ValueError(f"{folder}: the decoder holds NaN or infinity\nthat training diverged: leave the run out")
    return W_dec_FD


def _stored(folder: Path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    from variants.kit import found, saving

    if (folder / DECODER).is_file():
        return load_file(found.undamaged(folder / DECODER, {}))["W_dec"]
    cfg = found.read_json(folder / "cfg.json")
    if cfg.get("architecture") == "variant":  # its decoder need not be a tensor of that name
        return saving.load_sae(folder).W_dec
    file = found.undamaged(found.present(folder / "sae_weights.safetensors"), cfg)
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        if "W_dec" not in names:
            raise ValueError(f"{file} holds no W_dec\n{found.AGAIN}")
        return weights.get_tensor("W_dec")


def firing(run: Run) -> list[bool] | None:
    """Whether each feature fired on any token of `core`; None without that eval's result."""
    pattern = f"*_{run.section}_eval_results.json"
    file = next((run.path.parent / "eval_results" / "core").glob(pattern), None) if run.section else None
    if file is None:
        return None
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["eval_result_details"]
        return [row["feature_density"] > 0 for row in rows]
    except (OSError, ValueError, LookupError, TypeError):  # damaged, or of another program
        return None


def signless(run: Run) -> bool:
    """Whether its features fire with negative values too: |cosine|."""
    return bool(run.config.get("either_sign"))


def _device(features: int) -> str:
    """Where to multiply: wide dictionaries on a GPU, if there is one."""
    import torch

    return "cuda" if features > 2**15 and torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ between seeds


def between_seeds(runs: list[Run]) -> dict | None:
    """How far the features of one setting come back under another seed; None for want of two seeds' decoders.

    {"runs", "seeds", "pairs": what `_pair` finds of each two, "all", "firing", "random": {figure: {"mean", "stderr"}}},
    figures as of `matching.figures`. The mean is over pairs of seeds; pairs share seeds, so its standard error is the
    jackknife's over seeds, None below three. ValueError, OSError: `decoder`.
    """
    first: dict = {}
    for run in runs:
        if folder_of(run) is not None:
            first.setdefault(run.config.get("seed"), run)
    members = list(first.values())[:SEEDS]
    if len(members) < 2:
        return None
    pairs = [_pair(a, b) for a, b in combinations(members, 2)]
    over = {kind: _over_pairs([pair[kind] for pair in pairs], len(members)) for kind in ("all", "firing", "random")}
    return {"runs": [run.name for run in members], "seeds": list(first)[:SEEDS], "pairs": pairs, **over}


def _pair(a: Run, b: Run) -> dict:
    """The figures of two seeds' decoders: of all features, of those that fire where that is known, of random ones."""
    import torch

    from runs import matching

    rows_FD, rows_GD = (decoder(folder_of(run)) for run in (a, b))
    (f, d), (g, d_too) = rows_FD.shape, rows_GD.shape
    if d != d_too:
        raise ValueError(f"{a.name} and {b.name}: decoders of {d} and {d_too} dimensions\ngive runs of one model")
    alive, fire = None, [firing(run) for run in (a, b)]
    if all(fire) and [len(mask) for mask in fire] == [f, g]:
        alive = tuple(torch.tensor(mask) for mask in fire)
    device, absolute = _device(max(f, g)), signless(a)
    rows_FD, rows_GD = matching.unit(rows_FD, device), matching.unit(rows_GD, device)
    cosine_P, alive_P = matching.matched(rows_FD, rows_GD, alive, absolute)
    among = None
    if alive_P is not None and len(alive_P):
        among = matching.figures(alive_P, min(int(mask.sum()) for mask in alive))
    how = "mutual nearest" if max(f, g) > matching.HUNGARIAN else "one to one"
    return {"runs": [a.name, b.name], "widths": [f, g], "d_in": d, "matching": how,
            "all": matching.figures(cosine_P, min(f, g)), "firing": among,
            "random": matching.of_random(f, g, d, absolute, device)}


def _over_pairs(found: list[dict | None], seeds: int) -> dict[str, dict] | None:
    if not all(found):
        return None
    return {name: {"mean": fmean(one[name] for one in found),
                   "stderr": jackknife([one[name] for one in found], seeds)} for name in found[0]}


def jackknife(values: list[float], n: int) -> float | None:
    """Standard error of the mean of one value per pair of n seeds, in the order of `combinations`; None below three.

    √((n − 1)/n · Σ (m_i − m̄)²), m_i the mean of the pairs without seed i.
    """
    if n < 3:
        return None
    pairs = list(combinations(range(n), 2))
    without = [fmean(v for pair, v in zip(pairs, values) if seed not in pair) for seed in range(n)]
    return math.sqrt((n - 1) / n * sum((m - fmean(without))**2 for m in without))


# ------------------------------------------------------------------------------------------------ beside a baseline


def new_features(run: Run, references: list[Run]) -> New | None:
    """The run's features beside those of the reference of the nearest L0 that has a decoder; None without decoders.

    `references` are of the run's own model, layer and hook.
    """
    mine = folder_of(run)
    others = [other for other in references if folder_of(other) and other.path != run.path]
    if mine is None or not others:
        return None
    other = min(others, key=lambda reference: abs((l0_of(reference) or 0) - (l0_of(run) or 0)))
    try:
        places = [(folder, *_changes(folder)) for folder in (mine, folder_of(other))]
        cosine, nearest = (found_F.tolist() for found_F in _nearest(*places, signless(run) or signless(other)))
    # whatever a decoder is damaged by, or its variant's code does: a run's own figures are not lost for it
    except Exception as error:  # noqa: BLE001
        return New(other, [], [], [], 0, 0.0, False, first_line(error))
    fire = firing(run)
    known = fire is not None and len(fire) == len(cosine)
    looked_at = [i for i in range(len(cosine)) if not known or fire[i]]
    mean = fmean(cosine[i] for i in looked_at) if looked_at else 0.0
    return New(other, cosine, nearest, [i for i in looked_at if cosine[i] < NEW], len(looked_at), mean, known)


def _changes(folder: Path) -> tuple:
    """Sizes and times of the files in an SAE's folder: what is remembered of it holds as long as these do."""
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir()))


# a run asks for each of its SAEs again and again: boards, report, comparison. 256 are those of every layer of
# Gemma-2-2B at nine sparsities; held are 8 bytes a feature, 134 MB of 256 SAEs of 65,536 features
@functools.lru_cache(256)
def _nearest(mine: tuple, other: tuple, absolute: bool) -> tuple:
    """Of every feature the cosine with its nearest one, [F] fp32, and which that is, [F] int32."""
    from runs import matching

    rows_FD, rows_GD = decoder(mine[0]), decoder(other[0])
    if rows_FD.shape[1] != rows_GD.shape[1]:
        raise ValueError(f"{mine[0]}: a decoder of {rows_FD.shape[1]} dimensions, the baseline's has "
                         f"{rows_GD.shape[1]}")
    device = _device(max(len(rows_FD), len(rows_GD)))
    cosine_F, nearest_F = matching.nearest(matching.unit(rows_FD, device), matching.unit(rows_GD, device), absolute)
    return cosine_F, nearest_F.int()


def in_words(new: New) -> str:
    """One line for a comparison."""
    if new.problem:
        return f"new features not counted: {new.problem}"
    l0 = l0_of(new.baseline)
    at = f" at L0 {number(l0)}" if l0 is not None else ""
    those = " that fire" if new.fire else ""
    return (f"{len(new.index):,} of {new.of:,} features{those} are new (nearest cosine < {NEW} in "
            f"{new.baseline.name}{at}, {new.mean:.2f} on average)")


def as_data(new: New, every: bool = False) -> dict:
    """What programs get: the count and the new ones; `every`: of all features the nearest one and its cosine."""
    found = {"baseline": new.baseline.name, "baseline_l0": l0_of(new.baseline), "threshold": NEW,
             "count": len(new.index), "of": new.of, "mean_cosine": new.mean, "only_firing": new.fire, "new": new.index,
             "problem": new.problem or None}
    return found | ({"nearest": new.nearest, "cosine": [round(c, 4) for c in new.cosine]} if every else {})


# ------------------------------------------------------------------------------------------------ stored SAEs


def keep(run: Run, baseline: Path) -> Path:
    """Store the decoder of a run with a baseline, a byte a number; returns the file."""
    from safetensors.torch import save

    from runs.folder import write_bytes

    folder = folder_of(run)
    if folder is None:
        raise ValueError(f"{run.path.parent} has no sae/{run.section}\ngive the folder of a finished run")
    file = baseline / "sae" / run.section / DECODER
    write_bytes(file, save({"W_dec": row_bytes(decoder(folder).float())}))
    return file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runs.stability", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="run folder whose SAEs are kept")
    parser.add_argument("baseline", type=Path, help="folder of the stored baseline that this run is")
    options = parser.parse_args(argv)
    try:
        runs = read(options.run).values()
        kept = [keep(run, options.baseline) for run in runs]
    except (ValueError, OSError) as error:
        print(in_a_line(error), file=sys.stderr)
        return 1
    for run, file in zip(runs, list(kept)):
        try:
            kept.append(keep_encoder(folder_of(run), file.parent))
        except (ValueError, OSError) as error:  # decoders alone still say which features are new
            print(f"no encoder kept: {error}".split("\n")[0], file=sys.stderr)
    print("\n".join(f"{file}: {file.stat().st_size / 1e6:.2f} MB" for file in kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
