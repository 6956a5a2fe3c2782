"""A GPU too small for an eval: stand-ins that raise what torch raises; the numbers must stay what they are without."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

MESSAGE = ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 0.20 GiB "
           "is free.")


def small_setup(said, **config):
    return SimpleNamespace(config=config, fits={}, say=said.append)


def full(*args, **kwargs):
    raise torch.OutOfMemoryError(MESSAGE)


class Scarce:
    """A language model or an SAE of which some calls run out: fails(method, rows, calls of several rows so far)."""

    def __init__(self, whole, fails):
        self.whole, self.fails, self.calls, self.failed = whole, fails, {}, 0

    def __getattr__(self, name):
        value = getattr(self.whole, name)
        if name not in ("residual", "finish", "unembed", "encode"):
            return value

        def call(x, *args):
            self.calls[name] = self.calls.get(name, 0) + (len(x) > 1)
            if len(x) > 1 and self.fails(name, len(x), self.calls[name]):
                self.failed += 1
                full()
            return value(x, *args)

        return call


def numbers(value, found):
    """All numbers of a nested result in order, the rest as it is."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if not isinstance(value, (dict, list, tuple)):
        return [*found, value]
    for part in value.values() if isinstance(value, dict) else value:
        found = numbers(part, found)
    return found


def check(measure, setup, sae, fails_lm, fails_sae):
    """Measure on a GPU large enough and on one that is not; what was said of the second, and how often it ran out."""
    said, scarce = [], (Scarce(setup.lm, fails_lm), Scarce(sae, fails_sae))
    expected = numbers(measure(dataclasses.replace(setup, fits={}), {"sae": sae}), [])
    cache = type(setup.cache)(setup.cache.folder / "scarce", setup.cache.limit / 1e9)
    found = numbers(measure(dataclasses.replace(setup, lm=scarce[0], cache=cache, say=said.append, fits={}),
                            {"sae": scarce[1]}), [])
    assert len(found) == len(expected) > 3
    for value, wanted in zip(found, expected):
        assert value == (pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(wanted, float) else wanted)
    return [line for line in said if "memory" in line], scarce[0].failed + scarce[1].failed


def check_every_batch(measure, setup, sae, at_least=1):
    """Fails if a pass or an encoding of more than `at_least` rows is not halved, changes a number or fails twice."""
    said, failed = check(measure, setup, sae, lambda method, rows, call: method != "unembed" and rows > 1,
                         lambda method, rows, call: rows > at_least)
    assert failed == len(said) > 0, said
    assert any("the language model" in line for line in said) and any("features" in line for line in said), said


def check_two_calls(measure, setup, sae, method):
    """Fails if a failure of the first or the third call loses or repeats rows, or is said other than once."""
    def fails(called, rows, call):
        return called == method and call in (1, 3)

    said, failed = check(measure, setup, sae, fails, fails)
    assert failed == len(said) == 2 == len(set(said))
