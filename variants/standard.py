"""Standard ReLU SAE with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity").

loss = ‖x − x_hat‖² + λ·sp(t)·Σ_i z_i,   z = ReLU((x − b_dec)·W_enc + b_enc),   x_hat = z·W_dec + b_dec
Decoder rows start at norm .1 with W_enc = W_decᵀ, and are kept at unit norm; Adam(.9, .999), no gradient clipping.
"""

from torch.nn import functional as F

from variants import base


class SAE(base.SAE):
    """Vanilla L1 SAE. l1_penalty: λ, for activations with E‖x‖² = 1."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    saelens = "standard"

    def __init__(self, d_in, d_sae, l1_penalty=0.1):
        super().__init__(d_in, d_sae, decoder_norm=0.1)
        self.l1_penalty = l1_penalty

    def loss(self, batch, progress):
        z_BF = F.relu(self.pre_activations(batch.x))
        self.note_fired(z_BF)
        reconstruction = base.reconstruction_loss(batch.x - self.decode_relu(z_BF))
        l1 = z_BF.float().sum(-1).mean()
        loss = reconstruction + self.l1_penalty * progress.sparsity_warmup() * l1
        return loss, {"reconstruction": reconstruction, "l1": l1}
