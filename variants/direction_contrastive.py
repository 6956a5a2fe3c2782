"""Direction-aware contrastive SAE with bidirectional co-activation suppression (a research variant of this project).

loss = ‖x − x_hat‖² + λ1·sp(t)·Σ_i z_i + λc·Σ_{i≠j} cos_ij·mask_ij·mean_B(z_i·z_j),   z_i = ReLU(z_pre)_i·importance_i
x_hat = z·Ŵ + b_dec, Ŵ: unit rows of W_dec, importance_i = ‖W_dec,i‖, cos = ŴŴᵀ; mask_ij = [cos_ij ≥ min(q_i, q_j)]: the
largest tenth of row i or column j; q_i: 90 % quantile over at most 4096 even columns, every 100 steps (or 5 %).
Initialisation and recipe of standard_april.
Nothing is of size F×F: the last sum is mean_b z_b·(cos∘mask)·z_b over the first `pair_tokens` of the shuffled batch
(unbiased), from each token's `max_active` largest: 39 GFLOP with gradients at D 2304, F 16,384; zᵀz of 2048: 1,100.
Dead features: from step 1000 on, every 500 (in proportion in runs below 20,000) until the lr decays, those silent as
long get a row along the error of a token drawn ∝ ‖e‖²; Adam's moments have decayed.
"""

import torch
from torch.nn import functional as F

from variants import base

CHUNK, COLUMNS = 32, 4096  # tokens whose decoder rows are gathered at a time; columns that a quantile is taken from


class Suppression(torch.autograd.Function):
    """Σ_{i≠j} cos_ij·mask_ij·mean_B(z_i·z_j), cos from rows_FD in `dtype`, with its gradients: no chunk's are kept."""

    @staticmethod
    def forward(ctx, z_BK, rows_FD, index_BK, threshold_F, dtype):
        table_FD, total = rows_FD.to(dtype), z_BK.new_zeros(())
        d_z_BK, d_rows_FD = torch.zeros_like(z_BK), torch.zeros_like(rows_FD)
        for token_b, k in chunks(z_BK):
            z_bk, index_bk = z_BK[token_b, :k], index_BK[token_b, :k]
            row_bkD, q_bk = table_FD[index_bk], threshold_F[index_bk]
            cos_bkk = (row_bkD @ row_bkD.mT).to(z_bk.dtype)
            pair_bkk = (cos_bkk >= torch.minimum(q_bk[:, :, None], q_bk[:, None, :])) * z_bk[:, None, :]
            pair_bkk.diagonal(dim1=1, dim2=2).zero_()
            pull_bk = (cos_bkk * pair_bkk).sum(2)
            total += (z_bk * pull_bk).sum()
            d_z_BK[token_b, :k] = 2 * pull_bk
            d_row_bkD = pair_bkk.mul_(2 * z_bk[:, :, None]).to(dtype) @ row_bkD
            d_rows_FD.index_add_(0, index_bk.flatten(), d_row_bkD.flatten(0, 1).to(rows_FD.dtype))
        ctx.save_for_backward(d_z_BK / len(z_BK), d_rows_FD / len(z_BK))
        return total / len(z_BK)

    @staticmethod
    def backward(ctx, grad):
        return *(grad * d for d in ctx.saved_tensors), None, None, None


def chunks(z_BK):
    """(tokens, number of their features); z_BK descends. On the CPU, which may look, no more than are positive."""
    count_B, order_B = (z_BK > 0).sum(1).sort(descending=True, stable=True)
    width = count_B[::CHUNK].tolist() if z_BK.device.type == "cpu" else [z_BK.shape[1]] * -(-len(z_BK) // CHUNK)
    return zip(order_B.split(CHUNK), width)


@torch.no_grad()
def quantiles(rows_FD, shares):
    """For each share the value [len(shares), F], halfway between two, that so many of a row's products exceed."""
    every_F = torch.arange(len(rows_FD), device=rows_FD.device)
    column_C = every_F[:: -(-len(every_F) // COLUMNS)]
    place, found = [max(1, round(share * (len(column_C) - 1))) - 1 for share in shares], []
    for row_r in every_F.split(1024):
        product_rC = (rows_FD[row_r] @ rows_FD[column_C].T).masked_fill(row_r[:, None] == column_C, -torch.inf)
        largest_rK = product_rC.topk(max(place) + 2, dim=1).values
        found.append((largest_rK + largest_rK.roll(-1, 1))[:, place].T / 2)
    return torch.cat(found, 1)


class SAE(base.SAE):
    """top: share of a row in the mask; normalise: cos from unit rows, else W_dec's; weighting: z times importance, else
    ReLU(z_pre); importance: "magnitude" ‖W_dec,i‖ or "directional" max(0, cos(W_enc,i, W_dec,i))."""

    grad_clip = 1.0
    quantiles = staticmethod(quantiles)  # for the report

    def __init__(self, d_in, d_sae, l1_penalty=0.3, lambda_c=0.1, top=0.1, normalise=True, weighting=True,
                 importance="magnitude", resets=True, warmup_steps=1000, reset_every=500, refresh_every=100,
                 max_active=128, pair_tokens=256):
        if not (0 < top < 1 and importance in ("magnitude", "directional")):
            raise ValueError(f"direction_contrastive: top = {top} must lie between 0 and 1, importance = "
                             f"{importance!r} be 'magnitude' or 'directional'\nchange --hyper top=…,importance=…")
        super().__init__(d_in, d_sae, decoder_norm=0.1)
        self.l1_penalty, self.lambda_c, self.top, self.max_active = l1_penalty, lambda_c, top, min(max_active, d_sae)
        self.normalise, self.weighting, self.importance = normalise, weighting, importance
        self.resets, self.warmup_steps, self.reset_every = resets, warmup_steps, reset_every
        self.refresh_every, self.pair_tokens = refresh_every, pair_tokens
        self.register_buffer("threshold", torch.full((d_sae,), 2.0))  # q_i
        self.register_buffer("rows_reset", torch.tensor(0))

    @property
    def decoder(self):
        return F.normalize(self.W_dec, dim=1)

    def importance_F(self):
        if not self.weighting:
            return torch.ones_like(self.b_enc)
        if self.importance == "magnitude":
            return self.W_dec.norm(dim=1)
        return F.cosine_similarity(self.W_enc.T, self.W_dec, dim=1).relu()

    def encode(self, x):
        return F.relu(self.pre_activations(x)) * self.importance_F()

    def decode(self, z):
        return z @ self.decoder + self.b_dec

    def initialise(self, x_ND):  # also every 100 steps
        self.threshold.copy_(quantiles(self.decoder if self.normalise else self.W_dec, [self.top])[0])

    def loss(self, batch, progress):
        unit_FD, importance_F = self.decoder, self.importance_F()
        acts_BF = F.relu(self.pre_activations(batch.x))
        self.note_fired(acts_BF)
        k = max((acts_BF > 0).sum(1).tolist() + [1]) if acts_BF.device.type == "cpu" else self.d_sae
        if base.sparse_pays(acts_BF.device, k, self.d_sae):  # the same loss, from each token's positive features alone
            index_BK = base.top_k(acts_BF, k)
            z_BK = base.kept_activations(self, batch.x, acts_BF.detach(), index_BK) * importance_F[index_BK]
            x_hat_BD = base.decode_sparse(z_BK, index_BK, unit_FD) + self.b_dec
        else:
            z_BK, index_BK = acts_BF * importance_F, None  # all F
            x_hat_BD = z_BK @ unit_FD + self.b_dec
        reconstruction, l1 = base.reconstruction_loss(batch.x - x_hat_BD), z_BK.float().sum(-1).mean()
        z_BK, largest_BK = z_BK[:self.pair_tokens].topk(min(self.max_active, k), dim=-1)
        index_BK = largest_BK if index_BK is None else index_BK[:self.pair_tokens].gather(1, largest_BK)
        rows_FD = unit_FD if self.normalise else self.W_dec
        contrastive = Suppression.apply(z_BK, rows_FD, index_BK, self.threshold, acts_BF.dtype)
        penalty = self.l1_penalty * progress.sparsity_warmup() * l1 + self.lambda_c * contrastive
        return reconstruction + penalty, {"reconstruction": reconstruction, "l1": l1, "contrastive": contrastive}

    def after_step(self, batch, progress):
        done, shrink = progress.step + 1, min(1.0, progress.total_steps / 20_000)
        every = max(1, round(self.reset_every * shrink))
        if self.resets and done >= self.warmup_steps * shrink and done % every == 0 and progress.fraction < 0.8:
            self.reset_dead(batch.x, self.tokens_since_fired >= every * len(batch.x), done)
        if done % max(1, min(self.refresh_every, progress.total_steps // 20)) == 0:
            self.initialise(batch.x)

    def reset_dead(self, x_BD, dead_F, seed):
        """Give dead features, at most one to two tokens, the error of a token as direction of both rows."""
        error_BD, alive_F = x_BD - self.decode(self.encode(x_BD)), (~dead_F).to(x_BD.dtype)
        dead_n = dead_F.nonzero().squeeze(1)[:len(x_BD) // 2]
        own = torch.Generator(x_BD.device).manual_seed(seed)  # SAEs that train together do not change each other
        token_n = torch.multinomial(error_BD.pow(2).sum(1) + 1e-12, max(1, len(dead_n)), generator=own)[:len(dead_n)]
        direction_nD, share_F = F.normalize(error_BD[token_n], dim=1), alive_F / alive_F.sum().clamp_min(1)
        self.W_dec[dead_n] = direction_nD * (self.W_dec.norm(dim=1) @ share_F)
        self.W_enc[:, dead_n] = direction_nD.T * (0.2 * self.W_enc.norm(dim=0) @ share_F)
        self.b_enc[dead_n], self.tokens_since_fired[dead_n] = 0, 0
        self.rows_reset += len(dead_n)

    def report(self, context):
        from variants.research.direction_contrastive_report import report
        return report(self, context)
