"""Tokens of huge norm: which are left out, what a block then holds, and how a run goes on without them."""

import json

import pytest
import torch

import experiment
from runs import settings as checks
from tests import PROJECT
from tests.small_run import command, fail_at_checkpoint
from variants.kit import norms

pytestmark = pytest.mark.usefixtures("no_pages")


def block():
    """Six tokens of norms 1 to 6 (layer 0), and 1 but for the first's 50 (layer 3); pairs with a, of tokens i < j."""
    x_ND = torch.zeros(6, 2)
    x_ND[:, 1] = torch.arange(1, 7)
    other_ND = torch.ones(6, 2).div(2**0.5)
    other_ND[0] *= 50
    query_P, key_P = torch.tensor([[2, 3, 4, 5, 5], [1, 0, 2, 3, 4]], dtype=torch.int32)
    return dict(x_0=x_ND, x_3=other_ND, bos_share=torch.tensor(0.5), tokens_N=torch.arange(10, 16, dtype=torch.int32),
                place_N=torch.tensor([1, 2, 4, 11, 12, 13], dtype=torch.int32), **{
                    "a/pair_query_P": query_P, "a/pair_key_P": key_P,
                    "a/pair_attention_PA": torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]])})


def test_a_block_holds_the_others_alone():
    """Fails if a token at the bound goes, one above at either layer stays, or a pair points at another token."""
    found = block()
    assert norms.bound(found["x_0"], 1.5) == 4.5  # torch's median: the lower of 3 and 4
    assert norms.leave_out(found, {0: 4.0, 3: 10.0}) == 3
    assert found["tokens_N"].tolist() == [11, 12, 13] and found["place_N"].tolist() == [2, 4, 11]
    assert found["x_0"][:, 1].tolist() == [2, 3, 4] and found["x_3"].norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    pairs = zip(found["a/pair_query_P"].tolist(), found["a/pair_key_P"].tolist(),
                found["a/pair_attention_PA"].squeeze(1).tolist())
    assert list(pairs) == [(1, 0, pytest.approx(0.1))]  # of the tokens 12 and 11
    assert found["a/pair_query_P"].dtype == found["place_N"].dtype == torch.int32


def test_a_block_without_any_is_not_copied_and_one_without_others_is_refused():
    """Fails if the usual block costs a copy, or an empty one reaches training."""
    found, before = block(), block()
    held = found["x_0"]
    assert norms.leave_out(found, {0: 6.0, 3: 50.1}) == 0 and found["x_0"] is held
    assert norms.leave_out(found, {0: None, 3: None}) == 0 and all(torch.equal(found[k], before[k]) for k in before)
    with pytest.raises(ValueError, match="leaves out all 6 tokens"):
        norms.leave_out(found, {0: 0.5})
    with pytest.raises(ValueError, match="needs one process"):
        norms.check(10.0, 2)
    norms.check(None, 2)
    nothing_trained = experiment.Settings(num_tokens=0, init_from="an SAE", max_norm_ratio=10.0)
    with pytest.raises(ValueError, match="--max_norm_ratio=10 is measured on what is trained on"):
        checks.check_sizes(nothing_trained)


def test_a_short_order_goes_round():
    """Fails if a step lacks tokens, or an order that is long enough is touched."""
    assert norms.repeated(torch.tensor([2, 0, 1]), 8).tolist() == [2, 0, 1, 2, 0, 1, 2, 0]
    assert norms.repeated(torch.tensor([2, 0, 1]), 2).tolist() == [2, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["topk", f"{PROJECT}/tests/fixtures/good_variants/attention_pairs.py"])
def test_a_run_without_them_is_as_long_and_is_resumed(cache, tmp_path, monkeypatch, variant):
    """Fails if the bound is measured anew in a later block, steps are lost, or evals, files and saved SAE lack it."""
    more = [f"--variant={variant}", "--max_norm_ratio=1.05", "--evals=core"]
    assert experiment.main(command(tmp_path / "whole", cache, *more)) == 0
    section = json.loads((tmp_path / "whole/final_info.json").read_text())["layer_2"]
    assert 0.05 < section["means"]["training.left_out_share"] < 0.5
    assert section["config"]["steps"] == section["means"]["training.steps"] == 38
    metadata = json.loads((tmp_path / "whole/sae/layer_2/cfg.json").read_text())["metadata"]
    assert metadata["max_norm_ratio"] == section["config"]["max_norm_ratio"] == 1.05
    assert metadata["max_norm"] == section["config"]["max_norm"] > section["means"]["core.l2_norm_in"]
    stopped = command(tmp_path / "stopped", cache, *more)
    fail_at_checkpoint(3, stopped, monkeypatch)
    assert experiment.main(stopped) == 0
    assert "continuing from step" in (tmp_path / "stopped/log.txt").read_text()
    assert (tmp_path / "stopped/final_info.json").read_bytes() == (tmp_path / "whole/final_info.json").read_bytes()


def test_a_saved_sae_is_evaluated_without_them_again(cache, tmp_path):
    """Fails if an SAE whose training left tokens out is evaluated on them once it is read back, or nothing says so."""
    assert experiment.main(command(tmp_path / "trained", cache, "--max_norm_ratio=1.05", "--evals=core")) == 0
    again = ["--evals=core", f"--init_from={tmp_path / 'trained/sae'}", "--num_tokens=0"]
    assert experiment.main(command(tmp_path / "again", cache, *again)) == 0
    trained, read = (json.loads((tmp_path / run / "final_info.json").read_text())["layer_2"]
                     for run in ("trained", "again"))
    measured = {name: value for name, value in trained["means"].items() if name.startswith("core.")}
    found = {name: read["means"][name] for name in measured}
    assert found == pytest.approx(measured, rel=1e-4) and read["config"]["max_norm"] == trained["config"]["max_norm"]
    assert trained["config"]["evals"]["core"]["max_norm_ratio"] == 1.05
