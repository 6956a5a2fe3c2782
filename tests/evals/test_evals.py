"""What all evals have in common: declarations, that each goes by deleting it, and a run of all of them offline."""

import ast
import functools
import json
import os
import shutil
import subprocess
import sys

import pytest

import evals
import experiment
from evals.common.settings import choose
from evals.texts import embedded
from evals.texts.source import Source
from runs import compare
from tests import PROJECT
from tests.small_run import command

pytestmark = pytest.mark.usefixtures("no_pages")

PROFILES = {"gemma": ("google/gemma-2-2b", "google/gemma-2-2b-it", "hub"),
            "tiny": ("tiny-gemma2", "tiny-gemma2", "tiny"),
            "embedded": ("smollm2-135m-instruct", "smollm2-135m-instruct", "embedded"),
            "synthetic": ("synthetic", None, "synthetic")}
TEXT = {"gemma", "tiny", "embedded"}  # the profiles with a language model
OF_TEXT = {name for name in evals.names() if set(evals.declared(name, "CONFIG")) >= TEXT}


@pytest.fixture
def no_judge(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", evals.names())
def test_declarations(name, no_judge):
    """Fails if an eval lacks a profile, a direction or a hub data set's name, or refuses its own default settings."""
    assert set(evals.declared(name, "METRICS").values()) <= {"higher", "lower", ""}
    profiles = evals.declared(name, "CONFIG")
    assert set(profiles) in (TEXT, {"synthetic"})  # what needs a language model, and what needs known features
    for profile, (model, sibling, source) in PROFILES.items():
        if profile not in profiles:
            continue
        config = choose(name, profile, "")[name]
        facts = dict(model=model, instruct_model=sibling, profile=profile, device="cpu", source=source)
        assert evals.load(name).requirements(config, facts) == []
        assert set(evals.wheels(name, source)) <= set(embedded.WHEELS)
        json.dumps([config, evals.outside(name)])
    config = profiles.get("gemma") or profiles["synthetic"]
    assert all("/" in repository for repository in evals.repositories(name, config, Source("hub", "o/n")))
    least, wanted = evals.held_out(name, config)
    assert evals.repositories(name, config, Source("tiny")) == [] and least <= wanted


# ------------------------------------------------------------------------------------------------ deleting an eval


@functools.cache
def imported(file):
    """The modules that a file imports where it is loaded: not in a function, which may never be called."""
    outer = ast.parse(file.read_text(encoding="utf-8")).body
    found = {alias.name for node in outer if isinstance(node, ast.Import) for alias in node.names}
    for node in outer:
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("name", evals.names())
def test_nobody_but_its_own_test_needs_an_eval(name):
    """Fails if another module, or another eval's test, cannot be loaded once this eval is deleted."""
    own = {*evals.files(name), PROJECT / f"tests/evals/test_{name}.py"}
    files = {file for folder in ("evals", "runs", "variants", "tests") for file in (PROJECT / folder).rglob("*.py")}
    need = [file for file in {*files, PROJECT / "experiment.py"} - own
            if any(module == f"evals.{name}" or module.startswith(f"evals.{name}.") for module in imported(file))]
    assert not need


@pytest.mark.slow
def test_an_eval_goes_by_deleting_it(tmp_path, cache, no_judge):
    """Fails if a run of all evals, or the other tests, miss an eval whose file or folder and test were deleted."""
    gone = {name for name in ("tpp", "ravel") if name in evals.names()}  # a file and a folder
    # the two go together, so neither may be the only one that needs the other
    assert not [file for name in gone for file in evals.files(name) for other in gone - {name}
                if other in file.read_text(encoding="utf-8")]
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for part in ("evals", "runs", "variants", "tests"):
        shutil.copytree(PROJECT / part, tmp_path / "project" / part, ignore=ignored)
    for part in ("experiment.py", "pyproject.toml", "README.md"):
        shutil.copy(PROJECT / part, tmp_path / "project")
    for name in gone:
        own = tmp_path / "project" / "evals" / name
        if own.is_dir():
            shutil.rmtree(own)
        else:
            own.with_suffix(".py").unlink()
        (tmp_path / "project" / "tests" / "evals" / f"test_{name}.py").unlink()

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path / "project", text=True, capture_output=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})

    ran = python("experiment.py", *command(tmp_path / "run", cache, "--evals=all"))
    assert ran.returncode == 0, ran.stderr
    means = json.loads((tmp_path / "run" / "final_info.json").read_text())["layer_2"]["means"]
    assert {metric.split(".")[0] for metric in means} & {*evals.names()} == OF_TEXT - gone
    collected = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests")
    assert collected.returncode == 0, collected.stdout
    assert not any(f"test_{name}.py" in collected.stdout for name in gone)
    assert "test_core.py" in collected.stdout


# ------------------------------------------------------------------------------------------------ all of them


def test_all_evals_in_one_run(tmp_path, cache, no_judge):
    """Fails if an eval crashes, returns an undeclared metric or no score without a reason, or a second run differs."""
    assert experiment.main(command(tmp_path / "run", cache, "--evals=all")) == 0
    section = json.loads((tmp_path / "run" / "final_info.json").read_text())["layer_2"]
    ours = {metric for metric in section["means"] if metric.split(".")[0] in evals.names()}
    assert {metric.split(".")[0] for metric in ours} == OF_TEXT
    assert ours <= set(compare.directions())
    assert set(section["stderrs"]) <= ours
    for metric in ours:
        named = any(metric.split(".")[1] in problem for problem in section["problems"])
        assert section["means"][metric] is not None or named, metric
    assert experiment.main(command(tmp_path / "again", cache, "--evals=all")) == 0
    assert (tmp_path / "again" / "final_info.json").read_bytes() == (tmp_path / "run" / "final_info.json").read_bytes()
