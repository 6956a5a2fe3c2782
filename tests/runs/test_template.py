"""The template for AI-Scientist: what it holds, what starting it does, and a client's whole way through it.

The client's calls are written out here as its perform_experiments.py makes them (github.com/SakanaAI/AI-Scientist).
"""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

import variants
from runs.template import __main__ as template
from tests import PROJECT
from tests.small_run import SMALL
from tests.variants.common import SMOLLM, preflight
from variants.preflight.identical import code

FIGURES = ("training_curves.png", "frontier.png", "metrics.png")
RETURNED = 'return reconstruction + self.auxk_alpha * auxk, {"reconstruction": reconstruction, "auxk": auxk}'


@pytest.fixture
def folder(tmp_path):
    """A template as it is written, its settings not looked at."""
    place = tmp_path / "templates" / "sae"
    template.write(place, ["--minutes=100", "--profile=tiny"])
    return place


def edit(file, old, new):
    """What the client's coder does: replace a text that is there."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def started(folder, *arguments, **more):
    """A program of the template's folder, started as the client does: there, with its stderr kept."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True, **more)


# ------------------------------------------------------------------------------------------------ what is written


def test_holds_what_the_client_reads(folder):
    """Fails if a file is missing, too long to stand in a prompt, not ASCII, or of another shape than it is read in."""
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "experiment.py", "latex/template.tex", "plot.py", "prompt.json", "seed_ideas.json"]
    assert not [path for path in folder.iterdir() if path.name.startswith("run")]
    for name in ("experiment.py", "plot.py"):
        text = (folder / name).read_bytes().decode("ascii")
        assert len(text.splitlines()) <= 150
        assert not re.search("@[A-Z]+@", text), "a word that was not filled in"
        compile(text, name, "exec")
    prompt = json.loads((folder / "prompt.json").read_text())
    assert all(len(prompt[key]) > 100 for key in ("system", "task_description")) and len(prompt) == 2
    ideas = json.loads((folder / "seed_ideas.json").read_text())
    assert len(ideas) == 2
    for idea in ideas:
        assert list(idea) == ["Name", "Title", "Experiment", "Interestingness", "Feasibility", "Novelty"]
        assert re.fullmatch("[a-z_]+", idea["Name"])
        assert all(type(idea[rating]) is int and 1 <= idea[rating] <= 10 for rating in list(idea)[3:])


def test_paper_is_one_that_the_client_can_fill(folder):
    """Fails if a citation or figure of template.tex does not exist, or a section that is to be filled in is missing."""
    text = (folder / "latex/template.tex").read_text()
    found = re.search(r"\\begin{filecontents}{references.bib}(.*?)\\end{filecontents}", text, re.DOTALL)
    cited = {key for keys in re.findall(r"\\cite[a-z]*{([^}]*)}", text) for key in keys.split(",")}
    entries = re.findall(r"@\w+{(\w+),", found[1])
    assert cited <= set(entries) and len(entries) == len(set(entries)) == 7
    assert found[1].count("{") == found[1].count("}")
    assert sorted(re.findall(r"\\includegraphics.*?{(.*?)}", text)) == sorted(FIGURES)
    sections = ["Introduction", "Related Work", "Background", "Method", "Experimental Setup", "Results", "Conclusion"]
    assert re.findall(r"\\section{([^}]*)}", text) == sections
    places = ["TITLE", "ABSTRACT", *(section.upper() for section in sections)]
    assert all(text.count(f"{place} HERE") == 1 for place in places)


def test_class_is_topk_written_out(folder):
    """Fails if the class is no longer variants/topk.py's, so that run_0 is another baseline than is said."""
    assert code(ast.parse((folder / "experiment.py").read_text())) == code(variants.parsed(variants.path("topk")))


def test_what_is_there_is_never_overwritten(tmp_path, monkeypatch, capsys):
    """Fails if a folder with something in it, a file, or one of the project's own folders is written into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    own = [str(PROJECT), str(PROJECT / "variants/mine"), str(PROJECT / "runs/../evals/sae")]
    for name in ["full", "full/notes.txt", *own]:
        assert template.main([name]) == 1
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1 and name in said.err and not said.out
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]
    assert not (PROJECT / "variants/mine").exists() and not (PROJECT / "evals/sae").exists()


@pytest.mark.slow  # each asks the runner, which imports torch
@pytest.mark.parametrize("argument, words", [("--profil=tiny", "nearest is --profile"), ("--minutes=-1", "below 0"),
                                             ("--variant=topk", "leave it out"), ("tiny", "belongs to no flag")])
def test_settings_the_runner_does_not_take_are_refused(argument, words, tmp_path, capsys):
    """Fails if a template is written each of whose runs would fail at its command line."""
    assert template.main([str(tmp_path / "sae"), argument]) == 1
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "sae").exists()


def test_paths_hold_from_anywhere(tmp_path, monkeypatch):
    """Fails if a relative path is left as it was, or a name of the hub or a built-in one is made a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    given = ["--dataset=./texts", "--cache_dir=cache", "--model=google/gemma-2-2b", "--core_dataset=embedded"]
    assert [template.anywhere(argument) for argument in given] == [
        f"--dataset={tmp_path}/texts", f"--cache_dir={tmp_path}/cache", *given[2:]]


# ------------------------------------------------------------------------------------------------ what starting it does


def stand_in(tmp_path, monkeypatch):
    """A runner that only says as what it was started."""
    runner = tmp_path / "runner"
    (runner / "variants").mkdir(parents=True)
    (runner / "experiment.py").write_text("import json, os, sys\n"
                                          "print(json.dumps([os.getpid(), os.getcwd(), sys.argv[1:]]))\n")
    monkeypatch.setenv("SAE_RUNNER", str(runner))


def test_becomes_the_run_itself(folder, tmp_path, monkeypatch):
    """Fails if the run is a child, which a client's kill would miss, or is not told what it must differ from."""
    stand_in(tmp_path, monkeypatch)

    def run(out_dir):
        process = subprocess.Popen([sys.executable, "experiment.py", f"--out_dir={out_dir}", "--seed=3"], cwd=folder,
                                   stdout=subprocess.PIPE, text=True)
        number, place, arguments = json.loads(process.communicate(timeout=60)[0])
        assert number == process.pid and place == str(folder)
        return arguments

    begin, end = [f"--variant={folder}/experiment.py", "--minutes=100", "--profile=tiny"], ["--seed=3"]
    assert run("run_0") == [*begin, "--out_dir=run_0", *end]
    (folder / "run_0").mkdir()
    (folder / "run_0/variant.py").write_text("")
    assert run("run_1") == [*begin, "--against=run_0/variant.py", "--out_dir=run_1", *end]
    assert run("run_0") == [*begin, "--out_dir=run_0", *end]


def test_a_runner_that_moved_is_one_line(folder, monkeypatch):
    """Fails if a folder without a runner, or the template's own, ends in a traceback or in starting itself for ever."""
    for place in ("/nowhere", str(folder)):
        monkeypatch.setenv("SAE_RUNNER", place)
        ended = started(folder, "experiment.py", "--out_dir=run_1", timeout=60)
        assert ended.returncode == 1
        assert ended.stderr == f"no runner in {place}: set the variable SAE_RUNNER to the folder that holds it\n"


@pytest.mark.slow
def test_what_must_have_an_effect_and_what_has_one(folder, monkeypatch):
    """Fails if preflight lets an edit without effect run as another run, or refuses run_0 or a new default."""
    program = folder / "experiment.py"
    monkeypatch.chdir(folder)
    assert preflight(program, SMOLLM, reference_files=[variants.path("topk")]).notes == ["this is the unmodified topk"]
    (folder / "run_0").mkdir()
    shutil.copy(program, folder / "run_0/variant.py")

    def later(hyper=None):
        found = preflight(program, SMOLLM, hyper, reference_files=[variants.path("topk")], against="run_0/variant.py")
        return found.notes

    with pytest.raises(ValueError, match="unmodified run_0, from which it must differ"):
        later()
    edit(program, "--profile=tiny", "--seed=1")  # the block that only starts the runner is no difference
    with pytest.raises(ValueError, match="unmodified run_0, from which it must differ"):
        later()
    edit(program, RETURNED, "unused = auxk * 2\n        " + RETURNED)
    line = 1 + program.read_text().splitlines().index("        unused = auxk * 2")
    with pytest.raises(ValueError, match=rf"experiment.py:{line}: .*bit-identically to run_0.*\(it differs in line "):
        later()
    edit(program, "unused = auxk * 2\n        " + RETURNED, RETURNED)
    # hyper-parameters from the command line, the same for run_0 as it was recorded: no difference, others are one
    recorded = {"layer_9": {"config": {"hyper": {"k": 16, "auxk_alpha": 1 / 32}}}}
    (folder / "run_0/final_info.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="unmodified run_0, from which it must differ"):
        later(dict(k=16))
    assert "this is run_0 with k=20" in later(dict(k=20))
    (folder / "run_0/final_info.json").unlink()
    edit(program, "k=32", "k=24")
    assert "this is run_0 with k=24" in later()


# ------------------------------------------------------------------------------------------------ plots


@pytest.mark.slow
def test_plots_leave_out_what_is_not_there(folder):
    """Fails if plot.py stops at a run that failed or was deleted, or at a metric without value or standard error."""
    for number, value in enumerate([0.5, None]):
        (folder / f"run_{number}").mkdir()
        means = {"core.ce_loss_score": value, "core.l0": 32.0, "core.explained_variance": 0.8 + number / 10}
        section = {"means": means, "stderrs": {"core.ce_loss_score": None, "core.explained_variance": 0.01}}
        (folder / f"run_{number}/final_info.json").write_text(json.dumps({"layer_2": section}))
    (folder / "run_2").mkdir()
    (folder / "run_2/final_info.json").write_text('{"layer_2"')
    (folder / "run_0/training_log.csv").write_text("sae,tokens,loss,l0,explained_variance\nlayer_2,256,2.0,32,-1\n"
                                                   "layer_2,512,1.0,32,\n")
    edit(folder / "plot.py", '"run_0": "TopK (baseline)",', ", ".join(f'"run_{i}": "run {i}"' for i in range(4)))
    ended = started(folder, "plot.py", stdout=subprocess.PIPE, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "run_2 is left out: no results (JSONDecodeError)", "run_3 is left out: no results (FileNotFoundError)",
        "training_curves.png", "run 1 is not in frontier.png: no headline metric, no L0, or another metric than the "
        "others", "frontier.png", "metrics.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)


# ------------------------------------------------------------------------------------------------ the client


def client_run(folder, number):
    """(exit status, what the client shows its coder next) of a run, as its run_experiment goes about it."""
    shutil.copy(folder / "experiment.py", folder / f"run_{number}.py")
    ended = started(folder, "experiment.py", f"--out_dir=run_{number}", timeout=7200)
    if ended.returncode:
        shutil.rmtree(folder / f"run_{number}", ignore_errors=True)
        return ended.returncode, ended.stderr[-1500:]
    results = json.loads((folder / f"run_{number}/final_info.json").read_text())
    return 0, {name: section["means"] for name, section in results.items()}


@pytest.mark.slow
def test_client_goes_all_the_way(tmp_path, cache):
    """Fails if a client finds no baseline, sees no means or no cause of a failure with its line, or gets no figures."""
    base, idea = tmp_path / "templates/sae", tmp_path / "results/idea"
    assert template.main([str(base), *SMALL, "--evals=core", f"--cache_dir={cache}"]) == 0
    assert started(base, "experiment.py", "--out_dir=run_0").returncode == 0
    shutil.copytree(base, idea, dirs_exist_ok=True)
    baseline = json.loads((idea / "run_0/final_info.json").read_text())["layer_2"]["means"]

    edit(idea / "experiment.py", RETURNED, "l1 = top_BK.sum(-1).mean()\n        return reconstruction + 0.05 * l1, "
         '{"reconstruction": reconstruction, "l1": l1}')
    status, means = client_run(idea, 1)
    assert status == 0
    assert means["layer_2"]["core.l0"] > 0
    assert means["layer_2"]["core.r2"] != baseline["core.r2"]

    edit(idea / "experiment.py", "l1 = top_BK.sum", "l1 = top_BK.detach().sum")
    line = 1 + next(i for i, text in enumerate((idea / "experiment.py").read_text().splitlines()) if "l1 = " in text)
    status, shown = client_run(idea, 2)
    assert status == 1
    assert shown.startswith("FAILED in preflight: ") and f"experiment.py:{line}: " in shown and "'l1'" in shown
    assert not (idea / "run_2").exists()

    edit(idea / "experiment.py", "l1 = top_BK.detach().sum", "l1 = top_BK.pow(2).sum")
    assert client_run(idea, 2)[0] == 0

    edit(idea / "plot.py", '"run_0": "TopK (baseline)",', '"run_0": "TopK", "run_1": "L1", "run_2": "L2",')
    plotted = started(idea, "plot.py", timeout=600)
    assert (plotted.returncode, plotted.stderr) == (0, "")
    assert all((idea / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)
    assert sorted(path.name for path in idea.iterdir() if path.is_dir()) == ["latex", "run_0", "run_1", "run_2"]
