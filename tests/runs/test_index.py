"""All runs on one page: every run once and with how it ended, best ones by brute force, nobody's file replaced."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from runs import compare, index, ledger
from runs.folder import write_json
from runs.page import index as pages
from runs.page.verdict import WORDS
from tests import PROJECT
from tests.pages.boards import HARMFUL
from tests.runs.folders import many
from tests.runs.records import CE, entry, record


def told(html: str) -> dict:
    """What the page's scripts read."""
    data = json.loads(re.search(r'<script type="application/json" id="runs-data">(.*?)</script>', html)[1])
    columns = {key: column if isinstance(column, list) else [column["all"]] * data["count"]
               for key, column in data["rows"].items()}
    return data | dict(rows=columns)


def leads(row: dict) -> str | None:
    """Where a run's name leads."""
    return f"{row['at']}/{row['files'][0]}" if row["files"] else None


@pytest.mark.parametrize("way", ["higher", "lower"])
def test_the_best_by_brute_force(way):
    """Fails if the running best or the Pareto front lacks a run that nothing beats, or has one that something does."""
    draw = random.Random(way)
    better = {"higher": lambda a, b: a > b, "lower": lambda a, b: a < b}[way]
    for _ in range(300):
        values = [draw.choice([None, *range(8)]) for _ in range(draw.randrange(12))]
        first = [i for i, value in enumerate(values) if value is not None
                 and all(before is None or better(value, before) for before in values[:i])]
        assert pages.running_best(values, way) == first
        points = [(draw.randrange(1, 6), draw.randrange(6)) for _ in range(draw.randrange(12))]
        beaten = {b for b in points for a in points if a != b and a[0] <= b[0] and not better(b[1], a[1])}
        front = [points[i] for i in pages.pareto(points, way)]
        assert front == sorted(set(points) - beaten)
    assert pages.running_best([1, 2], "") == pages.pareto([(1, 2)], "") == []


def ended(out, word, minutes=1.5, settings=None, **more):
    """A run's folder, and its line in the ledger."""
    said = dict(run=out.name, variant="mine", model="tiny", seed=0, metric=None, verdict=word, minutes=minutes) | more
    given = dict(variant="mine", hyper="", sweep="", note="", model="org/tiny") | (settings or {})
    write_json(out / "run_info.json", dict(status="failed" if word == "failed" else "finished", settings=given, seed=0))
    (out / "variant.py").write_text("code")
    write_json(out / "verdict.json", said)
    assert ledger.append(out.parent, ledger.row(said, b"code", None, "", "", given["note"], 100 * minutes)) == ""


def test_every_run_once(tmp_path):
    """Fails if a run is told twice or not at all, its line leads to another's folder, or a cause is not said."""
    ended(tmp_path / "run_1", "failed", 1, why="no memory", phase="training", advice="buy some")
    (tmp_path / "run_1").rename(tmp_path / "run_1.previous-1")
    ended(tmp_path / "run_1", "better", 2, metric=CE, value=0.9, difference=0.1)
    (tmp_path / "run_1/report.html").write_text("a report")
    ended(tmp_path / "run_2", "failed", 3, why="interrupted")
    ended(tmp_path / "run_2", "worse", 4, metric=CE, value=0.7, difference=-0.1)  # went on
    write_json(tmp_path / "run_3/run_info.json", dict(status="running", phase="evals", settings=dict(variant="mine")))
    record(tmp_path / "old", {"layer_3": entry({"core.l0": 20.0, CE: 0.5}, seed=7, variant="topk")})
    ended(tmp_path / "gone", "failed", 5, why="nobody knows")
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    seen = index.overview(tmp_path)
    rows = {(row["run"], row["verdict"]): row for row in seen["rows"]}
    assert sorted(rows) == sorted([("run_1", "failed"), ("run_1", "better"), ("run_2", "worse"), ("run_3", "killed"),
                                   ("old", "incomparable"), ("gone", "failed")])
    assert len(seen["rows"]) == 6 and seen["continued"] == 1
    assert [row["run"] for row in seen["rows"] if row["best"]] == ["run_1"]
    assert rows["run_1", "failed"]["folder"] == "run_1.previous-1" and rows["run_1", "failed"]["why"] == "no memory"
    assert leads(rows["run_1", "better"]) == "run_1/report.html"
    assert leads(rows["old", "incomparable"]) == "old/final_info.json" and leads(rows["gone", "failed"]) is None
    assert leads(rows["run_3", "killed"]) == "run_3/run_info.json"
    html = pages.page(seen)
    for text in ("no memory", "to do: buy some", "in evals: ", "killed without a word", "its folder is gone"):
        assert text in html
    assert "<strong>6 runs</strong>" in html and "2 failed" in html and "1 killed" in html and "Failed: 3" in html


def test_a_run_under_way(tmp_path):
    """Fails if a run whose process holds its folder counts as failed, or how far it is is not said."""
    filelock = pytest.importorskip("filelock")
    write_json(tmp_path / "run_1/run_info.json", dict(status="running", phase="evals", settings=dict(variant="mine")))
    write_json(tmp_path / "run_1/progress.json", dict(phase="training", share=0.4375, eta_seconds=300))
    with filelock.FileLock(tmp_path / "run_1/.lock"):
        html = pages.page(index.overview(tmp_path))
    assert "in training, 44% of it done, 5 min left of it" in html and "<h2>Failed" not in html


def test_only_what_lies_inside_is_linked(tmp_path):
    """Fails if a link leaves the folder, is absolute, or a name is not quoted; or if --out elsewhere breaks links."""
    root = tmp_path / "all"
    for place in (root / "a b#?%é", root / "javascript:alert(1)", tmp_path / "elsewhere"):
        ended(place, "better", metric=CE, value=0.9)
        (place / "report.html").write_text("a report")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "inside").symlink_to(root / "a b#?%é")
    found = {row["folder"]: leads(row) for row in index.overview(root)["rows"]}
    assert found == {"a b#?%é": "a%20b%23%3F%25%C3%A9/report.html", "linked": None, "inside": "inside/report.html",
                     "javascript:alert(1)": "javascript%3Aalert%281%29/report.html"}
    html = index.write(root, out=tmp_path / "pages.html").read_text()
    assert "all/a%20b%23%3F%25%C3%A9" in told(html)["rows"]["at"] and '"all/a%20b%23%3F%25%C3%A9/report.html"' in html


def harm(root):
    """Runs whose every text is harmful, whose numbers are none, and whose files are not what they are called."""
    for i, text in enumerate(HARMFUL):
        name = text.replace("/", "∕").replace("\0", "") or "nul"
        out = root / f"{i} {name}"
        ended(out, ["better", "failed", text][i % 3], i + 1, variant=text, model=text, metric=CE, value=0.5 + i / 100,
              difference=0.1, why=text, phase=text, advice=text, hyper=text,
              settings=dict(note=text, profile=text, hyper=text, **{text: text}))
        means = {"core.l0": 20.0 + i, CE: 0.5, text: 0.3}
        record(out, {text: entry(means, model=text, variant=text, hyper={text: text})})
        (out / "report.html").write_text("a report")
    for name, content in {"deep": "[" * 100_000, "huge": '{"means": 1' + "0" * 400 + "}", "not": "\0\1",
                          "nan": '{"layer_1": {"means": {"core.l0": NaN, "core.r2": 1e999}}}',
                          "list": '[{"verdict": "better"}]', "types": '{"verdict": ["better"], "minutes": {}}'}.items():
        (root / name).mkdir()
        for file in ("run_info.json", "verdict.json", "final_info.json"):
            (root / name / file).write_text(content)
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe/verdict.json")
    (root / "loop").symlink_to(root / "loop")
    (root / "endless").mkdir()
    (root / "endless/run_info.json").symlink_to("/dev/zero")
    return root


class Tags(HTMLParser):
    """How many elements of each kind a page has, and all their attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = Counter(), []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag != "use":  # matplotlib's points
            self.attributes += attributes


def test_harmful_runs_make_a_harmless_page(tmp_path):
    """Fails if a text comes to be HTML, a number that is none ends the page, or a file is read that never ends."""
    html = index.write(harm(tmp_path)).read_text()
    reader = Tags()
    reader.feed(html)
    assert reader.tags["script"] == 1 + len(pages.SCRIPTS) and not reader.tags.keys() & {"img", "b"}
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert all(re.fullmatch(r"[\w%.~-]+/(report\.html|\w+\.json)", value) for name, value in reader.attributes
               if name == "href")
    data = told(html)
    assert {HARMFUL[0], HARMFUL[5]} <= set(data["rows"]["variant"])
    assert len(data["rows"]["run"]) >= len(HARMFUL)


def test_settings_are_kept_once():
    """Fails if a setting of a run is another after the common values are kept once."""
    draw = random.Random(1)
    each = [None if draw.random() < 0.1 else
            {key: draw.choice("xy") for key in "abcd" if draw.random() < 0.9} for _ in range(50)]
    common, own = pages.compact(each)
    back = [None if mine is None else {key: value for key, value in (common | mine).items() if value is not None}
            for mine in own]
    assert back == each and sum(map(len, filter(None, own))) < sum(map(len, filter(None, each)))


def test_nothing_of_anybody_is_replaced(tmp_path, capsys):
    """Fails if another's file is overwritten, our own earlier page is not, or what is wrong takes more than a line."""
    ended(tmp_path / "run_1", "better", metric=CE, value=0.9)
    page, mine = tmp_path / "runs.html", tmp_path / "index.html"
    page.write_text("my own")
    mine.write_text("my own, too")
    assert index.main([str(tmp_path)]) == 1 == index.main([str(tmp_path), f"--out={tmp_path}"])
    assert capsys.readouterr().err.count("\n") == 2 and page.read_text() == "my own"
    page.unlink()
    assert index.main([str(tmp_path)]) == 0 and capsys.readouterr().out == f"{page}\n"
    ended(tmp_path / "run_2", "worse", metric=CE, value=0.8)
    assert index.main([str(tmp_path)]) == 0 and "run_2" in page.read_text() and mine.read_text() == "my own, too"
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".tsv") == ["index.html", "run_1", "run_2",
                                                                                        "runs.html"]
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for wrong in ([str(tmp_path / "empty")], [str(tmp_path / "nowhere")], [str(tmp_path), "--by=valeu"],
                  [str(tmp_path), f"--out={tmp_path / 'no/where.html'}"]):
        assert index.main(wrong) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_in_the_order_asked_for(tmp_path):
    """Fails if a metric's or a column's best run is not first, or a run without a figure comes before one with it."""
    for i, (r2, loss) in enumerate([(0.5, 9.0), (0.7, 7.0), (None, None), (0.6, 8.0)]):
        ended(tmp_path / f"run_{i}", "better", i + 1, metric="core.r2", value=r2, difference=r2)
        record(tmp_path / f"run_{i}", {"layer_3": entry({"core.l0": 20.0, "core.r2": r2, "core.mse": loss})})
    def order(by):
        seen = index.overview(tmp_path, by)
        return [seen["rows"][i]["run"][-1] for i in seen["order"]]

    assert (order("time"), order("core.r2"), order("core.mse")) == (list("3210"), list("1302"), list("1302"))
    assert (order("value"), order("run"), order("minutes")) == (list("1302"), list("0123"), list("3210"))


def stored(tmp_path, name, r2, seed=0, **said):
    """A run that is the stored baseline of SmolLM2 at one of its L0, but for this R²."""
    written = json.loads((PROJECT / "runs/baseline/smollm2-135m-instruct/topk/final_info.json").read_text())
    section, one = next(iter(written.items()))
    means = one["means"] | {"core.r2": one["means"]["core.r2"] + r2, "core.mse": one["means"]["core.mse"] * (1 - r2)}
    ended(tmp_path / name, **{"word": "within_noise", "metric": CE, "value": 0.9, "difference": 0.0001} | said)
    record(tmp_path / name, {section: one | dict(means=means, config=one["config"] | dict(seed=seed, variant="mine"))})


def test_another_metric_is_judged_as_the_command_does(tmp_path, capsys):
    """Fails if --by METRIC judges a run otherwise than runs.compare --headline, or lets what failed count."""
    for name, r2 in {"up": 0.1, "down": -0.1, "same": 1e-6}.items():
        stored(tmp_path, name, r2)
    ended(tmp_path / "broken", "failed", 9, why="no memory")
    ended(tmp_path / "gone", "better", 8, metric=CE, value=0.9, difference=0.1)
    (tmp_path / "gone/run_info.json").unlink()
    seen = index.overview(tmp_path, "core.r2")
    rows = {row["run"]: row for row in seen["rows"]}
    for name in ("up", "down", "same"):
        compare.main([str(tmp_path / name), "--headline=core.r2", "--exit-status", "--json"])
        told_there = json.loads(capsys.readouterr().out)["verdict"]
        assert rows[name]["verdict"] == told_there["verdict"] and rows[name]["metric"] == "core.r2"
        assert rows[name]["difference"] == pytest.approx(told_there["difference"], rel=1e-5)
    assert [rows[name]["verdict"] for name in ("up", "broken", "gone")] == ["better", "failed", "incomparable"]
    assert [seen["rows"][i]["run"] for i in seen["order"]][:3] == ["up", "same", "down"]
    assert "Judged by <strong>core.r2</strong>" in pages.page(seen)
    plain = index.overview(tmp_path, "training.final_loss")
    assert {row["verdict"] for row in plain["rows"]} == {"within_noise", "failed", "better"}
    assert "which has no verdict" in pages.page(plain)


def test_what_does_not_count_comes_behind(tmp_path):
    """Fails if a suspect run, whose figure is the best, comes before one that counts, or is marked as it is."""
    for i, word in enumerate(["failed", "suspect", "better", "incomparable", "worse"]):
        difference = None if word in ("incomparable", "failed") else 0.5 - i / 10
        ended(tmp_path / word, word, i, metric="core.r2", value=0.9 - i / 10, difference=difference)
    for by in ("value", "difference"):
        seen = index.overview(tmp_path, by)
        assert [seen["rows"][i]["run"] for i in seen["order"]] == ["better", "worse", "suspect", "incomparable",
                                                                   "failed"]
    rows = re.findall(r"<tr( class=apart)?><td class='l name'>(?:<a[^>]*>)?(\w+)", pages.page(seen))
    assert {name for mark, name in rows if mark} == {"suspect", "incomparable", "failed"} and len(rows) == 5


def test_each_sae_of_a_sweep(tmp_path):
    """Fails if a sweep is drawn at an L0 that none of its SAEs has, or all of them with the verdict of one."""
    saes = {f"layer_3.k_{k}": entry({"core.l0": k, CE: 0.8 + k / 1000}, variant="mine") for k in (16.0, 32.0, 64.0)}
    each = {name: dict(verdict=word, why="a reason", value=0.8) for name, word in
            zip(saes, ("better", "suspect", "incomparable"))}
    ended(tmp_path / "sweep", "suspect", metric=CE, value=0.83, l0=37.3, saes=each)
    record(tmp_path / "sweep", saes)
    ended(tmp_path / "one", "failed", 2, metric=CE)
    record(tmp_path / "one", {"layer_3": entry({"core.l0": 20.0, CE: 0.99})})
    seen = index.overview(tmp_path)
    drawn = {one["name"]: one["points"] for one in pages.frontier(seen, 0, CE)["series"]}
    assert drawn == {"comparable": [[16, 0.816, 0]], "suspect": [[32, 0.832, 0]], "not comparable": [[64, 0.864, 0]],
                     "best of the comparable": [[16, 0.816, 0]],
                     "SAEs of one run": [[16, 0.816, 0], [32, 0.832, 0], [64, 0.864, 0]]}
    html = pages.page(seen)
    assert "16–64, 3 SAEs" in html and "37.3" not in html[:html.index('id="runs-data"')]
    assert "</span> 0.8300" in html and html.count("mean</span>") == 1
    assert [one["why"] for one in told(html)["saes"]["said"].values()] == ["a reason"] * 3


def test_the_largest_comparable_group_comes_first(tmp_path):
    """Fails if the page opens on runs without a difference, or takes runs of two layers, or models, for one group."""
    for i in range(5):
        ended(tmp_path / f"none_{i}", "incomparable", i, model="other", metric=CE, value=0.5)
    for i, layer in enumerate((3, 3, 4)):
        ended(tmp_path / f"run_{i}", "better", 10 + i, metric=CE, value=0.5, difference=0.1 + i / 10)
        record(tmp_path / f"run_{i}", {f"layer_{layer}": entry(
            {"core.l0": 20.0, CE: 0.5}, layer=layer, hook_name=f"blocks.{layer}.hook_resid_post")})
    seen = index.overview(tmp_path)
    counts = [(one["where"], one["comparable"], one["runs"]) for one in pages.groups(seen["rows"])]
    assert counts == [("tiny, layer 3", 2, 2), ("tiny, layer 4", 1, 1), ("other, layer not known", 0, 5)]
    assert [row["run"] for row in seen["rows"] if row["best"]] == ["run_0", "run_1", "run_2"]


def test_seeds_of_one_setting_are_counted(tmp_path):
    """Fails if a failed seed counts as a result, or another variant's file as a seed of this one."""
    for seed, word in enumerate(["better", "worse", "failed"]):
        ended(tmp_path / f"run_{seed}", word, metric=CE, seed=seed, value=0.5, difference=0.1)
    ended(tmp_path / "other", "better", metric=CE, seed=7, value=0.5, difference=0.2, variant="other")
    assert {row["run"]: row["seeds"] for row in index.overview(tmp_path)["rows"]} == {
        "run_0": 2, "run_1": 2, "run_2": 2, "other": 1}


@pytest.mark.parametrize("name", ["it's", "a b", "$(touch x)", "-x", "~", "a;b", "a\nb", "a\u202eb", "plain-1.2"])
def test_a_folder_as_a_word_of_a_command(tmp_path, name):
    """Fails if a shell reads another word than the folder's name, or what cannot be pasted is offered."""
    for place in (tmp_path / name, Path(name)):
        said = index.for_a_shell(place)
        if not name.isprintable():
            assert said is None
            continue
        shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {said}"], capture_output=True, text=True, check=True)
        assert shell.stdout in (f"{place}\n", f"./{place}\n")


def test_one_sign_for_a_verdict():
    """Fails if this page and a run's report have different signs for a verdict, or one lacks its meaning."""
    for word, (sign, _) in WORDS.items():
        assert pages.VERDICTS[word][0] == sign and pages.MEANS[word]


@pytest.mark.slow
def test_a_thousand_runs(tmp_path):
    """Fails if 1,000 runs take more than 10 s or 5 MB, torch is loaded, or a run is missing from the table."""
    many(tmp_path, 1000)
    code = ("import sys; from runs import index; left = index.main(sys.argv[1:]);"
            "sys.exit(left or 'torch' in sys.modules)")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True)
    took = time.monotonic() - began
    html = (tmp_path / "runs.html").read_bytes()
    assert done.returncode == 0, done.stderr
    assert len(html) < 5_000_000 and took < 10
    table = html[html.index(b"<table id=runs>"):html.index(b'id="runs-data"')]
    assert len(set(re.findall(rb"run_\d+", table))) == 1000
