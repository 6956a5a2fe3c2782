"""JumpReLU SAE with a tanh penalty (Anthropic, January 2025, "Dictionary Learning Optimization Techniques").

loss = ‖x − x_hat‖² + λ_S·t·Σ_i tanh(c·√D·z_i·‖W_dec,i‖) + (λ_P/√D)·Σ_i ReLU(theta − z_pre)_i·‖W_dec,i‖
z = z_pre·1[z_pre > theta],   z_pre = x·W_enc + b_enc (x not centred),   t = share of the run: λ_S grows all along
Straight-through: dtheta = −(theta/ε)·rect((z_pre − theta)/ε)·dz; z_pre's gradient is that of the active side.
λ_P = 3e-6, c = 4, ε = 2, theta = .1 are the publication's, for E‖x‖² = D. Here E‖x‖² = 1: features, biases, theta and
ε are √D times smaller and the loss D times, which the factors √D make good. λ_S is that of E‖x‖² = 1, theirs over D:
.001, .002, .004, .016 end at L0 88, 38, 18, 4 on the embedded profile, .002 at 39 on tiny; at D = 2304 it is 4.6.
W_dec uniform in ±1/√D with free norms, W_enc = (D/F)·W_decᵀ, b_enc such that a feature fires on 10,000/F of the first
tokens (at most on half); Adam(.9, .999) at lr 2e-4, clip 1 of their loss, decay over the last fifth.
theta itself is learned, not its logarithm as published: Adam moves a logarithm by a factor of about exp(lr) a step,
which short runs do not get far with (SAELens 6.54 has it so, too).
"""

import torch
from torch import nn

from variants import base, jumprelu


class SAE(base.SAE):
    """JumpReLU SAE with a tanh penalty. tanh_penalty: its final weight λ_S, for E‖x‖² = 1; as published, for E‖x‖² = D:
    lambda_p: weight of the loss that pulls silent features back; c: slope of tanh; bandwidth: ε."""

    data_parallel = True
    default_lr = 2e-4
    saelens = "jumprelu"
    centred = False  # the encoder takes x, not x − b_dec

    def __init__(self, d_in, d_sae, tanh_penalty=0.002, lambda_p=3e-6, c=4.0, bandwidth=2.0):
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
        self.theta = nn.Parameter(torch.full((d_sae,), 0.1 / self.unit))

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

    def loss(self, batch, progress):
        z_pre_BF = self.pre_activations(batch.x)
        z_BF, _ = jumprelu.JumpReLU.apply(z_pre_BF, self.theta, self.bandwidth)
        self.note_fired(z_BF)
        norm_F = self.W_dec.norm(dim=1)
        reconstruction = base.reconstruction_loss(batch.x - self.decode(z_BF))
        tanh = torch.tanh(self.c * self.unit * z_BF * norm_F).sum(-1).mean()
        below = ((self.theta - z_pre_BF).relu() * norm_F).sum(-1).mean() / self.unit
        loss = reconstruction + self.tanh_penalty * progress.fraction * tanh + self.lambda_p * below
        return loss, {"reconstruction": reconstruction, "tanh": tanh, "below": below}

    def after_step(self, batch, progress):
        self.theta.clamp_(min=0)  # below 0 negative activations would pass
