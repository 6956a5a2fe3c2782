"""A run's SAEs as a folder for the Hugging Face hub: python -m runs.publish run_1 [--out DIR] [--repo owner/name].

Nothing is uploaded and no network is used; the commands that upload it are printed. Written are

    README.md               the model card (runs/card.py): figures, doubts, training, how to load
    <hook>/[<setting>/]     an SAE: cfg.json and sae_weights.safetensors, which `sae_lens.SAE.load_from_disk` reads, and
                            from the hub `SAE.from_pretrained("owner/name", "<hook>[/<setting>]")`; where SAELens lacks
                            the architecture cfg.json, state.safetensors and variant.py
    eval_results/           SAEBench's JSON, in its folders and under its names, <release>_<SAE>_eval_results.json
    final_info.json, verdict.json
    report.html, features/  made anew of what is published: without the runs beside this one, from cleaned boards

A folder comes whole or not at all, after each SAE was read back from it and gave the features of the run's own, and
after no key, token, user's name or path of this machine was found in it (runs/outward.py). A run that is suspect,
failed or was changed since its end is published with --despite_warnings alone, and says so at its top.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from runs import card, compare, features, folder, outward, report, verdict
from runs.card import Published
from runs.reading import without_result
from runs.wording import first_line, in_a_line
from variants.kit.files import digest, file_name

# the hub's recommendations, huggingface.co/docs/hub/repositories-recommendations
MOST_BYTES, MOST_ENTRIES = 20_000_000_000, 10_000
RESULTS = ("final_info.json", "verdict.json")
LED_TO = ("variant_report/*/*", "training_log.csv", "features/*.json.gz")  # by the pages: they lie beside them
TOLERANCE = 1e-4  # of the norm of features and reconstructions, between the run's SAE and the one read by SAELens
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # as the hub names them: apache-2.0, cc-by-4.0
# {folder of an eval: what SAEBench calls it}, see sae_bench/custom_saes/run_all_evals_custom_saes.py
FOLDERS = {"sae_probes": "sparse_probing_sae_probes"}
UNNAMED = "OWNER/NAME"  # where --repo is not given


def publish(run: Path, out: Path, chosen: list[str], repo: str = UNNAMED, license_id: str = "", despite: bool = False,
            ) -> list[str]:
    """Write the folder `out`; returns a line on each page that is left out. Else nothing is written:

    FileNotFoundError: no such run. ValueError: it is unfit, `out` holds something, or what would be written does.
    """
    outward.check_free(out)
    info, said, saes = read(run, chosen)
    doubts = doubts_of(run, info, said, saes)
    if doubts and not despite:
        raise ValueError(f"{run}: {doubts[0]}; --despite_warnings publishes it, and says so at its top")
    with outward.new_folder(out) as target:
        for name in RESULTS:
            if (run / name).is_file():
                outward.hand_on(run / name, target / name, run, ours=True)
        left_out = pages(run, target, info, saes)
        for sae in saes:
            hand_on_sae(run, target, sae)
        text = card.text(saes, info, said, doubts, repo, license_id)
        (target / "README.md").write_text(outward.by_name(text, run), encoding="utf-8")
        outward.check_clean(target, run)
        check_entries(target)
    return left_out


# ------------------------------------------------------------------------------------------------ what there is


def read(run: Path, chosen: list[str]) -> tuple[dict, dict, list[Published]]:
    """(run_info.json, verdict.json, SAEs) of a run's folder, of the SAEs those named or all.

    FileNotFoundError, ValueError: no run, no results, under way, or no such SAE.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"there is no folder {run}")
    if not (run / "final_info.json").is_file():
        raise FileNotFoundError(f"{run} {without_result(run)}")
    info, said = folder.left(run), verdict.stored(run)
    info["settings"] = outward.in_texts(info.get("settings") or {}, outward.named)
    if info.get("status") not in ("finished", "failed", "damaged", None):
        raise ValueError(f"{run} is not finished ({info['status']}): the command that began it continues it")
    judged = {one.run.section: one for comparison in compare.of_run(run) for one in comparison.saes}
    unknown = [name for name in chosen if name not in judged]
    if unknown:
        raise ValueError(f"{run} has no SAE {unknown[0]!r}; there are {', '.join(judged)}")
    judged = {name: one for name, one in judged.items() if name in chosen or not chosen}
    places = {name: place_of(name, one.run.config) for name, one in judged.items()}
    doubled = {place for place, times in Counter(places.values()).items() if times > 1}
    saes = []
    for name, one in judged.items():
        cfg = run / "sae" / name / "cfg.json"
        if not cfg.is_file():
            raise ValueError(f"{run} has no sae/{name}/cfg.json: there is no SAE to publish")
        place = f"{places[name]}/{file_name(name)}" if places[name] in doubled else places[name]
        own = json.loads(cfg.read_text(encoding="utf-8")).get("architecture") == "variant"
        saes.append(Published(name, place, not own, one))
    return info, said, saes


def place_of(name: str, config: dict) -> str:
    """The folder of an SAE: its hook's, and in it what tells it from the others there: blocks.12.hook_resid_post/k_20.
    """
    hook = file_name(str(config.get("hook_name") or f"layer_{config.get('layer')}")).strip(". ")
    setting = file_name(re.sub(r"^layer_\d+\.?", "", name)).strip(". ")
    return f"{hook}/{setting}" if setting else hook


def doubts_of(run: Path, info: dict, said: dict, saes: list[Published]) -> list[str]:
    """Why a run is not published unasked, a line each: it failed, its figures show nothing, or it was changed."""
    found = []
    each = said.get("saes") or {}
    for name, one in {sae.name: each.get(sae.name, said) for sae in saes}.items():
        of = f"{name}: " if each else ""
        if one.get("verdict") in ("suspect", "failed"):
            found.append(f"{of}the verdict is {one['verdict']}: {one.get('why')}")
        elif not one:
            found.append("its verdict.json is missing")
    found += [f"doubtful: {line}" for sae in saes for line in sae.judged.warnings
              if not any(line in doubt for doubt in found)]
    if info.get("status") != "finished":
        found.append(f"it did not finish: its run_info.json says {info.get('status') or 'nothing'}")
    changed = [name for name, total in (info.get("files") or {}).items()
               if (run / name).is_file() and digest(run / name) != total]
    if changed:
        found.append(f"changed since the run ended: {', '.join(changed[:3])}")
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------ what is written


def hand_on_sae(run: Path, target: Path, sae: Published) -> None:
    """One SAE, read back, and the results of its evals."""
    place = target / sae.folder
    for file in sorted((run / "sae" / sae.name).iterdir()):
        if file.is_file() and not file.name.startswith("."):
            outward.hand_on(file, place / file.name, run, ours=True)
    check_round_trip(run / "sae" / sae.name, place, sae.for_saelens)
    for file in sorted((run / "eval_results").glob("*/*_eval_results.json")):
        if file.name.endswith(f"_{sae.name}_eval_results.json"):
            name = FOLDERS.get(file.parent.name, file.parent.name)
            outward.hand_on(file, target / "eval_results" / name / file.name, run)


def check_round_trip(ours: Path, published: Path, for_saelens: bool) -> None:
    """ValueError unless the published SAE gives the features and reconstructions of the run's, on random activations.

    One in SAELens' format is read by SAELens. One in the own format is held against it byte by byte: its code is run
    by nobody who has not read it.
    """
    weights = "sae_weights.safetensors" if for_saelens else "state.safetensors"
    if digest(ours / weights) != digest(published / weights):
        raise ValueError(f"{published.name}: the copy of its weights differs")
    if not for_saelens:
        return
    import torch
    from sae_lens import SAE

    from variants.kit.saving import load_sae

    mine, theirs = load_sae(ours), SAE.load_from_disk(published)
    with torch.no_grad():
        centre_D = mine.decode(torch.zeros(1, len(mine.gain_F)))
        # of about the size of what it was trained on: the bias alone may be small
        size = max(float(centre_D.norm()), float(mine.gain_F.mean()))
        generator = torch.Generator().manual_seed(0)
        x_ND = centre_D + size * torch.randn(64, mine.sae.d_in, generator=generator) / mine.sae.d_in**0.5
        z_NF = mine.encode(x_ND)
        pairs = (z_NF, theirs.encode(x_ND)), (mine.decode(z_NF), theirs.decode(z_NF))
    for one, two in pairs:
        if not (one - two).norm() <= TOLERANCE * one.norm() + 1e-12:
            raise ValueError(f"{published.name}: SAELens reads other features from it than the run has")


def pages(run: Path, target: Path, info: dict, saes: list[Published]) -> list[str]:
    """The report and the SAEs' features pages, made anew from what may be handed on; lines on what could not be made.

    They are made of a copy in a folder of its own, where no other run lies that they could show or lead to.
    """
    with tempfile.TemporaryDirectory() as apart:
        copy = Path(apart) / run.resolve().name
        left_out = stage(run, copy, info, saes)
        try:
            page = report.again(copy)
        except (OSError, ValueError) as error:
            why = outward.no_paths(first_line(error))
            return [*left_out, f"report.html and {features.FOLDER}/ are left out: {why}"]
        outward.hand_on(page, page, copy)
        outward.hand_on(page, target / page.name, run)
        written = sorted((copy / features.FOLDER).glob("*.html"))
        if written:
            (target / features.FOLDER).mkdir()
        for file in written:
            shutil.copyfile(file, target / features.FOLDER / file.name)
        for name in LED_TO:
            for file in sorted(copy.glob(name)):  # handed on to the copy, as what may be
                place = target / file.relative_to(copy)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    return left_out


def stage(run: Path, copy: Path, info: dict, saes: list[Published]) -> list[str]:
    """Copy what pages are made of, cleaned; of the SAEs' boards lines on those that cannot be read."""
    copy.mkdir()
    folder.write_json(copy / "run_info.json", {key: value for key, value in info.items() if key != "sha256"})
    for name in (*RESULTS, "training_log.csv"):
        if (run / name).is_file():
            outward.hand_on(run / name, copy / name, run, ours=True)
    for file in (run / "variant.py", *run.glob("eval_results/*/*.json"), *run.glob("variant_report/*/*")):
        if file.is_file():
            outward.hand_on(file, copy / file.relative_to(run), run)
    with contextlib.suppress(OSError):  # without its weights a report does not count new features
        (copy / "sae").symlink_to((run / "sae").resolve(), target_is_directory=True)
    left_out = []
    for name in [sae.name for sae in saes if sae.name in features.kept(run)]:
        try:
            board = cleaned(features.read(run, name), run)
            for dashboards in (board["features"], (board["baseline"] or {}).get("features", {})):
                outward.check_contexts(dashboards, board, run)
            features.write(copy, board)
        except outward.Revealing:
            raise
        except (OSError, ValueError) as error:
            left_out.append(f"{features.FOLDER}/{name}.html is left out: {first_line(error)}")
    return left_out


def cleaned(board: dict, run: Path) -> dict:
    """A board without paths of this machine; in what are names or the run's own words, without any."""
    clean = outward.cleaner(run)
    board = outward.in_texts(board, lambda text: clean(text) if "/" in text or "\\" in text else text)
    for part, names in ((board, ("model", "variant")), (board["text"] or {}, ("dataset",)),
                        (board["baseline"] or {}, ("name", "variant"))):
        part |= {name: outward.named(part[name]) for name in names if part.get(name)}
    if (board["baseline"] or {}).get("problem"):
        board["baseline"]["problem"] = outward.no_paths(board["baseline"]["problem"])
    return board


def check_entries(target: Path) -> None:
    """ValueError for a folder of more entries, or a file of more bytes, than the hub takes well."""
    for place in (target, *(path for path in target.rglob("*") if path.is_dir())):
        count = sum(1 for _ in place.iterdir())
        if count > MOST_ENTRIES:
            raise ValueError(f"{count:,} entries in one folder are more than the hub's {MOST_ENTRIES:,}: choose SAEs "
                             "with --sae")
    large = next((file for file in target.rglob("*") if file.is_file() and file.stat().st_size > MOST_BYTES), None)
    if large is not None:
        raise ValueError(f"{large.relative_to(target)} is larger than the hub's {MOST_BYTES / 1e9:.0f} GB a file")


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if the folder was written, 1 with one line on stderr if nothing was."""
    parser = argparse.ArgumentParser(prog="python -m runs.publish", allow_abbrev=False,
                                     description="A run's SAEs as a folder for the Hugging Face hub. Nothing is "
                                                 "uploaded.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--sae", action="append", default=[], help="one of its SAEs; again for more; default: all")
    parser.add_argument("--out", type=Path, help="the new folder; default: <run>_hub")
    parser.add_argument("--repo", default=UNNAMED, help="the repository on the hub, owner/name")
    parser.add_argument("--license", default="", help="as the hub names it: apache-2.0; default: none is stated")
    parser.add_argument("--despite_warnings", action="store_true",
                        help="also a run that is suspect, failed or was changed; the card says so at its top")
    options = parser.parse_args(argv)
    try:
        out = options.out or outward.beside(options.run, "_hub")
        if options.repo != UNNAMED and not card.HUB_NAME.fullmatch(options.repo):
            raise ValueError(f"--repo={options.repo!r} is no name on the hub: give owner/name")
        if options.license and not LICENSE.fullmatch(options.license):
            raise ValueError(f"--license={options.license!r} is none of the hub's names: apache-2.0, mit, other, …")
        left_out = publish(options.run, out, options.sae, options.repo, options.license, options.despite_warnings)
    except (OSError, ValueError) as error:
        print(f"nothing written: {in_a_line(error)}", file=sys.stderr)
        return 1
    for line in left_out:
        print(f"note: {line}")
    if not options.license:
        print("note: no license is stated, so nobody may use it: --license apache-2.0, for one")
    print(f"{out}: read it, README.md first; then\n    hf auth login")
    print(f"    hf upload {options.repo} {shlex.quote(str(out))} .")
    return 0


if __name__ == "__main__":
    sys.exit(main())
