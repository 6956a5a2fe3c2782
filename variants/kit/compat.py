"""Names that trainers written for dictionary_learning and for this workflow's history lean on.

A file in the imperative form (see variants/kit/imperative.py) may import them, `from variants.kit.compat import *`, or
use them without any import: those it uses and never defines are lent to it when it is loaded.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple, Union  # noqa: UP035  as such files spell them

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.nn import functional

t, F = torch, functional
__all__ = ["Any", "Callable", "ConstrainedAdam", "CustomSAEConfig", "Dict", "F", "List", "Optional", "SAETrainer",
           "Tensor", "Tuple", "Union", "dataclass", "defaultdict", "deque", "field", "math", "namedtuple", "nn", "np",
           "optim", "t", "torch"]


class SAETrainer:
    """Base of imperative trainers: a seed, and the names of attributes worth logging."""

    def __init__(self, seed: int | None = None):
        self.seed = seed
        self.logging_parameters: list[str] = []
        if seed is not None:
            torch.manual_seed(seed)

    def get_logging_parameters(self) -> dict:
        return {name: getattr(self, name) for name in self.logging_parameters if hasattr(self, name)}


class ConstrainedAdam(torch.optim.Adam):
    """Adam that keeps the features' directions in `constrained_params` at unit norm.

    The gradient's part along each direction is removed before the step, the norm restored after it.
    Features are the longer side of a matrix: the rows of W_dec [d_sae, d_in], the columns of an nn.Linear decoder's
    weight [d_in, d_sae]; rows if it is square.
    """

    def __init__(self, params, constrained_params, lr: float, betas: tuple[float, float] = (0.9, 0.999), **adam):
        super().__init__(params, lr=lr, betas=betas, **adam)
        self.constrained_params = list(constrained_params)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.constrained_params:
            if p.grad is not None:
                unit = functional.normalize(p, dim=_along(p))
                p.grad -= (p.grad * unit).sum(_along(p), keepdim=True) * unit
        loss = super().step(closure)
        for p in self.constrained_params:
            p /= p.norm(dim=_along(p), keepdim=True).clamp_min(1e-12)
        return loss


def _along(p: Tensor) -> int:
    """The dimension a feature's direction runs along."""
    return 1 if p.shape[0] >= p.shape[1] else 0


class CustomSAEConfig(SimpleNamespace):
    """Whatever such code records about its SAE: CustomSAEConfig(model_name, d_in, d_sae, hook_name, hook_layer, …)."""

    def __init__(self, model_name=None, d_in=None, d_sae=None, hook_name=None, hook_layer=None, **more):
        super().__init__(model_name=model_name, d_in=d_in, d_sae=d_sae, hook_name=hook_name, hook_layer=hook_layer,
                         **more)
