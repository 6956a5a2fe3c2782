"""An SAE can be copied whatever its author keeps on it."""

from types import SimpleNamespace

import torch
from torch import nn

from variants.kit import copying


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4))
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.W
        self.helper = SimpleNamespace(terms={"a": [self.W.sum()]}, plain=torch.ones(2))
        self.generator = torch.Generator().manual_seed(1)
        self.helper.owner = self


def test_graphs_generators_ties_and_cycles_are_copied():
    """Fails if a tensor with a graph stops the copy, a tie is cut, or something of the copy is still the original's."""
    kept = Kept()
    torch.rand(2, generator=kept.generator)
    twin = copying.duplicate(kept)
    assert twin.tied.weight is twin.W and twin.helper.owner is twin and twin.W is not kept.W
    assert torch.equal(twin.helper.terms["a"][0], kept.W.sum()) and twin.helper.terms["a"][0].grad_fn is None
    assert torch.equal(torch.rand(5, generator=twin.generator), torch.rand(5, generator=kept.generator))
    twin.helper.plain.zero_()
    assert kept.helper.plain.all() and kept.helper.terms["a"][0].grad_fn is not None


def test_a_copy_on_another_device_moves_everything():
    """Fails if a helper's plain tensor stays on the original's device, or a parameter is no parameter any more."""
    twin = copying.duplicate(Kept(), "meta")
    assert twin.helper.plain.is_meta and twin.helper.terms["a"][0].is_meta and twin.tied.weight is twin.W
    assert [name for name, _ in twin.named_parameters()] == ["W"] and twin.W.requires_grad
