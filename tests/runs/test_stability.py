"""Which features come back under another seed, and which a baseline has not: decoders in the folders of runs."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import variants
from runs import beside, compare, report, seeds, stability
from runs.reading import read
from tests.runs.records import CE, entry, record
from variants.kit import saving

EYE = torch.eye(4)
TURNED = torch.tensor([[0.0, 0, 0, 2], [3, 4, 0, 0], [0, 1, 0, 0], [0, 0, 5, 0]])  # cosines with EYE: 1, .6 or .8, 1, 1


def saved(path, rows_FD, density=None, **config):
    """A run's folder with a decoder and, if given, what core says of each feature's firing."""
    sae = path / "sae/layer_3"
    sae.mkdir(parents=True)
    save_file({"W_dec": rows_FD.contiguous()}, sae / "sae_weights.safetensors")
    (sae / "cfg.json").write_text('{"architecture": "topk"}')
    if density is not None:
        details = [{"index": i, "feature_density": value} for i, value in enumerate(density)]
        (path / "eval_results/core").mkdir(parents=True)
        (path / "eval_results/core/topk_layer_3_eval_results.json").write_text(
            json.dumps({"eval_result_details": details}))
    config = {"variant": "topk", "hyper": {"k": 2}, "seed": 0} | config
    record(path, {"layer_3": entry({"core.l0": 30.0, CE: 0.9}, {CE: 0.1}, **config)})
    return str(path)


def test_jackknife_over_seeds():
    """Fails if pairs count as independent: of .2, .5, .8 the means without a seed are .8, .5, .2, √(2/3 · .18)."""
    assert stability.jackknife([0.2, 0.5, 0.8], 3) == pytest.approx(math.sqrt(0.12))
    assert stability.jackknife([0.2], 2) is None


def test_features_come_back_under_another_seed(tmp_path, capsys):
    """Fails if pairs, shares, or the part that fires are not those worked out by hand, or settings are mixed."""
    shuffled = EYE[[2, 0, 3, 1]]
    paths = [saved(tmp_path / "a", EYE, [0.1, 0.2, 0.3, 0.4]),
             saved(tmp_path / "b", shuffled, [0.1, 0.2, 0.3, 0.4], seed=1),
             saved(tmp_path / "c", TURNED, [0.1, 0, 0.3, 0.4], seed=2),  # the row between two does not fire
             saved(tmp_path / "d", -EYE, seed=2, hyper={"k": 3})]
    assert seeds.main([*paths, "--json"]) == 0
    first, alone = json.loads(capsys.readouterr().out)["settings"]
    assert alone["stability"] is None and first["stability"]["seeds"] == [0, 1, 2]
    assert first["metrics"][CE] == {"mean": pytest.approx(0.9), "stderr": 0.0, "runs": 3}
    found = first["stability"]
    # a and b are one dictionary; each with c: 1 + 1 + 1 and .6, since c's third row takes the one it is .8 from
    assert [pair["all"]["mean_cosine"] for pair in found["pairs"]] == pytest.approx([1, 0.9, 0.9])
    assert found["all"]["share_above_0.7"]["mean"] == pytest.approx((1 + 0.75 + 0.75) / 3)
    # pairs 1, .9, .9: without a seed .9, .9, 1
    assert found["all"]["mean_cosine"]["stderr"] == pytest.approx(math.sqrt(2 / 3 * 0.02 / 3))
    assert found["firing"]["mean_cosine"]["mean"] == pytest.approx(1)
    assert 0 < found["random"]["mean_cosine"]["mean"] < 0.9
    assert seeds.main(paths) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("topk") and "0.9333" in line)
    assert row.split() == ["topk", "3", "0.9333", "±", "0.067", "0.8333", "±", "0.17", "0.8333", "±", "0.17"]


def test_a_direction_and_its_opposite(tmp_path, capsys):
    """Fails if −d counts as d where features fire with one sign, or as another where they fire with either."""
    for variant, signs, expected in (("topk", {}, 0), ("mine", {"either_sign": True}, 1)):
        paths = [saved(tmp_path / f"{variant}{seed}", (1 - 2 * seed) * EYE, variant=variant, seed=seed, **signs)
                 for seed in (0, 1)]
        assert seeds.main([*paths, "--json"]) == 0
        (setting,) = json.loads(capsys.readouterr().out)["settings"]
        assert setting["stability"]["all"]["mean_cosine"]["mean"] == expected


def test_decoders_are_read_for_several_seeds_alone(tmp_path, monkeypatch, capsys):
    """Fails if a decoder is read where nothing is asked of it: one seed of each setting, a table of many runs."""
    paths = [saved(tmp_path / f"r{i}", EYE, hyper={"k": i}) for i in range(30)]
    monkeypatch.setattr(stability, "decoder", lambda folder: pytest.fail("read"))
    assert seeds.main([*paths, "--json"]) == 0
    assert compare.main(paths) == 0 and compare.main([*paths, "--json"]) == 0
    assert "read" not in capsys.readouterr().err


def test_damaged_decoder_is_one_line(tmp_path, capsys):
    """Fails if a damaged decoder ends in a traceback, or takes a comparison's other figures with it."""
    paths = [saved(tmp_path / name, EYE, seed=seed) for seed, name in enumerate("ab")]
    (tmp_path / "b/sae/layer_3/sae_weights.safetensors").write_bytes(b"cut off")
    assert seeds.main(paths) == 0
    out, said = capsys.readouterr()
    assert said.count("\n") == 1 and "no readable weights" in said and "0.9000" in out and "decoders of" not in out
    assert compare.main([paths[1], "--baseline", paths[0]]) == 0
    out = capsys.readouterr().out
    assert "new features not counted: " in out and "no readable weights" in out.replace("\n    ", " ") and CE in out


def test_new_features_are_counted_and_named(tmp_path, capsys):
    """Fails if a dead feature counts as new, the nearest is not the nearest, or another layer's decoder is compared."""
    base = saved(tmp_path / "base", EYE[:2], hyper={"k": 3})
    ours = saved(tmp_path / "ours", TURNED, [0.1, 0.2, 0.3, 0.0])
    assert compare.main([ours, "--baseline", base]) == 0
    # the first and the last are at right angles to all of the baseline's, and the last does not fire
    line = "1 of 3 features that fire are new (nearest cosine < 0.7 in base at L0 30.00, 0.60 on average)"
    assert line in capsys.readouterr().out
    assert compare.main([ours, "--baseline", base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"][0]["saes"][0]["new_features"]
    assert (found["count"], found["of"], found["new"], found["baseline"]) == (1, 3, [0], "base")
    report.write(tmp_path / "ours", read(ours), read(base), [])
    listed = json.loads((tmp_path / "ours/new_features.json").read_text())["layer_3"]
    assert listed["nearest"][1:3] == [1, 1] and listed["cosine"] == pytest.approx([0, 0.8, 1, 0])
    assert "1 of 3 features that fire are new" in (tmp_path / "ours/report.html").read_text()
    other = saved(tmp_path / "other", EYE, layer=4, hook_name="blocks.4.hook_resid_post")
    assert compare.main([ours, "--baseline", other]) == 0
    assert "are new" not in capsys.readouterr().out
    assert read(base)["layer_3"].section == "layer_3"


def test_kept_decoder_of_a_baseline(tmp_path, capsys):
    """Fails if a byte a number changes what is near to what, or a baseline's decoder is not found where it is kept."""
    rows_FD = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 200)[:, None]
    run = read(saved(tmp_path / "run", rows_FD))["layer_3"]
    record(tmp_path / "base", {"layer_3": entry({"core.l0": 30.0, CE: 0.9})})
    assert stability.main([str(run.path.parent), str(tmp_path / "base")]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("no encoder kept: ") and err.count("\n") == 1 and beside.DECODER in out  # it has no W_enc
    with pytest.raises(ValueError, match="its decoder alone"):
        beside.trained(read(tmp_path / "base")["layer_3"])
    file = tmp_path / "base" / "sae" / run.section / beside.DECODER
    assert file.stat().st_size < 200 * 64 + 500
    new = stability.new_features(run, [read(tmp_path / "base")["layer_3"]])
    assert new.nearest == list(range(200)) and min(new.cosine) > 0.9998 and new.index == []


def test_each_sae_is_matched_once(tmp_path, monkeypatch):
    """Fails if page and comparison of a run of many SAEs match each of them anew."""
    from runs import matching

    count, real = [], matching.nearest
    monkeypatch.setattr(matching, "nearest", lambda *about: count.append(about) or real(*about))
    base = read(saved(tmp_path / "base", EYE))["layer_3"]
    runs = [read(saved(tmp_path / f"run_{number}", TURNED))["layer_3"] for number in range(12)]
    first, again = ([stability.new_features(run, [base]) for run in runs] for _ in range(2))
    assert first == again and len(count) == 12 and isinstance(first[0].nearest[0], int)


def trained_run(path, variant, hyper, d_in=16, d_sae=64):
    """A run's folder with an SAE of a variant, a file or a name, whose weights are random; and its record."""
    torch.manual_seed(0)
    sae = variants.build(variants.load(variant), d_in, d_sae, hyper, dict(device="cpu"))
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            if name not in ("W_dec", "theta"):
                tensor.add_(0.05 * torch.randn_like(tensor))
        if isinstance(getattr(sae, "theta", None), torch.Tensor):
            sae.theta.fill_(0.02)
    metadata = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_post"}
    saving.save_sae(path / "sae/layer_3", sae, 12.0, variants.path(variant), hyper, metadata)
    record(path, {"layer_3": entry({"core.l0": 8.0, CE: 0.9}, variant=variant)})
    return read(path)["layer_3"], saving.load_sae(path / "sae/layer_3", trust_code=True)


@pytest.mark.parametrize("variant, hyper", [
    ("topk", {"k": 8}), ("standard", {}), ("jumprelu", {}), ("batch_topk", {"k": 8}), ("gated", {}),
    ("standard_april", {}), ("matching_pursuit", {"k": 4})])
def test_kept_encoder_of_a_baseline(tmp_path, capsys, variant, hyper):
    """Fails if an SAE kept in float16 finds other features than the run's own, or in other units."""
    run, whole = trained_run(tmp_path / "run", variant, hyper)
    record(tmp_path / "base", {"layer_3": entry({"core.l0": 8.0, CE: 0.9})})
    assert stability.main([str(run.path.parent), str(tmp_path / "base")]) == 0
    assert capsys.readouterr().err == ""
    kept = beside.trained(read(tmp_path / "base")["layer_3"])
    x_ND = whole.decode(torch.zeros(1, 64)) + 3 * torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    ours_NF, theirs_NF = whole.encode(x_ND), kept.encode(x_ND)
    assert ours_NF.any(1).float().mean() > 0.9  # else there is nothing to compare
    assert ((ours_NF != 0) == (theirs_NF != 0)).float().mean() > 0.998
    both_NF = (ours_NF != 0) & (theirs_NF != 0)
    assert (ours_NF[both_NF] / theirs_NF[both_NF] - 1).abs().median() < 1e-3
    assert torch.allclose(kept.W_dec, whole.W_dec, atol=0.01)
    size = sum(file.stat().st_size for file in (tmp_path / "base/sae/layer_3").glob("*.safetensors"))
    assert size < 64 * 16 * 3 + 64 * 4 * 6 + 2000  # a byte and two bytes a number, vectors in fp32, two heads


def test_no_encoder_has_its_reason(tmp_path, capsys):
    """Fails if code of one's own is run unasked, an encoder of another decoder is taken, or a reason is not said."""
    mine, base = tmp_path / "mine.py", record_of(tmp_path / "base")
    shifted = "\n    def decode(self, z):\n        return z @ self.W_dec + self.b_dec + 1\n"  # SAELens has no such
    mine.write_text((variants.FOLDER / "topk.py").read_text() + shifted)
    run, whole = trained_run(tmp_path / "own", str(mine), {"k": 8})
    with pytest.raises(ValueError, match="is code that is not in variants/"):
        beside.trained(run)
    assert beside.trained(run, trust_code=True).encode(torch.ones(1, 16)).equal(whole.encode(torch.ones(1, 16)))
    assert stability.main([str(run.path.parent), str(tmp_path / "base")]) == 1
    err = capsys.readouterr().err
    assert "is code that is not in variants/" in err and err.count("\n") == 1

    other, _ = trained_run(tmp_path / "other", "topk", {"k": 8})
    assert stability.main([str(other.path.parent), str(tmp_path / "base")]) == 0
    beside.trained(base())
    decoder = tmp_path / "base/sae/layer_3" / beside.DECODER
    save_file({"W_dec": torch.ones(64, 16, dtype=torch.int8)}, decoder)
    with pytest.raises(ValueError, match="of two SAEs"):
        beside.trained(base())
    with pytest.raises(ValueError, match="keeps no SAE of its own: there is no sae/layer_3"):
        beside.trained(record_of(tmp_path / "none")())


def record_of(path):
    """A baseline's record, and what reads it."""
    record(path, {"layer_3": entry({"core.l0": 8.0, CE: 0.9})})
    return lambda: read(path)["layer_3"]


def test_stored_baselines_encode():
    """Fails if a shipped baseline's encoder is damaged, of another SAE than its decoder, or finds no features."""
    for name, l0 in (("topk", 32), ("standard", 40.5)):
        run = read(compare.BASELINES / "smollm2-135m-instruct" / name)["layer_9"]
        sae = beside.trained(run)
        x_ND = sae.decode(torch.zeros(1, 2304)) + 3 * torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
        z_NF = sae.encode(x_ND)
        assert z_NF.shape == (64, 2304) and z_NF.any(1).all()
        if name == "topk":
            assert (z_NF != 0).sum(1).max() <= l0
