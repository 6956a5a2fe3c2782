"""Attention-guided contrastive SAE: tokens that attend to each other share features (our design, on `standard`).

loss = ‖x − x_hat‖² + λ1·sp(t)·Σ_f z_f + λc·mean_i Lc_i,   z, x_hat and the recipe as in `standard`
Lc_i = −log[ Σ_{j∈P(i)} s_ij·exp(cos(z_i,z_j)/τc) / Σ_{k≠i} exp(cos(z_i,z_k)/τc) ],   i, k: all tokens of the batch
s_ij = Σ_k w_k·α_ij^k, the attention that query i pays to key j in layer k (mean over heads), w = softmax of learned
logits; P(i) = {j ≠ i, same context, not BOS | s_ij > τ}.
Attention is taken as it is, not symmetrised: j comes before i. A token without positives counts as 0 in the mean. The
set P itself passes no gradient; w learns through s_ij in the numerator.
Defaults of our own: τ = .05, λc = .03: .1 costs .03 of R² and fires 40 % more features (D = 576, F = 2304, 156 steps).
Adam moves the logits by about logit_lr·lr a step: with lr × steps = .5, as in short runs, w gets only so far from 1/4.
"""

import torch
from torch import nn
from torch.nn import functional as F

from variants import base

NEVER = -1e4  # a logit: its exponential is 0 beside any cosine's; finite, so that rows of nothing else give no NaN


class Gram(torch.autograd.Function):
    """z_BF·z_BFᵀ, whose gradient (G + Gᵀ)·z is one product instead of autograd's two."""

    @staticmethod
    def forward(ctx, z_BF):
        ctx.save_for_backward(z_BF)
        return z_BF @ z_BF.T

    @staticmethod
    def backward(ctx, grad_BB):
        (z_BF,) = ctx.saved_tensors
        return (grad_BB + grad_BB.T).to(z_BF.dtype) @ z_BF


class SAE(base.SAE):
    """L1 SAE with an attention-guided contrastive term; `attention_layers` are relative to the SAE's own.

    tau: least attention of a positive pair; lambda_c: weight of the term; tau_c: its temperature; l1_penalty: λ1, for
    E‖x‖² = 1; logit_lr: the layers' logits' learning rate, as a multiple of the others'.
    """

    unit_norm_decoder = True
    saelens = "standard"
    attention_layers = (-2, -1, 0, 1)

    def __init__(self, d_in, d_sae, attention_layers=attention_layers, tau=0.05, lambda_c=0.03, tau_c=0.1,
                 l1_penalty=0.1, logit_lr=1.0):
        attention_layers = (attention_layers,) if isinstance(attention_layers, int) else attention_layers
        if not attention_layers or not tau_c > 0:
            raise ValueError(f"attention_contrastive: attention_layers = {attention_layers} must name a layer, tau_c = "
                             f"{tau_c} be above 0\n"
                             "without the contrastive term: --hyper lambda_c=0")
        super().__init__(d_in, d_sae, decoder_norm=0.1)
        self.attention_layers = tuple(attention_layers)
        self.attention_threshold = tau  # s ≤ the largest of a pair's α: no pair is missed
        self.tau, self.lambda_c, self.tau_c, self.l1_penalty, self.logit_lr = tau, lambda_c, tau_c, l1_penalty, logit_lr
        logit_A = torch.zeros(len(self.attention_layers))
        if len(logit_A) > 1:
            self.layer_logit = nn.Parameter(logit_A)
        else:  # its weight is 1 whatever the logit
            self.register_buffer("layer_logit", logit_A)

    def parameter_groups(self, lr):
        groups = super().parameter_groups(lr)
        if self.layer_logit.requires_grad:
            groups[0]["params"] = [p for p in groups[0]["params"] if p is not self.layer_logit]
            groups.append({"params": [self.layer_logit], "lr": self.logit_lr * lr})
        return groups

    def loss(self, batch, progress):
        z_BF = F.relu(self.pre_activations(batch.x))
        self.note_fired(z_BF)
        reconstruction = base.reconstruction_loss(batch.x - self.decode_relu(z_BF))
        l1 = z_BF.float().sum(-1).mean()
        contrastive = self.contrastive(z_BF, batch.pairs, self.strength(batch.pair_attention)).mean()
        loss = reconstruction + self.l1_penalty * progress.sparsity_warmup() * l1 + self.lambda_c * contrastive
        return loss, {"reconstruction": reconstruction, "l1": l1, "contrastive": contrastive}

    def strength(self, attention_PA):
        """s [P] of pairs, in the attention's precision also under autocast."""
        return (attention_PA * self.layer_logit.softmax(0)).sum(-1)

    def contrastive(self, z_BF, pairs_2P, s_P):
        """Lc [B] of tokens with features z among (query, key) candidates of strength s; 0 for one without positives."""
        norm_B = torch.linalg.vector_norm(z_BF, dim=-1, dtype=torch.promote_types(z_BF.dtype, torch.float32))
        scale_B = (norm_B > 0) / norm_B.clamp_min(1e-12)  # a token without features is orthogonal to all others
        gram_BB = base.relu_product(z_BF, z_BF.T.contiguous()) if base.few_positive(z_BF) else Gram.apply(z_BF)
        logit_BB = gram_BB * (scale_B[:, None] * scale_B / self.tau_c)
        logit_BB.fill_diagonal_(NEVER)
        positive_P = s_P > self.tau
        log_s_P = torch.where(positive_P, s_P, 1.0).log().masked_fill(~positive_P, NEVER)
        log_s_BB = torch.full_like(logit_BB, NEVER).index_put(tuple(pairs_2P), log_s_P.to(logit_BB.dtype))
        Lc_B = logit_BB.logsumexp(1) - (logit_BB + log_s_BB).logsumexp(1)
        return torch.where(log_s_BB.amax(1) > NEVER, Lc_B, 0.0)

    def report(self, context):
        from variants.research import attention_contrastive_report

        return attention_contrastive_report.report(self, context)
