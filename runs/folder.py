"""Manners of a run folder: files appear whole or not at all, and nothing that lies in a folder is ever destroyed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from runs import disk
from runs.reading import finite
from variants.kit.files import digest, file_name, put

PROJECT = Path(__file__).resolve().parent.parent
# of the project: an --out_dir there would move them away
OWN_PARTS = ("variants", "evals", "runs", "tests", ".git", ".ci")
LOCK = ".lock"
# what a run that failed in preflight leaves
NOTHING_BUT_WORDS = {"run_info.json", "error.json", "log.txt", "verdict.json", "progress.json", "events.jsonl"}
RESULTS = ("sae", "eval_results", "variant_report", "snapshots")  # folders that hold results, beside final_info.json
HALF_WRITTEN = (".*.tmp", "sae/.*.tmp", "eval_results/*/.*.tmp", "snapshots/*/eval_results/*/.*.tmp",
                "variant_report/*/.*.tmp", "features/.*.tmp")

# ------------------------------------------------------------------------------------------------ writing


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically: after a crash or a power cut at any moment it is absent, old or new, never partial.

    OSError names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut can leave the new name on an empty file
        put(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk.named(error, path)  # noqa: B904  the same error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: str | Path, value) -> None:
    """Write strict JSON atomically, keys in the order given; NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_report(folder: Path, numbers: dict[str, float], files: dict[str, bytes | str]) -> None:
    """What a variant reports of itself: numbers.json and its own files, all inside `folder`, whatever it calls them.

    A name keeps its folders; what leads out of `folder`, or is no name of a file, is replaced, see
    `variants.kit.files.file_name`.
    """
    for file, content in files.items():
        write = write_bytes if isinstance(content, bytes) else write_text
        write(folder / _inside(str(file)), content)
    write_json(folder / "numbers.json", numbers)


def _inside(name: str) -> str:
    """The name where it is a file's below some folder; else one that is, its ending kept: a picture stays one."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    if parts and "/".join(parts) == name and all(file_name(part) == part for part in parts):
        return name
    ending = Path(name).suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", Path(name).suffix) else ""
    return (file_name(name.removesuffix(ending)).lstrip(".-") or "file") + ending


def write_info(out: Path, info: dict) -> None:
    """run_info.json, with the hash of what it says; FileNotFoundError if the run's folder is no longer there."""
    check_present(out)
    _write_info(out, info)


def _write_info(out: Path, info: dict) -> None:
    write_json(out / "run_info.json", info | dict(sha256=_said(info)))


def mark(out: Path, info: dict, status: str) -> None:
    """Give run_info.json a status if that is possible at all; never raises an OSError.

    On a full disk there is no room for another file: then the word alone is changed in the file that is there.
    """
    file = out / "run_info.json"
    if not out.is_dir():  # taken away: it is not made anew for a word
        return
    try:
        _write_info(out, info | dict(status=status))
        return
    except OSError:
        pass
    with contextlib.suppress(OSError), open(file, "r+b") as opened:
        text = opened.read()
        running, ended = b'"status": "running"', f'"status": "{status}"'.encode()
        if running in text and len(ended) <= len(running):
            opened.seek(text.index(running))
            opened.write(ended.ljust(len(running)))


def check_present(out: Path) -> None:
    """FileNotFoundError, in words, if a running run's folder was deleted or moved: what it writes would be lost."""
    if not (out / LOCK).exists():
        raise FileNotFoundError("\n".join(disk.gone(out)))


def _said(info: dict) -> str:
    """Hash of what a run says of itself. The status is left out: `mark` may change it alone."""
    said = json.dumps(finite({k: v for k, v in info.items() if k not in ("status", "sha256")}), sort_keys=True,
                      ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()


# ------------------------------------------------------------------------------------------------ claiming a folder


def _none(folder: Path, info: dict) -> str:
    """No checkpoint of another run is gone on with."""
    return ""


def next_free(base: str = "run_") -> str:
    """`run_1`, `run_2`, …: the first that does not exist."""
    return next(name for n in itertools.count(1) if not os.path.lexists(name := f"{base}{n}"))


def claim(out_dir: str | Path, fingerprint: str, training: str = "", prolongs: Callable[[Path, dict], str] = _none):
    """Make `out_dir` this process's own, till it releases the lock or ends: ("new" | "resume" | "finished", lock).

    The folder of the same `fingerprint` (as its run_info.json says) is kept: "finished" if its status says so,
    final_info.json is there and no result was damaged since, else "resume"; so is an unfinished one whose `training`
    fingerprint is the same. Any other content is moved to `<out_dir>.previous-N`. Where `prolongs`, given the folder
    and its run_info.json, names a checkpoint in it, that is brought to the new folder, and it is "resume" there.
    RuntimeError: another process has it. ValueError: not a place for a run. PermissionError: cannot be written.
    """
    folder = _allowed(Path(out_dir))
    lock = _lock(folder, out_dir)
    try:
        return _state(folder, out_dir, fingerprint, training, prolongs), lock
    except BaseException:
        lock.release()
        raise


def left(out_dir: str | Path) -> dict:
    """What an earlier run in the folder says of itself (its run_info.json), or {}; if damaged only whose run it is."""
    info = _load(Path(out_dir) / "run_info.json")
    if info.get("sha256", _said(info)) == _said(info):
        return info
    return dict(fingerprint=info.get("fingerprint"), status="damaged")


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the files that hold a run's results, by their path in its folder."""
    files = [out / "final_info.json", *(p for name in RESULTS for p in sorted((out / name).rglob("*")) if p.is_file())]
    return {str(file.relative_to(out).as_posix()): digest(file) for file in files}


def free_for_words(out_dir: str | Path):
    """(the folder, its lock) where nothing but failed runs' words lie in it; else (None, None): no run is disturbed."""
    try:
        folder = _allowed(Path(out_dir))
        if folder.is_dir() and not set(_content(folder)) <= NOTHING_BUT_WORDS:  # not even by a lock
            return None, None
        lock = _lock(folder, out_dir)
    except (OSError, ValueError, RuntimeError):  # not a place for a run, or one that is in use
        return None, None
    if set(_content(folder)) <= NOTHING_BUT_WORDS:
        return folder, lock
    lock.release()
    return None, None


def place(out_dir: str | Path) -> Path | None:
    """The folder that a run's --out_dir means, there or not, or None where a run has no business."""
    try:
        return _allowed(Path(out_dir))
    except (OSError, ValueError):
        return None


def _lock(folder: Path, out_dir):
    """Make the folder and lock it. Its owner may be moving it aside meanwhile: then a path is gone or another's."""
    import filelock

    path = folder / LOCK
    lock = filelock.FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # it was there, and then it was not
        raise _in_use(out_dir) from None
    except OSError as error:
        raise _unwritable(out_dir, error) from None
    try:
        while True:
            path.touch()
            before = path.stat()
            lock.acquire(timeout=0)
            if os.path.samestat(before, path.stat()):
                return lock
            lock.release()  # a file that no longer lies here: the lock would guard nothing
    except (filelock.Timeout, FileNotFoundError):
        raise _in_use(out_dir) from None
    except OSError as error:
        raise _unwritable(out_dir, error) from None


def _state(folder: Path, out_dir, fingerprint: str, training: str, prolongs: Callable[[Path, dict], str]) -> str:
    try:
        for leftover in [file for pattern in HALF_WRITTEN for file in folder.glob(pattern)]:
            _remove(leftover)  # of a process killed while writing; under the lock nobody writes them
        if _content(folder):
            info = left(folder)
            if info.get("fingerprint") == fingerprint:
                harmed = _harmed(folder, info)
                if harmed:
                    print(f"{out_dir}: damaged, and made again: {', '.join(harmed)}", flush=True)
                return "finished" if info.get("status") == "finished" and not harmed else "resume"
            if training and info.get("training_fingerprint") == training and info.get("status") != "finished":
                return "resume"  # trained alike: what has changed is measured of the SAEs anew
            if not info or info.get("status") == "damaged":
                _say_unreadable(folder, out_dir)
            if info.get("status") == "failed" and set(_content(folder)) <= NOTHING_BUT_WORDS:
                # failed before it did anything: a typo a minute would leave a folder each
                for name in _content(folder):
                    (folder / name).unlink()
                return "new"
            name = prolongs(folder, info)
            aside = _move_away(folder, out_dir)
            if name:
                _bring(aside, name, folder, info, dict(fingerprint=fingerprint, training_fingerprint=training))
                return "resume"
    except OSError as error:
        raise _unwritable(out_dir, error) from None
    return "new"


def _bring(aside: Path, name: str, folder: Path, before: dict, marks: dict) -> None:
    """Make a new folder that of a run which was left in training, at a checkpoint of the run moved aside.

    Its record comes first: a process killed in between leaves a run that begins at its first step.
    """
    from runs import checkpoint  # it imports torch

    had = before["settings"]["num_tokens"]
    _write_info(folder, marks | dict(status=f"prolonged from {had:,} tokens", phase="training"))
    try:
        checkpoint.bring(aside / name, folder)
    except OSError as error:
        print(f"{name} cannot be brought here ({error.strerror or error}): trained from the start", flush=True)
        return
    if before.get("status") == "finished":  # one that is not can still be ended as it was meant
        (aside / name).unlink(missing_ok=True)


def _harmed(folder: Path, info: dict) -> list[str]:
    """Files of a run that are not as it left them. What is missing was deleted by its user, but for final_info.json."""
    if info.get("status") == "damaged":
        return ["run_info.json"]
    if info.get("status") != "finished":
        return []
    final = [] if _load(folder / "final_info.json") else ["final_info.json"]
    files = {name: total for name, total in info.get("files", {}).items()
             if name not in final and (folder / name).is_file()}
    return final + [name for name, total in files.items() if digest(folder / name) != total]


def _say_unreadable(folder: Path, out_dir) -> None:
    if (folder / "run_info.json").exists():
        print(f"{out_dir}: run_info.json is damaged (cut off or garbled), so it cannot be told whether this is the "
              "same run", flush=True)


def _remove(leftover: Path) -> None:
    if leftover.is_dir():
        shutil.rmtree(leftover)
    else:
        leftover.unlink()


def _content(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name != LOCK]


def _load(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _move_away(folder: Path, out_dir) -> Path:
    """Rename the locked folder as a whole and put an empty one, with the same lock file, in its place. Returns where.

    The rename is atomic, so a kill never splits a run between two folders. The lock file is linked back and not made
    anew: a process that opened it before the rename still finds it held. One that made a folder and a lock of its own
    in between makes the link fail, and has won. The moved folder keeps its link: an open() that is on its way into it
    must find the lock that is held, and not make one.
    """
    target = next(t for n in itertools.count(1) if not os.path.lexists(t := Path(f"{folder}.previous-{n}")))
    os.rename(folder, target)
    print(f"{out_dir} holds another run: moved to {target}", flush=True)
    try:
        folder.mkdir(exist_ok=True)
        os.link(target / LOCK, folder / LOCK)
    except FileExistsError:
        raise _in_use(out_dir) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or os.path.lexists(folder / LOCK):
            raise
        os.rename(target / LOCK, folder / LOCK)  # a file system without hard links
    return target


def _allowed(path: Path) -> Path:
    """The folder that `path` means, links resolved; ValueError where a run has no business."""
    try:
        folder, here = path.resolve(), Path.cwd().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"--out_dir {path} cannot be resolved: {error}\n{_ADVICE}") from None
    wrong = None
    if _is_file(folder):
        wrong = "is a file"
    elif folder == here or folder in here.parents:
        wrong = "is or contains the current folder"
    elif folder == PROJECT or folder in PROJECT.parents:
        wrong = "is or contains the project's folder"
    elif PROJECT in folder.parents and folder.relative_to(PROJECT).parts[0] in OWN_PARTS:
        wrong = f"lies in the project's own folder {folder.relative_to(PROJECT).parts[0]}/"
    elif os.path.ismount(folder):
        wrong = "is a mount point, which cannot be moved aside"
    if wrong:
        raise ValueError(f"--out_dir {path} {wrong}" + (f" ({folder})" if folder != path else "") + f"\n{_ADVICE}")
    return folder


def _is_file(path: Path) -> bool:
    try:
        return not stat.S_ISDIR(path.stat().st_mode)  # one call: between two, another process may move the folder
    except OSError:
        return False


_ADVICE = "give a folder of its own for the run, for example --out_dir=run_1"


class InUse(RuntimeError):
    """Another process runs there."""


def _in_use(out_dir) -> InUse:
    return InUse(f"{out_dir} is in use by another running process\n"
                        "wait for it to end, or give another --out_dir")


def _unwritable(out_dir, error: OSError) -> OSError:
    known = disk.explained(disk.named(error, out_dir), None)
    if known:
        return OSError("\n".join([f"cannot write to --out_dir {known[0]}", known[1].partition(";")[0]]))
    return PermissionError(f"cannot write to --out_dir {out_dir}: {error.strerror or error}\n"
                           "give a folder on a disk you can write to")
