"""What is compared with what, which differences count, and how the work grows."""

import cProfile
import dataclasses
import gc
import io
import json
import math
import os

import pytest

from runs import compare, exports, folder, frontier, report
from runs.comparison import differing
from runs.reading import read
from tests import PROJECT
from tests.runs.records import CE, DIRECTIONS, GEMMA, R2, TWO_ENDS, cells, command, entry, record, run, saes_of

ON_GEMMA = {"model": "google/gemma-2-2b", "layer": 12, "hook_name": "blocks.12.hook_resid_post", "variant": "mine",
            "context": 128, "num_tokens": 5_000_000, "keep_bos": False, "d_sae": 16_384}


@pytest.mark.parametrize("difference, error, their_error, beyond", [
    (0.011, 0.003, 0.004, True),  # combined .005; adding the errors would ask for .014
    (0.009, 0.003, 0.004, False),  # the larger error alone would ask for .008 only
    (0.011, None, None, None),
    (0.011, 0.003, None, None),  # beyond what is known, but the other side may add to it
    (0.011, None, 0.003, None),
    (0.005, 0.003, None, False),  # within what is known already
    (0.0, None, None, False),
])
def test_twice_the_combined_standard_error(difference, error, their_error, beyond):
    """Fails if errors are combined otherwise than by their root sum of squares, or an unknown one gives a verdict."""
    judged = compare.judge(2 + difference, 2.0, error, their_error, "lower")
    assert (judged.verdict, judged.beyond) == ("worse" if difference else "equal", beyond)
    assert judged.stderr == (pytest.approx(0.005) if error and their_error else error or their_error)


def test_directions_come_from_the_evals():
    """Fails if a metric of core loses its direction, or if losses of different variants are ranked."""
    known = compare.directions()
    named = (CE, "core.mse", "core.l0", "training.final_loss")
    assert [known[metric] for metric in named] == ["higher", "lower", "", ""]


def test_what_differs_in_setting_is_not_judged():
    """Fails if another layer or model is compared, or other settings of one eval leave its verdict standing."""
    means = {CE: 0.9, "sparse_probing.sae_top_1_test_accuracy": 0.8}
    base = run("standard", {k: v - 0.125 for k, v in means.items()},
               evals={"core": {"context_size": 128, "verbose": False}})
    other_eval = run("r", means, evals={"core": {"context_size": 64, "verbose": True}})
    text = compare.compare([other_eval], [base], DIRECTIONS)
    assert "not compared: core (context_size 64 / 128)\n" in text
    assert cells(text, CE) == ["0.7750", "0.9000", "–"]
    assert cells(text, "sparse") == ["0.6750", "0.8000", "+0.1250", "better", "?"]
    elsewhere = {"layer": 4, "hook_name": "blocks.4.hook_resid_post"}
    for config, said in ((elsewhere, "layer 4 / 3"), ({"model": "big"}, "model big / tiny")):
        text = compare.compare([run("r", means, **config)], [base], DIRECTIONS)
        assert f"not compared: {said}" in text and "0.9000" in text
        assert "better" not in text and "difference" not in text


def test_between_two_saes_figures_are_linear_in_log_l0():
    """Fails if L0 itself is the axis (.567 at 20), errors shrink (.0158 by squares), or far SAEs take part."""
    measured = ((160.0, 0.9, 0.9, {CE: 0.5}), (10.0, 0.5, None, {CE: 0.01, "core.l0": 0.1}),
                (40.0, 0.7, 0.8, {CE: 0.03}))
    saes = [run(f"l_{l0:g}", {"core.l0": l0, CE: ce, R2: r2, "core.total_tokens": 10}, errors, variant="standard")
            for l0, ce, r2, errors in measured]
    middle = frontier.at(20.0, saes)  # ln(20/10) / ln(40/10) = 1/2
    assert middle.means == {"core.l0": 20.0, CE: pytest.approx(0.6), "core.total_tokens": 10}
    assert middle.stderrs == {CE: pytest.approx(0.02)} and [sae.name for sae in middle.between] == ["l_10", "l_40"]
    quarter = frontier.at(10 * math.sqrt(2), saes)
    assert (quarter.means[CE], quarter.stderrs[CE]) == (pytest.approx(0.55), pytest.approx(0.015))
    assert frontier.at(80.0, saes).means[R2] == pytest.approx(0.85)
    assert [frontier.at(l0, saes) for l0 in (9.8, 164.0, 0.0, None)] == [None] * 4
    assert frontier.at(40.0, saes) is saes[2] and frontier.at(159.0, saes) is frontier.at(161.0, saes) is saes[0]


def test_equal_l0_reverses_the_verdict_of_the_nearest_sae():
    """Fails if a run that is better only by its larger L0 passes for better: alone, in a sweep, a large one, a CSV."""
    base = saes_of("standard", TWO_ENDS)
    ours = run("r", {"core.l0": 50.0, CE: 0.85}, {CE: 0.003}, variant="mine")
    alone = compare.compare([ours], base[:1], DIRECTIONS)  # the nearest, by L0: 0.05 above it
    assert cells(alone, CE)[-2:] == ["better", "yes"]
    # .8 + .12 · ln(50/20) / ln(100/20) = .8683; twice the combined error: .0072
    text = compare.compare([ours], base, DIRECTIONS)
    assert cells(text, CE) == ["~0.8683", "0.8500", "-0.0183", "worse", "yes"]
    assert "~ between standard l_20 (L0 20.00) and standard l_100 (L0 100.0)" in " ".join(text.split())
    table = exports.as_csv(compare.judged([ours], base, DIRECTIONS))
    row = next(line for line in table.splitlines() if CE in line).split(",")
    assert row[6] == "standard at L0 50" and row[-4:] == ["worse", "yes", "50.0", "50.0"]

    sweep = [dataclasses.replace(ours, name=f"r l_{n}", means={"core.l0": 50.0 + n, CE: 0.85}) for n in range(20)]
    text = compare.compare(sweep[:2], base, DIRECTIONS)
    assert [line.split()[-4:] for line in text.splitlines() if "~0." in line] == [
        ["~0.8683", "0.8500", "-0.0183", "worse*"], ["~0.8698", "0.8500", "-0.0198", "worse*"]]
    assert "50.00          0.8500-" in compare.compare(sweep, base, DIRECTIONS)


def test_what_is_no_frontier_is_not_interpolated():
    """Fails if a line is drawn between variants, widths, budgets or eval settings, or what is far passes for near."""
    ours = run("r", {"core.l0": 50.0, CE: 0.85}, {CE: 0.003}, variant="mine")
    (low,), (high,) = saes_of("standard", TWO_ENDS[:1]), saes_of("standard", TWO_ENDS[1:])
    assert compare.frontier_for([ours], [low, high]) == [low, high]
    stated = {"variant": "standard", "num_tokens": 9, "evals": {"core": {"context_size": 128}}}
    for other in ({"variant": "topk"}, {"d_sae": 500}, {"num_tokens": 7}, {"layer": 4},
                  {"evals": {"core": {"context_size": 64}}}):
        strange, first = (run(name, sae.means, **stated | own)
                          for name, sae, own in (("b", high, other), ("a", low, {})))
        assert compare.frontier_for([ours], [first, strange]) == []
    unnamed = [run(sae.name, sae.means) for sae in (low, high)]  # of variants unknown
    assert compare.frontier_for([ours], unnamed) == []
    text = compare.compare([ours], [low, *saes_of("topk", TWO_ENDS[1:])], DIRECTIONS)
    assert cells(text, CE) == ["0.8000", "0.8500", "+0.0500", "better", "yes"]
    assert "not at equal L0: 50.00 / 20.00, a factor of 2.5\n" in text
    below = compare.compare([run("r", {"core.l0": 10.0, CE: 0.7}, variant="mine")], [low, high], DIRECTIONS)
    assert "not at equal L0: 10.00 / 20.00, a factor of 2, outside the baseline's L0 20.00 to 100.0" in below

    (published,) = read(GEMMA / "topk").values()
    text = compare.compare([run("r", {"core.l0": 40.0, CE: 0.9}, **ON_GEMMA)], [published], DIRECTIONS)
    assert "not at equal L0: the baseline's is not known" in text


@pytest.mark.parametrize("width, variant, l0, expected", [
    (16_384, None, 40.0, 1 - 0.184 / 9.560),  # extra nats of batch_topk, the default
    (65_536, None, 80.0, 1 - 0.084 / 9.560),
    (40_000, None, 80.0, 1 - 0.084 / 9.560),  # nearer to 65,536 than to 16,384, by their ratios
    (None, None, 320.0, 1 - 0.041 / 9.560),
    (16_384, "published_500M_gated_16k", 80.0, 1 - 0.127 / 9.560),
    # halfway between 160 and 320 on a log axis
    (16_384, "published_500M_topk_16k", 160 * 2**0.5, 1 - (0.073 + 0.044) / 2 / 9.560),
])
def test_gemma_runs_are_compared_with_what_was_published(width, variant, l0, expected):
    """Fails if a default run meets the curve of another width, a figure was mistyped, or budget and mark go unsaid."""
    ours = run("r", {"core.l0": l0, CE: 0.9}, {CE: 0.001}, **ON_GEMMA | {"d_sae": width})
    stored = compare.stored_baselines([ours], variant)
    (comparison,) = compare.judged([ours], stored, DIRECTIONS)
    (one,) = comparison.saes
    assert one.partner.means[CE] == pytest.approx(expected, abs=6e-6) and one.equal_l0
    assert one.judged(CE).verdict == "worse" and one.judged(CE).beyond is None  # no standard errors were published
    assert one.differs["num_tokens"] == (5_000_000, 500_000_000) and one.differs["context"] == (128, 1024)
    text = " ".join(compare.compare([ours], stored, DIRECTIONS).split())
    assert "(published, 500 M tokens; runs/baseline/gemma-2-2b/published_500M_" in text
    assert "context 128 / 1024" in text and "num_tokens 5000000 / 500000000" in text


@pytest.mark.parametrize("files", [{"final_info.json": (0, 1)}, {"final_info.json": (0,), "frontier.json": (1,)}])
def test_a_stored_frontier_in_one_file_or_beside_the_default(tmp_path, monkeypatch, files):
    """Fails if SAEs stored in either place are not found, or two files are not one frontier."""
    monkeypatch.setattr(compare, "BASELINES", tmp_path)
    for name, which in files.items():
        sections = {f"layer_3.l_{i}": entry(dict(zip(("core.l0", CE), TWO_ENDS[i])), variant="standard", hyper={"l": i})
                    for i in which}
        folder.write_json(tmp_path / "tiny/standard" / name, sections)
    ours = run("r", {"core.l0": 50.0, CE: 0.85}, variant="mine")
    for asked in (None, str(tmp_path / "tiny/standard")):
        text = compare.compare([ours], compare.stored_baselines([ours], asked), DIRECTIONS)
        assert cells(text, CE)[:2] == ["~0.8683", "0.8500"]


def test_a_sweep_stands_in_for_a_missing_baseline(tmp_path):
    """Fails if only the first SAE of the first of two sweeps is compared with."""
    for name, points in (("a", TWO_ENDS), ("b", ((50.0, 0.85), (60.0, 0.95)))):
        record(tmp_path / name, {f"layer_3.l_{l0:g}": entry({"core.l0": l0, CE: ce}, variant=name, hyper={"l": l0})
                                 for l0, ce in points})
    text = compare.compare([*read(tmp_path / "a").values(), *read(tmp_path / "b").values()], None, DIRECTIONS)
    assert "a stands for it" in text
    assert [line.split()[-1] for line in text.splitlines() if "~0." in line] == ["worse?", "better?"]


def test_command_names_the_nearest(tmp_path):
    """Fails if a wrong run, baseline or flag gives more than one line or no valid name."""
    record(tmp_path / "run_12", {"layer_3": entry({"core.l0": 5.0})})
    wrong = {"'run_12'": [f"{tmp_path}/run_21"], "'topk'": [f"{GEMMA}/topk", "--baseline", "tpk"],
             "--markdown": [f"{GEMMA}/topk", "--markdwn"], "'gemma-2-2b/": [f"{tmp_path}/run_12", "--baseline=a/b"]}
    for said, arguments in wrong.items():
        done = command("-m", "runs.compare", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert said in done.stderr


@pytest.mark.slow
def test_a_thousand_runs_without_heavy_imports(tmp_path):
    """Fails if comparing needs torch or numpy, grows faster than the number of runs, or drops one of them."""
    rest = {f"core.metric_{i}": 0.123 for i in range(50)}
    for n in range(1000):
        record(tmp_path / f"run_{n}", {"layer_3": entry({**rest, "core.l0": n + 0.1, CE: 0.9 + n * 1e-5})})
    before = os.times()
    done = command("-c", "import sys, runs.compare\ncode = runs.compare.main(sys.argv[1:])\n"
                         "sys.exit(code or len({'torch', 'numpy'} & set(sys.modules)))",
                   *map(str, sorted(tmp_path.iterdir())), "--csv")
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - before.children_user < 10  # s of its own, which no other process makes more
    rows = done.stdout.splitlines()
    assert len(rows) == 1 + 1000 * 52
    row = next(r for r in rows if r.startswith("run_7,") and ".ce_loss_score," in r).split(",")
    assert row[:3] + row[6:7] == ["run_7", "org/Tiny", "3", "run_0"] and math.isclose(float(row[9]), 7e-5, rel_tol=1e-6)


@pytest.mark.slow
def test_work_grows_with_the_number_of_runs_alone(tmp_path, monkeypatch, capsys):
    """Fails if comparing reads a file twice or does something for each pair, or a run's end looks at its neighbours."""
    opened, really = [], io.open

    def noting(file, *arguments, **options):
        opened.append(str(file))
        return really(file, *arguments, **options)

    monkeypatch.setattr(io, "open", noting)
    (stored,) = json.loads((PROJECT / "runs/baseline/smollm2-135m-instruct/topk/final_info.json").read_text()).values()

    def work(call, *arguments) -> tuple[int, list[str]]:
        """How many Python functions were called, a measure that no other process disturbs, and the files opened."""
        opened.clear()
        profile = cProfile.Profile(builtins=False)
        gc.disable()  # what is collected meanwhile, of other tests too, calls functions of its own
        try:
            profile.runcall(call, *arguments)
        finally:
            gc.enable()
        return sum(entry.callcount for entry in profile.getstats()), list(opened)

    folders, calls, ends = [], {}, {}
    for n in (1, 100, 1000):  # the first fills caches
        for i in range(len(folders), n):
            folders.append(tmp_path / f"run_{i}")
            folders[i].mkdir()
            means = {m: v * (1 + i * 1e-6) if isinstance(v, float) else v for m, v in stored["means"].items()}
            (folders[i] / "final_info.json").write_text(json.dumps({"layer_9": stored | {"means": means}}))
        for flags in ((), ("--csv",)):
            calls[n, flags], files = work(compare.main, [*map(str, folders), *flags])
            assert sorted(f for f in files if str(tmp_path) in f) == sorted(str(f / "final_info.json") for f in folders)
            assert len(files) < n + 60  # and once each the evals' sources and the baseline
        sections = read(folders[0])
        ends[n] = [(count, len(files)) for count, files in (
            work(compare.summary, folders[0]), work(report.write, folders[0], sections,
                                                    compare.stored_baselines(sections), []))]
    capsys.readouterr()
    assert all(calls[1000, flags] < 10 * calls[100, flags] for flags in ((), ("--csv",)))
    assert ends[1000] == ends[100]


def test_tokens_that_one_side_left_out_are_said():
    """Fails if figures over other tokens pass for those over all: older records do not name the setting."""
    bounded, usual = run("a", {CE: 0.9}, max_norm_ratio=10.0), run("b", {CE: 0.8})
    assert differing(bounded, usual) == {"max_norm_ratio": (10.0, "off")}
    assert differing(usual, run("c", {CE: 0.7})) == {}
    assert "max_norm_ratio 10.0 / off" in compare.compare([bounded], [usual], DIRECTIONS)
