"""Standard ReLU SAE with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity").

loss = ‖x − x_hat‖² + λ·sp(t)·Σ_i z_i,   z = ReLU((x − b_dec)·W_enc + b_enc),   x_hat = z·W_dec + b_dec
Decoder rows start at norm .1 with W_enc = W_decᵀ, and are kept at unit norm; Adam(.9, .999), no gradient clipping.
Theirs resampled dead features after 25,000, 50,000, 75,000 and 100,000 steps; here only where resample_steps asks for
it, as in dictionary_learning.
"""

from torch.nn import functional as F

from variants import base
from variants.kit import revival


class SAE(base.SAE):
    """Vanilla L1 SAE. l1_penalty: λ, for activations with E‖x‖² = 1.

    resample_steps: steps between two resamplings of dead features (kit/revival.py), 0: none.
    """

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    saelens = "standard"

    def __init__(self, d_in, d_sae, l1_penalty=0.1, resample_steps=0):
        super().__init__(d_in, d_sae, decoder_norm=0.1)
        self.l1_penalty, self.resample_steps = l1_penalty, revival.steps_between(resample_steps)

    def loss(self, batch, progress):
        z_BF = F.relu(self.pre_activations(batch.x))
        self.note_fired(z_BF)
        reconstruction = base.reconstruction_loss(batch.x - self.decode_relu(z_BF))
        l1 = z_BF.float().sum(-1).mean()
        loss = reconstruction + self.l1_penalty * progress.sparsity_warmup() * l1
        return loss, {"reconstruction": reconstruction, "l1": l1}

    def revive(self, optimizer, batch, progress):
        revival.resample(self, optimizer, batch, progress, self.resample_steps)
