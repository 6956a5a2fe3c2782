"""One optimiser step after the gradients: project the decoder's, clip, Adam, renormalise the decoder's rows.

On a GPU all of this is bound by memory: there one kernel a parameter reads the gradient for its norm, another reads and
writes the parameter, its moments and its gradient once, 28 bytes a parameter and the gradient's own, and 2 more for the
copy that the next loss reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.weak import WeakIdKeyDictionary

from variants.kit import copies, gpu
from variants.kit.decoder import normalise_decoder, project_decoder_gradient

# of Adam, as the kernels do it
PLAIN = dict(weight_decay=0, amsgrad=False, maximize=False, decoupled_weight_decay=False)
_counts = WeakIdKeyDictionary()  # the steps that Adam's tensors count on the device: what each holds, on the host


@torch.no_grad()
def update(sae: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step an SAE by the gradients in .grad; these are clipped and projected afterwards, or (by kernels) as before."""
    kernels = gpu.kernels() if _plain(sae, optimizer) else None
    if kernels:
        _fused(kernels, sae, optimizer)
        return
    if sae.unit_norm_decoder:
        project_decoder_gradient(sae.W_dec)
    if sae.grad_clip:
        clip_grad_norm_(sae.parameters(), sae.grad_clip)
    optimizer.step()
    if sae.unit_norm_decoder:
        normalise_decoder(sae.W_dec)


def _plain(sae: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the kernels do what `optimizer` would: torch's Adam as it comes, begun, on fp32 parameters of one GPU."""
    if type(optimizer) is not torch.optim.Adam:
        return False
    if any(group.get(name, value) != value for group in optimizer.param_groups for name, value in PLAIN.items()):
        return False
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in sae.parameters() if p.requires_grad]
    return given == set(map(id, trained)) and all(_suits(p, optimizer.state[p]) for p in trained)


def _suits(p: Tensor, state: dict) -> bool:
    whole = p.is_cuda and p.is_contiguous() and p.dtype == torch.float32 and not hasattr(p, "full_tensor")
    return whole and p.grad is not None and "exp_avg" in state


def _fused(kernels, sae: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`update` by the kernels."""
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    unit = [sae.unit_norm_decoder and p is sae.W_dec for p, _ in params]
    grads = [p.grad.contiguous() for p, _ in params]
    lengths = [kernels.programs(p, rows) for (p, _), rows in zip(params, unit)]
    along, squares = params[0][0].new_empty(2, sum(lengths)).unbind()
    parts = list(zip(along.split(lengths), squares.split(lengths)))
    factor = squares.new_ones(())
    for (p, _), grad, rows, part in zip(params, grads, unit, parts):
        if rows or sae.grad_clip:
            kernels.sizes(p, grad, rows, *part)
    if sae.grad_clip:  # as clip_grad_norm_ does
        factor = (sae.grad_clip / (squares.sum().sqrt() + 1e-6)).clamp_max(1.0)
    states = [optimizer.state[p] for p, _ in params]
    torch._foreach_add_([state["step"] for state in states], 1)
    copied = copies.allowed(type(sae))
    for (p, group), grad, rows, (along_P, _), state in zip(params, grads, unit, parts, states):
        copy = copies.room(p) if copied and p.dim() == 2 else None
        kernels.step(p, grad, state["exp_avg"], state["exp_avg_sq"], factor, along_P, rows, _counted(state["step"]),
                     group["lr"], group["betas"], group["eps"], copy)
        if copy is not None:
            copies.hold(p, copy)


def _counted(step: Tensor) -> int:
    """Adam's count after this step; the device is asked once, then it is counted here."""
    _counts[step] = _counts[step] + 1 if step in _counts else int(step)
    return _counts[step]
