"""Whether a run fits the machine: memory by part and training time, before a weight is read."""

from __future__ import annotations

from variants.preflight.check import Findings, too_large

PROCESS = {"cpu": 1.2e9, "cuda": 0.5e9}  # Python, libraries, texts; on a GPU what CUDA keeps
ACHIEVED = {"cpu": 0.8, "cuda": 0.4}  # shares of the matrix-product rate seen in practice


def need(findings: Findings, copies: int, lm_bytes: float, block_bytes: float, device: str) -> dict[str, float]:
    """Bytes by part: `copies` SAEs like the largest one with gradients and Adam's two moments, one step at a time."""
    return dict(process=PROCESS[device], lm=lm_bytes, saes=copies * (4 * findings.parameter_bytes + findings.buffer_bytes),
                step=findings.step_peak_bytes,
                buffer=block_bytes * (2 if device == "cpu" else 1))  # in host memory also on its way to the cache


def check(findings: Findings, copies: int, parts: dict[str, float], available: float) -> None:
    """MemoryError with the largest tensor and the advice where `parts` exceed what is available, in bytes."""
    message = too_large(findings, int(available - sum(parts.values()) + parts["saes"] / copies + parts["step"]))
    if message:
        raise MemoryError(message)


def seconds(flops: float, matmul_rate: float, device: str) -> float:
    """Time for so many floating-point operations on a machine whose matrix products reach `matmul_rate` a second."""
    return flops / matmul_rate / ACHIEVED[device]
