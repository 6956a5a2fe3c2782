"""How many of the true features an SAE finds, where they are known: the metrics of SynthSAEBench (Chanin &
Garriga-Alonso 2026, https://arxiv.org/abs/2602.14687), equal to sae_lens.synthetic.eval_sae_on_synthetic_data.

Each latent of the SAE is judged as a detector of one true feature, that whose direction has the largest |cosine| with
its decoder row: precision, recall and their harmonic mean f1, 0 where undefined (a dead latent), mean over latents.
`mcc`: mean |cosine| of latents and true features matched one to one (Hungarian). `uniqueness`: different true features
that latents are best matched to, as a share of the latents. `shrinkage`: |x_hat|/|x|, mean over samples.

Standard errors: held-out samples are independent, so groups of them are the sample (evals/common/errors.py); a mean
over latents is linearised in the latents' counts. `mcc` and `uniqueness` depend on no sample: their errors take the
matched pairs, and the latents, as the sample. None of these is the spread over seeds: python -m runs.seeds.

Shapes: S samples of a draw, D = d_model, F latents of the SAE, G true features, C groups of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from evals import Result, Setup
from evals.common import errors
from evals.model import memory
from evals.texts.numbers import DRAW, DRAWS

EVAL_TYPE_ID = "ground_truth"

METRICS = {
    # features
    "f1": "higher",
    "precision": "higher",
    "recall": "higher",
    "mcc": "higher",
    "uniqueness": "higher",
    # reconstruction
    "r2": "higher",
    "shrinkage": "",
    # sparsity
    "l0": "",
    "true_l0": "",
    "dead_latents": "lower",
    "frac_alive": "higher",
}

CONFIG = {"synthetic": {"n_samples": 131_072}}  # held-out; SynthSAEBench takes 500,000

# measured; the model's passes are draws of samples, which nothing keeps: `once` is each time, for all SAEs of a layer
COST = {"synthetic": (135, 28)}
COST_BY = (("n_samples",),)

GROUPS = 32  # of samples, by which errors are reckoned
LEAST_NORM = 1e-6  # of a sample, for shrinkage


def requirements(config: dict, facts: dict) -> list[str]:
    """Too few samples for one draw each in five groups."""
    least = errors.FEWEST * DRAW
    if config["n_samples"] < least:
        return [f"n_samples = {config['n_samples']} is below {least:,}: samples come {DRAW:,} at a time, and an error "
                f"needs five groups\ngive n_samples of {least:,} or more with --eval_config"]
    return []


@dataclass
class Counts:
    """Sums of one SAE over held-out samples, by group."""

    best_F: Tensor  # the true feature of each latent
    tp_CF: Tensor  # samples with both, the latent alone, the feature alone
    fp_CF: Tensor
    fn_CF: Tensor
    sums_C: dict[str, Tensor]  # l0, shrinkage, shrunk (samples with a norm), error: Σ‖x − x_hat‖²

    @classmethod
    def none(cls, best_F: Tensor, groups: int) -> Counts:
        """Nothing counted yet."""
        zeros = [torch.zeros(groups, len(best_F)) for _ in range(3)]
        names = ("l0", "shrinkage", "shrunk", "error")
        return cls(best_F, *zeros, {name: torch.zeros(groups, dtype=torch.float64) for name in names})


def run(setup: Setup, saes: dict) -> dict[str, Result]:
    """{name: Result}: all SAEs on the same samples."""
    features_GD = setup.lm.features_GD.float()
    draws = DRAWS["heldout"][:max(1, setup.config["n_samples"] // DRAW)]
    groups = min(GROUPS, len(draws))
    cosine_of = {name: cosines(sae.W_dec.to(features_GD), features_GD) for name, sae in saes.items()}
    counts = {name: Counts.none(cosine_FG.argmax(1), groups) for name, cosine_FG in cosine_of.items()}
    sum_CD = torch.zeros(groups, setup.lm.d_model, dtype=torch.float64)
    samples_C, square_C, true_C = torch.zeros(3, groups, dtype=torch.float64)
    for i, draw in enumerate(setup.track(draws, "ground truth", len(draws) * DRAW, "sample", lambda _: DRAW)):
        x_SD, z_SG = setup.lm.draw(draw)
        group = i * groups // len(draws)
        samples_C[group] += len(x_SD)
        sum_CD[group] += x_SD.double().sum(0).cpu()
        square_C[group] += x_SD.double().pow(2).sum().cpu()
        true_C[group] += (z_SG > 0).sum().cpu()
        for name, sae in saes.items():
            add(setup, counts[name], group, sae, x_SD, z_SG > 0)
    mean_D = sum_CD.sum(0) / samples_C.sum()
    spread_C = square_C - 2 * sum_CD @ mean_D + samples_C * mean_D.square().sum()
    return {name: scored(counts[name], cosine_of[name], samples_C, spread_C, true_C) for name in saes}


def cosines(W_FD: Tensor, features_GD: Tensor) -> Tensor:
    """|cosine| [F, G] of decoder rows with the directions of true features."""
    return (functional.normalize(W_FD, dim=1) @ functional.normalize(features_GD, dim=1).T).abs()


def add(setup: Setup, counts: Counts, group: int, sae, x_SD: Tensor, true_SG: Tensor) -> None:
    """Count the samples of one draw: a latent fires where it is not 0, a true feature where it is above."""
    def work(x_sD: Tensor, true_sG: Tensor) -> tuple[Tensor, ...]:
        z_sF = sae.encode(x_sD)
        fires_sF, true_sF = z_sF != 0, true_sG[:, counts.best_F]
        x_hat_sD = sae.decode(z_sF)
        in_s, out_s = x_sD.float().norm(dim=1), x_hat_sD.norm(dim=1)
        error = (x_sD - x_hat_sD).double().pow(2).sum()
        valid_s = in_s > LEAST_NORM
        shrinkage_s = torch.where(valid_s, out_s / in_s.clamp_min(LEAST_NORM), 0)
        of_latents_F = [(fires_sF & true_sF).sum(0), (fires_sF & ~true_sF).sum(0), (~fires_sF & true_sF).sum(0)]
        of_samples = [fires_sF.sum(), shrinkage_s.double().sum(), valid_s.sum(), error]
        return (*(n_F[None] for n_F in of_latents_F), torch.stack([total.double() for total in of_samples])[None])

    tp_F, fp_F, fn_F, totals = memory.by_rows(setup, "the latents of ground_truth", work, x_SD, true_SG)
    counts.tp_CF[group] += tp_F.sum(0).cpu()
    counts.fp_CF[group] += fp_F.sum(0).cpu()
    counts.fn_CF[group] += fn_F.sum(0).cpu()
    for name, total in zip(("l0", "shrinkage", "shrunk", "error"), totals.sum(0).cpu()):
        counts.sums_C[name][group] += total


def scored(counts: Counts, cosine_FG: Tensor, samples_C: Tensor, spread_C: Tensor, true_C: Tensor) -> Result:
    """The Result of one SAE. Of each group, whatever the SAE: its samples, Σ‖x − mean‖², firings of true features."""
    sums_C = counts.sums_C
    values, stderrs = detection(counts)
    alive_F = (counts.tp_CF + counts.fp_CF).sum(0) > 0
    matched_P, (F, G) = matched(cosine_FG), cosine_FG.shape
    values |= dict(mcc=float(matched_P.mean()), uniqueness=len(counts.best_F.unique()) / F,
                   r2=float(1 - sums_C["error"].sum() / spread_C.sum()),
                   shrinkage=ratio(sums_C["shrinkage"], sums_C["shrunk"]), l0=ratio(sums_C["l0"], samples_C),
                   true_l0=ratio(true_C, samples_C), dead_latents=int((~alive_F).sum()),
                   frac_alive=float(alive_F.float().mean()))
    share_F = 1 / counts.best_F.bincount(minlength=G)[counts.best_F].double().cpu()  # its mean is the uniqueness
    stderrs |= dict(mcc=float(matched_P.std() / len(matched_P) ** 0.5), uniqueness=float(share_F.std() / F**0.5),
                    r2=errors.of_ratio(sums_C["error"], spread_C),
                    shrinkage=errors.of_ratio(sums_C["shrinkage"], sums_C["shrunk"]),
                    l0=errors.of_ratio(sums_C["l0"], samples_C),
                    true_l0=errors.of_ratio(true_C, samples_C))
    alive_error = error_of_alive(counts)
    stderrs |= dict(frac_alive=alive_error, dead_latents=alive_error * F)
    categories = dict(features=("f1", "precision", "recall", "mcc", "uniqueness"), reconstruction=("r2", "shrinkage"),
                      sparsity=("l0", "true_l0", "dead_latents", "frac_alive"))
    latents = dict(feature=counts.best_F.tolist(), abs_cosine=cosine_FG.amax(1).tolist(),
                   f1=f1_of(*(n_CF.sum(0) for n_CF in (counts.tp_CF, counts.fp_CF, counts.fn_CF))).tolist())
    return Result({category: {name: values[name] for name in names} for category, names in categories.items()},
                  stderrs={name: error for name, error in stderrs.items() if error is not None},
                  unstructured=dict(latents=latents))


def f1_of(tp_F: Tensor, fp_F: Tensor, fn_F: Tensor) -> Tensor:
    """[F], fp64: the harmonic mean of precision and recall, 0 where a latent never meets its feature."""
    return _quotient(2 * tp_F, 2 * tp_F + fp_F + fn_F)


def detection(counts: Counts) -> tuple[dict[str, float], dict[str, float | None]]:
    """Means over latents of f1, precision and recall, and their standard errors."""
    tp_CF, fp_CF, fn_CF = (n_CF.double() for n_CF in (counts.tp_CF, counts.fp_CF, counts.fn_CF))
    none_CF = torch.zeros_like(tp_CF)
    ratios = dict(f1=(2 * tp_CF, fp_CF + fn_CF), precision=(tp_CF, fp_CF), recall=(tp_CF, fn_CF))
    values, stderrs = {}, {}
    for name, (above_CF, rest_CF) in ratios.items():
        above_F, below_F = above_CF.sum(0), (above_CF + rest_CF).sum(0)
        values[name] = float(_quotient(above_F, below_F).mean())
        # of above/below to first order; its sum over groups is 0
        change_CF = above_CF - _quotient(above_F, below_F) * (above_CF + rest_CF)
        influence_C = torch.where(below_F > 0, change_CF / below_F.clamp_min(1), none_CF).mean(1)
        stderrs[name] = errors.of_sum(influence_C, range(len(influence_C)))
    return values, stderrs


def _quotient(above_F: Tensor, below_F: Tensor) -> Tensor:
    above_F, below_F = above_F.double(), below_F.double()
    return torch.where(below_F > 0, above_F / below_F.clamp_min(1), torch.zeros_like(above_F))


def matched(cosine_FG: Tensor) -> Tensor:
    """The cosines of latents and true features matched one to one so that their sum is largest, [min(F, G)]."""
    from scipy.optimize import linear_sum_assignment

    cosine_FG = cosine_FG.cpu()
    rows, columns = linear_sum_assignment(cosine_FG.numpy(), maximize=True)
    return cosine_FG[rows, columns].double()


def error_of_alive(counts: Counts) -> float:
    """Standard error of the share of latents that fire at all, by leaving out one group after the other."""
    fired_CF = counts.tp_CF + counts.fp_CF > 0
    alone_F = fired_CF.sum(0) == 1
    lost_C = (fired_CF & alone_F).double().mean(1)  # what leaving a group out would cost
    C = len(lost_C)
    return float(((C - 1) / C * (lost_C - lost_C.mean()).square().sum()).sqrt())


def ratio(above_C: Tensor, below_C: Tensor) -> float:
    return float(above_C.sum() / below_C.sum().clamp_min(1))
