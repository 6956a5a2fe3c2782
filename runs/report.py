"""report.html of a run: the verdict first, then tables, charts, settings. python -m runs.report run_1 makes it again.

What each part shows is in runs/page/. A part that fails costs itself alone, and says so in its place.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path

from runs import compare, features
from runs.comparison import Comparison
from runs.folder import left, write_text
from runs.page import comparison, cost, curves, frontier, glance, health, settings, shell, verdict
from runs.page import features as pages
from runs.reading import Run, read
from runs.stability import as_data
from runs.wording import first_line, in_a_line

PREVIEWS = 6  # dashboards in the page, of all its SAEs together
SIZE = 2_950_000  # bytes of a page at most
# parts without which a page that would be larger is made, the least needed first, and where that which they show is
LEAST = {"variant's own report": "variant_report/", "features": "features/", "training curves": "training_log.csv",
         "quality along training": "final_info.json", "settings": "final_info.json", "health": "features/",
         "frontier": "final_info.json", "comparison": "final_info.json", "cost": "run_info.json"}

# ------------------------------------------------------------------------------------------------ the page


def write(out_dir: str | Path, sections: dict[str, Run], baseline: Iterable[Run] | dict | None, log_rows: list[dict],
          ) -> Path:
    """Write out_dir/report.html and return its path; beside it new_features.json where a baseline's decoder is at hand.

    It leads to the feature pages that are there (`with_features`, `feature_pages`). `sections` as `read` returns them.
    log_rows: rows of training_log.csv (sae, step, tokens, loss, its terms, l0, …).
    """
    out = Path(out_dir).resolve()
    runs, stored, comparisons = _judged(sections, baseline)
    _write_new_features(out, comparisons)
    return _write_page(out, runs, stored, comparisons, log_rows)


def again(out_dir: str | Path) -> Path:
    """Make the page of a finished run again, and those of its features. FileNotFoundError, ValueError: no such run."""
    out = Path(out_dir).resolve()
    sections = read(out)
    feature_pages(out, print)
    runs, stored, comparisons = _judged(sections, compare.stored_baselines(sections))
    return _write_page(out, runs, stored, comparisons, _log_rows(out))


def _judged(sections: dict[str, Run], baseline: Iterable[Run] | dict | None) -> tuple:
    """(the runs, what they may be compared with, their comparisons)."""
    runs = list(sections.values())
    stored = list(baseline.values() if isinstance(baseline, dict) else baseline or ())
    return runs, stored, compare.judged(runs, stored, compare.directions())


def _write_page(out: Path, runs: list[Run], stored: list[Run], comparisons: list[Comparison],
                log_rows: list[dict]) -> Path:
    info = left(out)
    beside = _beside(runs, out, info)
    saes = [one for each in comparisons for one in each.saes]
    parts = {"head": partial(_head, out.name, runs, (info.get("settings") or {}).get("note")),
             "verdict": partial(verdict.part, comparisons, out, info, beside[0]),
             "comparison": partial(comparison.part, comparisons, runs),
             "cost": partial(cost.part, info, log_rows),
             "frontier": partial(frontier.part, runs, stored, comparisons, out, beside),
             "quality along training": partial(frontier.along_training, runs),
             "health": partial(health.part, saes, out, log_rows),
             "training curves": partial(curves.part, log_rows),
             "variant's own report": partial(settings.own_report, out / "variant_report"),
             "features": partial(_features, out),
             "settings": partial(settings.part, runs)}
    for sae in _with_pages(out):
        with contextlib.suppress(OSError, ValueError):  # the part that needs it says so
            glance.of(out, sae, _previewed(out, sae))
    path = out / "report.html"
    write_text(path, _bounded(out.name, {name: _made(name, make) for name, make in parts.items()}))
    glance.forget()
    return path


def _bounded(title: str, parts: dict[str, str]) -> str:
    """The page, of at most SIZE bytes: without the parts least needed, which it names, where it would be larger."""
    least = iter(LEAST.items())
    while True:
        html = shell.page(title, _with_contents(list(parts.values())), (*shell.CHARTS, "tables.js"),
                          ("report.css", *pages.STYLES))
        if len(html.encode("utf-8", "replace")) <= SIZE:
            return html
        name, place = next(((name, place) for name, place in least if len(parts.get(name, "")) > 10_000), ("", ""))
        if not name:
            return html
        parts[name] = (f"<p class=warn>The {escape(name)} would make this page larger than 3 MB: see "
                       f"{escape(place)}.</p>")


def _beside(runs: list[Run], out: Path, info: dict) -> tuple[list[Run], str]:
    """Other seeds beside the run, and what to say of them: frontier.other_seeds, none where that fails."""
    try:
        return frontier.other_seeds(runs, out, info)
    except Exception as error:  # noqa: BLE001  of runs that are not this one
        return [], f"other seeds could not be read: {type(error).__name__}: {error}"


def _with_contents(parts: list[str]) -> list[str]:
    """The parts, their headings with names to go to, and behind the first, the page's head, a line that goes there."""
    head, *rest = parts
    named, links = [], []
    for html in rest:
        for heading in re.findall(r"<h2>(.*?)</h2>", html):
            name = re.sub(r"\W+", "-", heading.lower())
            html = html.replace(f"<h2>{heading}</h2>", f'<h2 id="part-{name}">{heading}</h2>', 1)
            links.append(f'<a href="#part-{name}">{heading.lower()}</a>')
        named.append(html)
    return [head, f"<nav aria-label='parts of the page'>{' · '.join(links)}</nav>", *named]


def _made(name: str, make: Callable[[], str]) -> str:
    """A part of the page, or a line that says why it is not there."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001  whatever is wrong with a part, the others stand
        return f"<p class=warn>the {escape(name)} could not be shown: {escape(f'{type(error).__name__}: {error}')}</p>"


def _with_pages(out: Path) -> list[str]:
    """The SAEs of whose features there is a page."""
    return [sae for sae in features.kept(out) if pages.place(out, sae).exists()]


def _previewed(out: Path, sae: str) -> int:
    """How many dashboards of an SAE the report shows."""
    kept = features.kept(out)
    return max(PREVIEWS // len(kept), 1) if kept.index(sae) < PREVIEWS else 0


def _head(name: str, runs: list[Run], note) -> str:
    config, several = runs[0].config if runs else {}, len(runs) > 1
    width = config.get("d_sae")
    facts = [config.get("variant")]
    if config.get("model"):
        facts.append(f"on {config['model']}")
    facts.append(f"{len(runs)} SAEs" if several else config.get("hook_name"))
    if isinstance(width, int):
        facts.append(f"width {width:,}")
    said = f"<h1>{escape(name)}</h1><p class=mut>{escape(' · '.join(str(f) for f in facts if f))}</p>"
    return f"{said}<p class=note>{escape(str(note))}</p>" if note else said


def with_features(out: Path, looked_at: dict, say: Callable[[str], None]) -> None:
    """Make the boards of a run's SAEs, `looked_at` as `features.make` has it, and their pages."""
    features.make(out, looked_at, compare.of_run(out), say)
    feature_pages(out, say)


def feature_pages(out: Path, say: Callable[[str], None]) -> None:
    """Write features/<SAE>.html of each SAE that has a board; one that cannot be shown is named, and costs itself."""
    for sae in features.kept(out):
        try:
            board = features.read(out, sae)
            pages.write(out, sae, board)
            glance.of(out, sae, _previewed(out, sae), board)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, the run has its results
            pages.place(out, sae).unlink(missing_ok=True)  # of an earlier board
            say(f"report: no page of the features of {sae}: {type(error).__name__}: {first_line(error)}")


def _features(out: Path) -> str:
    """Links to the pages of the SAEs' features, and some of their dashboards."""
    there = _with_pages(out)
    html = [_made(f"features of {sae}", partial(_feature_page, out, sae)) for sae in there]
    html += [_made(f"features of {sae}", partial(_no_page, out, sae)) for sae in features.kept(out) if sae not in there]
    if not html and (out / "sae").is_dir():
        html.append("<p class=mut>There are no dashboards of this run's features: <code>python -m runs.dashboards "
                    f"{escape(shlex.quote(out.name))}</code> makes them.</p>")
    return f"<h2>Features</h2>{''.join(html)}" if html else ""


def _no_page(out: Path, sae: str) -> str:
    """A line for a board of which there is no page; ValueError: it is damaged."""
    features.read(out, sae)
    return f"<p class=mut>There is no page of the features of {escape(sae)}.</p>"


def _feature_page(out: Path, sae: str) -> str:
    """A link to the page of an SAE's features, and some of its dashboards."""
    link = f'<p><a href="{escape(pages.address(sae))}">all features of {escape(sae)}</a></p>'
    return link + glance.of(out, sae).preview


def _write_new_features(out: Path, comparisons: list[Comparison]) -> None:
    """new_features.json: of every SAE whose baseline's decoder is at hand the nearest feature there, for dashboards."""
    asked = {one.run.section: one.new() for c in comparisons for one in c.saes if one.run.path.parent == out}
    found = {section: as_data(new, every=True) for section, new in asked.items() if new is not None}
    if found:
        write_text(out / "new_features.json", json.dumps(found, allow_nan=False) + "\n")


def _log_rows(out: Path) -> list[dict]:
    """The rows of training_log.csv; none for a run that trained nothing, or where it is damaged."""
    try:
        with open(out / "training_log.csv", encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("sae")]
    except (OSError, ValueError, csv.Error):
        return []


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 1 with a line on stderr for each folder whose page could not be made."""
    parser = argparse.ArgumentParser(prog="python -m runs.report", allow_abbrev=False,
                                     description="Make report.html of finished runs again, and features/*.html.")
    parser.add_argument("runs", nargs="+", metavar="run", help="folder of a finished run")
    status = 0
    for name in parser.parse_args(argv).runs:
        try:
            if not Path(name).is_dir():
                raise FileNotFoundError(f"there is no folder {name}: give the folder of a finished run")
            print(again(name))
        except (ValueError, OSError) as error:
            print(in_a_line(error), file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
