"""Fixtures that many tests share, each made once; one thread for each process, two processes for the whole suite."""

import os

# before torch is imported: one thread makes the same bits everywhere, and two workers do not fight over the cores
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import signal  # noqa: E402

import pytest  # noqa: E402

from tests import small_run  # noqa: E402

pytest_plugins = ["tests.hub"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whoever asks for the whole suite, and not for one process (`-n 0`, `-p no:xdist`, a debugger), has it on two."""
    if hasattr(config, "workerinput"):  # one of the two: it must not start two more
        return
    whole = config.args_source is config.ArgsSource.TESTPATHS
    alone = config.option.collectonly or config.option.usepdb or (os.cpu_count() or 1) < 2
    if whole and not alone and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


# half a minute and more each: begun last, one of them would leave the other core idle to the end
LONGEST = ("tests/variants/test_gpu_steps.py::test_losses_compile_once", "tests/flow/test_imitated_gpu.py",
           "tests/flow/test_ranks.py", "tests/flow/test_real_path.py",
           "tests/flow/test_minutes.py", "tests/runs/test_template.py::test_client", "tests/evals/test_protocol.py")


def pytest_collection_modifyitems(items):
    """The longest tests come first, the others in their order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True)
def signals():
    """A run that a test starts in its own process leaves no handler behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pages(request):
    """The runs of this test make no pages, which is half of their time: for tests of something else. One that is marked
    `pages` has them all the same; so have the session's fixtures, and what is started in a process of its own.
    """
    if request.node.get_closest_marker("pages"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        small_run.leave_out_pages(patch.setattr)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder, filled by the first run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reference(tmp_path_factory, cache):
    """The folder of a small run that nothing interrupted."""
    import experiment

    out = tmp_path_factory.mktemp("runs") / "reference"
    assert experiment.main(small_run.command(out, cache)) == 0
    return out
