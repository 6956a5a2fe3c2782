"""Aligned training of a TopK SAE (Brzozowski, Chung 2026, "Aligned Training: A Parameter-Free Method …").

loss = topk's, ‖x − x_hat‖² + auxk_alpha·auxk,   with every encoder row e_i bound to its decoder row d_i: ⟨e_i, d_i⟩ = 1
The binding is a reparameterisation: e_i = v_i + (1 − ⟨v_i, d_i⟩)·d_i with ‖d_i‖ = 1, the point nearest to the free v_i
that fulfils it. The paper asks for a parameter-free one and this is the one that divides by nothing; its own formula
may be another. After each step v_i becomes e_i, which changes nothing but makes W_enc what it does.
Recipe of topk.
"""

from torch.nn import functional as F

from variants import base, topk


class SAE(topk.SAE):
    """TopK SAE in aligned training. k: features kept per token; auxk_alpha: weight of auxk, which topk has too."""

    data_parallel = True
    compiled_loss = True

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32):
        super().__init__(d_in, d_sae, k=k, auxk_alpha=auxk_alpha)

    def aligned_encoder(self):
        """Encoder [D, F] whose columns have an inner product of 1 with their decoder rows, which are of unit norm."""
        lacks_F = 1 - (self.W_enc * self.W_dec.T).sum(0)
        return self.W_enc + lacks_F * self.W_dec.T

    def loss(self, batch, progress):
        acts_BF = F.relu(base.affine(batch.x, self.aligned_encoder(), self.b_enc, self.b_dec))
        index_BK = base.top_k(acts_BF, self.k)
        top_BK = acts_BF.gather(1, index_BK)
        self.note_fired_indices(top_BK, index_BK)
        self._kept = top_BK.detach()
        e_BD = batch.x - base.decode_sparse(top_BK, index_BK, self.W_dec) - self.b_dec
        reconstruction = base.reconstruction_loss(e_BD)
        auxk = base.auxk_loss(self, batch.x, e_BD, acts_BF, self.dead_features(progress))
        return reconstruction + self.auxk_alpha * auxk, {"reconstruction": reconstruction, "auxk": auxk}

    def after_step(self, batch, progress):
        super().after_step(batch, progress)
        self.W_enc.copy_(self.aligned_encoder())
