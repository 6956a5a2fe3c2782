"""--minutes: a run that ends in time, with a result.

A client kills a run at its time limit and deletes what it left, however near the end it was. So a run that knows the
limit measures its own speed on a few small blocks, cuts its training to the tokens that fit beside the chosen evals'
forecast, looks again at every row of its log, and leaves out by name the evals for which no time is left. What was
decided stands in time_limit.json of the run's folder, from which an interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import evals
from evals.cache import digest
from runs import folder
from runs.compare import HEADLINES
from runs.pace import Pace
from runs.plan import steps_of
from runs.voice import duration, say
from variants.kit import ranks

NOTE, TOOK = "time_limit.json", "evals_took.json"
MARGIN = 1.15  # on every forecast: caches fill, auxiliary losses begin with dead features
MOST = 0.8  # share of it that is ever kept for evals
EVALS = 0.5  # share of the time that evals may take together before some are left out at once
FEWEST = 10  # steps that are a training
WINDOW, SECONDS = 10, 3.0  # rows of the log, and seconds at least, by which it is told how fast training is
REMEMBERED = 1000  # evals' times that are kept
LAST_WORDS = 2.0  # seconds in which a run that is out of time says so
PAGES = 8.0  # and in which a slow machine writes the report and compares
PLANNED = ("headline", "pace", "forecast", "parts", "without", "num_tokens")  # of a Limit, what `plan` decides


class OutOfTime(BaseException):
    """No time is left for what is going on; not an Exception, which much code swallows."""


class Slow(Exception):
    """A block of activations that would not be made in time; the seconds that a token of it takes."""

    def __init__(self, token: float):
        super().__init__(token)
        self.token = token


@dataclass
class Limit:
    """The end of a run's time, and what is planned until then. Without `minutes` nothing here ever does anything."""

    minutes: float = 0.0
    began: float = field(default_factory=time.monotonic)  # time.monotonic() at which the time began to run
    headline: str = ""  # the eval that the verdict is made of, as far as it is asked for
    pace: Pace | None = None  # as it was measured at the start
    forecast: dict[str, float] = field(default_factory=dict)  # seconds of each eval, over all SAEs and layers
    parts: dict[str, int] = field(default_factory=dict)  # and in how many parts it is measured: layers, snapshots
    without: list[str] = field(default_factory=list)  # evals for which no time is kept: measured if some is left
    left_out: dict[str, str] = field(default_factory=dict)  # {eval: why} of those that were not measured
    done: dict[str, int] = field(default_factory=dict)  # and how many of them are
    slower: float = 1.0  # times as long as measured at the start training takes now
    slowness: float = 1.0  # and evals, than forecast
    rows: list[tuple[float, float]] = field(default_factory=list)  # at each row of the log: now, seconds by the pace
    late: int = 0  # rows in a row by which training would not end in time
    watches: bool = True  # whether a block may be given up in the making
    num_tokens: int | None = None  # to which the training was cut
    cut_again: list[str] = field(default_factory=list)  # what happened to its schedules in the middle
    took: Path | None = None  # where it is noted what evals took

    @staticmethod
    def of(settings, began: float) -> Limit:
        """The limit that a run's settings give it."""
        return Limit(settings.minutes, began, (settings.headline or "").partition(".")[0],
                     took=Path(settings.cache_dir) / TOOK)

    @property
    def on(self) -> bool:
        return self.minutes > 0

    @property
    def spare(self) -> float:
        """Seconds kept for results, report and comparison."""
        return min(120.0, 10 + 0.03 * 60 * self.minutes)

    def left(self) -> float:
        """Seconds to the end; infinite without a limit."""
        if not self.on:
            return math.inf
        return self.began + 60 * self.minutes - time.monotonic()

    def for_training(self) -> float:
        """Seconds that training may still take: without what the end and the evals need, on a machine grown slower.

        What nobody has time for is not kept for evals.
        """
        room = self.left() - self.spare
        return room - min(MOST * room, MARGIN * self.slower * self._of_evals())

    def _of_evals(self) -> float:
        """Forecast seconds of the evals that are still to come."""
        return sum(seconds * (1 - self.done.get(name, 0) / self.parts.get(name, 1))
                   for name, seconds in self.forecast.items() if name not in self.without)

    # -- the clock

    @contextmanager
    def within(self, spare: float, doing: Callable[[], str]) -> Iterator[None]:
        """OutOfTime in what runs here, once only `spare` seconds are left; no limit on Windows and in threads."""
        main = threading.current_thread() is threading.main_thread()
        if not self.on or not main or not hasattr(signal, "setitimer"):
            yield
            return

        over = False

        def stop(*_):
            if not over:
                raise OutOfTime(f"--minutes={self.minutes:g} are over, {doing()}\n"
                                "raise --minutes, or ask for less: --num_tokens, --evals")

        before = signal.signal(signal.SIGALRM, stop)
        # again and again: Python drops what is raised in a __del__
        outer, again = signal.setitimer(signal.ITIMER_REAL, max(1e-3, self.left() - spare), 1.0)
        begun = time.monotonic()
        try:
            try:
                yield
            finally:
                over = True
        finally:  # an alarm that rings just there must not leave itself set
            passed = time.monotonic() - begun
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - passed) if outer else 0.0, again)
            signal.signal(signal.SIGALRM, before)

    # -- what fits

    def plan(self, settings, pace: Pace, kept: bool, chosen: dict[str, dict], lm, layers: list[int], saes: int):
        """The settings with the tokens that fit beside the evals, but for those of which there is no time; said.

        `kept`: whether the activations of all blocks are; `saes`: of each layer. ValueError where no training fits. All
        ranks go by the first one's clock.
        """
        def planned():
            cut = self._plan(settings, pace, kept, chosen, lm, layers, saes)
            return cut, {name: getattr(self, name) for name in PLANNED}

        cut, decided = ranks.agreed(planned)
        self.__dict__.update(decided)
        return cut

    def _plan(self, settings, pace: Pace, kept: bool, chosen: dict[str, dict], lm, layers: list[int], saes: int):
        self.pace = pace
        if kept:  # nothing is passed; but a run that is cut has another last block
            self.pace = dataclasses.replace(pace, token=0.0)
        names = [metric.partition(".")[0] for metric in HEADLINES]
        self.headline = self.headline or next((name for name in names if name in chosen), "")
        keys = {name: [eval_key(name, config, lm, layer, settings.d_sae) for layer in layers]
                for name, config in chosen.items()}
        self._expect(chosen, keys, saes, settings)
        self._choose(chosen, MARGIN * settings.num_tokens * self._each(settings))
        if self.num_tokens is not None:  # decided before this run was interrupted
            return dataclasses.replace(settings, num_tokens=self.num_tokens)
        tokens = self.tokens(settings) if settings.num_tokens else 0
        if kept and tokens < settings.num_tokens:
            self.pace = pace
            tokens = self.tokens(settings)
        steps = settings.passes * tokens // settings.batch_size
        if settings.num_tokens and tokens < settings.num_tokens and steps < FEWEST:
            raise self._too_short(settings, steps)
        self._told(settings.num_tokens, tokens)
        self.num_tokens = tokens
        return dataclasses.replace(settings, num_tokens=tokens)

    def tokens(self, settings, done: int = 0, held: int = 0) -> int:
        """Training tokens that fit beside those that are `done`, at most what was asked for.

        Of the others the language model's part of `held` is done too. At the start two significant digits: the next run
        on this machine probably takes the same number, and can be compared.
        """
        step = self._each(settings) - self.pace.token
        seconds = max(0.0, self.for_training()) / (MARGIN * self.slower)
        fits = seconds / step if step * held >= seconds else held + (seconds - step * held) / self._each(settings)
        if done + fits >= settings.num_tokens:
            return settings.num_tokens
        return done + int(fits) if done or held else two_digits(fits)

    def looked_at(self, settings, plan: list[int], now, b: int, out: Path):
        """The settings, at a row of the log in block b: with fewer tokens where training would not end in time.

        `plan`: tokens of each block; `now.step` are done.
        """
        if not self.on or (ranks.count() > 1 and ranks.sharing() == 1):  # others do not come here
            return settings
        cut = ranks.agreed(lambda: self._looked_at(settings, plan, now, b))
        return self._shortened(settings, cut, f"after step {now.step:,}", out) if cut else settings

    def _looked_at(self, settings, plan: list[int], now, b: int) -> int:
        """The tokens to which training must be cut, 0 for none: where rows one after the other show that it is late."""
        steps = steps_of(settings, plan)
        total, begins = sum(steps), sum(steps[:b])
        if now.step >= total:
            return 0
        whole = sum(plan) * self.pace.token + total * self.pace.step
        # passes of the next block may run between the steps, or each block's before its own: whatever shows less delay
        made = sum(plan[:b + 1]) * self.pace.token + now.step * self.pace.step
        by_pace = max(whole * now.step / total, made)
        self.rows.append((time.monotonic() - now.clock.snapshots, by_pace))
        del self.rows[:-WINDOW]
        (since, then), (until, _) = self.rows[0], self.rows[-1]
        if by_pace <= then or len(self.rows) < 3:
            return 0
        self.slower = max(1.0, (until - since) / (by_pace - then))
        known = until - since > SECONDS and self.slower * (whole - by_pace) > self.for_training()
        self.late = self.late + 1 if known else 0
        if self.late < 3 and self.for_training() > 0:
            return 0
        self.late = 0
        done = sum(plan[:b]) + math.ceil((now.step - begins) / settings.passes) * settings.batch_size
        tokens = self.tokens(settings, done, sum(plan[:b + 1]) - done)
        return min(done + (tokens - done) // settings.batch_size * settings.batch_size, settings.num_tokens)

    def shorter(self, settings, before: list[int], token: float, out: Path):
        """The settings with fewer tokens, where the block after those of `before` would not be made in time.

        `token`: the seconds that a token of it takes. ValueError where nothing was and nothing can be trained.
        """
        self.slower = max(1.0, token / (self.pace.token or token))
        self.pace.token = self.pace.token or token
        done = sum(before)
        tokens = min(self.tokens(settings, done), settings.num_tokens - settings.batch_size)
        if not done and settings.passes * (tokens // settings.batch_size) < FEWEST:
            raise self._too_short(settings, settings.passes * (tokens // settings.batch_size))
        if tokens <= done + settings.batch_size:  # one step more, with which it ends as a training does
            tokens, self.watches = done + settings.batch_size, False
        return self._shortened(settings, tokens, f"after {done:,} tokens", out)

    def _shortened(self, settings, tokens: int, when: str, out: Path):
        if tokens >= settings.num_tokens:
            return settings
        line = (f"training is slower than it began, and was cut {when} from {settings.num_tokens:,} to {tokens:,} "
                f"tokens to end within --minutes={self.minutes:g}")
        say(f"note: {line}")
        if not when.startswith("after 0 "):
            self.cut_again.append(f"{line}; its schedules jumped there")
        self.num_tokens = tokens
        self.rows.clear()
        self.write(out)
        return dataclasses.replace(settings, num_tokens=tokens)

    def watching(self, track: Callable) -> Callable:
        """`track`, and Slow once what is tracked will, at its pace, take longer than training may."""
        if not (self.on and self.watches) or ranks.count() > 1:  # where others would wait
            return track

        def watched(items, label: str, total: int, unit: str, size=lambda item: 1):
            begun, done, first = time.monotonic(), 0, None
            for item in track(items, label, total, unit, size):
                yield item
                done += size(item)
                if first is None:  # it may compile
                    begun, first = time.monotonic(), done
                    continue
                seconds = time.monotonic() - begun
                each = seconds / max(1, done - first)
                if seconds > 1 and done < total and (total - done) * each > self.for_training():
                    raise Slow(each)

        return watched

    # -- evals

    def order(self, names: Iterable[str]) -> list[str]:
        """The evals in the order in which they are measured: where time is short what the verdict is made of first, and
        those for which none was kept last.
        """
        if not self.on:
            return list(names)
        return sorted(names, key=lambda name: (name != self.headline, name in self.without))

    def kept(self, chosen: dict[str, dict]) -> dict[str, dict]:
        """The evals that are not left out, with their settings."""
        return {name: config for name, config in chosen.items() if name not in self.left_out}

    def planned(self, names: Iterable[str]) -> list[str]:
        """The evals for which time is kept."""
        return [name for name in names if name not in self.without]

    def leave_out(self, found: dict[str, str], out: Path) -> None:
        """Note evals that were left out, {eval: why}."""
        self.left_out |= found
        if self.on:
            self.write(out)

    def problems(self) -> list[str]:
        """What final_info.json says of the evals that were left out."""
        return [f"the eval {name} was left out: {why}" for name, why in self.left_out.items()]

    def _expect(self, chosen: dict[str, dict], keys: dict[str, list[str]], saes: int, settings) -> None:
        """Forecast the evals' seconds: as long as they took here before, by their `keys` (one a layer), or by cost."""
        known = self._known()
        along = [name.strip() for name in settings.snapshot_evals.split(",")]
        for name, config in chosen.items():
            times = 1 + settings.snapshots if name in along else 1
            before = [known[key] for key in keys[name] if key in known]
            self.parts[name] = len(keys[name]) * times
            once, each = evals.cost(name, settings.profile, config)
            if len(before) == len(keys[name]):
                self.forecast[name] = sum(before) * saes * times
            else:
                self.forecast[name] = self.pace.whole * len(keys[name]) * (once + each * saes * times)

    def _each(self, settings) -> float:
        """Seconds that training on one token more takes."""
        return self.pace.token + settings.passes * self.pace.step / settings.batch_size

    def _choose(self, chosen: dict[str, dict], training: float) -> None:
        """Keep time for evals, the headline's first, as long as they fit into their share, or into what a training of
        so many seconds leaves.
        """
        room = self.left() - self.spare
        share = max(EVALS * room, room - training)
        self.without = []
        for name in self.order(chosen):
            seconds = MARGIN * self.forecast[name]
            if seconds <= share or name == self.headline:
                share -= seconds
            else:
                self.without.append(name)

    @contextmanager
    def measuring(self, name: str, key: str, saes: int) -> Iterator[None]:
        """Around an eval of some SAEs at one layer: OutOfTime where it comes to nothing, before it begins or in the
        middle. What it took is noted for runs to come.
        """
        expected = self.slowness * self.forecast.get(name, 0.0) / self.parts.get(name, 1)
        room = self.left() - self.spare
        if room <= 0 or expected > room:
            raise OutOfTime(f"it takes about {duration(expected)}, and {duration(max(0.0, room))} are left of "
                            f"--minutes={self.minutes:g}")
        begun = time.monotonic()
        with self.within(self.spare, lambda: f"{duration(time.monotonic() - begun)} after it began"):
            yield
        seconds = time.monotonic() - begun
        if expected > 1:
            self.slowness = max(1.0, self.slowness * seconds / expected)
        self.done[name] = self.done.get(name, 0) + 1
        if not ranks.number():
            self._learn(key, seconds / saes)

    def _known(self) -> dict[str, float]:
        with suppress(OSError, ValueError, AttributeError, TypeError):
            return {key: float(seconds) for key, seconds in json.loads(self.took.read_bytes()).items()}
        return {}

    def _learn(self, key: str, seconds: float) -> None:
        with suppress(OSError, AttributeError):  # no place to note it: the next run forecasts by cost
            known = {k: v for k, v in self._known().items() if k != key} | {key: round(seconds, 3)}
            folder.write_json(self.took, dict(list(known.items())[-REMEMBERED:]))

    # -- in the run's folder, and in words

    def write(self, out: Path) -> None:
        """Note what was decided, for a run that is interrupted; without the note that one is cut anew."""
        if ranks.number():
            return
        try:
            folder.write_json(out / NOTE, dict(minutes=self.minutes, num_tokens=self.num_tokens,
                                               cut_again=self.cut_again, forecast_seconds=self.forecast,
                                               without=self.without, left_out=self.left_out))
        except OSError as error:
            say(f"note: no {NOTE}: {error.strerror or error}")

    def read(self, out: Path) -> None:
        """What was decided before the run in `out` was interrupted; evals get another chance."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            found = json.loads((out / NOTE).read_bytes())
            self.num_tokens, self.cut_again = int(found["num_tokens"]), list(found["cut_again"])

    @property
    def for_pages(self) -> float:
        """Seconds kept for the report and the comparison, while dashboards are made."""
        return max(PAGES, self.spare / 2)

    def if_time(self, what: str, keep: float, make: Callable[[], object]) -> None:
        """Make what a run's result does not need, or end it, said, once only `keep` seconds are left."""
        try:
            with self.within(keep, lambda: f"making {what}"):
                make()
        except OutOfTime:
            say(f"note: no time is left for all of the {what} (python -m runs.report makes pages of what there is, "
                "python -m runs.dashboards the boards first)")

    def _told(self, asked: int, tokens: int) -> None:
        planned = [f"{name} {duration(self.forecast[name])}" for name in self.planned(self.forecast)]
        say(f"--minutes={self.minutes:g}: {duration(self.left())} are left, {', '.join(planned) or 'no'} of it for "
            f"evals; a token takes {self.pace.token * 1e6:.3g} µs of texts and language model, a step "
            f"{self.pace.step * 1e3:.3g} ms")
        for name in self.without:
            say(f"note: no time is kept for the eval {name}, which takes about {duration(self.forecast[name])}: it is "
                "measured if some is left")
        if tokens < asked:
            say(f"note: {tokens:,} of {asked:,} training tokens fit: all schedules are those of such a run "
                f"(--num_tokens={tokens} without --minutes is the same)")

    def _too_short(self, settings, steps: int) -> ValueError:
        seconds = FEWEST * (self.pace.step + settings.batch_size * self.pace.token / settings.passes) * MARGIN
        wanted = math.ceil(self.minutes + max(0.0, seconds - self.for_training()) / 60 + 0.5)
        return ValueError(f"--minutes={self.minutes:g}: {duration(max(0.0, self.left()))} are left, of which evals and "
                          f"report take {duration(self.left() - self.for_training())}: {steps} training steps fit\n"
                          f"give --minutes={wanted} or more, or fewer --evals")


def eval_key(name: str, config: dict, lm, layer: int, d_sae: int) -> str:
    """By what is remembered how long an eval takes an SAE."""
    return digest([name, config, lm.digest, layer, d_sae, str(lm.device)])[:16]


def two_digits(number: float) -> int:
    """The number rounded down to two significant digits."""
    if number < 100:
        return int(number)
    unit = 10 ** (int(math.log10(number)) - 1)
    return int(number // unit * unit)
