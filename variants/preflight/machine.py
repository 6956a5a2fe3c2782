"""What the real machine will make of a variant: what fails on a GPU, and the memory of a step at the real sizes."""

from __future__ import annotations

import dataclasses

import torch

from variants import base
from variants.kit.copying import duplicate
from variants.kit.sparse import taken
from variants.preflight import memory
from variants.preflight.memory import Sizes
from variants.preflight.messages import Variant, assigned, at, attempting, defined, where
from variants.preflight.trial import Plan, as_batch, build, pretend_dead, random_state


def accelerator_notes(v: Variant, sae: base.SAE, plan: Plan) -> list[str]:
    """What works on the CPU in fp32 and would fail on a GPU: dtypes under bf16 autocast, tensors made on the CPU."""
    notes = []
    with random_state(plan.seed):
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, _ = duplicate(sae).loss(as_batch(sae, plan.x_BD), plan.points[-1])
            loss.backward()
        except Exception as error:  # noqa: BLE001
            place = where(error, v.file) or at(v, defined(v, "loss"))
            notes.append(f"{place} fails under bf16 autocast, as used on a GPU: {str(error).splitlines()[0][:160]}")
        try:  # the meta device computes shapes only, and like a GPU it is not where torch.zeros(n) is
            batch = as_batch(sae, plan.x_BD)
            duplicate(sae).to("meta").loss(base.Batch(**{k: t.to("meta") for k, t in vars(batch).items()}),
                                           plan.points[-1])
        except Exception as error:  # noqa: BLE001  a condition on a tensor cannot run there and says nothing
            place = where(error, v.file)
            if place and "device" in str(error) and "cpu" in str(error):
                notes.append(f"{place} mixes devices, which fails on a GPU: create tensors with device=x.device, or "
                             "as buffers")
    return notes


def forecast(v: Variant, small: Sizes, real: Sizes, plan: Plan, accelerator: bool) -> memory.Forecast:
    """Memory at the real sizes, for the run's last step, and for its first, of periodic work, if that differs."""
    def traced(sizes: Sizes, progress: base.Progress, device: str = "cpu") -> memory.Trace:
        with torch.device(device):
            sae = build(v, sizes).train()
            x_BD = torch.nn.functional.normalize(torch.randn(sizes.B, sizes.D), dim=1)
            with torch.device("cpu"):
                fields = vars(as_batch(sae, x_BD if device == "cpu" else torch.zeros(sizes.B, sizes.D)))
            batch = base.Batch(**{name: tensor.to(device) for name, tensor in fields.items()})
            with attempting(v, f"in a training step at B = {sizes.B}, d_in = {sizes.D}, d_sae = {sizes.F}", sizes,
                            defined(v, "update" if v.is_trainer else "loss")):
                if device == "cpu":
                    sae.initialise(x_BD)
                pretend_dead(sae)
                return memory.trace_step(v.module.__file__, sae, batch, progress)

    def figures(progress: base.Progress) -> memory.Forecast:
        if real.B * real.F <= 2**24 and real.D * real.F <= 2**24:  # cheap enough to be measured as it is
            return memory.measured(traced(real, progress))
        # shapes can be followed from size to size only along one path: the dense one, which needs more, and is a GPU's
        with taken(sparse=False):
            return memory.forecast(lambda sizes: traced(sizes, progress), small, real)

    first, last = plan.points[0], plan.points[-1]
    done, more = figures(last), []
    if {m[:2] for m in traced(small, first).made} - {m[:2] for m in traced(small, last).made}:
        more.append(figures(first))
    if accelerator and not v.is_trainer:
        try:  # the meta device takes the code paths of a GPU, at the real sizes, and allocates nothing
            more.append(memory.measured(traced(real, last, "meta")))
        except Exception:  # noqa: BLE001  it cannot run a condition on a tensor; the extrapolation can
            pass
    return dataclasses.replace(done, peak_bytes=max(f.peak_bytes for f in [done, *more]),
                               largest=max((f.largest for f in [done, *more]), key=lambda t: t[0]))


def largest_of(v: Variant, figures: memory.Forecast) -> tuple[int, tuple[int, ...], str]:
    """Bytes, shape and "file.py:line" of the largest tensor of a step."""
    n_bytes, shape, line = figures.largest
    if line is None:
        return n_bytes, shape, "the backward pass"
    if isinstance(line, str):  # a buffer's name
        line = assigned(v, line)
    return n_bytes, shape, at(v, line)


def waiting_notes(v: Variant, figures: memory.Forecast) -> list[str]:
    """The lines at which every step waits for a GPU."""
    if not figures.waits:
        return []
    first, *others = sorted(figures.waits)
    lines = ", ".join([at(v, first), *map(str, others)])
    wait = "wait" if others else "waits"
    return [f"{lines} {wait} for the GPU in every step (.item(), float(), a condition on a tensor, or a mask as an "
            "index)"]
