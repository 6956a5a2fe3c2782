"""The variants that differ from `standard` by their penalty or by a gate: standard_april, gated, p_anneal."""

import json

import pytest
import torch

import variants
import variants.kit.saving
from tests.variants.common import SMOLLM, preflight, raw_activations, read_by_both
from variants import base, gated, standard_april
from variants.kit import found

NAMES = [name for name in ("standard_april", "gated", "p_anneal") if name in variants.names()]
WARMING = base.Progress(5, 100, 500, 10_000)  # half of the sparsity warm-up, which takes a tenth of the run


def scrambled(sae: base.SAE) -> base.SAE:
    """Untied weights, rows of various norms, biases off zero: nothing that initialisation makes equal stays equal."""
    for p in sae.parameters():
        p.data += torch.randn_like(p) * 0.2
    return sae.double()


@torch.no_grad()
def pre_activations(sae: base.SAE, x_D, i: int) -> float:
    return sum(float(x_D[d] - sae.b_dec[d]) * float(sae.W_enc[d, i]) for d in range(len(x_D)))


@torch.no_grad()
def squared_error(sae: base.SAE, x_D, z_F) -> float:
    return sum(float(x_D[d] - sae.b_dec[d] - sum(z * sae.W_dec[i, d] for i, z in enumerate(z_F))) ** 2
               for d in range(len(x_D)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gated"])
def test_relu_losses_by_hand(name):
    """Fails if april forgets the decoder norms, p_anneal the power, either the warm-up, a sum over D, a mean over B."""
    torch.manual_seed(0)
    sae = scrambled(variants.load(name).SAE(4, 7, l1_penalty=0.3))
    x_BD = torch.randn(5, 4, dtype=torch.float64)
    if name == "p_anneal":
        sae.p.fill_(0.52)
    weight = {"standard_april": lambda z, i: z * sae.W_dec[i].pow(2).sum().item() ** 0.5,
              "p_anneal": lambda z, i: (z + variants.load(name).EPSILON) ** 0.52 if z > 0 else 0.0}[name]
    errors, penalties = [], []
    for x_D in x_BD:
        z_F = [max(0.0, pre_activations(sae, x_D, i) + sae.b_enc[i].item()) for i in range(7)]
        errors.append(squared_error(sae, x_D, z_F))
        penalties.append(sum(weight(z, i) for i, z in enumerate(z_F)))
    loss, terms = sae.loss(base.Batch(x_BD), WARMING)
    error, penalty = sum(errors) / 5, sum(penalties) / 5
    assert [t.item() for t in terms.values()] == pytest.approx([error, penalty], rel=1e-6)
    assert loss.item() == pytest.approx(error + 0.3 * 0.5 * penalty, rel=1e-6)


def test_gated_loss_by_hand():
    """Fails if the two paths swap biases, r_mag is not an exponent, or the penalty is on z instead of the gate."""
    torch.manual_seed(0)
    sae = scrambled(gated.SAE(4, 7, l1_penalty=0.3))
    x_BD = torch.randn(5, 4, dtype=torch.float64)
    errors, penalties, auxiliary = [], [], []
    for x_D in x_BD:
        a_F = [pre_activations(sae, x_D, i) for i in range(7)]
        gate_F = [a + sae.b_gate[i].item() for i, a in enumerate(a_F)]
        size_F = [a * 2.718281828459045 ** sae.r_mag[i].item() + sae.b_mag[i].item() for i, a in enumerate(a_F)]
        errors.append(squared_error(sae, x_D, [max(0.0, size) if gate > 0 else 0.0
                                               for gate, size in zip(gate_F, size_F)]))
        auxiliary.append(squared_error(sae, x_D, [max(0.0, gate) for gate in gate_F]))
        penalties.append(sum(max(0.0, gate) for gate in gate_F))
    loss, terms = sae.loss(base.Batch(x_BD), WARMING)
    error, penalty, aux = (sum(values) / 5 for values in (errors, penalties, auxiliary))
    assert [t.item() for t in terms.values()] == pytest.approx([error, penalty, aux], rel=1e-6)
    assert loss.item() == pytest.approx(error + 0.3 * 0.5 * penalty + aux, rel=1e-6)


def test_gated_auxiliary_term_trains_the_gate_and_not_the_decoder():
    """Fails if aux's decoder is not frozen: W_dec would get a gradient, b_dec more than comes through the encoder."""
    torch.manual_seed(0)
    sae = scrambled(gated.SAE(6, 20))
    _, terms = sae.loss(base.Batch(torch.randn(30, 6, dtype=torch.float64)), WARMING)
    terms["aux"].backward(retain_graph=True)
    assert sae.W_dec.grad is None and sae.b_mag.grad is None and sae.r_mag.grad is None
    assert (sae.b_gate.grad != 0).any() and (sae.W_enc.grad != 0).any()
    assert torch.allclose(sae.b_dec.grad, -sae.W_enc @ sae.b_gate.grad)  # a + b_gate = x·W_enc − b_dec·W_enc + b_gate
    sae.zero_grad(set_to_none=True)
    terms["reconstruction"].backward()
    assert sae.b_gate.grad is None and (sae.b_mag.grad != 0).any() and (sae.W_dec.grad != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name):
    """Fails if the initialisation or the declared optimiser is not the paper's."""
    sae = variants.load(name).SAE(16, 64)
    norm, *recipe = {"standard_april": (0.1, False, 1.0, (0.9, 0.999)), "gated": (1.0, True, None, (0.0, 0.999)),
                     "p_anneal": (0.1, True, None, (0.9, 0.999))}[name]
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.tensor(norm)) and torch.equal(sae.W_enc, sae.W_dec.T)
    assert [sae.unit_norm_decoder, sae.grad_clip, sae.adam_betas] == recipe
    assert not any(p.any() for p in sae.parameters() if p.ndim == 1)


@pytest.mark.parametrize("name", NAMES)
def test_saved_sae_loads_in_saelens_and_here_with_the_same_features(tmp_path, name):
    """Fails if scale 37, biases or decoder norms are folded into the wrong weights, or r_mag is scaled."""
    torch.manual_seed(0)
    sae, x_raw = scrambled(variants.load(name).SAE(12, 40)).float(), raw_activations()
    trained, theirs, ours = read_by_both(tmp_path / "layer_1", name, sae)
    features = sae.encode(x_raw / 37) * 37 * sae.W_dec.norm(dim=1)
    x_hat = sae.decode(sae.encode(x_raw / 37)) * 37
    assert 0.05 < (features > 0).float().mean() < 0.95
    for other in (trained, theirs, ours):
        assert torch.allclose(other.encode(x_raw), features, rtol=1e-5, atol=1e-5 * features.max().item())
        assert torch.allclose(other.decode(other.encode(x_raw)), x_hat, rtol=1e-5, atol=1e-5 * x_hat.abs().max().item())


def test_a_gated_sae_without_its_gate_is_not_loaded(tmp_path):
    """Fails if a missing weight is left at its initial value without a word."""
    from safetensors.torch import load_file, save_file

    variants.kit.saving.save_sae(tmp_path / "sae", gated.SAE(6, 10), 1.0, variants.path("gated"), {}, {})
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert set(weights) == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    save_file({k: v for k, v in weights.items() if k != "r_mag"}, tmp_path / "sae" / "sae_weights.safetensors")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    del cfg["metadata"][found.DIGEST]  # as in a file of another library
    (tmp_path / "sae/cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="r_mag"):
        variants.kit.saving.load_sae(tmp_path / "sae")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_preflight_passes(name):
    """Fails if preflight refuses the variant, or finds it to train like another one."""
    others = [variants.path(other) for other in ["standard", "topk", *NAMES] if other != name]
    assert not preflight(name, SMOLLM, reference_files=others).notes


def test_april_penalty_shortens_decoder_rows():
    """Fails if the norms are detached: shrinking z and stretching its row would then lower the penalty for nothing."""
    torch.manual_seed(0)
    sae = scrambled(standard_april.SAE(6, 20))
    x_BD = torch.randn(30, 6, dtype=torch.float64)
    _, terms = sae.loss(base.Batch(x_BD), WARMING)
    terms["l1"].backward()
    row_FD = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    assert torch.allclose(sae.W_dec.grad, sae.encode(x_BD).detach().mean(0)[:, None] * row_FD, rtol=1e-5)
