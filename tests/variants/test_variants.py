"""The shared mathematics of variants against dense references, and what is saved."""

import shutil
import subprocess
import sys

import pytest
import torch

import experiment
import variants
import variants.kit.saving
from tests import OWN_VARIANTS, PROJECT
from tests.variants.common import raw_activations, read_by_both
from variants import base, frozen_decoder, standard, topk
from variants.kit import losses
from variants.kit.scale import stream_scale
from variants.kit.trained import TrainedSAE

LATE = base.Progress(50, 100, 5000, 10_000)


@pytest.mark.parametrize("F", [20, 120])
def test_topk_sparse_paths_equal_dense_autograd(F):
    """Fails if a gradient of encoder, decoder or auxk, sparse or dense by width, is not plain autograd's in fp64."""
    torch.manual_seed(0)
    B, D, K = 9, 6, 4
    assert base.sparse_pays(torch.device("cpu"), K, F) == (F == 120)
    sae = topk.SAE(D, F, k=K).double()
    sae.b_enc.data.normal_(0, 0.1)
    sae.b_dec.data.normal_(0, 0.1)
    sae.tokens_since_fired[::3] = 10**9
    x_BD = torch.randn(B, D, dtype=torch.float64)
    loss, terms = sae.loss(base.Batch(x_BD), LATE)
    loss.backward()
    sparse = {name: p.grad.clone() for name, p in sae.named_parameters()}

    sae.zero_grad()
    acts_BF = torch.relu((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc)
    top_BK, index_BK = acts_BF.topk(K)
    e_BD = x_BD - torch.zeros_like(acts_BF).scatter(1, index_BK, top_BK) @ sae.W_dec - sae.b_dec
    dead_BF = torch.where(torch.arange(F) % 3 == 0, acts_BF, -torch.inf)
    aux_BK, aux_index_BK = dead_BF.topk(D // 2)
    aux_BD = torch.zeros_like(acts_BF).scatter(1, aux_index_BK, aux_BK) @ sae.W_dec
    residual_BD = e_BD.detach()
    auxk = ((residual_BD - aux_BD) ** 2).sum(1).mean() / ((residual_BD - residual_BD.mean(0)) ** 2).sum(1).mean()
    dense = (e_BD**2).sum(1).mean() + auxk / 32
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(),
                                        rel=1e-12) and terms["auxk"].item() == pytest.approx(auxk.item(), rel=1e-12)
    for name, p in sae.named_parameters():
        assert torch.allclose(sparse[name], p.grad, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("shift", [0.0, 2.3])
def test_products_of_few_positive_features_equal_dense_autograd(shift):
    """Fails if a product or gradient from the positive entries alone is not plain autograd's, also in empty rows."""
    torch.manual_seed(0)
    pre_BF, W_FN = torch.randn(6, 2000, dtype=torch.float64) - shift, torch.randn(2000, 5, dtype=torch.float64)
    pre_BF[[0, 3, 5]] = -1.0
    assert base.few_positive(pre_BF.relu()) == (shift > 0)
    results = []
    for product in (base.relu_product, torch.matmul):
        pre, W = pre_BF.clone().requires_grad_(), W_FN.clone().requires_grad_()
        product_BN = product(pre.relu(), W)
        product_BN.pow(3).sum().backward()
        results.append((product_BN.detach(), pre.grad, W.grad))
    for ours, dense in zip(*results):
        assert torch.allclose(ours, dense, rtol=1e-10, atol=1e-10)


def test_auxk_reaches_dead_features_and_only_them():
    """Fails for the inert auxk of ranking after top-k (no gradient at all), and if living features are ranked too."""
    torch.manual_seed(0)
    sae = topk.SAE(8, 40, k=4)
    x_BD = torch.randn(64, 8)
    dead_F = torch.arange(40) >= 30
    e_BD = torch.randn(64, 8)
    base.auxk_loss(sae, x_BD, e_BD, base.dense_activations(sae, x_BD, 4), dead_F).backward()
    moved_F = sae.W_dec.grad.norm(dim=1) > 0
    assert moved_F[30:].all() and not moved_F[:30].any()
    assert (sae.W_enc.grad.norm(dim=0) > 0)[30:].all()
    assert base.auxk_loss(sae, x_BD, e_BD, base.dense_activations(sae, x_BD, 4), torch.zeros(40, dtype=torch.bool)) == 0


def test_auxk_of_a_residual_without_variance_is_zero():
    """Fails if one token, equal tokens or a perfect reconstruction give 1e10 or a gradient, or little is none."""
    torch.manual_seed(0)
    sae, dead_F = topk.SAE(8, 40, k=4), torch.arange(40) >= 30
    x_BD, e_D = torch.randn(64, 8), torch.randn(8)
    little_BD = 1e-5 * torch.randn(64, 8)
    for e_BD in (e_D[None], e_D.expand(64, 8), e_D + little_BD, torch.zeros(64, 8), little_BD):
        sae.zero_grad(set_to_none=False)
        loss = base.auxk_loss(sae, x_BD[:len(e_BD)], e_BD, sae.pre_activations(x_BD[:len(e_BD)]).relu(), dead_F)
        loss.backward()
        assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in sae.parameters())
    e_BD = 0.01 * torch.randn(64, 8)
    found = losses._of_variance(e_BD, 0.005 * torch.ones(64, 8))
    assert found == (e_BD - 0.005).pow(2).sum(1).mean() / (e_BD - e_BD.mean(0)).pow(2).sum(1).mean()


@pytest.mark.parametrize("share", [0.0, 0.6, 0.7, 0.99])
def test_a_dominant_mean_is_where_b_dec_begins(share):
    """Fails if a mean of 1.5 or ten times the spread stays in scale, b_dec or encoder, or less of one is touched."""
    torch.manual_seed(0)
    mean_D, noise_ND = torch.nn.functional.normalize(torch.randn(16), dim=0), torch.randn(20_000, 16) / 4
    raw_ND = 7 * (share**0.5 * mean_D + (1 - share) ** 0.5 * (noise_ND - noise_ND.mean(0)))
    scale, found = stream_scale(raw_ND)
    assert found == pytest.approx(share, abs=0.01)
    expected_D = mean_D * (share / (1 - share)) ** 0.5
    spread = {0.7: 7 * 0.3**0.5, 0.99: 0.7}  # 7·√(1 − share): the spread alone is made 1
    assert scale == pytest.approx(spread.get(share, 7.0), rel=0.01)
    for name in ("standard", "jumprelu", "gated"):
        sae = variants.load(name).SAE(16, 64)
        sae.initialise(raw_ND[:8192] / scale)
        if share < 0.65:
            assert not any(p.any() for name, p in sae.named_parameters() if name.startswith("b_"))
            continue
        assert (sae.b_dec - expected_D).norm() < 0.05
        active_F = (sae.encode(raw_ND / scale) > 0).float().mean(0)
        assert active_F.min() > 0.3 and active_F.max() < 0.7  # as of a centred stream: not by the sign of mean·W_enc


@pytest.mark.parametrize("whole, first", [(0.6, 0.7), (0.7, 0.6)])
def test_whether_the_mean_dominates_is_decided_once(whole, first):
    """Fails if b_dec goes by the first tokens' share of the mean where the scale went by the whole block's."""
    torch.manual_seed(0)
    mean_D, noise_ND = torch.nn.functional.normalize(torch.randn(16), dim=0), torch.randn(20_000, 16) / 4
    noise = [whole / first - whole, 0.0]  # variance of the first 8,192 tokens, and of the others: 1 − whole together
    noise[1] = (20_000 * (1 - whole) - 8192 * noise[0]) / (20_000 - 8192)
    raw_ND = whole**0.5 * mean_D + torch.cat([noise_ND[:8192] * noise[0]**0.5, noise_ND[8192:] * noise[1]**0.5])
    scale, share = stream_scale(raw_ND)
    sae = standard.SAE(16, 64)
    sae.initialise(raw_ND[:8192] / scale)
    assert share == pytest.approx(whole, abs=0.01) and bool(sae.b_dec.any()) == (whole > 0.65)


@pytest.mark.parametrize("every", [13, 5, 2])
def test_auxk_is_its_formula(every):
    """Fails if few dead features, more than auxk takes, or half have another loss or gradient than the formula."""
    auxk_against_its_formula("cpu", every)


def auxk_against_its_formula(device, every):
    results, dead_F = [], torch.arange(40, device=device) % every == 1
    x_BD, e_BD = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1)).double().to(device)
    for graph in (None, True, False):
        torch.manual_seed(0)
        sae = topk.SAE(8, 40, k=4).double().to(device)
        sae.tokens_since_fired[dead_F] = 100
        sae.look(base.Progress(5, 10, 500, 1000))
        torch.nn.init.normal_(sae.b_enc), torch.nn.init.normal_(sae.b_dec)
        acts_BF = torch.relu(sae.pre_activations(x_BD))
        if graph is None:  # the formula
            index_BK = acts_BF.masked_fill(~dead_F, -1).topk(min(4, int(dead_F.sum()))).indices
            found_BD = torch.zeros_like(acts_BF).scatter(1, index_BK, acts_BF.gather(1, index_BK)) @ sae.W_dec
            loss = (e_BD - found_BD).pow(2).sum() / (e_BD - e_BD.mean(0)).pow(2).sum()
        else:
            loss = base.auxk_loss(sae, x_BD, e_BD, acts_BF if graph else acts_BF.detach(), dead_F)
        loss.backward()
        results.append((loss.detach(), sae.W_dec.grad, sae.W_enc.grad, sae.b_enc.grad, sae.b_dec.grad))
    for formula, *by_column in zip(*results):
        for found in by_column:
            assert formula.abs().sum() > 0 and torch.allclose(formula, found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dead", [None, 0, 3])
@pytest.mark.parametrize("name", [name for name in OWN_VARIANTS if variants.load(name).SAE.data_parallel])
def test_a_training_step_never_waits_for_the_device(name, dead):
    """Fails if loss, projection, clip, counters, theta or p_anneal's moves read a value back: meta has none to give."""
    with torch.device("meta"):
        sae = variants.load(name).SAE(16, 64)
        sae.dead_on_host = dead
        optimizer = torch.optim.Adam(sae.parameter_groups(1e-3), betas=sae.adam_betas, foreach=True)
        for step in (0, 10, 49, 50, 59, 90, 99):
            loss, terms = experiment.train_step(sae, optimizer, base.Batch(torch.empty(32, 16)),
                                                base.Progress(step, 100, step * 32, 3200))
    assert loss.shape == () and all(term.shape == () for term in terms.values())


def test_unit_norm_decoder_moves_on_the_sphere():
    """Fails if the norm is taken over the wrong axis of W_dec, or the gradient keeps its part along the row."""
    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(5, 3), dim=1))
    W.grad = torch.randn(5, 3)
    base.project_decoder_gradient(W)
    assert torch.allclose((W.grad * W).sum(1), torch.zeros(5), atol=1e-6)
    W.data += W.grad
    base.normalise_decoder(W)
    assert torch.allclose(W.norm(dim=1), torch.ones(5))


def test_dead_features_by_hand():
    """Fails if a counter moves when a loss is measured twice, or dies at another age than a tenth of a short run."""
    sae = standard.SAE(4, 3)
    progress = base.Progress(0, 10, 0, 1000)
    for _ in range(10):
        sae.note_fired(torch.tensor([[1.0, 0.0, 0.0]]))
        sae.note_fired(torch.tensor([[0.0, 1.0, 0.0]]))  # the last measurement before the step is the one that counts
        sae.count_step(10)
    assert sae.tokens_since_fired.tolist() == [100, 0, 100]
    assert sae.dead_features(progress).tolist() == [True, False, True]


def test_geometric_median_is_robust_where_the_mean_is_not():
    """Fails for a mean: one point far away must not move the centre."""
    x_ND = torch.cat([torch.randn(500, 3) * 0.01 + 1.0, torch.full((1, 3), 1e4)])
    assert (base.geometric_median(x_ND) - 1.0).abs().max() < 0.01


def test_theta_starts_at_the_first_value_and_waits_for_the_warm_up():
    """Fails if the average starts at 0 (a short run would be biased low) or moves before its time."""
    theta = torch.tensor(-1.0)
    base.update_theta(theta, torch.tensor([[0.5, 0.0, 0.7]]), base.Progress(1, 100, 0, 1))
    assert theta == -1.0
    base.update_theta(theta, torch.tensor([[0.5, 0.0, 0.7]]), base.Progress(6, 100, 0, 1))
    assert theta == 0.5
    base.update_theta(theta, torch.tensor([[1.5]]), base.Progress(7, 100, 0, 1))
    assert theta == pytest.approx(0.5 + 0.2)  # a window of 5 steps, a twentieth of the run


def test_learning_rate_by_hand():
    """Fails if warm-up or decay is not scaled down for a short run: 5 % and the last fifth."""
    factor = [base.Progress(s, 100, 0, 1).lr_factor() for s in range(100)]
    assert factor[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]) and factor[80] == 1.0
    assert factor[90] == pytest.approx(0.5) and factor[99] == pytest.approx(0.05)


@pytest.mark.parametrize("name, hyper", [("standard", {}), ("topk", {"k": 5})])
def test_saved_sae_loads_in_saelens_and_here_with_the_same_features(tmp_path, name, hyper):
    """Fails if the normalisation is folded into the wrong weights: scale 37 and non-zero biases."""
    torch.manual_seed(0)
    sae = variants.build(variants.load(name), 12, 40, hyper)
    base.normalise_decoder(sae.W_dec)
    sae.b_enc.data.normal_(0, 0.1)
    sae.b_dec.data.normal_(0, 0.3)
    x_raw = raw_activations()
    trained, theirs, ours = read_by_both(tmp_path / "layer_1", name, sae, hyper)
    features = trained.encode(x_raw)
    assert (features > 0).any() and torch.allclose(features, sae.encode(x_raw / 37) * 37, rtol=1e-4, atol=1e-4)
    for other in (theirs, ours):
        assert torch.allclose(other.encode(x_raw), features, rtol=1e-5, atol=1e-4)
        assert torch.allclose(other.decode(features), trained.decode(features), rtol=1e-5, atol=1e-3)


def test_a_variant_saelens_does_not_know_is_saved_whole(tmp_path):
    """Fails if the own format forgets hyper-parameters, buffers or the scale."""
    file = tmp_path / "mine.py"
    file.write_text("import torch\nfrom variants import base\n\nclass SAE(base.SAE):\n"
                    "    def __init__(self, d_in, d_sae, power=1.0):\n        super().__init__(d_in, d_sae)\n"
                    "        self.power = power\n"
                    "        self.register_buffer('offset', torch.zeros(d_sae))\n"
                    "    def encode(self, x):\n        return torch.relu(self.pre_activations(x) - self.offset) ** "
                    "self.power\n"
                    "    def loss(self, batch, progress):\n        return self.encode(batch.x).sum(), {}\n")
    module = variants.load(str(file))
    sae = variants.build(module, 6, 10, {"power": 2.0})
    sae.offset += 0.05
    variants.kit.saving.save_sae(tmp_path / "sae", sae, 5.0, file, {"power": 2.0}, {})
    x = torch.randn(20, 6) * 5
    assert torch.equal(variants.kit.saving.load_sae(tmp_path / "sae", trust_code=True).encode(x),
                       TrainedSAE(sae, 5.0).encode(x))


def test_a_variant_that_inherits_a_saelens_name_but_computes_something_else_is_saved_as_it_is(tmp_path):
    """Fails if an edited encode under topk's `saelens` is written as SAELens' TopK, with other features."""
    file = tmp_path / "edited.py"
    file.write_text("from variants import topk\n\nclass SAE(topk.SAE):\n    def encode(self, x):\n"
                    "        return super().encode(x) ** 2\n")
    torch.manual_seed(0)
    sae = variants.build(variants.load(str(file)), 12, 40, {"k": 5})
    variants.kit.saving.save_sae(tmp_path / "sae", sae, 3.0, file, {"k": 5}, {})
    x = torch.randn(20, 12) * 3
    assert not (tmp_path / "sae/sae_weights.safetensors").exists()
    assert torch.equal(variants.kit.saving.load_sae(tmp_path / "sae", trust_code=True).encode(x),
                       TrainedSAE(sae, 3.0).encode(x))


def test_trained_sae_has_unit_decoder_rows_whatever_the_variant_learned():
    """Fails if features are not rescaled along with the rows, or a dead zero row becomes NaN."""
    torch.manual_seed(0)
    sae = standard.SAE(6, 10)
    sae.W_dec.data *= torch.linspace(0, 3, 10)[:, None]
    trained = TrainedSAE(sae, 4.0)
    x = torch.randn(5, 6) * 4
    assert torch.allclose(trained.W_dec.norm(dim=1)[1:], torch.ones(9)) and (trained.W_dec[0] == 0).all()
    z = trained.encode(x)
    assert torch.allclose(trained.decode(z), sae.decode(sae.encode(x / 4)) * 4, atol=1e-5)
    assert torch.allclose(trained.decode(z), z @ trained.W_dec + sae.b_dec * 4, atol=1e-5)


@pytest.mark.slow
def test_a_users_own_file_beside_the_variants_is_no_matter_of_these_tests(tmp_path):
    """Fails if a further file in variants/, sound or broken, stops a test's collection or becomes a case of one."""
    project, beside = PROJECT, tmp_path / "project"
    for part in ("evals", "runs", "tests", "variants"):
        shutil.copytree(project / part, beside / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project / "experiment.py", beside)
    shutil.copy(project / "README.md", beside)
    shutil.copy(beside / "variants/topk.py", beside / "variants/mine.py")
    (beside / "variants/broken.py").write_text("import sys\nsys.exit(3)\n")
    collected = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
                               cwd=beside, text=True, capture_output=True, timeout=300)
    said = collected.stdout
    assert collected.returncode == 0 and "mine]" not in said and "broken]" not in said, said[-2000:]


@pytest.mark.parametrize("frozen, learning", [("decoder", {"W_enc", "b_enc", "b_dec"}), ("all", {"b_dec"})])
def test_what_is_frozen_stays_as_it_began(frozen, learning, tmp_path):
    """Fails if a frozen weight moves, a free one does not, Adam holds moments of the former, or a saved one is none."""
    torch.manual_seed(0)
    sae, x_ND = frozen_decoder.SAE(8, 40, k=4, frozen=frozen), torch.randn(100, 8) / 8**0.5 + 0.2
    sae.initialise(x_ND)
    optimizer = experiment.make_optimizer(sae, 3e-3)
    start = {name: p.detach().clone() for name, p in sae.named_parameters()}
    sae.tokens_since_fired[::3] = 10**9  # auxk has what to revive
    for step in range(3):
        experiment.train_step(sae, optimizer, base.Batch(x_ND), base.Progress(step, 3, 100 * step, 300))
    assert {name for name, p in sae.named_parameters() if not torch.equal(p, start[name])} == learning
    assert len(optimizer.state) == len(learning)
    assert torch.allclose(start["W_dec"].norm(dim=1), torch.ones(40))
    _, theirs, ours = read_by_both(tmp_path / "sae", "frozen_decoder", sae, {"k": 4, "frozen": frozen})
    assert theirs.cfg.architecture() == "topk"
    assert torch.allclose(ours.encode(37 * x_ND), theirs.encode(37 * x_ND), rtol=1e-4)
    assert ours.sae.frozen == frozen and not ours.sae.training


def test_an_untrained_dictionary_revives_nothing():
    """Fails if auxk is computed, reported or asked for where no feature can learn, or a weight of it is ignored."""
    sae = frozen_decoder.SAE(8, 40, k=4, frozen="all")
    _, terms = sae.loss(base.Batch(torch.randn(20, 8)), base.Progress(5, 10, 100, 200))
    assert set(terms) == {"reconstruction"}
    with pytest.raises(ValueError, match="auxk_alpha = 0.5: .*frozen=all.*\n.*frozen=decoder"):
        frozen_decoder.SAE(8, 40, k=4, auxk_alpha=0.5, frozen="all")


def test_an_untrained_dictionary_has_the_best_scale():
    """Fails if any other multiple of what random features give reconstructs the first block better."""
    torch.manual_seed(0)
    sae, x_ND = frozen_decoder.SAE(8, 40, k=20, frozen="all"), torch.randn(100, 8) / 8**0.5 + 0.2
    sae.initialise(x_ND)
    found_ND = sae.encode(x_ND) @ sae.W_dec
    errors = [(x_ND - sae.b_dec - scale * found_ND).pow(2).sum().item() for scale in (0.99, 1.0, 1.01)]
    assert min(errors) == errors[1] and torch.allclose(sae.W_enc / sae.W_enc.norm(dim=0), sae.W_dec.T, atol=1e-6)
