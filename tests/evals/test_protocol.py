"""The evals' benchmark at Gemma's shape, on a narrow model."""

import pytest

from evals import names
from tests.benchmarks import evals, protocol


@pytest.mark.slow
def test_every_eval_gets_a_row_and_does_all_of_its_work(capsys, tmp_path):
    """Fails if an eval is left out, stops at want of data or of right answers, or a row lacks a time."""
    evals.main(["--model=narrow", "--device=cpu", f"--store={tmp_path}"])
    said = capsys.readouterr().out
    table = said[said.rindex(protocol.HEAD) + len(protocol.HEAD):].strip().splitlines()
    cells = [line.strip("| ").split(" | ") for line in table]
    assert [row[0] for row in cells] == [name for name in protocol.SHARES if name in names()]
    assert all(float(value) > 0 for row in cells for value in (row[1], row[2], row[5]))
    assert not any(doubt in said for doubt in ("not reached", "no score", "nothing was clamped", "no unlearning_score",
                                               "letters have a probe", "nothing is left to train"))


def test_it_stops_in_time(capsys, tmp_path):
    """Fails if an eval goes on when the time is over, or one that was not reached is not named."""
    evals.main(["--model=narrow", "--device=cpu", f"--store={tmp_path}", "--evals=core,tpp", "--seconds=0"])
    assert "not reached: core, tpp" in capsys.readouterr().out
    track = protocol.until_then(0.0)
    with pytest.raises(protocol.Enough, match="the time was over in texts"):
        next(track([1], "texts"))
