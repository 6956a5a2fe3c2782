"""Published SAEs' figures, fetched from an imitated hub in the layout that the repository's card describes."""

import json
import subprocess
import sys

import pytest

from evals.storage import network
from runs.published import chosen, main
from runs.reading import read
from tests import PROJECT
from tests.hub import serving

HOLDER = "cross-arch-panel/gemma-2-2b/batchtopk"


@pytest.fixture
def small_hub(tmp_path):
    """A hub that holds nothing yet."""
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as server:
        yield server


def results(kind, category, **metrics):
    """A file of results as SAEBench writes it."""
    of = {"model_name": "gemma-2-2b", "hook_layer": 12, "hook_name": "blocks.12.hook_resid_post", "d_in": 2304,
          "d_sae": 32768}
    return json.dumps({"eval_type_id": kind, "eval_config": {"random_seed": 42}, "sae_cfg_dict": of,
                       "eval_result_metrics": {category: metrics}}).encode()


def snapshot(place, l0, score):
    cfg = json.dumps({"architecture": "jumprelu", "d_in": 2304, "metadata": {"context_size": 1024}})
    return {f"{place}/cfg.json": cfg.encode(), f"{place}/sae_weights.safetensors": b"many bytes",
            f"{place}/core.json": results("core", "sparsity", l0=l0, ce_loss_score=score),
            f"{place}/probes.json": results("sparse_probing_sae_probes", "sae", sae_top_1_test_auc=score - 0.1)}


def published(environment, *arguments):
    return subprocess.run([sys.executable, "-m", "runs.published", *map(str, arguments)], cwd=PROJECT, env=environment,
                          capture_output=True, text=True, timeout=60)


def test_snapshots_become_stored_baselines(small_hub, tmp_path):
    """Fails if another snapshot than the one asked for is taken, evals of one are not put together, or weights come."""
    files = {"README.md": b"a card", "other/notes.json": b"{}"}
    for k in (50, 100):
        for tokens, score in ((100, 0.90), (500, 0.95), (1500, 0.97)):
            place = f"{HOLDER}/k-{k}/seed-0/snapshots/step-{tokens * 10}-tokens-{tokens}000000"
            files |= snapshot(place, k + 0.5, score)
    for seed in (0, 1):
        files |= snapshot(f"matryoshka-panel/gemma-2-2b/n-2/seed-{seed}/snapshots/step-7-tokens-300000000", 60.0, 0.9)
    small_hub.push("model", "decoderesearch/sae-snapshot-panels", files)
    for tokens, found in ((None, 1500), (450_000_000, 500), (10, 100)):
        assert {place.rpartition("-")[2] for place in chosen(files, tokens) if "k-" in place} == {f"{found}000000"}
    environment = small_hub.environment(home=tmp_path / "home")
    done = published(environment, "--out", tmp_path / "out", "--tokens", 450_000_000)
    assert done.returncode == 0, done.stderr
    saes = read(tmp_path / "out/gemma-2-2b/cross-arch-panel_batch_topk")
    assert list(saes) == ["layer_12.k_100.seed_0", "layer_12.k_50.seed_0"]
    run = saes["layer_12.k_50.seed_0"]
    assert run.means["core.l0"] == 50.5 and run.means["core.ce_loss_score"] == 0.95
    assert run.means["sae_probes.sae_top_1_test_auc"] == 0.95 - 0.1
    config = run.config
    assert (config["variant"], config["num_tokens"], config["context"]) == ("batch_topk", 500_000_000, 1024)
    assert (config["published"], config["steps"], config["d_sae"]) == ("published, 500 M tokens", 5000, 32768)
    assert len(read(tmp_path / "out/gemma-2-2b/matryoshka-panel_matryoshka-panel")) == 2
    assert not any("safetensors" in path for _, path, _ in small_hub.requests if "resolve" in path)


def test_without_a_hub_it_says_so_in_one_line(small_hub, tmp_path, monkeypatch, capsys):
    """Fails if a machine without a network, or a repository of another layout, gives a traceback or silence."""
    offline = small_hub.environment(home=tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    done = published(offline, "--out", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nothing fetched: HF_HUB_OFFLINE is set") and done.stderr.count("\n") == 1
    monkeypatch.setattr(network, "commit", lambda kind, name: "0" * 40)
    monkeypatch.setattr(network, "listing", lambda kind, name, revision: {"snapshots/core.json": 5})
    assert main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "holds no snapshots in the layout that its card describes" in said and said.count("\n") == 1
