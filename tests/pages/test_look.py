"""The page of a text of one's own, in a real browser."""

import json
import re

import pytest

from runs import look as command
from runs.page import look
from tests.pages.boards import HARMFUL, PLAIN

WORDS = {"explanation": None, "fires_on": [], "promotes": []}


def read_by(tokens, two=True):
    """What runs.look.found gives of a text, by hand: feature 3 fires on every other token, 7 below 0 on the second."""
    pairs = [[] if place == 0 else [[7, -4.0], [3, 2.0]] if place == 1 else [[3, 1.0 + place]] if place % 2 else []
             for place in range(len(tokens))]
    threes = [[place, pair[1]] for place, of_token in enumerate(pairs) for pair in of_token if pair[0] == 3]
    known = {"3": WORDS | {"explanation": HARMFUL[0], "values": threes},
             "7": WORDS | {"fires_on": list(HARMFUL), "promotes": [" x"], "values": [[1, -4.0]]}}
    sides = {"run": pairs, "baseline": pairs if two else None}
    name = {"run": HARMFUL[1], "sae": HARMFUL[0], "variant": HARMFUL[0], "l0": 2.0}
    return name | {"model": HARMFUL[0], "layer": 2, "baseline": dict(name) if two else None,
                   "problem": None if two else HARMFUL[0], "left_out": 5, "passage": {"tokens": tokens} | sides,
                   "features": {"run": known, "baseline": known if two else None}, "labels": command.LABELS}


def written(folder, tokens, links=None, two=True):
    """The page of such a text."""
    file = folder / "text.html"
    what = read_by(tokens, two)
    file.write_text(look.page(what, HARMFUL[0], HARMFUL[1], command.label, links or {}), encoding="utf-8")
    return file


def test_the_page_without_a_browser(tmp_path):
    """Fails if the table lacks a token, a feature or what its words are, or why there is no baseline is not said."""
    text = written(tmp_path, list(PLAIN), {"run": "features/a.html", "report": "report.html"}, two=False).read_text()
    assert text.count("<tr>") == len(PLAIN) + 1 and 'href="features/a.html#7"' in text
    assert "No baseline beside it" in text and "5 are left out" in text and HARMFUL[0] not in text
    # of the kinds of labels those that occur are explained, and each label says of which it is
    assert "<dt>explained</dt>" in text and "<dt>fires on</dt>" in text and "<dt>promotes</dt>" not in text
    assert text.count("<span class=mut>fires on</span>") == 1 and text.count("<span class=mut>explained</span>") == 7


def test_a_long_text_stays_a_page(tmp_path):
    """Fails if a page of a long text and a dense SAE has no bound, or leaves tokens out without a word."""
    what = read_by([PLAIN[place % len(PLAIN)] for place in range(4000)])
    every = {str(feature): WORDS | {"explanation": "x" * 500, "values": [[place, 1.5] for place in range(4000)]}
             for feature in range(400)}
    pairs = [[[(place + n) % 400, 1.5] for n in range(5)] for place in range(4000)]
    what["passage"] |= {"run": pairs, "baseline": pairs}
    what["features"] = {"run": every, "baseline": every}
    text = look.page(what, "run", "base", command.label, {})
    assert text.count("<tr>") == 501 and "The first 500 tokens are shown" in text and "4000 tokens" in text
    assert "The SAE is dense" in text and len(text.encode()) < 3e6
    kept = json.loads(re.search(r'id="look">(.*?)</script>', text)[1])
    # 400 features share 25,000 places
    assert {len(values) for values in kept["sides"][0]["values"].values()} == {62}


@pytest.mark.slow
def test_a_text_in_a_browser(browser, tmp_path):
    """Fails if a token's features cannot be reached by pointer and keys, a picked feature does not shade the text, or
    a text that harms does."""
    tokens = [*HARMFUL, *PLAIN]
    page = written(tmp_path, tokens, {"run": "features/a.html"})
    browser.open(page)
    js = browser.js
    assert js("return document.title") == f"A text read by {HARMFUL[0]}"
    assert js("return document.querySelectorAll('[role=option]').length") == len(tokens)
    heading = "return document.querySelector('.sides h2').textContent"
    listed = "return [...document.querySelectorAll('.sides section:first-of-type button')].map(b => b.textContent)"
    assert js(heading).startswith("token 1 of ") and js(listed) == ["7", "3"]

    # to the text by Tab, on by arrows
    js("document.querySelector('[role=option][tabindex=\"0\"]').focus()")
    press(browser, "ArrowRight", "ArrowRight")
    assert js(heading) == f"token 3 of {len(tokens)}: {HARMFUL[3]}" and js(listed) == ["3"]
    press(browser, "ArrowDown", "ArrowUp")
    assert js(heading).startswith("token ")
    press(browser, "Home")
    assert js(heading).startswith("token 0 of ") and js(listed) == []
    press(browser, "End")
    assert js(heading).startswith(f"token {len(tokens) - 1} of ")
    assert js("return document.querySelectorAll('[role=option][tabindex=\"0\"]').length") == 1

    # by pointer: a glance, and back to what was chosen
    js("document.querySelectorAll('.tok')[1].dispatchEvent(new PointerEvent('pointerenter'))")
    assert js(heading).startswith("token 1 of ")
    js("document.querySelector('.text').dispatchEvent(new PointerEvent('pointerleave'))")
    assert js(heading).startswith(f"token {len(tokens) - 1} of ")

    # a feature shades the text by its own activation
    js("document.querySelectorAll('.tok')[1].click()")
    shades = "return [...document.querySelectorAll('.tok')].map(t => Number(t.style.getPropertyValue('--a')))"
    js("document.querySelectorAll('.sides section:first-of-type button')[0].click()")
    assert [place for place, shade in enumerate(js(shades)) if shade] == [1]
    assert js("return document.querySelectorAll('.tok')[1].classList.contains('neg')")
    shaded = "return document.querySelector('.shaded').textContent"
    here = "return document.querySelector('.head').innerText"
    told = f"shaded by feature 7 of {HARMFUL[0]}: it fires on 1 of {len(tokens)} tokens, “{HARMFUL[1]}” -4"
    assert told in js(shaded)
    assert "feature 7 here: -4" in js(here)
    kinds = "return [...document.querySelectorAll('.sides section:first-of-type td span')].map(s => s.textContent)"
    assert js(kinds) == ["fires on", "explained"]
    js("document.querySelectorAll('.tok')[3].dispatchEvent(new PointerEvent('pointerenter'))")
    assert "feature 7 does not fire here" in js(here)
    js("document.querySelector('.text').dispatchEvent(new PointerEvent('pointerleave'))")
    js("document.querySelectorAll('.sides section:first-of-type button')[1].click()")
    odd = list(range(1, len(tokens), 2))
    assert [place for place, shade in enumerate(js(shades)) if shade] == odd
    assert max(js(shades)) == pytest.approx(0.5) == js(shades)[odd[-1]]
    links = js("return [...document.querySelectorAll('.sides a')].map(a => a.getAttribute('href'))")
    assert links == ["features/a.html#7", "features/a.html#3"]
    assert browser.violations() == []
    assert browser.console() == [] and browser.requests() == [page.as_uri()]
    assert js("return document.title") != "harmed"
    for width, dark in ((360, False), (360, True), (1100, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.wider_than_its_window() == 0 and browser.violations() == []
    browser.open(page, scripts=False)
    assert js("return document.querySelector('table.looked').rows.length") == len(tokens) + 1
    assert js("return document.querySelector('table.looked').getBoundingClientRect().height") > 100
    assert js("return document.querySelectorAll('[role=option]').length") == 0


def press(browser, *keys):
    """Keys pressed, one after the other, where the focus is."""
    for key in keys:
        browser.js("const event = new KeyboardEvent('keydown', {key: arguments[0], bubbles: true, cancelable: true});"
                   "document.activeElement.dispatchEvent(event)", key)
