"""A GPU that runs out of memory: parts that fit, as many as before (the evals' own tests are beside their others)."""

import weakref
from types import SimpleNamespace

import pytest
import torch

import experiment
from evals.model import architecture, memory
from tests.evals.scarce import MESSAGE, small_setup


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


@pytest.mark.slow
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
        if block == 1:
            halved = memory.residual(setup, tokens_BT)
        else:
            halved = memory.by_rows(setup, "the language model", lambda x_RTD: lm.finish(x_RTD, 1), x_BTD)
        handle.remove()
        torch.testing.assert_close(halved, x_BTD if block == 1 else h_BTD, rtol=1e-4, atol=1e-5)
        setup.fits.clear()
    assert len(said) == 2 and torch.equal(lm.residual(tokens_BT, 1), x_BTD) and torch.equal(lm.finish(x_BTD, 1), h_BTD)
