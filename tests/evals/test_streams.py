"""Reading documents: formats, splits, bad rows, cursors, what is kept of the hub, which is a list of rows here."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

from evals.storage import network
from evals.texts import hub, packing, splits, streams, text_files
from evals.texts.source import Source
from tests.evals.stand_ins import two_at_once

TEXTS = ["The first one.", "Zwei\u2028Zeilen, \"so\" genannt", "trois\nlignes", "四つ", "five, and a comma", "last"]
DOCUMENTS = ["The first one.\nIn two lines.", "Zwei.", "trois", "last"]  # of text files, where a blank line parts them


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("", "text"), *enumerate(TEXTS)])  # as pandas writes an index


def frame():
    import pandas

    return pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})


def saved(path, splits=None):
    import datasets

    whole = datasets.Dataset.from_dict({"text": TEXTS})
    if splits:
        whole = datasets.DatasetDict({"train": whole, "test": whole.select([0])})
    whole.save_to_disk(path, num_shards=None)


def compressed(path, text):
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else zstandard.compress(raw))


def arrow(path):
    import datasets

    datasets.Dataset.from_pandas(frame()).save_to_disk(path.parent / "made")
    (path.parent / "made" / "data-00000-of-00001.arrow").rename(path)


ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
WRITERS = {
    "a.jsonl": lambda path: path.write_text(lines(ROWS), encoding="utf-8-sig"),
    "a.jsonl.zst": lambda path: compressed(path, lines(ROWS)),
    "a.jsonl.gz": lambda path: compressed(path, lines(ROWS)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(lines(ROWS)),
    "a.json.gz": lambda path: compressed(path, json.dumps(ROWS)),
    "a.csv": table,
    "a.tsv": lambda path: table(path, "\t"),
    "a.parquet": lambda path: frame().to_parquet(path, row_group_size=2),
    "a.arrow": arrow,
    "saved": saved,
    "dict": lambda path: saved(path, splits=True),
    "a.txt": lambda path: path.write_text("\n\n".join(DOCUMENTS)),
    "a.txt.gz": lambda path: compressed(path, "\n\n".join(DOCUMENTS)),
    "Lines [1].txt": lambda path: path.write_text("\n".join(TEXTS[3:]) + "\n\n"),  # blank lines at its end part nothing
}


def expected(name):
    if name.startswith("Lines"):
        return TEXTS[3:]
    return DOCUMENTS if ".txt" in name else TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_its_documents_and_goes_on_after_each_of_them(tmp_path, name):
    """Fails if a format is read wrongly, a row breaks at another sign than \\n, or a cursor repeats or drops any."""
    WRITERS[name](tmp_path / name)
    path, want = str(tmp_path / name), expected(name)
    for n in range(len(want) + 1):
        stream = streams.Stream(path)
        assert list(itertools.islice(stream, n)) == want[:n]
        again = streams.Stream(path, state=json.loads(json.dumps(stream.state())))
        assert list(again) == want[n:] and stream.skipped == again.skipped == {}


def test_a_folder_of_compressed_files_in_several_parts(tmp_path):
    """Fails if the order of files is not numpy's shuffle by 42 of the sorted ones, or, asked for, their own."""
    for i in range(4):
        compressed(tmp_path / f"{i}.jsonl.{'gz' if i % 2 else 'zst'}", lines([{"text": f"{i} {r}"} for r in range(3)]))
    texts = [f"{i} {r}" for i in (3, 2, 1, 0) for r in range(3)]
    assert list(streams.Stream(str(tmp_path))) == texts
    assert list(streams.Stream(str(tmp_path), shuffled=False)) == sorted(texts)


# ------------------------------------------------------------------------------------------------ splits


def path_of(folder, name):
    """The .jsonl file of that name, in which __ stands for /."""
    return folder / (name.replace("__", "/") + ".jsonl")


def write(folder, **files):
    """{name as `path_of` takes it: its only text} as .jsonl files."""
    for name, text in files.items():
        path = path_of(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines([{"text": text}]))


@pytest.mark.parametrize("layout", [
    ("train-0", "validation-0", "test-0"), ("train__a", "validation__a", "test__a"),
    ("data__train-00000-of-00001", "data__dev-00000-of-00001", "data__test-00000-of-00001")])
def test_only_the_train_split_is_read_and_what_is_left_out_is_said_once(tmp_path, capsys, layout):
    """Fails if another split is read, in any layout that `datasets` knows, or the line is missing or repeated."""
    folder = tmp_path / "test [1]" / "validation"  # names of the folders above say nothing
    write(folder, **dict(zip(layout, ("trained on", "validation", "test"))))
    for _ in range(2):
        assert list(streams.Stream(str(folder))) == ["trained on"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("texts: ")]
    assert len(said) == 1 and f"{folder}: 1 file of the train split (" in said[0] and said[0].count("test") >= 2
    path_of(folder, layout[0]).unlink()
    with pytest.raises(ValueError, match=r"has no train split; its splits: .*(validation|dev).*\n"):
        streams.Stream(str(folder))


def test_a_copy_of_a_hub_repository_follows_its_readme(tmp_path):
    """Fails if the files of several configurations are mixed although README.md names the default one."""
    write(tmp_path, big__train="big", small__train="small", small__test="test")
    small, big = (f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.jsonl\n"
                  for name in ("small", "big"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{small}  default: true\n{big}---\n# Read me\n")
    assert list(streams.Stream(str(tmp_path))) == ["small"]


def test_names_of_the_hub_and_paths():
    """Fails if a configuration or split is taken from the wrong place, or a drive or path for a name on the hub."""
    assert text_files.on_hub("o/n") == ("o/n", None, "train") and text_files.on_hub("o/n:c") == ("o/n", "c", "train")
    assert text_files.on_hub("o/n:c:s") == ("o/n", "c", "s") and text_files.on_hub("o/n::test") == ("o/n", None, "test")
    with pytest.raises(ValueError, match="owner/name:config:split"):
        text_files.on_hub("a:b:c:d")
    paths = ("C:\\texts", "c:/texts", "~/x", "/x", "./o/n", "a/b/c", "o/n.jsonl.zst", "n.txt")
    assert all(map(text_files.is_path, paths))
    assert not any(map(text_files.is_path, ("o/n", "o/n:c", "o/n:a.b:test", "o/c4:en/x", "name")))


# ------------------------------------------------------------------------------------------------ bad rows


BAD = ['{"text": null}', '{"text": 7}', '{"other": "x"}', '{"text": "  "}', '{"text": "\\ud800"}', "no JSON", "[1]",
       '{"text": {"a": 1}}', "", '{"text": []}', '"text"', '{"text": "cut']
COUNTS = {"null": 1, "not text": 2, "missing": 1, "empty": 2, "lone surrogate": 1, "not JSON": 4}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_bad_rows_are_passed_over_and_counted(tmp_path, suffix):
    """Fails if a bad row raises, is handed out, changes a neighbour, or is not counted (a blank line is no row)."""
    path, good = tmp_path / f"a{suffix}", [f"good {i}" for i in range(300)]
    bad = "".join(f"{line}\n" for line in BAD)
    text = lines([{"text": row} for row in good]) + bad + lines([{"text": "more", "new": [1]}])
    if suffix.endswith("gz"):
        compressed(path, text)
    else:
        path.write_text(text)
    stream = streams.Stream(str(path))
    assert list(stream) == [*good, "more"] and stream.skipped == COUNTS
    source = Source("tiny", dataset=str(path))
    assert source.skipped == {} and list(source.documents("heldout")) and source.skipped == COUNTS
    list(source.documents("train"))
    assert source.skipped == COUNTS  # a row met twice is one row


def test_bad_items_of_an_array_tables_and_bytes(tmp_path):
    """Fails if mixed types in a JSON array turn texts into JSON, or a table's gap, a wrong line or bad UTF-8 raises."""
    import pandas

    rows = [{"text": "one"}, {"text": 7}, "x", {"text": None}, {"text": "two", "x": [1]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    stream = streams.Stream(str(tmp_path / "a.json"))
    assert list(stream) == ["one", "two"] and stream.skipped == {"not text": 1, "not JSON": 1, "null": 1}
    (tmp_path / "b.csv").write_bytes(b"id,text\n1,one\n2,\n3,four,too,many\n4,sch\xf6n\n5,7\n6,NA\n")
    stream = streams.Stream(str(tmp_path / "b.csv"))
    assert list(stream) == ["one", "sch\ufffdn", "7", "NA"] and stream.skipped == {"empty": 1}
    pandas.DataFrame({"text": ["one", None, "", "two"]}).to_parquet(tmp_path / "c.parquet")
    stream = streams.Stream(str(tmp_path / "c.parquet"))
    assert list(stream) == ["one", "two"] and stream.skipped == {"null": 1, "empty": 1}
    rows = [f"{i},{'7' * 100}\n" for i in range(6000)] + ["x,text\n"]  # pandas guesses the types of 256 KiB at a time
    (tmp_path / "big.csv").write_text("id,text\n" + "".join(rows))
    assert list(streams.Stream(str(tmp_path / "big.csv"))) == ["7" * 100] * 6000 + ["text"]
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "sch\xf6n"}\n{"text": "ok"}\n')
    assert list(streams.Stream(str(tmp_path / "d.jsonl"))) == ["sch\ufffdn", "ok"]
    (tmp_path / "e.txt").write_bytes(b"sch\xf6n\n\nok")
    assert list(streams.Stream(str(tmp_path / "e.txt"))) == ["sch\ufffdn", "ok"]


def test_only_a_column_without_any_text_is_an_error(tmp_path):
    """Fails if the wrong column is read to the end, or one that begins with 999 gaps is refused."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"a": "x", "b": "y", "ids": [1], "n": 1}] * 3))
    with pytest.raises(ValueError, match=r"^.*a\.jsonl has no text in the column 'text'\n"
                                         r"give --text_field; columns with text: a, b, ids$"):
        next(streams.Stream(str(path)))
    path.write_text(lines([{"a": "x"}] * 1000 + [{"text": "late"}]))
    with pytest.raises(ValueError, match="columns with text: a$"):
        next(streams.Stream(str(path)))
    path.write_text(lines([{"a": "x"}] * 999 + [{"text": "in time"}] + [{"a": "x"}] * 2000))
    assert list(streams.Stream(str(path))) == ["in time"]


# ------------------------------------------------------------------------------------------------ token ids


class Words:
    """A tokenizer: a word is its length; it counts its calls."""

    calls = 0

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        self.calls += 1
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    def decode(self, ids):
        return " ".join("x" * i for i in ids)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_token_ids_are_documents(tmp_path, suffix):
    """Fails if ids do not come as they are, ids mixed with others pass, or the held-out rule cannot part them."""
    import pandas

    rows = [{"input_ids": [1, i, 3]} for i in range(200)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_text(lines([*rows, {"input_ids": [1, "x"]}]))
    else:
        pandas.DataFrame(rows).to_parquet(path)
    stream = streams.Stream(str(path), "input_ids")
    assert list(stream) == [row["input_ids"] for row in rows]
    assert stream.skipped == ({"not text": 1} if suffix == ".jsonl" else {})
    source = Source("tiny", dataset=str(path), text_field="input_ids")
    train, heldout = list(source.documents("train")), list(source.documents("heldout"))
    assert len(train) + len(heldout) == 200 and 0 < len(heldout) < 40
    assert heldout == [ids for ids in (row["input_ids"] for row in rows)
                       if hashlib.sha256(json.dumps(ids).encode()).digest()[0] < 13]
    looked = streams.look(str(path), "input_ids", 200)
    assert looked.pretokenised and looked.length == 3 and looked.columns == ["input_ids"]
    with pytest.raises(ValueError, match="token id 199, the model's tokenizer has 199\n"):
        streams.look(str(path), "input_ids", 199)


def test_texts_and_token_ids_are_packed_alike():
    """Fails if ids lose more than one leading BOS or keep it, order is lost, or texts take more than one call."""
    tokenizer = Words()
    documents = ["a bb", [9, 1, 2], [1, 9], "ccc", [9]]
    assert packing.ids_of(documents, tokenizer, 9) == [[1, 2], [1, 2], [1, 9], [3], []] and tokenizer.calls == 1
    assert packing.ids_of([[9, 1]], tokenizer) == [[9, 1]] and tokenizer.calls == 1
    rows = packing.pack([[9, 1, 2], "ccc dddd", [7, 8]], tokenizer, 5, 9)
    assert rows.tolist() == [[9, 1, 2, 9, 3], [9, 4, 9, 7, 8]]


# ------------------------------------------------------------------------------------------------ identity


def test_identity_is_of_content(tmp_path):
    """Fails if a name above the files or a time enters it, or a changed byte of the same size and time does not."""
    for folder in ("a", "b"):
        write(tmp_path / folder, x="one", y="two")
    os.utime(tmp_path / "b" / "x.jsonl", (1, 1))
    first = text_files.identity(str(tmp_path / "a"))
    assert first == text_files.identity(str(tmp_path / "b")) == json.loads(json.dumps(first))
    assert text_files.identity(str(tmp_path / "a" / "x.jsonl")) != text_files.identity(str(tmp_path / "a" / "y.jsonl"))
    (tmp_path / "other.jsonl").write_bytes((tmp_path / "a" / "x.jsonl").read_bytes())
    assert text_files.identity(str(tmp_path / "other.jsonl")) == text_files.identity(str(tmp_path / "a" / "x.jsonl"))
    path = tmp_path / "a" / "x.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and text_files.identity(str(tmp_path / "a")) != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text files\n"):
        text_files.identity(str(tmp_path / "empty"))


def test_a_cursor_of_other_texts_is_refused(tmp_path):
    """Fails if a run goes on in a file that has become another one, or is refused for a file that was only moved."""
    write(tmp_path, a="one")
    stream = streams.Stream(str(tmp_path / "a.jsonl"))
    state = stream.state()
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert list(streams.Stream(str(tmp_path / "b.jsonl"), state=state)) == ["one"]
    write(tmp_path, b="two")
    with pytest.raises(ValueError, match=r"b\.jsonl are not those that this run began with\n.*another --out_dir"):
        streams.Stream(str(tmp_path / "b.jsonl"), state=state)


# ------------------------------------------------------------------------------------------------ the hub


class Shard:
    """Rows of one file; `fail` says what to raise before a row."""

    def __init__(self, rows, fail):
        self.rows, self.fail, self.at = rows, fail, 0

    def __iter__(self):
        while self.at < len(self.rows):
            self.fail(self.at)
            self.at += 1
            yield self.rows[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.fixture
def far(monkeypatch):
    """A data set of the hub, 3 files of 1,500 rows; `opened` lists the files opened, `resolved` what was asked for."""
    def line(i, r):
        return json.dumps({"text": f"{i} {r}" if r % 10 else None})

    files = {f"hf://datasets/o/n@c1/{i}.jsonl": [{"text": line(i, r)} for r in range(1500)] for i in range(3)}
    at = SimpleNamespace(opened=[], resolved=[], fail=lambda row: None, files=files)

    def open_file(file, module, options):
        at.opened.append(file)
        return Shard(files[file], at.fail)

    def resolve(*key):
        at.resolved.append(key)
        return [{"train": list(files), "test": list(files)[:1]}, "json", {}, dict.fromkeys(files, 1000)]

    monkeypatch.setattr(streams, "open_file", open_file)
    monkeypatch.setattr(network, "nearby", lambda file: file)
    monkeypatch.setattr(text_files, "_resolve_on_hub", resolve)
    monkeypatch.setattr(text_files, "_resolved", {})
    monkeypatch.setattr(network, "PINNED", {("dataset", "o/n"): "c1"})
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    network._cache.cache_clear()
    return at


def of_far(far, order=(2, 1, 0)):
    return [f"{i} {r}" for i in order for r in range(1500) if r % 10]


def shuffled(n):
    order = list(range(n))
    np.random.default_rng(42).shuffle(order)
    return order


def test_the_hub_is_read_once(tmp_path, far):
    """Fails if a second run or a resume, at any border, opens or lists files again, or gets other documents."""
    want = of_far(far, shuffled(3))
    stream = streams.Stream("o/n", cache_dir=tmp_path)
    assert list(stream) == want and len(far.opened) == 3 and far.resolved == [("o/n", None, "c1")]
    assert stream.skipped == {"null": 450}
    far.opened.clear(), far.resolved.clear(), text_files._resolved.clear()
    borders = [57, 172, 403, 864]  # documents, nine of ten rows, of segments of 64, 128, 256 and 512 rows
    around = [border + step for border in borders for step in (-1, 0, 1)]
    for n in (0, 1, *around, 1349, 1350, len(want) - 1, len(want)):
        stream = streams.Stream("o/n", cache_dir=tmp_path)
        assert list(itertools.islice(stream, n)) == want[:n]
        assert list(streams.Stream("o/n", state=json.loads(json.dumps(stream.state())), cache_dir=tmp_path)) == want[n:]
    assert far.opened == [] and {p.name.split("-")[0] for p in (tmp_path / "texts").iterdir()} == {"texts", "files"}


def test_a_column_may_begin_with_nothing(tmp_path, far):
    """Fails if a hub data set whose first segment holds no text is refused, or one that never does is not."""
    for rows in far.files.values():
        rows[:300] = [{"text": json.dumps({"text": None, "body": "b"})}] * 300
    documents = list(streams.Stream("o/n", cache_dir=tmp_path))
    assert documents == [text for text in of_far(far, shuffled(3)) if int(text.split()[1]) >= 300]
    assert streams.look("o/n", cache_dir=tmp_path).columns == ["body"]
    with pytest.raises(ValueError, match="no text in the column 'title'\n.*columns with text: body, text"):
        next(streams.Stream("o/n", "title", cache_dir=tmp_path))


def test_without_a_cache_or_with_a_part_of_it_the_documents_are_the_same(tmp_path, far):
    """Fails if going on without what was kept begins anew, or opens files that lie behind."""
    want = of_far(far, shuffled(3))
    for cache in (None, tmp_path):
        stream = streams.Stream("o/n", cache_dir=cache)
        assert list(itertools.islice(stream, 2000)) == want[:2000]
        state = stream.state()
        for path in tmp_path.glob("texts/*"):
            path.unlink()
        far.opened.clear()
        assert list(streams.Stream("o/n", state=state, cache_dir=cache)) == want[2000:]
        assert len(far.opened) == 2  # the file in which it stands, and the last
    kept = sorted((tmp_path / "texts").glob("texts-*"))
    kept[0].unlink(), kept[1].write_bytes(b"not safetensors")
    assert list(streams.Stream("o/n", cache_dir=tmp_path)) == want


def test_failures_that_pass_cost_a_wait_and_no_document(tmp_path, far):
    """Fails if a connection broken in a file raises, repeats or drops rows, or a lasting failure does not raise."""
    broken = iter([True] * 5)

    def fail(row):
        if row in (500, 1030, 1499) and next(broken, False):
            raise ConnectionError("cut")

    far.fail = fail
    assert list(streams.Stream("o/n", cache_dir=tmp_path)) == of_far(far, shuffled(3)) and next(broken, None) is None

    def deny(row):
        raise OSError("wrong magic")

    far.fail = deny
    with pytest.raises(OSError, match="cannot read the data set o/n: wrong magic\n"):
        next(streams.Stream("o/n"))


def test_two_at_once_fill_the_same_segments(tmp_path, far):
    """Fails if two readers of one cache get in each other's way."""
    results = two_at_once(lambda: list(streams.Stream("o/n", cache_dir=tmp_path)))
    assert results == [of_far(far, shuffled(3))] * 2


def test_what_is_kept_depends_on_commit_column_split_and_order(tmp_path, far, monkeypatch):
    """Fails if another commit, column, split or order is answered with what was kept of the first."""
    assert next(streams.Stream("o/n", cache_dir=tmp_path)).startswith(f"{shuffled(3)[0]} ")
    assert next(streams.Stream("o/n", cache_dir=tmp_path, shuffled=False)) == "0 1"
    assert next(streams.Stream("o/n::test", cache_dir=tmp_path)) == "0 1"
    with pytest.raises(ValueError, match="no text in the column 'body'"):
        next(streams.Stream("o/n", "body", cache_dir=tmp_path))
    with pytest.raises(ValueError, match="o/n:c:dev has no dev split; its splits: train, test\n"
                                         "write for example o/n:c:train"):
        next(streams.Stream("o/n:c:dev", cache_dir=tmp_path))
    state = streams.Stream("o/n").state()
    monkeypatch.setitem(network.PINNED, ("dataset", "o/n"), "c2")
    for rows in far.files.values():
        rows[1] = {"text": '{"text": "changed"}'}
    assert next(streams.Stream("o/n", cache_dir=tmp_path)) == "changed"
    with pytest.raises(ValueError, match="not those that this run began with\n"):
        streams.Stream("o/n", state=state)


def test_a_configuration_that_is_not_there_is_named_with_those_that_are():
    """Fails if the message of `datasets` loses the configurations, or another ValueError is laid to the network."""
    error = text_files.refused(ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"), "o/n", "x")
    assert isinstance(error, ValueError)
    assert str(error) == "o/n has no configuration 'x'\nwrite for example o/n:a; there are a, b"
    missing = ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample")
    error = text_files.refused(missing, "o/n")
    assert str(error).splitlines()[0] == "o/n has several configurations"
    same = ValueError("probing class")
    assert text_files.refused(same, "o/n") is same


def test_values_are_kept_by_what_they_depend_on(tmp_path, far):
    """Fails if a value is made twice, or given for other settings or another commit."""
    made = []

    def make():
        made.append(len(made))
        return {"n": made[-1], "text": "ü \ud800", "pair": (1, 2)}

    for _ in range(2):
        kept = network.kept(tmp_path, "probing", {"a": 1}, make, ["o/n"])
        assert kept == {"n": 0, "text": "ü \ud800", "pair": [1, 2]}
    assert network.kept(tmp_path, "probing", {"a": 2}, make, ["o/n"])["n"] == 1
    network.PINNED["dataset", "o/n"] = "c2"
    assert network.kept(tmp_path, "probing", {"a": 1}, make, ["o/n"])["n"] == 2
    assert network.kept(None, "probing", {"a": 1}, make, ["o/n"]) == {"n": 3, "text": "ü \ud800", "pair": [1, 2]}


def test_drawn_probing_sets_are_kept(tmp_path, far, monkeypatch):
    """Fails if a second run draws again, a broken stream is not read anew, or other sizes get the first texts."""
    calls = []

    def draw(n_train, n_test):
        calls.append((n_train, n_test))
        if len(calls) == 1:
            raise ConnectionError("cut")
        return {"0": {"train": ["t"] * n_train, "test": ["u"] * n_test}}

    monkeypatch.setattr(hub, "PROBING", {"o/n": draw})
    source = Source("hub", "o/n", cache_dir=tmp_path)
    config = {"probe_train_set_size": 4, "probe_test_set_size": 2}
    first = source.probing(config)
    assert first == {"o/n": {"0": {"train": ["t", "t"], "test": ["u"]}}} and calls == [(2, 1)] * 2
    assert source.probing(config) == first and len(calls) == 2
    assert len(source.probing({**config, "probe_train_set_size": 8})["o/n"]["0"]["train"]) == 4


# ------------------------------------------------------------------------------------------------ a look before the run


def test_a_look_tells_columns_size_and_what_would_stop_the_run(tmp_path):
    """Fails if a look reads more than the first rows, or passes a wrong column, an empty file, a missing codec."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": "four", "title": "t", "n": 1}] * 5))
    assert streams.look(str(path)) == (["text", "title"], False, path.stat().st_size, 4)
    with pytest.raises(ValueError, match="columns with text: text, title$"):
        streams.look(str(path), "body")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b\.jsonl is empty: 0 bytes in 1 file\n"):
        streams.look(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl.lz4").write_text("")
    with pytest.raises(ValueError, match=r"c\.jsonl\.lz4 needs the package lz4\npip install lz4"):
        streams.look(str(tmp_path / "c.jsonl.lz4"))


def test_a_look_at_the_hub_reads_one_segment_once(tmp_path, far):
    """Fails if a look opens more than the first file, leaves nothing for the run, or loses the columns."""
    looked = streams.look("o/n", cache_dir=tmp_path)
    assert looked == (["text"], False, 3000, 3) and len(far.opened) == 1
    streams.look("o/n", cache_dir=tmp_path)
    assert len(far.opened) == 1


def test_held_out_tokens_are_counted_only_where_they_may_lack(tmp_path):
    """Fails if a large file is read to the end, a count is off, or the held-out share of a file is forgotten."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": f"one two {i}"} for i in range(400)]))
    source, tokenizer = Source("tiny", dataset=str(path)), Words()
    heldout = len(list(source.documents("heldout")))
    assert source.held_out_tokens(tokenizer, 10**6) == 3 * heldout > 30
    assert source.held_out_tokens(tokenizer, 3 * heldout) == 3 * heldout and source.held_out_tokens(tokenizer, 2) == 2
    size, calls = path.stat().st_size, tokenizer.calls
    ample = size * 13 // 256 // 32
    assert source.held_out_tokens(tokenizer, ample) == ample > 0 and tokenizer.calls == calls
    source.held_out_tokens(tokenizer, ample + 1)
    assert tokenizer.calls > calls
    (tmp_path / "b.jsonl").write_text(lines([{"text": "others"}]))
    calls, whole = tokenizer.calls, Source("tiny", dataset=str(tmp_path / "b.jsonl"), core_dataset=str(path))
    assert whole.held_out_tokens(tokenizer, size // 32) == size // 32 and tokenizer.calls == calls
    assert Source("tiny").held_out_tokens(tokenizer, 50) == 50


def test_the_same_texts_by_another_name_are_the_same(tmp_path, monkeypatch):
    """Fails if held-out texts are trained on, as a path is spelt another way or a folder holds the other's file."""
    texts = [{"text": f"document {i}"} for i in range(300)]
    (tmp_path / "a.jsonl").write_text(lines(texts))
    (tmp_path / "copy.jsonl").write_text(lines(texts))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.jsonl").write_text(lines(texts))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    train = [t["text"] for t in texts if not splits.held_out(t["text"])]
    for other in ("a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl"), "copy.jsonl", "folder/", "link.jsonl"):
        source = Source("tiny", dataset="a.jsonl", core_dataset=other)
        assert list(source.documents("train")) == train and not set(source.documents("heldout")) & set(train)
    (tmp_path / "folder/y.jsonl").write_text(lines([{"text": "more"}]))
    with pytest.raises(ValueError, match=r"both hold .*a\.jsonl: what is trained on would be measured on\n"):
        text_files.shared.cache_clear()
        Source("tiny", dataset="a.jsonl", core_dataset="folder").look()
    (tmp_path / "other.jsonl").write_text(lines([{"text": "more"}]))
    assert len(list(Source("tiny", dataset="a.jsonl", core_dataset="other.jsonl").documents("train"))) == 300


@pytest.mark.parametrize("name, content, words", [
    ("cut.jsonl.zst", zstandard.compress(b'{"text": "a b c"}\n' * 90_000)[:-40],
     r"cut off or no zstd file \([\d,]+ bytes\)\ncopy it"),
    ("no.jsonl.zst", b'{"text": "a"}\n', "cut off or no zstd file"),
    ("wide.txt", "some text\n\nand more".encode("utf-16"), "is UTF-16 or binary, not UTF-8\n.*iconv"),
    ("wide.jsonl", ('{"text": "a"}\n' * 9).encode("utf-16-le"), "is UTF-16 or binary"),
    ("latin.txt", "déjà vu, à côté\n\nété\n".encode("latin-1") * 50, r"is not UTF-8: \d+ bytes .*\nconvert it: iconv"),
    ("strings.json", b'["one", "two"]', "holds no JSON objects, one a line or in an array\nwrite each document as"),
    ("nested.jsonl", b'{"meta": {"text": "a"}, "n": 1}\n',
     r"no text in the column 'text'\n.*none \(meta: dict; n: int\)")])
def test_what_would_be_read_as_something_else_is_refused(tmp_path, name, content, words):
    """Fails if half a file is taken for the whole, other bytes for text, or a shape of rows for an empty column."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        streams.look(str(tmp_path / name))


def test_whole_zstd_files_of_every_sort_pass(tmp_path):
    """Fails if the walk over frames and blocks loses its way: several frames, a checksum, no content size."""
    line = b'{"text": "a b c"}\n'
    several = b"".join(zstandard.ZstdCompressor(level=level, write_checksum=bool(level % 2)).compress(line * n)
                       for level, n in ((1, 1), (3, 40_000), (2, 9)))
    streamed = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(streamed, closefd=False) as writer:
        for _ in range(20_000):
            writer.write(line)
    for content, n in ((several, 40_010), (streamed.getvalue(), 20_000), (zstandard.compress(line), 1)):
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(content)
        streams.look(str(path))
        assert sum(1 for _ in streams.Stream(str(path))) == n
        with pytest.raises(ValueError, match="cut off"):
            path.write_bytes(content[:-1])
            streams.look(str(path))


def test_files_without_rows_and_of_no_split(tmp_path, capsys):
    """Fails if an empty file among others ends a run, or files that a folder's splits leave out are not named."""
    import pandas

    folder = tmp_path / "f"
    (folder / "more").mkdir(parents=True)
    for name, texts in (("a", []), ("b", ["one"]), ("c", [])):
        pandas.DataFrame({"text": pandas.Series(texts, dtype=str)}).to_parquet(folder / f"{name}.parquet")
    assert list(streams.Stream(str(folder))) == ["one"]
    write(tmp_path / "g", a="one")
    write(tmp_path / "h", b="two")
    (tmp_path / "g/more").symlink_to(tmp_path / "h")
    text_files._say.cache_clear()
    assert list(streams.Stream(str(tmp_path / "g"))) == ["one"]
    assert "left out: no split (more/b.jsonl)" in capsys.readouterr().out


def test_a_source_looks_at_both_sides(tmp_path):
    """Fails if the held-out data set is not looked at, or a source without a document to train on passes."""
    write(tmp_path, a="document 398", b="document 428", c="text")  # by the rule, 428 is held out
    path = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}
    assert set(Source("tiny", dataset=path["a"]).look()) == {"train", "heldout"} and Source("tiny").look() == {}
    with pytest.raises(ValueError, match=r"b\.jsonl has no document to train on.*\n.*--core_dataset"):
        Source("tiny", dataset=path["b"]).look()
    assert Source("tiny", dataset=path["b"], core_dataset=path["c"]).look()["heldout"].length == 4
    with pytest.raises(FileNotFoundError, match="d.jsonl"):
        Source("tiny", dataset=path["a"], core_dataset=str(tmp_path / "d.jsonl")).look()
