"""Fetch published SAEs' figures as stored baselines: python -m runs.published [--tokens 500000000] [--out FOLDER].

`decoderesearch/sae-snapshot-panels` on the hub (Chanin 2026, arXiv 2605.18229) holds SAEs of Gemma-2-2B with SAEBench's
results along their training. Its card gives the layout:

    <panel>/<model>/<architecture>/<k-100>/seed-<n>/snapshots/step-<steps>-tokens-<tokens>/
        cfg.json, sae_weights.safetensors, and SAEBench's result files, one JSON each

Of which eval a result file is, it says itself. Of each SAE the last snapshot is taken, or the one nearest to --tokens;
weights are not fetched. Written are <out>/<model>/<panel>_<architecture>/frontier.json, for `--baseline`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from evals.storage import network
from runs.compare import BASELINES
from runs.folder import write_json
from runs.reading import read

REPOSITORY = "decoderesearch/sae-snapshot-panels"
SNAPSHOT = re.compile(r"(?P<panel>[^/]+)/(?P<model>[^/]+)/(?P<setting>.+)/seed-(?P<seed>\d+)/snapshots/"
                      r"step-(?P<steps>\d+)-tokens-(?P<tokens>\d+)")
HYPER = re.compile(r"([a-z]+)-(\d+)")  # a folder that names a hyper-parameter: k-100
VARIANTS = {"batchtopk": "batch_topk", "matryoshka": "matryoshka_batch_topk",
            "matryoshkabatchtopk": "matryoshka_batch_topk"}
STATED = ("model", "layer", "hook_name", "d_in", "d_sae")  # what a result file says of its SAE


def chosen(files: Iterable[str], tokens: int | None) -> dict[str, list[str]]:
    """{snapshot's folder: its JSON files}, one snapshot per SAE: the last, or the one nearest to that many tokens."""
    saes = defaultdict(lambda: defaultdict(list))
    for file in sorted(files):
        snapshot, _, name = file.rpartition("/")
        found = SNAPSHOT.fullmatch(snapshot)
        if found and name.endswith(".json"):
            saes[snapshot.partition("/snapshots/")[0]][snapshot].append(file)

    def distance(snapshot: str) -> int:
        seen = int(SNAPSHOT.fullmatch(snapshot)["tokens"])
        return -seen if tokens is None else abs(seen - tokens)

    nearest = [min(snapshots, key=distance) for snapshots in saes.values()]
    return {snapshot: saes[snapshot.partition("/snapshots/")[0]][snapshot] for snapshot in nearest}


def entry(folder: Path, snapshot: str, files: list[str], revision: str) -> dict | None:
    """A snapshot's figures as a section of a stored baseline; None where no file of it holds any."""
    place = SNAPSHOT.fullmatch(snapshot)
    means, settings, stated = {}, {}, {}
    for file in files:
        try:
            runs = read(folder / file).values()
        except ValueError:  # cfg.json, and whatever else is no result
            continue
        for run in runs:
            means |= run.means
            settings |= run.config.get("evals", {})
            stated |= {key: run.config[key] for key in STATED if key in run.config}
    if not means:
        return None
    architecture, hyper = _setting(place)
    tokens = int(place["tokens"])
    config = {"published": f"published, {tokens / 1e6:,.0f} M tokens", "variant": architecture, "hyper": hyper,
              **stated, **_trained(folder / snapshot / "cfg.json"), "num_tokens": tokens, "steps": int(place["steps"]),
              "seed": int(place["seed"]), "evals": settings, "source": f"{REPOSITORY}@{revision}: {snapshot}"}
    return {"means": means, "stderrs": {}, "config": config, "problems": []}


def _setting(place: re.Match) -> tuple[str, dict[str, int]]:
    """(variant, hyper-parameters) that the folders between model and seed name; the panel where none names a variant.

    SAELens saves a BatchTopK SAE as a JumpReLU one, so its cfg.json cannot tell.
    """
    parts = place["setting"].split("/")
    named = [part for part in parts if not HYPER.fullmatch(part)]
    name = "_".join(named) or place["panel"]
    hyper = {found[1]: int(found[2]) for found in map(HYPER.fullmatch, parts) if found}
    return VARIANTS.get(re.sub(r"[-_]", "", name), name), hyper


def _trained(cfg: Path) -> dict:
    """What SAELens' cfg.json says of the training that a comparison asks for."""
    if not cfg.is_file():
        return {}
    context = (json.loads(cfg.read_text(encoding="utf-8")).get("metadata") or {}).get("context_size")
    return {"context": context} if context else {}


def fetch(out: Path, tokens: int | None = None) -> list[Path]:
    """Write the stored baselines below `out` and return their files; OSError in words where the hub gives nothing."""
    revision = network.commit("model", REPOSITORY)
    wanted = chosen(network.listing("model", REPOSITORY, revision), tokens)
    if not wanted:
        raise ValueError(f"{REPOSITORY} holds no snapshots in the layout that its card describes")
    folder = network.snapshot("model", REPOSITORY, [file for files in wanted.values() for file in files])
    sections = defaultdict(dict)
    for snapshot, files in wanted.items():
        found = entry(folder, snapshot, files, revision)
        if found is None:
            print(f"left out: {snapshot}: no SAEBench results in it", file=sys.stderr)
            continue
        place, config = SNAPSHOT.fullmatch(snapshot), found["config"]
        dials = "".join(f".{key}_{value}" for key, value in config["hyper"].items())
        target = out / place["model"] / f"{place['panel']}_{config['variant']}" / "frontier.json"
        sections[target][f"layer_{config.get('layer', 'unknown')}{dials}.seed_{config['seed']}"] = found
    if not sections:
        raise ValueError(f"no snapshot of {REPOSITORY} holds SAEBench's results")
    for target, saes in sections.items():
        write_json(target, saes)
    return list(sections)


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if something was written, 1 with one line on stderr if not."""
    parser = argparse.ArgumentParser(prog="python -m runs.published", description=__doc__.split("\n\n")[1])
    parser.add_argument("--tokens", type=int, help="training tokens; default: the end of each SAE's training")
    parser.add_argument("--out", type=Path, default=BASELINES, help="folder of stored baselines")
    options = parser.parse_args(argv)
    try:
        for file in fetch(options.out, options.tokens):
            print(f"{file}: {len(read(file))} SAEs")
    except OSError as error:
        what = str(error).split("\n")[0]
        print(f"nothing fetched: {what}; start again where the hub can be reached", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"nothing fetched: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
