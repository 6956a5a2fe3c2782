"""The whole command on Gemma-2 from a hub: cold, warm, without network, interrupted, refused, and with every request
failing once.

The hub is the imitation of tests/hub: real names, files and columns, a tiny random Gemma-2 of 26 blocks, invented
texts.
"""

import json
import signal
import subprocess
import sys
import time

import pytest

import evals
from tests import PROJECT

FEW = {"core": {"batch_size_prompts": 4, "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 3},
       "sparse_probing": {"probe_train_set_size": 40, "probe_test_set_size": 20}}
ROWS = {"probe_train_set_size": 80, "probe_test_set_size": 40}
REST = {"scr": ROWS, "tpp": ROWS,
        "sae_probes": {"max_rows": 300, "max_tokens": 64, "dataset_names": ["5_hist_fig_ismale"]},
        "absorption": {"max_words": 200},
        "unlearning": {"dataset_size": 8, "seq_len": 64, "text_rows": 4, "text_len": 64}}
SMALL = ["--profile=gemma", "--device=cpu", "--dtype=float32", "--d_sae=64", "--hyper=k=4", "--batch_size=256",
         "--num_tokens=8192", "--block_tokens=4096"]


@pytest.fixture
def places(hub, tmp_path):
    return Places(hub, tmp_path)


class Places:
    """A hub, and a machine that has never asked it anything."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder

    def command(self, out, *flags, evals=FEW):
        return [sys.executable, "experiment.py", f"--out_dir={self.folder / out}", *SMALL,
                f"--eval_config={json.dumps(evals)}", *flags]

    def environment(self, token="hf_good", cache=None, **more):
        own = {"XDG_CACHE_HOME": cache or str(self.folder / "cache")}
        return self.hub.environment(home=self.folder / "home", token=token) | own | more

    def run(self, out, *flags, status=0, evals=FEW, **environment):
        """The finished process, its output and how many requests it sent."""
        self.hub.reset()
        done = subprocess.run(self.command(out, *flags, evals=evals), cwd=PROJECT, env=self.environment(**environment),
                              capture_output=True, text=True)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
        done.requests = len(self.hub.requests)
        return done

    def bytes(self, out):
        return (self.folder / out / "final_info.json").read_bytes()

    def section(self, out):
        return json.loads(self.bytes(out))["layer_12"]


@pytest.mark.slow
def test_cold_then_another_model_then_without_network(places):
    """Fails if a cold run needs more than 100 requests or a warm one more than 25, if two models share what the
    language model gave, if the network is asked anything offline, or what is kept differs from what was read.
    """
    assert places.run("run_1").requests <= 100
    first = places.section("run_1")
    commits = {f"dataset:{name}": places.hub.commit("dataset", name)
               for name in ("monology/pile-uncopyrighted", "Skylion007/openwebtext")}
    commits["model:google/gemma-2-2b"] = places.hub.commit("model", "google/gemma-2-2b")
    assert commits.items() <= first["config"]["revisions"].items() and len(first["config"]["revisions"]) == 8
    other = places.run("run_2", "--model=google/gemma-2-2b-it")
    assert other.requests <= 25 + 30  # the other model is fetched
    second = places.section("run_2")
    assert second["means"]["core.ce_loss_without_sae"] != first["means"]["core.ce_loss_without_sae"]
    assert second["means"]["training.final_loss"] != first["means"]["training.final_loss"]
    again = places.run("run_3", HF_HUB_OFFLINE="1")
    assert again.requests == 0 and places.bytes("run_3") == places.bytes("run_1")
    finished = places.run("run_1")
    assert "already finished" in finished.stdout and finished.requests <= 25
    for folder in (places.folder / "run_1").glob("*.json"):
        assert "hf_good" not in folder.read_text()


@pytest.mark.slow
def test_all_evals_read_what_they_need_from_the_hub(places):
    """Fails if an eval cannot read its data set's real layout, or an eval without a score says nothing of why."""
    # the user's own cache: one eval reads a wheel of 44 MB
    there = evals.names()  # all but those that are deleted
    small = {name: config for name, config in (FEW | REST).items() if name in there}
    places.run("run_1", "--evals=all", evals=small, cache="")
    found = places.section("run_1")
    for metric in ("core.ce_loss_score", "sparse_probing.sae_top_1_test_accuracy", "sae_probes.sae_top_1_test_auc",
                   "scr.scr_metric_threshold_10", "tpp.tpp_threshold_10_total_metric",
                   "unlearning.text_unlearning_precision"):
        assert metric.split(".")[0] not in there or isinstance(found["means"][metric], float), metric
    # a random model knows no answers, and there is no judge
    for name in {"absorption", "autointerp", "ravel", "unlearning"} & {*there}:
        assert any(problem.startswith(f"{name}:") for problem in found["problems"]), name


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_commit_it_began_with(places):
    """Fails if a resume reads another state of a data set than the run began with, repeats or leaves out a document
    of a shard begun, or takes a run that was begun on other texts for its own.
    """
    pile, more = "monology/pile-uncopyrighted", ["--num_tokens=65536", "--block_tokens=16384", "--evals=core",
                                                 "--checkpoint_seconds=0", "--activation_cache_gb=0"]
    places.run("whole", *more)
    shards = sum(pile in path and "/cdn/" in path for _, path, _ in places.hub.requests)
    # a machine that has nothing yet
    second = dict(cache=str(places.folder / "second"), HF_HOME=str(places.folder / "second home"))
    places.hub.reset()
    # the last shard's bytes never come
    places.hub.faults = [dict(match=f"GET /cdn/datasets/{pile}", do="hang", at=shards)]
    run = subprocess.Popen(places.command("run_1", *more), cwd=PROJECT, env=places.environment(**second),
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (places.folder / "run_1/checkpoint.pt").exists() or not places.hub.faults[0].get("fired"):
        assert run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = places.hub.commit("dataset", pile)
    places.hub.push("dataset", pile, {f"train/{i:02}.jsonl.zst": None for i in range(15)})
    assert places.hub.commit("dataset", pile) != before
    done = places.run("run_1", *more, **second)
    assert "continuing from step" in done.stdout
    assert places.bytes("run_1") == places.bytes("whole")
    done = places.run("run_1", *more)  # finished, and its texts have changed since
    assert "holds another run: moved to" in done.stdout
    assert places.section("run_1")["config"]["revisions"][f"dataset:{pile}"] != before


@pytest.mark.slow
@pytest.mark.parametrize("token, words", [
    (None, ["google/gemma-2-2b is gated and no token is given", "accept its licence on", "hf auth login"]),
    ("hf_poor", ["google/gemma-2-2b is gated and this user has no access to it yet", "ask for access on"]),
    ("hf_fine", ["google/gemma-2-2b is gated and this fine-grained token may not read gated repositories",
                 "settings/tokens"]),
    ("hf_expired", ["the hub takes the token for google/gemma-2-2b for invalid or expired", "hf auth login` again"])])
def test_no_access_is_said_at_once_and_nothing_is_moved(places, token, words):
    """Fails if a refusal comes late, gives advice that does not fit, or costs a run that lies in the folder."""
    (places.folder / "run_1").mkdir()
    (places.folder / "run_1/final_info.json").write_text("{}")
    done = places.run("run_1", status=1, token=token)
    assert all(word in done.stderr for word in words) and len(done.stderr) < 1200
    assert [p.name for p in (places.folder / "run_1").iterdir()] == ["final_info.json"]


@pytest.mark.slow
def test_a_refusal_is_left_in_an_empty_folder(places):
    """Fails if who reads error.json alone does not learn that access is what lacks."""
    places.run("run_1", status=1, token=None)
    said = json.loads((places.folder / "run_1/error.json").read_text())["message"]
    assert "google/gemma-2-2b is gated and no token is given" in said


@pytest.mark.slow
def test_a_hiccup_never_makes_an_older_model_of_it(places):
    """Fails if one 503 makes a cached commit stand for the one asked for, or a hub that is gone ends a run unsaid."""
    code = """
import json, sys
from evals.model import places
from evals.storage import network
network.DELAYS = (0.05,) * 6
print(places.known_identity("google/gemma-2-2b", "", ""))
"""
    def known(**more):
        env = places.environment(PYTHONPATH=str(PROJECT), **more)
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1500:]
        return done.stdout.splitlines()

    model = "google/gemma-2-2b"
    first = known()[-1]
    places.hub.push("model", model, {"README.md": b"new"})
    places.hub.faults = [dict(match="/api/models/google/gemma-2-2b", do="503", at=1)]
    said = known()
    assert said[-1] == f"{model}@{places.hub.commit('model', model)}" != first and "trying again" in said[0]
    places.hub.faults = [dict(match=".", do="503")]
    said = known()
    assert said[-1].endswith(places.hub.commit("model", model))
    assert any("going on with what is in the cache" in line for line in said)


ASKED = """
import json, os, sys
from pathlib import Path
from evals.model import places
from evals.storage import network
from evals.texts import hub
from evals.texts.source import Source
network.DELAYS = (0.05,) * 6
network.DOWNLOADED = int(sys.argv[2])  # 0: all is read as a stream
cache = Path(sys.argv[1])
source = Source("hub", "monology/pile-uncopyrighted", "Skylion007/openwebtext", cache_dir=cache)
config = {"probe_train_set_size": 20, "probe_test_set_size": 10, "dataset_names": [
    "LabHC/bias_in_bios_class_set1", "fancyzhx/ag_news"]}
heldout = [document for _, document in zip(range(100), source.documents("heldout"))]
texts = [next(source.documents("train")), heldout, hub.probing(config, cache)]
folder = places.location("google/gemma-2-2b", str(cache), "")
shape = places.shape("google/gemma-2-2b", 4, str(cache))
print(json.dumps([texts, places.identity(folder), shape, sorted(p.name for p in folder.iterdir())]))
"""


@pytest.mark.slow
def test_every_request_may_fail_once(places):
    """Fails if a 429, a 503, a cut body or a dropped connection at any one request ends or changes what is read.

    Each request of a session meets a fault in one of six; files are downloaded, in every second session read as
    streams.
    """
    def session(n, downloaded):
        env = places.environment() | {"HF_HOME": str(places.folder / f"home_{n}"), "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-c", ASKED, str(places.folder / f"cache_{n}"), str(downloaded)]
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{n}: {places.hub.faults} {done.stdout[-300:]} {done.stderr[-1500:]}"
        return done.stdout.splitlines()[-1]

    places.hub.reset()
    expected = session("clean", 0)
    for n in range(6):
        places.hub.reset()
        total = 90 if n % 2 else 60
        kinds = ("503", "429", "cut", "drop", "500", "504")
        places.hub.faults = [dict(match=".", do=kinds[(i + n) % 6], at=i, seconds=0)
                             for i in range(1 + n, 3 * total, 6)]
        assert session(n, 0 if n % 2 else 1 << 25) == expected
        assert sum(rule.get("fired", 0) for rule in places.hub.faults) > total // 8


def test_names_alone_tell_the_splits_that_datasets_finds(places):
    """Fails if a configuration, a split or a file is taken otherwise than `datasets` itself does on the hub."""
    code = """
import datasets, json
from evals.storage import network
from evals.texts import text_files
for name, config in [("monology/pile-uncopyrighted", None), ("Skylion007/openwebtext", None),
                     ("Helsinki-NLP/europarl", "en-fr"), ("LabHC/bias_in_bios", None), ("fancyzhx/ag_news", None),
                     ("cais/mmlu", "human_aging"), ("texts/two-configs", "stories"), ("texts/parquet", None),
                     ("Salesforce/wikitext", "wikitext-2-raw-v1"), ("cais/wmdp-bio-forget-corpus", None)]:
    commit = network.commit("dataset", name)
    theirs = datasets.load_dataset_builder(name, config, revision=commit).config.data_files
    ours, module, options, sizes = text_files.resolved(name, config)
    assert {str(k): list(v) for k, v in theirs.items()} == ours, name
    assert all(sizes[file] > 0 for files in ours.values() for file in files)
assert text_files.shared("texts/parquet", "texts/parquet::train") == "all"
assert text_files.shared("texts/two-configs:letters", "texts/two-configs:stories") == "none"
"""
    env = places.environment(PYTHONPATH=str(PROJECT))
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
