"""Two sweeps over a text: how often, how much and on how many tokens the features of SAEs fire; and then the contexts
of chosen features, their histograms and what fires beside them. Activations of all features exist for some rows at a
time, and those of chosen ones for a part of the text.

Shapes: r rows of a part, T tokens of a row, D = d_model, F features, C chosen ones, E firings of chosen features,
W = 2·WINDOW + 1 tokens around one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from evals import Setup
from evals.dashboards.text import Part, Text
from evals.model import memory

AT_ONCE = {"cpu": 2**23, "cuda": 2**27}  # activations of all features: 32 MiB, 512 MiB
POINTS = 1000  # tokens whose norms and errors are shown
BINS, INTERVALS = 50, 10
TOP, EACH = 20, 5  # contexts: the strongest, and of each interval
WINDOW = 10  # tokens to either side
GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly


# ------------------------------------------------------------------------------------------------ all features


@dataclass
class Seen:
    """What the first sweep finds of an SAE, on the CPU; activations that are no number count as 0."""

    fired_F: Tensor  # tokens on which it fires
    low_F: Tensor  # its smallest activation, at most 0
    high_F: Tensor  # its largest one, at least 0
    place_F: Tensor  # where in the text, R·T, its largest magnitude is, the first of equal ones; -1: it never fires
    l0: list[Tensor] = field(default_factory=list)  # of the tokens of each part
    norms: list[float] = field(default_factory=list)  # ‖x‖ and ‖x − x̂‖ of some tokens
    errors: list[float] = field(default_factory=list)

    @staticmethod
    def nothing(features: int) -> Seen:
        """Of so many features, nothing yet."""
        return Seen(torch.zeros(features, dtype=torch.int64), torch.zeros(features), torch.zeros(features),
                    torch.full((features,), -1))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.l0))

    @property
    def max_F(self) -> Tensor:
        """The activation of the largest magnitude, with its sign."""
        return torch.where(-self.low_F > self.high_F, self.low_F, self.high_F)


def first(text: Text, saes: dict) -> dict[object, Seen]:
    """The first sweep, of several SAEs {key: TrainedSAE} at once."""
    seen = {key: Seen.nothing(len(sae.W_dec)) for key, sae in saes.items()}
    plain = text.plain_RT.flatten().nonzero().squeeze(1)
    shown = plain[torch.linspace(0, len(plain) - 1, min(POINTS, len(plain))).round().long()]
    shown_RT = torch.zeros_like(text.plain_RT).flatten().index_fill(0, shown, True).view_as(text.plain_RT)
    for part in text.parts():
        shown_rT = shown_RT[part.first:part.first + len(part.x_rTD)].to(part.body_rT.device) & part.body_rT
        for key, sae in saes.items():
            _count(text.setup, seen[key], sae, part)
            _measure(text.setup, seen[key], sae, part.x_rTD[shown_rT])
    return seen


def _count(setup: Setup, seen: Seen, sae, part: Part) -> None:
    features = torch.arange(len(seen.fired_F), device=part.x_rTD.device)

    def work(z_rTF: Tensor, body_rT: Tensor, row_r: Tensor) -> tuple[Tensor, ...]:
        low_rF, high_rF = z_rTF.amin(1), z_rTF.amax(1)
        r_F = torch.maximum(-low_rF, high_rF).argmax(0)  # of equal ones `argmax` takes the first
        place_F = row_r[r_F] * z_rTF.shape[1] + z_rTF[r_F, :, features].abs().argmax(1)
        fires_rTF = z_rTF.ne_(0)  # ones and zeros in the same memory
        return (fires_rTF.sum((0, 1))[None], low_rF.amin(0)[None], high_rF.amax(0)[None], place_F[None],
                fires_rTF.sum(2)[body_rT])

    row_r = torch.arange(part.first, part.first + len(part.x_rTD), device=part.x_rTD.device)
    *found, l0_N = _over(setup, sae, len(features), part, work, row_r)
    fired, low, high, place = (of_rows.cpu() for of_rows in found)
    for low_F, high_F, place_F in zip(low, high, place):
        more_F = torch.maximum(-low_F, high_F) > seen.max_F.abs()
        seen.place_F = torch.where(more_F, place_F, seen.place_F)
        seen.low_F = torch.minimum(seen.low_F, low_F)
        seen.high_F = torch.maximum(seen.high_F, high_F)
    seen.fired_F += fired.double().sum(0).round().long()
    seen.l0.append(l0_N.round().long().cpu())


def _measure(setup: Setup, seen: Seen, sae, x_ND: Tensor) -> None:
    if not len(x_ND):
        return
    x_ND = x_ND.float()
    error_N = (x_ND - sae.decode(sae.encode(x_ND))).norm(dim=1)
    seen.norms += x_ND.norm(dim=1).tolist()
    seen.errors += error_N.nan_to_num(0.0, 0.0, 0.0).tolist()


def _over(setup: Setup, sae, features: int, part: Part, work: Callable, *more: Tensor):
    """work(z_rTF, body_rT, *more) of a few rows after the other: their activations, 0 where nothing is looked at; more
    of the rows.
    """
    def encoded(x_rTD: Tensor, body_rT: Tensor, *more: Tensor):
        z_rTF = sae.encode(x_rTD).nan_to_num(0.0, 0.0, 0.0)
        return work(z_rTF.mul_(body_rT[..., None]), body_rT, *more)

    row = part.x_rTD.shape[1] * features
    most = max(1, AT_ONCE[torch.device(setup.lm.device).type] // row)
    return memory.by_rows(setup, "the features of dashboards", encoded, part.x_rTD, part.body_rT, *more, most=most)


# ------------------------------------------------------------------------------------------------ chosen features


@dataclass
class Firings:
    """Places where chosen features fire: the number of the feature among them, the place R·T in the text, the value."""

    c_E: Tensor
    place_E: Tensor
    value_E: Tensor
    window_EW: Tensor | None = None  # activations around it

    def at(self, index: Tensor) -> Firings:
        window_EW = None if self.window_EW is None else self.window_EW[index]
        return Firings(self.c_E[index], self.place_E[index], self.value_E[index], window_EW)


@dataclass
class Look:
    """What the second sweep finds of chosen features."""

    features: int  # of the SAE
    index_C: Tensor  # on the device
    low_C: Tensor
    high_C: Tensor
    top: int  # contexts of the largest activations
    intervals: bool  # whether there are contexts of intervals, too
    counts_CB: Tensor  # histogram, B bins from low to high
    together_CF: Tensor | None  # tokens on which both fire, if it is asked for
    by_row: Firings | None = None  # the strongest of its row, `top` rows
    strongest: Firings | None = None  # wherever they are
    drawn: Firings | None = None  # EACH of an interval

    @staticmethod
    def nothing(chosen: list[int], seen: Seen, device, top: int = TOP, alone: bool = False) -> Look:
        """Of these features, nothing yet; `alone`: without intervals and what fires beside them."""
        index_C, C = torch.tensor(chosen, dtype=torch.int64), len(chosen)
        together_CF = None if alone else torch.zeros(C, len(seen.fired_F), device=device)
        low_C, high_C = seen.low_F[index_C].to(device), seen.high_F[index_C].to(device)
        return Look(len(seen.fired_F), index_C.to(device), low_C, high_C, top, not alone,
                    torch.zeros(C, BINS, dtype=torch.int64), together_CF)


def second(text: Text, looks: dict, saes: dict) -> None:
    """The second sweep, which fills `looks` {key: Look}."""
    R, T = text.tokens_RT.shape
    generator = torch.Generator().manual_seed(text.setup.seed)
    lot_N = torch.rand(R * T, generator=generator, dtype=torch.float64)
    lots = {torch.device(device).type: lot_N.to(device) for device in ("cpu", text.setup.lm.device)}
    for part in text.parts():
        for key, look in looks.items():
            if len(look.index_C):
                _look(text, look, saes[key], part, lots)


def _look(text: Text, look: Look, sae, part: Part, lots: dict[str, Tensor]) -> None:
    def work(z_rTF: Tensor, body_rT: Tensor) -> Tensor:
        acts_rTC = z_rTF[..., look.index_C]
        if look.together_CF is not None:
            fires_NF = z_rTF.ne_(0).flatten(0, 1)
            fires_CN = fires_NF[:, look.index_C].T
            # last and in place: where memory runs out before, nothing was counted, and the rows are done again
            look.together_CF.addmm_(fires_CN, fires_NF)
        return acts_rTC

    acts_rTC = _over(text.setup, sae, look.features, part, work)
    T, at_E = acts_rTC.shape[1], acts_rTC.nonzero()
    r_E, t_E, c_E = at_E.unbind(1)
    new = Firings(c_E, (part.first + r_E) * T + t_E, acts_rTC[r_E, t_E, c_E])

    span_C = (look.high_C - look.low_C).clamp_min(1e-30)
    bin_E = ((new.value_E - look.low_C[c_E]) / span_C[c_E] * BINS).long().clamp(0, BINS - 1)
    look.counts_CB += (c_E * BINS + bin_E).bincount(minlength=look.counts_CB.numel()).view_as(look.counts_CB).cpu()

    around_rTC = functional.pad(acts_rTC, (0, 0, WINDOW, WINDOW))

    def kept(before: Firings | None, choose: Callable[[Firings], Tensor]) -> Firings:
        """What is chosen of this part, with its windows, and then of that and what was kept before."""
        some = new.at(choose(new))
        row_E, place_E = some.place_E // T - part.first, some.place_E % T
        beside_W = torch.arange(2 * WINDOW + 1, device=place_E.device)
        windows_EW = around_rTC[row_E[:, None], place_E[:, None] + beside_W, some.c_E[:, None]]
        some = Firings(*(t.cpu() for t in (some.c_E, some.place_E, some.value_E, windows_EW)))
        if before is None:
            return some
        fields = ((getattr(of, name) for of in (before, some)) for name in ("c_E", "place_E", "value_E", "window_EW"))
        both = Firings(*(torch.cat(list(pair)) for pair in fields))
        return both.at(choose(both))

    def best_rows(of: Firings) -> Tensor:
        best = firsts(of.c_E * len(text.tokens_RT) + of.place_E // T, -of.value_E.abs(), 1)
        return best[firsts(of.c_E[best], -of.value_E.abs()[best], look.top)]

    def strongest(of: Firings) -> Tensor:
        return firsts(of.c_E, -of.value_E.abs(), look.top)

    def some_of_each(of: Firings) -> Tensor:
        index_E = look.index_C.to(of.c_E.device)[of.c_E]
        lot_E = (lots[of.c_E.device.type][of.place_E] + index_E * GOLDEN) % 1
        return firsts(of.c_E * (INTERVALS + 1) + interval(look, of), lot_E, EACH)

    look.by_row, look.strongest = kept(look.by_row, best_rows), kept(look.strongest, strongest)
    if look.intervals:
        look.drawn = kept(look.drawn, some_of_each)


def interval(look: Look, of: Firings) -> Tensor:
    """In which of the intervals, from 1, the magnitudes of firings lie: above its lower end, up to its upper one."""
    largest_C = torch.maximum(-look.low_C, look.high_C).clamp_min(1e-30).to(of.c_E.device)
    return (of.value_E.abs() / largest_C[of.c_E] * INTERVALS).ceil().long().clamp(1, INTERVALS)


def firsts(key_E: Tensor, order_E: Tensor, k: int) -> Tensor:
    """Where the k first of each key stand, by `order_E`, and of equals those that stand first; ascending."""
    by_E = order_E.sort(stable=True).indices
    by_E = by_E[key_E[by_E].sort(stable=True).indices]
    sorted_E = key_E[by_E].contiguous()
    rank_E = torch.arange(len(by_E), device=by_E.device) - torch.searchsorted(sorted_E, sorted_E)
    return by_E[rank_E < k].sort().values
