"""What an eval's file must declare: each lack is named with its line, and costs only the runs that choose the eval."""

import json

import pytest

import evals
from evals.common import stored
from evals.common.settings import check_requirements, choose
from runs import compare

SOUND = '''"""An eval."""
from evals import Result

EVAL_TYPE_ID = "mine"
METRICS = {"score": "higher", "top_2": ""}
CONFIG = {"gemma": {"rows": 100}, "embedded": {"rows": 100}, "tiny": {"rows": 10}}


def requirements(config, facts):
    return []


def run(setup, saes):
    return {name: Result({"mine": {"score": 1.0}}) for name in saes}
'''
METRICS = 'METRICS = {"score": "higher", "top_2": ""}'
# (what is replaced, by what, the line and words of the refusal, words of the advice)
BROKEN = {
    "a bracket left open": (METRICS, "METRICS = (", "5: Python cannot read this file: '(' was never closed", "mend it"),
    "a byte that is not UTF-8": ("An eval", "\udcff", "1: Python cannot read this file", "mend it"),
    "a NUL byte": ("An eval", "\0", "1: Python cannot read this file", "mend it"),
    "a comprehension": (METRICS, "METRICS = {str(k): 'higher' for k in (1, 2)}", "5: METRICS must be a literal",
                        "without names, calls and comprehensions"),
    "a metric added afterwards": (METRICS, METRICS + "\nMETRICS |= {'k': ''}", "6: METRICS must be a literal", "write"),
    "a computed name": ('"mine"', '"mi" + str("ne")', "4: EVAL_TYPE_ID must be a literal", "write it out"),
    "a note of two parts": (METRICS, f"{METRICS}\nNOTE = 'a'.upper()", "6: NOTE must be a literal", "write it out"),
    "a third way": ('"higher"', '"more"', "5: METRICS has another form", '"higher"'),
    "settings without profiles": ('{"gemma": {"rows": 100}, "embedded": {"rows": 100}, "tiny": {"rows": 10}}',
                                  '{"rows": 10}', "6: CONFIG has another form", '"gemma"'),
    "a cost of one number": (METRICS, METRICS + "\nCOST = {'tiny': (3,)}", "6: COST has another form", "COST = {"),
    "a cost of no number": (METRICS, METRICS + "\nCOST = {'tiny': (3, '4')}", "6: COST has another form", "COST = {"),
    "a cost below nothing": (METRICS, METRICS + "\nCOST = {'tiny': (3, -4)}", "6: COST has another form", "COST = {"),
    "a cost without profiles": (METRICS, METRICS + "\nCOST = (3, 4)", "6: COST has another form", "COST = {"),
    "a computed cost": (METRICS, METRICS + "\nCOST = {'tiny': (3 * 2, 4)}", "6: COST must be a literal", "write"),
    "a bare setting": (METRICS, METRICS + "\nCOST_BY = ('rows',)", "6: COST_BY has another form", "COST_BY = (("),
    "no metrics": (METRICS, "", "4: an eval defines METRICS", "add METRICS = {"),
    "metrics without a value": (METRICS, "METRICS: dict", "4: an eval defines METRICS", "add METRICS = {"),
    "no requirements": ("def requirements", "def needs", "4: an eval defines requirements", "add def requirements("),
    "no run": ("def run", "class A:\n  def run", "4: an eval defines run,", "add def run(setup, saes)"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of evals that holds one, sound.py."""
    monkeypatch.setattr(evals, "FOLDER", tmp_path)
    (tmp_path / "sound.py").write_text(SOUND)
    return tmp_path


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named_where_it_is_chosen_and_costs_nobody_else(folder, what):
    """Fails if a broken file ends runs or comparisons that do not use it, or is refused without line and advice."""
    old, new, words, advice = BROKEN[what]
    assert old in SOUND
    (folder / "mine.py").write_bytes(SOUND.replace(old, new).encode("utf-8", "surrogateescape"))
    for chosen, overrides in (("mine", ""), ("sound,mine", ""), ("sound", '{"mine": {"rows": 3}}')):
        with pytest.raises(ValueError) as refused:
            choose(chosen, "tiny", overrides)
        said, do = str(refused.value).split("\n")
        assert said.startswith(f"evals/mine.py:{words}") and advice in do
    assert evals.names() == ["sound"] == list(choose("all", "tiny", ""))
    assert "sound.score" in compare.directions() and "mine.score" not in compare.directions()
    (note,) = check_requirements({}, "", {})
    assert note == f"not among the evals: {said}"


@pytest.mark.parametrize("old, new", [
    ("METRICS =", "METRICS: dict[str, str] ="), ("EVAL_TYPE_ID =", "EVAL_TYPE_ID: str ="),
    ("def run(setup, saes):", "from math import sqrt as run\ndef other():"),
    ("def requirements(", "from x import *\ndef needs("),
    ("def run(", "if True:\n  def run("), ("METRICS =", "METRICS = {}\nMETRICS =")])
def test_other_ways_to_write_it_are_understood(folder, old, new):
    """Fails if an annotation, an import, a condition or a second assignment makes an eval of a folder none."""
    (folder / "mine").mkdir()
    (folder / "mine/__init__.py").write_text(SOUND.replace(old, new))
    assert evals.problem("mine") == "" and evals.names() == ["mine", "sound"]
    assert evals.declared("mine", "METRICS") == {"score": "higher", "top_2": ""}


def test_a_profile_that_is_lacking_is_named_where_it_is_needed(folder):
    """Fails if an eval without settings for the profile ends in a KeyError, or cannot be run on another profile."""
    (folder / "mine.py").write_text(SOUND.replace(', "tiny": {"rows": 10}', ""))
    assert choose("mine", "embedded", "") == {"mine": {"rows": 100}}
    with pytest.raises(ValueError, match=r"^evals/mine.py:6: CONFIG has no profile 'tiny'\nadd it, or leave mine out"):
        choose("mine", "tiny", "")


def test_a_file_that_is_no_eval_is_no_broken_one(folder):
    """Fails if a helper beside the evals is remarked on, or what is wrong is not said to who takes it for an eval."""
    (folder / "helper.py").write_text('"""Uses an EVAL_TYPE_ID."""\nx = 1\n')
    assert evals.broken() == {} and evals.names() == ["sound"] and check_requirements({}, "", {}) == []
    with pytest.raises(ValueError, match="evals/helper.py:1: an eval defines EVAL_TYPE_ID, and this file does not"):
        choose("helper", "tiny", "")
    with pytest.raises(ValueError, match="no eval named 'soundd'; the nearest is 'sound'"):
        choose("soundd", "tiny", "")


def test_metrics_that_are_not_declared_are_named_among_the_problems(folder, tmp_path):
    """Fails if a metric without a direction is never remarked on, or another k of a declared one is."""
    result = evals.Result({"mine": {"score": 1.0, "top_5": 2.0, "scoer": 0.5}}, corrected={"fixed": 1.0},
                          problems=["mine: its own"])
    for sae in ("a", "b"):
        stored.write(tmp_path / "out", "sound", sae, result, {}, dict(architecture="topk"))
    means, _, problems = stored.collected(tmp_path / "out", ["sound"], "a", {})
    told = "returns metrics that METRICS does not declare: fixed, scoer"
    assert problems == ["sound: mine: its own", f"sound: {told}"] and means["sound.scoer"] == 0.5
    (file,) = (tmp_path / "out/eval_results/sound").glob("*_b_*.json")
    assert told in json.loads(file.read_text())["problems"] and result.problems == ["mine: its own"]


COSTS = METRICS + """
COST = {"gemma": (2000, 50), "embedded": (30, 1.5)}
COST_BY = (("rows", "test_rows"), ("sets",), ("length",))"""
SETTINGS = {"rows": 60, "test_rows": 40, "sets": ["a", "b"], "length": 128, "k": 3}


@pytest.mark.parametrize("changed, share", [
    ({}, 1), ({"k": 9}, 1), ({"rows": 10}, 0.5), ({"rows": 10, "length": 32}, 0.125), ({"sets": ["b"]}, 0.5),
    ({"rows": 160, "sets": ["a", "b", "c"]}, 3), ({"sets": []}, 1), ({"length": None}, 1)])
def test_a_cost_grows_with_what_is_asked_for(folder, changed, share):
    """Fails if a forecast is not in tokens, is scaled by anything but sums of the settings named and lengths of lists,
    or is 0 where a setting leaves the number open.
    """
    config = f'CONFIG = {{"gemma": {SETTINGS}, "embedded": {SETTINGS}, "tiny": {SETTINGS}}}'
    text = SOUND.replace(METRICS, COSTS).replace(SOUND.splitlines()[5], config)
    (folder / "mine.py").write_text(text)
    assert evals.problem("mine") == ""
    assert evals.cost("mine", "gemma", SETTINGS | changed) == (2_000_000 * share, 50_000 * share)
    assert evals.cost("mine", "embedded", SETTINGS | changed) == (30_000 * share, 1_500 * share)
    assert evals.cost("mine", "tiny", SETTINGS | changed) == (0, 0)
    assert evals.cost("sound", "gemma", {"rows": 7}) == (0, 0)


def test_every_eval_says_what_it_costs():
    """Fails if one of our evals cannot be forecast on a profile that it has settings for, or grows with no setting."""
    ours = set(evals.names()) & {"absorption", "autointerp", "core", "ground_truth", "ravel", "sae_probes", "scr",
                                 "sparse_probing", "tpp", "unlearning"}  # any of which may have been deleted
    assert evals.broken() == {}
    for name in ours:
        configs, by = evals.declared(name, "CONFIG"), evals.declared(name, "COST_BY") or ()
        assert set(evals.declared(name, "COST")) == set(configs), name
        for profile, config in configs.items():
            assert min(evals.cost(name, profile, config)) > 0, name
            assert all(setting in config for settings in by for setting in settings), name
