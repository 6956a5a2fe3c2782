"""--minutes: what fits, in figures worked out by hand."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import evals
from runs import limit as limits
from runs.limit import Limit, OutOfTime, Slow
from runs.pace import Pace
from variants.preflight.messages import TooSlow, limited


@pytest.fixture
def now(monkeypatch):
    """A clock that stands, at a moment that a test sets: now.at(seconds)."""
    clock = SimpleNamespace(seconds=0.0)
    clock.at = lambda seconds: setattr(clock, "seconds", seconds)
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock.seconds)
    return clock


@dataclass
class Settings:
    """Those of a run that decide what fits."""

    num_tokens: int = 1_000_000
    passes: int = 1
    batch_size: int = 1000
    snapshots: int = 0
    snapshot_evals: str = "core"
    profile: str = "tiny"
    d_sae: int = 8


def planned(minutes: float, costs: dict[str, float], monkeypatch, pace=None, kept=False, **given):
    """A limit after its plan, and the settings it gave; evals cost so many seconds of a model of a second a token."""
    monkeypatch.setattr(evals, "cost", lambda name, profile, config: (costs[name], 0.0))
    limit = Limit(minutes, 0.0)
    lm = SimpleNamespace(digest="lm", device="cpu")
    pace = pace or Pace(1e-4, 0.1, 1.0)
    return limit, limit.plan(Settings(**given), pace, kept, {name: {} for name in costs}, lm, [3], 1)


def test_training_is_cut_to_what_fits_beside_evals_end_and_margin(now, monkeypatch):
    """Fails if the tokens are others than (600 − 28 − 1.15·(60 + 40))/1.15/(1e-4 + .1/1000) = 1,986,956, to two digits.

    600 s in all; 28 = 10 + 3 % of them for the end; a token costs 1e-4 s of the model and a thousandth of a step.
    """
    _, cut = planned(10, dict(core=60, sparse_probing=40), monkeypatch, num_tokens=10**8)
    assert cut.num_tokens == 1_900_000
    _, whole = planned(10, dict(core=60, sparse_probing=40), monkeypatch, num_tokens=1_986_956)
    assert whole.num_tokens == 1_986_956


def test_time_is_kept_for_evals_in_their_order_as_long_as_they_fit(now, monkeypatch, capsys):
    """Fails if time is kept for more than half, or for others than the headline's and the first chosen that fit."""
    costs = dict(absorption=100, core=150, scr=200, tpp=60)
    limit, _ = planned(10, costs, monkeypatch, num_tokens=10**8)
    # half of 572 s are 286: core 1.15·150 = 172.5, then neither absorption's 115 nor scr's 230, but tpp's 69
    assert limit.without == ["absorption", "scr"] and limit.order(costs) == ["core", "tpp", "absorption", "scr"]
    assert "no time is kept for the eval scr, which takes about 3m20s" in capsys.readouterr().out
    # a training of 500,000 tokens takes 1.15·100 s: 457 are left for evals, enough for all but scr
    limit, cut = planned(10, costs, monkeypatch, num_tokens=500_000)
    assert limit.without == ["scr"] and cut.num_tokens == 500_000


def test_activations_that_are_kept_take_no_time(now, monkeypatch):
    """Fails if a run whose blocks all lie in the cache is cut as if they were to be made, or one that is cut all the
    same as if they lay there: its last block is another.
    """
    # without the model's part 4,000,000 tokens take 1.15·400 s, with it 1.15·800 of 572
    assert planned(10, dict(core=0), monkeypatch, num_tokens=4_000_000)[1].num_tokens == 2_400_000
    assert planned(10, dict(core=0), monkeypatch, kept=True, num_tokens=4_000_000)[1].num_tokens == 4_000_000
    assert planned(10, dict(core=0), monkeypatch, kept=True, num_tokens=9_000_000)[1].num_tokens == 2_400_000


def test_no_time_to_train_is_said_before_anything_is_trained(now, monkeypatch):
    """Fails if fewer than ten steps start a run, or the minutes that are told as enough are not."""
    slow = Pace(1e-2, 5.0, 1.0)  # 15 s a step of 1,000 tokens
    with pytest.raises(ValueError, match="training steps fit") as told:
        planned(1, dict(core=1), monkeypatch, pace=slow)
    wanted = int(str(told.value).partition("--minutes=")[2].partition("\n")[2].partition("--minutes=")[2].split()[0])
    limit, cut = planned(wanted, dict(core=1), monkeypatch, pace=slow)
    assert cut.num_tokens >= limits.FEWEST * 1000


def test_a_training_that_grows_slower_is_cut_at_a_row_of_its_log(now, monkeypatch, tmp_path):
    """Fails if a run on its pace is cut, or one late row cuts it, or one at a tenth of it is not cut to what fits."""
    limit, plain = planned(10, dict(core=0), monkeypatch, num_tokens=1_000_000)
    plan, at = [500_000, 500_000], SimpleNamespace(step=0, clock=SimpleNamespace(snapshots=0.0))

    def row(seconds, step):
        now.at(seconds)
        at.step = step
        return limit.looked_at(plain, plan, at, 0, tmp_path)

    # 50 s for the first block's model, a tenth of a second a step, as planned; then a row ten times as long
    for seconds, step in ((60, 100), (70, 200), (80, 300), (90, 310)):
        assert row(seconds, step) is plain
    limit.rows.clear()
    assert [row(300 + 10 * i, 300 + 10 * i) is plain for i in range(4)] == [True] * 4
    # the third late row: 232 s are left; /(1.15·10) = 20.17 by the pace: 160,000 tokens of the block at hand take 16,
    # and the next block's .0002 each: 20,869 more, whole batches
    assert row(340, 340).num_tokens == 520_000
    assert "after step 340" in limit.cut_again[0]
    again = Limit(10, 0.0)
    again.read(tmp_path)
    assert again.num_tokens == 520_000


def test_a_block_that_would_come_too_late_is_given_up(now, monkeypatch):
    """Fails if a block is made to its end though that lies beyond the limit, or given up though it fits."""
    limit, _ = planned(10, dict(core=0), monkeypatch)

    def passes(seconds):
        for _ in range(100):
            now.at(now.seconds + seconds)
            yield 100

    tracked = limit.watching(lambda items, *how: items)
    assert len(list(tracked(passes(5.0), "", 10_000, "tok", int))) == 100  # 500 s of 572
    now.at(0.0)
    with pytest.raises(Slow) as slow:
        list(tracked(passes(10.0), "", 10_000, "tok", int))
    assert slow.value.token == pytest.approx(0.1)
    assert now.seconds <= 40


def test_evals_are_measured_within_what_is_left(now, monkeypatch, tmp_path):
    """Fails if an eval begins that cannot end, or if what one took is not remembered for the next run."""
    limit, _ = planned(10, dict(core=100, scr=100), monkeypatch)
    limit.took = tmp_path / "took.json"
    with limit.measuring("core", "a key", 2):
        now.at(300.0)
    # three times as long as forecast: scr needs 300 of the 272 s
    with pytest.raises(OutOfTime, match="about 5m00s, and 4m32s are left"), limit.measuring("scr", "other", 2):
        raise AssertionError("it began")
    assert limit._known() == {"a key": 150.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_out_of_time_ends_even_where_an_exception_is_dropped():
    """Fails if the end of the time is lost where Python drops exceptions, in a __del__."""
    class Deaf:
        def __del__(self):
            time.sleep(1.0)

    limit = Limit(1.0, time.monotonic() - 60 + 0.3)
    begun = time.monotonic()
    with pytest.raises(OutOfTime, match="are over, here"), limit.within(0.0, lambda: "here"):
        Deaf()
        while time.monotonic() - begun < 20:
            time.sleep(0.01)
    assert time.monotonic() - begun < 10
    time.sleep(1.2)  # and no alarm rings afterwards


def test_an_alarm_within_the_preflight_s_own():
    """Fails if steps of the preflight, each with an alarm of its own, put off that of the run, or hide it."""
    limit = Limit(1.0, time.monotonic() - 60 + 1.0)
    begun = time.monotonic()
    with pytest.raises(OutOfTime, match="are over, in preflight"), limit.within(0.0, lambda: "in preflight"):
        for _ in range(3):
            with limited(0.5, "a step"):
                time.sleep(0.1)
        with limited(20.0, "a step"):
            time.sleep(10.0)
    assert 0.99 < time.monotonic() - begun < 8  # a busy machine rings late; put off, it would ring after ten
    with pytest.raises(TooSlow), limited(0.1, "a step"):
        time.sleep(5.0)
