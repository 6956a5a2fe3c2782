"""Charts of the pages: the same data drawn by matplotlib, and by Chart.js in a real browser."""

import html
import re

import pytest

from runs.page import charts, shell

SPEC = {"title": "CE loss score", "kind": "points",
        "x": {"label": "L0", "log": True}, "y": {"label": "share", "log": False},
        "series": [{"name": "this <run>", "role": "run", "line": True,
                    "points": [[10, .8, .01, "k_10", "#k10"], [100, .9, .02, "k_100", "javascript:alert(1)"],
                               [0, .5, 0, "no place on a log axis"], [20, float("nan"), 0, "no number"]]},
                   {"name": "baseline", "role": "baseline", "line": False, "points": []}]}
BARS = {"title": "Density", "kind": "bars",
        "x": {"label": "log10", "log": False}, "y": {"label": "features", "log": False},
        "series": [{"name": "run", "role": "run", "edges": [-4, -3, -2], "counts": [5, 7]}]}


def test_a_chart_without_a_point_is_none():
    """Fails if an empty chart is drawn, or points that have no place on the axes stay in its data."""
    none = SPEC | {"series": [SPEC["series"][1]]}
    assert charts.figure(none) == "" and charts.menu("metric", {"a": none}) == ""
    kept = charts.finite(SPEC)["series"]
    assert [one["name"] for one in kept] == ["this <run>"] and [p[0] for p in kept[0]["points"]] == [10, 100]


def test_a_still_is_in_the_pages_colours():
    """Fails if the still picture is not one SVG in colours of the page, or says a name as HTML."""
    svg = charts.still(charts.finite(SPEC))
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert not re.search(r"#0000\d\d", svg) and "var(--c0)" in svg and "<run>" not in svg


@pytest.mark.slow
def test_a_stills_names_stay_as_they_are():
    """Fails if a name that looks like a colour or a place of the picture's own is rewritten in it, or breaks it."""
    name = '#0000ff #000001 x="1.23456" d="2.34567"'
    points = [[1.0, 2.0, 0], [3.0, 4.0, 0]]
    both = [{"name": name, "role": "run", "line": False, "points": points} for _ in range(2)]
    drawn = charts.still({"title": name, "kind": "points", "x": {"label": name, "log": False},
                          "y": {"label": "y", "log": False}, "series": both})
    texts = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn)]
    assert texts.count(name) == 4  # title, label, and two in the legend
    assert "#0000" not in "".join(re.findall(r"<(?!svg)[^>]*>", drawn))


def test_charts_in_a_browser(browser, tmp_path):
    """Fails if a chart is not made, an address with a scheme is reached, or anything is asked for or complained of."""
    page = tmp_path / "page.html"
    page.write_text(shell.page("charts", [charts.figure(SPEC), charts.figure(BARS),
                                          charts.menu("metric", {"CE": SPEC, "density": BARS})], shell.CHARTS))
    browser.open(page)
    assert browser.js("return document.querySelectorAll('canvas').length") == 3
    assert browser.js("return document.querySelectorAll('figure .still svg').length") == 0
    assert browser.js("return Pages.address('javascript:alert(1)')") is None
    assert browser.js("return Pages.address(' \\tjava\\nscript:alert(1)')") is None
    assert browser.js("return Pages.address('//elsewhere.org/')") is None
    assert browser.js("return Pages.address('features/layer_9.html#5')") == "features/layer_9.html#5"
    browser.js("const s = document.querySelector('select'); s.value = 'density'; s.dispatchEvent(new Event('change'))")
    label = browser.js("return document.querySelector('figure.menu canvas').getAttribute('aria-label')")
    assert label.startswith("Density")
    assert browser.console() == [] and browser.requests() == [page.as_uri()]
    assert browser.violations() == []
    browser.open(page, scripts=False)
    wide = "svg => svg.getBoundingClientRect().width > 0"
    shown = f"return [...document.querySelectorAll('.still svg')].filter({wide}).length"
    assert browser.js(shown) == 4 and browser.js("return document.querySelectorAll('canvas').length") == 0


@pytest.mark.slow
def test_a_table_is_sorted_by_its_figures(browser, tmp_path):
    """Fails if shares, figures with an error or with a mark are sorted as words, or what has no figure comes first."""
    cells = ["9.5%", "100.0%", "–", "0.93 ± 0.002", "~0.9", "1,000", "-2e-3"]
    rows = "".join(f"<tr><td>{cell}</td></tr>" for cell in cells)
    table = f"<table class=sortable><thead><tr><th>x</th></tr></thead><tbody>{rows}</tbody></table>"
    page = tmp_path / "page.html"
    page.write_text(shell.page("table", [table], ["tables.js"]))
    browser.open(page)
    browser.js("document.querySelector('th button').click()")
    shown = browser.js("return [...document.querySelectorAll('td')].map(cell => cell.textContent)")
    assert shown == ["1,000", "100.0%", "9.5%", "0.93 ± 0.002", "~0.9", "-2e-3", "–"]
    assert browser.js("return document.querySelector('th').getAttribute('aria-sort')") == "descending"


@pytest.mark.slow
def test_a_wide_table_says_that_there_is_more(browser, tmp_path):
    """Fails if a wide table widens the page, has no name or caption, or nothing at its edge."""
    cells = "".join(f"<td>column {i}</td>" for i in range(30))
    page = tmp_path / "page.html"
    page.write_text(shell.page("wide", [shell.scrolling("all <i>", f"<table><tr>{cells}</tr></table>", "tall")]))
    for dark in (False, True):
        browser.open(page, width=360, dark=dark)
        assert browser.wider_than_its_window() == 0 and browser.violations() == []
        assert browser.violations("scrollable-region-focusable") == []
    told = browser.js("const place = document.querySelector('.scroll'), style = getComputedStyle(place);"
                      "return [place.ariaLabel, place.querySelector('caption').textContent, place.tabIndex,"
                      "style.backgroundAttachment, place.scrollWidth > place.clientWidth]")
    assert told == ["all <i>", "all <i>", 0, "local, local, scroll, scroll", True]
