"""Numbers stay what they were: a short training of every variant against stored results.

`python -m tests.flow.test_golden` writes tests/fixtures/golden.json anew: for a change that is meant to move numbers.
"""

import json

import pytest
import torch

import experiment
import variants
from tests import FIXTURES, OWN_VARIANTS
from variants import base
from variants.kit import contexts
from variants.kit.hyper import hyperparameters

STORED = FIXTURES / "golden.json"
D, F, B, STEPS = 24, 384, 63, 60  # contexts of 7 tokens fill the batch
# rounding (another processor or order of summation) grows in 60 steps of Adam, most where rank chooses a feature
RELATIVE = {"loss": 2e-3, "l0": 0.01, "decoder": 2e-3, "moved": 5e-3}
# what a keyword turns on: the variant and its hyper-parameters, by the name under which it is stored
RECIPES = {f"{variant} {key}={value}": (variant, {"k": 8, key: value}) for variant, key, value in [
    ("topk", "k_start", 24), ("batch_topk", "k_start", 24), ("matryoshka_batch_topk", "k_start", 24),
    ("matryoshka_batch_topk", "detach", True), ("matryoshka_batch_topk", "by_frequency", True)]}


def trained(name: str, given: dict | None = None) -> dict[str, float]:
    """Loss of the last ten steps, L0, and how far the decoder has come, after STEPS steps on sparse synthetic data."""
    generator = torch.Generator().manual_seed(7)
    atoms_AD = torch.nn.functional.normalize(torch.randn(64, D, generator=generator), dim=1)
    share_NA = torch.rand(STEPS * B, 64, generator=generator)
    x_ND = torch.where(share_NA > 0.94, share_NA, 0.0) @ atoms_AD
    x_ND = x_ND + 0.02 * torch.randn(STEPS * B, D, generator=generator)
    x_ND = x_ND / x_ND.pow(2).sum(1).mean().sqrt()
    torch.manual_seed(0)
    hyper = {"k": 8} if "k" in hyperparameters(variants.load(name)) else {}
    sae = variants.build(variants.load(name), D, F, hyper | (given or {}))
    sae.initialise(x_ND[:1024])
    optimizer, before_FD, losses = experiment.make_optimizer(sae, 3e-3), sae.decoder.detach().clone(), []
    for step, x_BD in enumerate(x_ND.split(B)):
        fields = dict(x=x_BD)
        if sae.needs_contexts or sae.attention_layers:
            fields = contexts.synthetic(x_BD, sae.attention_layers, sae.attention_threshold, step)
        progress = base.Progress(step, STEPS, step * B, STEPS * B)
        loss, _ = experiment.train_step(sae, optimizer, base.Batch(**fields), progress)
        losses.append(float(loss))
    z_NF = sae.eval().encode(x_ND[:1024])
    return dict(loss=sum(losses[-10:]) / 10, l0=float((z_NF != 0).float().sum(1).mean()),
                decoder=float(sae.decoder.detach().norm()), moved=float((sae.decoder.detach() - before_FD).norm()))


@pytest.mark.parametrize("name", [*OWN_VARIANTS, *(name for name in RECIPES if RECIPES[name][0] in OWN_VARIANTS)])
def test_a_short_training_ends_as_it_did(name):
    """Fails if a change meant for speed alters what is computed by more than rounding."""
    found, stored = trained(*RECIPES.get(name, (name,))), json.loads(STORED.read_text())[name]
    for key, relative in RELATIVE.items():
        assert found[key] == pytest.approx(stored[key], rel=relative, abs=1e-6), key


if __name__ == "__main__":
    ways = {name: (name,) for name in variants.names()} | RECIPES
    STORED.write_text(json.dumps({name: trained(*way) for name, way in ways.items()}, indent=1) + "\n")
