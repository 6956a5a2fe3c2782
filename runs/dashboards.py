"""The boards of a run that has none, made later: python -m runs.dashboards run_1.

For a run of before, or one whose --minutes were over: they are those that the run itself would have made on a device of
this kind, from its sae/, its evals' results and the same held-out text, of which a GPU is given more than a CPU. The
pages of features/ and report.html are made with them.

The language model is the one that the run was trained on, kept or fetched as by the run. Boards that are there stay,
unless --again says to make them again, or they are damaged.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from runs import beside, compare, features, look, report
from runs.reading import read


def make(folder: Path, cache_dir: str, data_dir: str, trust_code: bool = False, again: bool = False) -> None:
    """Make the boards that a finished run lacks, `again` all, as far as they can be made, and all of its pages.

    A board that was made of more text, as on a GPU, stays in place of one of less.

    OSError, ValueError: there is no such run, its model, SAEs or text cannot be had, or no board can be made; boards
    that are there are then left.
    """
    from evals import Setup
    from evals.cache import Cache
    from runs import disk

    begun = time.monotonic()
    out = folder.resolve()
    runs, whole = read(out), there(out)
    if not again and whole and whole.keys() >= runs.keys():
        raise ValueError(f"{folder} has boards of {', '.join(whole)}: --again makes them again")
    info = look.recorded(next(iter(runs.values())))
    saes = {name: beside.trained(run, trust_code) for name, run in runs.items()}
    source = source_of(info, cache_dir, data_dir)
    lm = look.load_model(info, cache_dir, data_dir, reads=False)
    if info.get("model_digest") not in (None, lm.digest):
        raise ValueError(f"boards of another model would not be the run's: give --cache_dir of a cache that has its "
                         f"{lm.name}")
    kept = Path(cache_dir) / "activations"
    cache = Cache(kept, *disk.store_bounds(kept, info["settings"]["activation_cache_gb"]))

    def setup_of(config: dict) -> Setup:  # as experiment.make_setup, as far as boards ask
        return Setup(lm, config["layer"], config["hook_name"], {}, lambda: source.documents("heldout"),
                     source.digest("heldout"), cache, source, config["seed"], print, max_norm=config.get("max_norm"))

    looked_at = {name: (setup_of(runs[name].config), sae.to(lm.device)) for name, sae in saes.items()}
    # all, as how many features an SAE shows goes by the number of SAEs
    boards = features.found(out, looked_at, compare.of_run(out), print)
    if not boards:
        raise ValueError(f"no board of {out} could be made")
    stay = {sae for sae, board in whole.items() if not again or _tokens(board) > _tokens(boards.get(sae))}
    for sae in sorted(stay & boards.keys() if again else ()):
        print(f"the board of {sae} stays: it was made of more text than this machine's device is given")
    features.keep(out, {sae: board for sae, board in boards.items() if sae not in stay}, print, begun)
    report.again(out)


def source_of(info: dict, cache_dir: str, data_dir: str):
    """The texts of a run by its record. OSError, ValueError: they cannot be read, or are no longer those of the run."""
    from evals.storage import network
    from evals.texts import inputs
    from evals.texts.source import Source

    settings = info["settings"]
    own = [None if settings[name] in inputs.OWN else settings[name] for name in ("dataset", "core_dataset")]
    kind = "hub" if settings["profile"] == "gemma" else settings["profile"]
    network.pin(info.get("commits") or {})  # as it was then
    source = Source(kind, *own, settings["text_field"], Path(cache_dir), Path(data_dir) if data_dir else None)
    if (info.get("inputs") or {}).get("heldout texts") not in (None, source.digest("heldout")):
        raise ValueError("the held-out text is no longer that of the run: give it back the text it was run with")
    return source


def there(out: Path) -> dict[str, dict]:
    """The boards of a folder that can be read, by their SAEs."""
    found = {}
    for sae in features.kept(out):
        with contextlib.suppress(ValueError):
            found[sae] = features.read(out, sae)
    return found


def _tokens(board: dict | None) -> int:
    """Of how many tokens a board was made."""
    return ((board or {}).get("text") or {}).get("tokens", 0)


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 1 with one line on stderr."""
    return look.ended(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = look.parser_of("runs.dashboards", __doc__.split("\n\n")[0])
    parser.add_argument("--again", action="store_true", help="make boards again that are there")
    options = parser.parse_args(argv)
    try:
        make(Path(options.run), look.cache_of(options), options.data_dir, options.trust_code, options.again)
    except (LookupError, TypeError) as error:
        raise ValueError(f"the run's record is not whole ({type(error).__name__}: {error}): give the folder of a run "
                         "of this version") from error


if __name__ == "__main__":
    sys.exit(main())
