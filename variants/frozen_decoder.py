"""Random baselines (Korznikov et al. 2026, "Sanity Checks for Sparse Autoencoders", arXiv 2602.14111).

loss = ‖x − x_hat‖² + auxk_alpha·auxk,   z = the k largest of ReLU((x − b_dec)·W_enc + b_enc),   x_hat = z·W_dec + b_dec
`topk` with its recipe, where what is frozen stays the random, tied unit rows it begins as:
frozen=decoder   W_dec: encoder and b_dec learn to read random directions (theirs, there of BatchTopK, JumpReLU, ReLU)
frozen=all       W_dec, W_enc, b_enc: no feature is trained. b_dec learns ‖x − x_hat‖² alone, and W_enc is W_decᵀ times
                 one number, the best one for the first block: else x_hat overshoots where k is large against d_in
What a trained SAE scores counts as far as it exceeds these.
"""

import torch

from variants import base, topk

FROZEN = {"decoder": ("W_dec",), "all": ("W_dec", "W_enc", "b_enc")}


class SAE(topk.SAE):
    """TopK SAE on random directions. frozen: decoder, or all but b_dec; k: as of topk.

    auxk_alpha: as of topk with frozen=decoder; with frozen=all there is no such term.
    """

    unit_norm_decoder = False  # unit as it begins, and never stepped
    data_parallel = True
    compiled_loss = True
    copied_weights = True
    own_start = ("frozen",)  # what a trained SAE scores is held against random directions

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32, frozen="decoder"):
        if frozen not in FROZEN:
            raise ValueError(f"frozen_decoder: frozen = {frozen!r} is none of {', '.join(FROZEN)}\n"
                             "give --hyper frozen=decoder or frozen=all")
        super().__init__(d_in, d_sae, k=k, auxk_alpha=auxk_alpha)
        self.frozen = frozen
        for name in FROZEN[frozen]:
            getattr(self, name).requires_grad_(False)
        if frozen == "all":  # there is no feature to revive
            if auxk_alpha not in (0, 1 / 32):
                raise ValueError(f"--hyper auxk_alpha = {auxk_alpha}: with frozen=all there is no feature to revive\n"
                                 "leave auxk_alpha out, or give frozen=decoder")
            self.auxk_alpha = 0.0

    @torch.no_grad()
    def initialise(self, x_ND):
        super().initialise(x_ND)
        if self.frozen == "all":
            centred_ND = x_ND[:1024] - self.b_dec
            found_ND = self.encode(x_ND[:1024]) @ self.W_dec
            self.W_enc.mul_((centred_ND * found_ND).sum() / found_ND.pow(2).sum().clamp_min(1e-12))

    def loss(self, batch, progress):
        if self.frozen != "all":
            return super().loss(batch, progress)
        acts_BF = base.dense_activations(self, batch.x, self.k)
        index_BK = base.top_k(acts_BF, self.k)
        top_BK = base.kept_activations(self, batch.x, acts_BF, index_BK)
        self.note_fired_indices(top_BK, index_BK)
        self._kept = top_BK.detach()
        e_BD = batch.x - base.decode_sparse(top_BK, index_BK, self.W_dec) - self.b_dec
        reconstruction = base.reconstruction_loss(e_BD)
        return reconstruction, {"reconstruction": reconstruction}
