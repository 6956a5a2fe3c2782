"""What scr and tpp share: linear probes for concepts in pooled LM activations, and what single SAE features contribute
to them.

A probe is SAEBench's: AdamW with an L1 penalty for a fixed number of epochs, at the epoch that is best on other rows.
As it never stops early, its random numbers do not depend on the data, and all probes of a data set are trained as one
problem. Ablating features never touches a token again: the residual is changed linearly, so a text's pooled vector, and
with it a probe's logit, loses Σ_f pooled_f·(W_dec[f]·w). SAEBench ablates at masked positions too, where it has set the
residual to zero: there a feature has encode(0), which is added to its sum over the text but not to the number of
positions.

Shapes: N texts, M examples of a draw, m rows asked for, P probes, B of a training batch, D = d_model, F features, n
selected.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evals.common import pooling, probes
from evals.storage.identity import code_digest

Draw = tuple[Tensor, Tensor]  # (row_M, label_M): rows of pooled texts, 1 for the concept and 0 for its opposite


class Probes(NamedTuple):
    """P linear probes at their selected epochs (from 0; −1: never right)."""

    weight_PD: Tensor
    bias_P: Tensor
    epoch_P: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        """Logits [N, P]."""
        return x_ND @ self.weight_PD.T + self.bias_P


def requirements(name: str, config: dict, n_named: tuple[int, ...]) -> list[str]:
    """Problems with the settings that both evals have."""
    problems = []
    if not config["n_values"] or not set(config["n_values"]) <= set(n_named):
        problems.append(f"{name}: n_values = {config['n_values']} must be some of {list(n_named)}\n"
                        "SAEBench's results have no key for any other n")
    problems += pooling.short_context(name, config)
    for key in ("probe_epochs", "probe_train_batch_size", "probe_train_set_size", "probe_test_set_size"):
        if config[key] < 1:
            problems.append(f"{name}: {key} = {config[key]} trains or tests no probe\nset {key} to 1 or more")
    return problems


# ------------------------------------------------------------------------------------------------ training


def fit(x_ND: Tensor, fits: list[Draw], selects: list[Draw], rngs: list[torch.Generator], config: dict) -> Probes:
    """P probes on the rows of `fits`, each at the first of its epochs that are best on its rows of `selects`.

    Each generator gives nn.Linear's initialisation, then one order of the rows per epoch. Every step is the step of all
    probes: parameters and AdamW's moments are stacked, and nothing in them mixes the probes, so each is what it is
    alone.
    """
    row_PM, label_PM = (torch.stack(parts).to(x_ND.device) for parts in zip(*fits))
    select_row_PM, select_label_PM = (torch.stack(parts).to(x_ND.device) for parts in zip(*selects))
    weight_PD, bias_P = torch.empty(len(rngs), x_ND.shape[1]), torch.empty(len(rngs))
    bound = 1 / math.sqrt(x_ND.shape[1])
    for p, rng in enumerate(rngs):
        torch.nn.init.kaiming_uniform_(weight_PD[p : p + 1], a=math.sqrt(5), generator=rng)
        bias_P[p : p + 1].uniform_(-bound, bound, generator=rng)
    weight_PD, bias_P = weight_PD.to(x_ND.device), bias_P.to(x_ND.device)
    optimiser = torch.optim.AdamW([weight_PD, bias_P], lr=config["probe_lr"])
    best = Probes(weight_PD.clone(), bias_P.clone(), torch.full_like(bias_P, -1, dtype=torch.int64))
    best_accuracy_P = torch.zeros_like(bias_P)
    for epoch in range(config["probe_epochs"]):
        order_PM = torch.stack([torch.randperm(row_PM.shape[1], generator=rng) for rng in rngs]).to(x_ND.device)
        batches = (t_PM.gather(1, order_PM).split(config["probe_train_batch_size"], dim=1)
                   for t_PM in (row_PM, label_PM))
        for row_PB, label_PB in zip(*batches):
            x_PBD = x_ND[row_PB]
            logit_PB = (x_PBD @ weight_PD[:, :, None]).squeeze(2) + bias_P[:, None]
            # the gradient of the batch's mean cross-entropy by hand: half of autograd's time at this size
            error_PB = (logit_PB.sigmoid() - label_PB) / row_PB.shape[1]
            weight_PD.grad = (error_PB[:, None] @ x_PBD).squeeze(1) + config["probe_l1_penalty"] * weight_PD.sign()
            bias_P.grad = error_PB.sum(1)
            optimiser.step()
        logit_PM = Probes(weight_PD, bias_P, best.epoch_P).logits(x_ND).T.gather(1, select_row_PM)
        accuracy_P = ((logit_PM > 0) == (select_label_PM == 1)).float().mean(1)
        better_P = accuracy_P > best_accuracy_P
        best_accuracy_P = torch.where(better_P, accuracy_P, best_accuracy_P)
        best = Probes(torch.where(better_P[:, None], weight_PD, best.weight_PD),
                      torch.where(better_P, bias_P, best.bias_P), best.epoch_P.masked_fill(better_P, epoch))
    return best


def trained(setup, key: str, names: list[str], examples: Callable, x_ND: Tensor) -> dict[str, Probes]:
    """{"compatible": Probes, "corrected": Probes} for the concepts `names` of the data set `key`; no SAE enters them.

    examples (name, generator) -> (train, test) draws a concept's rows. The compatible probes' epochs are chosen by test
    accuracy.
    """
    found = {}
    for kind in ("compatible", "corrected"):
        rngs = [generator(setup, key, name, kind) for name in names]
        fits, selects = zip(*(examples(name, rng) for name, rng in zip(names, rngs)))
        if kind == "corrected":  # the last fifth of the shuffled training rows chooses the epoch, no test row does
            cut = len(fits[0][0]) - max(1, len(fits[0][0]) // 5)
            fits, selects = ([(row_M[part], label_M[part]) for row_M, label_M in fits]
                             for part in (slice(cut), slice(cut, None)))
        found[kind] = _cached(setup, x_ND, list(fits), list(selects), rngs)
    return found


def generator(setup, key: str, name: str, *moment) -> torch.Generator:
    """The generator of one moment for one concept of a data set; "corrected" is the moment of the one fixed draw."""
    return probes.generator(setup.seed, "concept_probes", key, name, *moment)


def _cached(setup, x_ND: Tensor, fits: list[Draw], selects: list[Draw], rngs: list[torch.Generator]) -> Probes:
    drawn = [t for draw in (*fits, *selects) for t in draw] + [rng.get_state() for rng in rngs]
    depends_on = {
        "tensors": [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (x_ND, *drawn)],
        "config": {name: value for name, value in setup.config.items() if name.startswith("probe_")},
        "device": torch.device(setup.lm.device).type,
        "code": code_digest(__file__),
        "torch": torch.__version__,
    }

    @probes.one_thread()
    def make() -> dict[str, Tensor]:
        return fit(x_ND.to(setup.lm.device), fits, selects, rngs, setup.config)._asdict()

    stored = setup.cache.get("concept_probes", depends_on, make)
    return Probes(**{name: tensor.cpu() for name, tensor in stored.items()})


# ------------------------------------------------------------------------------------------------ effects and ablation


@dataclass(frozen=True)
class Ablation:
    """Probes on pooled texts, and the part of their logits that comes from each feature of one SAE."""

    logit_NP: Tensor
    dot_FP: Tensor  # W_dec[f]·w: what a unit of the feature adds to the probe's logit
    z_NF: Tensor  # pooled features
    zero_F: Tensor  # encode(0)
    masked_N: Tensor  # masked positions in the context per position averaged; 0 where the ablation leaves them alone

    def effects(self, draws: list[Draw]) -> Tensor:
        """(mean over positives − mean over negatives) of each feature, [P, F], on rows drawn for each probe."""
        weight_PN = torch.zeros(len(draws), len(self.z_NF))
        for weight_N, (row_M, label_M) in zip(weight_PN, draws):
            positives = int(label_M.sum())
            weight_N.index_add_(0, row_M, torch.where(label_M == 1, 1 / positives, -1 / (len(label_M) - positives)))
        return weight_PN @ self.z_NF

    def logits(self, row_m: Tensor, selected_n: Tensor) -> Tensor:
        """Logits [m, P] of the probes with the selected features ablated at every position."""
        removed_mn = self.z_NF[row_m[:, None], selected_n] + self.masked_N[row_m, None] * self.zero_F[selected_n]
        return self.logit_NP[row_m] - removed_mn @ self.dot_FP[selected_n]


def strongest(effect_F: Tensor, n: int) -> Tensor:
    """Numbers of the n features with the largest effects, of fewer if fewer are not 0."""
    return effect_F.topk(min(n, int((effect_F != 0).sum()))).indices


def accuracy(logit_M: Tensor, label_M: Tensor) -> float:
    """Share of examples on the right side of the probe's plane."""
    return ((logit_M > 0) == (label_M == 1)).float().mean().item()


# ----------------------------------------------------------------------------------------- one data set after the other


class Texts(NamedTuple):
    """The pooled texts of a data set: as the LM's channels, for the probes, and as each SAE's features."""

    key: str
    rows: dict[str, dict[str, Tensor]]  # {"train" | "test": {class: rows}}
    x_ND: Tensor
    masked_N: Tensor
    features: dict[str, Tensor]  # {SAE: z_NF}


def pooled(setup, saes: dict, name: str, sets: dict, problems: dict[str, list[str]]) -> Iterator[Texts]:
    """The labelled sets {data set: (tokens_NT, length_N, rows)}, each pooled in one pass of the LM for all SAEs.

    An SAE whose features of a set are not finite is left out of that set and gets a problem; all are if the LM's
    activations are not.
    """
    # None: the LM's own channels
    encoders = {None: lambda x: x} | {sae_name: sae.encode for sae_name, sae in saes.items()}
    for key, (tokens_NT, length_N, rows) in sets.items():
        setup.say(f"{name}: {key}, {len(tokens_NT)} texts")
        content_N = pooling.content_mask(tokens_NT, length_N, setup.lm.special_ids).sum(1)
        masked_N = (tokens_NT.shape[1] - content_N) / content_N.clamp_min(1)
        # one data set at a time: 7,500 texts (scr) or 12,500 (tpp) of 65k features take 2 or 3 GB for each SAE
        features = {sae_name: v_NV.cpu() for sae_name, v_NV in
                    pooling.pooled(setup, tokens_NT, length_N, encoders).items()}
        bad = {sae_name: int((~v_NV.isfinite()).any(1).sum()) for sae_name, v_NV in features.items()}
        x_ND = features.pop(None)
        for sae_name in saes:
            what, number = ("LM activations", bad[None]) if bad[None] else ("features", bad[sae_name])
            if number:
                problems[sae_name].append(f"{name}: no score: {key}: NaN or inf in the {what} of {number} of "
                                          f"{len(x_ND)} texts")
                features.pop(sae_name)
        if features:
            yield Texts(key, rows, x_ND, masked_N, features)


def ablations(found: dict[str, Probes], texts: Texts, name: str, sae) -> dict[str, Ablation]:
    """{"compatible": Ablation, "corrected": Ablation} of an SAE; the first ablates masked positions, as in SAEBench."""
    W_dec_FD = sae.W_dec.float()
    zero_F = sae.encode(torch.zeros_like(W_dec_FD[:1])).float().cpu()[0]
    masked = {"compatible": texts.masked_N, "corrected": torch.zeros_like(texts.masked_N)}
    made = {}
    for kind, probe in found.items():
        dot_FP = (W_dec_FD @ probe.weight_PD.T.to(W_dec_FD.device)).cpu()
        made[kind] = Ablation(probe.logits(texts.x_ND), dot_FP, texts.features[name], zero_F, masked[kind])
    return made
