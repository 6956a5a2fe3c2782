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

from variants.kit import compiled, copies, gpu
from variants.kit.decoder import normalise_decoder, project_decoder_gradient

# of Adam, as the kernels do it
PLAIN = dict(weight_decay=0, amsgrad=False, maximize=False, decoupled_weight_decay=False)
LARGE = 2**20  # elements of a parameter that gets launches of its own
_counts = WeakIdKeyDictionary()  # the steps that Adam's tensors count on the device: what each holds, on the host


@torch.no_grad()
def update(sae: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step an SAE by the gradients in .grad; these are clipped and projected afterwards, or (by kernels) as before."""
    kernels = gpu.kernels() if _plain(sae, optimizer) else None
    if kernels:
        _fused(kernels, sae, optimizer)
        return
    for state in filter(None, optimizer.state.values()):  # torch counts on, unheard
        _counts.pop(state["step"], None)
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
    if sae.unit_norm_decoder and not any(p is sae.W_dec for p in trained):  # held as it is, or another's transposed
        return False
    return given == set(map(id, trained)) and all(_suits(p, optimizer.state.get(p, {})) for p in trained)


def _suits(p: Tensor, state: dict) -> bool:
    whole = p.is_cuda and p.is_contiguous() and p.dtype == torch.float32 and not hasattr(p, "full_tensor")
    return whole and p.grad is not None and "exp_avg" in state


def _fused(kernels, sae: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`update` by the kernels, the small parameters of each group together by torch's own."""
    unit = sae.W_dec if sae.unit_norm_decoder else None
    steps = [state["step"] for state in optimizer.state.values()]
    along_F, scale = _sizes(kernels, sae, unit)
    torch._foreach_add_(steps, 1)
    copied = copies.allowed(type(sae)) and not compiled.is_compiled(sae)
    for group in optimizer.param_groups:
        small = [p for p in group["params"] if p.numel() < LARGE and p is not unit]
        if small:
            _small(small, [optimizer.state[p] for p in small], group, scale)
        for p in group["params"]:
            if p.numel() < LARGE and p is not unit:
                continue
            state, copy = optimizer.state[p], None
            if copied and p.dim() == 2:
                copy = copies.room(p)
            kernels.step(p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], scale, along_F, p is unit,
                         _counted(state["step"]), group["lr"], group["betas"], group["eps"], copy)
            if copy is not None:
                copies.hold(p, copy)


def _sizes(kernels, sae: nn.Module, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    """(each unit row's share in its gradient [F], what clipping divides all gradients by ()), in few launches."""
    norms = []
    along_F = scale = next(sae.parameters()).new_ones(())
    if unit is not None:
        along_F, square_F = unit.new_empty(2, len(unit)).unbind()
        kernels.sizes(unit, unit.grad.contiguous(), along_F, square_F)
        norms = [square_F.sum().sqrt()]
    if sae.grad_clip:  # as clip_grad_norm_ does
        norms += torch._foreach_norm([p.grad for p in sae.parameters() if p.requires_grad and p is not unit])
        scale = ((torch.linalg.vector_norm(torch.stack(norms)) + 1e-6) / sae.grad_clip).clamp_min(1.0)
    return along_F, scale


def _small(params: list[Tensor], states: list[dict], group: dict, scale: Tensor) -> None:
    """Adam's step of parameters whose launches take longer than their work."""
    beta1, beta2 = group["betas"]
    lists = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._fused_adam_(params, [p.grad for p in params], *lists, [], [state["step"] for state in states],
                       amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"],
                       maximize=False, grad_scale=scale, found_inf=None)


def _counted(step: Tensor) -> int:
    """Adam's count after this step; the device is asked once, then it is counted here."""
    _counts[step] = _counts[step] + 1 if step in _counts else int(step)
    return _counts[step]
