"""The feature page: what of a board is in it, how large it is, and what people do on it, in a real browser."""

import gzip
import json
import re
from base64 import b64decode
from collections import Counter

import pytest

from runs import features
from runs.page import features as page
from runs.page import shell
from tests.pages.boards import HARMFUL, board

ENTER, DOWN, UP = "\ue007", "\ue015", "\ue013"  # as WebDriver names keys


def written(out, made: dict):
    features.write(out, made)
    return page.write(out, made["sae"])


def inside(file) -> tuple[dict, dict[str, dict]]:
    """The first line of a page's data, and its dashboards by their names, by the standard library."""
    text = re.search(r'<script type="application/json" id="board">"([^"]*)"</script>', file.read_text()).group(1)
    first, *lines = gzip.decompress(b64decode(text)).decode().removesuffix("\n").split("\n")
    return json.loads(first), {line.split("\t")[0]: json.loads(line.split("\t")[1]) for line in lines}


def show(browser, file, **how) -> None:
    browser.open(file, **how)
    browser.driver.execute_async_script("Features.ready.then(arguments[0])")


def press(browser, keys: str) -> None:
    """Type where the focus is."""
    browser.driver.switch_to.active_element.send_keys(keys)


def text_of(browser, selector: str) -> str:
    return browser.js("return document.querySelector(arguments[0])?.textContent", selector)


def seen(browser) -> list[int]:
    """The features of the list, in its order."""
    return browser.js("return Features.shown()")


def until(browser, what: str):
    """Wait until a function body's value holds, two seconds at most."""
    code = (f"const done = arguments[0], end = performance.now() + 2000, holds = () => {{{what}}};"
            "const look = () => holds() || performance.now() > end ? done() : setTimeout(look, 10); look()")
    browser.driver.execute_async_script(code)
    assert browser.js(what), what


def search(browser, text: str, where: str = "any") -> list[int]:
    """What a search finds."""
    browser.js("document.getElementById('where').value = arguments[0]", where)
    browser.js("const q = document.getElementById('query'); q.value = arguments[0];"
               "document.getElementById('where').dispatchEvent(new Event('change'))", text)
    return seen(browser)


# ------------------------------------------------------------------------------------------------ what is in it


def test_what_goes_in(tmp_path):
    """Fails if a row, a dashboard or the baseline's beside it is lost, or a figure loses more than its last digits."""
    made = board(features=30, boards=5)
    first, boards = inside(written(tmp_path, made))
    assert first["rows"] is None and first["vocab"] == made["vocab"] and first["passages"] == made["passages"]
    assert first["columns"]["density"] == made["list"]["density"]
    assert first["columns"]["new"] == made["list"]["new"] and first["columns"]["peak"] == made["list"]["peak"]
    assert first["columns"]["cosine"] == [round(1000 * cosine) for cosine in made["list"]["cosine"]]
    assert first["columns"]["nearest"] == made["list"]["nearest"]
    assert [name for name in boards if name[0] != "b"] == list(made["features"])
    for name, one in made["features"].items():
        kept = boards[name]
        assert [len(contexts) for *_, contexts in kept["groups"]] == [20] + [5] * 10
        context, (tokens, values, peak, row, *cut) = one["groups"][0]["contexts"][3], kept["groups"][0][3][3]
        assert (tokens, peak, row, cut) == (context["tokens"], 10, 3, [0, 1])
        assert values == [[place, pytest.approx(value, rel=.005)] for place, value in context["values"]]
        assert kept["logits"]["top"][9] == [one["logits"]["top"][9][0], 1.2]
        assert kept["histogram"]["counts"] == one["histogram"]["counts"]
        assert kept["histogram"]["edges"] == [0, pytest.approx(one["max"], rel=.005)]
        beside = next((str(feature) for feature, _ in one["theirs"] if str(feature) in made["baseline"]["features"]))
        assert kept["beside"] == beside and boards[f"b{beside}"]["groups"][0][0] == "top"
        peaks = Counter(made["vocab"][context["tokens"][10]] for context in one["groups"][0]["contexts"])
        assert first["notes"][name][5] == [token for token, _ in peaks.most_common(3)]


def test_what_is_left_out(monkeypatch):
    """Fails if more goes in than has room, or anything but the last dashboards, then the rarest features, is left out.
    """
    made = board(features=4000, boards=40)
    whole, rows, boards = page._packed(made, 10**9)
    assert (rows, boards) == (4000, 40)
    monkeypatch.setattr(page, "FEWEST", 5)

    def kept(room: int) -> tuple[list[int] | None, list[str]]:
        data, rows, boards = page._packed(made, room)
        assert len(data) <= room
        first, *lines = gzip.decompress(data).decode().removesuffix("\n").split("\n")
        names = [name for name in (line.split("\t")[0] for line in lines) if name[0] != "b"]
        assert len(names) == boards and names == list(made["features"])[:boards]
        listed = json.loads(first)["rows"]
        assert len(listed or range(4000)) == rows
        return listed, names

    listed, names = kept(len(whole) * 2 // 3)
    assert listed is None and 15 < len(names) < 35
    listed, names = kept(len(whole) // 4)
    density, chosen = made["list"]["density"], set(map(int, made["features"]))
    needed = sorted(range(4000), key=lambda feature: (feature not in chosen, -density[feature]))
    assert len(names) >= 4 and 100 < len(listed) < 3900 and listed == sorted(needed[:len(listed)])
    assert page._left_out(made, 4000, 40) == ""
    dead = density.count(0.0)
    assert f"the dashboards of 5 features, the last that were chosen and {dead} rows of the list, those of features " \
        "that never fire. layer_9.json.gz has all." in page._left_out(made, 4000 - dead, 35)
    assert f"those of {dead} features that never fire and of the rarest" in page._left_out(made, 3900 - dead, 40)


@pytest.mark.slow
def test_large_dictionaries(tmp_path, monkeypatch, browser):
    """Fails if a page of many features passes 3 MB, or sorting them takes 300 ms."""
    for width, all_rows in ((65_536, True), (1_000_000, False)):
        made = board(features=width, boards=300)
        monkeypatch.setattr(features, "read", lambda out, sae, made=made: made)
        (tmp_path / "features").mkdir(exist_ok=True)
        file = page.write(tmp_path, "layer_9")
        assert 1_000_000 < file.stat().st_size < 3_000_000
        first, boards = inside(file)
        assert (first["rows"] is None) == all_rows and len([name for name in boards if name[0] != "b"]) >= 60
        assert all_rows or "never fire and of the rarest" in file.read_text()
    show(browser, file)
    assert browser.js("return document.querySelectorAll('[role=row]').length") < 60
    took = browser.js("const headings = [...document.querySelectorAll('[role=columnheader] button')];"
                      "const cosine = headings.find(one => one.textContent === 'cosine to baseline');"
                      "const start = performance.now(); cosine.click(); return performance.now() - start")
    assert took < 300 and browser.console() == []


def test_without_scripts_there_is_a_table(tmp_path):
    """Fails if the page without scripts lacks the features, their contexts or the densities, or lets a text be HTML."""
    made = board(features=80, boards=60, hostile=True)
    html = written(tmp_path, made).read_text()
    plain = html[html.index("<div id=plain>"):html.index("<h2>Densities</h2>")]
    assert plain.count("<tr>") == 51 and plain.count("<div class=said>") == 50 and "50 of the 60 features" in plain
    assert "<img" not in plain and "&lt;img src=x" in plain and "<svg" in html


def test_head_says_what_the_comparison_counts(tmp_path):
    """Fails if new features are counted by the cosines of the list, or a number of tokens is not whole."""
    made = board(features=5, boards=0)
    made["list"]["density"] = [3 / 4064, 0.0, 8 / 4064, 8 / 4064, 2000 / 4064]
    made["list"]["cosine"] = [.1] * 5
    made["baseline"]["new"] = {"count": 1234, "of": 2301, "threshold": 0.6}
    html = written(tmp_path, made).read_text()
    assert "4 of 5 features fire on this text, 1 (20.0%) never do" in html
    assert "does so on 0.197% of tokens (8 of 4,064)" in html
    assert "1,234 of 2,301 features are new, as the comparison counts them, of those that fire in the text of core: " \
        "no feature of topk at L0 32 has a cosine of 0.6 with them" in html


def test_classes_in_words(tmp_path):
    """Fails if a class of sae_probes is shown by its file's name, or its name in the evals is nowhere."""
    for name, words in {"105_click_bait": "click bait (sae_probes 105)", "67_social-security": "social-security "
                        "(sae_probes 67)", "review_sentiment: negative": "review sentiment: negative"}.items():
        assert page.class_in_words(name) == words
    made = board(features=20, boards=3)
    made["features"]["0"]["classes"] = ["105_click_bait", "arxiv_field: cs"]
    first, _ = inside(written(tmp_path, made))
    assert [first["classes"][place] for place in first["notes"]["0"][1]] \
        == [["105_click_bait", "click bait (sae_probes 105)"], ["arxiv_field: cs", "arxiv field: cs"]]
    said = '<span title="105_click_bait">click bait (sae_probes 105)</span>'
    assert said in page.preview(made, 3) and said in (tmp_path / "features" / "layer_9.html").read_text()


def test_what_is_shown_first(tmp_path):
    """Fails if the first dashboards are not of the most telling reason, those of middle density first."""
    made = board(features=60, boards=7)
    chosen = list(made["features"])
    shares = [.5, .0001, .01, .02, .3, .01, .005]  # their middle: .01
    reasons = ["best probe", "best probe", "new", "new", "densest", "random", "best probe"]
    for feature, share, why in zip(chosen, shares, reasons):
        made["features"][feature] |= {"density": share, "why": [why]}
    order = [int(chosen[place]) for place in (6, 0, 1, 2, 3, 5, 4)]
    assert inside(written(tmp_path, made))[0]["order"] == order
    plain = (tmp_path / "features" / "layer_9.html").read_text().split("<h2>Densities")[0]
    assert [int(one) for one in re.findall(r"<tr><td>(\d+)</td>", plain)] == order


def test_previews_are_of_every_reason(tmp_path):
    """Fails if the report's dashboards are all of one kind, lead elsewhere, or a text becomes HTML."""
    made = board(sae="layer_9.k 40", features=200, boards=100, hostile=True)
    html = page.preview(made, 7)
    chosen = re.findall(r'<a href="features/layer_9.k%2040.html#(\d+)">Feature \1</a>', html)
    assert len(chosen) == 7 and {made["features"][one]["why"][0] for one in chosen} == set(page.REASONS)
    assert "<script" not in html and "<img" not in html and html.count("<div class=said>") == 21
    assert page.preview(board(text=False), 7) == ""


def test_the_command(tmp_path, capsys):
    """Fails if pages are not written again, or a folder without boards or a damaged one ends without its reason."""
    assert page.main([str(tmp_path)]) == 1 and "has no features/" in capsys.readouterr().err
    for sae in ("layer_3", "layer_9"):
        features.write(tmp_path, board(sae=sae, boards=2))
    features.place(tmp_path, "layer_3").write_bytes(b"no gzip")
    assert page.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "features" / "layer_9.html")]
    name = tmp_path.name
    assert said.err == f"{name}/features/layer_3.json.gz is damaged: Not a gzipped file (b'no'); " \
        f"python -m runs.dashboards {name} makes it again\n"


def test_damaged_boards(tmp_path):
    """Fails if a board that no page can be made from is read, or what is said of it is not one line without the way
    to the folder.
    """
    def said(made) -> str:
        file = features.place(tmp_path, "layer_9")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps(made).encode()))
        with pytest.raises(ValueError) as caught:
            features.read(tmp_path, "layer_9")
        text = str(caught.value)
        assert text.startswith(f"{tmp_path.name}/features/layer_9.json.gz is damaged: ") and "\n" not in text
        assert str(tmp_path) not in text
        return text

    def without(*path: str) -> dict:
        made = at = board(features=9, boards=2)
        for name in path[:-1]:
            at = at[name]
        del at[path[-1]]
        return made

    assert "it holds no board" in said([])
    assert "it has no sae;" in said(without("sae")) and "it has no vocab;" in said(without("vocab"))
    assert "it has no baseline;" in said(without("baseline"))
    assert "its list has no cosine;" in said(without("list", "cosine"))
    assert "its feature 0 has no groups;" in said(without("features", "0", "groups"))
    made = board(features=9, boards=2)
    made["list"]["peak"].pop()
    assert "its list has not 9 values of peak" in said(made)
    file = features.write(tmp_path, board(features=9, boards=2))
    whole = file.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:300] + bytes(50) + whole[350:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="layer_9.json.gz is damaged: "):
            features.read(tmp_path, "layer_9")


def test_boards_of_before(tmp_path):
    """Fails if a board without peaks and new features has no page, or its page says how many are new."""
    made = board()
    del made["list"]["new"], made["list"]["peak"], made["baseline"]["new"]
    html = written(tmp_path, made).read_text()
    assert "are new, as" not in html and "id=only-new" not in html and "id=only-has" in html


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.mark.slow
def test_harmful_texts_do_nothing(browser, tmp_path):
    """Fails if a text of a board is run or asks for something, or the page breaks light, dark, or at 360 px."""
    made = board(features=60, boards=20, hostile=True)
    made["either_sign"] = True
    one = made["features"]["0"]["groups"][0]["contexts"][0]
    one["values"][0][1] *= -1
    file = written(tmp_path, made)
    for width, dark in ((1100, True), (360, False)):
        show(browser, file, width=width, dark=dark)
        browser.js("document.querySelectorAll('details').forEach(one => { one.open = true; });"
                   "document.querySelectorAll('#one .plainbutton').forEach(one => one.click())")
        search(browser, HARMFUL[0])
        search(browser, "")
        assert browser.wider_than_its_window() == 0
        assert browser.js("return document.title") == "Features of layer_9"
        assert browser.violations() == []
        assert browser.console() == [] and browser.requests() == [file.as_uri()]
    browser.js("location.hash = '#0'")
    until(browser, "return document.getElementById('which').textContent === 'Feature 0'")
    assert browser.js("return document.querySelectorAll('#one .ctx .neg').length") == 1
    shown = browser.js("return [...document.querySelectorAll('#one .ctx')][0].querySelectorAll('.t').length")
    assert shown == len(one["tokens"])
    assert browser.js("return document.querySelector('#one .ctx .peak').textContent") \
        == shell.visible(made["vocab"][one["tokens"][10]])


@pytest.mark.slow
def test_by_keyboard(browser, tmp_path):
    """Fails if search, list, dashboards, tokens or the way back cannot be reached by keys alone."""
    made = board(features=60, boards=20)
    file = written(tmp_path, made)
    show(browser, file)
    order = inside(file)[0]["order"]
    heading = "return document.getElementById('which').textContent"
    assert browser.js(heading) == f"Feature {order[0]}"  # the first is shown at once
    press(browser, "/jk")  # the focus is on none of what these act on
    assert browser.js(heading) == f"Feature {order[0]}"
    assert browser.js("return document.activeElement.tagName") == "BODY"
    browser.js("document.querySelector('[role=grid]').focus()")
    press(browser, "/")
    assert browser.js("return document.activeElement.id") == "query"
    press(browser, f"{order[3]}{ENTER}")
    until(browser, f"return location.hash === '#{order[3]}' && document.activeElement.id === 'which'")
    assert browser.js(heading) == f"Feature {order[3]}"
    search(browser, "")
    press(browser, "j")
    assert browser.js(heading) == f"Feature {order[4]}" and browser.js("return location.hash") == f"#{order[4]}"
    press(browser, "kk")
    assert browser.js(heading) == f"Feature {order[2]}"
    browser.js("document.querySelector('[role=grid]').focus()")
    browser.js("document.querySelector('[role=grid]').dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}))")
    press(browser, DOWN * 6 + UP + ENTER)
    until(browser, f"return location.hash === '#{order[5]}' && ({heading.removeprefix('return ')}) === "
                   f"'Feature {order[5]}'")
    assert browser.js("return document.querySelector('[role=row][aria-selected]').dataset.feature") == str(order[5])
    browser.driver.back()
    until(browser, f"return document.getElementById('which').textContent === 'Feature {order[2]}'")
    browser.driver.forward()
    until(browser, f"return document.getElementById('which').textContent === 'Feature {order[5]}'")
    browser.js(f"location.hash = '#{order[2]}'")
    until(browser, f"return document.getElementById('which').textContent === 'Feature {order[2]}'")
    context = made["features"][str(order[2])]["groups"][0]["contexts"][0]
    browser.js("document.querySelector('#one .ctx .peak').focus()")
    tip = text_of(browser, "#tip")
    assert f"{context['values'][1][1]:.3g}" in tip and "position 11 of 21" in tip
    press(browser, "\ue014\ue014")  # right
    assert "does not fire" in text_of(browser, "#tip") and "position 13 of 21" in text_of(browser, "#tip")
    browser.js("document.querySelector('[role=columnheader] button').focus()")
    press(browser, ENTER)
    sort = "return document.querySelector('[role=columnheader]').getAttribute('aria-sort')"
    assert seen(browser) == list(range(60)) and browser.js(sort) == "ascending"
    press(browser, ENTER)
    assert seen(browser) == list(range(60))[::-1] and browser.js(sort) == "descending"
    press(browser, ENTER)
    assert seen(browser)[:20] == order and browser.js(sort) is None
    assert browser.console() == []


@pytest.mark.slow
def test_sorting_and_searching(browser, tmp_path):
    """Fails if the list is not in the order that Python finds, or a search or filter finds other features than it."""
    made = board(features=300, boards=80)
    made["vocab"] = [*made["vocab"], " zebra"]
    rare = list(made["features"])[7]
    made["features"][rare]["groups"][4]["contexts"][2]["tokens"][10] = len(made["vocab"]) - 1
    made["features"][rare]["groups"][4]["contexts"][2]["tokens"][11] = 1  # " cat"
    promoted = list(made["features"])[30]
    made["features"][promoted]["logits"]["bottom"][3][0] = " Zebras"
    file = written(tmp_path, made)
    show(browser, file)
    titles = browser.js("return [...document.querySelectorAll('[role=columnheader]')].map(one => one.textContent)")
    cut = {"density": lambda share: float(f"{share:.4g}"), "max": lambda value: float(f"{value:.3g}"),
           "cosine": lambda value: round(1000 * value)}
    order = inside(file)[0]["order"]
    others = [feature for feature in range(300) if feature not in order]
    assert seen(browser) == order + others
    click = "document.querySelectorAll('[role=columnheader] button')[arguments[0]].click()"
    whole = "const head = document.querySelectorAll('[role=columnheader]')[arguments[0]];" \
        "return head.scrollWidth <= head.clientWidth"
    for title, name, first in (("density", "density", -1), ("max", "max", -1), ("cosine to baseline", "cosine", 1)):
        values = [cut[name](value) for value in made["list"][name]]
        for sign in (first, -first):
            browser.js(click, titles.index(title))
            assert seen(browser) == sorted(range(300), key=lambda f: (sign * values[f], f))
            assert browser.js(whole, titles.index(title))
        browser.js(click, titles.index(title))
        assert seen(browser) == order + others
    browser.js(click, 0)
    assert search(browser, "zebra", "tokens") == sorted(map(int, (rare, promoted)))
    assert search(browser, "zebra cat", "contexts") == [int(rare)]
    assert search(browser, "about CATS", "words") == [int(f) for f, one in made["features"].items()
                                                      if one["explanation"]]
    assert search(browser, "29") == [29, *range(290, 300)]
    assert search(browser, "no such word") == [] and text_of(browser, "#found") == "no feature is like that."
    search(browser, "")
    wanted = {"has": sorted(map(int, made["features"])),
              "dead": [f for f in range(300) if not made["list"]["density"][f]],
              "new": [f for f in range(300) if made["list"]["new"][f]]}
    for name, expected in wanted.items():
        browser.js("document.getElementById(arguments[0]).click()", f"only-{name}")
        assert seen(browser) == expected
        browser.js("document.getElementById(arguments[0]).click()", f"only-{name}")
    browser.js("const why = document.getElementById('why'); why.value = 'rarest';"
               "why.dispatchEvent(new Event('change'))")
    assert seen(browser) == [int(f) for f, one in made["features"].items() if one["why"] == ["rarest"]]


@pytest.mark.slow
def test_tokens_of_all_features_are_searched(browser, tmp_path):
    """Fails if a feature without a dashboard is not found by its strongest token, what is shown is no hit, the best
    hits are not first, text that contexts alone have finds nothing, or the page does not say what it searches.
    """
    made = board(features=100, boards=10)
    made["vocab"] += [" Zagreb", " Rijeka"]
    zagreb, rijeka = len(made["vocab"]) - 2, len(made["vocab"]) - 1
    chosen = list(map(int, made["features"]))
    bare = next(f for f in range(99, 0, -1) if made["list"]["density"][f])
    made["list"]["peak"][bare] = zagreb
    fires, strongest, passes = chosen[2], chosen[6], chosen[4]
    made["features"][str(fires)]["groups"][3]["contexts"][0]["tokens"][9] = zagreb
    made["list"]["peak"][strongest] = zagreb
    made["features"][str(passes)]["groups"][3]["contexts"][0]["tokens"][2] = rijeka
    show(browser, written(tmp_path, made))
    heading = "return document.getElementById('which').textContent"
    assert search(browser, "zagreb") == [strongest, bare, fires]
    assert browser.js(heading) == f"Feature {strongest}" and browser.js("return location.hash") == f"#{strongest}"
    assert text_of(browser, "#found") == "3 of 100 features, the best hits first."
    assert text_of(browser, "#scope") == "A search covers number and strongest token of all 100 features; " \
        "explanation, classes, other tokens and contexts of the 10 with a dashboard."
    assert text_of(browser, f"[data-feature='{fires}'] mark") == "fires on Zagreb"
    assert search(browser, "nowhere") == [] and "not in the list" in text_of(browser, "#one")
    assert search(browser, "rijeka") == [passes] and "by the text of contexts alone" in text_of(browser, "#found")
    assert browser.js(heading) == f"Feature {passes}"
    assert passes in search(browser, "")  # what is shown stays
    assert browser.js(heading) == f"Feature {passes}"
    assert search(browser, f"{bare}")[0] == bare and browser.js(heading) == f"Feature {bare}"
    count = round(made["list"]["density"][bare] * 4064)
    assert "It was not among the 10 features chosen for one" in text_of(browser, "#one")
    assert f"({count:,} of 4,064 tokens)" in text_of(browser, "#one") and "Zagreb" in text_of(browser, "#one")
    row = f"document.querySelector('[data-feature=\"{bare}\"]')"
    assert browser.js(f"return {row}.classList.contains('bare')")


@pytest.mark.slow
def test_another_of_the_baselines_stands_beside(browser, tmp_path):
    """Fails if another feature of the baseline cannot be shown beside, one without a dashboard leads somewhere, or a
    baseline's histograms have the run's colour.
    """
    made = board(features=60, boards=20)
    feature = next(f for f, one in made["features"].items()
                   if sum(str(other) in made["baseline"]["features"] for other, _ in one["theirs"]) == 2)
    theirs = made["features"][feature]["theirs"]
    there = [other for other, _ in theirs if str(other) in made["baseline"]["features"]]
    show(browser, written(tmp_path, made))
    browser.js("location.hash = arguments[0]", f"#{feature}")
    until(browser, f"return document.getElementById('which').textContent === 'Feature {feature}'")
    buttons = "[...document.querySelectorAll('#one .facts button')]"
    assert browser.js(f"return {buttons}.map(one => one.textContent)") == list(map(str, there))
    assert browser.js(f"return {buttons}.map(one => one.getAttribute('aria-pressed'))") == ["true", "false"]
    browser.js(f"{buttons}[1].focus()")
    press(browser, ENTER)
    assert f"Baseline: feature {there[1]}" in text_of(browser, "#one .pair > :last-child h3")
    assert f"cosine {dict(theirs)[there[1]]:g}" in text_of(browser, "#one .pair > :last-child > p")
    assert browser.js(f"return {buttons}.map(one => one.getAttribute('aria-pressed'))") == ["false", "true"]
    assert browser.js(f"return document.activeElement === {buttons}[1]")
    colours = browser.js("return [...document.querySelectorAll('#one canvas')].map(one => "
                         "Chart.getChart(one).data.datasets[0].borderColor)")
    assert colours == ["#2f74c8"] * 2 + ["#c8660f"] * 2
    assert browser.violations() == [] and browser.console() == []


@pytest.mark.slow
def test_a_dashboard_and_what_stands_beside_it(browser, tmp_path):
    """Fails if a dashboard lacks a part, is not beside the baseline's, or a feature without one has no reason."""
    made = board(features=60, boards=20)
    file = written(tmp_path, made)
    show(browser, file)
    feature = str(inside(file)[0]["order"][0])
    beside = made["features"][feature]["theirs"]
    near, cosine = next(one for one in beside if str(one[0]) in made["baseline"]["features"])
    assert browser.js("return document.querySelectorAll('#one canvas').length") == 4
    heads = browser.js("return [...document.querySelectorAll('#one h3')].map(one => one.textContent)")
    assert heads == [f"This run: feature {feature}", f"Baseline: feature {near} topk at L0 32, L0 40.5"]
    assert f"cosine {cosine:g}" in text_of(browser, "#one .pair > :last-child > p")
    count = "return document.querySelector('#one .pair > div').querySelectorAll('.ctx').length"
    assert browser.js(count) == 5
    browser.js("document.querySelector('#one .pair > div > div > .plainbutton').click()")  # 15 more
    assert browser.js(count) == 20
    browser.js("document.querySelectorAll('#one .pair > div > details').forEach(one => { one.open = true; })")
    until(browser, f"return (() => {{{count}}})() === 70")
    browser.js("document.querySelector('[data-look=breaks]').click()")
    assert browser.js("return document.getElementById('one').className") == "whole breaks"
    dead = made["list"]["density"].index(0.0)
    other = next(f for f in range(60) if made["list"]["density"][f] and str(f) not in made["features"])
    for number, reason in ((dead, "never fired on the 4,064 tokens"), (other, "not among the 20 features"),
                           (700, "There is no feature 700")):
        browser.js("location.hash = arguments[0]", f"#{number}")
        until(browser, f"return document.getElementById('which').textContent === 'Feature {number}'")
        assert reason in text_of(browser, "#one")
    # a passage: shaded by one feature, then as the baseline reads it
    browser.js("document.querySelector('.sides button').click()")
    assert f"shaded by feature {next(iter(made['features']))} of this run" in text_of(browser, ".passage .bar")
    browser.js("document.querySelectorAll('.passage [aria-pressed]')[1].click()")
    assert text_of(browser, ".passage [aria-pressed=true]") == "baseline"
    assert browser.console() == []
    made["baseline"] |= {"problem": "its SAE\u2028is of another <model>", "features": {}}
    show(browser, written(tmp_path, made))
    assert "its SAE·is of another <model>" in text_of(browser, "#one")
    for few in (board(features=1, boards=0, baseline=False), board(features=9, text=False, baseline=False)):
        show(browser, written(tmp_path, few))
        assert "No dashboard." in text_of(browser, "#one") and browser.console() == []


@pytest.mark.slow
def test_where_it_cannot_be_unpacked(browser, tmp_path):
    """Fails if a browser that runs no scripts shows no table, or damaged data no reason."""
    file = written(tmp_path, board())
    browser.open(file, scripts=False)
    assert browser.js("return document.querySelectorAll('#plain tr').length") == 13
    assert browser.js("return document.getElementById('app').getBoundingClientRect().height") == 0
    assert browser.wider_than_its_window() == 0
    file.write_text(file.read_text().replace('id="board">"H4sI', 'id="board">"AAAA'))
    show(browser, file)
    said = text_of(browser, "#plain-note")
    assert "data is damaged" in said and "runs.page.features" in said
    old = {"source": "delete window.DecompressionStream"}
    number = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", old)
    show(browser, file)
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", number)
    assert "no DecompressionStream" in text_of(browser, "#plain-note") and browser.console() == []
