"""The page of runs/look.py: a text, and for each of its tokens the features of two SAEs that fire most."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from runs.page import shell

SIDES = ("run", "baseline")
CELLS = 5_000  # features of tokens on a page, each side; fewer where it would not stay under MOST bytes
MOST = 3_000_000
WORDS = 120  # characters that are said of a feature
# what a label is called on the page
KINDS = {"explanation": "explained", "fires_on": "fires on", "promotes": "promotes", "": ""}


def page(what: dict, run: str, baseline: str, label: Callable[[dict], tuple[str, str]],
         links: dict[str, str]) -> str:
    """A whole page. `what`: runs.look.found's; run, baseline: what the SAEs are called; label: runs.look's; links:
    {side: address of its dashboards, relative; "report": that of the run's report}.
    """
    names, cells = {"run": run, "baseline": baseline}, CELLS
    while True:
        html = _page(_beginning(what, cells), len(what["passage"]["tokens"]), names, label, links)
        if len(html.encode("utf-8", "replace")) < MOST or cells == 1:
            return html
        cells //= 2


def _page(what: dict, tokens: int, names: dict[str, str], label: Callable, links: dict[str, str]) -> str:
    """The page of a text of so many tokens, of which `what` holds the first."""
    run = names["run"]
    sides = [side for side in SIDES if what["passage"][side] is not None]
    known = {side: {feature: _cut(*label(one)) for feature, one in what["features"][side].items()} for side in sides}
    passage = what["passage"]
    told = [{"name": shell.visible(names[side]), "tokens": passage[side], "says": known[side],
             "values": {feature: one["values"] for feature, one in what["features"][side].items()},
             "page": links.get(side, "")} for side in sides]
    block = shell.data({"tokens": list(map(shell.visible, passage["tokens"])), "sides": told}, id="look")
    parts = [f"<h1>{escape(shell.visible(run))}</h1>", *_about(what, names, tokens, links.get("report", "")),
             f'<div class="look card"><div class=text>{_text(passage)}</div></div>', *_meaning(what["labels"], known),
             "<details class=table open><summary>all tokens as a table</summary>"
             f"{_table(passage, {side: names[side] for side in sides}, known, links)}</details>", block]
    return shell.page(f"A text read by {shell.visible(run)}", parts, ("look.js",), ("look.css",))


def _cut(kind: str, text: str) -> list[str]:
    text = text.replace("“ ", "“\u00a0")  # no line ends behind the “
    return [KINDS[kind], text if len(text) <= WORDS else text[: WORDS - 1] + "…"]


def _meaning(labels: dict[str, str], known: dict[str, dict]) -> list[str]:
    """What the words beside a feature say, of the kinds that there are."""
    there = {kind for said in known.values() for kind, _ in said.values()}
    words = "".join(f"<dt>{KINDS[kind]}</dt><dd>{escape(meaning)}</dd>" for kind, meaning in labels.items()
                    if KINDS[kind] in there)
    return [f"<dl class=meaning>{words}</dl>"] if words else []


def _beginning(what: dict, cells: int) -> dict:
    """As many tokens as have `cells` features, and of the features that these show ten times as many places, the
    strongest; thinned: not all of them."""
    passage, kept, thinned = what["passage"], {}, False
    of_token = max(len(pairs) for side in SIDES for pairs in passage[side] or [[]])
    room = max(1, cells // max(of_token, 1))
    passage = {name: values and values[:room] for name, values in passage.items()}
    for side in SIDES:
        shown = {str(feature) for pairs in passage[side] or [] for feature, _ in pairs}
        places = {feature: [pair for pair in what["features"][side][feature]["values"] if pair[0] < room]
                  for feature in sorted(shown, key=int)}
        most = 10 * cells // max(len(shown), 1)
        if sum(map(len, places.values())) > 10 * cells:
            thinned = True
            places = {feature: sorted(sorted(values, key=lambda pair: -abs(pair[1]))[:most])
                      for feature, values in places.items()}
        kept[side] = {feature: what["features"][side][feature] | {"values": places[feature]} for feature in places}
    return what | {"passage": passage, "features": kept, "thinned": thinned}


def _about(what: dict, names: dict[str, str], n: int, report: str) -> list[str]:
    model, layer, shown = what["model"], what["layer"], len(what["passage"]["tokens"])
    beside = f"beside {names['baseline']} · " if what["baseline"] else ""
    about = escape(shell.visible(f"{beside}{model}, after block {layer} · {n} tokens"))
    back = f' · <a href="{escape(report)}">the run’s report</a>' if report else ""
    lines = [f"<p class=mut>{about}{back}</p>"]
    if what["problem"]:
        lines.append(f"<p class=warn>No baseline beside it: {escape(shell.visible(what['problem']))}</p>")
    if what["left_out"]:
        lines.append(f"<p class=warn>The text is cut after {n - 1:,} tokens, the context that the SAE was trained on: "
                     f"{what['left_out']:,} are left out.</p>")
    if shown < n:
        lines.append(f"<p class=warn>The first {shown:,} tokens are shown: a page has no room for more.</p>")
    if what["thinned"]:
        lines.append("<p class=warn>The SAE is dense: a feature that is picked shades only the tokens on which it "
                     "fires most.</p>")
    return lines


def _text(passage: dict) -> str:
    """The text, its tokens shaded by the strongest activation of the run's features."""
    values = [pairs[0][1] if pairs else 0.0 for pairs in passage["run"]]
    most = max(map(abs, values), default=0) or 1
    return "".join(_token(token, value / most) for token, value in zip(passage["tokens"], values))


def _token(token: str, share: float) -> str:
    sign = " neg" if share < 0 else ""
    shade = f' style="--a:{0.08 + 0.42 * abs(share):.2f}"' if share else ""
    text = shell.visible(token).replace("↵", "↵\n")  # the line ends behind its sign
    return f'<span class="tok{sign}"{shade}>{escape(text)}</span>'


def _table(passage: dict, names: dict[str, str], known: dict, links: dict[str, str]) -> str:
    heads = "".join(f"<th class=l>{escape(shell.visible(name))}</th>" for name in names.values())
    rows = []
    for place, token in enumerate(passage["tokens"]):
        cells = "".join(f"<td class='l w'>{_features(passage[side][place], known[side], links.get(side, ''))}</td>"
                        for side in names)
        rows.append(f"<tr><td>{place}</td><td class=l>{escape(shell.visible(token))}</td>{cells}</tr>")
    table = (f"<table class=looked><thead><tr><th>#</th><th class=l>token</th>{heads}</tr></thead>"
             f"<tbody>{''.join(rows)}</tbody></table>")
    return shell.scrolling("all tokens", table)


def _features(pairs: list, known: dict[str, list[str]], link: str) -> str:
    lines = []
    for feature, activation in pairs:
        name = f'<a href="{escape(link)}#{feature}">{feature}</a>' if link else str(feature)
        kind, text = map(escape, known[str(feature)])
        said = f"<span class=mut>{kind}</span> {text}"
        lines.append(f"<div><span class=n>{name}</span> <b>{activation:.4g}</b> {said}</div>")
    return "".join(lines)
