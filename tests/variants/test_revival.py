"""Dead features of ReLU variants: resampling (standard, gated) and jumprelu's auxiliary term; when none are counted."""

import math

import pytest
import torch

import experiment
import variants
from runs import training_log
from runs.clock import Clock
from tests.variants.common import SMOLLM, preflight
from variants import base, gated, jumprelu, standard
from variants.kit import revival
from variants.kit.ranks import mean
from variants.preflight import ways

DEAD = [1, 4, 5]


def trained(module, resample_steps: int, stop: int = 10, n_features: int = 12):
    """An SAE of which three features died before its first step, after some of 50 steps, and its optimiser."""
    torch.manual_seed(0)
    sae = module.SAE(6, n_features, resample_steps=resample_steps)
    bias = sae.b_gate if module is gated else sae.b_enc
    bias.data[DEAD] = -100.0
    optimizer = experiment.make_optimizer(sae, 1e-3)
    for step in range(stop):
        x_BD = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)) / 6**0.5 + 0.3
        batch, progress = base.Batch(x_BD), base.Progress(step, 50, 20 * step, 1000)
        experiment.train_step(sae, optimizer, batch, progress)
    return sae, optimizer, batch


@pytest.mark.parametrize("module", [standard, gated])
def test_dead_features_begin_anew_at_badly_reconstructed_tokens(module):
    """Fails if a living feature is touched, or rows, norms, biases or Adam's moments are other than the paper's."""
    before, _, _ = trained(module, 0)
    sae, optimizer, batch = trained(module, 10)  # the tenth step looks for the first time
    living = [i for i in range(12) if i not in DEAD]
    norm = before.W_enc[:, living].norm(dim=0).mean()
    centred_BD = batch.x - batch.x.mean(0)
    for i in DEAD:
        cosine_B = torch.cosine_similarity(sae.W_dec[i], centred_BD)
        assert cosine_B.max() > 1 - 1e-6 and sae.W_dec[i].norm().item() == pytest.approx(1, rel=1e-5)
        assert torch.allclose(sae.W_enc[:, i], 0.2 * norm * sae.W_dec[i], rtol=1e-4)
    for name, p in sae.named_parameters():
        old, features = dict(before.named_parameters())[name], {"W_dec": 0, "W_enc": 1, "b_dec": None}.get(name, 0)
        if features is None:
            assert torch.equal(p, old)
            continue
        assert torch.equal(p.movedim(features, 0)[living], old.movedim(features, 0)[living]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            rows_F = optimizer.state[p][moment].movedim(features, 0)
            assert not rows_F[DEAD].any() and (moment == "exp_avg" and module is gated or rows_F[living].any()), name
        if name == "r_mag":
            assert not p[DEAD].any()
    pre = sae.gate_and_magnitude if module is gated else sae.pre_activations
    zero = torch.stack([*pre(batch.x.mean(0, keepdim=True))])[..., DEAD]  # the mean token is where they begin to fire
    assert zero.abs().max() < 1e-6 and (sae.encode(batch.x)[:, DEAD] > 0).any(0).all()


def test_features_that_begin_anew_learn_and_are_alive():
    """Fails if resampling does not bring features back for good, or where it is off."""
    for steps, expected in ((0, 0.0), (10, 1.0)):
        sae, _, batch = trained(standard, steps, 50)
        assert (sae.encode(batch.x)[:, DEAD] > 0).any(0).float().mean() == expected


def test_when_features_begin_anew():
    """Fails if looks are not evenly spread, fall into the last fifth, or a short run has none."""
    def looks(total, every):
        return [s + 1 for s in range(total) if revival.due(base.Progress(s, total, s, total), every)]

    assert looks(200_000, 25_000) == [25_000 * i for i in range(1, 7)]
    assert looks(156, 25_000) == [31, 62, 93, 124]
    assert looks(100, 30) == [20, 40, 60, 80] and looks(100, 0) == looks(4, 25_000) == []


def test_tokens_are_drawn_by_the_square_of_their_loss():
    """Fails if the probability is not that of loss², or fewer losses than wanted are above 0."""
    counts_B = torch.zeros(3)
    for seed in range(4000):
        counts_B[revival.drawn(torch.tensor([1.0, 2.0, 3.0]), 1, seed)] += 1
    expected_B = 4000 * torch.tensor([1.0, 4.0, 9.0]) / 14
    assert ((counts_B - expected_B).abs() < 4 * expected_B.sqrt()).all()
    assert sorted(revival.drawn(torch.zeros(5), 5, 0).tolist()) == [0, 1, 2, 3, 4]


def test_more_dead_features_than_tokens_and_none_alive():
    """Fails if a batch is asked for more tokens than it has, or a mean over no living feature makes NaN of weights."""
    torch.manual_seed(0)
    sae = standard.SAE(6, 40, resample_steps=1)
    sae.tokens_since_fired += 10**6
    batch, progress = base.Batch(torch.randn(8, 6)), base.Progress(0, 5, 0, 40)
    before = sae.W_dec.detach().clone()
    sae.revive(experiment.make_optimizer(sae, 1e-3), batch, progress)
    assert (sae.W_dec != before).any(1).sum() == 8 and all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("value", [-1, 2.5, "often"])
def test_resample_steps_is_a_count(value):
    """Fails if nonsense is not refused in one line that names the flag."""
    with pytest.raises(ValueError, match="--hyper resample_steps = .*\n.*resample_steps=25000"):
        standard.SAE(6, 40, resample_steps=value)


@pytest.mark.parametrize("name", ["standard", "gated"])
def test_an_sae_that_is_spread_is_not_resampled(name):
    """Fails if that is said at the first look, far into a run, or where nothing is resampled or spread."""
    module, asked = variants.load(name), {".a": {}, ".b": dict(resample_steps=25_000)}
    with pytest.raises(ValueError, match="resample_steps = 25000: .*memory\n.*--shard.*--d_sae"):
        ways.check(module, asked, True, "")
    ways.check(module, asked, False, "")
    ways.check(module, {"": dict(resample_steps=0)}, True, "")


def test_auxk_reaches_dead_features_of_jumprelu():
    """Fails if dead features get no gradient from it, living ones do, or the loss without it is another one."""
    torch.manual_seed(0)
    sae, x_BD = jumprelu.SAE(8, 40, target_l0=4, auxk_alpha=0.5), torch.randn(64, 8)
    sae.theta.data[30:] = 5.0  # above what any activation reaches
    sae.tokens_since_fired[30:] = 10**9
    progress = base.Progress(50, 100, 5000, 10_000)
    loss, terms = sae.loss(base.Batch(x_BD), progress)
    terms["auxk"].backward()
    assert (sae.W_dec.grad.norm(dim=1) > 0)[30:].all() and not sae.W_dec.grad[:30].any()
    assert (sae.W_enc.grad.norm(dim=0) > 0)[30:].all()
    sae.auxk_alpha = 0.0
    without, parts = sae.loss(base.Batch(x_BD), progress)
    assert loss.item() == pytest.approx(without.item() + 0.5 * terms["auxk"].item(), rel=1e-6)
    assert set(parts) == {"reconstruction", "sparsity"}


def test_what_is_not_counted_is_not_said_to_be_0(tmp_path):
    """Fails if a loss that never says what fired has a dead share, no note says so, or one that does lost its own."""
    source = variants.path("standard").read_text(encoding="utf-8")
    (tmp_path / "mute.py").write_text(source.replace("        self.note_fired(z_BF)\n", ""), encoding="utf-8")
    shares = []
    for name in ("standard", str(tmp_path / "mute.py")):
        torch.manual_seed(0)
        sae = variants.load(name).SAE(6, 40)
        batch, progress = base.Batch(torch.randn(64, 6)), base.Progress(0, 5, 0, 320)
        job = experiment.Job("layer_2", 2, {}, sae, experiment.make_optimizer(sae, 1e-3))
        recent = {job.name: [experiment.train_step(sae, job.optimizer, batch, progress)]}
        rows = training_log.rows([job], recent, {job.name: batch.x}, progress, 64, Clock(), 1, mean)
        training_log.say_rows(rows, 320)
        shares.append((rows[0]["dead_share"], training_log.last_means(rows, job.name)))
    (counted, means), (mute, mute_means) = shares
    assert counted == 0 and means["training.dead_share"] == 0
    assert mute is None and "training.dead_share" not in mute_means and math.isfinite(mute_means["training.final_loss"])
    notes = preflight(tmp_path / "mute.py", SMOLLM, allow_identical=True).notes
    assert sum("never calls self.note_fired" in note for note in notes) == 1
