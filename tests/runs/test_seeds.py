"""Several seeds of one setting."""

import pytest

from runs import seeds
from runs.reading import read
from tests.runs.records import R2, entry, record


def test_seeds_of_one_setting_become_one_row(tmp_path, capsys):
    """Fails if runs of different settings are averaged, the error is not std/√n, or what lies inside it is marked."""
    runs = [("standard", 1, 0, 0.70), ("standard", 1, 1, 0.74), ("mine", 1, 0, 0.90), ("mine", 1, 1, 0.92),
            ("mine", 0, 0, 0.5), ("mine", 1, 2, 0.2)]
    for i, (variant, w, seed, r2) in enumerate(runs):
        other = {"context": 1024} if i == 5 else {}  # is no seed of the others
        of_seed = entry({R2: r2, "core.l0": 30.0}, variant=variant, hyper={"w": w}, seed=seed, **other)
        record(tmp_path / f"run_{i}", {"layer_3": of_seed})
    assert seeds.main([*(str(tmp_path / f"run_{i}") for i in range(len(runs))), f"--metrics={R2}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["standard", "2", "0.7200", "±", "0.02"]  # |.74 − .70|/2 = √(2·.02²/1)/√2
    assert lines[2] == ["mine", "2", "0.9100", "±", "0.01*"] and lines[3] == ["mine", "w=0", "1", "0.5000"]


def test_means_over_seeds_become_a_baseline(tmp_path, capsys):
    """Fails if a stored error is not the deviation of one seed, or what is stored is no baseline; or one seed is."""
    for i, r2 in enumerate((0.70, 0.74, 0.78)):
        of_seed = entry({R2: r2, "core.l0": 30.0, "core.cossim": None}, {R2: 0.5}, variant="mine", seed=i)
        record(tmp_path / f"run_{i}", {"layer_3": of_seed})
    folders, file = [str(tmp_path / f"run_{i}") for i in range(3)], tmp_path / "kept" / "frontier.json"
    assert seeds.main([*folders, "--store", str(file)]) == 0
    (kept,) = read(file).values()
    assert kept.means == pytest.approx({R2: 0.74, "core.l0": 30.0})
    assert kept.stderrs == pytest.approx({R2: 0.04})  # √((.04² + 0 + .04²)/2)
    assert kept.config["seeds"] == [0, 1, 2] and "seed" not in kept.config
    assert seeds.main([folders[0], "--store", str(file)]) == 1
    assert "one seed has no spread" in capsys.readouterr().err
