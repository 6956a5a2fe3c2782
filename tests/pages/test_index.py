"""The page of all runs in a real browser: sorted, searched, filtered, two runs paired, and harmless."""

import json
import math
import shlex

import pytest

from runs import index
from runs.folder import write_json
from runs.page import charts
from runs.page import index as pages
from tests.runs.folders import many
from tests.runs.records import CE, entry, record
from tests.runs.test_index import ended, harm

RUNS = 230


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What is seen of a folder of 230 runs."""
    return index.overview(many(tmp_path_factory.mktemp("many"), RUNS))


@pytest.fixture(scope="module")
def page(seen, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "runs.html"
    file.write_text(pages.page(seen), encoding="utf-8")
    return file


def shown(browser) -> list[str]:
    """The runs of the table as it stands."""
    return browser.js("return [...runs.tBodies[0].rows].filter(row => row.className !== 'inner')"
                      ".map(row => row.cells[1].textContent.replace('★', '').trim())")


def heading(browser, key) -> None:
    browser.js("document.querySelector(`#runs th[data-key=${arguments[0]}] button`).click()", key)


def set_to(browser, selector, value) -> None:
    browser.js("const [place, value] = arguments, at = document.querySelector(place); at.value = value;"
               "at.dispatchEvent(new Event(at.tagName === 'INPUT' ? 'input' : 'change'))", selector, value)


def drawn(browser, section) -> dict:
    """{series: its points} of a chart."""
    browser.js("document.querySelector(arguments[0]).scrollIntoView()", f"#{section}")
    return dict(browser.js("return Chart.getChart(document.querySelector(`#${arguments[0]} canvas`)).data.datasets"
                           ".map(set => [set.label, set.data.map(({x, y, e}) => [x, y, e])])", section))


def expected(spec) -> dict:
    """The same of a still's, with what a legend alone shows."""
    return {one["name"]: one["points"] for one in charts.finite(spec)["series"]}


def known(points: dict) -> dict:
    """The series that have points."""
    return {name: own for name, own in points.items() if own}


@pytest.mark.slow
def test_the_charts_are_those_of_the_stills(browser, seen, page):
    """Fails if the scripts find another running best or front than Python does, of all runs or of those filtered."""
    browser.open(page)
    group, way = pages.groups(seen["rows"])[0], {name: one["way"] for name, one in seen["metrics"].items()}
    assert drawn(browser, "progress") == expected(pages.progress(seen, group, "difference"))
    set_to(browser, "#progress .what", "1")
    assert drawn(browser, "progress") == expected(pages.progress(seen, group, "value"))
    lower = next(name for name in way if way[name] == "lower")
    for metric in (CE, lower):
        set_to(browser, "#frontier .metric", str(list(way).index(metric)))
        assert known(drawn(browser, "frontier")) == expected(pages.frontier(seen, 0, metric))
    set_to(browser, "#search", "mine")
    browser.driver.set_script_timeout(5)
    browser.driver.execute_async_script("setTimeout(arguments[0], 300)")
    mine = sum(row["variant"] == "mine" and row["value"] is not None for row in seen["rows"])
    points = drawn(browser, "progress")
    assert sum(len(own) for name, own in points.items() if name != "best so far") == mine
    assert browser.console() == []


@pytest.mark.slow
def test_the_table(browser, seen, page):
    """Fails if a column sorts otherwise than its numbers do, or a search, a filter or a leaf has other runs."""
    browser.open(page)
    names = [row["run"] for row in seen["rows"]]
    assert shown(browser) == names[::-1][:100]
    browser.js("document.getElementById('on').click(); document.getElementById('on').click()")
    assert shown(browser) == names[::-1][200:] and "201 to 230 of 230" in browser.js("return count.textContent")
    heading(browser, "difference")
    counts = [row for row in seen["rows"] if row["verdict"] in ("better", "worse", "within_noise")]
    rest = [row for row in seen["rows"] if row["verdict"] == "suspect"]
    for sign in (-1, 1):  # suspect runs, whose differences are the largest, behind all that count
        best = [sorted(some, key=lambda row: sign * row["difference"]) for some in (counts, rest)]
        assert shown(browser) == [row["run"] for row in sum(best, [])][:100]
        gray = browser.js("return [...document.querySelectorAll('#runs tbody tr')].map(row => row.className)")
        assert gray == ([""] * len(counts) + ["apart"] * len(rest))[:100]
        heading(browser, "difference")
    heading(browser, "run")
    assert shown(browser)[:3] == ["run_0", "run_1", "run_2"]  # run_2 before run_10
    set_to(browser, "#search", "penalty P_ANNEAL")
    found = {row["run"] for row in seen["rows"] if row["variant"] == "p_anneal" and "penalty" in (row["note"] or "")}
    assert set(shown(browser)) == found and found
    browser.js("document.getElementById('clear').click()")
    options = browser.js("return [...document.querySelector('#filters select[data-key=verdict]').options]"
                         ".map(one => one.textContent)")
    set_to(browser, "#filters select[data-key=verdict]", str(options.index("within noise")))
    assert set(shown(browser)) == {row["run"] for row in seen["rows"] if row["verdict"] == "within_noise"}
    assert browser.console() == []


@pytest.mark.slow
def test_two_runs_side_by_side(browser, seen, page):
    """Fails if what differs between two runs is not said, what does not differ is, or a third is not taken in turn."""
    browser.open(page)
    heading(browser, "run")
    boxes = "document.querySelectorAll('#runs tbody input')"
    browser.js(f"{boxes}[0].click()")
    assert "choose a second run" in browser.js("return pair.textContent")
    browser.js(f"{boxes}[7].click(); {boxes}[3].click()")
    names = shown(browser)
    pair = [next(row for row in seen["rows"] if row["run"] == names[i]) for i in (7, 3)]
    assert browser.js(f"return [...{boxes}].map((box, i) => box.checked ? i : null).filter(i => i !== null)") == [3, 7]
    told = browser.js("return [...document.querySelectorAll('#pair .marked tbody tr')].map(row => [...row.cells]"
                      ".map(cell => cell.textContent))")
    a, b = (row["settings"] for row in pair)
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    assert keys and told == [[key, "≠", a.get(key, "–"), b.get(key, "–")] for key in keys]
    command = browser.js("return document.querySelector('#pair .command code').textContent")
    folder = seen["folder"]
    assert shlex.split(command) == ["python", "-m", "runs.compare", f"{folder}/{names[7]}", f"{folder}/{names[3]}"]
    assert browser.js("return document.querySelectorAll('#pair details').length") == 2
    browser.js("[...document.querySelectorAll('#pair details')].forEach(one => { one.open = true; })")
    assert browser.violations() == []


def legend(browser, section) -> list[str]:
    return browser.js("return [...document.querySelectorAll('#' + arguments[0] + ' .legend button')]"
                      ".map(one => one.textContent)", section)


@pytest.mark.slow
def test_kinds_are_told_apart(browser, seen, page):
    """Fails if two kinds have one shape or colour, a legend lacks one, or what does not count cannot be left out."""
    browser.open(page)
    browser.js("document.querySelector('#frontier').scrollIntoView()")
    sets = {name: [colour, shape] for name, colour, shape in browser.js(
        "return Chart.getChart(document.querySelector('#frontier canvas')).data.datasets"
        ".map(set => [set.label, set.borderColor, set.pointStyle])")}
    kinds = [sets[name] for name in ("comparable", "suspect", "not comparable")]
    assert len({colour for colour, _ in kinds}) == len({shape for _, shape in kinds}) == 3
    assert {"▲suspect", "●comparable", "◆not comparable"} <= set(legend(browser, "frontier"))
    browser.js("document.querySelector('#frontier .alone').click()")
    points = drawn(browser, "frontier")
    counted = sum(row["verdict"] in pages.BEST for row in seen["rows"])
    assert (len(points["comparable"]), points["suspect"], points["not comparable"]) == (counted, [], [])
    assert {"▲suspect", "◆not comparable"} <= set(legend(browser, "frontier"))


@pytest.mark.slow
def test_a_row_opens(browser, tmp_path):
    """Fails if a row hides why a run failed, how each SAE of a sweep is judged, or the seeds of its setting."""
    cause = "word " * 60 + "end"
    ended(tmp_path / "bad", "failed", why=cause, phase="training", advice="buy some")
    write_json(tmp_path / "bad/error.json", dict(message=cause))
    saes = {f"layer_3.k_{k}": entry({"core.l0": k, CE: 0.8 + k / 1000}, variant="mine") for k in (16.0, 64.0)}
    words = zip(saes, ("better", "suspect"))
    each = {name: dict(verdict=word, why=f"reason {word}", value=0.8) for name, word in words}
    for seed in (0, 1):
        ended(tmp_path / f"sweep_{seed}", "suspect", seed + 2, metric=CE, value=0.83, seed=seed, saes=each)
        record(tmp_path / f"sweep_{seed}", saes)
    file = index.write(tmp_path, by="run")
    browser.open(file)
    assert shown(browser) == ["bad", "sweep_0", "sweep_1"]
    assert browser.js("return document.querySelector('#runs tbody a').getAttribute('href')") == "bad/error.json"
    row = browser.js("return document.querySelector('#runs tbody tr').textContent")
    assert "word word" in row and "end" not in row
    buttons = "document.querySelectorAll('#runs tbody button[aria-expanded]')"
    browser.js(f"{buttons}[0].click(); {buttons}[1].click()")
    told = browser.js("return [...document.querySelectorAll('#runs tr.inner')].map(row => row.textContent)")
    assert cause in told[0] and "buy some" in told[0] and "sweep_1 (seed 1, ! suspect)" in told[1]
    assert browser.js("return [...document.querySelectorAll('#runs .inner tbody tr')].map(row => [...row.cells]"
                      ".map(cell => cell.textContent))") == [
        ["layer_3.k_16.0", "▲ better", "16", "0.8", "", "", "", "reason better"],
        ["layer_3.k_64.0", "! suspect", "64", "0.8", "", "", "", "reason suspect"]]
    assert browser.violations() == [] and browser.wider_than_its_window() == 0
    heading(browser, "run")  # sorted again, what is open stays so
    assert browser.js("return document.querySelectorAll('#runs tr.inner').length") == 2
    browser.js("document.querySelector('#runs .more button').click()")
    assert shown(browser) == ["sweep_1", "sweep_0"]
    browser.js(f"{buttons}[1].click(); document.getElementById('clear').click()")
    assert len(shown(browser)) == 3 and browser.js("return document.querySelectorAll('#runs tr.inner').length") == 1


@pytest.mark.slow
def test_by_keyboard(browser, page):
    """Fails if a column cannot be sorted, or a run chosen, without a mouse."""
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    browser.js("document.querySelector('#runs th[data-key=value] button').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    order = browser.js("return document.querySelector('#runs th[data-key=value]').getAttribute('aria-sort')")
    assert order == "descending"
    for _ in range(40):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        if browser.js("return document.activeElement.type === 'checkbox'"):
            break
    browser.driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert browser.js("return document.activeElement.checked && !pair.hidden")


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(1100, False), (360, True)])
def test_it_can_be_read(browser, page, width, dark):
    """Fails if contrast, labels or the order of headings are wrong, or the page is wider than a telephone."""
    browser.open(page, width=width, dark=dark)
    assert browser.violations() == [] and browser.wider_than_its_window() == 0
    assert browser.console() == [] and browser.requests() == [page.as_uri()]


def test_without_scripts(browser, page):
    """Fails if the whole table, the stills or the causes of failures need a script."""
    browser.open(page, scripts=False)
    assert browser.js("return document.querySelectorAll('#runs tbody tr').length") == RUNS
    assert browser.js("return document.querySelectorAll('.plots svg').length") == 2 + pages.STILLS
    assert browser.js("return getComputedStyle(document.getElementById('filters')).display") == "none"
    assert "out of memory: 2 GB asked for" in browser.js("return document.body.textContent")


@pytest.mark.slow
def test_harmful_runs(browser, tmp_path):
    """Fails if a text of a run is executed, leads anywhere, or stops the page's own scripts."""
    file = index.write(harm(tmp_path), by="difference")
    browser.open(file)
    for section in ("progress", "frontier"):
        for number in range(browser.js("return document.querySelectorAll(`#${arguments[0]} select:last-of-type option`)"
                                       ".length", section)):
            set_to(browser, f"#{section} select", str(number % 3))
    browser.js("document.querySelectorAll('#runs th button').forEach(button => button.click())")
    browser.js("[...document.querySelectorAll('#runs tbody input')].slice(0, 9).forEach(box => box.click())")
    browser.js("[...document.querySelectorAll('details')].forEach(one => { one.open = true; })")
    assert browser.js("return document.querySelectorAll('#pair table').length") > 1
    assert browser.js("return document.title") != "harmed"
    assert browser.console() == [] and browser.requests() == [file.as_uri()]
    assert browser.wider_than_its_window() == 0 and browser.violations() == []
    assert not any(math.isnan(value) for value in json.loads(browser.js(
        "return JSON.stringify(JSON.parse(document.getElementById('runs-data').textContent).saes.l0)")) if value)
