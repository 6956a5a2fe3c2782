"""Two-layer hierarchical SAE: features composed of features (a design of this project), trained by a curriculum.

loss = ‖x − x_hat‖² + λ1·(‖h1·W_comp − h2‖² + α‖W_comp‖₁) + λ2·(‖x − (h1·W_dec+b_dec)‖² + ‖x − (h2·W_dec2+b_dec)‖²)
h1 = TopK_k1(ReLU((x−b_dec)·W_enc + b_enc)),   h2 = TopK_k2(ReLU((x−b_dec)·W_enc2 + h1·W_12 + b_enc2)),
z = [h1, h2],   x_hat = h1·W_dec + h2·W_dec2 + b_dec; d_sae counts both layers, layer 1 has round(0.8·d_sae) features.
‖W_comp‖₁ is the mean over parents of their weights' sum: a parent fires for k2/F2 of the tokens and its weights'
gradient shrinks with it, so that α = 1e-3 on the plain sum drives all of W_comp to 0 (D = 576, F = 2304: R² −.02
against .2).
Curriculum: first 40 % layer 1 alone (h2 = 0, no composition), next 40 % layer 2 with layer 1 and b_dec frozen, last
20 % both at lr/10.
Recipe of topk: tied unit rows, geometric median, unit-norm decoder, clip 1, Adam with lr 2e-4/√(F/2¹⁴).

Shapes: C = features of layer 1 (children), P = features of layer 2 (parents), K, L = k1, k2; the others as in base.py.
"""

import torch
from torch import nn
from torch.nn import functional as F

from variants import base

LAYER_2_FROM, JOINT_FROM = 0.4, 0.8  # shares of the run


class SAE(base.SAE):
    """Hierarchical SAE. lambda_comp, alpha_comp, lambda_skip: λ1, α, λ2; k1, k2: features kept per token in layer 1, 2;
    curriculum: one layer after the other, else both from the start at the full learning rate."""

    grad_clip = 1.0  # unit_norm_decoder stays off: decoders are normalised here, each only while it is trained

    def __init__(self, d_in, d_sae, k1=32, k2=16, lambda_comp=0.1, alpha_comp=1e-3, lambda_skip=0.1, curriculum=True):
        n_1 = round(0.8 * d_sae)
        n_2 = d_sae - n_1
        k1 = base.feature_count("k1", k1, n_1, most="layer 1's width")
        k2 = base.feature_count("k2", k2, n_2, most="layer 2's width")
        super().__init__(d_in, n_1)  # W_enc, b_enc, W_dec, b_dec are layer 1's
        layer_2 = base.SAE(d_in, n_2)
        self.W_enc2, self.b_enc2, self.W_dec2 = layer_2.W_enc, layer_2.b_enc, layer_2.W_dec
        # the encoder of [x, h1] in two parts: each has its own cheap product and gradient
        self.W_12 = nn.Parameter(torch.zeros(n_1, n_2))
        self.W_comp = nn.Parameter(torch.zeros(n_1, n_2))
        self.d_sae, self.n_1 = d_sae, n_1
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.k1, self.k2, self.curriculum = k1, k2, curriculum
        self.lambda_comp, self.alpha_comp, self.lambda_skip = lambda_comp, alpha_comp, lambda_skip
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5
        for W_dec in (self.W_dec, self.W_dec2):
            W_dec.register_post_accumulate_grad_hook(base.project_decoder_gradient)

    def initialise(self, x_ND):
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def trains(self, progress):
        """Whether layer 1 and whether layer 2 is trained now."""
        if not self.curriculum:
            return True, True
        return not LAYER_2_FROM <= progress.fraction < JOINT_FROM, progress.fraction >= LAYER_2_FROM

    def lr_scale(self, progress):
        return 0.1 if self.curriculum and progress.fraction >= JOINT_FROM else 1.0

    def layer_1(self, x_ND):
        """The k1 largest activations of layer 1 and their feature numbers, [N, K] each."""
        acts_NC = base.dense_activations(self, x_ND, self.k1)
        index_NK = acts_NC.detach().topk(self.k1, dim=-1, sorted=False).indices
        return base.kept_activations(self, x_ND, acts_NC, index_NK), index_NK

    def layer_2(self, x_ND, h1_NK, index_NK, b_dec_D):
        """The k2 largest activations of layer 2 and their numbers within the layer, [N, L] each."""
        x_NP = F.linear(x_ND, self.W_enc2.T, self.b_enc2 - b_dec_D @ self.W_enc2)
        return F.relu(x_NP + base.decode_sparse(h1_NK, index_NK, self.W_12)).topk(self.k2, dim=-1, sorted=False)

    def encode(self, x):
        x_ND = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        h1_NK, index_NK = self.layer_1(x_ND)
        h2_NL, index_NL = self.layer_2(x_ND, h1_NK, index_NK, self.b_dec)
        z_NF = torch.zeros(len(x_ND), self.d_sae, device=x.device, dtype=h2_NL.dtype)
        z_NF = z_NF.scatter(1, torch.cat([index_NK, index_NL + self.n_1], 1), torch.cat([h1_NK.to(h2_NL), h2_NL], 1))
        return z_NF.view(*x.shape[:-1], self.d_sae)

    def decode(self, z):
        return z[..., :self.n_1] @ self.W_dec + z[..., self.n_1:] @ self.W_dec2 + self.b_dec

    @property
    def decoder(self):
        return torch.cat([self.W_dec, self.W_dec2])

    def loss(self, batch, progress):
        train_1, train_2 = self.trains(progress)
        # frozen parameters have no gradient at all, so Adam skips them
        with torch.set_grad_enabled(train_1 and torch.is_grad_enabled()):
            h1_BK, index_BK = self.layer_1(batch.x)
            x_hat_1_BD = base.decode_sparse(h1_BK, index_BK, self.W_dec)
            b_dec_D = self.b_dec if train_1 else self.b_dec.detach()
            e_1_BD = batch.x - x_hat_1_BD - b_dec_D
        if not train_2:
            self.note_fired_indices(h1_BK, index_BK)
            reconstruction, none = base.reconstruction_loss(e_1_BD), batch.x.new_zeros(())
            terms = {"reconstruction": reconstruction, "composition": none, "comp_l1": none, "skip": reconstruction}
            return (1 + self.lambda_skip) * reconstruction, terms
        h2_BL, index_BL = self.layer_2(batch.x, h1_BK, index_BK, b_dec_D)
        self.note_fired_indices(torch.cat([h1_BK.to(h2_BL), h2_BL], 1), torch.cat([index_BK, index_BL + self.n_1], 1))
        x_hat_2_BD = base.decode_sparse(h2_BL, index_BL, self.W_dec2)
        reconstruction = base.reconstruction_loss(e_1_BD - x_hat_2_BD)
        skip = base.reconstruction_loss(e_1_BD) + base.reconstruction_loss(batch.x - x_hat_2_BD - b_dec_D)
        composed_BP = base.decode_sparse(h1_BK, index_BK, self.W_comp)
        h2_BP = torch.zeros_like(composed_BP, dtype=h2_BL.dtype).scatter(1, index_BL, h2_BL)
        composition, comp_l1 = base.reconstruction_loss(composed_BP - h2_BP), self.W_comp.abs().sum(0).mean()
        loss = reconstruction + self.lambda_comp * (composition + self.alpha_comp * comp_l1) + self.lambda_skip * skip
        return loss, {"reconstruction": reconstruction, "composition": composition, "comp_l1": comp_l1, "skip": skip}

    def after_step(self, batch, progress):
        train_1, train_2 = self.trains(progress)
        if train_1:
            base.normalise_decoder(self.W_dec)
        if train_2:
            base.normalise_decoder(self.W_dec2)
        else:
            self.tokens_since_fired[self.n_1:] = 0  # layer 2 has not begun: its features are not dead

    # -- the hierarchy, for unlearning

    def stages(self):
        """Feature numbers by stage of unlearning: layer 2 is clamped first, then its children in layer 1."""
        return {"layer_2": range(self.n_1, self.d_sae), "layer_1": range(self.n_1)}

    @torch.no_grad()
    def child_mask(self, parents_Q, share=0.1, most=10):
        """[C, Q]: the children, `most` at most, of parents numbered in layer 2: |W_comp| > share·their largest."""
        weight_CQ = self.W_comp[:, parents_Q].abs()
        weakest_Q = weight_CQ.topk(min(most, self.n_1), dim=0).values[-1]
        return (weight_CQ > share * weight_CQ.amax(0)) & (weight_CQ >= weakest_Q)

    def children_of(self, parent_features, share=0.1, most=10):
        """Layer-1 features, ascending, that compose the given layer-2 features (numbered as in z); see child_mask."""
        parents = sorted({int(p) for p in parent_features})
        if parents and not self.n_1 <= parents[0] <= parents[-1] < self.d_sae:
            raise ValueError(f"hierarchical: parents {parents[0]} to {parents[-1]} leave layer 2, {self.n_1} to "
                             f"{self.d_sae - 1}\nchoose parents from stages()['layer_2']")
        parents_Q = torch.tensor(parents, dtype=torch.long, device=self.W_comp.device) - self.n_1
        return self.child_mask(parents_Q, share, most).any(1).nonzero().squeeze(1).tolist()

    def report(self, context):
        from variants.research import hierarchical_report

        return hierarchical_report.report(self, context)
