"""ReLU SAE with an annealed Lp penalty (Karvonen et al. 2024, "Measuring Progress in Dictionary Learning …").

loss = ‖x − x_hat‖² + α·sp(t)·Σ_i z_i^p,   z = ReLU((x − b_dec)·W_enc + b_enc),   x_hat = z·W_dec + b_dec
p is 1 up to `anneal_start` (half of the run, where theirs had 10 000 steps) and then goes to .2 in 10 equal moves,
evenly spread from there to the end.
α is λ at first; at each move of p it is rescaled so that the batch mean of α·Σ z^p stays what it was.
z^p is taken as (z + ε)^p where z > 0, ε = 1e-6: at p = .2 the slope at 0 is 12,600 and not infinite, and lower than
z^p's by .8 % at z = 1e-4 (one active feature of 400 lies below) and by 43 % at 1e-6; a feature's gradient by .2 % in
the median, where ε = 1e-4 took 12 %.
Initialisation and optimiser of `standard`: rows of norm .1, W_enc = W_decᵀ, unit rows; Adam(.9, .999), no clipping.
"""

import torch
from torch.nn import functional as F

from variants import base
from variants.kit import ranks

MOVES = 10
EPSILON = 1e-6  # see above


class SAE(base.SAE):
    """p-annealing SAE. l1_penalty: α while p = 1, for E‖x‖² = 1; anneal_start: share of the run before p moves."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    saelens = "standard"

    def __init__(self, d_in, d_sae, l1_penalty=0.06, p_end=0.2, anneal_start=0.5):
        if not (0 < p_end <= 1 and 0 <= anneal_start < 1):
            raise ValueError(f"p_anneal: p_end = {p_end} must lie in (0, 1], anneal_start = {anneal_start} in [0, 1)\n"
                             "change --hyper p_end=…,anneal_start=…")
        super().__init__(d_in, d_sae, decoder_norm=0.1)
        self.p_end, self.anneal_start = p_end, anneal_start
        self.register_buffer("p", torch.tensor(1.0))
        self.register_buffer("alpha", torch.tensor(float(l1_penalty)))
        self._p = 1.0  # p as a Python number: reading the buffer in each step would wait for the device

    def p_at(self, step, total_steps):
        """p of a step: 1 before the start, p_end by the last step even where fewer than 10 are left for the moves."""
        start = int(self.anneal_start * total_steps)
        moves = max(0, -(-MOVES * (step + 1 - start) // (total_steps - start)))  # rounded up
        return 1 - (1 - self.p_end) * moves / MOVES

    def power_sum(self, z_BF, p):
        """Batch mean of Σ_i z_i^p."""
        z_BF = z_BF.float()
        return ((z_BF + EPSILON).pow(p) * (z_BF > 0)).sum(-1).mean()

    def loss(self, batch, progress):
        z_BF = F.relu(self.pre_activations(batch.x))
        self.note_fired(z_BF)
        reconstruction = base.reconstruction_loss(batch.x - self.decode_relu(z_BF))
        lp = self.power_sum(z_BF, self.p)
        loss = reconstruction + self.alpha * progress.sparsity_warmup() * lp
        return loss, {"reconstruction": reconstruction, "lp": lp}

    def after_step(self, batch, progress):
        p = self.p_at(min(progress.step + 1, progress.total_steps - 1), progress.total_steps)
        if p != self._p:  # after a resume also where p does not change: α is then multiplied by exactly 1
            z_BF, self._p = self.encode(batch.x), p
            new = torch.full_like(self.p, p)
            old_sum, new_sum = (ranks.mean(self.power_sum(z_BF, p)).clamp_min(1e-12) for p in (self.p, new))
            self.alpha *= old_sum / new_sum
            self.p.copy_(new)
