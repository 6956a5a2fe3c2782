import pytest

from evals.common import probes


@pytest.fixture(autouse=True)
def one_thread():
    """The stand-ins are so small that threads would mostly wait for each other."""
    with probes.one_thread():
        yield
