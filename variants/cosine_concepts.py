"""Precision-tuned hierarchical sparsity: a ReLU layer and a small layer of concepts over its features (our design).

loss = ‖x − x_hat‖² + sp(t)·(λ_1·Σz1 + λ_2·Σz2) + .02·mean|W_enc| + λ_w2(t)·mean|W_concept|
z1 = ReLU((x − b_dec)·W_enc + b_enc),   z2 = the k largest of ReLU((z1 − m)·W_conceptᵀ + b_concept),   z = [z1, z2]
x_hat = z1·W_dec + z2·W_dec2 + b_dec; d_sae counts both layers, the base layer has round(0.8·d_sae) features.
λ_w2(t) = .001 + (w2_peak − .001)·(1 − cos(π·min(t, T)/T))/2, T = 5000 steps, or the whole run where it is shorter.
Recipe: AdamW (weight decay .01), lr 3e-4, batch 2048, context 128.
Ours: decoder rows of unit norm, without which the penalties on z can be evaded; they start as W_encᵀ (Xavier normal)
and W_concept·W_dec, normalised; b_dec starts at the mean of x; m, the running mean of z1, is taken off as b_dec is from
x: z1 ≥ 0, so that without it a step on W_concept moves a concept on all tokens at once.
Presets: `precise` and `previous` are the two that the source compares. Their λ_2 = .35 and narrow W_concept leave a
concept layer without a firing feature where E‖x‖² = 1 (D = 576, F = 2304, 150 steps at lr 3e-3), so the default is
`alive`.

Shapes: C = base features, P = concepts, K = concepts kept or considered per token; the others as in base.py.
"""

import inspect
import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from variants import base

PRESETS = {  # k below 1 is a share of the concepts
    "alive": dict(k=10, concept_std=0.05, w2_peak=0.12, l1_concept=0.02),
    "precise": dict(k=10, concept_std=0.001, w2_peak=0.12, l1_concept=0.35),
    "previous": dict(k=0.05, concept_std=0.02, w2_peak=0.4, l1_concept=0.35),
}


class SAE(base.SAE):
    """Base features and concepts. preset gives what is None of k (concepts kept per token), concept_std (of W_concept's
    initial values), w2_peak and l1_concept (λ_2); l1_base: λ_1; adaptive_topk: of the 2k largest concepts those that
    reach their mean; restarts: of the cosine learning rate, 0 for none."""

    unit_norm_decoder = True

    def __init__(self, d_in, d_sae, preset="alive", k=None, concept_std=None, w2_peak=None, l1_concept=None,
                 l1_base=0.1, w1_penalty=0.02, w2_start=0.001, adaptive_topk=False, restarts=0, weight_decay=0.01):
        if preset not in PRESETS:
            raise ValueError(f"cosine_concepts: there is no preset {preset!r}\n"
                             f"change --hyper preset=… to one of {', '.join(PRESETS)}")
        given = dict(k=k, concept_std=concept_std, w2_peak=w2_peak, l1_concept=l1_concept)
        chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        n_1 = round(0.8 * d_sae)
        n_2 = d_sae - n_1
        k = chosen["k"]
        if type(k) is float and 0 < k < 1:
            k = max(1, round(k * n_2))
        k = base.feature_count("k", k, n_2, most="the number of concepts")
        super().__init__(d_in, n_1)
        nn.init.xavier_normal_(self.W_enc)
        self.W_concept = nn.Parameter(chosen["concept_std"] * torch.randn(n_2, n_1))  # [P, C]: read row by row on a CPU
        self.b_concept = nn.Parameter(torch.zeros(n_2))
        self.W_dec.data.copy_(F.normalize(self.W_enc.detach().T, dim=1))
        self.W_dec2 = nn.Parameter(F.normalize(torch.randn(n_2, d_in), dim=1))
        if chosen["concept_std"]:
            self.W_dec2.data.copy_(F.normalize(self.W_concept.detach() @ self.W_dec.detach(), dim=1))
        self.W_dec2.register_post_accumulate_grad_hook(base.project_decoder_gradient)
        self.register_buffer("mean_z1_C", torch.zeros(n_1))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.d_sae, self.n_1, self.k = d_sae, n_1, k
        self.l1_base, self.l1_concept, self.w1_penalty = l1_base, chosen["l1_concept"], w1_penalty
        self.w2_start, self.w2_peak = w2_start, chosen["w2_peak"]
        self.adaptive_topk, self.restarts, self.weight_decay = adaptive_topk, int(restarts), weight_decay

    @torch.no_grad()
    def initialise(self, x_ND):
        self.b_dec.copy_(x_ND.mean(0))
        self.mean_z1_C.copy_(F.relu(self.pre_activations(x_ND[:8192])).mean(0))

    def concept_activations(self, z1):
        """ReLU((z1 − m)·W_conceptᵀ + b_concept), (..., P), before any are chosen."""
        return F.relu(F.linear(z1, self.W_concept, self.b_concept - self.W_concept @ self.mean_z1_C))

    def choose(self, acts):
        """Concepts considered per token (..., K), and which of them are kept."""
        if not self.adaptive_topk:
            index = acts.topk(self.k, dim=-1, sorted=False).indices
            return index, torch.ones_like(index, dtype=torch.bool)
        top, index = acts.topk(min(2 * self.k, acts.shape[-1]), dim=-1, sorted=False)
        return index, top >= top.mean(-1, keepdim=True)

    def encode(self, x):
        z1 = F.relu(self.pre_activations(x))
        acts = self.concept_activations(z1)
        index, keep = self.choose(acts)
        return torch.cat([z1, torch.zeros_like(acts).scatter(-1, index, acts.gather(-1, index) * keep)], -1)

    def decode(self, z):
        return z[..., :self.n_1] @ self.W_dec + z[..., self.n_1:] @ self.W_dec2 + self.b_dec

    @property
    def decoder(self):
        return torch.cat([self.W_dec, self.W_dec2])

    def w2_penalty(self, progress):
        """λ_w2(t)."""
        T = min(5000, progress.total_steps)
        return self.w2_start + (self.w2_peak - self.w2_start) * (1 - math.cos(math.pi * min(progress.step, T) / T)) / 2

    def loss(self, batch, progress):
        z1_BC = F.relu(self.pre_activations(batch.x))
        sparse = base.sparse_pays(batch.x.device, self.k, self.d_sae - self.n_1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not sparse):
            acts_BP = self.concept_activations(z1_BC)
        index_BK, keep_BK = self.choose(acts_BP.detach())
        # the concept layer as an encoder of z1
        concepts = SimpleNamespace(W_enc=self.W_concept.T, b_enc=self.b_concept, b_dec=self.mean_z1_C)
        z2_BK = base.kept_activations(concepts, z1_BC, acts_BP, index_BK) * keep_BK
        self.note_fired_indices(z2_BK, index_BK + self.n_1)
        self._fired_F[:self.n_1] = (z1_BC.detach() > 0).any(0)
        self._mean_z1_C = z1_BC.detach().mean(0, dtype=torch.float32)

        x_hat_BD = base.relu_product(z1_BC, self.W_dec) + base.decode_sparse(z2_BK, index_BK, self.W_dec2) + self.b_dec
        reconstruction = base.reconstruction_loss(batch.x - x_hat_BD)
        l1_base, l1_concept = (z.float().sum(-1).mean() for z in (z1_BC, z2_BK))
        w1, w2 = (torch.linalg.vector_norm(W, 1) / W.numel() for W in (self.W_enc, self.W_concept))
        loss = (reconstruction + progress.sparsity_warmup() * (self.l1_base * l1_base + self.l1_concept * l1_concept)
                + self.w1_penalty * w1 + self.w2_penalty(progress) * w2)
        return loss, {"reconstruction": reconstruction, "l1_base": l1_base, "l1_concept": l1_concept, "w1": w1,
                      "w2": w2}

    def after_step(self, batch, progress):
        self.mean_z1_C.lerp_(self._mean_z1_C.to(self.mean_z1_C), 0.1)
        base.normalise_decoder(self.W_dec2)

    def parameter_groups(self, lr):
        if self.weight_decay and "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:
            raise RuntimeError(f"cosine_concepts: Adam of torch {torch.__version__} has no decoupled weight decay\n"
                               "use torch 2.7 or later, or --hyper weight_decay=0")
        return [{"params": list(self.parameters()), "lr": lr, "weight_decay": self.weight_decay,
                 "decoupled_weight_decay": True}]

    def lr_scale(self, progress):
        if not self.restarts:
            return 1.0
        return (1 + math.cos(math.pi * (progress.fraction * (self.restarts + 1) % 1))) / 2

    def report(self, context):
        from variants.research import cosine_concepts_report

        return cosine_concepts_report.report(self, context)
