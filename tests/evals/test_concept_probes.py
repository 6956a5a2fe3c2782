"""The probes that scr and tpp share: training, effects and closed-form ablations against plain slow references."""

import math

import pytest
import torch
from torch.nn import functional

from evals.common import concept_probes, pooling
from evals.common.concept_probes import Ablation
from tests.evals.topics import PAD, D, FakeLM, make_setup, random_sae

PROBE = {"probe_train_batch_size": 16, "probe_epochs": 20, "probe_lr": 1e-3, "probe_l1_penalty": 1e-3}
CONFIG = PROBE | {"dataset_names": ["synthetic"], "probe_train_set_size": 32, "probe_test_set_size": 16,
                  "context_length": 16}


def reference_probe(x_ND, fit, select, seed):
    """SAEBench's probe from the protocol, alone and by autograd: (weight_D, epoch, best accuracy)."""
    rng = torch.Generator().manual_seed(seed)
    weight_D = torch.empty(1, x_ND.shape[1])
    torch.nn.init.kaiming_uniform_(weight_D, a=math.sqrt(5), generator=rng)
    bias = torch.empty(1).uniform_(-1 / math.sqrt(x_ND.shape[1]), 1 / math.sqrt(x_ND.shape[1]), generator=rng)
    probe = torch.nn.Linear(x_ND.shape[1], 1)
    probe.load_state_dict({"weight": weight_D, "bias": bias})
    adam, (row_M, label_M), best = torch.optim.AdamW(probe.parameters(), lr=1e-3), fit, (None, -1, 0.0)
    for epoch in range(20):
        for index in torch.randperm(len(row_M), generator=rng).split(16):
            loss = functional.binary_cross_entropy_with_logits(probe(x_ND[row_M[index]])[:, 0], label_M[index].float())
            adam.zero_grad()
            (loss + 1e-3 * probe.weight.abs().sum()).backward()
            adam.step()
        accuracy = ((probe(x_ND[select[0]])[:, 0] > 0) == (select[1] == 1)).float().mean().item()
        if accuracy > best[2]:
            best = (probe.weight.detach().clone()[0], epoch, accuracy)
    return best


def test_probes_trained_together_are_the_probes_trained_alone():
    """Fails for another initialisation, optimiser, penalty, row order or epoch, or if probes touch each other."""
    g = torch.Generator().manual_seed(0)
    x_ND = torch.randn(160, D, generator=g)
    fits, selects = [], []
    for p in range(4):
        row_M, label_N = torch.randperm(160, generator=g), (x_ND[:, p] + torch.randn(160, generator=g) > 0).long()
        fits.append((row_M[:90], label_N[row_M[:90]]))  # the last batch of an epoch has 10 rows
        selects.append((row_M[90:], label_N[row_M[90:]]))
    together = concept_probes.fit(x_ND, fits, selects, [torch.Generator().manual_seed(s) for s in range(4)], PROBE)
    alone = [reference_probe(x_ND, fits[s], selects[s], s) for s in range(4)]
    assert together.epoch_P.tolist() == [epoch for _, epoch, _ in alone] and len(set(together.epoch_P.tolist())) > 1
    torch.testing.assert_close(together.weight_PD, torch.stack([weight_D for weight_D, _, _ in alone]), atol=1e-6,
                               rtol=1e-5)


def test_corrected_probes_see_no_test_row(tmp_path):
    """Fails if a test row chooses the corrected probes' epoch, or the compatible ones' is not chosen by test rows."""
    x_ND = torch.randn(120, D, generator=torch.Generator().manual_seed(1))
    label_N = (x_ND[:, 0] + torch.randn(120, generator=torch.Generator().manual_seed(2)) > 0).long()

    def trained(flip):
        def examples(name, rng):
            return tuple((row_M, label_N[row_M] ^ swap)
                         for row_M, swap in ((torch.arange(80), 0), (torch.arange(80, 120), flip)))
        return concept_probes.trained(make_setup(tmp_path, CONFIG), "set", ["a", "b"], examples, x_ND)

    plain, flipped = trained(0), trained(1)
    assert torch.equal(plain["corrected"].weight_PD, flipped["corrected"].weight_PD)
    assert not torch.equal(plain["compatible"].weight_PD, flipped["compatible"].weight_PD)


@pytest.mark.parametrize("kind", ["compatible", "corrected"])
def test_closed_form_is_the_ablation_of_every_token(tmp_path, kind):
    """Fails if what features add at masked positions is not in the compatible ablation, or is in the corrected one."""
    sae, setup = random_sae(3), make_setup(tmp_path, CONFIG)
    sets = pooling.labelled(setup)
    (texts,) = concept_probes.pooled(setup, {"sae": sae}, "tpp", sets, {"sae": []})
    found = concept_probes.Probes(torch.randn(2, D, generator=torch.Generator().manual_seed(4)),
                                  torch.tensor([0.3, -0.2]), torch.zeros(2))
    ablation = concept_probes.ablations({"compatible": found, "corrected": found}, texts, "sae", sae)[kind]
    selected_n, row_m = torch.tensor([7, 2, 21, 11]), torch.tensor([5, 40, 2])

    ((tokens_NT, length_N, _),) = sets.values()
    for row, logit_P in zip(row_m, ablation.logits(row_m, selected_n)):
        tokens_1T = tokens_NT[row][None]
        real_T = (torch.arange(tokens_1T.shape[1]) < length_N[row]) & (tokens_1T[0] > PAD)
        x_TD = FakeLM().residual(tokens_1T, 3)[0] * real_T[:, None]
        changed_TD = x_TD - sae.encode(x_TD)[:, selected_n] @ sae.W_dec[selected_n]
        if kind == "corrected":
            changed_TD = changed_TD * real_T[:, None]
        pooled_D = changed_TD.sum(0) / real_T.sum()
        torch.testing.assert_close(logit_P, found.weight_PD @ pooled_D + found.bias_P, atol=1e-4, rtol=1e-4)
    assert not real_T[1:].all(), "no text is padded: the two kinds would be the same"


def test_effects_by_hand():
    """Fails if a mean is taken over all rows, or if features without effect are ablated to make up the number."""
    z_NF = torch.tensor([[4.0, 0.0, 1.0], [2.0, 0.0, 1.0], [1.0, 0.0, 3.0], [9.0, 9.0, 9.0]])
    ablation = Ablation(torch.zeros(4, 1), torch.ones(3, 1), z_NF, torch.zeros(3), torch.zeros(4))
    effect_PF = ablation.effects([(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 1]))])
    assert effect_PF.tolist() == [[2.0, 0.0, -2.0]]
    assert concept_probes.strongest(effect_PF[0].abs(), 3).sort().values.tolist() == [0, 2]
    assert concept_probes.strongest(torch.tensor([0.5, 3.0, 2.0, 1.0]), 2).tolist() == [1, 2]
    assert len(concept_probes.strongest(torch.zeros(3), 2)) == 0
