"""What makes a run's figures doubtful."""

import pytest

from runs import compare
from runs.doubts import warnings
from tests.runs.records import DIRECTIONS, R2, run


def test_equal_to_the_last_digit():
    """Fails if what is equal by nature (LM figures, counts, bf16 values) is held against a run, or a copy is not."""
    by_nature = {"core.ce_loss_without_sae": 2.8812345, "core.l0": 32.0, "core.total_tokens": 12345,
                 "core.frac_alive": 0.9987654, "core.explained_variance": 0.984375,
                 "sparse_probing.llm_top_1_test_accuracy": 0.6543217}
    base = run("standard", {**by_nature, "core.mse": 1.2345678, R2: 0.7654321})
    assert warnings(run("a", {**by_nature, "core.mse": 1.2345679, R2: 0.75}), base) == []
    assert warnings(run("a", {**by_nature, "core.mse": 1.2345678, R2: 0.75123}), base) == [
        "equal to standard to the last digit: core.mse"]
    copied = run("b", base.means)
    assert "all 2 SAE metrics equal those of standard" in warnings(copied, base)[0]
    text = compare.compare([copied, run("c", base.means), run("d", {"core.mse": 3.3333333})], None, DIRECTIONS)
    assert "all 2 SAE metrics equal those of b" in text


@pytest.mark.parametrize("means, config, said", [
    ({"core.l0": 0.0}, {}, "dead SAE"),
    ({"core.frac_alive": 0.05}, {}, "nearly dead"),
    ({"core.l0": 101.0}, {}, "more than a tenth"),
    ({"core.l0": 99.0}, {}, None),
    ({"core.r2": 0.9995, "core.r2_median": 0.1345}, {}, "by medians over all it is 0.1345"),
    ({"core.r2": 0.75, "core.r2_median": 0.6}, {}, None),
    ({"sparse_probing.sae_top_1_test_accuracy": 0.503}, {}, "chance"),
    ({"sparse_probing.sae_top_1_test_accuracy": 0.52}, {}, None),
    ({"sparse_probing.llm_top_1_test_accuracy": 0.5}, {}, None),
    ({}, {"steps": 0}, "0 training steps"),
    ({}, {"steps": None, "num_tokens": -100000}, "-100000 training tokens"),
])
def test_warnings(means, config, said):
    """Fails if one of the ways to be silently wrong is missed, or a sound run is suspected."""
    found = warnings(run("r", means, **config))
    assert (said is None) == (not found) and (said or "") in "\n".join(found)
