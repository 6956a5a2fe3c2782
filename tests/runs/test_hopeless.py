"""What counts as hopeless, on rows of a log made by hand: 50 rows of 1,000 tokens each, 32 dimensions, 128 features."""

from types import SimpleNamespace

import pytest

from runs import hopeless

TOTAL, WIDTHS = 50_000, (32, 128)


def rows(n, l0=20.0, explained=0.5, dead=0.0):
    """n rows; a number is the same in all of them, a function is asked for the row's (from 1)."""
    def of(value, i):
        return value(i) if callable(value) else value

    return [dict(sae="a", step=10 * i, tokens=1000 * i, l0=of(l0, i), explained_variance=of(explained, i),
                 dead_share=of(dead, i)) for i in range(1, n + 1)]


def kind(log, untrained=None, spared=()):
    found = hopeless.symptom(log, TOTAL, WIDTHS, untrained, spared)
    return found and found[0]


@pytest.mark.parametrize("symptom, log", {
    "silent": dict(l0=0.0, dead=1.0, explained=-0.01),
    "dense": dict(l0=128.0, explained=0.9),
    "worse": dict(explained=-0.2),
}.items())
def test_a_symptom_counts_after_a_fifth(symptom, log):
    """Fails if one of them is missed in row 10 of 50, or held against an SAE before that."""
    assert kind(rows(10, **log)) == symptom
    assert kind(rows(9, **log)) is None


@pytest.mark.parametrize("log", [
    dict(l0=lambda i: 0.0 if i != 18 else 0.01, dead=1.0),  # 18 is the first of the last three of 20
    dict(l0=0.0, dead=0.9, explained=0.0),  # revived
])
def test_one_row_of_three_or_a_feature_that_fires_is_enough(log):
    """Fails if an SAE is given up of which a feature fired in one of the last three rows, or in training."""
    assert kind(rows(20, **log)) is None


def test_a_code_that_thins_out_goes_on():
    """Fails if an SAE is given up that has more than half of its features at work and explains x, or will, or whose L0
    falls by more than a twentieth in a tenth of the run; or if one is kept of which nothing of that holds."""
    assert kind(rows(20, l0=lambda i: 128.0 if i < 18 else 126.0)) == "dense"  # above .98·128 = 125.4
    assert kind(rows(20, l0=lambda i: 128.0 if i < 18 else 125.0)) is None
    assert kind(rows(40, l0=80.0, explained=0.9)) is None
    assert kind(rows(40, l0=80.0, explained=0.2)) == "dense"
    assert kind(rows(40, l0=lambda i: 120 - i, explained=0.2)) is None  # five rows: 86 to 81 in the mean, 5.8 % less
    assert kind(rows(40, l0=lambda i: 120 - 0.8 * i, explained=0.2)) == "dense"  # 92.8 to 88.8, 4.3 % less
    assert kind(rows(40, l0=80.0, explained=lambda i: 0.011 * i)) is None  # the mean, .429, and 10 rows of .011
    assert kind(rows(40, l0=80.0, explained=lambda i: 0.009 * i)) == "dense"  # .351 + .09
    assert kind(rows(10, l0=128.0), spared={"dense"}) is None


def test_a_reconstruction_that_will_come_goes_on():
    """Fails if an SAE is given up that reaches the mean's reconstruction by the end as it now rises, or one that does
    not is kept."""
    assert kind(rows(20, explained=lambda i: -3 + 0.1 * i)) is None  # at −1, .1 a row, 30 rows to come
    assert kind(rows(20, explained=lambda i: -3 + 0.01 * i)) == "worse"
    assert kind(rows(20, explained=lambda i: -0.2 - 0.01 * i)) == "worse"
    assert kind(rows(20, explained=float("-inf"))) is None  # x without variance
    assert kind(rows(20, explained=-0.2), spared={"worse"}) is None
    assert kind(rows(20, explained=-0.2, l0=0.5)) == "silent"  # the advice that fits


def test_no_progress_against_the_untrained_sae():
    """Fails if an SAE is kept that explains as much as before the first step with as many features; or one is given up
    that explains more, has become sparser, or began so near 1 that .01 is out of reach."""
    stuck = rows(20, l0=30.0, explained=0.505)
    assert kind(stuck, [32.0, 0.5]) == "still"
    assert kind(stuck, [34.0, 0.5]) is None  # 30 < .9·34
    assert kind(stuck, [32.0, 0.49]) is None
    assert kind(stuck) is None
    assert kind(stuck, [32.0, 0.5], spared={"still"}) is None
    assert kind(rows(20, l0=30.0, explained=0.985), [32.0, 0.98]) is None  # 1 % of the .02 left is enough
    assert kind(stuck, [float("nan"), float("nan")]) is None


def test_where_it_holds():
    """Fails if a run without a time limit ends early unasked, or one with a limit does not."""
    def on(choice, minutes):
        return hopeless.is_on(SimpleNamespace(stop_hopeless=choice, minutes=minutes))

    assert [on("auto", 0.0), on("auto", 5.0), on("yes", 0.0), on("no", 5.0)] == [False, True, True, False]


@pytest.mark.parametrize("variant, hyper, dense", [
    ("topk", {}, False), ("topk", {"k": 40}, True), ("topk", {"k": 16, "k_start": 40}, True),
    ("jumprelu", {"target_l0": 60}, True), ("standard", {}, False), ("standard", {"l1_penalty": 0}, True),
])
def test_a_dense_code_that_was_asked_for(variant, hyper, dense):
    """Fails if a k above a quarter of 128 features, or a penalty of 0, is not taken as a wish; or a default is."""
    settings = SimpleNamespace(allow_dense=False, variant=variant, d_sae=128)
    assert hopeless.may_be_dense(settings, hyper) == dense
    assert hopeless.may_be_dense(SimpleNamespace(**vars(settings) | dict(allow_dense=True)), hyper)
