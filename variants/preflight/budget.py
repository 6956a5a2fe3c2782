"""Whether a run fits the machine: memory by part and training time, before a weight is read.

Host figures measured on the embedded profile (torch 2.13, CPU): 0.42 GB for the process when training starts, 0.36 GB more for the
libraries of the evals; nothing of it lies in a GPU's memory, where the allocator's own figures count.
"""

from __future__ import annotations

from variants.preflight.check import Findings, too_large

PROCESS = {"cpu": 0.42e9, "cuda": 0.0}  # Python, torch, transformers, texts
EVAL_LIBRARIES = {"cpu": 0.36e9, "cuda": 0.0}  # TransformerLens, scikit-learn
LOGITS = {"cpu": 2**28, "cuda": 2**32}  # what the core eval allows itself for logits
PASS_WIDTHS = 24  # activations a pass of the language model holds per token, in units of d_model
FEATURES = 1  # fp32 tensors as wide as the SAE that an eval holds per token
ACHIEVED = {"cpu": 0.8, "cuda": 0.4}  # shares of the matrix-product rate seen in practice


def need(findings: Findings, copies: int, shape: dict, block_tokens: int, lm_tokens: int, itemsize: int, evals: bool,
         device: str) -> dict[str, float]:
    """Bytes by part for `copies` SAEs like the largest one, with gradients and Adam's two moments, stepped one after the other.

    shape: d_model and bytes of the language model; `block_tokens` times layers are kept, `lm_tokens` make one pass of the model, both
    with `itemsize` bytes a number. `training` and `evals` are not needed at the same time: see `peak`.
    """
    row = shape["d_model"] * itemsize
    features = FEATURES * 4 * lm_tokens * findings.parameters // (2 * shape["d_model"])
    return dict(process=PROCESS[device], lm=shape["bytes"], saes=copies * (4 * findings.parameter_bytes + findings.buffer_bytes),
                training=findings.step_peak_bytes + block_tokens * row + lm_tokens * PASS_WIDTHS * row,
                evals=evals * (EVAL_LIBRARIES[device] + LOGITS[device] + features))


def peak(parts: dict[str, float]) -> float:
    """Bytes of the phase that needs most."""
    return parts["process"] + parts["lm"] + parts["saes"] + max(parts["training"], parts["evals"])


def check(findings: Findings, copies: int, parts: dict[str, float], available: float) -> None:
    """MemoryError with the largest tensor and the advice where the peak exceeds what is available, in bytes."""
    message = too_large(findings, int(available - peak(parts) + parts["saes"] / copies + findings.step_peak_bytes))
    if message:
        raise MemoryError(message)


def seconds(flops: float, matmul_rate: float, device: str) -> float:
    """Time for so many floating-point operations on a machine whose matrix products reach `matmul_rate` a second."""
    return flops / matmul_rate / ACHIEVED[device]
