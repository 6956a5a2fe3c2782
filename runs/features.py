"""The boards of a run's SAEs (evals/dashboards), in features/<SAE>.json.gz of its folder."""

from __future__ import annotations

import gzip
import json
import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from evals.common import stored
from runs import stability
from runs.comparison import Compared, Comparison
from runs.folder import write_bytes
from runs.frontier import l0_of
from runs.voice import duration
from runs.wording import first_line

FOLDER = "features"
# what pages need of a board, of its list and of a dashboard, beside what `_problem` names
PARTS = ("variant", "model", "hook_name", "either_sign", "text", "baseline")
COLUMNS = ("density", "max", "own_nearest", "own_cosine", "nearest", "cosine", "encoder_cosine")
SHOWN = ("why", "density", "max", "groups", "histogram", "logits", "own", "theirs", "cofiring", "classes", "letters",
         "explanation", "score")


def place(out: Path, sae: str) -> Path:
    """Where the board of an SAE lies in a run's folder, there or not."""
    return Path(out) / FOLDER / f"{sae}.json.gz"


def page(out: Path, sae: str) -> Path:
    """Where the page of an SAE's features lies, there or not."""
    return Path(out) / FOLDER / f"{sae}.html"


def write(out: Path, board: dict) -> Path:
    """Keep a board; the same board gives the same bytes."""
    text = json.dumps(board, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    file = place(out, board["sae"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, gzip.compress(text.encode(), compresslevel=6, mtime=0))
    return file


def read(out: Path, sae: str) -> dict:
    """The board of an SAE. OSError: there is none. ValueError: damaged, or not what pages are made from."""
    file = place(out, sae)
    packed = file.read_bytes()
    try:
        board = json.loads(gzip.decompress(packed))
        problem = _problem(board)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        problem = str(error)
    if problem:
        # without the way to the run's folder: this is said in pages, too, which leave this machine
        run = file.resolve().parents[1].name
        raise ValueError(f"{run}/{FOLDER}/{file.name} is damaged: {problem}; "
                         f"python -m runs.dashboards {shlex.quote(run)} makes it again")
    return board


def _problem(board) -> str:
    """What keeps a page from being made from a board; "" if nothing."""
    if not isinstance(board, dict):
        return "it holds no board"
    kinds = {"sae": str, "d_sae": int, "list": dict, "features": dict, "vocab": list, "passages": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(board.get(name), kind)]
    missing = [name for name in PARTS if name not in board]
    if wrong or missing:
        return f"it has no {' and no '.join(wrong + missing)}"
    absent = [name for name in COLUMNS if name not in board["list"]]
    if absent:
        return f"its list has no {' and no '.join(absent)}"
    for name, values in board["list"].items():
        if values is not None and (not isinstance(values, list) or len(values) != board["d_sae"]):
            return f"its list has not {board['d_sae']:,} values of {name}, one of each feature"
    for feature, one in board["features"].items():
        absent = [name for name in SHOWN if not isinstance(one, dict) or name not in one]
        if absent:
            return f"its feature {feature} has no {' and no '.join(absent)}"
    return ""


def kept(out: Path) -> list[str]:
    """The SAEs of which a run's folder holds a board, in order."""
    return sorted(file.name.removesuffix(".json.gz") for file in (Path(out) / FOLDER).glob("*.json.gz"))


# ------------------------------------------------------------------------------------------------ making


def make(out: Path, looked_at: dict[str, tuple], comparisons: Iterable[Comparison], say: Callable[[str], None]) -> None:
    """Make and keep the boards of a run's SAEs {name: (evals.Setup, TrainedSAE)} in place of earlier ones; what keeps
    that from being done is said, and costs nothing else.

    Looked at is each SAE as it is saved, so that runs/dashboards.py finds the same in a later process.
    """
    begun = time.monotonic()
    try:
        for sae in {*kept(out), *looked_at}:  # those of another training, if this fails, and their pages
            place(out, sae).unlink(missing_ok=True)
            page(out, sae).unlink(missing_ok=True)
        saved = {sae: (setup, _as_saved(out, sae, trained)) for sae, (setup, trained) in looked_at.items()}
        keep(out, found(out, saved, comparisons, say), say, begun)
    except Exception as error:  # noqa: BLE001  whatever it is, the run's results are not lost for it
        say(f"report: no feature dashboards: {type(error).__name__}: {first_line(error)}")
    missing = sorted(looked_at.keys() - set(kept(out)))
    if missing:
        say(f"report: {', '.join(missing)} without dashboards: all else is whole, and once the cause is mended "
            f"`python -m runs.dashboards {shlex.quote(str(out))} --again` makes them")


def _as_saved(out: Path, sae: str, trained):
    """The SAE as the run's folder has it: its weights differ by rounding where a scale is folded into them."""
    from variants.kit import saving

    folder = Path(out) / "sae" / sae
    if not folder.is_dir():
        return trained
    try:
        return saving.load_sae(folder, trust_code=True).to(trained.W_dec.device)  # the code that this process runs
    except Exception:  # noqa: BLE001  for want of memory, or code that is no longer there: as it was trained
        return trained


def found(out: Path, looked_at: dict, comparisons: Iterable[Comparison], say: Callable) -> dict[str, dict]:
    """{SAE: its board} of SAEs {name: (evals.Setup, TrainedSAE)} of the run in `out`, of those that can be made; what
    keeps another from being made is said. ValueError: what an eval has written is damaged.
    """
    from evals import dashboards

    beside: dict = {}
    asked = {sae: _asked(out, sae, one, beside, looked_at[sae][0].lm.device)
             for sae, one in _compared(out, comparisons) if sae in looked_at}
    return dashboards.boards(looked_at, asked, say)


def keep(out: Path, boards: dict[str, dict], say: Callable, begun: float) -> None:
    """Write boards, made since `begun` (time.monotonic), and say how many of what size."""
    files = [file for board in boards.values() for file in _written(out, board, say)]
    if files:
        features = sum(len(board["features"]) for board in boards.values())
        tokens = max((board["text"]["tokens"] for board in boards.values() if board["text"]), default=0)
        what = f"{features:,} features, {tokens:,} tokens of held-out text"
        if not tokens:
            what = "none, as the model reads no text; all features in figures"
        size = sum(file.stat().st_size for file in files) / 1e6
        say(f"dashboards: {what}; {duration(time.monotonic() - begun)}, {FOLDER}/ {size:.2g} MB")


def _written(out: Path, board: dict, say: Callable) -> list[Path]:
    """The file of a board; none, said, of one that is no JSON, which costs no other SAE its own."""
    try:
        return [write(out, board)]
    except ValueError as error:
        say(f"report: no feature dashboards of {board['sae']}: {type(error).__name__}: {error}")
        return []


def _compared(out: Path, comparisons: Iterable[Comparison]) -> Iterator[tuple[str, Compared]]:
    """The SAEs of the run in `out` and what they are compared with."""
    for comparison in comparisons:
        for one in comparison.saes:
            if one.run.path.parent == out.resolve():
                yield one.run.section, one


def _asked(out: Path, sae: str, one: Compared, beside: dict, device):
    """What is known of an SAE: evals.dashboards.Asked. `beside` keeps the SAEs of baselines, by their place."""
    from evals.dashboards import Asked

    config = one.run.config
    return Asked(config.get("variant", ""), config.get("core_dataset", ""), classes_of(out, sae), letters_of(out, sae),
                 explanations_of(out, sae), _baseline(one, beside, device), config.get("model", ""))


def _baseline(one: Compared, known: dict, device):
    """The SAE of the baseline that a run's features are compared with: evals.dashboards.Beside, or None without one."""
    from evals.dashboards import Beside

    new = one.new()
    if new is None or not new.nearest:
        return None
    run = new.baseline
    if (run.path, run.section) not in known:
        known[run.path, run.section] = _encoder(run, device)
    sae, problem = known[run.path, run.section]
    fires = stability.firing(one.run) if new.fire else [True for _ in new.cosine]
    counted = [feature for feature, fire in enumerate(fires) if fire]
    return Beside(run.name, run.config.get("variant", ""), l0_of(run), new.nearest, new.cosine,
                  stability.decoder(stability.folder_of(run)), sae, problem,
                  absolute=stability.signless(one.run) or stability.signless(run), new=new.index,
                  counted=counted, threshold=stability.NEW)


def _encoder(run, device) -> tuple:
    """(TrainedSAE, None), or (None, why there is none)."""
    from runs.beside import trained

    try:
        return trained(run).to(device), None
    except Exception as error:  # noqa: BLE001  of code that is not ours, too: the run's own features are shown all the same
        return None, first_line(error)


# ------------------------------------------------------------------------------------------------ from the evals


def classes_of(out: Path, sae: str) -> dict[str, list[int]]:
    """{"data set: class": the features that its sparse probe chose, best first}, as far as evals have said."""
    def of_draws(told: dict) -> dict:
        return {f"{dataset.removesuffix('_results')}: {name}": features for dataset, values in told.items()
                for name, features in (values.get("sae_features_fixed_draw") or {}).items()}

    def of_sets(told: dict) -> dict:
        return {dataset: values["sae_features"] for dataset, values in told.items() if values.get("sae_features")}

    return _told(out, "sparse_probing", sae, of_draws) | _told(out, "sae_probes", sae, of_sets)


def letters_of(out: Path, sae: str) -> dict[str, list[int]]:
    """{letter: the features that tell words which begin with it} of absorption."""
    return _told(out, "absorption", sae, lambda told: {
        letter: values["split_features"] for letter, values in (told.get("split_features") or {}).items()})


def explanations_of(out: Path, sae: str) -> dict[int, tuple[str, float | None]]:
    """{feature: (explanation, score)} of autointerp."""
    return _told(out, "autointerp", sae, lambda told: {
        int(feature): (values["explanation"], values["score"]) for feature, values in told.items()})


def _told(out: Path, name: str, sae: str, take: Callable[[dict], dict]) -> dict:
    """What is taken of what an eval tells beside its metrics; {} where it did not run. ValueError: it is damaged."""
    file = stored.path(out, name, sae)
    if file is None:
        return {}
    try:
        return take(json.loads(file.read_text(encoding="utf-8"))["eval_result_unstructured"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what the eval {name} writes ({type(error).__name__}: {error}): delete it and "
                         "run the same command again") from error
