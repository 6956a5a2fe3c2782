"""How a run's SAE reads a text of your own: python -m runs.look run_1 --text "The cat sat on the mat."

Of every token the features that fire most, under the run and under its baseline beside it, on the terminal and with
--page as a page, in a new file: nothing is overwritten. Each feature is labelled by what is known of it, the first of

    its explanation         by autointerp, where the run's board (evals/dashboards) has one
    what it fires on        “ river” “ rivers”: the tokens of held-out text on which it is strongest, by that board
    what it promotes        → “ river”: the tokens whose logits its decoder row raises; of a middle layer that is
                            mostly noise, and it is what there is of most features of a stored baseline

--file reads the text from a file, - from stdin; --baseline names another baseline or the folder of another run.

The language model is the one that the run was trained on; a text that is longer than its context is cut.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

from runs import beside, compare, features
from runs.frontier import l0_of
from runs.page.shell import visible
from runs.reading import Run, read
from runs.voice import steady
from runs.wording import first_line, in_a_line, number

NAMED = 3  # tokens of a feature
# by what a feature is called, the best first, and what that means
LABELS = {"explanation": "autointerp's explanation",
          "fires_on": "the tokens of held-out text on which it fires most",
          "promotes": "the tokens whose logits it raises, often noise in a middle layer"}
NOTHING = {"vocab": [], "features": {}, "peak": None}  # known of an SAE without a board
NO_TEXT = "a run on a synthetic model reads no text: there is nothing to look at"


# ------------------------------------------------------------------------------------------------ what is asked for


def chosen(folder: str, sae: str | None) -> Run:
    """The SAE of a run that is meant. FileNotFoundError, ValueError: no finished run, none of that name, or several."""
    runs = read(folder)
    if sae is None and len(runs) == 1:
        return next(iter(runs.values()))
    if sae in runs:
        return runs[sae]
    what = f"{folder} has {len(runs)} SAEs" if sae is None else f"{folder} has no SAE {sae}"
    raise ValueError(f"{what}: choose one of them with --sae: {', '.join(runs)}")


def recorded(run: Run) -> dict:
    """run_info.json of a run. FileNotFoundError, ValueError: it has none that can be read."""
    file = run.path.parent / "run_info.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run.path.parent} has no run_info.json, which says on what model it was trained: "
                                "give the folder of a run")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        info["settings"]["model"], info["settings"]["context"]
        if info["settings"]["dtype"] not in ("float32", "bfloat16"):
            raise ValueError(f"its dtype is {info['settings']['dtype']}")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    return info


def text_of(text: str | None, file: str | None) -> str:
    """The text asked for. OSError, ValueError: there is none, or not one."""
    if (text is None) == (file is None):
        raise ValueError("give a text, --text \"…\", or a file that holds it, --file …")
    if file is not None:
        data = sys.stdin.buffer.read() if file == "-" else _bytes(Path(file))
        where = "stdin" if file == "-" else file
    else:
        data, where = text.encode("utf-8", "surrogateescape"), "--text"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8: byte {data[error.start]:#x} at {error.start:,}") from None
    if not text.strip():
        raise ValueError(f"{where} is empty: give some text")
    return text


def _bytes(file: Path) -> bytes:
    if file.is_dir():
        raise ValueError(f"--file: {file} is a folder\nname a file in it")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"--file: there is no {file}\n{_near(file)}") from None
    except OSError as error:
        raise OSError(f"--file: {file} cannot be read: {error.strerror}\nname another, or give --text \"…\"") from None


def _near(file: Path) -> str:
    """What to do where a file is missing."""
    if file.parent.is_dir():
        return "name a file that is there, or give --text \"…\""
    return f"nor is there a folder {file.parent}: name a file that is there, or give --text \"…\""


def check_page(file: Path) -> None:
    """ValueError, FileNotFoundError: no new file can be written there."""
    if file.is_dir():
        raise ValueError(f"--page: {file} is a folder\nname a new file in it: --page {file / 'text.html'}")
    if file.exists() or file.is_symlink():
        free = next(name for name in (file.with_stem(f"{file.stem}-{n}") for n in count(2)) if not name.exists())
        raise ValueError(f"--page: {file} is there already, and nothing is overwritten\nname a new file: --page {free}")
    if file.parent.exists() and not file.parent.is_dir():
        raise ValueError(f"--page: {file.parent} is a file, and no page can lie in it\nname a folder that is there")
    if not file.parent.exists():
        raise FileNotFoundError(f"--page: there is no folder {file.parent} for {file.name}\nmake it, or name another")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"--page: nothing can be written into {file.parent}\nname a file in another folder")


# ------------------------------------------------------------------------------------------------ the model


def load_model(info: dict, cache_dir: str, data_dir: str, reads: bool = True):
    """The language model that a run was trained on, where it is kept or can be had; one that reads no text only unless
    `reads`. OSError, ValueError: it cannot.
    """
    import torch

    from evals.model import language_model, places, synthetic
    from evals.storage import network
    from evals.texts.text_files import is_path

    settings = info["settings"]
    name = settings["model"]
    if reads and (settings.get("profile") == "synthetic" or name in synthetic.WORLDS):
        raise ValueError(NO_TEXT)
    if is_path(name) and not Path(name).exists():
        raise FileNotFoundError(f"the model of this run lay in {name}, and there is no such folder now")
    network.pin(info.get("commits") or {})  # as it was then
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, settings["dtype"])
    where = places.location(name, cache_dir, data_dir)
    made_up = synthetic.is_synthetic(where)
    if reads and made_up:
        raise ValueError(NO_TEXT)
    if made_up:
        lm = synthetic.load(where, name, places.known_identity(name, cache_dir, data_dir), dtype, device)
    else:
        lm = language_model.load(where, name, dtype, device)
    if info.get("model_digest") not in (None, lm.digest):
        print(f"note: {name} holds other weights than when the run was trained", file=sys.stderr)
    return lm


def partner(run: Run, asked: str | None, trust_code: bool) -> tuple[Run | None, object, str]:
    """The baseline of the run's model, layer and hook that is nearest in L0, of those that have an SAE; and its SAE.

    (None, None, why) where there is none. FileNotFoundError, ValueError where one that was asked for has none.
    """
    same = [other for other in compare.stored_baselines([run], asked)
            if compare.identity(other.config) == compare.identity(run.config)]
    at_hand = [other for other in same if beside.folder_of(other) is not None] or same
    nearest = min(at_hand, key=lambda other: abs((l0_of(other) or 0) - (l0_of(run) or 0)), default=None)
    if nearest is None and asked:
        raise ValueError(f"{asked} is of another model, layer or hook than {run.name}: name one of the same")
    if nearest is None:
        return None, None, "none is stored for its model, layer and hook"
    try:
        return nearest, beside.trained(nearest, trust_code), ""
    except (ValueError, OSError) as error:
        if asked:
            raise
        return None, None, first_line(error)


# ------------------------------------------------------------------------------------------------ what is found


def found(run: Run, sae, other: Run | None, other_sae, lm, text: str, context: int, top: int, problem: str) -> dict:
    """How the SAEs read the text, plain JSON.

    run, sae, variant, model, layer, l0; baseline: None or {run, sae, variant, l0}; problem: why there is none;
    left_out: tokens beyond the context; passage: {"tokens", "run", "baseline"} as in a board (evals/dashboards);
    features: {"run": {"123": {"explanation": text or None, "fires_on": [tokens], "promotes": [tokens], "values":
    [[place, activation]]}}, "baseline": the same or None}; labels: LABELS.
    """
    from evals.dashboards import passages

    layer, max_norm = run.config["layer"], run.config.get("max_norm")
    tokens_T, left_out = passages.ids_of(lm, text, context)
    x_TD, counts_T = passages.residual(lm, layer, tokens_T, max_norm)
    passage, known = {"tokens": passages.spelled(lm.tokenizer, tokens_T.tolist())}, {}
    for name, side, its_sae in (("run", run, sae), ("baseline", other, other_sae)):
        passage[name] = known[name] = None
        if side is not None:
            passage[name] = passages.strongest(its_sae.to(lm.device), x_TD, counts_T, top)
            shown = sorted({feature for pairs in passage[name] for feature, _ in pairs})
            values = passages.activations(its_sae, x_TD, counts_T, shown)
            board = known_of(run) if side is run else known_beside(run, side)
            known[name] = told(board, its_sae, lm, shown, values)
    beside_it = other and {"run": other.name, "sae": other.section, "variant": other.config.get("variant"),
                           "l0": l0_of(other)}
    return {"run": run.name, "sae": run.section, "variant": run.config.get("variant"), "model": run.config.get("model"),
            "layer": layer, "l0": l0_of(run), "baseline": beside_it, "problem": problem or None, "left_out": left_out,
            "passage": passage, "features": known, "labels": LABELS}


def known_of(run: Run) -> dict:
    """What the board of a run's SAE knows: vocab and its dashboards as there, peak of all features or None."""
    try:
        board = features.read(run.path.parent, run.section)
        return {"vocab": board["vocab"], "features": board["features"], "peak": board["list"].get("peak")}
    except (OSError, ValueError, LookupError):  # without a board, or with a damaged one
        return NOTHING


def known_beside(run: Run, other: Run) -> dict:
    """The same of what a run is read beside: by its own board, else by what the run's tells of its baseline."""
    own = known_of(other)
    if own is not NOTHING:
        return own
    try:
        board = features.read(run.path.parent, run.section)
        theirs = board["baseline"]
        if theirs and (theirs["name"], theirs["l0"]) == (other.name, l0_of(other)):
            return {"vocab": board["vocab"], "features": theirs["features"], "peak": None}
    except (OSError, ValueError, LookupError):
        pass
    return NOTHING


def told(known: dict, sae, lm, shown: list[int], values: dict[int, list]) -> dict[str, dict]:
    """What is known of some features of an SAE. `known`: known_of."""
    words = promoted(lm, sae.W_dec[shown])
    explained = {feature: (known["features"].get(str(feature)) or {}).get("explanation") for feature in shown}
    return {str(feature): {"explanation": explained[feature], "fires_on": fires_on(known, feature), "promotes": tokens,
                           "values": values[feature]} for feature, tokens in zip(shown, words)}


def fires_on(known: dict, feature: int) -> list[str]:
    """The tokens of held-out text on which a feature fires most, the most frequent of its strongest contexts first; of
    a feature without a dashboard the one token on which it is largest; [] where neither is known.
    """
    dashboard = known["features"].get(str(feature)) or {}
    top = [context for group in dashboard.get("groups") or [] if group["name"] == "top"
           for context in group["contexts"]]
    texts = [known["vocab"][context["tokens"][context["peak"]]] for context in top]
    if not texts and known["peak"] and known["peak"][feature] >= 0:
        texts = [known["vocab"][known["peak"][feature]]]
    return [text for text, _ in Counter(texts).most_common(NAMED)]


def promoted(lm, W_CD) -> list[list[str]]:
    """The tokens whose logits directions of the residual stream raise most; none where the head takes no such."""
    from evals.dashboards import directions, passages

    found = directions.promoted(lm, W_CD.to(lm.device))
    if found is None:
        return [[] for _ in W_CD]
    return [passages.spelled(lm.tokenizer, [token for token, _ in one["top"][:NAMED]]) for one in found]


# ------------------------------------------------------------------------------------------------ on the terminal


def title(one: dict) -> str:
    """What an SAE is called: "run_1 layer_9 (topk, L0 32)"."""
    l0 = f"L0 {number(one['l0'])}" if one["l0"] is not None else ""
    about = ", ".join(filter(None, (one["variant"], l0)))
    name = one["run"] if one["sae"] in one["run"].split() else f"{one['run']} {one['sae']}"
    return f"{name} ({about})" if about else name


def label(feature: dict) -> tuple[str, str]:
    """(by what a feature is called, one of LABELS, or ""; that on one line)."""
    kind = next((kind for kind in LABELS if feature[kind]), "")
    if kind == "explanation":
        return kind, visible(feature[kind])
    return kind, " ".join(f"“{visible(token)}”" for token in feature.get(kind, []))


def says(feature: dict) -> str:
    """The label of a feature in the table."""
    kind, text = label(feature)
    return f"→ {text}" if kind == "promotes" else text


def explained(what: dict) -> list[str]:
    """What the labels mean that there are in the table, a line each."""
    signs = {"explanation": "words: ", "fires_on": "“ a” “ b”: ", "promotes": "→ “ a” “ b”: "}
    kinds = {label(one)[0] for side in what["features"].values() for one in (side or {}).values()}
    return [f"  {signs[kind]}{what['labels'][kind]}" for kind in LABELS if kind in kinds]


def as_text(what: dict, width: int = 80) -> str:
    """The table of the terminal, at most `width` columns."""
    passage, two = what["passage"], what["baseline"] is not None
    names = ["run", "baseline"] if two else ["run"]
    lines = _wrapped(title(what) + (f" beside {title(what['baseline'])}" if two else ""), width)
    lines += _wrapped(f"{what['model']}, after block {what['layer']}: of each token the features that fire most, their "
                      "activation, and by what they are known", width)
    lines += explained(what)
    if what["problem"]:
        lines += _wrapped(f"no baseline beside it: {what['problem']}", width)
    digits, word = len(str(len(passage["tokens"]))) + 1, 13
    room = (width - digits - 1 - word) // len(names)
    heads = [visible(what["run"])] + ([visible(what["baseline"]["run"])] if two else [])
    lines += ["", " " * (digits + 1 + word) + "".join(_fit(head, room) for head in heads)]
    for place, token in enumerate(passage["tokens"]):
        columns = [[_line(pair, what["features"][name], room) for pair in passage[name][place]] for name in names]
        for row in range(max(1, *map(len, columns))):
            start = f"{place:>{digits}} {_fit(visible(token), word)}" if row == 0 else " " * (digits + 1 + word)
            cells = [column[row] if row < len(column) else " " * room for column in columns]
            lines.append(start + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _line(pair: list, known: dict, room: int) -> str:
    feature, activation = pair
    return _fit(f"{feature:>6} {activation:>7.4g} {says(known[str(feature)])}", room)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(visible(text), width)


def _fit(text: str, room: int) -> str:
    """A text in so many columns of a terminal, cut with … where it is longer, with a blank at its end."""
    kept, used = "", 0
    for number_of, sign in enumerate(text):
        wide = _columns(sign)
        if used + wide > room - 1 - (number_of < len(text) - 1):
            return kept + "…" + " " * (room - used - 1)
        kept, used = kept + sign, used + wide
    return kept + " " * (room - used)


def _columns(sign: str) -> int:
    if unicodedata.combining(sign):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


# ------------------------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parser_of(command: str, about: str) -> argparse.ArgumentParser:
    """The parser of a command that loads a finished run's model and SAEs: the run, and where they are."""
    parser = _Parser(prog=f"python -m {command}", description=about, allow_abbrev=False)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--cache_dir", default="", help="as the run's: where its model is kept")
    parser.add_argument("--data_dir", default="", help="as the run's: folder of the embedded profile's wheels")
    parser.add_argument("--trust_code", action="store_true",
                        help="run the variant.py that lies with an SAE, though it is none of variants/")
    return parser


def cache_of(options: argparse.Namespace) -> str:
    """The cache folder asked for, else the one that runs have."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return options.cache_dir or os.path.join(caches, "sae_experiment")


def ended(command: Callable[[], None]) -> int:
    """Do what a command does; 0, or 1 with one line on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    steady()
    try:
        command()
        return 0
    except (ValueError, OSError, MemoryError) as error:
        print(in_a_line(error), file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 1 with one line on stderr."""
    return ended(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = parser_of("runs.look", __doc__.split("\n\n")[1])
    parser.add_argument("--text", help="the text")
    parser.add_argument("--file", help="a file that holds the text; - for stdin")
    parser.add_argument("--sae", help="which SAE of the run, where it has several: layer_9.k_20")
    parser.add_argument("--baseline", help="a stored baseline's name or path, or another run's folder; default: that "
                                           "of the run's model")
    parser.add_argument("--top", type=int, default=5, help="features of a token that are shown")
    parser.add_argument("--page", type=Path, help="write a page to this new file, too")
    parser.add_argument("--json", action="store_true", help="all that is known, for programs")
    options = parser.parse_args(argv)
    if options.top < 1:
        raise ValueError("--top: show at least one feature of a token")
    if options.page:
        check_page(options.page)
    text = text_of(options.text, options.file)
    run = chosen(options.run, options.sae)
    info = recorded(run)
    with contextlib.redirect_stdout(sys.stderr):  # a model that has to be fetched says so
        lm = load_model(info, cache_of(options), options.data_dir)
        sae = beside.trained(run, options.trust_code)
        other, other_sae, problem = partner(run, options.baseline, options.trust_code)
        what = found(run, sae, other, other_sae, lm, text, info["settings"]["context"], options.top, problem)
    if what["left_out"]:
        print(f"note: the text is cut after {len(what['passage']['tokens']) - 1:,} tokens, the run's context: "
              f"{what['left_out']:,} are left out", file=sys.stderr)
    if options.json:
        print(json.dumps(what, ensure_ascii=False))
    else:
        width = min(max(shutil.get_terminal_size((80, 24)).columns, 80), 160)
        print(as_text(what, width))
    if options.page:
        sys.stdout.flush()
        _write(options.page, what, run, other)


def _write(file: Path, what: dict, run: Run, other: Run | None) -> None:
    """The page, in a new file; with links to the dashboards where it lies in the folder that has them."""
    from runs.page import features as pages
    from runs.page import look

    links = {}
    for name, side in (("run", run), ("baseline", other)):
        beside_it = side is not None and file.parent.resolve() == side.path.parent.resolve()
        if beside_it and pages.place(side.path.parent, side.section).is_file():
            links[name] = pages.address(side.section)
    if file.parent.resolve() == run.path.parent.resolve() and (run.path.parent / "report.html").is_file():
        links["report"] = "report.html"
    html = look.page(what, title(what), title(what["baseline"]) if what["baseline"] else "", label, links)
    with open(file, "x", encoding="utf-8", errors="replace") as opened:
        try:
            opened.write(html)
            opened.flush()
        except OSError:  # a disk that is full: no half page
            file.unlink(missing_ok=True)
            raise


if __name__ == "__main__":
    sys.exit(main())
