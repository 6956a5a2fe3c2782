"""Where a run says it stands, while it runs and after: progress.json, events.jsonl and the loggers of --log."""

import csv
import json
import os
import signal
import struct
import textwrap
import time

import pytest

import experiment
from runs import failure, folder, live, loggers, training
from runs.clock import Clock
from runs.live import LIVE, Live
from tests.small_run import command, fail_at_checkpoint, start, wait_for

pytestmark = pytest.mark.usefixtures("no_pages")

SETTINGS = dict(log="")
PHASES = ["preflight", "language model", "training", "report", "evals", "results"]


def events(out, kind=None):
    """The events of a run, strict JSON each, all or those of a kind."""
    def refuse(word):
        raise AssertionError(word)

    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [event for event in found if kind in (None, event["event"])]


def progress(out):
    return json.loads((out / "progress.json").read_text(encoding="utf-8"))


def rows_of(out):
    with open(out / "training_log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def opened(tmp_path):
    """A live state in a folder of its own, and what it said."""
    state, said = Live(), []
    state.open(tmp_path, SETTINGS, False, said.append)
    yield state, said
    state.close("finished")


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_finished_run_tells_its_story(reference):
    """Fails if an event is missing, out of order or no strict JSON, or a row is not the training log's."""
    told = events(reference)
    assert [event["phase"] for event in told if event["event"] == "phase"] == PHASES
    assert told[0]["event"] == "start" and told[0]["resumed"] is False and told[0]["settings"]["profile"] == "tiny"
    assert not {"out_dir", "cache_dir", "data_dir"} & told[0]["settings"].keys()
    assert told[-1] | dict(time="") == dict(time="", event="end", status="finished")
    assert [event["name"] for event in told if event["event"] == "eval"] == ["core", "sparse_probing", "sae_probes"]
    log = rows_of(reference)
    assert len(log) > 10
    assert [{column: str(row[column]) for column in log[0]} for row in events(reference, "row")] == log
    warned = " ".join((reference / "log.txt").read_text(encoding="utf-8").split())
    assert events(reference, "warning") and events(reference, "note")
    assert all(f"warning: {event['text']}" in warned for event in events(reference, "warning"))
    end = progress(reference)
    assert (end["status"], end["phase"], end["run"]) == ("finished", "results", reference.name)
    assert end["pid"] == os.getpid() and end["started"] <= end["updated"]
    assert LIVE.out is None and not LIVE.state and not LIVE.loggers  # nothing left over for the next run
    assert not {name for name in folder.digests(reference) if name.startswith(("progress", "events"))}


@pytest.mark.slow
def test_a_failed_and_an_interrupted_run_say_so_and_go_on(tmp_path, cache, reference, monkeypatch):
    """Fails if the status is not how the run ended, a cause is not told, or going on loses the story or a byte."""
    out = tmp_path / "run"
    arguments = command(out, cache)
    fail_at_checkpoint(3, arguments, monkeypatch)
    assert progress(out)["status"] == "failed" and events(out)[-1]["status"] == "failed"
    cause = events(out, "error")[0]
    assert {key: cause[key] for key in cause if key not in ("time", "event")} == json.loads(
        (out / "error.json").read_text(encoding="utf-8"))
    real = training.note

    def note(*given):
        real(*given)
        if given[-1].step >= 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "note", note)
        patch.setattr(live, "PERIOD", 0.0)
        assert experiment.main(arguments) == 128 + signal.SIGTERM
    left = progress(out)
    assert (left["status"], left["phase"]) == ("interrupted", "training")
    # the step in whose row the signal came had been told; there are 38 of 256 tokens each
    assert (left["tokens"], left["total_tokens"], left["share"]) == (20 * 256, 38 * 256, 0.5263)
    assert experiment.main(arguments) == 0
    assert progress(out)["status"] == "finished"
    assert [event["resumed"] for event in events(out, "start")] == [False, True, True]
    assert [event["status"] for event in events(out, "end")] == ["failed", "interrupted", "finished"]
    last = {event["step"]: event["loss"] for event in events(out, "row")}  # of a step told twice the last counts
    assert [str(loss) for loss in last.values()] == [row["loss"] for row in rows_of(reference)]
    assert (out / "final_info.json").read_bytes() == (reference / "final_info.json").read_bytes()


@pytest.mark.slow
def test_a_killed_run_is_found_by_its_process(tmp_path, cache, reference):
    """Fails if what kill -9 leaves does not name the process and the phase."""
    run = start(tmp_path / "run", cache)
    wait_for(tmp_path / "run/training_log.csv", run)
    run.kill()
    run.communicate()
    left = progress(tmp_path / "run")
    assert left["status"] == "running" and left["pid"] == run.pid and left["phase"] in PHASES[2:]


def test_the_seconds_of_a_killed_process_count(tmp_path):
    """Fails if what a process took of the phase in which it was killed is lost, or counted again."""
    spent = {"preflight": 10.0, "training": 30.0}
    before = dict(status="running", phase="training", seconds=spent, seconds_before=25.0)
    assert failure.spent(tmp_path, before) == before["seconds"]  # without a progress.json
    state = dict(started="2026-01-31T12:00:00+00:00", updated="2026-01-31T12:01:00+00:00")
    (tmp_path / "progress.json").write_text(json.dumps(state))
    # a minute, of which 15 s are among the 40 already
    assert failure.spent(tmp_path, before) == {"preflight": 10.0, "training": 75.0}
    assert failure.spent(tmp_path, before | dict(status="interrupted")) == before["seconds"]


# ------------------------------------------------------------------------------------------------ progress


def test_progress_is_written_every_two_seconds_at_most(opened, monkeypatch, tmp_path):
    """Fails if it is written more often than that, or not at once at a phase's beginning, or counts wrongly."""
    state, _ = opened
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    state.phase("evals")
    seen = []
    for _ in state.follow(range(8), "probes", 16, lambda item: 2):
        seen.append((progress(tmp_path)["what"], progress(tmp_path)["what_share"]))
        clock[0] += 0.75
    # written at 100 by the phase; 2 s later, after the third item, and so on
    assert seen == [(None, None)] * 3 + [("probes", 0.375)] * 3 + [("probes", 0.75)] * 2
    state.phase("results")
    assert progress(tmp_path)["phase"] == "results" and progress(tmp_path)["what"] is None


def test_time_left_counts_down_and_is_of_the_steps_and_blocks_to_come(opened, monkeypatch, tmp_path):
    """Fails if the forecast forgets the blocks to be made, or stands still between two writes."""
    state, _ = opened
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    spent = Clock(lap_begun=0.0)
    assert spent.eta(0, 100) is None
    clock[0] = 10.0
    spent.begin_steps(20, 20, 40)  # 10 s for the activations of 20 steps, continued at the block's beginning
    assert spent.eta(20, 100) is None
    clock[0] = 15.0
    assert spent.eta(30, 100) == 70 * 5 / 10 + 60 * 10 / 20
    state.phase("training")
    state.trained(30, 100, spent.eta(30, 100))
    assert progress(tmp_path)["eta_seconds"] == 65.0
    clock[0] = 25.0
    state.trained(40, 100, 55.0)
    state.tracked.append(["activations 2/3", 1, 4])
    clock[0] = 30.0
    state._write()
    assert (progress(tmp_path)["eta_seconds"], progress(tmp_path)["what_share"]) == (50.0, 0.25)


def test_parts_count_for_a_phase_and_not_for_a_snapshot(opened, tmp_path):
    """Fails if the share of the evals is not by those that are through, or a snapshot's evals move training's."""
    state, _ = opened
    state.phase("evals")
    shares = []
    for name in state.parts(["core", "scr"], 2):
        with state.eval(name, 2):
            shares.append((progress(tmp_path)["share"], progress(tmp_path)["what"]))
    assert shares == [(0.0, "eval core, layer 2"), (0.5, "eval scr, layer 2")]
    state.phase("training")
    state.trained(30, 100, None)
    list(state.parts(["core"], 1))
    assert state.state["share"] == 0.3


# ------------------------------------------------------------------------------------------------ events


def test_words_that_were_folded_are_one_event(opened, tmp_path):
    """Fails if a warning of several lines is cut off, runs on into the table, or is joined otherwise than it was."""
    state, _ = opened
    warning = ("not better than a frozen random decoder: sparse_probing.sae_top_1 (0.73 vs 0.72 ± 0.01), core.r2 (.6 "
               "vs .7), a one-off at the very end of what one hundred columns can hold twice")
    lines = textwrap.wrap(f"warning: {warning}", 100, subsequent_indent="    ")
    assert len(lines) > 1
    state.heard("\n" + "\n".join([*lines, "warning: dead", "metric  run_1", "    2 more"]))
    state.heard("note: a\n    b")
    state.heard("nothing to note: here")
    assert [(event["event"], event["text"]) for event in events(tmp_path)[1:]] == [
        ("warning", warning), ("warning", "dead"), ("note", "a b")]


def test_events_are_strict_whatever_a_row_holds(opened, tmp_path):
    """Fails if NaN is written, or a loss term called as a field of the event hides it."""
    state, _ = opened
    state.rows([dict(sae="layer_2", loss=float("nan"), time=3.0, kind=1.0, event=2.0)])
    row = events(tmp_path, "row")[0]
    assert row["loss"] is None and (row["own_time"], row["kind"], row["own_event"]) == (3.0, 1.0, 2.0)


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    """Fails if what goes on writes behind half a line."""
    (tmp_path / "events.jsonl").write_text('{"event": "row"}\n{"event": "ro')
    state = Live()
    state.open(tmp_path, SETTINGS, True, print)
    state.close("failed")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"event": "ro' and [json.loads(line)["event"] for line in lines[2:]] == ["start", "end"]


def test_a_folder_that_cannot_be_written_to_costs_nothing(tmp_path):
    """Fails if a disk that refuses raises, or a folder that was taken away is made anew."""
    (tmp_path / "run/progress.json").mkdir(parents=True)  # no file can take its place
    (tmp_path / "run/events.jsonl").mkdir()
    for out in (tmp_path / "run", tmp_path / "gone"):
        state = Live()
        state.open(out, SETTINGS, False, print)
        state.phase("training")
        state.rows([dict(sae="layer_2", loss=1.0)])
        state.trained(1, 2, 3.0)
        state.close("finished")
    assert not (tmp_path / "gone").exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["events.jsonl", "progress.json"]


# ------------------------------------------------------------------------------------------------ --log


def test_a_logger_that_there_is_not_is_named_at_once():
    """Fails if a name that is none is let through, or the nearest is not named, or one of the two is refused."""
    with pytest.raises(ValueError, match="there is no 'tensorbord'; the nearest is 'tensorboard'"):
        experiment.parse_settings(["--log=wandb,tensorbord"])
    with pytest.raises(ValueError, match="there is no ''"):
        experiment.parse_settings(["--log=wandb,"])
    assert experiment.parse_settings(["--log=tensorboard, wandb"]).log == "tensorboard, wandb"


def test_a_package_that_is_missing_costs_a_note(tmp_path, monkeypatch):
    """Fails if a folder of the package's name passes for it, the line for pip is not said, or the run is stopped."""
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert live.installed("json") and not live.installed("only_a_folder") and not live.installed("no_such_package")
    monkeypatch.setattr(live, "installed", lambda package: False)
    state, said = Live(), []
    state.open(tmp_path, dict(log="wandb"), False, said.append)
    state.begin_loggers(0)
    state.close("finished")
    assert said == ["note: --log wandb: the package wandb is not installed (pip install wandb); "
                    "the run goes on without"]


@pytest.mark.parametrize("where", ["begin", "rows", "means", "close"])
@pytest.mark.parametrize("error", [RuntimeError("no\nway"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("broken", live.LOGGERS)
def test_a_logger_that_raises_costs_itself_alone(tmp_path, monkeypatch, where, error, broken):
    """Fails if its error ends the run, is said other than once, or costs the other logger anything."""
    calls = []

    class Sound:
        def __init__(self, out, settings, tokens):
            self.told("begin", tokens)

        def told(self, *given):
            calls.append(given)

        def rows(self, rows):
            self.told("rows", rows)

        def means(self, means):
            self.told("means", means)

        def close(self, finished):
            self.told("close", finished)

        def leave(self):
            raise RuntimeError("nor that")

    class Broken(Sound):
        def told(self, call, *given):
            if call == where:
                raise error

    monkeypatch.setattr(live, "installed", lambda package: True)
    monkeypatch.setattr(loggers, "KINDS", dict.fromkeys(live.LOGGERS, Sound) | {broken: Broken})
    state, said = Live(), []
    state.open(tmp_path, dict(log="wandb,tensorboard"), False, said.append)
    state.begin_loggers(7)
    row = dict(sae="layer_2", tokens=1, loss=1.0)
    state.rows([row])
    state.rows([row])
    state.means(dict(layer_2=dict(means={"core.l0": 3.0})))
    state.close("failed")
    assert calls == [("begin", 7), ("rows", [row]), ("rows", [row]), ("means", dict(layer_2={"core.l0": 3.0})),
                     ("close", False)]
    words = "RuntimeError: no" if isinstance(error, RuntimeError) else "SystemExit: 3"
    assert said == [f"note: --log {broken}: {words}; the run goes on without"]


@pytest.mark.slow
def test_both_loggers_hold_the_training_log(tmp_path, cache, reference, monkeypatch, capfd):
    """Fails if TensorBoard's or wandb's own files hold other values than training_log.csv and final_info.json, a run
    that was continued tells a step twice, or they change a byte of the result or say a word on stderr.
    """
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    arguments = command(out, cache, "--log=tensorboard,wandb")
    fail_at_checkpoint(3, arguments, monkeypatch)
    failure = capfd.readouterr().err
    assert failure.startswith("FAILED in training") and "wandb" not in failure, failure
    assert experiment.main(arguments) == 0
    captured = capfd.readouterr()
    assert captured.err == "" and "note: --log" not in captured.out
    assert (out / "final_info.json").read_bytes() == (reference / "final_info.json").read_bytes()
    assert folder.digests(out).keys() == folder.digests(reference).keys()

    log, final = rows_of(out), json.loads((out / "final_info.json").read_text())["layer_2"]["means"]
    board = EventAccumulator(str(out / "tensorboard"), size_guidance=dict(scalars=0)).Reload()
    for column in ("loss", "l0", "explained_variance", "dead_share"):
        told = [(event.step, event.value) for event in board.Scalars(f"layer_2/{column}")]
        assert told == [(int(row["tokens"]), fp32(row[column])) for row in log]
    for metric, value in final.items():
        assert value is None or board.Scalars(f"layer_2/{metric}")[-1].value == fp32(value)

    histories, summary = {}, {}
    folders = sorted((out / "wandb").glob("offline-run-*"))
    assert len({path.name.rpartition("-")[2] for path in folders}) == 1  # one id, whatever the number of its parts
    for record in (record for path in folders for record in wandb_records(path)):
        row = items_of(record.history)
        histories[row.get("_step")] = row
        summary |= items_of(record.summary, "update")
    for row in log:
        kept = histories[int(row["tokens"])]
        assert all(kept[f"layer_2/{column}"] == float(row[column]) for column in ("loss", "l0", "dead_share"))
    assert final.items() <= {name.removeprefix("layer_2/"): value for name, value in summary.items()}.items()


def fp32(value) -> float:
    """A number as a file of fp32 gives it back."""
    return struct.unpack("f", struct.pack("f", float(value)))[0]


def items_of(record, field="item") -> dict:
    """{key: value} of a wandb record's items."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in getattr(record, field)}


def wandb_records(path):
    """The records of an offline run: LevelDB's log format (blocks of 32 KiB, of each piece a CRC, its length and
    whether more follows) behind a header of 7 bytes, each a message of wandb's own protocol.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = path.glob("*.wandb")
    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        held += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield wandb_internal_pb2.Record.FromString(held)
            held = b""
