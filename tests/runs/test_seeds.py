"""Several seeds of one setting."""

from runs import seeds
from tests.runs.records import R2, entry, record


def test_seeds_of_one_setting_become_one_row(tmp_path, capsys):
    """Fails if runs of different settings are averaged, the error is not std/√n, or what lies inside it is marked."""
    runs = [("standard", 1, 0, 0.70), ("standard", 1, 1, 0.74), ("mine", 1, 0, 0.90), ("mine", 1, 1, 0.92),
            ("mine", 0, 0, 0.5)]
    for i, (variant, w, seed, r2) in enumerate(runs):
        of_seed = entry({R2: r2, "core.l0": 30.0}, variant=variant, hyper={"w": w}, seed=seed)
        record(tmp_path / f"run_{i}", {"layer_3": of_seed})
    assert seeds.main([*(str(tmp_path / f"run_{i}") for i in range(len(runs))), f"--metrics={R2}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["standard", "2", "0.7200", "±", "0.02"]  # |.74 − .70|/2 = √(2·.02²/1)/√2
    assert lines[2] == ["mine", "2", "0.9100", "±", "0.01*"] and lines[3] == ["mine", "w=0", "1", "0.5000"]
