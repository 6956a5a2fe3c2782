"""Probes on pooled features: the balanced one-against-rest draw, k-sparse and full linear probes (SAEBench 0.6.0).

Shapes: M examples of a draw, F features or LM channels, k of them selected. Labels are 1 for the class, 0 for the rest.
`train`, `test`, `fit` and `select` are pairs (x_MF, label_M).
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from evals.cache import digest
from evals.common import errors

BATCH, EPOCHS, PATIENCE, LEARNING_RATE = 250, 100, 10, 1e-2  # of the full linear probe, as SAEBench calls it


def generator(*parts) -> torch.Generator:
    """A CPU generator seeded by names and numbers alone: no draw shifts another's random stream."""
    return torch.Generator().manual_seed(int(digest([str(p) for p in parts])[:15], 16))


@contextmanager
def one_thread():
    """Torch and BLAS on one thread of the CPU: probes are so small that threads mostly wait for each other.

    Two threads took 4 to 20 times as long on two busy cores; and no accuracy depends on the number of threads.
    """
    import sklearn.linear_model  # noqa: F401  loads the BLAS that is to be limited
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def draw(rows: dict[str, Tensor], positive: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """All rows of one class and as many of the others, shuffled: (row_M, label_M); `rows` {class: row numbers}.

    ⌈positives / other classes⌉ rows of each other class in the dictionary's order, as many of these as there are
    positives, then all shuffled: three kinds of randperm in this order, so that an equal seed gives SAEBench's own
    draw.
    """
    positive_rows, others = rows[positive], [r for name, r in rows.items() if name != positive]
    share = math.ceil(len(positive_rows) / len(others))
    rest = torch.cat([r[torch.randperm(len(r), generator=rng)[:share]] for r in others])
    rest = rest[torch.randperm(len(rest), generator=rng)[: len(positive_rows)]]
    if len(rest) < len(positive_rows):
        raise ValueError(f"class {positive!r} has {len(positive_rows)} texts, the others only {len(rest)} for it\n"
                         "give every class of a probing data set the same number of texts")
    row_M = torch.cat([positive_rows, rest])
    label_M = (torch.arange(len(row_M)) < len(positive_rows)).long()
    order = torch.randperm(len(row_M), generator=rng)
    return row_M[order], label_M[order]


def by_mean_difference(x_MF: Tensor, label_M: Tensor) -> Tensor:
    """Feature numbers by descending |mean over positives − mean over negatives|; of equals the lower number first."""
    difference_F = x_MF[label_M == 1].mean(0) - x_MF[label_M == 0].mean(0)
    return difference_F.abs().argsort(descending=True, stable=True)


def sparse_probe_accuracy(train, test, feature_k: Tensor) -> float:
    """Test accuracy of scikit-learn's logistic regression on the given features, as SAEBench fits it.

    L2 penalty with C = 1, lbfgs, at most 1000 iterations, features not standardised, columns in the order of their
    numbers. In fp32 and on features of any scale lbfgs stops anywhere: a change of 1e-7 in the input moved a class from
    .545 to .505.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    (train_Mk, train_label_M), (test_Mk, test_label_M) = _columns(feature_k, torch.float32, train, test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1000 iterations are the protocol, converged or not
        probe = LogisticRegression(C=1.0, max_iter=1000).fit(train_Mk, train_label_M)
    return float((probe.predict(test_Mk) == test_label_M).mean())


def converged_probe_accuracy(train, test, feature_k: Tensor) -> float:
    """Test accuracy of the same probe at its optimum, in fp64; NaN if no solver gets there.

    The problem is strictly convex in the weights: what Newton's method, or lbfgs with as many steps as it takes,
    converges to is the one solution, and a small change of the input makes a small change of it. Convergence is
    scikit-learn's own check.
    """
    from scipy.linalg import LinAlgWarning
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    (train_Mk, train_label_M), (test_Mk, test_label_M) = _columns(feature_k, torch.float64, train, test)
    for solver, steps in (("newton-cholesky", 1000), ("lbfgs", 100_000)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                warnings.simplefilter("error", LinAlgWarning)
                probe = LogisticRegression(C=1.0, solver=solver, tol=1e-8, max_iter=steps).fit(train_Mk, train_label_M)
            return float((probe.predict(test_Mk) == test_label_M).mean())
        except (ConvergenceWarning, LinAlgWarning):  # a Hessian of nearly 0: the classes lie far apart
            continue
    return math.nan


def _columns(feature_k: Tensor, dtype: torch.dtype, *sides) -> list[tuple]:
    """The given features, in the order of their numbers, and the labels of each side, for scikit-learn."""
    return [(x_MF[:, feature_k.sort().values].to(dtype).cpu().numpy(), label_M.cpu().numpy())
            for x_MF, label_M in sides]


class LinearProbe(NamedTuple):
    """A linear probe at the selected epoch (from 0; −1: never right) with the accuracy on the rows that selected it."""

    weight_1F: Tensor
    bias_1: Tensor
    epoch: int
    accuracy: float


def linear_accuracy(weight_1F: Tensor, bias_1: Tensor, x_MF: Tensor, label_M: Tensor) -> float:
    """Share of rows on the right side of the probe's plane."""
    right = ((functional.linear(x_MF, weight_1F, bias_1).squeeze(-1) > 0) == (label_M == 1)).sum()
    return right.item() / len(label_M)


def gradients(x_MF: Tensor, target_ML: Tensor, W_LF: Tensor, b_L: Tensor,
              weight_L: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of L probes' mean binary cross-entropy (positives counted `weight_L` times) for their W_LF and b_L.

    Autograd's but for rounding, in a third of the launches, which are what a step on a GPU takes.
    """
    error_ML = (functional.linear(x_MF, W_LF, b_L).sigmoid() - target_ML) / target_ML.numel()
    if weight_L is not None:
        error_ML = torch.where(target_ML > 0, weight_L, 1.0) * error_ML
    return error_ML.T @ x_MF, error_ML.sum(0)


@torch.enable_grad()
def fit_linear_probe(fit, select, rng: torch.Generator) -> LinearProbe:
    """Logistic regression on all features by AdamW on the pair (x_MF, label_M) `fit`, at the epoch best on `select`.

    The first of equally good epochs is kept; it ends after 10 epochs without a better one. `rng` gives nn.Linear's
    initialisation, then one order of the rows per epoch.
    """
    x_MF, label_M = fit
    weight_1F = torch.nn.init.kaiming_uniform_(torch.empty(1, x_MF.shape[1]), a=math.sqrt(5), generator=rng)
    bound = 1 / math.sqrt(x_MF.shape[1])
    bias_1 = torch.empty(1).uniform_(-bound, bound, generator=rng)
    weight_1F, bias_1 = (t.to(x_MF.device).requires_grad_() for t in (weight_1F, bias_1))
    optimiser = torch.optim.AdamW([weight_1F, bias_1], lr=LEARNING_RATE, fused=x_MF.is_cuda)
    target_M = label_M.to(x_MF)
    best = LinearProbe(weight_1F.detach().clone(), bias_1.detach().clone(), -1, 0.0)
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(x_MF), generator=rng).to(x_MF.device).split(BATCH):
            if x_MF.is_cuda:
                found = gradients(x_MF[index], target_M[index, None], weight_1F.detach(), bias_1.detach())
                weight_1F.grad, bias_1.grad = found
            else:
                logit = functional.linear(x_MF[index], weight_1F, bias_1).squeeze(-1)
                optimiser.zero_grad()
                functional.binary_cross_entropy_with_logits(logit, target_M[index]).backward()
            optimiser.step()
        accuracy = linear_accuracy(weight_1F.detach(), bias_1.detach(), *select)
        if accuracy > best.accuracy:
            best = LinearProbe(weight_1F.detach().clone(), bias_1.detach().clone(), epoch, accuracy)
        elif epoch - best.epoch >= PATIENCE:
            break
    return best


def leaky_accuracy(train, test, rng: torch.Generator) -> float:
    """SAEBench's full-probe accuracy: the best *test* accuracy of any epoch, hence biased upwards."""
    return fit_linear_probe(train, test, rng).accuracy


def validation_selected(train, test, rng: torch.Generator) -> tuple[float, int]:
    """Test accuracy at the epoch best on the last fifth of the training rows, kept out of the fit, and that epoch."""
    x_MF, label_M = train
    cut = len(label_M) - max(1, len(label_M) // 5)
    probe = fit_linear_probe((x_MF[:cut], label_M[:cut]), (x_MF[cut:], label_M[cut:]), rng)
    return linear_accuracy(probe.weight_1F, probe.bias_1, *test), probe.epoch


def standard_error(values_by_dataset: list[list[float]]) -> float | None:
    """Standard error of the mean over data sets of the mean over classes, with classes as the sample; None if they are
    too few.

    √(n/(n−1)·Σ w²(a − mean)²) with w a class's weight in the mean. The two classes of a two-class data set are one
    problem seen from both sides and count as one. The spread over classes holds the noise of the finite test sets
    already, so no binomial term is added; for a difference the values are differences per class, which makes it the
    paired error.
    """
    units = []  # (weight, value)
    for values in values_by_dataset:
        problems = [fmean(values)] if len(values) == 2 else values
        units += [(1 / len(values_by_dataset) / len(problems), value) for value in problems]
    return weighted_error(units)


def weighted_error(units: list[tuple[float, float]]) -> float | None:
    """Standard error of Σ w·value over the units (w, value), which are the sample; None if they are too few.

    √(n/(n−1)·Σ w²(value − mean)²). A bootstrap of the units, each with its weight, has the same variance but for the
    n/(n−1).
    """
    if not errors.enough([w for w, _ in units]):
        return None
    mean = sum(w * a for w, a in units)
    return math.sqrt(len(units) / (len(units) - 1) * sum((w * (a - mean)) ** 2 for w, a in units))
