"""SAEBench's `core`: what the language model loses when its residual stream is replaced by the SAE's reconstruction.

Protocol and metric names: SAEBench 0.6.0. Two passes over packed held-out text: *reconstruction* (cross-entropy and KL
of the clean model, the model with the SAE and the zero-ablated model) and *sparsity* (everything else). Ours, beside
SAEBench's: `r2`, the coefficient of determination (its `explained_variance` squares the mean of x² in place of the mean
of x), `mse_per_token` (its `mse` is divided by the number of tokens in a batch once more), and `r2_median`, which a
few huge tokens do not move: 1 − median ‖x − x_hat‖² / median ‖x − c‖², medians over tokens (the lower of two middle
values), c the mean of a batch without its far tokens (`checks.centre`). `cossim` is the mean over tokens of the cosine
of x and x_hat: a token counts once, however large, but a mean that dominates x brings it near 1 for any SAE.

The language model's part does not depend on the SAE: tokens, residuals and final hidden states are cached or, where
they are too large, streamed; both ways give the same batches. Clean and SAE runs share the blocks up to the layer.

Standard errors: documents are the sample. Texts are packed, so a document fills several rows and a row holds parts of
several documents; tokens of one document are alike, and errors over rows were 1.3 to 1.5 times too small. Every sum is
therefore kept by document, and each metric, a ratio of two sums, gets the error of a ratio clustered by document
(evals/common/errors.py). Runs of rows that share a document would not do: nearly all rows hang together. Some
dependence is left out: tokens see the end of the document before them in their row, and `explained_variance_legacy` and
`mse` divide by a batch's own variance and size. `explained_variance` and `relative_reconstruction_bias`, means over
batches, have no error; `r2` has one. That of `r2_median` is linearised in both medians (evals/common/errors.py).

Shapes: R rows of tokens (S of them in the reconstruction pass), B rows in a batch, T tokens in a row, D = d_model,
C documents (in a batch or in all), F features of an SAE, V the vocabulary, N any number of tokens.
x residuals, x_hat reconstructions, h final hidden states.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from evals import Result, Setup
from evals.common import errors, positions
from evals.model import checks, memory
from evals.storage.identity import code_digest
from evals.texts import packing

EVAL_TYPE_ID = "core"
MASKED = True

METRICS = {
    # model_behavior_preservation
    "kl_div_score": "higher",
    "kl_div_with_ablation": "",
    "kl_div_with_sae": "lower",
    # model_performance_preservation
    "ce_loss_score": "higher",
    "ce_loss_with_ablation": "",
    "ce_loss_with_sae": "lower",
    "ce_loss_without_sae": "",
    # reconstruction_quality
    "explained_variance": "higher",
    "explained_variance_legacy": "higher",
    "mse": "lower",
    "cossim": "higher",
    # shrinkage
    "l2_norm_in": "",
    "l2_norm_out": "",
    "l2_ratio": "",
    "relative_reconstruction_bias": "",
    # sparsity
    "l0": "",
    "l1": "",
    # token_stats
    "total_tokens_eval_reconstruction": "",
    "total_tokens_eval_sparsity_variance": "",
    # misc_metrics
    "freq_over_1_percent": "",
    "freq_over_10_percent": "",
    "normalized_freq_over_1_percent": "",
    "normalized_freq_over_10_percent": "",
    "average_max_encoder_cosine_sim": "",
    "average_max_decoder_cosine_sim": "",
    "frac_alive": "higher",
    # corrected
    "r2": "higher",
    "r2_median": "higher",
    "mse_per_token": "lower",
}

RECORDED = ("dataset",)

CONFIG = {
    "gemma": {  # the sizes of SAEBench's paper
        "dataset": "Skylion007/openwebtext",
        "context_size": 128,  # tokens, BOS included
        "batch_size_prompts": 16,  # rows in a batch
        "n_eval_reconstruction_batches": 200,
        "n_eval_sparsity_variance_batches": 2000,
        "exclude_special_tokens_from_reconstruction": True,  # special tokens keep the original activation
        "reuse_reconstruction_rows": False,  # whether the sparsity pass starts at the first row again; SAEBench goes on
    },
    "embedded": {  # 10,240 tokens through the whole model and 6,144 more up to the layer
        "dataset": "held-out",
        "context_size": 128,
        "batch_size_prompts": 8,
        "n_eval_reconstruction_batches": 10,
        "n_eval_sparsity_variance_batches": 16,
        "exclude_special_tokens_from_reconstruction": True,
        "reuse_reconstruction_rows": True,
    },
    "tiny": {
        "dataset": "held-out",
        "context_size": 32,
        "batch_size_prompts": 2,
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 3,
        "exclude_special_tokens_from_reconstruction": True,
        "reuse_reconstruction_rows": True,
    },
}

# gemma: 409,600 tokens through the blocks, 4,096,000 to the layer (.39 of a pass), both counted; of an SAE 409,600
# through the later blocks and the head twice (340), and 4,505,600 tokens encoded in fp32, 14 s of an H200 (660)
# embedded and tiny: measured (tests/benchmarks/RESULTS.md, as all evals); nearly all grows with the rows
COST = {"gemma": (2000, 1000), "embedded": (10, 14), "tiny": (5, 2)}
COST_BY = (("n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches"), ("batch_size_prompts",),
           ("context_size",))

CATEGORIES = {  # SAEBench's, and what they hold
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent", "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim",
        "frac_alive"),
}

LOGIT_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # for all logits at once
FEATURE_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # for all features at once
SECONDS_BETWEEN_LINES = 30.0


def requirements(config: dict, facts: dict) -> list[str]:
    """Sizes that cannot give a result; what data and model need is checked where they are opened."""
    least = {"context_size": 2, "batch_size_prompts": 1, "n_eval_reconstruction_batches": 1,
             "n_eval_sparsity_variance_batches": 1}
    return [f"core: {name} = {config[name]!r} cannot be measured\nset it to a whole number, {least[name]} or more"
            for name in least if not isinstance(config[name], int) or config[name] < least[name]]


def held_out(config: dict) -> tuple[int, int]:
    """Tokens of held-out text: the fewest it can do with (a row for the sparsity pass), and what it asks for."""
    first, rows = _rows(config)
    return (first + 1) * config["context_size"], rows * config["context_size"]


def _rows(config: dict) -> tuple[int, int]:
    """(first row of the sparsity pass, rows of both passes)."""
    batch, n_suffix = config["batch_size_prompts"], config["n_eval_reconstruction_batches"]
    first = 0 if config["reuse_reconstruction_rows"] else n_suffix
    return first * batch, batch * max(n_suffix, first + config["n_eval_sparsity_variance_batches"])


@torch.no_grad()
def run(setup: Setup, saes: dict) -> dict[str, Result]:
    """SAEBench's core metrics of every SAE, from one pass over the language model.

    Raises ValueError if the held-out texts are too short for the sparsity pass or the residuals are not finite.
    """
    lm, plan = setup.lm, _plan(setup)
    special_ids = torch.tensor(sorted(lm.special_ids), dtype=torch.int64, device=lm.device)
    h_ablated_TD = _ablated(setup, plan)
    tallies = {name: Tally() for name in saes}
    rows_at_once = {name: _rows_at_once(sae, plan, lm.device) for name, sae in saes.items()}
    # Σ_t x in the sparsity pass, of each row [B, D] and of each document in a batch [C, D]
    x_sums, x_sums_of_documents = [], []
    from_centre = []  # ‖x − c‖² of each token of that pass, [B, T]; NaN where it does not count
    batches = _reported(setup, _clean_batches(setup, plan), plan, f"core: {len(saes)} SAE(s)")
    for i, (tokens_BT, x_BTD, h_BTD) in batches:
        used_BT = positions.within(setup, x_BTD, ~torch.isin(tokens_BT, special_ids))
        document_C, member_CN = _documents(plan, i, tokens_BT.device)
        if i in plan.sparsity:
            used_x_BTD = x_BTD.double() * used_BT[..., None]
            x_sums.append(used_x_BTD.sum(1).float())
            x_sums_of_documents.append((member_CN @ used_x_BTD.flatten(0, 1)).float())
            centre_D = checks.centre(x_BTD.flatten(0, 1), used_BT.flatten()).float()
            from_centre.append(torch.where(used_BT, (x_BTD.float() - centre_D).square().sum(-1), math.nan))
        h_saes = {}
        for name, sae in saes.items():
            x_hat_BTD, *features = _apply(setup, sae, x_BTD, used_BT, rows_at_once[name])
            tallies[name].broken += (~x_hat_BTD.isfinite().all(-1) & used_BT).sum()
            if i in plan.sparsity:
                tallies[name].sparsity.documents.append(document_C)
                tallies[name].add_sparsity(i - plan.sparsity.start, x_BTD.float(), x_hat_BTD, used_BT, member_CN,
                                           *features)
            if h_BTD is not None:
                h_saes[name] = _finished(setup, _replaced(setup, x_BTD, x_hat_BTD, used_BT))
        if h_BTD is not None:
            for name, losses in _losses(setup, tokens_BT, h_BTD, h_ablated_TD, h_saes).items():
                tallies[name].losses.documents.append(document_C)
                tallies[name].add_losses(losses, used_BT, member_CN)
    x_sum_RD, x_sum_CD = (torch.cat(sums).cpu().double() for sums in (x_sums, x_sums_of_documents))
    from_centre_RT = torch.cat(from_centre).cpu()
    return {name: _result(setup, tallies[name], x_sum_RD, x_sum_CD, from_centre_RT, plan, sae)
            for name, sae in saes.items()}


# -------------------------------------------------------------------------------------------- the language model's part


@dataclass(frozen=True)
class Plan:
    """How rows are measured: the first `suffix_rows` by the whole model, the batches `sparsity` up to the layer."""

    tokens_RT: Tensor
    document_RT: Tensor  # the number of each token's document
    batch: int  # rows
    suffix_rows: int
    sparsity: range  # batches
    dtype: torch.dtype  # of the residuals
    problems: list[str]


def _plan(setup: Setup) -> Plan:
    config, lm = setup.config, setup.lm
    batch, context = config["batch_size_prompts"], config["context_size"]
    start, wanted = _rows(config)
    sparsity = range(start // batch, start // batch + config["n_eval_sparsity_variance_batches"])

    def make() -> dict[str, Tensor]:
        tokens_RT, document_RT = packing.pack_numbered(setup.texts(), lm.tokenizer, context, lm.bos, wanted)
        return {"tokens_RT": tokens_RT, "document_RT": document_RT}

    packed = setup.cache.get("core-tokens", _tokens_depend_on(setup), make)
    tokens_RT = packed["tokens_RT"]
    rows = len(tokens_RT)
    if rows <= start:
        raise ValueError(f"core: the held-out texts fill {rows} rows of {context} tokens; the sparsity pass starts at "
                         f"row {start}\ngive more text, or lower n_eval_reconstruction_batches")
    problems = [f"the held-out texts fill only {rows} of the {wanted} rows asked for"] if rows < wanted else []
    dtype = lm.residual(tokens_RT[:1, :1].to(lm.device), setup.layer).dtype
    return Plan(tokens_RT, packed["document_RT"], batch, _suffix_rows(config, tokens_RT), sparsity, dtype, problems)


def _tokens_depend_on(setup: Setup) -> dict:
    return {"texts": setup.texts_digest, "rows": _rows(setup.config)[1], "context": setup.config["context_size"],
            "lm": setup.lm.digest, "code": code_digest(packing)}


def _pass_depends_on(setup: Setup, tokens_RT: Tensor, dtype: torch.dtype) -> dict:
    lm = setup.lm
    return {"model": lm.digest, "layer": setup.layer, "dtype": str(dtype), "device": torch.device(lm.device).type,
            "tokens": hashlib.sha256(tokens_RT.numpy().tobytes()).hexdigest(),
            "batch": setup.config["batch_size_prompts"], "suffix_rows": _suffix_rows(setup.config, tokens_RT),
            "code": code_digest(_clean_run)}


def _suffix_rows(config: dict, tokens_RT: Tensor) -> int:
    """Rows that pass the whole model: those of the reconstruction pass, as far as there is text."""
    return min(config["batch_size_prompts"] * config["n_eval_reconstruction_batches"], len(tokens_RT))


def kept_rows(setup: Setup) -> tuple[Tensor, Tensor] | None:
    """(tokens_RT, x_RTD) that `run` at its usual size took from the language model, as long as the cache has them."""
    def lost() -> dict[str, Tensor]:
        raise LookupError

    config = CONFIG.get(getattr(setup.data, "kind", "embedded"))
    if config is None:
        return None
    setup = replace(setup, config=config)
    depends_on = _tokens_depend_on(setup)
    if not setup.cache.holds("core-tokens", depends_on):
        return None
    try:
        tokens_RT = setup.cache.get("core-tokens", depends_on, lost)["tokens_RT"]
        depends_on = _pass_depends_on(setup, tokens_RT, setup.lm.dtype)
        if not setup.cache.holds("core", depends_on):
            return None
        return tokens_RT, setup.cache.get("core", depends_on, lost)["x_RTD"]
    except LookupError:  # damaged
        return None


def _clean_batches(setup: Setup, plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches (tokens_BT, x_BTD, h_BTD) on the model's device; h_BTD is None after the reconstruction pass."""
    lm, tokens_RT = setup.lm, plan.tokens_RT
    shapes = {"x_RTD": (*tokens_RT.shape, lm.d_model), "h_STD": (plan.suffix_rows, tokens_RT.shape[1], lm.d_final)}
    depends_on = _pass_depends_on(setup, tokens_RT, plan.dtype)
    n_bytes = plan.dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
    if not (setup.cache.path("core", depends_on).exists() or setup.cache.fits(n_bytes)):
        yield from _clean_run(setup, plan)
        return

    def make() -> dict[str, Tensor]:
        tensors = {name: torch.empty(shape, dtype=plan.dtype) for name, shape in shapes.items()}
        for i, (_, x_BTD, h_BTD) in _reported(setup, _clean_run(setup, plan), plan, "core: language model"):
            rows = slice(i * plan.batch, (i + 1) * plan.batch)
            tensors["x_RTD"][rows] = x_BTD.cpu()
            if h_BTD is not None:
                tensors["h_STD"][rows] = h_BTD.cpu()
        return tensors

    tensors = setup.cache.get("core", depends_on, make)
    for start in range(0, len(tokens_RT), plan.batch):
        rows = slice(start, start + plan.batch)
        h_BTD = tensors["h_STD"][rows].to(lm.device) if start < plan.suffix_rows else None
        yield tokens_RT[rows].to(lm.device), tensors["x_RTD"][rows].to(lm.device), h_BTD


def _clean_run(setup: Setup, plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    size = plan.batch * memory.batches_at_once(setup, plan.batch * plan.tokens_RT.shape[1])
    for start in range(0, len(plan.tokens_RT), size):
        tokens_RT = plan.tokens_RT[start : start + size].to(setup.lm.device)
        x_RTD = memory.residual(setup, tokens_RT)
        if not x_RTD.isfinite().all():
            raise ValueError(f"core: {setup.lm.name} gives NaN or infinite residuals at {setup.hook_name}\n"
                             "load the language model in float32 or bfloat16")
        suffix_rows = max(0, min(len(x_RTD), plan.suffix_rows - start))
        h_STD = _finished(setup, x_RTD[:suffix_rows]) if suffix_rows else None
        for first in range(0, len(x_RTD), plan.batch):
            rows = slice(first, first + plan.batch)
            yield tokens_RT[rows], x_RTD[rows], h_STD[rows] if first < suffix_rows else None


def _documents(plan: Plan, i: int, device) -> tuple[Tensor, Tensor]:
    """The numbers of the documents in batch i, [C], and which of its tokens are theirs, [C, B·T] of 0 and 1."""
    document_C, member_N = plan.document_RT[i * plan.batch : (i + 1) * plan.batch].flatten().unique(return_inverse=True)
    return document_C, F.one_hot(member_N, len(document_C)).T.double().to(device)


def _finished(setup: Setup, x_BTD: Tensor) -> Tensor:
    """The final hidden states [B, T, D] that follow from the residuals."""
    return memory.by_rows(setup, "the language model", lambda x_RTD: setup.lm.finish(x_RTD, setup.layer), x_BTD,
                          each=x_BTD.shape[1])


def _ablated(setup: Setup, plan: Plan) -> Tensor | None:
    """Final hidden states [T, D] after a residual of zeros, or None where all logits are then equal.

    One row stands for all: nothing depends on the tokens any more.
    """
    if setup.lm.uniform_when_ablated:
        return None
    zeros_1TD = torch.zeros(1, plan.tokens_RT.shape[1], setup.lm.d_model, dtype=plan.dtype, device=setup.lm.device)
    return setup.lm.finish(zeros_1TD, setup.layer)[0]


def _losses(setup: Setup, tokens_BT: Tensor, h_BTD: Tensor, h_ablated_TD: Tensor | None,
            h_saes: dict[str, Tensor]) -> dict[str, dict]:
    """For each SAE {"ce_clean", "ce_ablated", "kl_ablated", "ce_sae", "kl_sae"}: [B, T], nats per token.

    ce is of the next token (meaningless at the last position), kl is KL(p_clean ‖ p_new). The logits exist for a few
    tokens at a time, the clean ones once for all SAEs.
    """
    lm, target_N1 = setup.lm, tokens_BT.roll(-1, dims=1).reshape(-1, 1)
    ablated = [] if h_ablated_TD is None else [h_ablated_TD.expand_as(h_BTD)]
    h_ND, *new_ND = (h.flatten(0, 1) for h in (h_BTD, *ablated, *h_saes.values()))
    # five fp32 tensors live at once
    tokens_at_once = max(1, _budget(LOGIT_BYTES, lm.device) // (5 * 4 * lm.vocab_size))

    def compared(target_N1: Tensor, h_ND: Tensor, *new_ND: Tensor) -> tuple[Tensor, ...]:
        logp_NV = lm.unembed(h_ND).float().log_softmax(-1)
        p_NV = logp_NV.exp()
        values = [-logp_NV.gather(1, target_N1)[:, 0]]
        if h_ablated_TD is None:  # equal logits: CE = ln V, KL = ln V − H(p)
            ce_ablated_N = torch.full_like(values[0], math.log(lm.vocab_size))
            values += [ce_ablated_N, ce_ablated_N + torch.linalg.vecdot(p_NV, logp_NV)]
        for h_nD in new_ND:
            values += _compared(lm.unembed(h_nD), target_N1, logp_NV, p_NV)
        return tuple(values)

    values = memory.by_rows(setup, "the logits", compared, target_N1, h_ND, *new_ND, most=tokens_at_once)
    columns = [value_N.view_as(tokens_BT) for value_N in values]
    shared = dict(zip(("ce_clean", "ce_ablated", "kl_ablated"), columns))
    return {name: shared | {"ce_sae": ce_BT, "kl_sae": kl_BT}
            for name, ce_BT, kl_BT in zip(h_saes, columns[3::2], columns[4::2])}


def _compared(logits_NV: Tensor, target_N1: Tensor, logp_NV: Tensor, p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the target under new logits and Σ p·(log p − log q), [N] each."""
    logq_NV = logits_NV.float().log_softmax(-1)
    ce_N = -logq_NV.gather(1, target_N1)[:, 0]
    return ce_N, -torch.linalg.vecdot(p_NV, logq_NV.sub_(logp_NV))


def _budget(bytes_by_device: dict[str, int], device) -> int:
    kind = torch.device(device).type
    allowed = bytes_by_device.get(kind, bytes_by_device["cpu"])
    return min(allowed, torch.cuda.mem_get_info(device)[1] // 8) if kind == "cuda" else allowed


def _reported(setup: Setup, batches: Iterable, plan: Plan, what: str) -> Iterator[tuple[int, tuple]]:
    """`enumerate`, with a progress line now and then."""
    total, said = math.ceil(len(plan.tokens_RT) / plan.batch), time.monotonic()
    for i, batch in enumerate(batches):
        yield i, batch
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            setup.say(f"{what}: batch {i + 1} of {total}")


# ------------------------------------------------------------------------------------------------ one SAE on one batch


def _rows_at_once(sae, plan: Plan, device) -> int:
    features_of_a_row = 4 * 4 * plan.tokens_RT.shape[1] * sae.W_dec.shape[0]  # four fp32 tensors live at once
    return max(1, _budget(FEATURE_BYTES, device) // features_of_a_row)


def _apply(setup: Setup, sae, x_BTD: Tensor, used_BT: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_hat_BTD, L0 and L1 of tokens [B, T], unmasked firings of features [B, F]; `rows` rows of features at a time."""
    def applied(x_RTD: Tensor, used_RT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z_RTF = sae.encode(x_RTD)
        fired_RF = ((z_RTF != 0) & used_RT[..., None]).sum(1)
        return sae.decode(z_RTF).float(), (z_RTF != 0).sum(-1), z_RTF.abs().sum(-1), fired_RF

    return memory.by_rows(setup, "the features", applied, x_BTD, used_BT, most=rows, each=len(sae.W_dec))


def _replaced(setup: Setup, x_BTD: Tensor, x_hat_BTD: Tensor, used_BT: Tensor) -> Tensor:
    x_hat_BTD = x_hat_BTD.to(x_BTD.dtype)
    if setup.config["exclude_special_tokens_from_reconstruction"]:
        return torch.where(used_BT[..., None], x_hat_BTD, x_BTD)
    return x_hat_BTD


@dataclass
class Sums:
    """Sums over tokens in fp64 per batch: by row, [B], for metrics; by document, [C, quantities], for their errors."""

    rows: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    of_documents: list[Tensor] = field(default_factory=list)
    documents: list[Tensor] = field(default_factory=list)  # the numbers of the documents of each batch, [C]

    def add(self, values: dict[str, tuple[Tensor, Tensor]], member_CN: Tensor) -> None:
        """{name: (value of each token, whether it counts)}, [B, T] each; one that does not count may be NaN."""
        kept = {name: torch.where(used_BT, value_BT.double(), 0.0) for name, (value_BT, used_BT) in values.items()}
        for name, value_BT in kept.items():
            self.rows[name].append(value_BT.sum(1))
        # a product, as a GPU adds up by index in no fixed order
        self.of_documents.append(member_CN @ torch.stack([value_BT.flatten() for value_BT in kept.values()], dim=1))

    def by_row(self) -> dict[str, Tensor]:
        return {name: torch.cat(sums).cpu() for name, sums in self.rows.items()}

    def by_document(self, names: Iterable[str]) -> dict[str, Tensor]:
        """{name: sum of each document, [C]}, of documents in any batch."""
        sum_CQ = self.joined(torch.cat(self.of_documents).cpu())
        return dict(zip(names, sum_CQ.unbind(1)))

    def joined(self, parts: Tensor) -> Tensor:
        """The parts of documents in all batches, one after the other, as sums of whole documents."""
        document_C, place = torch.cat(self.documents).unique(return_inverse=True)
        return parts.new_zeros(len(document_C), *parts.shape[1:]).index_add(0, place, parts)


@dataclass
class Tally:
    """What is counted of one SAE."""

    losses: Sums = field(default_factory=Sums)
    sparsity: Sums = field(default_factory=Sums)
    batches: list[Tensor] = field(default_factory=list)  # of the sparsity pass: its rows' batch, [B]
    fired_F: Tensor | int = 0  # tokens at which a feature fired
    rows_fired_F: Tensor | int = 0  # rows in which it did
    r_sq: list[Tensor] = field(default_factory=list)  # of the sparsity pass: ‖x − x_hat‖² of its tokens, [B, T]
    broken: Tensor | int = 0  # tokens whose reconstruction is not finite

    def add_losses(self, losses: dict[str, Tensor], used_BT: Tensor, member_CN: Tensor) -> None:
        """Cross-entropy counts at source tokens that have a next one, KL at all unmasked tokens."""
        has_next_BT = used_BT.clone()
        has_next_BT[:, -1] = False
        counts = {"ce": has_next_BT, "kl": used_BT}
        values = {name: (value_BT, counts[name[:2]]) for name, value_BT in losses.items()}
        self.losses.add(values | {f"{name}_tokens": (mask_BT, mask_BT) for name, mask_BT in counts.items()}, member_CN)

    def add_sparsity(self, batch: int, x_BTD: Tensor, x_hat_BTD: Tensor, used_BT: Tensor, member_CN: Tensor,
                     l0_BT: Tensor, l1_BT: Tensor, fired_BF: Tensor) -> None:
        """`mse` and `explained_variance_legacy` of a token depend on what else is in its batch, as in SAEBench."""
        n = used_BT.sum()
        mean_D = (x_BTD * used_BT[..., None]).sum((0, 1)) / n
        norm_in_BT, norm_out_BT = x_BTD.norm(dim=-1), x_hat_BTD.norm(dim=-1)
        dot_BT = (x_BTD * x_hat_BTD).sum(-1)
        r_sq_BT = (x_BTD - x_hat_BTD).square().sum(-1)
        values = {
            "l2_norm_in": norm_in_BT,
            "l2_norm_out": norm_out_BT,
            "l2_ratio": norm_out_BT / torch.where(norm_in_BT < 1e-4, 1.0, norm_in_BT),
            # a reconstruction of zeros points nowhere: it counts as 0, one such token does not void the mean
            "cossim": dot_BT / (norm_in_BT * norm_out_BT).clamp_min(torch.finfo(torch.float32).tiny),
            "mse": r_sq_BT / n,
            "mse_per_token": r_sq_BT,
            "explained_variance_legacy": 1 - r_sq_BT / (x_BTD - mean_D).square().sum(-1),
            "l0": l0_BT,
            "l1": l1_BT,
            "x_sq": x_BTD.square().sum(-1),
            "x_hat_sq": x_hat_BTD.square().sum(-1),
            "dot": dot_BT,
            "tokens": used_BT,
        }
        self.sparsity.add({name: (value_BT, used_BT) for name, value_BT in values.items()}, member_CN)
        self.r_sq.append(r_sq_BT)
        self.batches.append(torch.full_like(used_BT[:, 0], batch, dtype=torch.int64))
        self.fired_F = self.fired_F + fired_BF.sum(0)
        self.rows_fired_F = self.rows_fired_F + (fired_BF > 0).sum(0)


# ------------------------------------------------------------------------------------------------ from sums to metrics


def _result(setup: Setup, tally: Tally, x_sum_RD: Tensor, x_sum_CD: Tensor, from_centre_RT: Tensor, plan: Plan,
            sae) -> Result:
    # on the CPU: a GPU adds up by index in no fixed order
    losses, sparsity = tally.losses.by_row(), tally.sparsity.by_row()
    ratios = _loss_ratios(losses) | _sparsity_ratios(sparsity, x_sum_RD)
    of_documents = _loss_ratios(tally.losses.by_document(losses))
    of_documents |= _sparsity_ratios(tally.sparsity.by_document(sparsity), tally.sparsity.joined(x_sum_CD))
    columns, problems = _features(setup, tally, sparsity["tokens"].sum(), sae)
    values = {name: float(above_R.sum() / below_R.sum()) for name, (above_R, below_R) in ratios.items()}
    values |= _batch_metrics(sparsity, torch.cat(tally.batches).cpu(), x_sum_RD.shape[1]) | _misc_metrics(columns)
    values["r2_median"], median_stderr = _r2_median(torch.cat(tally.r_sq).cpu(), from_centre_RT, plan)
    details = _details(columns)
    broken = int(tally.broken)
    if broken:
        problems.append(f"the SAE's reconstruction is not finite at {broken} tokens: nothing can be measured")
        values, details = dict.fromkeys(values), []
    elif values["l0"] == 0:
        problems.append("the SAE is dead: L0 = 0")
    undefined = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
    if undefined:
        problems.append(f"not finite, so without a value: {', '.join(undefined)}")
        values |= dict.fromkeys(undefined)
    context = plan.tokens_RT.shape[1]
    values["total_tokens_eval_reconstruction"] = plan.suffix_rows * context
    values["total_tokens_eval_sparsity_variance"] = len(sparsity["tokens"]) * context
    stderrs = {name: errors.of_ratio(*parts) for name, parts in of_documents.items()} | {"r2_median": median_stderr}
    return Result(
        metrics={category: {name: values[name] for name in names} for category, names in CATEGORIES.items()},
        corrected={name: values[name] for name in ("r2", "r2_median", "mse_per_token")},
        stderrs={name: error for name, error in stderrs.items() if error is not None and values[name] is not None},
        details=details,
        problems=plan.problems + problems,
    )


def _loss_ratios(sums: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of the reconstruction pass as (numerator, denominator) by row or document."""
    ce_n, kl_n = sums["ce_tokens"], sums["kl_tokens"]
    return {
        "kl_div_score": (sums["kl_ablated"] - sums["kl_sae"], sums["kl_ablated"]),
        "kl_div_with_ablation": (sums["kl_ablated"], kl_n),
        "kl_div_with_sae": (sums["kl_sae"], kl_n),
        "ce_loss_score": (sums["ce_ablated"] - sums["ce_sae"], sums["ce_ablated"] - sums["ce_clean"]),
        "ce_loss_with_ablation": (sums["ce_ablated"], ce_n),
        "ce_loss_with_sae": (sums["ce_sae"], ce_n),
        "ce_loss_without_sae": (sums["ce_clean"], ce_n),
    }


def _sparsity_ratios(sums: dict[str, Tensor], x_sum_RD: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of the sparsity pass as (numerator, denominator) by row or document."""
    means = ("explained_variance_legacy", "mse", "mse_per_token", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio",
             "l0", "l1")
    mean_D = x_sum_RD.sum(0) / sums["tokens"].sum()
    variance_R = sums["x_sq"] - 2 * x_sum_RD @ mean_D + sums["tokens"] * mean_D.square().sum()  # Σ_t ‖x − mean‖²
    ratios = {name: (sums[name], sums["tokens"]) for name in means}
    return ratios | {"r2": (variance_R - sums["mse_per_token"], variance_R)}


def _r2_median(r_sq_RT: Tensor, from_centre_RT: Tensor, plan: Plan) -> tuple[float, float | None]:
    """1 − median ‖r‖² / median ‖x − c‖² over the tokens of the sparsity pass that count, and its standard error."""
    used_RT = ~from_centre_RT.isnan()
    if not used_RT.any():
        return math.nan, None
    first = plan.sparsity.start * plan.batch
    document_RT = plan.document_RT[first:first + len(used_RT)]
    unexplained, stderr = errors.of_medians(r_sq_RT[used_RT], from_centre_RT[used_RT], document_RT[used_RT])
    return 1 - unexplained, stderr


def _batch_metrics(sums: dict[str, Tensor], batch_R: Tensor, d_model: int) -> dict[str, float]:
    """SAEBench's two metrics that average over batches, whatever the number of tokens in each."""
    n_batches = int(batch_R.max()) + 1
    per_batch = {name: sums[name].new_zeros(n_batches).index_add(0, batch_R, sums[name])
                 for name in ("tokens", "x_sq", "mse_per_token", "x_hat_sq", "dot")}
    some = per_batch["tokens"] > 0  # a batch of special tokens only has no mean
    x_sq, r_sq = ((per_batch[name] / per_batch["tokens"])[some].mean() for name in ("x_sq", "mse_per_token"))
    return {
        "explained_variance": float(1 - r_sq / (x_sq - (x_sq / d_model) ** 2)),
        "relative_reconstruction_bias": float((per_batch["x_hat_sq"] / per_batch["dot"])[some].mean()),
    }


def _features(setup: Setup, tally: Tally, tokens: Tensor, sae) -> tuple[dict[str, Tensor | None], list[str]]:
    """SAEBench's columns of numbers per feature, [F] on the CPU, and why a column is missing (None)."""
    fired_F, rows_F = tally.fired_F.cpu(), tally.rows_fired_F.cpu()
    W_dec_FD, W_enc_DF, b_enc_F = sae.W_dec, sae.W_enc, sae.b_enc
    columns = {
        "feature_density": fired_F / tokens,
        "consistent_activation_heuristic": torch.where(rows_F > 0, fired_F / rows_F, -1.0),
        "encoder_bias": torch.zeros_like(W_dec_FD[:, 0]) if b_enc_F is None else b_enc_F,
        "encoder_norm": None,
        "encoder_decoder_cosine_sim": None,
        "max_decoder_cosine_sim": _max_cosine(setup, W_dec_FD),
        "max_encoder_cosine_sim": None,
    }
    problems = ["the SAE has no encoder matrix [D, F]: its encoder metrics have no value"]
    if W_enc_DF is not None:
        problems = []
        columns["encoder_norm"] = W_enc_DF.norm(dim=0)
        columns["encoder_decoder_cosine_sim"] = F.cosine_similarity(W_enc_DF.T, W_dec_FD, dim=1)
        columns["max_encoder_cosine_sim"] = _max_cosine(setup, W_enc_DF.T)
    return {name: column_F if column_F is None else column_F.cpu() for name, column_F in columns.items()}, problems


def _max_cosine(setup: Setup, W_FD: Tensor) -> Tensor:
    """The largest cosine of each row with any other row, [F]; the F × F matrix exists a few rows at a time."""
    rows_FD = F.normalize(W_FD.float(), dim=1)

    def largest(rows_CD: Tensor, own: range) -> Tensor:
        cosine_CF = rows_CD @ rows_FD.T
        cosine_CF.diagonal(own.start).fill_(-math.inf)
        return cosine_CF.amax(1)

    return memory.by_rows(setup, "the cosines of features", largest, rows_FD, range(len(rows_FD)), most=1024,
                          each=len(rows_FD))


def _misc_metrics(columns: dict[str, Tensor | None]) -> dict[str, float | None]:
    """Shares of features above a firing rate, and of all firings that are theirs; mean largest cosines."""
    density_F = columns["feature_density"]
    total = density_F.sum().clamp_min(1e-300)  # a dead SAE: 0 / 0 counts as 0, as in SAEBench
    values = {"frac_alive": float((density_F > 0).double().mean())}
    for percent in (1, 10):
        often_F = density_F > percent / 100
        values[f"freq_over_{percent}_percent"] = float(often_F.double().mean())
        values[f"normalized_freq_over_{percent}_percent"] = float(density_F[often_F].sum() / total)
    for side in ("encoder", "decoder"):
        column_F = columns[f"max_{side}_cosine_sim"]
        values[f"average_max_{side}_cosine_sim"] = None if column_F is None else float(column_F.double().mean())
    return values


def _details(columns: dict[str, Tensor | None]) -> list[dict]:
    """One row per feature, rounded as SAEBench rounds."""
    n_features = len(columns["feature_density"])
    lists = {name: [None] * n_features if column_F is None else column_F.double().tolist()
             for name, column_F in columns.items()}
    rounded = {name: [round(v, 10) if v is not None and math.isfinite(v) else None for v in lists[name]]
               for name in lists}
    return [{"index": i} | {name: column[i] for name, column in rounded.items()} for i in range(n_features)]
