"""A trained SAE as evals see it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrainedSAE(nn.Module):
    """A trained variant that takes *raw* activations and has unit-norm decoder rows, whatever its own scales are.

    encode: (..., D) any float dtype -> (..., F) fp32, without gradient; decode: (..., F) -> (..., D) fp32,
    differentiable in z. `scale` is the factor by which the training activations were divided; features are multiplied
    by it and by their decoder row's norm.
    """

    def __init__(self, sae: nn.Module, scale: float):
        super().__init__()
        self.sae = sae.eval().requires_grad_(False)
        self.register_buffer("scale", torch.tensor(float(scale)))
        norm_F = sae.decoder.detach().float().norm(dim=1)
        # a row of zeros stays as it is: dividing by its norm would make NaN of a dead feature
        self.register_buffer("gain_F", scale * torch.where(norm_F > 0, norm_F, torch.ones_like(norm_F)))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x.to(self.gain_F) / self.scale).float() * self.gain_F

    def decode(self, z: Tensor) -> Tensor:
        return self.sae.decode(z.to(self.gain_F) / self.gain_F).float() * self.scale

    @property
    def W_dec(self) -> Tensor:
        """Decoder rows of unit norm, [F, D]."""
        return self.sae.decoder.detach().float() * (self.scale / self.gain_F)[:, None]

    @property
    def W_enc(self) -> Tensor | None:
        """Encoder [D, F] on raw activations where the variant has one of that shape, else None."""
        W = getattr(self.sae, "W_enc", None)
        ok = W is not None and W.shape == (self.sae.d_in, len(self.gain_F))
        return W.detach().float() * (self.gain_F / self.scale) if ok else None

    @property
    def b_enc(self) -> Tensor | None:
        """Encoder bias [F] in raw units where the variant has one, else None."""
        b = getattr(self.sae, "b_enc", None)
        return b.detach().float() * self.gain_F if b is not None and b.shape == self.gain_F.shape else None
