"""Whether a run fits the machine: memory by part and training time, before a weight is read.

Host figures measured on the embedded profile (torch 2.13, CPU): 0.42 GB for the process when training starts, 0.36 GB
more for the libraries of the evals; nothing of it lies in a GPU's memory, where the allocator's own figures count.
"""

from __future__ import annotations

import math

import torch

from variants.kit import ranks
from variants.kit.files import size
from variants.preflight.check import Findings

PROCESS = {"cpu": 0.42e9, "cuda": 0.0}  # Python, torch, transformers, texts
EVAL_LIBRARIES = {"cpu": 0.36e9, "cuda": 0.0}  # TransformerLens, scikit-learn
# what the core eval allows itself for logits, and never more than an eighth of the memory
LOGITS = {"cpu": 2**28, "cuda": 2**32}
PASS_WIDTHS = 24  # activations a pass of the language model holds per token, in units of d_model
FEATURES = 1  # fp32 tensors as wide as the SAE that an eval holds per token
ACHIEVED = {"cpu": 0.8, "cuda": 0.4}  # shares of the matrix-product rate seen in practice


def need(findings: Findings, copies: int, shape: dict, block_tokens: int, lm_tokens: int, itemsize: int, evals: bool,
         device: str, spread: int = 1, available: float = math.inf) -> dict[str, float]:
    """Bytes by part for `copies` SAEs like the largest, with gradients and Adam's moments, stepped one after the other.

    shape: d_model and bytes of the language model; `block_tokens` times layers are kept, `lm_tokens` make one pass of
    the model, both with `itemsize` bytes a number. `training` and `evals` are not needed at the same time: see `peak`.
    An SAE may be `spread` over ranks; then its whole parameters and gradients are there beside its part of everything
    for the time of a step.
    """
    row = shape["d_model"] * itemsize
    features = FEATURES * 4 * lm_tokens * findings.parameters // (2 * shape["d_model"])
    saes = copies * 4 * findings.parameter_bytes
    if spread > 1:  # whole before the first step and for the evals
        saes = max(saes / spread + 2 * findings.parameter_bytes, saes / 4)
    saes += copies * findings.buffer_bytes
    return dict(process=PROCESS[device], lm=shape["bytes"], saes=saes,
                training=findings.step_peak_bytes + block_tokens * row + lm_tokens * PASS_WIDTHS * row,
                evals=evals * (EVAL_LIBRARIES[device] + min(LOGITS[device], available // 8) + features))


def rows_per_pass(free: float, context: int, row_bytes: int, device: str) -> int:
    """Rows of a language-model pass: a power of two, in an eighth of the `free` bytes, as long as more are faster.

    A GPU's matrix products reach their rate from some 10⁴ tokens on; on a CPU the caches are full with 2¹¹.
    """
    tokens = min(free / 8 / (PASS_WIDTHS * row_bytes), 2**16 if device == "cuda" else 2**11)
    return 2 ** max(0, int(math.log2(max(tokens / context, 1))))


def peak(parts: dict[str, float]) -> float:
    """Bytes of the phase that needs most."""
    return parts["process"] + parts["lm"] + parts["saes"] + max(parts["training"], parts["evals"])


def plan(settings, layers: list[int], steps: int, shape: dict, findings: list[Findings], evals: bool, sharing: int,
         available: float, matmul_rate: float, limit: str = "") -> tuple[str, dict, str]:
    """What a run with these settings needs of a rank's machine: a line, facts, the problem if it does not fit (or "").

    Memory `available` in bytes, `limit` being what bounds it if not the machine itself, `matmul_rate` in FLOP/s;
    `sharing`: ranks that share a batch. The facts also hold what follows from it: `lm_batch_size`, rows of a
    language-model pass, and `shard`, whether SAEs are spread over the ranks.
    """
    largest, copies = max(findings, key=lambda f: f.parameter_bytes + f.step_peak_bytes), len(layers) * len(findings)
    itemsize, rows = getattr(torch, settings.dtype).itemsize, settings.lm_batch_size
    if rows == "auto":
        rows = rows_per_pass(available - shape["bytes"], settings.context, shape["d_model"] * itemsize, settings.device)
    block = min(settings.block_tokens, settings.num_tokens) * len(layers)
    # while ranks exchange it: before and after, on its way, the last pass's
    block = 4 * block // sharing if sharing > 1 else block
    lm_tokens = rows * settings.context
    needs = [need(largest, copies, shape, block, lm_tokens, itemsize, evals, settings.device, spread, available)
             for spread in (1, sharing)]
    shard = sharing > 1 and (settings.shard or peak(needs[0]) > available)
    parts, all_ranks = needs[shard], ranks.count()
    if settings.snapshots:  # copies of a layer's SAEs are measured beside the training
        parts["training"] += parts["evals"] + len(findings) * largest.parameter_bytes
    flops = 2 * settings.num_tokens * (shape["block_parameters"] * (layers[-1] + 1) / all_ranks
                                       + 3 * settings.passes * copies * largest.parameters / sharing)
    line = "  ".join(f"{k} {v / 1e9:.2f}" for k, v in parts.items())
    line += (f"  -> peak {peak(parts) / 1e9:.2f} GB of {available / 1e9:.1f} GB on {settings.device}; "
             f"{number_of_saes(copies)} of {largest.parameters:,} parameters, {steps:,} steps of "
             f"{settings.batch_size:,} tokens")
    if settings.lm_batch_size == "auto":
        line += f", {rows} rows of {settings.context} tokens a language-model pass"
    if all_ranks > 1:
        line += f", {all_ranks} processes: {division(shard, sharing)}"
    facts = dict(forecast_bytes=parts | dict(peak=peak(parts), available=available), lm_batch_size=rows, shard=shard,
                 forecast_training_seconds=round(flops / matmul_rate / ACHIEVED[settings.device]))
    if peak(parts) <= available:
        return line, facts, ""
    row = shape["d_model"] * itemsize
    taken = dict(step=largest.step_peak_bytes, block=block * row, passes=lm_tokens * PASS_WIDTHS * row,
                 saes=parts["saes"], lm=parts["lm"], process=parts["process"])
    return line, facts, problem(settings, parts, taken, largest, available,
                                dict(copies=copies, layers=len(layers), rows=rows), limit)


def number_of_saes(n: int) -> str:
    return "1 SAE" if n == 1 else f"{n} SAEs"


def division(shard: bool, sharing: int) -> str:
    """How several ranks divide the work, in words."""
    if shard:
        return "each SAE spread over them"
    if sharing > 1:
        return "each with its share of every batch"
    return "each with its share of the language model's passes, one with the SAEs"


def problem(settings, parts: dict[str, float], taken: dict[str, float], largest: Findings, available: float,
            counts: dict, limit: str) -> str:
    """What does not fit, and what to do about it. `taken`: the bytes of each thing that a setting decides."""
    there = f"there are {size(available)}" + (f" (by {limit})" if limit else "")
    if peak(parts | dict(evals=0.0)) <= available:
        return (f"training fits, but the evals need {size(parts['evals'])} beside the language model's and the SAEs' "
                f"{size(parts['lm'] + parts['saes'])}, and {there}\n"
                "reduce --lm_batch_size or --d_sae, or train with --evals=none and evaluate with --init_from elsewhere")
    dominant = max(taken, key=taken.get)
    room = int(available - peak(parts | dict(evals=0.0)) + parts["saes"] / counts["copies"] + largest.step_peak_bytes)
    if dominant == "step" and room > 0:
        return too_large(largest, room)
    rest = peak(parts | dict(evals=0.0)) - taken[dominant]
    n, width = counts["layers"], f"{settings.context:,} tokens of context"
    layers = f" × {n} layers" if n > 1 else ""
    tokens = min(settings.block_tokens, settings.num_tokens)
    what, advice = {
        "block": (f"the block of activations (--block_tokens: {tokens:,} tokens{layers})",
                  smaller_block(settings, taken, rest, available)),
        "passes": (f"a pass of the language model (--lm_batch_size: {counts['rows']:,} rows of {width})",
                   "reduce --lm_batch_size, or --context"),
        "step": (f"a training step (--batch_size: {settings.batch_size:,} tokens)", "reduce --batch_size or --d_sae"),
        "saes": (f"{number_of_saes(counts['copies'])} with gradients and Adam's moments (--d_sae={settings.d_sae:,})",
                 "reduce --d_sae" + (", or train fewer at once: --layers, --sweep" if counts["copies"] > 1 else "")),
        "process": ("the process itself (Python, torch, texts)",
                    "give it more memory: this is the least that a run needs"),
        "lm": (f"the language model ({settings.model} in {settings.dtype})",
               "choose a smaller --model" + (", or --dtype=bfloat16" if settings.dtype == "float32" else "")),
    }[dominant]
    return (f"{what} alone takes {size(taken[dominant])} of the {size(peak(parts | dict(evals=0.0)))} that training "
            f"needs, and {there}\n{advice}")


def smaller_block(settings, taken: dict[str, float], rest: float, available: float) -> str:
    """How many tokens of a block would fit beside the rest, in steps of 1,024, where that is a batch at least."""
    tokens = min(settings.block_tokens, settings.num_tokens)
    fits = int(tokens * 0.9 * (available - rest) / taken["block"]) // 1024 * 1024
    if fits < settings.batch_size:
        return "reduce --block_tokens, then --batch_size"
    return f"give --block_tokens={fits}, which would fit, or less"


def too_large(findings: Findings, limit_bytes: int) -> str | None:
    """The message, if parameters with gradients and Adam's moments, buffers and a step need more than `limit_bytes`."""
    need = 4 * findings.parameter_bytes + findings.buffer_bytes + findings.step_peak_bytes
    if need <= limit_bytes:
        return None
    n_bytes, shape, place = findings.largest
    largest = f"a tensor of shape {list(shape)} ({in_units(n_bytes)}) at {place} is the largest; " if n_bytes else ""
    return (f"{largest}training needs {in_units(need)}, {in_units(findings.step_peak_bytes)} of it in a step; the "
            f"machine has {in_units(limit_bytes)}\n"
            "reduce --batch_size or --d_sae, or make that tensor smaller: a sample of rows, one chunk at a time, only "
            "the pairs needed")


def in_units(n_bytes: float) -> str:
    """Bytes in the binary unit that shows something; what is left of an overdrawn machine is nothing."""
    n_bytes = max(0, n_bytes)
    unit, power = next(((u, p) for u, p in (("GiB", 30), ("MiB", 20)) if n_bytes >= 2**p / 10), ("KiB", 10))
    return f"{n_bytes / 2**power:,.1f} {unit}"
