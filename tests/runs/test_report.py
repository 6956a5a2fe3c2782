"""report.html: the verdict in words that are right, parts that stand by themselves, points where they belong."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from evals import dashboards
from evals.dashboards import sweeps
from runs import compare, features, folder, report
from runs.page import cost, curves, frontier, health, verdict
from runs.reading import Run, read
from tests.pages.boards import HARMFUL, board
from tests.pages.reading import Page, charts, part, said
from tests.runs.records import CE, R2, entry, record, run, saes_of


def written(tmp_path, runs, base, log=()):
    """The page of runs that were never stored."""
    return report.write(tmp_path, {one.name: one for one in runs}, base, list(log)).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the verdict


BASE = run("b", {"core.l0": 50.0, CE: 0.9}, {CE: 0.003}, variant="standard", num_tokens=1000, hyper={"k": 50, "l": 1})
SENTENCES = {  # √(.003² + .004²) = .005
    "better": (dict(variant="mine", num_tokens=1000, hyper={"k": 64}), 0.92,
        "▲ Better: mine in place of standard, with k 64 in place of 50, reaches 0.9200 ± 0.004 in CE loss score, "
        "against 0.9000 ± 0.003 of the baseline standard at the same L0, 50.00: 0.0200 ± 0.005 higher, 4.0 standard "
        "errors where 2 are asked for."),
    "worse": (dict(variant="standard", num_tokens=1040, hyper={"k": 50}), 0.84,
        "▼ Worse: standard with num_tokens 1,040 in place of 1,000 reaches 0.8400 ± 0.004 in CE loss score, against "
        "0.9000 ± 0.003 of the baseline standard at the same L0, 50.00: 0.0600 ± 0.005 lower, 12 standard errors "
        "where 2 are asked for."),
    "noise": (dict(variant="mine"), 0.905,
        "≈ Within the noise: mine in place of standard reaches 0.9050 ± 0.004 in CE loss score, against 0.9000 ± "
        "0.003 of the baseline standard at the same L0, 50.00: 0.0050 ± 0.005 higher, 1.0 standard errors where 2 are"
        " asked for."),
    "suspect": (dict(variant="mine"), 1.2,
        "! Suspect: CE loss score = 1.200 is above 1: the model predicts better with the SAE than without. mine in "
        "place of standard reaches 1.200 ± 0.004 in CE loss score at L0 50.00, against 0.9000 ± 0.003 of the baseline"
        " standard."),
    "not sparse": (dict(variant="mine", d_sae=300, d_in=64), 0.91,
        "! Suspect: not sparse: L0 = 50.00 is more than a tenth of its 300 features; an activation of 64 dimensions "
        "is easily rebuilt from so many. mine in place of standard, with d_sae 300 in place of 1,000, reaches 0.9100 "
        "± 0.004 in CE loss score at L0 50.00, against 0.9000 ± 0.003 of the baseline standard."),
    "incomparable": (dict(variant="mine", layer=4, hook_name="blocks.4.hook_resid_post"), 0.91,
        "– Not comparable: layer 4 / 3. mine reaches 0.9100 ± 0.004 in CE loss score at L0 50.00.")}


@pytest.mark.parametrize("kind", SENTENCES)
def test_a_verdict_in_words(tmp_path, kind):
    """Fails if a sentence lacks what changed, which way, in what, at which L0, by how much or how surely."""
    config, value, sentence = SENTENCES[kind]
    assert said(written(tmp_path, [run("r", {"core.l0": 50.0, CE: value}, {CE: 0.004}, **config)], [BASE])) == sentence


def advised(text):
    """What a page says to do next."""
    return Page(text.partition("<div class=next>")[2].partition("</div>")[0]).text.removeprefix("Next")


def test_a_verdict_without_a_baseline(tmp_path):
    """Fails if a run of a model of one's own gets no sentence, one that pretends to a comparison, or one with a command
    in it, or if the command is not below it.
    """
    text = written(tmp_path, [run("r", {"core.l0": 50.0, CE: 0.9}, {CE: 0.004}, variant="mine")], None)
    assert said(text) == ("– Not comparable: no baseline is stored for org/Tiny, layer 3. mine reaches 0.9000 ± 0.004 "
                          "in CE loss score at L0 50.00.")
    assert advised(text) == ("compare with a run of yours: "
                             f"python -m runs.compare {tmp_path.name} another_run --exit-status")
    far = written(tmp_path, [run("r", {"core.l0": 90.0, CE: 0.91}, {CE: 0.004}, variant="mine")], [BASE])
    assert said(far) == ("– Not comparable: no baseline at the run's own L0: 90.00, and b has 50.00. mine in place of "
                         "standard reaches 0.9100 ± 0.004 in CE loss score at L0 90.00, against 0.9000 ± 0.003 at L0 "
                         "50.00 of the baseline standard.")
    assert advised(far) == "set k or the penalty for that L0, or --sweep around it"


def test_a_verdict_on_known_features(tmp_path):
    """Fails if a run on synthetic features is not judged by their F1, or its model's name stands for a text's."""
    sides = [run(name, {"ground_truth.l0": 20.0, "ground_truth.f1": f1}, {"ground_truth.f1": 0.01}, variant=variant,
                 profile="synthetic") for name, f1, variant in (("r", 0.5, "mine"), ("b", 0.6, "standard"))]
    # √(.01² + .01²) = .014, and .1 is 7.1 of it
    assert said(written(tmp_path, sides[:1], sides[1:])) == (
        "▼ Worse: mine in place of standard reaches 0.5000 ± 0.01 in F1 of the features, against 0.6000 ± 0.01 of the "
        "baseline standard at the same L0, 20.00: 0.1000 ± 0.014 lower, 7.1 standard errors where 2 are asked for.")


def test_a_verdict_between_two_saes_and_without_errors(tmp_path):
    """Fails if the sentence hides that the baseline's figure lies between two SAEs, or that no error is known."""
    points = ((20.0, 0.80), (80.0, 0.90))
    between = said(written(tmp_path, [run("r", {"core.l0": 40.0, CE: 0.87}, {CE: 0.002}, variant="mine")],
                           saes_of("standard", points)))
    # in the middle of 20 and 80 on a log axis: .85, and ±.002 with ±.002 is ±.0028
    assert between == ("▲ Better: mine in place of standard reaches 0.8700 ± 0.002 in CE loss score, against 0.8500 ± "
                       "0.002 of the baseline standard at the same L0, 40.00, between its SAEs of L0 20.00 and 80.00: "
                       "0.0200 ± 0.0028 higher, 7.1 standard errors where 2 are asked for.")
    text = written(tmp_path, [run("r", {"core.l0": 50.0, CE: 0.95}, variant="mine")], [BASE])
    assert said(text) == ("≈ Within the noise: mine in place of standard reaches 0.9500 in CE loss score, against "
                          "0.9000 ± 0.003 of the baseline standard at the same L0, 50.00: 0.0500 higher; no standard "
                          "error of CE loss score is known of the run.")
    assert advised(text).startswith("run several seeds of both")


def test_a_verdict_with_other_seeds(tmp_path):
    """Fails if seeds beside a run do not count in what is said of how sure it is, or their verdict's command lacks."""
    for seed in range(3):
        finished(tmp_path / f"run_{seed}", seed)
    text = report.again(tmp_path / "run_0").read_text()
    # .900, .901 and .902: their mean, and .001 / √3
    assert "Over 3 seeds it reaches 0.9010 ± 0.00058." in said(text)


def test_several_saes_have_a_line_each(tmp_path):
    """Fails if a sweep's SAEs have no place and verdict of their own, or their sentence is not that of the mean."""
    ours = [run(f"p {k}", {"core.l0": k, CE: ce}, {CE: 0.003}, variant="mine", hyper={"k": k})
            for k, ce in ((20.0, 0.83), (50.0, 0.862))]
    base = saes_of("standard", ((20.0, 0.80), (50.0, 0.86)))
    text = written(tmp_path, ours, base)
    # (.03 + .002) / 2, with the mean of two errors √(.003² + .002²) = .0036
    assert said(text) == (
        "▲ Better: of 2 SAEs 1 is better, 1 is within the noise, with mine in place of standard; over all the mean of "
        "CE loss score is 0.0160 ± 0.0036 higher, 4.4 standard errors where 2 are asked for. The best that counts is p "
        "20.0: 0.8300 ± 0.003 at L0 20.00, against 0.8000 ± 0.002 of its baseline, 0.0300 ± 0.0036 higher, 8.3 "
        "standard errors where 2 are asked for. Among the SAEs: k 20.0, 50.0.")
    assert {"sae-p 20.0", "sae-p 50.0"} <= set(Page(text).ids)


def test_a_sweep_counts_its_suspects(tmp_path):
    """Fails if one suspect SAE of three speaks for all, is the best, or each has a warning of its own."""
    ours = [run(f"k_{l0:g}", {"core.l0": l0, CE: ce}, {CE: 0.003}, variant="mine", hyper={"k": l0})
            for l0, ce in ((50.0, 0.93), (110.0, 0.99), (120.0, 0.98))]
    text = written(tmp_path, ours, saes_of("standard", ((20.0, 0.80), (50.0, 0.90), (200.0, 0.95))))
    assert said(text) == (
        "! Suspect: of 3 SAEs 1 is better, 2 are suspect (not sparse), with mine in place of standard. The best that "
        "counts is k_50: 0.9300 ± 0.003 at L0 50.00, against 0.9000 ± 0.002 of its baseline, 0.0300 ± 0.0036 higher, "
        "8.3 standard errors where 2 are asked for. Among the SAEs: k 50.0, 110.0, 120.0.")
    shown = Page("".join(piece.split("</div>")[0] for piece in text.split("<div class=warn>")[1:])).text
    assert shown == ("not sparse: L0 = 110.0, 120.0 is more than a tenth of its 1,000 features — k_110, k_120")


def test_sentences_have_no_commands(tmp_path):
    """Fails if what runs/verdict.py says to do is not told from why: every advice in it is behind a colon."""
    source = Path(verdict.verdicts.__file__).read_text()
    advices = re.findall(r": (?:compare with a|compare runs|set k|choose \w+|run several)", source)
    assert len(advices) >= 6 and all(verdict.ADVICE.search("x" + advice) for advice in advices)


def test_a_failed_run_says_so(tmp_path):
    """Fails if the page of a run whose eval crashed, made again, gives it a verdict, or loses where it failed."""
    out = record(tmp_path / "run_1", {"layer_3": entry({CE: 0.9})})
    folder.write_json(out / "verdict.json", dict(verdict="failed", phase="eval core", why="no room"))
    folder.write_json(out / "run_info.json", dict(status="failed", settings={"variant": "topk"}))
    assert said(report.again(out).read_text()) == "✕ Failed in eval core: no room."


def test_what_changed_in_the_code(tmp_path, monkeypatch):
    """Fails if the diff is not that to the baseline's file, added and removed lines lack a sign, or it is unbounded."""
    base, ours = (record(tmp_path / name, {"layer_3": entry({"core.l0": 5.0, CE: 0.9}, {CE: 0.01}, variant=name)})
                  for name in ("theirs", "ours"))
    (base / "variant.py").write_text("a = 1\nb = 2\n<i>\n")
    (ours / "variant.py").write_text("a = 1\nb = 3\nc = 4\n<i>\n")
    monkeypatch.setattr(compare, "stored_baselines", lambda runs: list(read(base).values()))
    monkeypatch.setattr(verdict.verdicts, "nearest", lambda text, file: (9, "far", b"x\n" * 9))
    text = report.again(ours).read_text()
    assert "2 lines added to and 1 taken from the baseline theirs's variant.py" in said(text)
    diff = text.split("variant.py against the baseline theirs's")[1].split("</pre>")[0]
    assert "<ins>+b = 3</ins><ins>+c = 4</ins>" in diff and "<del>-b = 2</del>" in diff
    assert "<span> &lt;i&gt;</span>" in diff
    long = verdict.as_html(["+x"] * 1000)
    assert long.count("<ins>") == verdict.DIFF_LINES and "600 more lines" in long


# ------------------------------------------------------------------------------------------------ the whole page


def test_report_is_self_contained_small_and_escaped(tmp_path):
    """Fails if text from outside becomes markup, the page loads anything, grows past 1 MB, or a part is lost."""
    evil = "<script>alert(1)</script>\ud800\n"
    sections = {f"layer_3.{evil}{k}": run(f"r {evil}{k}", {"core.l0": k + 1.0, CE: 0.9}, variant=evil)
                for k in range(2)}
    sections["x"] = Run("x", {"core.l0": None}, {}, {}, [evil], Path("/nowhere/x.json"))
    log = [{"sae": evil + str(k), "step": s, "tokens": s * 100, "loss": math.nan if s % 2 else 1 / (s + 1),
            "auxk": "", "l0": "32.5"} for s in range(3000) for k in range(8)]
    path = report.write(tmp_path, sections, [run("b", {"core.l0": 1.0})], log)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    own = [tag for tag in page.tags if tag == "script"]
    assert len(own) == len(page.data) + 3 and page.loads == [] and page.tags.count("svg") >= 3
    assert path.stat().st_size < 1_000_000 and "could not be shown" not in text
    drawn = [one.split("</svg>")[0] for one in text.split("<svg")[1:]]
    assert not any("nan" in svg.lower() or "inf," in svg.lower() for svg in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("saes, metrics", [(24, 2000), (200, 114), (3, 2000)])
def test_a_large_page_is_bounded(tmp_path, saes, metrics):
    """Fails if many SAEs, metrics, rows of the log or pictures make the page larger than 3 MB, a part is lost for it,
    or what is left out goes unsaid.
    """
    names = [CE, *(f"sparse_probing.data_set_{i}_test_accuracy" for i in range(metrics))]
    sides = [[run(f"{side}_{k}", {"core.l0": 5.0 + k, **{name: 0.5 + i * k / 1e6 for i, name in enumerate(names)}},
                  dict.fromkeys(names, 0.01234), variant=side, hyper={"k": k}) for k in range(saes)]
             for side in ("mine", "standard")]
    log = [{"sae": one.name, "step": s, "tokens": s * 1000, **{f"term_{i}": s / 7 for i in range(30)}}
           for s in range(100) for one in sides[0]]
    pictures = tmp_path / "variant_report/layer_3"
    pictures.mkdir(parents=True)
    for i in range(50):
        (pictures / f"{i:02}.png").write_bytes(bytes(200_000))
    text = written(tmp_path, sides[0], sides[1], log)
    assert len(text.encode()) < 3_000_000 and "could not be shown" not in text and "larger than 3 MB" not in text
    page = Page(text)
    (menu,) = map(charts, Page(part(text, "Frontier")).data)
    kept = len(menu)
    assert kept == metrics + 1 or f"The menu has {kept:,} of {metrics + 1:,}" in page.text
    assert page.tags.count("img") == 2 and "48 more in variant_report/" in page.text
    drawn = part(text, "Training").count("<figure")
    assert drawn == 30 or (drawn > 5 and f"{30 - drawn} more columns are in training_log.csv" in page.text)
    assert "variant_report/layer_3/49.png" in page.links


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    """Fails if a page that is too large all the same is written so, or the verdict is left out before the rest."""
    whole = written(tmp_path, [run("r", {"core.l0": 50.0, CE: 0.92}, {CE: 0.004}, variant="mine")], [BASE])
    log = [{"sae": "r", "step": s, "tokens": s, "loss": 1 / s} for s in range(1, 999)]
    monkeypatch.setattr(report, "SIZE", len(whole.encode()) + 1000)
    text = written(tmp_path, [run("r", {"core.l0": 50.0, CE: 0.92}, {CE: 0.004}, variant="mine")], [BASE], log)
    assert len(text.encode()) <= report.SIZE and "▲ Better: mine" in said(text)
    assert "The training curves would make this page larger than 3 MB: see training_log.csv." in text


def test_without_dashboards_the_page_says_so(tmp_path):
    """Fails if boards that are lacking or damaged go without a word, or a run's note is not in its page."""
    out = tmp_path / "run 1"
    (out / "sae").mkdir(parents=True)
    (out / "run_info.json").write_text(json.dumps({"settings": {"note": "a <wider> penalty"}}))
    (base, mine) = (run(name, {CE: 0.9, "core.l0": 32.0}) for name in ("b", "mine"))
    html = report.write(out, {"s": mine}, [base], []).read_text()
    assert "<code>python -m runs.dashboards &#x27;run 1&#x27;</code> makes them" in html
    assert "<p class=note>a &lt;wider&gt; penalty</p>" in html
    (out / "features").mkdir()
    (out / "features/s.json.gz").write_bytes(b"damaged")
    html = report.write(out, {"s": mine}, [base], []).read_text()
    assert "the features of s could not be shown: ValueError: run 1/features/s.json.gz is damaged" in html


def test_a_board_is_read_once(tmp_path, monkeypatch):
    """Fails if the parts of a page and the pages of features each read and parse the same board."""
    out = record(tmp_path / "run_1", {name: entry({"core.l0": 20.0, CE: 0.8}) for name in ("layer_3", "layer_9")})
    for name in ("layer_3", "layer_9"):
        features.write(out, board(name))
    asked, read_one = [], features.read
    monkeypatch.setattr(features, "read", lambda folder, sae: asked.append(sae) or read_one(folder, sae))
    text = report.again(out).read_text()
    assert asked == ["layer_3", "layer_9"] and "Density · " in text and "Feature " in part(text, "Features")
    features.write(out, board("layer_9", features=50))
    assert "of 50 features" in report.again(out).read_text()  # another board at its place is


def test_sure_verdicts_alone_have_a_colour(tmp_path):
    """Fails if an unsure verdict is coloured, a sure one is not, or a name that reads like one is taken for it."""
    base = run("b", {"core.l0": 50.0, CE: 0.9, R2: 0.8}, {CE: 0.004, R2: 0.004}, variant="standard")
    ours = [run(name, {"core.l0": 50.0, CE: 0.95, R2: 0.801}, {CE: 0.004, R2: 0.004}, variant="mine")
            for name in ("better*", "better")]
    for runs, cells in ((ours, ["better*", "better*"]), (ours[1:], ["better"])):
        shown = part(written(tmp_path, runs, [base]), "Comparison").split("<details>")[0]
        coloured = [cell.split(">")[1].split("<")[0] for cell in shown.split("<td class=\"")[1:]
                    if cell.split("\"")[0].endswith(("better", "worse"))]
        assert coloured == cells and shown.count(">better") > len(cells)


def test_a_part_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    """Fails if an error in one part takes the page with it, or goes unsaid."""
    def broken(*_):
        raise RuntimeError("<b>gone")

    monkeypatch.setattr(health, "part", broken)
    text = written(tmp_path, [run("r", {"core.l0": 5.0, CE: 0.9})], None)
    assert "the health could not be shown: RuntimeError: &lt;b&gt;gone" in text and ">Settings</h2>" in text


def test_the_command_makes_a_page_again(tmp_path, capsys):
    """Fails if it touches another file, needs a board, or a folder without a run ends in more than a line."""
    out = record(tmp_path / "run_1", {"layer_3": entry({"core.l0": 5.0, CE: 0.9})})
    (out / "training_log.csv").write_text("sae,step,tokens,loss\nlayer_3,1,10,.5\nlayer_3,2,20,.4\n")
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert report.main([str(out)]) == 0
    assert {file: file.read_bytes() for file in out.iterdir() if file.name != "report.html"} == before
    assert ">Training</h2>" in (out / "report.html").read_text()
    assert report.main([str(tmp_path / "none"), str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("give the folder of a finished run" in line or "no final_info" in line
                                   for line in lines)


def test_cost_in_words():
    """Fails if a phase under way counts, shares are not of the rest, or the GPU's memory is not said."""
    info = dict(status="running", seconds={"training": 75.0, "evals": 25.0, "results": 0.5}, tokens_per_s=2_000_000,
                steps=10, settings={"batch_size": 2048}, hardware={"gpu": "H100", "cores": 8},
                peak_memory_gb={"training": {"host": 3.0, "gpu": 41.5}, "evals": {"host": 4.25}},
                versions={"torch": "2.9", "nothing": None})
    text = Page(cost.part(info, [])).text
    assert text.startswith("Cost 1.7 minutes · 2,000,000 tokens a second in training · 4.2 GB of host memory at most · "
                           "42 GB of GPU memory at most · 20,480 tokens in 10 steps · H100 training 75 seconds, 75% "
                           "evals 25 seconds, 25%")
    assert "torch2.9" in text.replace(" ", "") and "nothing" not in text
    assert cost.part({}, []) == ""


# ------------------------------------------------------------------------------------------------ charts


def test_the_frontier_holds_every_metric_at_its_place(tmp_path):
    """Fails if points of two dials are joined, a metric or a point is missing, or the language model's own is shown."""
    points = ((20.0, 0.80), (60.0, 0.85), (100.0, 0.92))
    base, ours = saes_of("standard", points), run("r", {"core.l0": 50.0, CE: 0.85, R2: 0.5, "core.l2_norm_in": 3.0},
                                                  {CE: 0.003}, variant="mine")
    several = [run(f"p {k} {a}", {"core.l0": k, CE: 0.8 + a}, variant="mine", hyper={"k": k, "a": a})
               for k in (20.0, 40.0) for a in (0.0, 0.1)]
    for runs, lines in (([ours], True), (several, False), (saes_of("mine", points), True)):
        (menu,) = map(charts, Page(part(written(tmp_path, runs, base), "Frontier")).data)
        first, second = menu["CE loss score · core.ce_loss_score"]["series"]
        assert (first["name"], second["name"]) == ("this run (mine)", "baseline (standard)")
        assert first["line"] is lines and len(first["points"]) == len(runs)
        assert [point[:3] for point in second["points"]] == [[l0, ce, 0.002] for l0, ce in points]
        assert second["line"] is True and menu["CE loss score · core.ce_loss_score"]["x"]["log"]
    (menu,) = map(charts, Page(part(written(tmp_path, [ours], base), "Frontier")).data)
    assert list(menu) == ["CE loss score · core.ce_loss_score", "R² · core.r2"]
    assert ">Frontier</h2>" not in written(tmp_path, [ours], base[:1])


def finished(place, seed, status="finished", **config):
    """A run's folder, as it is left when the run has ended."""
    record(place, {"layer_3": entry({"core.l0": 5.0, CE: 0.9 + seed / 1000}, variant="mine", seed=seed, **config)})
    folder.write_json(place / "run_info.json", dict(status=status, settings=dict(variant="mine", hyper="")))
    (place / "variant.py").write_text("a = 1\n")
    return place


def test_other_seeds_beside_a_run_are_points(tmp_path):
    """Fails if a seed is missing, or a run under way, of other code or setting, or the same seed again, is taken."""
    out = finished(tmp_path / "run_0", 0)
    for name, seed in (("run 1#", 1), ("run_2", 2), ("run_0.previous-1", 0)):
        (finished(tmp_path / name, seed) / "report.html").write_text("")
    finished(tmp_path / "run_3", 3, status="running")
    finished(tmp_path / "run_4", 4, hyper={"k": 3})
    (finished(tmp_path / "run_5", 5) / "variant.py").write_text("a = 2\n")
    (finished(tmp_path / "run_6", 6) / "final_info.json").write_text("{")
    (tmp_path / "run_7").mkdir()
    found, note = frontier.other_seeds(list(read(out).values()), out, folder.left(out))
    assert [one.config["seed"] for one in found] == [1, 2]
    assert note == "other seeds: finished runs of the same setting beside this one, 2"
    (menu,) = map(charts, Page(part(report.again(out).read_text(), "Frontier")).data)
    own, others = menu["CE loss score · core.ce_loss_score"]["series"]
    assert own["points"] == [[5.0, 0.9, 0.0, "run_0", "#sae-layer_3"]] and others["role"] == "seed"
    assert [point[4] for point in others["points"]] == ["../run%201%23/report.html", "../run_2/report.html"]


def test_many_neighbours_are_bounded(tmp_path, monkeypatch):
    """Fails if looking at neighbours has no end, or what was left out goes unsaid."""
    out = finished(tmp_path / "a", 0)
    finished(tmp_path / "b", 1)
    monkeypatch.setattr(frontier, "SECONDS", -1.0)
    found, note = frontier.other_seeds(list(read(out).values()), out, folder.left(out))
    assert found == [] and note == "other seeds: only 0 of the runs beside this one were looked at"


def test_curves_keep_their_ends_and_choose_their_axis():
    """Fails if the last row is thinned away, a chart grows without bound, or a wide span is linear."""
    log = [{"sae": "a", "step": i, "tokens": i * 10, "loss": 1 / (i + 1), "l0": "32"} for i in range(3000)]
    spec = curves.spec(log, "loss")
    points = spec["series"][0]["points"]
    assert points[0][:2] == [0, 1.0] and points[-1][0] == 29990 and len(points) <= 302 and spec["y"]["log"]
    assert not curves.spec(log, "l0")["y"]["log"] and curves.spec(log, "none")["series"] == []


# ------------------------------------------------------------------------------------------------ health


def test_health_says_what_is_off():
    """Fails if shares are not those counted by hand, a sound SAE is complained of, or an ill one is not."""
    sound = health.Health("a", [0.01] * 99 + [0.0], 1000, [0.2] * 100, None, [1.0] * 20, [0.5] * 20)
    assert health.off(sound) == {}
    # 20 of 100 silent, 2 often; 3 rows alike; the two largest norms of 20 lose .9, the others .5
    ill = health.Health("b", [0.0] * 20 + [0.2] * 2 + [0.01] * 78, 1000, [0.95] * 3 + [0.2] * 97, None,
                        [1.0] * 18 + [9.0, 10.0], [0.5] * 18 + [8.1, 9.0])
    assert list(health.off(ill).values()) == ["20%", "2.0%", "3.0%", "0.90 of the tenth of tokens with the largest "
                                              "norms, 0.50 of the others"]
    assert health.in_words([sound, ill])[0] == "features that fired on none of 1,000 tokens: b 20%"


def test_density_counts_every_feature_that_fires():
    """Fails if a bin is off by one, silent features are in it, or the baseline has other bins."""
    ours = health.Health("a", [1.0, 0.1, 0.01, 0.0], None, None, None, None, None)
    theirs = health.Health("b", [0.001], None, None, None, None, None)
    (spec,) = health.specs(ours, theirs, 10)
    run_, base = spec["series"]
    assert spec["title"] == "Density · 1 of 4 never fired, baseline 0 of 1"
    assert run_["edges"] == base["edges"]
    assert (run_["edges"][0], run_["edges"][-1]) == (-3.0, 0.0)
    # bins of .06 from −3: −2 is in the 16th, −1 in the 33rd, 0 in the last
    assert [i for i, count in enumerate(run_["counts"]) if count] == [16, 33, 49] and base["counts"][0] == 1


def test_densities_of_features_that_always_fire():
    """Fails if a dense SAE, in need of the chart, has none."""
    (spec,) = health.specs(health.Health("a", [1.0, 1.0], None, None, None, None, None), None, 10)
    assert spec["series"][0]["edges"][0] == -1.0 and spec["series"][0]["counts"][-1] == 2


def test_warnings_that_differ_in_figures_are_one():
    """Fails if a figure with an exponent, or one that is none, is taken apart or breaks the page."""
    figures = ("1e-05", "3.5e-07", "1,234.5", "7", "0.25")
    assert verdict._several(list(figures)) == "3.5e-07 to 1,234.5"
    parts = verdict.FIGURE.split("between 1e-05 and 1,234.5 of version 1.2.3")
    assert parts[1::2][:2] == ["1e-05", "1,234.5"] and all(map(float, (one.replace(",", "") for one in parts[1::2])))


def test_density_stands_beside_the_baselines():
    """Fails if a board's count of the baseline's densities is not drawn, or in other bins than the run's own."""
    counted = {"edges": [-4.0, -3.0, -2.0, -1.0, 0.0], "counts": [0, 5, 6, 7], "silent": 2, "of": 20}
    ours = health.Health("a", [0.5, 0.05, 0.02, 0.0], None, None, None, None, None, counted)
    (spec,) = health.specs(ours, None, 10)
    run_, base = spec["series"]
    assert spec["title"] == "Density · 1 of 4 never fired, baseline 2 of 20"
    assert run_["edges"] == base["edges"] == counted["edges"] and run_["counts"] == [0, 0, 2, 1]
    assert (base["name"], base["counts"]) == ("baseline", [0, 5, 6, 7])


def test_a_board_counts_the_baselines_densities():
    """Fails if a density is in another bin than its logarithm says, or features that never fire are in one."""
    seen = sweeps.Seen.nothing(6)
    seen.fired_F = torch.tensor([0, 1000, 100, 10, 1, 0])
    seen.l0.append(torch.zeros(1000))
    found = dashboards._densities(seen)
    # of 1,000 tokens from 10⁻³ to 1 in 40 bins: 13⅓ a decade
    assert (found["edges"][0], found["edges"][-1], len(found["edges"])) == (-3.0, 0.0, 41)
    assert [i for i, count in enumerate(found["counts"]) if count] == [0, 13, 26, 39] and sum(found["counts"]) == 4
    assert (found["silent"], found["of"]) == (2, 6)


def test_a_constant_l0_is_one_bar():
    """Fails if an L0 that all tokens share fills the chart, or falls between whole numbers."""
    for l0, edges, counts in ((32, [30, 31, 32, 33, 34, 35], [0, 0, 9, 0, 0]), (0, [0, 1, 2, 3], [9, 0, 0])):
        known = health.Health("a", [0.1], None, None, {"edges": [l0, l0 + 1], "counts": [9]}, None, None)
        spec = health.specs(known, None, 10)[1]
        assert spec["x"]["whole"] and (spec["series"][0]["edges"], spec["series"][0]["counts"]) == (edges, counts)


def test_health_of_a_run_of_before_boards(reference, tmp_path):
    """Fails if core's details do not serve where no board is kept, or their tokens are not counted."""
    out = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(out / "features", ignore_errors=True)
    (name,) = read(out)
    known = health.of(out, name)
    (file,) = (out / "eval_results/core").glob("*.json")
    details = json.loads(file.read_bytes())["eval_result_details"]
    assert known.density == [one["feature_density"] for one in details] and known.tokens > 0
    text = report.again(out).read_text()
    assert "Density · " in part(text, "Health") and "could not be shown" not in text


def test_hostile_names_stay_text(tmp_path):
    """Fails if a name of a variant, SAE, model or a note becomes a tag, an attribute or an address."""
    for i, evil in enumerate(HARMFUL):
        ours = [run(f"r {evil}", {"core.l0": 5.0 + k, CE: 0.9}, variant=evil, model=evil, hyper={evil: k})
                for k in range(2)]
        text = written(tmp_path / str(i), ours, None)
        page = Page(text)
        assert page.tags.count("script") == len(page.data) + 3 and "img" not in page.tags
        assert all(link.startswith(("#", "../", "features/")) for link in page.links)
