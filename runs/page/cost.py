"""What a run took: time by phase, speed, memory, what it ran on."""

from __future__ import annotations

from html import escape

from runs.page import charts

# what the phases are called in run_info.json, in their order
PHASES = ("preflight", "language model", "training", "report", "evals", "results")


def part(info: dict, log_rows: list[dict]) -> str:
    """run_info.json and the training log's last speeds as HTML; "" where nothing is known."""
    facts = _facts(info, log_rows)
    seconds = {name: spent for name, spent in _by_phase(info).items() if spent > 0}
    if not facts and not seconds:
        return ""
    html = ["<h2>Cost</h2>", f"<p>{escape(' · '.join(facts))}</p>"]
    if seconds:
        html.append(_bar(seconds))
    rows = _rows(info)
    if rows:
        body = "".join(f"<tr><td class=l>{escape(key)}</td><td class='l w'>{escape(value)}</td></tr>"
                       for key, value in rows)
        html.append(f"<details><summary>hardware and versions</summary><table>{body}</table></details>")
    return "".join(html)


def _by_phase(info: dict) -> dict[str, float]:
    known = {name: spent for name, spent in (info.get("seconds") or {}).items() if isinstance(spent, (int, float))}
    if info.get("status") == "running":  # the page is made in it
        known.pop("results", None)
    return {name: known[name] for name in (*PHASES, *known) if name in known}


def _facts(info: dict, log_rows: list[dict]) -> list[str]:
    facts = []
    seconds = sum(_by_phase(info).values())
    if seconds:
        facts.append(_time(seconds))
    speed = info.get("tokens_per_s") or _last_speed(log_rows)
    if speed:
        facts.append(f"{speed:,.0f} tokens a second in training")
    peaks = [peak for peak in (info.get("peak_memory_gb") or {}).values() if isinstance(peak, dict)]
    for place, name in (("host", "host"), ("gpu", "GPU")):
        most = max((peak[place] for peak in peaks if place in peak), default=None)
        if most is not None:
            facts.append(f"{most:.2g} GB of {name} memory at most")
    settings = info.get("settings") or {}
    if info.get("steps") and settings.get("batch_size"):
        facts.append(f"{info['steps'] * settings['batch_size']:,} tokens in {info['steps']:,} steps")
    hardware = info.get("hardware") or {}
    if hardware:
        facts.append(str(hardware.get("gpu") or f"{hardware.get('cores')} cores"))
    return facts


def _last_speed(log_rows: list[dict]) -> float | None:
    """The median speed of the log, for runs of before it was kept."""
    speeds = []
    for row in log_rows:
        try:
            speeds.append(float(row.get("tokens_per_s") or ""))
        except ValueError:
            continue
    return sorted(speeds)[len(speeds) // 2] if speeds else None


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} seconds"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _bar(seconds: dict[str, float]) -> str:
    """Shares of the time by phase: a bar, and the same in words."""
    whole = sum(seconds.values())
    parts, words = [], []
    for i, (name, spent) in enumerate(seconds.items()):
        colour = charts.COLOURS[i % len(charts.COLOURS)]
        parts.append(f'<i style="width:{100 * spent / whole:.2f}%;background:var({colour})"></i>')
        words.append(f'<span><i style="background:var({colour})"></i>{escape(name)} {_time(spent)}, '
                     f"{spent / whole:.0%}</span>")
    return f"<div class=bar aria-hidden=true>{''.join(parts)}</div><p class='key mut'>{' '.join(words)}</p>"


def _rows(info: dict) -> list[tuple[str, str]]:
    """Hardware, commit and versions."""
    rows = [(str(key), str(value)) for key, value in (info.get("hardware") or {}).items()]
    if info.get("commit"):
        rows.append(("commit", str(info["commit"])))
    return rows + [(str(key), str(value)) for key, value in (info.get("versions") or {}).items() if value]
