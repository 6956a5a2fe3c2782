"""What can be looked at in a trained SAE: all of its features in figures, some hundreds of them in dashboards, and how
it reads a few passages. Made from held-out text in one pass of the language model for all SAEs of a layer, which two
sweeps of the SAEs' encoders follow: what fires, then the contexts of what was chosen.

A *board* is what is known of one SAE, plain JSON (kept by runs/features.py, shown by runs/page/features.py, exported by
runs/neuronpedia.py). F features; activations and norms in units of the raw residual stream; a token is its text.

    sae, variant, model, hook_name   names: "layer_9", "topk", …
    layer, d_in, d_sae               numbers
    either_sign                      whether features fire with negative values too
    text        {"dataset": its name, "tokens": looked at, special ones left out, "rows", "context": tokens a row}; None
                where the model reads no text: then features, passages and vocab are empty
    list        columns of F values: density (share of tokens on which it fires), max (the largest activation, of either
                sign), own_nearest and own_cosine (the other row of its own decoder that is most like it), nearest and
                cosine (that of the baseline's decoder), new (1 for those that the comparison counts as new against
                the baseline, 0 for others, None for those that it does not count, as they fire nowhere in the text of
                `core`), encoder_cosine (encoder with decoder), peak (the number in vocab of the token on which it is
                largest, -1 for one that fires on none); a column is None where there is nothing of the kind, and
                own_nearest is -1 for a dictionary of one
    health      {"l0": {"edges", "counts"}: tokens by active features; "norms", "errors": ‖x‖ and ‖x − x̂‖ of up to a
                thousand tokens, evenly spread}
    vocab       the texts of the tokens that contexts and peaks use, by number
    features    {"123": a dashboard}, of features that fire in the text; the first ones are some of each reason
    baseline    None, or {"name": of the SAE that is compared with, "variant", "l0", "problem": None or why there are no
                dashboards, "new": {"count", "of": features counted, "threshold": new ones have a smaller cosine},
                "features": {"77": a dashboard of the baseline's}: the nearest of each of `features`, on the same text;
                and where it could be read, "density": {"edges", "counts": its features by log10 of their density,
                "silent": those that fire on no token, "of": all}}
    passages    [{"title", "tokens": [text], "run": of each token up to 5 [feature, activation], strongest first,
                "baseline": the same, or None}]

A dashboard is

    why         reasons for which it was chosen: "densest", "rarest", "random", "best probe", "new", "absorbed letter",
                "explained"; of the baseline's: []
    density, max
    groups      [{"name": "top" or "interval 3", "from", "to": magnitudes, from ≤ to, "contexts": […]}]: 20 of the
                strongest (each another row while there are enough; from the weakest to the strongest of them), then 5
                each of 10 equal intervals from 0 to |max|, drawn, the highest first; intervals without a context are
                left out. An activation counts by its magnitude, whatever its sign, which contexts show; of the
                baseline's there are 10 of the strongest alone
    histogram   {"edges": 51, "counts": 50} of the activations that are not 0, with their sign: from the smallest, or 0,
                to the largest, or 0
    logits      None where the model has no head for directions, or {"top": [[token, logit] × 10], "bottom": the same,
                lowest first, "edges": 51, "counts": 50, over the vocabulary}
    own         [[feature, cosine] × 5]: the rows of its own decoder that are most like it
    theirs      [[feature, cosine] × 3] of the baseline's decoder; [] without one
    cofiring    [[feature, φ] × 5]: those that fire on the same tokens, by the φ coefficient (Pearson's of firing)
    classes     ["arxiv_field: math", …] that probes with few features chose it for
    letters     ["s", …] whose first-letter probe it serves
    explanation, score    of autointerp, or None

A context is {"tokens": [number in vocab], "values": [[place in tokens, activation], …] where it fires, "peak": the
place it was chosen for, "row": of the text, "cut": [whether text of the row before, after it was left out]}.

Numbers have four significant digits, densities eight: a number of tokens is made of them. Cosines of features that fire
with either sign are magnitudes, and those with a baseline's where either's do. An activation that is no number counts
as 0, and so does a decoder row that holds one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from evals import Setup
from evals.dashboards import chosen, directions, passages, sweeps, text
from evals.storage import network
from evals.texts import packing

FEW = 5  # features of a probe for which it is one with few
OWN, THEIRS, COFIRING = 5, 3, 5  # features named beside one
OF_BASELINE = 10  # contexts
DIGITS = {"density": 8}  # so that times the text's tokens it is a number of tokens
AT_ONCE = 32  # features whose φ with all is reckoned at once


@dataclass(frozen=True)
class Beside:
    """The SAE of a baseline with which one is compared."""

    name: str
    variant: str
    l0: float | None
    nearest: list[int]  # of each feature of the run's the one here that is most like it
    cosine: list[float]  # and the cosine with that one
    decoder: Tensor | None = None  # [G, D]
    sae: Any = None  # the TrainedSAE, on the model's device
    problem: str | None = None  # why there is none
    absolute: bool = False  # whether `nearest` takes the opposite direction for the same
    new: list[int] | None = None  # the features that count as new against it; None: not counted
    counted: list[int] = field(default_factory=list)  # the features that were looked at for that
    threshold: float = 0.0  # new ones have a smaller cosine


@dataclass(frozen=True)
class Asked:
    """What is known of an SAE beside its weights; all of it may be left out."""

    variant: str = ""
    dataset: str = ""  # the name of the text
    classes: dict[str, list[int]] = field(default_factory=dict)  # what each class's probe chose, the best first
    letters: dict[str, list[int]] = field(default_factory=dict)  # and each first letter's
    explanations: dict[int, tuple[str, float | None]] = field(default_factory=dict)  # of features, and their scores
    baseline: Beside | None = None
    model: str = ""  # what it is called, which may have been loaded from a folder


def boards(looked_at: dict[str, tuple[Setup, Any]], asked: dict[str, Asked],
           say: Callable[[str], None]) -> dict[str, dict]:
    """{SAE: its board} of the SAEs {name: (setup, TrainedSAE)}; none, said, for want of text, and none of an SAE that
    breaks, which is said by its name.

    The global random state, the model and the SAEs stay as they are.
    """
    found = {}
    by_layer = sorted(looked_at, key=lambda name: looked_at[name][0].layer)
    try:
        for _, names in groupby(by_layer, key=lambda name: looked_at[name][0].layer):
            names = list(names)
            setup, saes = looked_at[names[0]][0], {name: looked_at[name][1] for name in names}
            found |= _unbroken(setup, saes, {name: asked.get(name, Asked()) for name in names}, len(looked_at), say)
    except (packing.TooLittleText, OSError) as error:
        say(f"report: no feature dashboards: {network.first_line(error)}")
        return {}
    return {name: found[name] for name in looked_at if name in found}


def _unbroken(setup: Setup, saes: dict, asked: dict[str, Asked], of_run: int, say: Callable) -> dict[str, dict]:
    """The boards of the SAEs of a layer; each is made by itself where they cannot be made together."""
    try:
        return _of_layer(setup, saes, asked, of_run)
    except (packing.TooLittleText, OSError):
        raise
    except Exception as error:  # noqa: BLE001  an SAE runs code that is not ours, and costs no other its board
        problem = f"{type(error).__name__}: {network.first_line(error)}"
    if len(saes) == 1:
        say(f"report: no feature dashboards of {', '.join(saes)}: {problem}")
        return {}
    # not inside `except`: to its end the traceback keeps the tensors of the attempt
    found = {}
    for name, sae in saes.items():
        found |= _unbroken(setup, {name: sae}, {name: asked[name]}, of_run, say)
    return found


@torch.no_grad()
def _of_layer(setup: Setup, saes: dict, asked: dict[str, Asked], of_run: int) -> dict[str, dict]:
    """The boards of the SAEs of a layer, in a run of so many."""
    read = text.read(setup)
    # an SAE of a baseline may stand beside several of a run
    theirs = {id(one.baseline.sae): one.baseline.sae for one in asked.values() if one.baseline and one.baseline.sae}
    if not setup.lm.reads_text:
        theirs = {}
    seen = sweeps.first(read, {**saes, **theirs})
    why = {name: chosen.choose(asked[name], seen[name].fired_F, setup.seed, name, of_run)
           if setup.lm.reads_text else {} for name in saes}
    looks = {name: sweeps.Look.nothing(list(why[name]), seen[name], setup.lm.device) for name in saes}
    for key in theirs:
        beside = (f for name, one in asked.items() if one.baseline and id(one.baseline.sae) == key
                  for f in (one.baseline.nearest[feature] for feature in why[name]))
        looks[key] = sweeps.Look.nothing(sorted(set(beside)), seen[key], setup.lm.device, OF_BASELINE, alone=True)
    if setup.lm.reads_text:
        sweeps.second(read, looks, {**saes, **theirs})
    heard = passages.heard(setup.lm, setup.layer, setup.max_norm)
    return {name: _board(read, heard, name, sae, asked[name], seen, looks, why[name]) for name, sae in saes.items()}


def _board(read: text.Text, heard: list, name: str, sae, asked: Asked, seen: dict, looks: dict, why: dict) -> dict:
    setup, vocab, beside = read.setup, Vocabulary(read.setup.lm.tokenizer), asked.baseline
    own, W_FD = seen[name], directions.whole(sae.W_dec)
    either_sign = bool((own.low_F < 0).any())
    texts, R, T = setup.lm.reads_text, *read.tokens_RT.shape
    features = _dashboards(read, W_FD, own, looks[name], vocab)
    for feature, dashboard in features.items():
        dashboard["why"] = why[feature]
        dashboard["classes"] = [label for label, chose in asked.classes.items() if feature in chose[:FEW]]
        dashboard["letters"] = [letter for letter, serve in asked.letters.items() if feature in serve]
        dashboard["explanation"], dashboard["score"] = asked.explanations.get(feature, (None, None))
        dashboard["score"] = dashboard["score"] if dashboard["score"] is None else rounded(dashboard["score"])
    if features:
        index_C = looks[name].index_C
        alike = directions.nearest(W_FD[index_C], W_FD, OWN, either_sign, index_C)
        pairs = {"own": alike, "cofiring": _cofiring(own, looks[name])}
        if beside and beside.decoder is not None:
            rows_GD = directions.unit(beside.decoder.to(W_FD))
            pairs["theirs"] = directions.nearest(W_FD[index_C], rows_GD, THEIRS, beside.absolute)
        for kind, (index_CK, value_CK) in pairs.items():
            for dashboard, others, values in zip(features.values(), index_CK.tolist(), value_CK.tolist()):
                dashboard[kind] = [[f, rounded(v)] for f, v in zip(others, values) if v > -torch.inf]
    nearest = directions.own_nearest(W_FD, either_sign)
    columns = {"density": (own.fired_F.double() / max(1, own.tokens)).tolist(), "max": own.max_F.tolist(),
               "own_nearest": nearest and nearest[0], "own_cosine": nearest and nearest[1],
               "nearest": beside and beside.nearest, "cosine": beside and beside.cosine,
               "new": _marked(beside, len(W_FD)), "encoder_cosine": directions.encoder_cosine(sae),
               "peak": _peaks(read, own, vocab) if texts else None}
    said = dict(dataset=asked.dataset, tokens=own.tokens, rows=R, context=T)
    of_baseline = None
    if beside:
        of_baseline = _baseline(read, beside, seen, looks, {beside.nearest[feature] for feature in why}, vocab)
    return {"sae": name, "variant": asked.variant, "model": asked.model or setup.lm.name,
            "hook_name": setup.hook_name, "layer": setup.layer, "d_in": W_FD.shape[1], "d_sae": len(W_FD),
            "either_sign": either_sign, "text": said if texts else None,
            "list": {column: values and rounded(values, DIGITS.get(column, 4)) for column, values in columns.items()},
            "health": {"l0": _l0(torch.cat(own.l0)), "norms": rounded(own.norms), "errors": rounded(own.errors)},
            "features": {str(feature): dashboard for feature, dashboard in features.items()},
            "baseline": of_baseline, "passages": passages.of(heard, sae, beside.sae if beside else None),
            "vocab": vocab.texts()}


def _baseline(read: text.Text, beside: Beside, seen: dict, looks: dict, wanted: set[int], vocab: Vocabulary) -> dict:
    new = None
    if beside.new is not None:
        new = {"count": len(beside.new), "of": len(beside.counted), "threshold": beside.threshold}
    found = {"name": beside.name, "variant": beside.variant, "l0": beside.l0, "problem": beside.problem, "new": new,
             "features": {}}
    if beside.sae is not None and read.setup.lm.reads_text:
        key = id(beside.sae)
        made = _dashboards(read, directions.whole(beside.sae.W_dec), seen[key], looks[key], vocab, wanted)
        found["features"] = {str(feature): dashboard for feature, dashboard in made.items()}
        found["density"] = _densities(seen[key])
    return found


# ------------------------------------------------------------------------------------------------ the parts of a board


def _marked(beside: Beside | None, features: int) -> list[int | None] | None:
    """Of every feature whether it counts as new against the baseline, 1 or 0, or None of one that was not counted; None
    where none was.
    """
    if beside is None or beside.new is None:
        return None
    marks: list[int | None] = [None for _ in range(features)]
    for feature in beside.counted:
        marks[feature] = 0
    for feature in beside.new:
        marks[feature] = 1
    return marks


def _peaks(read: text.Text, seen: sweeps.Seen, vocab: Vocabulary) -> list[int]:
    """Of every feature the number of the token on which it is largest, -1 where it never fires."""
    fires = (seen.place_F >= 0).nonzero().squeeze(1)
    peaks = torch.full_like(seen.place_F, -1)
    tokens = read.tokens_RT.flatten()[seen.place_F[fires]].tolist()
    peaks[fires] = torch.tensor(vocab.numbers(tokens), dtype=peaks.dtype)
    return peaks.tolist()


class Vocabulary:
    """The texts of tokens, numbered in the order in which they are asked for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.number = tokenizer, {}

    def numbers(self, ids: list[int]) -> list[int]:
        return [self.number.setdefault(i, len(self.number)) for i in ids]

    def texts(self) -> list[str]:
        return passages.spelled(self.tokenizer, list(self.number))


def rounded(value, digits: int = 4):
    """A number, or each of a list, with so many significant digits; whole ones stay as they are."""
    if isinstance(value, list):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _l0(l0_N: Tensor) -> dict:
    """Tokens by active features, in at most 40 bins of one width."""
    low, high = (int(l0_N.min()), int(l0_N.max())) if len(l0_N) else (0, 0)
    width = -(-(high - low + 1) // 40)
    edges = list(range(low, high + width + 1, width))
    counts = ((l0_N - low) // width).bincount(minlength=len(edges) - 1)
    return {"edges": edges, "counts": counts.tolist()}


def _densities(seen: sweeps.Seen, bins: int = 40) -> dict:
    """Features by log10 of the share of tokens on which they fire, from the smallest there may be to 1."""
    fired_C = seen.fired_F[seen.fired_F > 0].double()
    lowest = min(math.floor(-math.log10(max(1, seen.tokens))), -1)
    place_C = ((fired_C / max(1, seen.tokens)).log10() - lowest) / -lowest * bins
    counts = place_C.long().clamp(0, bins - 1).bincount(minlength=bins)
    return {"edges": [rounded(lowest * (1 - i / bins)) for i in range(bins + 1)], "counts": counts.tolist(),
            "silent": len(seen.fired_F) - len(fired_C), "of": len(seen.fired_F)}


def _dashboards(read: text.Text, W_FD: Tensor, seen: sweeps.Seen, look: sweeps.Look, vocab: Vocabulary,
                wanted: set[int] | None = None) -> dict[int, dict]:
    """{feature: what sweeps and decoder tell of it}, of those that were looked at, or the wanted ones of them."""
    index = look.index_C.tolist()
    asked = [c for c, feature in enumerate(index) if wanted is None or feature in wanted]
    if not asked:
        return {}
    logits = directions.promoted(read.setup.lm, W_FD[look.index_C[asked]]) or [None for _ in asked]
    groups = _groups(read, look, seen, set(asked), vocab)
    found = {}
    for c, promoted in zip(asked, logits):
        feature = index[c]
        low, high = float(look.low_C[c]), float(look.high_C[c])
        edges = torch.linspace(low, high, sweeps.BINS + 1, dtype=torch.float64).tolist()
        if promoted is not None:
            promoted = {key: _named(read.setup.lm.tokenizer, value) if key in ("top", "bottom") else rounded(value)
                        for key, value in promoted.items()}
        density = rounded(int(seen.fired_F[feature]) / max(1, seen.tokens), DIGITS["density"])
        found[feature] = {
            "why": [], "density": density,
            "max": rounded(float(seen.max_F[feature])), "groups": groups[c],
            "histogram": {"edges": rounded(edges), "counts": look.counts_CB[c].tolist()}, "logits": promoted,
            "own": [], "theirs": [], "cofiring": [], "classes": [], "letters": [], "explanation": None, "score": None}
    return found


def _named(tokenizer, ends: list[tuple[int, float]]) -> list[list]:
    texts = passages.spelled(tokenizer, [token for token, _ in ends])
    return [[token, rounded(value)] for token, (_, value) in zip(texts, ends)]


def _groups(read: text.Text, look: sweeps.Look, seen: sweeps.Seen, asked: set[int], vocab: Vocabulary,
            ) -> dict[int, list[dict]]:
    """The contexts of features, by their number among those looked at."""
    def listed(firings: sweeps.Firings | None, numbers: list[int]) -> dict:
        """{(c, number): [(place, value, window), …]}"""
        found: dict = {}
        if firings is not None:
            columns = (firings.c_E, firings.place_E, firings.value_E, firings.window_EW)
            for number, c, *one in zip(numbers, *(column.tolist() for column in columns)):
                found.setdefault((c, number), []).append(one)
        return found

    def none(firings: sweeps.Firings | None) -> list[int]:
        return [0 for _ in range(0 if firings is None else len(firings.c_E))]

    def strongest(found: list) -> list:
        return sorted(found, key=lambda one: (-abs(one[1]), one[0]))

    intervals = [] if look.drawn is None else sweeps.interval(look, look.drawn).tolist()
    by_row, anywhere = (listed(kept, none(kept)) for kept in (look.by_row, look.strongest))
    drawn = listed(look.drawn, intervals)
    groups = {}
    for c in asked:
        largest = abs(float(seen.max_F[look.index_C[c]]))
        top = by_row.get((c, 0), [])
        places = {place for place, *_ in top}
        more = [one for one in strongest(anywhere.get((c, 0), [])) if one[0] not in places]
        top = strongest(top + more[:look.top - len(top)])
        groups[c] = [{"name": "top", "from": rounded(abs(top[-1][1])), "to": rounded(abs(top[0][1])),
                      "contexts": [_context(read, vocab, *one) for one in top]}] if top else []
        for number in range(sweeps.INTERVALS, 0, -1):
            some = strongest(drawn.get((c, number), []))
            ends = (rounded(largest * end / sweeps.INTERVALS) for end in (number - 1, number))
            if some:
                groups[c].append({"name": f"interval {number}", **dict(zip(("from", "to"), ends)),
                                  "contexts": [_context(read, vocab, *one) for one in some]})
    return groups


def _context(read: text.Text, vocab: Vocabulary, place: int, value: float, window: list[float]) -> dict:
    T = read.tokens_RT.shape[1]
    row, at = divmod(place, T)
    start, end = max(1, at - sweeps.WINDOW), min(T, at + sweeps.WINDOW + 1)  # without the BOS of the row
    values = window[start - at + sweeps.WINDOW:end - at + sweeps.WINDOW]
    return {"tokens": vocab.numbers(read.tokens_RT[row, start:end].tolist()),
            "values": [[i, rounded(v)] for i, v in enumerate(values) if v], "peak": at - start, "row": row,
            "cut": [start > 1, end < T]}


def _cofiring(seen: sweeps.Seen, look: sweeps.Look) -> tuple[Tensor, Tensor]:
    """Of the features that were looked at those with the largest φ, and φ; −∞ where it is not above 0."""
    N, n_F = seen.tokens, seen.fired_F.double()
    index, phi = [], []
    for index_c, both_cF in zip(look.index_C.cpu().split(AT_ONCE), look.together_CF.split(AT_ONCE)):
        n_c1, both_cF = n_F[index_c][:, None], both_cF.double().cpu()
        spread_cF = (n_c1 * (N - n_c1) * n_F * (N - n_F)).sqrt()
        phi_cF = (both_cF * N - n_c1 * n_F) / spread_cF
        phi_cF.scatter_(1, index_c[:, None], 0.0)
        phi_cF = torch.where(phi_cF > 0, phi_cF, -torch.inf)  # of those that never, or always fire it is not a number
        found = phi_cF.topk(min(COFIRING, len(n_F)), dim=1)
        index.append(found.indices)
        phi.append(found.values)
    return torch.cat(index), torch.cat(phi)
