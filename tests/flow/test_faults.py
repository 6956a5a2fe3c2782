"""What a machine does to a run: damaged files, full disks, limits of memory, closed streams, ends from inside.

tests/README.md has the table.
"""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import experiment
import runs.folder
import variants.kit.saving
from evals.common import stored
from runs import checkpoint, disk, environment, failure, voice
from tests import PROJECT
from tests.small_run import command, fail_at_checkpoint
from variants.kit import files, interchange
from variants.preflight import budget
from variants.preflight.check import Findings

pytestmark = pytest.mark.usefixtures("no_pages")

STATE = dict(cursor={}, log=[], recent={}, rng={}, saes={"layer_2": {"w": torch.arange(10_000.0)}})


def flip(file: Path, at: float = 0.5) -> None:
    """Another bit at a share of the file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)
    # what was just read is known by its time, and this file system's clock may not have moved on
    os.utime(file, (1, 1))


def cut(file: Path, size: int = 200) -> None:
    os.truncate(file, size)


# ------------------------------------------------------------------------------------------------ damaged files

DAMAGES = {
    "empty": lambda f: cut(f, 0),
    "cut off": lambda f: cut(f, 20_000),
    "without its end": lambda f: cut(f, f.stat().st_size - 30),
    "a flipped bit": flip,
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "longer": lambda f: f.write_bytes(f.read_bytes() * 2),
    "no torch file": lambda f: f.write_text("{}"),
    "another object": lambda f: torch.save({"version": 99}, f),
    "a list": lambda f: torch.save([1], f),
    "older format": lambda f: torch.save({"step": 1}, f, _use_new_zipfile_serialization=False),
    "a class": lambda f: torch.save({"x": Path("a")}, f)}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, kind):
    """Fails if a checkpoint with other bytes than were written is loaded, ends the run, or is thrown away."""
    said = []
    for step in (1, 2):
        checkpoint.write(tmp_path, STATE | dict(step=step))
    checkpoint.mend(tmp_path, said.append)
    assert checkpoint.read(tmp_path, "cpu", view=True)["step"] == 2 and not said
    DAMAGES[kind](tmp_path / checkpoint.NAME)
    if kind == "longer":  # a whole archive with something before it: torch may read it or not
        said.append("checkpoint.pt")
    checkpoint.mend(tmp_path, said.append)
    assert kind == "longer" or checkpoint.read(tmp_path, "cpu", view=False)["step"] == 1
    assert checkpoint.NAME in said[0]
    assert (tmp_path / checkpoint.DAMAGED).exists() or kind == "longer"
    DAMAGES[kind](tmp_path / checkpoint.NAME)
    checkpoint.mend(tmp_path, said.append)
    assert checkpoint.read(tmp_path, "cpu", view=False) is None or kind == "longer"


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(tmp_path, monkeypatch):
    """Fails if a full disk costs the last good checkpoint, or half of a new one takes the room of the last words."""
    checkpoint.write(tmp_path, STATE | dict(step=1))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"checkpoint\.pt"):
        checkpoint.write(tmp_path, STATE | dict(step=2))
    assert os.listdir(tmp_path) == [checkpoint.NAME] and checkpoint.read(tmp_path, "cpu", view=False)["step"] == 1


def test_a_checkpoint_of_other_saes_is_named(tmp_path):
    """Fails if a sound checkpoint of another run ends in torch's list of keys, or is half loaded without a word."""
    with pytest.raises(ValueError, match=r"checkpoint\.pt holds layer_2 and not layer_3\ndelete"):
        checkpoint.part(dict(STATE), "layer_3", tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another run: .*size mismatch.*\ndelete"):
        checkpoint.fit(torch.nn.Linear(2, 3).load_state_dict, torch.nn.Linear(2, 4).state_dict(), tmp_path)


@pytest.mark.parametrize("damage, used", [
    ((), checkpoint.NAME),
    pytest.param(("a flipped bit",), checkpoint.PREVIOUS, marks=pytest.mark.slow),
    pytest.param(("a flipped bit", "cut off"), None, marks=pytest.mark.slow)])
def test_after_a_full_disk_and_damage_the_run_ends_in_the_same_bytes(reference, cache, tmp_path, monkeypatch, capsys,
                                                                     damage, used):
    """Fails if a resume from the checkpoint before, or from none, differs, or the failure is taken for another."""
    out = tmp_path / "run"
    fail_at_checkpoint(3, command(out, cache), monkeypatch)
    assert "no space left on the disk (while writing checkpoint.pt)" in capsys.readouterr().err
    assert json.loads((out / "run_info.json").read_text())["status"] == "failed"
    words = f"from step {torch.load(out / used)['step']}" if used else None
    for kind, name in zip(damage, (checkpoint.NAME, checkpoint.PREVIOUS)):
        DAMAGES[kind](out / name)
    assert experiment.main(command(out, cache, "--checkpoint_seconds=0")) == 0
    said = capsys.readouterr().out
    assert "continuing " + words in said if words else "continuing from step" not in said
    assert said.count("cannot be used") == len(damage) and "lack of memory" not in said
    assert (out / "final_info.json").read_bytes() == (reference / "final_info.json").read_bytes()
    assert not list(out.glob("checkpoint*"))


@pytest.mark.slow
def test_damaged_results_of_a_finished_run_are_made_again(reference, cache, tmp_path, capsys):
    """Fails if a finished run is reported from damaged files, they are not named, or what is made again differs."""
    out, good = tmp_path / "run", (reference / "final_info.json").read_bytes()
    shutil.copytree(reference, out)
    result = next((out / "eval_results/core").glob("*.json"))
    flip(result)
    flip(out / "sae/layer_2/sae_weights.safetensors", 0.9)
    cut(out / "final_info.json")
    assert experiment.main(command(out, cache)) == 0
    said = capsys.readouterr().out
    assert "damaged, and made again: final_info.json, sae/layer_2/sae_weights.safetensors, eval_results/core/" in said
    assert f"{result.name} is damaged" in said and "eval sparse_probing" not in said
    assert (out / "final_info.json").read_bytes() == good
    assert experiment.main(command(out, cache)) == 0 and "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("harm", [lambda f: flip(f), lambda f: cut(f), lambda f: cut(f, 0),
                                  lambda f: f.write_bytes(b"\xff" * 50)])
def test_a_damaged_result_or_its_note_is_no_result(tmp_path, harm):
    """Fails if an eval's result counts though it, or the note of what it was made from, is not what was written."""
    for victim in (".json", ".depends_on"):
        result = tmp_path / "eval_results/core/topk_layer_2_eval_results.json"
        runs.folder.write_json(result, {"x": list(range(100))})
        runs.folder.write_json(result.with_suffix(".depends_on"), stored.note(result, "abc"))
        assert stored.is_done(tmp_path, "core", "layer_2", "abc")
        assert not stored.is_done(tmp_path, "core", "layer_2", "abd")
        harm(result.with_suffix(victim))
        assert not stored.is_done(tmp_path, "core", "layer_2", "abc")


def test_a_damaged_run_info_keeps_the_run_if_it_still_says_which(tmp_path, capsys):
    """Fails if a flipped bit in run_info.json passes unseen, or a garbled one fails or is another run unsaid."""
    (tmp_path / "run").mkdir()
    info = tmp_path / "run/run_info.json"

    def claimed():
        state, lock = runs.folder.claim(tmp_path / "run", "mark")
        lock.release()
        return state

    claimed()
    about = dict(status="finished", fingerprint="mark", phase="results", seconds={"a": 0.1}, n={1: (2,)})
    runs.folder.write_info(tmp_path / "run", about)
    runs.folder.write_json(tmp_path / "run/final_info.json", {"x": 1})
    assert claimed() == "finished" and runs.folder.left(tmp_path / "run")["phase"] == "results"
    info.write_text(info.read_text().replace("results", "rdsults"))
    assert claimed() == "resume" and "damaged, and made again: run_info.json" in capsys.readouterr().out
    cut(info, 50)
    assert claimed() == "new" and "run_info.json is damaged" in capsys.readouterr().out
    assert (tmp_path / "run.previous-1/final_info.json").exists()


def test_damaged_weights_to_start_from_are_named(tmp_path):
    """Fails if weights of either format with a flipped bit are taken, or a file that is cut off is not named."""
    from tests.variants.test_interchange import N_FEATURES, D, trained

    own = tmp_path / "own.py"
    own.write_text("from variants import topk\n\nclass SAE(topk.SAE):\n    def encode(self, x):\n"
                   "        return super().encode(x) ** 2\n")
    for name in ("topk", str(own)):
        folder = tmp_path / f"saved_{Path(name).stem}"
        variants.kit.saving.save_sae(folder, trained(name, k=4), 3.0, variants.path(name), {"k": 4}, {})
        interchange.read(folder)
        weights = next(folder.glob("*.safetensors"))
        for harm, words in ((lambda f: flip(f, 0.9), "other bytes"), (lambda f: cut(f, 2000), "no readable weights"),
                            (lambda f: cut(f, 0), "no readable weights")):
            harm(weights)
            with pytest.raises(ValueError, match=rf"{weights.name} .*{words}.*\n.*train"):
                interchange.read(folder)
    state = {"encoder.weight": torch.randn(N_FEATURES, D), "encoder.bias": torch.zeros(N_FEATURES),
             "decoder.weight": torch.randn(D, N_FEATURES), "bias": torch.zeros(D)}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.save(state, theirs / "ae.pt")
    (theirs / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    assert interchange.read(theirs).d_sae == N_FEATURES
    start = (theirs / "ae.pt").read_bytes().index(state["decoder.weight"].numpy().tobytes())  # elsewhere may be padding
    for harm, words in ((lambda f: flip(f, (start + 8.5) / f.stat().st_size), "other bytes"),
                        (lambda f: cut(f, 900), "no readable weights"), (lambda f: cut(f, 0), "no readable weights")):
        harm(theirs / "ae.pt")
        with pytest.raises(ValueError, match=rf"ae\.pt.*{words}.*\n"):
            interchange.read(theirs)


# ------------------------------------------------------------------------------------------------ disks


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota is used up"),
    (OSError(errno.EFBIG, "File too large"), "a file grew beyond"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    (OSError(errno.EIO, "Input/output error"), "input/output error"),
    (OSError(errno.ESTALE, "Stale file handle"), "stale file handle"),
    (OSError(errno.EMFILE, "Too many open files"), "too many files open"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 896 vs 790"),
     "could not be written whole"),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
    (RuntimeError("I/O error: File too large (os error 27)"), "a file grew beyond"),
])
def test_what_is_wrong_with_a_disk_is_said(tmp_path, capsys, error, words):
    """Fails if the folder, what is free there or what to do is missing, or if error.json is."""
    assert failure.report(error, "training", tmp_path, None) == 1
    said = capsys.readouterr().err
    assert all(part in said for part in (words, str(tmp_path), "free on that disk", "to do: ")) and len(said) < 1200
    assert words in json.loads((tmp_path / "error.json").read_text())["message"]


def test_a_library_s_own_error_is_traced_to_the_disk(tmp_path):
    """Fails if the OSError behind torch's words is not looked for, or a disk without inodes passes for a full one."""
    try:
        try:
            raise OSError(errno.EFBIG, "File too large")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 896 vs 790")  # noqa: B904
    except RuntimeError as error:
        assert disk.code_of(error)[0] == errno.EFBIG
    for error in (ValueError("x"), FileNotFoundError(2, "x", "y")):
        assert disk.explained(error, tmp_path) is None
    original, disk.room = disk.room, lambda place: (place, 10**9, 0)
    try:
        assert "no file entry (inode) left" in disk.explained(OSError(errno.ENOSPC, "x"), tmp_path)[0]
    finally:
        disk.room = original
    assert [files.size(n) for n in (0, 999, 4096, 538_900, 999_999, 2.06e9)] == [
        "0 bytes", "999 bytes", "4 kB", "539 kB", "1.0 MB", "2.1 GB"]


@pytest.mark.slow
def test_nothing_can_be_written_any_more_and_the_error_is_said_all_the_same(cache, tmp_path, monkeypatch, capsys):
    """Fails if the handler of a failure fails itself, hides the first error, or the next run blames memory."""
    full, real = [], runs.folder.write_bytes

    def no_space(*_):
        full.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs.folder, "write_bytes", lambda path, data: no_space() if full else real(path, data))
    monkeypatch.setattr(checkpoint, "write", no_space)
    arguments = command(tmp_path / "run", cache, "--evals=none", "--checkpoint_seconds=0")
    assert experiment.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("FAILED in training: ") and "no space left on the disk" in said and "Traceback" not in said
    # one word, changed in its place
    assert json.loads((tmp_path / "run/run_info.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert experiment.main(arguments) == 0 and "(failed); continuing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_that_is_taken_away_is_named(cache, tmp_path, monkeypatch, capsys):
    """Fails if a run goes on in a folder made anew without its lock, or dies of a FileNotFoundError unexplained."""
    real = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda out, state: (real(out, state), shutil.rmtree(out)))
    assert experiment.main(command(tmp_path / "run", cache, "--evals=none", "--checkpoint_seconds=0")) == 1
    assert "the run's folder was deleted or moved while the run went on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch, capsys):
    """Fails if safetensors' own error, which is no OSError, ends what a full disk would only slow down."""
    import safetensors.torch
    from safetensors import SafetensorError

    from evals.cache import Cache

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert Cache(tmp_path, 1.0).get("x", {}, lambda: {"a": torch.ones(1)})["a"] == 1
    assert "not stored" in capsys.readouterr().out and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ memory

NONE = 9223372036854771712  # version 1's word for no limit
UNLIMITED = "Max data size             unlimited            unlimited            bytes     \n" \
            "Max address space         unlimited            unlimited            bytes     \n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


SCOPE, JOB = "sys/fs/cgroup/user.slice/run-1.scope", "sys/fs/cgroup/memory/slurm/job_7"
V1 = {"proc/self/cgroup": "9:name=systemd:/x\n4:memory:/slurm/job_7\n0::/",
      "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
                             "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"}
V2 = {"proc/self/cgroup": "0::/user.slice/run-1.scope",
      "proc/self/mountinfo": "29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"}


@pytest.mark.parametrize("files, variables, least, name", [
    # the least on the way up: 1000 − (700 − 200 of dropped pages) = 500 of the scope, 900 − (800 − 250) = 350 of the
    # slice above
    (V2 | {f"{SCOPE}/memory.max": "1000", f"{SCOPE}/memory.current": "700",
           f"{SCOPE}/memory.stat": "anon 5\ninactive_file 200",
           "sys/fs/cgroup/user.slice/memory.max": "900", "sys/fs/cgroup/user.slice/memory.current": "800",
           "sys/fs/cgroup/user.slice/memory.stat": "inactive_file 250"}, {}, 350,
     "memory.max of the control group /user.slice"),
    (V2 | {f"{SCOPE}/memory.max": "max", f"{SCOPE}/memory.high": "640", f"{SCOPE}/memory.current": "40"}, {}, 600,
     "memory.high"),
    (V1 | {f"{JOB}/memory.limit_in_bytes": "4000", f"{JOB}/memory.usage_in_bytes": "900",
           f"{JOB}/memory.stat": "inactive_file 1\ntotal_inactive_file 400",
           "sys/fs/cgroup/memory/memory.limit_in_bytes": str(NONE)}, {"SLURM_MEM_PER_NODE": "1"}, 3500,
     "memory.limit_in_bytes"),
    # in a container the path is the host's, and what is mounted is the container's own group
    ({"proc/self/cgroup": "4:memory:/docker/ab12",
      "proc/self/mountinfo": "3 1 0:3 /docker/ab12 /sys/fs/cgroup/memory ro - cgroup c rw,memory",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "70",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "20"}, {}, 50, "memory.limit_in_bytes"),
    ({"proc/self/limits": UNLIMITED.replace("space         unlimited", "space         5000000"),
      "proc/self/status": "VmSize:\t    2000 kB\nVmData:\t 100 kB"}, {}, 5_000_000 - 2_048_000, "ulimit -v"),
    ({"proc/self/limits": UNLIMITED.replace("size             unlimited", "size             4000000"),
      "proc/self/status": "VmSize:\t    2000 kB\nVmData:\t 1000 kB"}, {}, 4_000_000 - 1_024_000, "ulimit -d"),
    ({"proc/self/status": "VmRSS:\t    1024 kB"}, {"SLURM_MEM_PER_NODE": "10"}, 9 * 2**20, "Slurm"),
    ({}, {"SLURM_MEM_PER_CPU": "10", "SLURM_CPUS_ON_NODE": "4"}, 40 * 2**20, "Slurm"),
])
def test_every_limit_of_memory_is_seen(tmp_path, files, variables, least, name):
    """Fails if a limit is read at the wrong place, pages of files count as taken, or not the least one is named."""
    found = environment.memory_limits(tree(tmp_path, files), variables)
    bound = min(found, key=found.get)
    assert found[bound] == least and name in bound


def test_no_limit_is_none(tmp_path):
    """Fails if "max", version 1's largest number, Slurm's 0 (all there is) or a system without files is a limit."""
    free = V1 | {f"{JOB}/memory.limit_in_bytes": str(NONE), "proc/self/limits": UNLIMITED}
    assert environment.memory_limits(tree(tmp_path, free), {"SLURM_MEM_PER_NODE": "0"}) == {}
    assert environment.memory_limits(tmp_path / "nothing", {}) == {}


@pytest.mark.parametrize("more, available, words", [
    (["--num_tokens=3000000000", "--block_tokens=3000000000"], 2e10,
     ["--block_tokens: 3,000,000,000 tokens", "384.0 GB of the 384.4 GB", "there are 20.0 GB", "which would fit"]),
    (["--context=100000", "--lm_batch_size=1000"], 2e10, ["--lm_batch_size: 1,000 rows of 100,000 tokens of context"]),
    (["--batch_size=4000", "--block_tokens=4000"], 1e9, ["0.9 GiB of it in a step", "reduce --batch_size"]),
    (["--d_sae=60000000"], 2e10, ["1 SAE with gradients", "reduce --d_sae"]),
    ([], 4e8, ["the process itself"]),
])
def test_a_forecast_names_what_takes_most(more, available, words):
    """Fails if the block, the model's pass, the step or the SAEs is blamed for another's bytes, or room is negative."""
    settings, _ = experiment.resolve(experiment.parse_settings(["--profile=tiny", "--device=cpu", *more]))
    shape = dict(d_model=32, bytes=10**6, block_parameters=1000)
    step = 10**9 if settings.batch_size == 4000 else 10**6
    parameters = 2 * 32 * settings.d_sae
    found = Findings(parameters, 4 * parameters, 0, step, (10**5, (10, 10), "x.py:1"), [])
    _, _, problem = budget.plan(settings, [2], 10, shape, [found], False, 1, available, 1e12)
    assert all(word in problem for word in words) and "\n" in problem
    assert "-" not in problem.replace("--", "") and " 0.0 G" not in problem, problem


# ------------------------------------------------------------------------------------------------ streams

SPEAK = """
import sys
sys.path.insert(0, sys.argv[1])
from runs.voice import VOICE, is_terminal, say, steady
from pathlib import Path
steady()
VOICE.listen(Path(sys.argv[2]))
import os, tqdm
for n in range(2000):
    say(f"‖x‖ {n}")
print("é" * 10, file=sys.stderr, flush=True)
list(tqdm.tqdm(range(3)))
assert not is_terminal(None) and open(sys.argv[2]).fileno() > 2
VOICE.close()
"""


@pytest.mark.parametrize("how", ["", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full", "| head -1 >/dev/null",
                                 "2>&1 | true"])
def test_output_that_cannot_be_written_ends_nothing(tmp_path, how):
    """Fails if a closed, full, broken or ASCII stream raises, changes the exit status, or costs log.txt a line."""
    (tmp_path / "speak.py").write_text(SPEAK)
    line = f"{sys.executable} {tmp_path}/speak.py {PROJECT} {tmp_path}/log.txt {how}; exit ${{PIPESTATUS[0]}}"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(["bash", "-c", line], env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == [f"‖x‖ {n}" for n in range(2000)]
    if not how:
        assert done.stdout.splitlines()[7] == "?x? 7"


@pytest.mark.slow
def test_a_run_needs_no_streams(cache, tmp_path):
    """Fails if the command, its libraries or its evals need a stdout or a stderr."""
    line = " ".join([sys.executable, "experiment.py", *command(tmp_path / "run", cache, "--evals=core"), ">&- 2>&-"])
    assert subprocess.run(["bash", "-c", line], cwd=PROJECT).returncode == 0
    assert "E‖x‖²" in (tmp_path / "run/log.txt").read_text(encoding="utf-8")


def test_say_survives_whatever_stands_for_stdout(monkeypatch):
    """Fails if a stream of a caller's own (ASCII, closed, None) ends a run in his process."""
    closed, ascii_only = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii")
    closed.close()
    for stream in (closed, None, ascii_only):
        monkeypatch.setattr(sys, "stdout", stream)
        voice.say("‖x‖")
        assert list(voice.track([1, 2], "x", 2, "tok")) == [1, 2]
    assert ascii_only.buffer.getvalue() == b"?x?\n"


# ------------------------------------------------------------------------------------------------ ends from inside


@pytest.mark.slow
def test_sys_exit_inside_a_run_is_a_failure_and_help_is_none(cache, tmp_path, capsys):
    """Fails if sys.exit() of a variant ends with status 0, without a word or its place, or leaves it running."""
    variant = tmp_path / "leaver.py"
    variant.write_text("import sys\nfrom variants import topk\n\nclass SAE(topk.SAE):\n"
                       "    def loss(self, batch, progress):\n"
                       "        if progress.step == 97:\n            sys.exit()\n"
                       "        return super().loss(batch, progress)\n")
    assert experiment.main(command(tmp_path / "run", cache, f"--variant={variant}", "--allow_identical",
                                   "--batch_size=32")) == 1
    said = capsys.readouterr().err
    # (0) where another test has imported wandb, which has an exit of its own
    assert re.search(r"FAILED in training: the run was ended from inside, by sys\.exit\(0?\)", said)
    assert "leaver.py:7" in said
    assert json.loads((tmp_path / "run/run_info.json").read_text())["status"] == "failed"
    with pytest.raises(SystemExit) as end:
        experiment.main(["--help"])
    assert not end.value.code


def test_a_native_crash_leaves_its_place(tmp_path):
    """Fails if a segmentation fault says nothing, or the next run takes it for a kill."""
    code = ("import sys, faulthandler; from pathlib import Path; from runs.voice import VOICE; "
            "VOICE.listen(Path(sys.argv[1]))\n"
            "VOICE.say('x was left in its phase'); faulthandler._sigsegv()")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "log.txt")], cwd=PROJECT, capture_output=True,
                          text=True)
    assert done.returncode < 0 and "<module>" in (tmp_path / "log.txt").read_text()
    assert "native code, Segmentation fault" in failure.left(tmp_path, {"status": "running"})
    (tmp_path / "log.txt").write_text("nothing")
    assert "killed without a word" in failure.left(tmp_path, {"status": "running"})


def test_the_handler_survives_everything(tmp_path, monkeypatch, capsys):
    """Fails if a failure to report one (a file where the folder was, no stderr, a broken message) hides the first."""
    class Odd(Exception):
        def __str__(self):
            return ""

    (tmp_path / "file").touch()
    for out in (None, tmp_path / "file", tmp_path / "gone"):
        assert failure.report(Odd(), "training", out, tmp_path / "no.py") == 1
        assert "FAILED in training: Odd" in capsys.readouterr().err
    (tmp_path / "error.json").mkdir()
    (tmp_path / "log.txt").mkdir()
    assert failure.report(Odd(), "training", tmp_path, None) == 1 and "cannot be written to" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert failure.report(Odd(), "training", None, None) == 1


def test_weights_that_are_cut_off_fail_in_one_line(tmp_path, capsys):
    """Fails if --init_from of a cut-off file ends in a library's words without the file's name."""
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": 4}))
    save_file({"W_enc": torch.zeros(32, 64)}, tmp_path / "sae_weights.safetensors")
    cut(tmp_path / "sae_weights.safetensors", 100)
    assert experiment.main(["--profile=tiny", f"--init_from={tmp_path}", "--num_tokens=0",
                            f"--out_dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'sae_weights.safetensors'} holds no readable weights" in said and "copy it again" in said
