"""A way back for dead features: neuron resampling (Bricken et al. 2023, "Towards Monosemanticity", appendix).

Now and then a feature that has been silent for long begins anew at a token that is badly reconstructed.
As there: silent for half of the time between two looks; tokens drawn with probability ‖e‖⁴, the square of their loss;
the decoder row is the token's direction, the encoder column the same with .2 of the living ones' mean norm, Adam's
moments of all these are 0, and the bias is such that the mean token gives 0.
Otherwise than there: tokens are those of one batch (as in dictionary_learning; theirs were 819,200), so that no more
features than it has tokens begin anew at a time; their mean is taken off, and the bias is 0 only where b_dec is that
mean. Theirs began at the median; from x itself, with a bias of 0, hundreds of features would all be the mean.

Shapes: as in variants/base.py; n features that begin anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variants.kit import ranks

BIASES = ("b_enc", "b_gate", "b_mag")  # of a feature
MOMENTS = ("exp_avg", "exp_avg_sq")


def steps_between(value) -> int:
    """A hyper-parameter resample_steps: a whole number of steps, 0 for never; else ValueError."""
    if type(value) not in (int, float) or value < 0 or value != int(value):
        raise ValueError(f"--hyper resample_steps = {value!r}: steps between two resamplings must be a whole number\n"
                         "give for example --hyper resample_steps=25000, at most a fifth of the run, or 0 for none")
    return int(value)


def due(progress, every: int) -> int:
    """Steps between two looks, if one is due after this step, else 0.

    `every` steps, at most a fifth of the run, and never in its last fifth, which is left to learn in: so four times, as
    in the paper, in a run of any length up to five times `every`.
    """
    every, done = min(every, progress.total_steps // 5), progress.step + 1
    wanted = every > 0 and done % every == 0 and 5 * done <= 4 * progress.total_steps
    return every if wanted else 0


@torch.no_grad()
def resample(sae: nn.Module, optimizer: torch.optim.Optimizer, batch, progress, every: int) -> None:
    """Let dead features begin anew, where that is due (`due`); 0: never. It waits for the device then, and else not.

    `batch`: base.Batch; on several ranks each one's share of it. Of ranks that train together all do the same.
    ValueError for an SAE that is spread over ranks.
    """
    every = due(progress, every)
    if not every:
        return
    if ranks.is_sharded(sae):
        raise ValueError("resample_steps: features of an SAE that is spread over ranks cannot begin anew\n"
                         "leave out --shard, or resample_steps")
    dead_F = sae.tokens_since_fired >= every // 2 * (progress.total_tokens // progress.total_steps)
    loss_B = torch.cat([_loss(sae, x_BD) for x_BD in batch.x.chunk(sae.batch_parts)])
    x_BD = batch.x
    if ranks.sharing() > 1:
        x_BD, loss_B = ranks.gathered(x_BD), ranks.gathered(loss_B)
    index_n = dead_F.nonzero().squeeze(1)[:len(x_BD)]
    if len(index_n):
        token_n = drawn(loss_B, len(index_n), progress.step).to(x_BD.device)
        begin_anew(sae, optimizer, index_n, x_BD[token_n], x_BD.mean(0), ~dead_F)


def _loss(sae: nn.Module, x_BD: Tensor) -> Tensor:
    return (x_BD - sae.decode(sae.encode(x_BD))).pow(2).sum(-1)


def drawn(loss_B: Tensor, n: int, seed: int) -> Tensor:
    """n different tokens, on the host, with probabilities as the squares of their losses."""
    weight_B = loss_B.double().cpu().pow(2)
    weight_B = (weight_B / weight_B.max().clamp_min(1e-300)).clamp_min(1e-12)  # each can be drawn
    return torch.multinomial(weight_B, n, generator=torch.Generator().manual_seed(seed))


def begin_anew(sae: nn.Module, optimizer: torch.optim.Optimizer, index_n: Tensor, x_nD: Tensor, mean_D: Tensor,
               living_F: Tensor) -> None:
    """Weights of the features index_n from the tokens x_nD around mean_D; Adam's moments of these weights become 0."""
    norm_F = sae.W_enc.norm(dim=0)
    if living_F.any():
        norm_F = norm_F[living_F]
    row_nD = F.normalize(x_nD - mean_D, dim=1)
    column_nD = 0.2 * norm_F.mean() * row_nD
    made = {sae.W_dec: (0, row_nD), sae.W_enc: (1, column_nD.T)}
    made |= {getattr(sae, name): (0, column_nD @ (sae.b_dec - mean_D)) for name in BIASES if hasattr(sae, name)}
    if hasattr(sae, "r_mag"):
        made[sae.r_mag] = (0, torch.zeros_like(norm_F[:1]).expand(len(index_n)))
    for parameter, (axis, new) in made.items():
        parameter.index_copy_(axis, index_n, new.to(parameter.dtype))
        state = optimizer.state.get(parameter, {})
        for name in MOMENTS:
            if name in state:
                state[name].index_fill_(axis, index_n, 0.0)
