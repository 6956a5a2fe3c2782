"""JumpReLU SAE (Rajamanoharan et al. 2024, "Jumping Ahead"), with a quadratic penalty towards a target L0.

loss = ‖x − x_hat‖² + sp(t)·(L0/target_l0 − 1)²,   z = z_pre·1[z_pre > theta],   z_pre = x·W_enc + b_enc (x not centred)
L0 is the mean over the batch, as in dictionary_learning: a token may have more or fewer features. Taken of each token,
the term would be larger by Var(L0)/target_l0².
Straight-through: r = rect((z_pre − theta)/ε), ε = bandwidth: dtheta = −(theta/ε)·r·dz from z, −(1/ε)·r from L0.
Kaiming-uniform decoder scaled to unit rows, W_enc tied, theta = .001; Adam(0, .999); each step: project the decoder's
gradient, clip to norm 1, step, renormalise.
The paper has nothing for dead features; with auxk_alpha > 0 they reconstruct the residual by their activations before
the threshold (Gao et al. 2024, as in topk).
Adam moves theta by about lr a step, so lr × steps must exceed its way several times: at D = 576 and F = 2304, 156 steps
end within 3 % of L0 16, 32, 64 at lr 3e-3, at 3e-4 far above it.
"""

import torch
from torch import nn
from torch.nn import functional as F

from variants import base
from variants.kit import ranks


class JumpReLU(torch.autograd.Function):
    """(z_pre_BF, theta_F, bandwidth) -> z_BF and the number of active features l0_B; both carry theta's gradient."""

    @staticmethod
    def forward(ctx, z_pre_BF, theta_F, bandwidth):
        ctx.save_for_backward(z_pre_BF, theta_F)
        ctx.bandwidth = bandwidth
        active_BF = z_pre_BF > theta_F
        return z_pre_BF * active_BF, active_BF.sum(-1).to(z_pre_BF.dtype)

    @staticmethod
    def backward(ctx, grad_z_BF, grad_l0_B):
        z_pre_BF, theta_F = ctx.saved_tensors
        near_BF = (z_pre_BF - theta_F).abs() < ctx.bandwidth / 2
        d_theta_F = -((theta_F * grad_z_BF + grad_l0_B[:, None]) * near_BF).sum(0) / ctx.bandwidth
        return grad_z_BF * (z_pre_BF > theta_F), d_theta_F, None


class SAE(base.SAE):
    """JumpReLU SAE. target_l0: mean of features active per token; bandwidth: ε, where theta feels a gradient.

    auxk_alpha: weight of the loss that revives dead features, 0: none; topk has 1/32.
    """

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    grad_clip = 1.0
    adam_betas = (0.0, 0.999)
    saelens = "jumprelu"
    centred = False  # the encoder takes x, not x − b_dec

    def __init__(self, d_in, d_sae, target_l0=32, bandwidth=0.001, auxk_alpha=0.0):
        target_l0 = base.feature_count("target_l0", target_l0, d_sae, mean=True)
        if not bandwidth > 0:
            raise ValueError(f"--hyper bandwidth = {bandwidth}: the window around theta must be wider than 0\n"
                             "give for example --hyper bandwidth=0.001")
        super().__init__(d_in, d_sae)
        nn.init.kaiming_uniform_(self.W_dec)
        base.normalise_decoder(self.W_dec)
        self.W_enc.data.copy_(self.W_dec.T)
        self.target_l0, self.bandwidth, self.auxk_alpha = target_l0, bandwidth, auxk_alpha
        self.theta = nn.Parameter(torch.full((d_sae,), 0.001))

    def pre_activations(self, x):
        return base.affine(x, self.W_enc, self.b_enc, fine=True)  # the window is .001 wide

    def encode(self, x):
        z_pre = self.pre_activations(x)
        return z_pre * (z_pre > self.theta)

    def loss(self, batch, progress):
        z_pre_BF = self.pre_activations(batch.x)
        z_BF, l0_B = JumpReLU.apply(z_pre_BF, self.theta, self.bandwidth)
        self.note_fired(z_BF)
        e_BD = batch.x - self.decode(z_BF)
        reconstruction = base.reconstruction_loss(e_BD)
        sparsity = (ranks.mean(l0_B.mean()) / self.target_l0 - 1) ** 2
        loss = reconstruction + progress.sparsity_warmup() * sparsity
        terms = {"reconstruction": reconstruction, "sparsity": sparsity}
        if self.auxk_alpha:
            terms["auxk"] = base.auxk_loss(self, batch.x, e_BD, F.relu(z_pre_BF), self.dead_features(progress))
            loss = loss + self.auxk_alpha * terms["auxk"]
        return loss, terms

    def after_step(self, batch, progress):
        self.theta.clamp_(min=0)  # below 0 negative activations would pass
