"""One word on a run: which, why, from which figures, and where it is told."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace

import filelock
import pytest

import experiment
import variants
from runs import compare, verdict
from runs.folder import write_json
from runs.reading import DOUBT
from tests import OWN_VARIANTS, PROJECT
from tests.runs.records import CE, DIRECTIONS, R2, entry, record, run
from tests.small_run import command

pytestmark = pytest.mark.usefixtures("no_pages")


def ruled(mine, baseline, metric=CE):
    """The verdict on a run, or on several SAEs of one, beside a baseline of the same kind."""
    mine = mine if isinstance(mine, list) else [mine]
    return verdict.judged(compare.judged(mine, [baseline] if baseline else None, DIRECTIONS | {R2: "higher"}), metric)


def sae(name, ce, error=0.01, l0=20.0, more=None, **config):
    """A run of that CE loss score; with both errors .01 a difference counts above 2·√2·.01 = .0283."""
    stderrs = {} if error is None else {CE: error, "core.mse": 0.01}
    return run(name, {"core.l0": l0, CE: ce, **(more or {})}, stderrs, **config)


BASE = sae("base", 0.861, more={"core.mse": 0.30}, variant="topk")
CASES = {
    "better": (sae("a", 0.891), CE, "better", None),
    "worse": (sae("a", 0.831), CE, "worse", None),
    "within": (sae("a", 0.871), CE, "within_noise", "within two"),
    "lower is better": (sae("a", 0.8, more={"core.mse": 0.25}), "core.mse", "better", None),
    "the baseline again": (sae("a", 0.861, variant="topk"), CE, "equal_to_baseline", "nothing in it differs from base"),
    "no effect": (sae("a", 0.861, more={"core.mse": 0.30}, variant="mine"), CE, "suspect", "to the last digit"),
    "dead": (sae("a", 0.891, l0=0.0), CE, "suspect", "dead SAE"),
    "not sparse": (sae("a", 0.891, l0=200.0), CE, "suspect", "not sparse"),
    "other L0": (sae("a", 0.891, l0=40.0), CE, "incomparable", "own L0: 40.00, and base has 20.00"),
    "no error": (sae("a", 0.891, error=None), CE, "within_noise", "known of the run: run several seeds"),
    "not measured": (sae("a", 0.891), R2, "incomparable", "core.r2 was not measured"),
    "other model": (sae("a", 0.891, model="org/Other"), CE, "incomparable", "model other / tiny"),
}


@pytest.mark.parametrize("case", CASES)
def test_its_word(case):
    """Fails if a run gets another verdict than its figures bear, or without the reason."""
    mine, metric, word, why = CASES[case]
    found = ruled(mine, BASE, metric)
    assert found["verdict"] == word
    assert found["why"] is None if why is None else why in found["why"]


@pytest.mark.parametrize("ce, tokens, word", [(0.831, 1_000, "incomparable"), (0.891, 1_000, "better"),
                                              (0.891, 99_000, "incomparable"), (0.831, 99_000, "worse"),
                                              (0.831, 9_500, "worse")])
def test_a_budget_may_be_all_the_difference(ce, tokens, word):
    """Fails if fewer training tokens than the baseline's make a variant worse, or more of them make it better."""
    found = ruled(sae("a", ce, num_tokens=tokens), sae("base", 0.861, variant="topk", num_tokens=10_000))
    assert found["verdict"] == word
    if word == "incomparable":
        assert f"trained on {tokens:,} tokens and base on 10,000" in found["why"]


def test_what_cannot_be_compared_otherwise():
    """Fails if no baseline, or one whose eval ran with other settings, gives a verdict."""
    alone = ruled(sae("a", 0.891), None)
    assert (alone["verdict"], alone["baseline"], alone["difference"]) == ("incomparable", None, None)
    other = sae("a", 0.891, evals={"core": {"n": 1}})
    found = ruled(other, sae("base", 0.861, evals={"core": {"n": 2}}))
    assert found["verdict"] == "incomparable" and "other settings than the baseline's: n 1 / 2" in found["why"]


def test_a_headline_no_better_than_random_is_suspect(monkeypatch):
    """Fails if a run that a frozen random decoder equals in the headline metric passes, or one equalled elsewhere
    does not.
    """
    floor = sae("random", 0.88, more={R2: 0.9}, variant="frozen_decoder")
    monkeypatch.setattr(compare, "stored_random", lambda key, config: {compare.FROZEN: [floor]})
    found = ruled(sae("a", 0.895), BASE)  # .015 above the decoder: less than .0283
    assert found["verdict"] == "suspect" and "frozen random decoder's (0.8950 vs 0.8800" in found["why"]
    found = ruled(sae("a", 0.95, more={R2: 0.5}), BASE)
    assert found["verdict"] == "better" and any("random decoder" in line and R2 in line for line in found["warnings"])


def test_several_saes_have_one_verdict():
    """Fails if the figures of a sweep are other means than over the SAEs that can be compared."""
    def swept(name, ce, l0, error):
        return sae(name, ce, error, l0, hyper={"k": l0})

    three = [swept("k_20", 0.90, 20.0, 0.01), swept("k_21", 0.94, 20.5, 0.03), swept("k_80", 0.99, 80.0, 0.01)]
    found = ruled(three, BASE)
    assert [one["verdict"] for one in found["saes"].values()] == ["better", "better", "incomparable"]
    assert found["why"] == "mean over 2 of 3 SAEs" and found["verdict"] == "better"
    assert found["difference"] == pytest.approx((0.039 + 0.079) / 2)
    assert found["difference_stderr"] == pytest.approx((math.sqrt(0.0002) + math.sqrt(0.001)) / 2)
    assert found["value"] == pytest.approx(0.92) and found["baseline"] == "base"
    three[1] = sae("dead", 0.94, 0.03, 0.0)
    assert ruled(three, BASE)["verdict"] == "suspect"


def test_seeds_are_one_run():
    """Fails if runs of several seeds are not their mean, with the error √(e² + sd²/n), or hide a dead one."""
    members = [sae(f"s{seed}", ce, seed=seed) for seed, ce in enumerate((0.90, 0.92, 0.94))]
    mean = verdict.mean_run(members)
    assert mean.means[CE] == pytest.approx(0.92)
    assert mean.stderrs[CE] == pytest.approx(math.sqrt(0.01**2 + 0.02**2 / 3))
    bare = [sae(f"s{seed}", ce, None, seed=seed) for seed, ce in enumerate((0.90, 0.94))]
    assert verdict.mean_run(bare).stderrs[CE] == pytest.approx(0.02)  # sd .0283 over √2
    hidden = verdict.mean_run([*members, sae("s3", 0.94, l0=0.0, seed=3)])
    assert any(line.startswith(f"{DOUBT}s3: dead SAE") for line in hidden.problems)


def folder_of(path, ce, **config):
    """A run's folder with one SAE of that CE loss score."""
    record(path, {"layer_3": entry({"core.l0": 20.0, CE: ce}, {CE: 0.01}, **config)})
    return str(path)


def test_another_seed_is_in_the_error_of_one(tmp_path, monkeypatch):
    """Fails if two runs of one seed each are held apart by their samples' errors alone, where it is known what another
    seed gives; or if more seeds do not settle it.
    """
    stored = {f"k_{l0}": entry({"core.l0": l0, CE: 0.9}, {CE: spread}, seeds=[0, 1, 2], variant="topk")
              for l0, spread in ((20.0, 0.03), (80.0, 0.5))}
    record(tmp_path / "tiny/topk", stored)
    monkeypatch.setattr(compare, "BASELINES", tmp_path)
    runs = [sae("a", 0.80, seed=0), sae("b", 0.87, seed=0, variant="mine")]
    found = compare.ruling(runs, [], None, CE, DIRECTIONS)
    # .07 with an error of √(2·(.01² + .03²)) = .0447
    assert found["verdict"] == "within_noise" and found["difference_stderr"] == pytest.approx(0.0447, abs=1e-4)
    seeds_of_a = [replace(sae("a", 0.80, seed=n), path=tmp_path / f"a{n}/f") for n in range(9)]
    seeds_of_b = [replace(sae("b", 0.87, seed=n, variant="mine"), path=tmp_path / f"b{n}/f") for n in range(9)]
    found = compare.ruling([*seeds_of_a, *seeds_of_b], [], None, CE, DIRECTIONS)
    # nine seeds that happen to agree: .03/3 each, not below
    assert found["verdict"] == "better" and found["difference_stderr"] == pytest.approx(0.01 * 2**0.5, rel=1e-6)


def test_the_exit_status(tmp_path, capsys):
    """Fails if a loop that keeps, discards, draws another seed or stops is told the wrong thing."""
    a, b, c = (folder_of(tmp_path / name, ce, variant="topk", seed=seed)
               for name, ce, seed in (("a", 0.86, 0), ("b", 0.861, 1), ("c", 0.862, 2)))
    good, close, bad = (folder_of(tmp_path / name, ce, variant="mine", hyper={"w": ce}, seed=0)
                        for name, ce in (("good", 0.90), ("close", 0.87), ("bad", 0.80)))

    def status(*runs):
        return compare.main([*runs, "--exit-status"])

    assert [status(a, good), status(a, bad), status(a, close), status(a)] == [0, 1, 2, 3]
    copy = tmp_path / "copy"
    shutil.copytree(a, copy)
    assert status(a, str(copy)) == 1  # equal to the baseline
    assert status(a, b, c, good) == 0
    capsys.readouterr()
    assert compare.main([a, b, c, good, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verdict"]
    assert list(found) == list(verdict.KEYS)
    assert (found["verdict"], found["baseline"], found["run"]) == ("better", "a, b, c", "good")
    assert found["baseline_stderr"] == pytest.approx(math.sqrt(0.01**2 + 0.001**2 / 3))
    assert status(a, good, "--baseline", bad) == 0 and status(good, "--baseline", a) == 0
    capsys.readouterr()
    assert compare.main([a, good]) == 0 and "verdict:" not in capsys.readouterr().out
    (tmp_path / "broken").mkdir()
    assert status(a, str(tmp_path / "broken")) == 3 and status(a, str(tmp_path / "none")) == 3
    (tmp_path / "good/verdict.json").write_text(json.dumps(dict(verdict="failed", why="an eval crashed")))
    assert status(a, good) == 3 and "good: an eval crashed" in capsys.readouterr().out
    assert status(a, close, "--headline=core.r3") == 3 and "nearest" in capsys.readouterr().err


def test_the_loop_of_the_readme(tmp_path):
    """Fails if the loop of runs/README.md keeps what is not better, compares what failed, or stops at either.

    `python` stands in: a run's folder appears, the fourth fails, and comparisons end with 2, 0 (kept), 1, 3, and 1.
    """
    text = (PROJECT / "runs/README.md").read_text(encoding="utf-8")
    loop = re.search(r"^```sh\n(best=.*?)^```", text, re.M | re.S)[1]
    assert len(loop.splitlines()) <= 10
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants/mine.py").write_text("0\n")
    stand_in = r"""
edit() { echo "edit $n" >> "$1"; }
python() {
    echo "$*" >> calls
    case $* in
        *run_4_*) return 1 ;;
        experiment.py*) last="${@: -1}"; mkdir "${last#--out_dir=}"; return 0 ;;
    esac
    left=$(head -1 ends); sed -i 1d ends; return "${left:-1}"
}
"""
    (tmp_path / "ends").write_text("2\n0\n1\n3\n")
    for seed in range(3):
        (tmp_path / f"run_0_{seed}").mkdir()
    subprocess.run(["bash", "-c", stand_in + loop], cwd=tmp_path, check=True, timeout=30, capture_output=True)
    compared = [line for line in (tmp_path / "calls").read_text().splitlines() if "runs.compare" in line]
    base = "-m runs.compare run_0_0 run_0_1 run_0_2"
    assert compared[:5] == [f"{base} run_1_0 --exit-status", f"{base} run_1_0 run_1_1 --exit-status",
                            *(f"-m runs.compare run_1_0 run_1_1 run_{n}_0 --exit-status" for n in (2, 3, 5))]
    assert len(compared) == 50  # two of the first edit, none of the fourth
    assert (tmp_path / "variants/mine.py").read_text() == "0\nedit 1\n"  # the others were taken back


def test_lines_changed(tmp_path):
    """Fails if blanks and comments count, another variant is called the nearest, or the project's own are changed."""
    if "topk" not in OWN_VARIANTS:
        pytest.skip("deleted")
    text = variants.path("topk").read_text(encoding="utf-8")
    mine = tmp_path / "mine.py"
    mine.write_text(text + "\n\n# a remark\nA = 1\nB = 2\n", encoding="utf-8")
    assert verdict.lines_changed(mine) == (2, "topk")
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "variants"], cwd=PROJECT).returncode == 0:
        assert {verdict.lines_changed(variants.path(name)) for name in OWN_VARIANTS} == {(0, name)
                                                                                         for name in OWN_VARIANTS}


@pytest.mark.parametrize("asked, says", [("core.r3", "nearest that has one is core.r2"),
                                         ("core.l0", "has no direction"),
                                         ("scr.scr_metric_threshold_10", "which is not among --evals=core")])
def test_a_headline_that_cannot_be(asked, says):
    """Fails if a run trains for a headline that it will not measure."""
    with pytest.raises(ValueError, match=says):
        verdict.check_headline(asked, compare.directions(), ["core"])
    verdict.check_headline("core.r2", compare.directions(), ["core"])


def test_which_metric_decides():
    """Fails if the metric is not that of the profile or the first that was measured, or if one takes the place of an
    eval that was chosen and is not there.
    """
    probing = run("a", {"sparse_probing.sae_top_1_test_accuracy": 0.7, "core.l0": 20.0}, profile="embedded")
    assert verdict.headline(None, [sae("a", 0.9)]) == CE and verdict.headline(R2, [sae("a", 0.9)]) == R2
    assert verdict.headline(None, [run("a", {"ground_truth.f1": 0.9}, profile="synthetic")]) == "ground_truth.f1"
    assert verdict.headline(None, [probing], "sparse_probing") == "sparse_probing.sae_top_1_test_accuracy"
    assert verdict.headline(None, [probing], "core,sparse_probing") == CE
    assert verdict.headline(None, [run("a", {"core.l0": 20.0})]) is None


def told(printed):
    """The verdict that stands at the end of what was printed."""
    lines = printed.rpartition("\n---\n")[2].strip("\n").split("\n")
    return [tuple(line.split(": ", 1)) for line in lines]


@pytest.mark.slow
def test_a_run_says_it_last(reference, cache, tmp_path, capsys):
    """Fails if a finished run's last lines are not its verdict.json, or another --headline changes nothing in it."""
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    capsys.readouterr()
    assert experiment.main(command(out, cache)) == 0
    stored = json.loads((out / "verdict.json").read_text())
    assert list(stored) == list(verdict.KEYS) and stored == json.loads((reference / "verdict.json").read_text())
    lines = told(capsys.readouterr().out)
    warned = [text for key, text in lines if key == "warning"]
    rest = {key: text for key, text in lines if key != "warning"}
    assert warned == stored.pop("warnings") and list(rest) == list(stored)
    assert rest["metric"] == CE and float(rest["value"]) == stored["value"]
    final = json.loads((reference / "final_info.json").read_text())["layer_2"]
    assert stored["value"] == final["means"][CE] and stored["l0"] == final["means"]["core.l0"]
    assert stored["tokens_per_s"] > 0 and stored["minutes"] > 0
    assert experiment.main(command(out, cache, "--headline=core.r2")) == 0
    again = json.loads((out / "verdict.json").read_text())
    assert again["metric"] == R2 and again["value"] == final["means"][R2]
    assert not (tmp_path / "results.tsv").exists()  # a line stands where a run ends


@pytest.mark.slow
def test_a_failed_and_an_interrupted_run_say_it(cache, tmp_path, capsys, monkeypatch):
    """Fails if a run without a result leaves no verdict, or if stderr does not end as before."""
    out = tmp_path / "run"
    assert experiment.main(command(out, cache, "--layers=9", "--note=too deep")) == 1
    printed = capsys.readouterr()
    stored = json.loads((out / "verdict.json").read_text())
    assert stored["verdict"] == "failed" and stored["phase"] == "preflight" and "--layers=9" in stored["why"]
    assert dict(told(printed.out))["why"] == stored["why"]
    assert printed.err.strip().splitlines()[-1].startswith("details: error.json")

    def stopped(*given):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(experiment, "train", stopped)
    assert experiment.main(command(out, cache)) == 128 + signal.SIGTERM
    stored = json.loads((out / "verdict.json").read_text())
    assert stored["why"] == "interrupted by SIGTERM; the same command continues" and stored["phase"] == "training"
    assert not (out / "error.json").exists()
    rows = [line.split("\t") for line in (tmp_path / "results.tsv").read_text().splitlines()]
    assert [(row[1], row[12], row[14]) for row in rows] == [("run", "verdict", "note"), ("run", "failed", "too deep"),
                                                            ("run", "failed", "")]


def test_without_a_folder_of_its_own(cache, tmp_path, capsys):
    """Fails if a run that failed in preflight, where another run lies, disturbs that or leaves no line."""
    taken = tmp_path / "run"
    folder_of(taken, 0.9)
    before = sorted(os.listdir(taken))
    assert experiment.main(command(taken, cache, "--headline=core.r3")) == 1
    assert sorted(os.listdir(taken)) == before
    assert f"\t{taken}\t" not in (tmp_path / "results.tsv").read_text().splitlines()[0]
    assert (tmp_path / "results.tsv").read_text().splitlines()[1].split("\t")[1] == "run"


def test_a_folder_that_another_process_has_is_left_alone(cache, tmp_path, capsys):
    """Fails if a run that is refused, or fails, writes into the folder of one that is still in its preflight."""
    taken = tmp_path / "run"
    write_json(taken / "run_info.json", dict(status="running", phase="preflight"))
    lock = filelock.FileLock(taken / ".lock")
    with lock:
        before = sorted(os.listdir(taken))
        assert experiment.main(command(taken, cache)) == 1
        assert not (tmp_path / "results.tsv").exists()  # it is no run
        assert experiment.main(command(taken, cache, "--headline=core.r3")) == 1
        assert sorted(os.listdir(taken)) == before
    printed = capsys.readouterr()
    assert "is in use by another running process" in printed.err and "details" not in printed.err
    assert printed.out.count("verdict: failed") == 2


@pytest.mark.slow
def test_nothing_of_it_ends_a_run(cache, tmp_path, capsys, monkeypatch):
    """Fails if a verdict that cannot be reckoned or a ledger that cannot be written changes how a run ends."""
    (tmp_path / "results.tsv").mkdir()
    monkeypatch.setattr(verdict, "judged", lambda *given: 1 / 0)
    assert experiment.main(command(tmp_path / "run", cache, "--evals=none")) == 0
    assert "note: no verdict: ZeroDivisionError" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/run_info.json").read_text())["status"] == "finished"
    assert experiment.main(command(tmp_path / "other", cache, "--layers=9")) == 1
    assert "note: results.tsv" in capsys.readouterr().out
