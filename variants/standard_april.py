"""ReLU SAE with the L1 penalty weighted by decoder norms (Anthropic, April 2024, "Update on how we train SAEs").

loss = ‖x − x_hat‖² + λ·sp(t)·Σ_i z_i·‖W_dec,i‖,   z = ReLU((x − b_dec)·W_enc + b_enc),   x_hat = z·W_dec + b_dec
Decoder rows start at norm .1 with W_enc = W_decᵀ, and their norm is free; Adam(.9, .999), gradient clipped to norm 1.
"""

from torch.nn import functional as F

from variants import base


class SAE(base.SAE):
    """L1 SAE with free decoder norms. l1_penalty: λ, for activations with E‖x‖² = 1."""

    grad_clip = 1.0
    data_parallel = True
    compiled_loss = True
    saelens = "standard"

    def __init__(self, d_in, d_sae, l1_penalty=0.25):
        super().__init__(d_in, d_sae, decoder_norm=0.1)
        self.l1_penalty = l1_penalty

    def loss(self, batch, progress):
        z_BF = F.relu(self.pre_activations(batch.x))
        self.note_fired(z_BF)
        reconstruction = base.reconstruction_loss(batch.x - self.decode_relu(z_BF))
        # unweighted, the penalty would be escaped by small features with long decoder rows
        l1 = (z_BF.float().mean(0) * self.W_dec.norm(dim=1)).sum()
        loss = reconstruction + self.l1_penalty * progress.sparsity_warmup() * l1
        return loss, {"reconstruction": reconstruction, "l1": l1}
