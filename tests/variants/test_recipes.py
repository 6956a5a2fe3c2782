"""jumprelu_tanh, abs_topk, matching_pursuit and aligned against SAELens and plain references."""

import pytest
import torch

import experiment
import variants
from tests.variants.common import GEMMA, SMOLLM, preflight, raw_activations, read_by_both
from variants import abs_topk, aligned, base, jumprelu_tanh, matching_pursuit
from variants.kit import precision
from variants.kit.hyper import hyperparameters

NAMES = ["jumprelu_tanh", "abs_topk", "matching_pursuit", "aligned"]
LATE = base.Progress(50, 100, 5000, 10_000)


def biased(sae):
    """The SAE in fp64 with biases that are not 0, every third feature dead."""
    sae = sae.double()
    for name, p in sae.named_parameters():
        if name in ("b_enc", "b_dec"):
            p.data.normal_(0, 0.1)
    sae.tokens_since_fired[::3] = 10**9
    return sae


def gradients(sae, loss) -> dict:
    sae.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters()}


def close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.any() and torch.allclose(found[name], grad, rtol=1e-9, atol=1e-12), name


# ------------------------------------------------------------------------------------------------ jumprelu_tanh


def in_their_units(D, F, sae, **given):
    """SAELens' SAE with the weights of a jumprelu_tanh one for x with E‖x‖² = D; each parameter by our name for it."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    theirs = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(
        d_in=D, d_sae=F, dtype="float64", apply_b_dec_to_input=False, jumprelu_sparsity_loss_mode="tanh",
        jumprelu_ste_to_input=True, **given)).double()
    theirs.threshold.data = theirs.threshold.data.double()
    parameters = {name: getattr(theirs, name.replace("theta", "threshold")) for name in UNIT}
    for name, power in UNIT.items():
        parameters[name].data.copy_(getattr(sae, name).data * D**power)
    return theirs, parameters


def their_step(x_BD, D, F, coefficient):
    from sae_lens.saes.sae import TrainStepInput

    return TrainStepInput(sae_in=x_BD * D**0.5, coefficients={"l0": coefficient * D}, n_training_steps=0,
                          dead_neuron_mask=torch.ones(F, dtype=torch.bool), is_logging_step=False)


UNIT = {"W_enc": 0, "W_dec": 0, "b_enc": 0.5, "b_dec": 0.5, "theta": 0.5}  # theirs are D to this power times ours


def test_jumprelu_tanh_is_that_of_saelens_in_other_units():
    """Fails if a term, its unit, the window or a gradient differs from SAELens', which takes x with E‖x‖² = D."""
    torch.manual_seed(0)
    B, D, F = 9, 16, 40
    sae = biased(jumprelu_tanh.SAE(D, F, tanh_penalty=0.02, lambda_p=0.03, c=3.0, bandwidth=0.8))
    sae.theta.data.uniform_(0.01, 0.2)
    x_BD = torch.randn(B, D, dtype=torch.float64) / D**0.5
    loss, terms = sae.loss(base.Batch(x_BD), LATE)  # half of the run: half of the penalty
    found = gradients(sae, loss)
    theirs, parameters = in_their_units(D, F, sae, jumprelu_tanh_scale=3.0, jumprelu_bandwidth=0.8,
                                        pre_act_loss_coefficient=0.03)
    out = theirs.training_forward_pass(their_step(x_BD, D, F, 0.5 * 0.02))
    parts = [out.losses[name].item() / D for name in ("mse_loss", "l0_loss", "pre_act_loss")]
    ours = [terms["reconstruction"].item(), 0.01 * terms["tanh"].item(), 0.03 * terms["below"].item()]
    # SAELens keeps thresholds in fp32
    assert ours == pytest.approx(parts, rel=1e-6) and min(parts) > 1e-3
    out.loss.backward()
    for name, p in parameters.items():
        assert p.grad.any() and torch.allclose(found[name], p.grad / D, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("eps", [1e-8, 1e-3])  # Adam's, small against the gradients and not
def test_jumprelu_tanh_steps_are_those_of_their_units(eps):
    """Fails if lr, Adam's ε or the clipped norm of any parameter is not what it is for x with E‖x‖² = D."""
    torch.manual_seed(0)
    D, F = 16, 40
    sae = biased(jumprelu_tanh.SAE(D, F, tanh_penalty=0.002))
    sae.b_enc.data += 0.3
    theirs, parameters = in_their_units(D, F, sae, jumprelu_bandwidth=2.0, pre_act_loss_coefficient=3e-6)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    adam = torch.optim.Adam(parameters.values(), eps=eps)
    optimizer = experiment.make_optimizer(sae, 1e-2)
    for group in optimizer.param_groups:
        group["eps"] *= eps / 1e-8
    norms = []
    for step in range(5):
        x_BD = torch.randn(9, D, dtype=torch.float64) / D**0.5
        progress = base.Progress(step, 20, 9 * step, 180)
        experiment.train_step(sae, optimizer, base.Batch(x_BD), progress)
        theirs.zero_grad()
        theirs.training_forward_pass(their_step(x_BD, D, F, 0.002 * step / 20)).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item())
        adam.param_groups[0]["lr"] = 1e-2 * progress.lr_factor()
        adam.step()
    assert min(norms) > 2
    for name, p in parameters.items():
        moved = (p - start[name]).norm()
        assert ((getattr(sae, name) * D ** UNIT[name] - p).norm() < 1e-4 * moved).item() and moved > 0, name


def test_a_threshold_of_jumprelu_tanh_comes_back_from_its_least():
    """Fails if theta can get to where it has no gradient, at 0 or below."""
    sae = jumprelu_tanh.SAE(16, 40)
    sae.theta.data.fill_(-1.0)
    with torch.no_grad():
        sae.after_step(None, LATE)
    assert torch.allclose(sae.theta, torch.tensor(0.1 / 4 / 100))
    loss, _ = sae.loss(base.Batch(torch.randn(200, 16) / 4), LATE)
    assert gradients(sae, loss)["theta"].all()


def test_jumprelu_tanh_begins_with_half_of_its_features_on():
    """Fails if b_enc is not the bias at which a feature fires on 10,000/F of the tokens, at most on half of them."""
    torch.manual_seed(0)
    x_ND = torch.randn(1000, 12) / 12**0.5 + 0.1
    for d_sae, share in ((64, 0.5), (40_000, 0.25)):
        sae = jumprelu_tanh.SAE(12, d_sae)
        sae.initialise(x_ND)
        fires_F = (sae.encode(x_ND[:, None])[:, 0] > 0).float().mean(0)
        assert fires_F.min() == pytest.approx(share, abs=0.002) and fires_F.max() == pytest.approx(share, abs=0.002)


# ------------------------------------------------------------------------------------------------ abs_topk


def test_abs_topk_loss_and_gradients_equal_dense_autograd():
    """Fails if a sign is lost, the choice is not by magnitude, auxk takes living or positive features only."""
    torch.manual_seed(0)
    B, D, F, k = 9, 6, 40, 4
    sae, x_BD = biased(abs_topk.SAE(D, F, k=k, auxk_alpha=0.3)), torch.randn(9, 6, dtype=torch.float64)
    loss, terms = sae.loss(base.Batch(x_BD), LATE)
    found = gradients(sae, loss)

    def largest(z_BF, n):
        least_B = z_BF.abs().sort(1, descending=True).values[:, n - 1:n]
        return torch.where(z_BF.abs() >= least_B, z_BF, 0.0)

    z_pre_BF = (x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc
    z_BF = largest(z_pre_BF, k)
    e_BD = x_BD - z_BF @ sae.W_dec - sae.b_dec
    dead_BF = largest(z_pre_BF * (torch.arange(F) % 3 == 0), D // 2)
    target_BD = e_BD.detach()
    auxk = ((target_BD - dead_BF @ sae.W_dec) ** 2).sum(1).mean() / ((target_BD - target_BD.mean(0)) ** 2).sum(1).mean()
    assert (z_BF < 0).any() and (dead_BF < 0).any() and torch.allclose(sae.encode(x_BD), z_BF)
    assert [t.item() for t in terms.values()] == pytest.approx([(e_BD**2).sum().item() / B, auxk.item()], rel=1e-12)
    close(found, gradients(sae, (e_BD**2).sum(1).mean() + 0.3 * auxk))


@pytest.mark.parametrize("note", ["note_fired", "note_fired_indices"])
def test_a_feature_below_0_has_fired(note):
    """Fails if a feature that is only ever negative counts as dead, or one that is 0 as alive."""
    sae = base.SAE(3, 5)
    if note == "note_fired":
        sae.note_fired(torch.tensor([[0.0, -0.5, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, -1.0, 0.0]]))
    else:
        sae.note_fired_indices(torch.tensor([[-0.5, 2.0], [0.0, -1.0]]), torch.tensor([[1, 3], [4, 3]]))
    sae.count_step(10)
    assert sae.tokens_since_fired.tolist() == [10, 0, 10, 0, 10]


# ------------------------------------------------------------------------------------------------ matching_pursuit


@pytest.mark.parametrize("B", [3, 200])  # by products with the residual, and by the Gram matrix
def test_matching_pursuit_is_that_of_saelens(B):
    """Fails if a choice, a value or a gradient through the steps differs from SAELens' pursuit, in fp64."""
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

    torch.manual_seed(0)
    sae, x_BD = biased(matching_pursuit.SAE(8, 60, k=5)), torch.randn(B, 8, dtype=torch.float64)
    x_BD[0] = sae.b_dec.data  # nothing to pursue
    loss, _ = sae.loss(base.Batch(x_BD), LATE)
    found = gradients(sae, loss)
    z_BF = _encode_matching_pursuit(x_BD - sae.b_dec, sae.W_dec, 0.0, 5, False)
    wanted = ((x_BD - z_BF @ sae.W_dec - sae.b_dec) ** 2).sum(1).mean()
    assert torch.allclose(sae.encode(x_BD), z_BF, rtol=1e-9, atol=1e-12) and not z_BF[0].any()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    close(found, gradients(sae, wanted))
    assert torch.equal(sae._fired_F, (z_BF > 0).any(0))


def test_matching_pursuit_by_hand():
    """Fails if the residual is not what is matched: the second choice is not the second best match of x."""
    sae = matching_pursuit.SAE(2, 4, k=2)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0], [-1.0, 0.0]])
    # x = (2, .5): matches 2, 1.9, −.5, −2; after 2·(1, 0) the residual (0, .5) matches 0, .3, −.5, 0
    z = sae.encode(torch.tensor([[[2.0, 0.5]], [[0.0, -3.0]]]))
    assert torch.allclose(z, torch.tensor([[[2.0, 0.3, 0, 0]], [[0, 0, 3.0, 0]]]))
    _, _, r_ND = sae.pursuit(torch.tensor([[2.0, 0.5]]))
    assert torch.allclose(r_ND, torch.tensor([[-0.24, 0.32]]))


def test_matching_pursuit_chooses_in_fp32_on_a_gpu(monkeypatch):
    """Fails if matches are rounded to bf16, in which 1 and 1 + 2⁻¹⁰ are the same, before the largest is chosen."""
    sae = matching_pursuit.SAE(2, 2, k=1)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [1.0, 2.0**-10]])
    monkeypatch.setattr(precision, "lower", lambda x: torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z_BF = sae.encode(torch.ones(1, 2))
    assert torch.allclose(z_BF, torch.tensor([[0.0, 1 + 2.0**-10]]), rtol=1e-6)


def test_the_gradient_of_matching_pursuit_is_gathered_once():
    """Fails if each of the k steps makes a gradient as large as the decoder."""
    sae = matching_pursuit.SAE(8, 60, k=5)
    loss, _ = sae.loss(base.Batch(torch.randn(20, 8)), LATE)
    with torch.autograd.profiler.profile() as profile:
        loss.backward()
    assert sum(event.name == "aten::embedding_dense_backward" for event in profile.function_events) == 1


# ------------------------------------------------------------------------------------------------ aligned


def test_aligned_encoder_has_an_inner_product_of_1_with_its_decoder():
    """Fails if training leaves the constraint, or the features differ between the loss and what evals and files see."""
    torch.manual_seed(0)
    sae, x_BD = aligned.SAE(8, 40, k=4), torch.randn(64, 8) / 8**0.5
    optimizer = experiment.make_optimizer(sae, 1e-2)
    start_DF = sae.W_enc.detach().clone()
    for step in range(20):
        experiment.train_step(sae, optimizer, base.Batch(x_BD), base.Progress(step, 20, step * 64, 20 * 64))
    assert (sae.W_enc - start_DF).norm() > 0.1 * start_DF.norm()
    assert torch.allclose((sae.W_enc.T * sae.W_dec).sum(1), torch.ones(40), atol=1e-5)
    assert (sae.W_enc - sae.W_dec.T).norm() > 0.05 * start_DF.norm()  # it is not tied
    assert torch.allclose(sae.aligned_encoder(), sae.W_enc, atol=1e-6)


def test_aligned_loss_and_gradients_equal_dense_autograd():
    """Fails if the encoder is not the nearest with an inner product of 1, or its gradient is not tangent to that."""
    torch.manual_seed(0)
    D, F, k = 6, 40, 4
    sae, x_BD = biased(aligned.SAE(D, F, k=k, auxk_alpha=0)), torch.randn(9, 6, dtype=torch.float64)
    base.normalise_decoder(sae.W_dec.data)  # in fp64
    sae.W_enc.data += 0.3 * torch.randn(D, F, dtype=torch.float64)
    loss, terms = sae.loss(base.Batch(x_BD), LATE)
    found = gradients(sae, loss)
    rows_FD = torch.stack([v + (1 - v @ d) * d for v, d in zip(sae.W_enc.T, sae.W_dec)])
    acts_BF = torch.relu((x_BD - sae.b_dec) @ rows_FD.T + sae.b_enc)
    z_BF = torch.where(acts_BF >= acts_BF.sort(1, descending=True).values[:, k - 1:k], acts_BF, 0.0)
    wanted = ((x_BD - z_BF @ sae.W_dec - sae.b_dec) ** 2).sum(1).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    close(found, gradients(sae, wanted))
    assert ((found["W_enc"].T * sae.W_dec).sum(1)).abs().max() < 1e-12
    with torch.no_grad():
        sae.after_step(base.Batch(x_BD), LATE)
    assert torch.allclose(sae.W_enc.T, rows_FD) and sae.loss(base.Batch(x_BD), LATE)[0].item() == pytest.approx(
        loss.item(), rel=1e-12)


def test_aligned_takes_no_keyword_that_it_does_not_heed():
    """Fails if it accepts a schedule of k, which its loss knows nothing of."""
    assert hyperparameters(aligned) == {"k": 32, "auxk_alpha": 1 / 32}


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SMOLLM, GEMMA], ids=["embedded", "gemma"])
@pytest.mark.parametrize("name", NAMES)
def test_preflight_passes_without_a_note(name, sizes):
    """Fails if preflight finds features that depend on other tokens, lost state, an idle term or a step that waits."""
    rivals = [variants.path(n) for n in ("topk", "jumprelu", *NAMES) if n != name]
    assert preflight(name, sizes, reference_files=rivals, accelerator=True).notes == []


@pytest.mark.parametrize("name, architecture", [*zip(NAMES, ["jumprelu", "abstopk", "matching_pursuit", "topk"])])
def test_saved_sae_loads_in_saelens_and_here_as_what_it_was(tmp_path, name, architecture):
    """Fails if a sign, k, threshold or centring is lost, left in normalised units, or read back as another variant."""
    torch.manual_seed(0)
    sae = variants.build(variants.load(name), 12, 40, {})
    if name != "matching_pursuit":
        sae.b_enc.data.normal_(0, 0.1)
    if name == "jumprelu_tanh":  # the others keep unit rows
        sae.W_dec.data *= torch.linspace(0.5, 2, 40)[:, None]
    sae.b_dec.data.normal_(0, 0.3)
    hyper = {}
    if name == "jumprelu_tanh":
        sae.theta.data.copy_(torch.linspace(0.02, 1, 40))
    else:
        sae.k = 5
        hyper = {"k": 5}
    x_raw = raw_activations()
    trained, theirs, ours = read_by_both(tmp_path / "layer_1", name, sae, hyper)
    assert theirs.cfg.architecture() == architecture and type(ours.sae).__module__ == f"variants.{name}"
    features = trained.encode(x_raw)
    assert 0.05 < (features != 0).float().mean() < 0.5 and (name != "abs_topk" or (features < 0).any())
    for other in (theirs, ours):
        assert torch.allclose(other.encode(x_raw), features, rtol=1e-5, atol=1e-4)
        assert torch.allclose(other.decode(features), trained.decode(features), rtol=1e-5, atol=1e-3)
