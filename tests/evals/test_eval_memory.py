"""Evals on a GPU that runs out of memory: stand-ins raise what torch raises,
and the numbers must stay what they are without.
"""

import dataclasses
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import experiment
from evals import absorption, core, ravel, sae_probes, sparse_probing, unlearning
from evals.autointerp import windows
from evals.model import architecture, memory
from evals.ravel import prompts
from evals.unlearning import questions
from tests.evals import (
    test_absorption,
    test_autointerp,
    test_core,
    test_ravel,
    test_sae_probes,
    test_sparse_probing,
    test_unlearning,
)

MESSAGE = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 0.20 GiB is free."


def small_setup(said, **config):
    return SimpleNamespace(config=config, fits={}, say=said.append)


class Scarce:
    """A language model or an SAE of which some calls run out of memory:
    fails(method, rows, number of calls of several rows so far).
    """

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
                raise torch.OutOfMemoryError(MESSAGE)
            return value(x, *args)

        return call


def numbers(value, found):
    """All numbers of a nested result in order, the rest as it is."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        numbers(part, found)
    if not isinstance(value, (dict, list, tuple)):
        found.append(value)
    return found


def check(measure, setup, sae, fails_lm, fails_sae):
    """Measure on a GPU large enough and on one that is not;
    what was said of the second, and how often it ran out of memory.
    """
    said, scarce = [], (Scarce(setup.lm, fails_lm), Scarce(sae, fails_sae))
    expected = numbers(measure(dataclasses.replace(setup, fits={}), {"sae": sae}), [])
    cache = type(setup.cache)(setup.cache.folder / "scarce", setup.cache.limit / 1e9)
    found = numbers(measure(dataclasses.replace(setup, lm=scarce[0], cache=cache, say=said.append, fits={}),
                            {"sae": scarce[1]}), [])
    assert len(found) == len(expected) > 3
    for value, wanted in zip(found, expected):
        assert value == (pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(wanted, float) else wanted)
    return [line for line in said if "memory" in line], scarce[0].failed + scarce[1].failed


# ------------------------------------------------------------------------------------------------ the helper


def test_halves_until_it_fits_and_remembers():
    """Fails if a row is lost, repeated or moved, if a size that failed is tried again,
    or if it is said more or less than once.
    """
    said, sizes = [], []
    setup = small_setup(said)

    def work(x_N, name_N):
        sizes.append(len(x_N))
        if len(x_N) > 3:
            raise torch.OutOfMemoryError(MESSAGE)
        return x_N * 2, torch.tensor([len(name) for name in name_N])

    doubled_N, length_N = memory.by_rows(setup, "the test", work, torch.arange(20), ["a" * i for i in range(20)],
                                         most=16)
    assert doubled_N.tolist() == [2 * i for i in range(20)] and length_N.tolist() == list(range(20))
    assert sizes == [16, 8, 4, *[2] * 10]
    assert said == [f"out of GPU memory in the test: going on with {n} rows at a time" for n in (8, 4, 2)]
    sizes.clear()
    memory.by_rows(setup, "the test", work, torch.arange(3), ["b"] * 3)
    memory.by_rows(setup, "something else", work, torch.arange(3), ["b"] * 3)
    assert sizes == [2, 1, 3] and len(said) == 3


def test_short_rows_are_more_at_once_than_long_ones():
    """Fails if what was learnt from long rows makes batches of short ones as small."""
    setup, sizes = small_setup([]), []

    def work(x_NT):
        sizes.append(x_NT.shape)
        if x_NT.numel() > 100:
            raise torch.OutOfMemoryError(MESSAGE)
        return x_NT

    for T in (40, 10, 200):
        try:
            memory.by_rows(setup, "the test", work, torch.zeros(8, T), each=T)
        except MemoryError:
            pass
    assert sizes == [(8, 40), (4, 40), *[(2, 40)] * 4, (8, 10), (1, 200)]


def test_one_row_too_large_names_the_setting():
    """Fails if the user is not told what to lower, or is shown more than torch's first two sentences."""
    def work(x_N):
        raise torch.OutOfMemoryError(MESSAGE)

    with pytest.raises(MemoryError) as error:
        memory.by_rows(small_setup([], context_length=128, llm_batch_size=32), "the test", work, torch.zeros(1))
    assert str(error.value) == ("out of GPU memory in the test, which cannot be divided further: CUDA out of memory. "
                                "Tried to allocate 1.50 GiB\nlower context_length (now 128) with --eval_config")
    with pytest.raises(MemoryError, match=r"\nlower rows \(now 9\)"):
        memory.undivided(small_setup([], rows=9), "the test", lambda: work(0), "rows")


def test_the_failed_attempt_is_freed_before_the_next():
    """Fails if the tensors of an attempt that failed are still held, by its traceback, while the next one allocates."""
    held, alive = [], []

    def work(x_N):
        alive.append([ref() is not None for ref in held])
        scratch = torch.zeros(9)
        held.append(weakref.ref(scratch))
        if len(x_N) > 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return x_N

    memory.by_rows(small_setup([]), "the test", work, torch.zeros(4))
    assert alive[:3] == [[], [False], [False, False]]


# ------------------------------------------------------------------------------------------------ the evals


def cases(name, tmp_path, monkeypatch):
    """(measure, setup, SAE) of an eval with the stand-ins of its own tests."""
    if name == "core":
        return core.run, test_core.setup(tmp_path), test_core.trained(test_core.TopK)
    if name == "sparse_probing":  # scr and tpp take their features from the same pooling
        return sparse_probing.run, test_sparse_probing.make_setup(tmp_path), test_sparse_probing.random_sae(1)
    if name == "absorption":
        return absorption.run, test_absorption.make_setup(tmp_path), test_absorption.AbsorbingSAE()
    if name == "ravel":
        monkeypatch.setitem(prompts.OWN, "fake", {"thing": lambda source: (test_ravel.TEMPLATES, test_ravel.TABLE)})
        return ravel.run, test_ravel.make_setup(tmp_path, num_epochs=2,
                                                completion_batch_size=6), test_ravel.random_sae(2)
    if name == "sae_probes":
        sets = {"21_headline_istrump": test_sae_probes.marked()}
        return sae_probes.run, test_sae_probes.make_setup(tmp_path, monkeypatch, sets,
                                                          ks=[1, 2]), test_sae_probes.random_sae()
    if name == "unlearning":
        def densities_and_scores(setup, saes):
            densities = unlearning._densities(setup, questions.prepared(setup).choosing, saes)
            return [unlearning.run(setup, saes), [side_F.tolist() for side_F in densities["sae"]]]
        return densities_and_scores, test_unlearning.make_setup(tmp_path, monkeypatch), test_unlearning.sae_of(0, 1, 8)
    if name == "autointerp":
        return windows.cases, test_autointerp.make_setup(tmp_path), test_autointerp.words_sae()
    raise KeyError(name)


@pytest.mark.parametrize("name", ["core", "sparse_probing", "absorption", "ravel", "sae_probes", "unlearning",
                                  "autointerp"])
def test_a_gpu_too_small_for_a_batch_changes_no_number(name, tmp_path, monkeypatch):
    """Fails if an eval has an LM pass or an encoding that cannot be halved, if parts change its numbers,
    or if a size is tried twice.
    """
    measure, setup, sae = cases(name, tmp_path, monkeypatch)
    at_least = 4 if name == "ravel" else 1  # a training step's interchange, of 4 pairs, is not divided
    said, failed = check(measure, setup, sae, lambda method, rows, call: method != "unembed" and rows > 1,
                         lambda method, rows, call: rows > at_least)
    assert failed == len(said) > 0, said
    assert any("the language model" in line for line in said) and any("features" in line for line in said), said


@pytest.mark.parametrize("name, method", [("core", "residual"), ("core", "finish"), ("core", "unembed"),
                                          ("core", "encode"), ("sparse_probing", "residual"),
                                          ("sparse_probing", "encode")])
def test_the_first_and_the_third_call_fail(name, method, tmp_path, monkeypatch):
    """Fails if a failure in the middle of an eval loses or repeats rows, or is said other than once."""
    measure, setup, sae = cases(name, tmp_path, monkeypatch)

    def fails(called, rows, call):
        return called == method and call in (1, 3)

    said, failed = check(measure, setup, sae, fails, fails)
    assert failed == len(said) == 2 == len(set(said))


def test_a_training_step_in_uneven_parts(tmp_path):
    """Fails if ravel's gradient depends on how a step's rows are divided; Adam would hide a common factor."""
    setup, rng = test_ravel.make_setup(tmp_path, test_ravel.Tangled()), torch.Generator().manual_seed(0)
    D = test_ravel.D
    rows = [torch.randn(8, D, generator=rng), torch.randn(8, 5, D, generator=rng), [1, 2, 3, 1, 2, 3, 1, 2], [4] * 8,
            torch.arange(8)]
    whole_BD = ravel._gradient(setup, *rows)
    torch.testing.assert_close(memory.by_rows(setup, "a step", partial(ravel._gradient, setup), *rows, most=3),
                               whole_BD)
    assert whole_BD.abs().min() > 0


def test_features_that_do_not_fit_are_kept_elsewhere_or_made_again(monkeypatch):
    """Fails if the features of all texts or words must fit on the GPU,
    or if words' features depend on whether they do.
    """
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(MESSAGE)

    said = []
    setup, x_NF = small_setup(said), SimpleNamespace(to=full)
    setup.lm = SimpleNamespace(device="cuda")
    assert [sparse_probing._placed(setup, x_NF) for _ in range(2)] == [x_NF, x_NF] and len(said) == 1
    index, x_ND = torch.tensor([4, 0, 4]), torch.randn(5, 3)
    kept = absorption._features(setup, lambda x: x * 2, x_ND, 2)(index)
    monkeypatch.setattr(absorption, "torch", SimpleNamespace(empty=full, OutOfMemoryError=torch.OutOfMemoryError))
    assert torch.equal(absorption._features(setup, lambda x: x * 2, x_ND, 2)(index), kept) and len(said) == 2


def test_a_real_model_that_ran_out_is_as_before(tmp_path):
    """Fails if a pass broken off in the middle of the model leaves a hook or a block passed by,
    which would change the next one.
    """
    settings = experiment.resolve(experiment.parse_settings(["--profile=tiny", "--device=cpu",
                                                             f"--cache_dir={tmp_path}"]))[0]
    lm, said = experiment.load_language_model(settings), []
    setup = SimpleNamespace(lm=lm, layer=1, config={}, fits={}, say=said.append)
    tokens_BT = torch.randint(5, 60, (8, 24))
    x_BTD = lm.residual(tokens_BT, 1)
    h_BTD = lm.finish(x_BTD, 1)
    broken = iter(["up to the layer", "beyond it"])

    def run_out(module, args, kwargs):
        if len(args[0] if args else kwargs["hidden_states"]) > 4 and next(broken, None):
            raise torch.OutOfMemoryError(MESSAGE)

    for block in (1, 2):
        handle = architecture.blocks(lm._wrapped[0])[block].register_forward_pre_hook(run_out, with_kwargs=True)
        halved = memory.residual(setup, tokens_BT) if block == 1 else core._finished(setup, x_BTD)
        handle.remove()
        torch.testing.assert_close(halved, x_BTD if block == 1 else h_BTD, rtol=1e-4, atol=1e-5)
        setup.fits.clear()
    assert len(said) == 2 and torch.equal(lm.residual(tokens_BT, 1), x_BTD) and torch.equal(lm.finish(x_BTD, 1), h_BTD)
