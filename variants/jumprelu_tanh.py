"""JumpReLU SAE with a tanh penalty (Anthropic, January 2025, "Dictionary Learning Optimization Techniques").

loss = ‖x − x_hat‖² + λ_S·t·Σ_i tanh(c·√D·z_i·‖W_dec,i‖) + (λ_P/√D)·Σ_i ReLU(theta − z_pre)_i·‖W_dec,i‖
z = z_pre·1[z_pre > theta],   z_pre = x·W_enc + b_enc (x not centred),   t = share of the run: λ_S grows all along
Straight-through: dtheta = −(theta/ε)·rect((z_pre − theta)/ε)·dz, and all of the model learns from it, unlike in
jumprelu: dz_pre = (1[z_pre > theta] + (theta/ε)·rect((z_pre − theta)/ε))·dz (SAELens' jumprelu_ste_to_input).
λ_P = 3e-6, c = 4, ε = 2, theta = .1 are the publication's, for E‖x‖² = D. Here E‖x‖² = 1: features, biases, theta and
ε are √D times smaller and the loss D times, which the factors √D make good, in the optimiser too (`parameter_groups`):
each step is theirs in our units. λ_S is that of E‖x‖² = 1, theirs over D:
.001, .0012, .002, .004, .016 end at L0 43, 37, 23, 15, 6 on the embedded profile, .0012 at 66 on tiny; at D = 2304 it
is 2.8.
W_dec uniform in ±1/√D with free norms, W_enc = (D/F)·W_decᵀ, b_enc such that a feature fires on 10,000/F of the first
tokens (at most on half); Adam(.9, .999) at lr 2e-4, clip 1 of their loss, decay over the last fifth.
theta itself is learned, not its logarithm as published: Adam moves a logarithm by a factor of about exp(lr) a step,
which short runs do not get far with (SAELens 6.54 has it so, too). It is kept above a hundredth of where it began:
at 0, where a logarithm never gets, it would have no gradient any more.
"""

import torch
from torch import nn

from variants import base

THETA = 0.1  # at first, for E‖x‖² = D


class JumpReLU(torch.autograd.Function):
    """(z_pre_BF, theta_F, bandwidth) -> z_BF; where z_pre is near theta, both carry the jump's gradient."""

    @staticmethod
    def forward(ctx, z_pre_BF, theta_F, bandwidth):
        ctx.save_for_backward(z_pre_BF, theta_F)
        ctx.bandwidth = bandwidth
        return z_pre_BF * (z_pre_BF > theta_F)

    @staticmethod
    def backward(ctx, grad_z_BF):
        z_pre_BF, theta_F = ctx.saved_tensors
        near_BF = (z_pre_BF - theta_F).abs() < ctx.bandwidth / 2
        jump_BF = theta_F / ctx.bandwidth * near_BF * grad_z_BF
        return grad_z_BF * (z_pre_BF > theta_F) + jump_BF, -jump_BF.sum(0), None


def slowed(parameter, factor):
    """The parameter, with its gradient times a factor."""
    return parameter.detach() + factor * (parameter - parameter.detach())


class SAE(base.SAE):
    """JumpReLU SAE with a tanh penalty. tanh_penalty: its final weight λ_S, for E‖x‖² = 1; as published, for E‖x‖² = D:
    lambda_p: weight of the loss that pulls silent features back; c: slope of tanh; bandwidth: ε."""

    data_parallel = True
    default_lr = 2e-4
    saelens = "jumprelu"
    centred = False  # the encoder takes x, not x − b_dec

    def __init__(self, d_in, d_sae, tanh_penalty=0.0012, lambda_p=3e-6, c=4.0, bandwidth=2.0):
        if not bandwidth > 0:
            raise ValueError(f"--hyper bandwidth = {bandwidth}: the window around theta must be wider than 0\n"
                             "give for example --hyper bandwidth=2")
        super().__init__(d_in, d_sae)
        nn.init.uniform_(self.W_dec, -(d_in**-0.5), d_in**-0.5)
        self.W_enc.data.copy_(d_in / d_sae * self.W_dec.T)
        self.tanh_penalty, self.lambda_p, self.c = tanh_penalty, lambda_p, c
        self.unit = d_in**0.5  # a feature of theirs is `unit` of ours
        self.bandwidth = bandwidth / self.unit
        self.grad_clip = 1 / d_in
        self.theta = nn.Parameter(torch.full((d_sae,), THETA / self.unit))

    def initialise(self, x_ND):
        super().initialise(x_ND)
        share = min(10_000 / self.d_sae, 0.5)
        z_pre_NF = self.pre_activations(x_ND[:2048]).detach().sort(0).values
        self.b_enc.data += self.theta.data - z_pre_NF[round((1 - share) * (len(z_pre_NF) - 1))]

    def pre_activations(self, x):
        return base.affine(x, self.W_enc, self.b_enc, fine=True)

    def encode(self, x):
        z_pre = self.pre_activations(x)
        return z_pre * (z_pre > self.theta)

    def parameter_groups(self, lr):
        """Adam's steps are theirs in our units: lr of what is √D times smaller, ε of gradients D times smaller.

        Theirs of biases and theta are √D times ours (`loss`), so that the norm that is clipped is theirs over D.
        """
        eps = 1e-8 / self.d_in
        return [{"params": [self.W_enc, self.W_dec], "lr": lr, "eps": eps},
                {"params": [self.b_enc, self.b_dec, self.theta], "lr": lr / self.unit, "eps": eps}]

    def loss(self, batch, progress):
        b_enc_F, b_dec_D, theta_F = (slowed(p, 1 / self.unit) for p in (self.b_enc, self.b_dec, self.theta))
        z_pre_BF = base.affine(batch.x, self.W_enc, b_enc_F, fine=True)
        z_BF = JumpReLU.apply(z_pre_BF, theta_F, self.bandwidth)
        self.note_fired(z_BF)
        norm_F = self.W_dec.norm(dim=1)
        reconstruction = base.reconstruction_loss(batch.x - z_BF @ self.W_dec - b_dec_D)
        tanh = torch.tanh(self.c * self.unit * z_BF * norm_F).sum(-1).mean()
        below = ((theta_F - z_pre_BF).relu() * norm_F).sum(-1).mean() / self.unit
        loss = reconstruction + self.tanh_penalty * progress.fraction * tanh + self.lambda_p * below
        return loss, {"reconstruction": reconstruction, "tanh": tanh, "below": below}

    def after_step(self, batch, progress):
        self.theta.clamp_(min=0.01 * THETA / self.unit)
