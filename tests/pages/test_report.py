"""report.html in a real browser: its charts lead somewhere, and it can be read by all, anywhere, with any names."""

import json
import time

import pytest

from runs import features, report
from runs.page import charts, shell
from tests.pages.boards import HARMFUL, board
from tests.runs.records import CE, R2, entry, record, run


def made(place, names=("layer_3",), hostile=False):
    """A run's folder with a page: SAEs of these names, boards of theirs, a log, and a diff."""
    variant = HARMFUL[0] if hostile else "mine"
    sections = {name: entry({"core.l0": 20.0 * (i + 1), CE: 0.8 + i / 50, R2: 0.5}, {CE: 0.002}, variant=variant,
                            hyper={"k": i}) for i, name in enumerate(names)}
    if hostile:
        for section in sections.values():
            section["problems"] = list(HARMFUL)
    record(place, sections)
    for name in names:
        features.write(place, board(name.replace("/", "_"), hostile=hostile))
    (place / "variant.py").write_text("\n".join(HARMFUL if hostile else ["a = 1"]))
    info = dict(status="finished", seconds={"training": 3.0, "evals": 2.0}, settings={"variant": variant})
    (place / "run_info.json").write_text(json.dumps(info))
    log = "".join(f"{names[0] if ',' not in names[0] else 'a'},{i},{i * 10},{1 / i},.1\n" for i in range(1, 9))
    (place / "training_log.csv").write_text("sae,step,tokens,loss,dead_share\n" + log)
    return report.again(place)


def at(browser, series, point):
    """Bring the frontier's chart into sight; the place of a point in the window, px."""
    return browser.js(
        "const canvas = document.querySelector('figure.menu canvas');"
        "canvas.scrollIntoView({block: 'center'});"
        "const chart = Chart.getChart(canvas), box = canvas.getBoundingClientRect();"
        "const {x, y} = chart.getDatasetMeta(arguments[0]).data[arguments[1]];"
        "return [box.left + x, box.top + y]", series, point)


def mouse(browser, kind, place):
    """A mouse event at a place of the window."""
    pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
    browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent",
                                   {"type": kind, "x": place[0], "y": place[1], **pressed})


def pointed_at(browser, series, point):
    """Point at a point of the chart until it says something, at most 5 s: charts that come into sight move the page."""
    deadline = time.monotonic() + 5
    while True:
        place = at(browser, series, point)
        mouse(browser, "mouseMoved", place)
        settled(browser)
        said = browser.js("return Chart.getChart(document.querySelector('figure.menu canvas')).tooltip.body")
        if said or time.monotonic() > deadline:
            return place


def settled(browser):
    """Wait until what was drawn is shown."""
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


@pytest.mark.slow
def test_hovering_tells_and_a_click_leads_to_the_sae(browser, tmp_path):
    """Fails if hovering names another SAE or no error, a click does not go to it, or the legend's switch does nothing.
    """
    page = made(tmp_path / "run_1", ("layer_3.k_0", "layer_3.k_1"))
    browser.open(page)
    browser.js("document.querySelector('figure.menu').scrollIntoView()")
    settled(browser)
    place = pointed_at(browser, 0, 1)
    shown = browser.js("const t = Chart.getChart(document.querySelector('figure.menu canvas')).tooltip;"
                       "return [t.title, ...t.body.map(one => one.lines)].flat()")
    assert shown == ["this run (mine)", "run_1 layer_3.k_1", "share of the loss recovered: 0.82 ± 0.002",
                     "L0, features per token (log): 40"]
    for kind in ("mousePressed", "mouseReleased"):
        mouse(browser, kind, place)
    settled(browser)  # what the mouse does is heard a frame later
    assert browser.js("return decodeURIComponent(location.hash)") == "#sae-layer_3.k_1"
    assert browser.js("return document.querySelector(':target').tagName") == "TR"
    assert browser.console() == []


def test_the_legend_switches_series(browser, tmp_path):
    """Fails if a name in the legend does not take its series out of the chart, or does not say that it has."""
    page = tmp_path / "page.html"
    series = [{"name": name, "role": "run", "line": True, "points": [[1, 1, 0], [2, 2, 0]]} for name in ("a", "b")]
    spec = {"title": "t", "kind": "points", "x": {"label": "x", "log": False}, "y": {"label": "y", "log": False}}
    page.write_text(shell.page("t", [charts.figure(spec | {"series": series})], shell.CHARTS))
    browser.open(page)
    settled(browser)
    assert browser.js("const second = document.querySelectorAll('.legend button')[1]; second.click();"
                      "const chart = Chart.getChart(document.querySelector('canvas'));"
                      "return [second.getAttribute('aria-pressed'), chart.isDatasetVisible(0), "
                      "chart.isDatasetVisible(1)]") == ["false", True, False]


@pytest.mark.slow
def test_all_can_read_it(browser, tmp_path):
    """Fails if the page breaks a WCAG rule in light or dark, is wider than a telephone, or a menu has no keyboard."""
    page = made(tmp_path / "run_1", ("layer_3.k_0", "layer_3.k_1"))
    for dark in (False, True):
        browser.open(page, width=360, dark=dark)
        browser.js("document.querySelectorAll('details').forEach(one => { one.open = true; });"
                   "document.querySelectorAll('figure.chart').forEach(one => one.scrollIntoView())")
        settled(browser)
        assert browser.wider_than_its_window() == 0 and browser.violations() == []
    before = browser.js("const s = document.querySelector('.choice select'); s.focus(); return s.value")
    for kind in ("keyDown", "keyUp"):
        key = {"type": kind, "key": "ArrowDown", "code": "ArrowDown", "windowsVirtualKeyCode": 40}
        browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", key)
    settled(browser)
    after = browser.js("return document.querySelector('.choice select').value")
    label = browser.js("return document.querySelector('figure.menu canvas').getAttribute('aria-label')")
    assert (before, after) == ("CE loss score · core.ce_loss_score", "R² · core.r2") and label.startswith("R²")


@pytest.mark.slow
def test_without_scripts_the_page_is_whole(browser, tmp_path):
    """Fails if the verdict, the table or still pictures need scripts."""
    browser.open(made(tmp_path / "run_1", ("layer_3.k_0", "layer_3.k_1")), scripts=False)
    text = browser.js("return document.body.innerText")
    assert "Not comparable" in text and "ce_loss_score" in text and "the first of 2" in text
    wide = "svg => svg.getBoundingClientRect().width > 100"
    assert browser.js(f"return [...document.querySelectorAll('.still svg')].filter({wide}).length") >= 6
    assert browser.js("return document.querySelectorAll('canvas').length") == 0


@pytest.mark.slow
def test_harmful_names_do_nothing(browser, tmp_path):
    """Fails if a name, problem, text or line of code runs, asks for anything, or makes the console complain."""
    page = made(tmp_path / "run_1", ("layer_3", "__proto__", "constructor"), hostile=True)
    browser.open(page)
    browser.js("document.querySelectorAll('details').forEach(one => { one.open = true; });"
               "document.querySelectorAll('figure.chart').forEach(one => one.scrollIntoView())")
    settled(browser)
    for value in browser.js("return [...document.querySelectorAll('.choice option')].map(one => one.value)"):
        browser.js("document.querySelectorAll('.choice select').forEach(s => {"
                   "s.value = arguments[0]; if (s.value) s.dispatchEvent(new Event('change'));})", value)
    assert browser.js("return document.title") == "run_1" and browser.console() == []
    assert browser.requests() == [page.as_uri()]


@pytest.mark.slow
def test_a_names_text_goes_to_the_chart_as_text(browser, tmp_path):
    """Fails if the charts of SAEs with harmful names are not made."""
    ours = {name: run(name, {"core.l0": 5.0 + i, CE: 0.9}, variant=name) for i, name in enumerate(HARMFUL)}
    log = [{"sae": name, "step": s, "tokens": s, "loss": "1"} for name in HARMFUL for s in range(3)]
    page = report.write(tmp_path, ours, None, log)
    browser.open(page)
    browser.js("document.querySelectorAll('figure.chart').forEach(one => one.scrollIntoView())")
    settled(browser)
    names = browser.js("return [...document.querySelectorAll('figure:last-of-type .legend button')]"
                       ".map(one => one.textContent)")
    assert len(names) >= len(HARMFUL) and any("<script>" in name for name in names)
    assert browser.js("return document.title") == tmp_path.name and browser.console() == []
    assert browser.requests() == [page.as_uri()]
