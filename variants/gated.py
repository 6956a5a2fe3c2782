"""Gated SAE (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders").

loss = ‖x − x_hat‖² + λ·sp(t)·Σ_i ReLU(a + b_gate)_i + ‖x − ReLU(a + b_gate)·sg(W_dec) − sg(b_dec)‖²,   sg: no gradient
a = (x − b_dec)·W_enc,   z = 1[a + b_gate > 0]·ReLU(exp(r_mag)·a + b_mag),   x_hat = z·W_dec + b_dec
Unit decoder rows, W_enc = W_decᵀ, r_mag = b_gate = b_mag = 0; Adam(0, .999), rows kept at unit norm, no clipping.
Dead features are resampled (Bricken et al. 2023) where resample_steps asks for it, as in dictionary_learning.
"""

import torch
from torch import nn
from torch.nn import functional as F

from variants import base
from variants.kit import revival


class SAE(base.SAE):
    """Gated SAE: one encoder decides what fires and, rescaled, how much. l1_penalty: λ, for E‖x‖² = 1.

    resample_steps: steps between two resamplings of dead features (kit/revival.py), 0: none.
    """

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    adam_betas = (0.0, 0.999)
    saelens = "gated"

    def __init__(self, d_in, d_sae, l1_penalty=0.15, resample_steps=0):
        super().__init__(d_in, d_sae)
        self.l1_penalty, self.resample_steps = l1_penalty, revival.steps_between(resample_steps)
        del self.b_enc
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def gate_and_magnitude(self, x):
        """Pre-activations (..., F) of both paths; the gate's step passes no gradient: only l1 and aux train b_gate."""
        a = base.affine(x, self.W_enc, centre_D=self.b_dec)
        return a + self.b_gate, self.r_mag.exp() * a + self.b_mag

    def encode(self, x):
        gate, magnitude = self.gate_and_magnitude(x)
        return (gate > 0) * F.relu(magnitude)

    def loss(self, batch, progress):
        gate_BF, magnitude_BF = self.gate_and_magnitude(batch.x)
        z_BF, on_BF = (gate_BF > 0) * F.relu(magnitude_BF), F.relu(gate_BF)
        self.note_fired(z_BF)
        reconstruction = base.reconstruction_loss(batch.x - self.decode_relu(z_BF))
        l1 = on_BF.float().sum(-1).mean()
        aux = base.reconstruction_loss(batch.x - on_BF @ self.W_dec.detach() - self.b_dec.detach())
        loss = reconstruction + self.l1_penalty * progress.sparsity_warmup() * l1 + aux
        return loss, {"reconstruction": reconstruction, "l1": l1, "aux": aux}

    def revive(self, optimizer, batch, progress):
        revival.resample(self, optimizer, batch, progress, self.resample_steps)
