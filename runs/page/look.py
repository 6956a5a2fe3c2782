"""The page of runs/look.py: a text, and for each of its tokens the features of two SAEs that fire most."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from runs.page import shell

SIDES = ("run", "baseline")


def page(what: dict, run: str, baseline: str, says: Callable[[dict], str], links: dict[str, str]) -> str:
    """A whole page. `what`: runs.look.found's; run, baseline: what the SAEs are called; says: a feature in words;
    links: {side: address of its dashboards, relative; "report": that of the run's report}.
    """
    names = {"run": run, "baseline": baseline}
    sides = [side for side in SIDES if what["passage"][side] is not None]
    known = {side: {feature: says(one) for feature, one in what["features"][side].items()} for side in sides}
    passage = what["passage"]
    told = [{"name": shell.visible(names[side]), "tokens": passage[side], "says": known[side],
             "values": {feature: one["values"] for feature, one in what["features"][side].items()},
             "page": links.get(side, "")} for side in sides]
    block = shell.data({"tokens": list(map(shell.visible, passage["tokens"])), "sides": told}, id="look")
    parts = [f"<h1>{escape(shell.visible(run))}</h1>", *_about(what, names, len(sides) > 1, links.get("report", "")),
             f'<div class="look card"><div class=text>{_text(passage)}</div></div>',
             "<details class=table open><summary>all tokens as a table</summary>"
             f"{_table(passage, {side: names[side] for side in sides}, known, links)}</details>", block]
    return shell.page(f"A text read by {shell.visible(run)}", parts, ("look.js",), ("look.css",))


def _about(what: dict, names: dict[str, str], two: bool, report: str) -> list[str]:
    model, layer, n = what["model"], what["layer"], len(what["passage"]["tokens"])
    beside = f"beside {names['baseline']} · " if two else ""
    about = escape(shell.visible(f"{beside}{model}, after block {layer} · {n} tokens"))
    back = f' · <a href="{escape(report)}">the run’s report</a>' if report else ""
    lines = [f"<p class=mut>{about}{back}</p>"]
    if what["problem"]:
        lines.append(f"<p class=warn>No baseline beside it: {escape(shell.visible(what['problem']))}</p>")
    if what["left_out"]:
        lines.append(f"<p class=warn>The text is cut after {n - 1:,} tokens, the context that the SAE was trained on: "
                     f"{what['left_out']:,} are left out.</p>")
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
    return ("<div class=scroll tabindex=0 role=region aria-label='all tokens'><table class=looked><thead><tr><th>#</th>"
            f"<th class=l>token</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>")


def _features(pairs: list, known: dict[str, str], link: str) -> str:
    lines = []
    for feature, activation in pairs:
        name = f'<a href="{escape(link)}#{feature}">{feature}</a>' if link else str(feature)
        said = f"<span class=mut>{escape(known[str(feature)])}</span>"
        lines.append(f"<div><span class=n>{name}</span> <b>{activation:.4g}</b> {said}</div>")
    return "".join(lines)
