"""A comparison laid out: every form of it as it was, and all of one data."""

import json
import re
from pathlib import Path

import pytest

from runs import compare, frontier, tables
from runs.reading import Run, read
from runs.wording import number, signed
from tests import FIXTURES, PROJECT
from tests.runs.records import CE, DIRECTIONS, R2, TWO_ENDS, entry, record, run, saes_of

PROBING = "sparse_probing.sae_top_1_test_accuracy"
COMPARISONS = ("run_1", "run_1 run_2", "run_1 run_2 run_3 run_4", "sweep", "run_5", "none_1 none_2")  # not of a layout


def recorded(place):
    """Runs of each layout and of each reason not to compare, and a baseline of three L0, in folders at `place`."""

    def sae(l0, ce, probing, errors=True, context=128, **config):
        stderrs = {CE: 0.004, PROBING: 0.02} if errors else {}
        evals = {"core": {"context_size": 128}, "sparse_probing": {"context_length": context}}
        return entry({"core.l0": l0, CE: ce, PROBING: probing, "core.mse": 2.5, "core.total_tokens": 5000}, stderrs,
                     evals=evals, **config)

    saes = {f"layer_3.l_{l0:g}": sae(l0, ce, 0.71, variant="standard", hyper={"l": l0})
            for l0, ce in ((20.25, 0.8), (40.5, 0.853), (100.0, 0.92))}
    record(place / "base", saes)
    record(place / "run_1", {"layer_3": sae(50.0, 0.845, 0.8, variant="mine", seed=3)})
    record(place / "run_2", {"layer_3": sae(40.4, 0.912, 0.5, variant="mine", dense=0.4)})
    record(place / "run_3", {"layer_3": sae(150.0, 0.93, 0.72, context=64, variant="other")})
    record(place / "run_4", {"layer_3": sae(30.0, -0.1, 0.71, errors=False, variant="mine")})
    elsewhere = sae(30.0, 0.8, 0.7, layer=4, hook_name="blocks.4.hook_resid_post")
    record(place / "run_5", {"layer_4": elsewhere | {"problems": ["doubtful: the texts were few"]}})
    sweep = {f"layer_3.k_{k}": sae(k + 0.5, 0.82 + k / 1000, 0.75, context=64, variant="topk") for k in (90, 30, 200)}
    record(place / "sweep", sweep)
    for i in (1, 2):
        record(place / f"none_{i}", {"layer_3": sae(30.0, 0.8, 0.7 + i / 100, model="org/Else", variant="mine")})


def printed(place, monkeypatch, capsys, line):
    """What the command prints in the folder `place`; there, `base` is the baseline unless the line is of none."""
    monkeypatch.chdir(place)
    baseline = [] if "none" in line else ["--baseline=base"]
    assert compare.main([*line.split(), *baseline]) == 0
    return capsys.readouterr().out


def test_every_form_is_as_it_was(tmp_path, monkeypatch, capsys):
    """Fails if a letter of the text, markdown or CSV changes in one of the layouts."""
    recorded(tmp_path)
    lines = [*COMPARISONS, "run_1 --all", "sweep --all", "sweep --markdown", "run_1 run_2 --markdown",
             "run_1 run_4 --csv", "none_1 none_2 --csv"]
    found = "".join(f"$ {line}\n{printed(tmp_path, monkeypatch, capsys, line)}\n" for line in lines)
    assert found == (FIXTURES / "comparisons.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", COMPARISONS)
def test_json_holds_what_the_table_shows(tmp_path, monkeypatch, capsys, line):
    """Fails if a number, a verdict or a warning of the printed table is not in the JSON, or that is not strict."""
    recorded(tmp_path)
    text = printed(tmp_path, monkeypatch, capsys, f"{line} --markdown")

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(printed(tmp_path, monkeypatch, capsys, f"{line} --json"), parse_constant=refuse)
    (comparison,) = document["comparisons"]
    metrics = [metric for sae in comparison["saes"] for metric in sae["metrics"].values()]
    known = {number(metric[key]) for metric in metrics for key in ("value", "baseline")}
    known |= {number(value) for reference in comparison["references"] for value in reference["means"].values()}
    known |= {signed(m["difference"], m["value"], m["baseline"]) for m in metrics if m["difference"] is not None}
    _, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    shown = {re.sub(r"^~|(?<=\d)[ ?+-]$", "", cell.strip()) for row in rows for cell in row}
    figures = {cell for cell in shown if re.fullmatch(r"[+-]?\d[\d,.]*", cell)}
    assert figures and figures <= known
    verdicts = {cell.rstrip("*?").removesuffix(" (dense)") for cell in shown} & {"better", "worse", "equal"}
    assert verdicts <= {metric["verdict"] for metric in metrics}
    assert all(warning in text for sae in comparison["saes"] for warning in sae["warnings"])


def test_json_says_at_which_l0_and_how_sure(tmp_path, monkeypatch, capsys):
    """Fails if a program cannot tell a sure difference at equal L0 from any other, or what was not compared and why."""
    recorded(tmp_path)
    line = "run_1 run_2 run_3 run_4 --json"
    (comparison,) = json.loads(printed(tmp_path, monkeypatch, capsys, line))["comparisons"]
    between, measured, outside, unknown = comparison["saes"]
    assert [sae["equal_l0"] for sae in comparison["saes"]] == [True, True, False, True]  # the third lies outside
    assert [sae["l0"] for sae in comparison["frontier"]] == [20.25, 40.5, 100.0]
    assert [sae["l0"] for sae in between["baseline"]["between"]] == [40.5, 100.0]
    ce = between["metrics"][CE]
    assert (ce["verdict"], ce["beyond_two_stderr"]) == ("worse", True)
    assert (ce["baseline_l0"], ce["interpolated"]) == (50.0, True)
    assert ce["difference"] == ce["value"] - ce["baseline"]
    assert ce["difference_stderr"] == pytest.approx(0.004 * 2**0.5)
    assert measured["dense"] == 0.4 and measured["metrics"][CE]["baseline_l0"] == 40.5
    assert outside["other_settings"] == {"sparse_probing": {"context_length": [64, 128]}}
    probing = outside["metrics"][PROBING]
    assert (probing["verdict"], probing["difference"], probing["baseline"]) == ("not compared", None, 0.71)
    assert unknown["metrics"][CE]["beyond_two_stderr"] is None and "below 0" in unknown["warnings"][0]
    (alone,) = json.loads(printed(tmp_path, monkeypatch, capsys, "run_5 --json"))["comparisons"]
    assert alone["saes"][0]["not_compared"] == ["layer 4 / 3"]
    (stand_in,) = json.loads(printed(tmp_path, monkeypatch, capsys, "none_1 none_2 --json"))["comparisons"]
    assert stand_in["stand_in"] and [sae["name"] for sae in stand_in["saes"]] == ["none_1", "none_2"]


def test_the_printed_table_fits(tmp_path):
    """Fails if a real run's end does not fit in 100 columns and 25 lines, or if columns are not aligned."""
    (stored,) = read(PROJECT / "runs/baseline/smollm2-135m-instruct/topk").values()
    means = {m: v * 0.99 if v else v for m, v in stored.means.items()}
    text = compare.summary(record(tmp_path / "run_1", {"layer_9": entry(means, **stored.config)}))
    lines = text.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("metric"))
    rows = [line for line in lines[start + 1 :] if "." in line.split()[0]]
    ends = {line.index(figure) + len(figure) for line in rows for figure in line.split()[1:2] if figure != "–"}
    assert ends == {lines[start].index("baseline") + len("baseline")}


def test_a_sweep_is_shown_as_a_frontier(tmp_path):
    """Fails if baseline and run are not interleaved by L0, or if single metrics at different L0 get verdicts."""
    sweep = {f"layer_3.k_{k}": entry({"core.l0": float(k), CE: 0.9 + k / 1000}) for k in (40, 20)}
    record(tmp_path / "run_1", sweep)
    base = run("standard", {"core.l0": 30.0, CE: 0.91})
    lines = compare.compare(read(tmp_path / "run_1"), [base], DIRECTIONS).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("SAE"))
    rows = [line.split("  ")[0] for line in lines[start + 1 :]]
    assert rows == ["layer_3.k_20", "standard (baseline)", "layer_3.k_40"]
    assert lines[start + 1].split()[1:] == ["20.00", "0.9200"]


def test_a_sweep_beside_a_frontier(tmp_path):
    """Fails if what is outside the baseline's L0 or of other settings is judged, or metrics are mixed up."""
    more = dict.fromkeys([f"sparse_probing.sae_top_{k}_test_accuracy" for k in (1, 2, 5)], 0.75)
    more |= dict.fromkeys([R2, "core.kl_div_score", "core.frac_alive"], 0.75)
    evals = {"core": {"context_size": 128}, "sparse_probing": {"k_values": [1]}}
    stated = {"variant": "topk", "evals": evals}
    ours = {f"layer_3.k_{k}": entry({"core.l0": float(k), CE: 0.9 + k / 1e7, **more}, {CE: 0.001}, **stated)
            for k in (90, 10, 30, 40, 50, 200)}
    stated = {"variant": "standard", "evals": evals | {"sparse_probing": {"k_values": [2]}}}
    base = [run(sae.name, sae.means | more, sae.stderrs, **stated) for sae in saes_of("standard", TWO_ENDS)]
    lines = compare.compare(read(record(tmp_path / "run_1", ours)), base, compare.directions()).splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("ce_loss_score"))
    table = [line.split() for line in lines[start : start + 6]]
    assert table[0] == ["ce_loss_score", "k_10", "10.00", "–", "0.9000"]
    assert table[5] == ["k_200", "200.0", "–", "0.9000"]
    assert [row[0] for row in table[1:]] == ["k_30", "k_40", "k_50", "k_90", "k_200"]
    assert table[1][2:] == ["~0.8302", "0.9000", "+0.0698", "better*"]  # .8 + .12 · ln 1.5 / ln 5
    assert table[4][2:] == ["~0.9121", "0.9000", "-0.0121", "worse*"]  # .8 + .12 · ln 4.5 / ln 5
    probing = next(i for i, line in enumerate(lines) if line.startswith("sae_top_1"))
    assert lines[probing + 1].split() == ["k_30", "30.00", "0.7500", "0.7500", "–"]
    assert "– outside the baseline's L0 20.00 to 100.0" in lines and any("k_values 1 items" in line for line in lines)


def test_evals_that_the_frontier_lacks_are_compared_with_the_nearest_sae():
    """Fails if an eval that only the baseline itself ran has no figure beside a run between two L0, or one with ~."""
    evals = {"core": {}, "scr": {}}

    def sae(name, l0, **means):
        config = {"variant": "standard", "evals": {k: v for k, v in evals.items() if k == "core" or means}}
        return Run(name, {"core.l0": l0, R2: l0 / 100} | means, {}, config, [], Path("baseline/final_info.json"))

    near, far = sae("near", 40.0, **{"scr.scr_metric_threshold_10": 0.25}), sae("far", 20.0)
    partner = compare._completed(frontier.at(30.0, [near, far]), near)
    assert partner.means["scr.scr_metric_threshold_10"] == 0.25 and partner.means["core.l0"] == 30.0
    assert tables._theirs(partner, "scr.scr_metric_threshold_10") == "0.2500"
    assert tables._theirs(partner, R2).startswith("~0.3")
    assert tables._described(partner).endswith("(scr) at the nearest SAE's own L0")


def test_every_eval_has_a_headline():
    """Fails if the short table leaves an eval out, or shows more of it than its headline."""
    first = [f"core.m{i}" for i in range(tables.HEADLINE_LINES)]
    rest = ["core.more", "scr.scr_metric_threshold_10", "absorption.other", "absorption.mean_absorption_fraction_score",
            "scr.scr_metric_threshold_20"]
    shown = tables._headlines(first + rest)
    assert shown == [*first, "scr.scr_metric_threshold_10", "absorption.mean_absorption_fraction_score"]
