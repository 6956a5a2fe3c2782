"""report.html: whole, small, without markup from outside, and its charts drawn where they belong."""

import html.parser
import math
import re
from pathlib import Path

from runs import report
from runs.reading import Run
from tests.runs.records import CE, R2, run, saes_of


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href") or "url(" in (v or "")]


def test_report_is_self_contained_small_and_escaped(tmp_path):
    """Fails if text from outside becomes markup, the page loads anything, grows past 1 MB, or NaN reaches a drawing."""
    evil = "<script>alert(1)</script>\ud800\n"
    sections = {f"layer_3.{evil}{k}": run(f"r {evil}{k}", {"core.l0": k + 1.0, CE: 0.9}, variant=evil)
                for k in range(2)}
    sections["x"] = Run("x", {"core.l0": None}, {}, {}, [evil], Path("/nowhere/x.json"))
    log = [{"sae": evil + str(k), "step": s, "tokens": s * 100, "loss": math.nan if s % 2 else 1 / (s + 1),
            "auxk": "", "l0": "32.5"} for s in range(3000) for k in range(8)]
    context = [(evil, 1.5), (" word", 0.0), ("\"'&", math.nan)] * 43
    board = {"density": 0.01, "max_activation": 1.5, "contexts": [context] * 10, "top_logits": [(evil, 1.0)]}
    boards = [{"feature": n, **board} for n in range(300)]
    path = report.write(tmp_path, sections, [run("b", {"core.l0": 1.0})], log, boards)
    text = path.read_text(encoding="utf-8")
    page = Tags(text)
    assert "script" not in page.tags and page.loads == [] and page.tags.count("svg") >= 3
    assert path.stat().st_size < 1_000_000 and "more left out to keep the page small" in text
    drawn = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    assert not any("nan" in svg.lower() or "inf" in svg.lower() for svg in drawn)


def test_sure_verdicts_alone_have_a_colour(tmp_path):
    """Fails if an unsure verdict is coloured, a sure one is not, or a name that reads like one is taken for it."""
    base = run("b", {"core.l0": 50.0, CE: 0.9, R2: 0.8}, {CE: 0.004, R2: 0.004}, variant="standard")
    ours = [run(name, {"core.l0": 50.0, CE: 0.95, R2: 0.801}, {CE: 0.004, R2: 0.004}, variant="mine")
            for name in ("better*", "better")]
    for runs, cells in ((ours, ["better*", "better*"]), (ours[1:], ["better"])):
        page = report.write(tmp_path, {r.name: r for r in runs}, [base], []).read_text(encoding="utf-8")
        shown = page.split("<details>")[0]
        assert re.findall(r'class="[^"]*(?:better|worse)">([^<]*)<', shown) == cells
        assert shown.count(">better") > len(cells)


def test_chart_puts_points_where_they_belong():
    """Fails if axes are swapped or flipped: a 360 × 230 chart's corners follow from its margins and 5 % room in y."""
    svg = report.chart("t", [("a", [(0.0, 0.0), (10.0, 1.0)])], "x", "y")
    y = [230 - 42 - (value + 0.05) / 1.1 * (230 - 30 - 42) for value in (0.0, 1.0)]
    assert f'd="M58.0 {y[0]:.1f}L346.0 {y[1]:.1f}' in svg
    assert "(log)" in report.chart("t", [("a", [(0.0, 0.01), (10.0, 1.0)])], "x", "y")  # spans a factor 100


def test_the_frontier_is_drawn_by_log_l0_with_its_errors(tmp_path):
    """Fails if L0's axis is linear, bars are no standard errors, points of two dials are joined, or one is missing."""
    svg = report.chart("t", [("a", [(10.0, 0.5, 0.1), (100.0, 0.6, 0.0), (1000.0, 0.9, 0.1)])], "x", "y", True, True)
    # y from .4 to 1.0 with 5 % room: .37 to 1.03 over 158 units, so that the bar of ±.1 around .5 goes from .6 to .4
    low, high = (230 - 42 - (value - 0.37) / 0.66 * 158 for value in (0.4, 0.6))
    assert "<circle cx=202.0 " in svg and svg.count("<circle") == 3  # 100 is in the middle of 10 and 1000: 58 + 288 / 2
    assert f"{low:.1f}V{high:.1f}M" in svg and ">100</text>" in svg

    points = ((20.0, 0.80), (60.0, 0.85), (100.0, 0.92))
    base, ours = saes_of("standard", points), run("r", {"core.l0": 50.0, CE: 0.85}, {CE: 0.003}, variant="mine")
    several = [run(f"p {k} {a}", {"core.l0": k, CE: 0.8 + a}, variant="mine", hyper={"k": k, "a": a})
               for k in (20.0, 40.0) for a in (0.0, 0.1)]
    for runs, dots, lines in (([ours], 4, 1), (several, 7, 1), (saes_of("mine", points), 6, 2)):
        page = report.write(tmp_path, {r.name: r for r in runs}, base, []).read_text(encoding="utf-8")
        svg = page.split("<h2>Frontier</h2>")[1].split("<svg")[1].split("</svg>")[0]
        assert (svg.count("<circle"), svg.count("stroke-linejoin")) == (dots, lines)
        assert "this run (mine)" in page and "baseline (standard)" in page
    assert "<h2>Frontier" not in report.write(tmp_path, {"r": ours}, base[:1], []).read_text(encoding="utf-8")
