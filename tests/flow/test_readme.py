"""Every example of every README runs: commands, flags, hyper-parameters and files of code."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

import experiment
import variants
from runs import compare, index, ledger, report, seeds
from runs.page import features as pages
from tests import GOLDEN, OWN_VARIANTS, PROJECT
from tests.benchmarks import compare as comparing
from tests.benchmarks import scaling
from variants.kit.hyper import hyperparameters, parse_hyper

PAGES = sorted(page for page in PROJECT.rglob("*.md") if not re.search(r"/\.", str(page.relative_to(PROJECT.parent))))
READMES = [path for path in PAGES if path.name in ("README.md", "AGENTS.md")]
VARIANTS = PROJECT / "variants/README.md"
TINY = ["--num_tokens=4096", "--device=cpu", "--evals=core"]
# what runs elsewhere, or is another program's: (what is in the command, the file that runs it, how it reads there)
ELSEWHERE = (
    ("pip install -r requirements.txt", ".ci/run", r'pip" install .*-r requirements\.txt'),
    ("pip install --no-deps dictionary-learning==0.1.0", ".ci/run", r"--no-deps dictionary-learning==0\.1\.0"),
    ("pip install selenium", ".ci/run", r'pip" install .* selenium$'),
    ("pip install --no-deps axe-playwright-python==0.1.8", ".ci/run", r"^    axe-playwright-python==0\.1\.8"),
    ("python -m pytest -q", ".ci/run", r'python" -m pytest -q'),
    ("python3 -m venv", ".ci/run", r"^python3 -m venv"),
    ("torchrun", "tests/flow/test_ranks.py", r'"-m", "torch\.distributed\.run", .*--nproc_per_node'),
    ("diff ", "tests/flow/test_experiment.py", r'final_info\.json"\)\.read_bytes\(\) == '),
    ("python -m tests.imitated_gpu", "tests/flow/test_imitated_gpu.py", r'"-m", "tests\.imitated_gpu"'),
    ("python -m tests.flow.test_cuda", "tests/flow/test_imitated_gpu.py", r"^test_cuda\.test_no_step_waits"),
    ("python -m tests.benchmarks.training", "tests/flow/test_benchmark.py", r"^training\.main\("),
    ("python -m tests.benchmarks.gpu", "tests/flow/test_benchmark.py", r'"-m", "tests\.benchmarks\.gpu"'),
    ("python -m runs.template", "tests/runs/test_template.py", r"template\.main\("),
    ("--out_dir=run_0", "tests/runs/test_template.py", r"--out_dir=run_"),
    ("python plot.py", "tests/runs/test_template.py", r"plot\.py"),
    ("python -m runs.stability", "tests/runs/test_stability.py", r"stability\.main\("),
    ("python -m runs.look", "tests/runs/test_look.py", r"look\.main\("),
    ("python -m runs.dashboards", "tests/runs/test_features.py", r"later\.main\("),
    ("python -m runs.publish", "tests/runs/test_publish.py", r"publish\.main\("),
    ("python -m runs.neuronpedia", "tests/runs/test_neuronpedia.py", r"neuronpedia\.main\("),
    ("--exit-status", "tests/runs/test_verdict.py", r'"--exit-status"'),
    ("--store", "tests/runs/test_seeds.py", r'"--store"'),
    ("openai-community/gpt2", "tests/evals/test_inputs.py", r"run\(cache, gpt2, texts, "))
# what makes a benchmark of the embedded model, of a real step or of many architectures one of seconds
SMALL = {"architectures": ["gpt2"], "standard_errors": ["--profile=tiny", "--evals=core"],
         "sparse": ["--device=cpu", "--d_in=32", "--widths=256", "--ks=4", "--batch_size=64", "--steps=1"],
         "cache": ["--gb=0.01"],
         "steps": ["--device=cpu", "--d_in=32", "--width=256", "--k=4", "--batch_size=64", "--variants=topk,standard"],
         "evals": ["--help"]}  # minutes of the embedded model
OTHER_PROGRAMS = {"--again", "--all", "--baseline", "--by", "--csv", "--despite_warnings", "--exit-status", "--file",
                  "--json", "--markdown", "--model_id", "--page", "--private", "--rebuild", "--sae", "--saebench",
                  "--set", "--store", "--text", "--top"}
COMMANDS = r"(python3?|torchrun|pip|diff) "
REFUSED = "\n## What can go wrong"  # the part of tests/README.md that lists what is refused


def shown(readme: Path) -> str:
    return readme.read_text(encoding="utf-8").partition(REFUSED)[0]


def spans(text: str) -> list[str]:
    """What stands in backticks, and the commands of indented and fenced blocks, one by one."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in fenced for line in block.splitlines()] + re.findall(r"^    (\S.*)$", rest, re.M)
    commands = [command.removeprefix(".venv/bin/") for line in lines for command in line.split(" && ")]
    return [span.strip() for span in commands + re.findall(r"`([^`\n]+)`", rest)]


def found(pattern: str) -> list[str]:
    everything = [span for readme in READMES for span in spans(shown(readme))]
    return sorted({re.sub(r"\s+#.*$", "", span) for span in everything if re.match(pattern, span)})


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", VARIANTS.read_text(encoding="utf-8"), re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_its_links_lead_somewhere(page):
    """Fails if a page links to a file, a picture or a heading that there is not."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def measured(module: str, monkeypatch) -> None:
    """Run a benchmark as its command does, but a small one."""
    name = module.removeprefix("tests.benchmarks.")
    if name == "scaling":
        monkeypatch.setattr(scaling, "WIDTHS", (2**14,))
        scaling.main()
        return
    if name == "compare":
        monkeypatch.setattr(comparing, "NUMBERS", (2, 3))
        monkeypatch.setattr(comparing, "TIMES", 1)
        comparing.main()
        return
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name]])
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as left:
        assert not left.code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with run_1 to run_3, as the examples speak of them, and mine.py, the example of variants/README.md."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "mine.py").write_text(python_blocks()[0])
    for seed in (1, 2, 3):
        assert experiment.main(["--profile=tiny", *TINY, f"--seed={seed}", f"--cache_dir={folder / 'cache'}",
                                f"--out_dir={folder / f'run_{seed}'}"]) == 0
    return folder


@pytest.mark.parametrize("part, file, reads", ELSEWHERE)
def test_what_runs_elsewhere_does(part, file, reads):
    """Fails if nothing runs a README's command any more, or if no README shows what is said to run elsewhere."""
    assert re.search(reads, (PROJECT / file).read_text(encoding="utf-8"), re.M)
    assert any(part in command for command in found(COMMANDS))


@pytest.mark.slow
def test_without_a_gpu_its_tests_say_so():
    """Fails if `python -m tests.flow.test_cuda` ends in a traceback, or as if it had passed, where there is no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "tests.flow.test_cuda"], cwd=PROJECT, env=environment, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no CUDA GPU here: nothing was tested\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", found(COMMANDS))
def test_a_command_runs(command, place, monkeypatch, capsys):
    """Fails if a README shows a command that is refused, that nothing runs, or a table that it no longer prints."""
    if any(part in command for part, _, _ in ELSEWHERE):
        return  # the test above knows where
    words = shlex.split(re.sub(r"\[|\]|…", "", command))
    monkeypatch.chdir(place)
    if words[1] == "-m" and words[2].startswith("tests.benchmarks."):
        measured(words[2], monkeypatch)
        printed = capsys.readouterr().out
        assert "usage: " in printed or re.search(r"^\| .* \|$", printed, re.M)
        if words[2].endswith(".scaling"):
            assert printed.strip() in (PROJECT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
        return
    if words[1:3] == ["-m", "runs.ledger"]:
        assert ledger.main(words[3:]) == 0
        return
    if words[1:3] == ["-m", "runs.index"]:
        assert index.main(words[3:]) == 0
        return
    if words[1] == "-m":
        program = {"runs.compare": compare.main, "runs.page.features": pages.main, "runs.report": report.main,
                   "runs.seeds": seeds.main}[words[2]]
        runs = [word if word.startswith("run_") else "run_1" for word in words[3:] if word[0] != "-"]
        assert program([*(word for word in words[3:] if word[0] == "-"), *(runs or ["run_1"])]) == 0
        return
    if "--help" in words:
        with pytest.raises(SystemExit) as left:
            experiment.main(words[2:])
        assert left.value.code == 0
        return
    words = [word.replace("--variant=mine", "--variant=mine.py") for word in words[2:]]
    words = [word.replace("--out_dir=run_", "--out_dir=again_") for word in words]
    more = [] if any(word.startswith("--num_tokens") for word in words) else TINY
    given = ["--profile=tiny", f"--cache_dir={place / 'cache'}"]
    assert experiment.main([*given, *more, *words]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", found(r"--\w"))
def test_a_flag_is_one(flags, place, monkeypatch):
    """Fails if a README names a flag that there is not, or a value that it does not take."""
    words = shlex.split(flags.replace("[", "").replace("]", ""))
    if words[0].partition("=")[0] in OTHER_PROGRAMS:
        return
    if "…" in flags or "NAME" in flags or (len(words) == 1 and "=" not in flags):
        assert words[0].partition("=")[0].lstrip("-") in experiment.Settings.__dataclass_fields__
        return
    monkeypatch.chdir(place)
    settings, _ = experiment.resolve(experiment.parse_settings(["--profile=tiny", "--device=cpu", *words]))
    experiment.evals_of(settings)
    experiment.layers_of(settings)
    named = set(re.findall(r"(?:^|,)(\w+)=", f"{settings.hyper},{settings.sweep}"))
    if named and "my_weight" not in named:  # that is the example's own: it is run below
        knowing = [m for m in map(variants.load, OWN_VARIANTS) if named <= set(hyperparameters(m))]
        if not knowing and OWN_VARIANTS != GOLDEN:
            pytest.skip("of a variant that is deleted")
        assert experiment.hypers_of(settings, knowing[0])


@pytest.mark.parametrize("name", re.findall(r"^\*\*`(\w+)`\*\*", VARIANTS.read_text(encoding="utf-8"), re.M))
def test_an_ablation_is_a_hyper_parameter(name):
    """Fails if a README offers an ablation by a name or value that the variant does not know."""
    if name not in variants.names():
        pytest.skip(f"{name} is deleted")
    part = VARIANTS.read_text(encoding="utf-8").partition(f"\n**`{name}`**")[2].partition("\n\n")[0]
    offered = [item.removeprefix("--hyper ") for item in re.findall(r"`((?:--hyper )?\w+=[^`]+)`", part)]
    module = variants.load(name)
    assert offered and {item.partition("=")[0] for item in offered} <= hyperparameters(module).keys()
    for item in offered:
        parse_hyper(module, "" if "…" in item else item)


@pytest.mark.slow
def test_the_files_of_code_run(place, monkeypatch, capsys):
    """Fails if the README's own variants, or the line for dictionary_learning's trainers, do not run as they are."""
    example, contexts, library = python_blocks()
    monkeypatch.chdir(place)
    given = ["--profile=tiny", *TINY, f"--cache_dir={place / 'cache'}"]
    assert experiment.main([*given, "--variant=mine.py", "--hyper=k=64,my_weight=0.1", "--out_dir=example"]) == 0
    (place / "contexts.py").write_text("from variants import topk\n\n\n" + contexts)
    assert experiment.main([*given, "--variant=contexts.py", "--allow_identical", "--out_dir=contexts"]) == 0

    for name, attribute in (("nnsight", "LanguageModel"), ("wandb", "init")):  # which it imports for other purposes
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("dictionary_learning")
    line, _, flags = library.partition("#")
    (place / "theirs.py").write_text(line)
    flags = flags.replace("--variant=mine", "--variant=theirs.py").split()
    assert experiment.main([*given, *flags, "--out_dir=theirs"]) == 0, capsys.readouterr().err
    assert json.loads((place / "theirs/final_info.json").read_text())["layer_2"]["config"]["hyper"]["k"] == 64
