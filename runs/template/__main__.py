"""Write a template for AI-Scientist: python -m runs.template DEST [--profile=tiny …]

DEST is a new or empty folder, for the client to find one in its templates/. Further arguments are settings of every
run that the template makes. In DEST lie afterwards experiment.py (a variant that starts this runner), plot.py,
prompt.json, seed_ideas.json and latex/template.tex; the baseline, run_0, is made by the command that is said at the
end. The runner is used from where it lies.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).resolve().parents[2]
FILES = Path(__file__).resolve().parent / "files"
PACKAGES = ("evals", "runs", "variants", "tests")
MINUTES = 100  # of the 120 after which the client kills a run and deletes its folder
# arguments whose value may be a file or a folder; the client's runs start elsewhere
PLACES = ("init_from", "model", "dataset", "core_dataset", "cache_dir", "data_dir")
# the runner's own look at a command line, in its own process: what imports torch, and may find something wrong
CHECK = """
import dataclasses, sys
sys.path.insert(0, sys.argv.pop(1))
import experiment
from runs import settings
try:
    settings.check_numbers(dataclasses.asdict(experiment.parse_settings(sys.argv[1:])))
except (ValueError, SystemExit) as error:
    sys.exit(str(error).partition("\\n")[0])
"""


def settings_of(given: list[str]) -> list[str]:
    """What a run of the template is given besides its variant and folder, with paths that hold from anywhere.

    ValueError in one line for what the runner does not take.
    """
    for argument in given:
        name = argument.removeprefix("--").partition("=")[0]
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r} belongs to no flag: write --name=value")
        if name in ("variant", "out_dir", "against"):
            raise ValueError(f"--{name} is set by the template's experiment.py: leave it out")
    settings = [anywhere(argument) for argument in given]
    if not any(argument.startswith("--minutes=") for argument in settings):
        settings = [f"--minutes={MINUTES}", *settings]
    checked = subprocess.run([sys.executable, "-c", CHECK, str(RUNNER), *settings], text=True, capture_output=True,
                             stdin=subprocess.DEVNULL)
    if checked.returncode:
        words = checked.stderr.strip().splitlines() or [f"the runner ended with status {checked.returncode}"]
        raise ValueError(words[-1])
    return settings


def anywhere(argument: str) -> str:
    """An argument with its path made absolute: the cache's, and any other that exists and is written as a path."""
    flag, _, value = argument.partition("=")
    name, path = flag.removeprefix("--"), Path(value).expanduser()
    written_as_path = name in PLACES and (value.startswith((".", "~")) or os.sep in value)
    if (name == "cache_dir" and value) or (written_as_path and path.exists()):
        return f"{flag}={path.resolve()}"
    return argument


def destination(name: str) -> Path:
    """The folder to write into, which need not exist; ValueError in one line where the template must not go."""
    folder = Path(name).expanduser().resolve()
    if folder == RUNNER or any(folder.is_relative_to(RUNNER / package) for package in PACKAGES):
        raise ValueError(f"{name} lies in the runner's own folders: name a folder outside {RUNNER}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{name} exists and is not an empty folder: nothing was written; name a new one")
    return folder


def write(folder: Path, settings: list[str]) -> None:
    """Write the template's files into an empty or new folder. OSError where that is impossible."""
    shutil.copytree(FILES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    program = folder / "experiment.py"
    text = program.read_text(encoding="utf-8")
    filled = {'"@RUNNER@"': repr(str(RUNNER)), '"@PYTHON@"': repr(sys.executable), '["@ARGUMENTS@"]': repr(settings)}
    for word, value in filled.items():
        text = text.replace(word, value)
    program.write_text(text, encoding="utf-8")


def main(argv: list[str]) -> int:
    """The command; 0 if the template was written, 1 with one line on stderr if not."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else 1
    try:
        if argv[0].startswith("--"):
            raise ValueError(f"{argv[0]} stands where the folder belongs: python -m runs.template DEST {argv[0]}")
        folder = destination(argv[0])
        settings = settings_of(argv[1:])
        write(folder, settings)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 1
    print(f"{folder}: experiment.py, plot.py, prompt.json, seed_ideas.json, latex/template.tex\nmake its baseline with")
    print(f"    cd {shlex.quote(str(folder))} && python experiment.py --out_dir=run_0 && python plot.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
