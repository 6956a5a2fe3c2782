"""What all evals have in common: their declarations, and a run of all of them where there is no hub,
no wheel and no judge.
"""

import json

import pytest

import evals
import experiment
from evals.common.settings import choose
from evals.texts import embedded
from evals.texts.source import Source
from runs import compare
from tests.small_run import command

PROFILES = {"gemma": ("google/gemma-2-2b", "google/gemma-2-2b-it", "hub"),
            "tiny": ("tiny-gemma2", "tiny-gemma2", "tiny"),
            "embedded": ("smollm2-135m-instruct", "smollm2-135m-instruct", "embedded")}


@pytest.mark.parametrize("name", evals.names())
def test_declarations(name, monkeypatch):
    """Fails if an eval lacks a profile, a direction or a hub data set's name, or refuses its own default settings."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert set(evals.declared(name, "METRICS").values()) <= {"higher", "lower", ""}
    for profile, (model, sibling, source) in PROFILES.items():
        config = choose(name, profile, "")[name]
        facts = dict(model=model, instruct_model=sibling, profile=profile, device="cpu", source=source)
        assert evals.load(name).requirements(config, facts) == []
        assert set(evals.wheels(name, source)) <= set(embedded.WHEELS)
        json.dumps([config, evals.outside(name)])
    config = evals.declared(name, "CONFIG")["gemma"]
    assert all("/" in repository for repository in evals.repositories(name, config, Source("hub", "o/n")))
    least, wanted = evals.held_out(name, config)
    assert evals.repositories(name, config, Source("tiny")) == [] and least <= wanted


def test_all_evals_in_one_run(tmp_path, cache, monkeypatch):
    """Fails if an eval crashes beside the others, returns an undeclared metric or no score without a reason,
    or a second run differs.
    """
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert experiment.main(command(tmp_path / "run", cache, "--evals=all")) == 0
    section = json.loads((tmp_path / "run" / "final_info.json").read_text())["layer_2"]
    ours = {metric for metric in section["means"] if metric.split(".")[0] in evals.names()}
    assert {metric.split(".")[0] for metric in ours} == set(evals.names())
    assert ours <= set(compare.directions())
    assert set(section["stderrs"]) <= ours
    for metric in ours:
        assert section["means"][metric] is not None or any(metric.split(".")[1] in problem
                                                           for problem in section["problems"]), metric
    assert experiment.main(command(tmp_path / "again", cache, "--evals=all")) == 0
    assert (tmp_path / "again" / "final_info.json").read_bytes() == (tmp_path / "run" / "final_info.json").read_bytes()
