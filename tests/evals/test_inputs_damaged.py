"""Texts and tokenizers that cannot serve are told before the run, and large ones cost no memory."""

import time
from types import SimpleNamespace

import pytest
import torch

from evals.texts import inputs, packing, streams, text_files
from evals.texts.source import Source
from runs import training_log
from runs.voice import VOICE
from tests import architectures


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b"", "a.jsonl is empty: 0 bytes in 1 file\n"),
    ("a.parquet", b"", "a.parquet is empty: 0 bytes in 1 file\n"),
    ("a.jsonl.gz", b'{"text": "a"}\n' * 99, "a.jsonl.gz is damaged or no gzip file: .*\ncopy it again")])
def test_what_holds_nothing_or_is_not_what_it_is_named_is_told_at_the_look(tmp_path, name, content, words):
    """Fails if the column is blamed for an empty file, or a codec's own error is all that is said."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        streams.look(str(tmp_path / name))


class Letters:
    """A tokenizer of letters, "z" is unknown; it notes how much it was given at once."""

    unk_token_id, unk_token = 0, "<unk>"

    def __init__(self):
        self.given = []

    def __call__(self, texts, add_special_tokens):
        self.given.append(sum(map(len, texts)))
        return {"input_ids": [[0 if letter == "z" else ord(letter) for letter in text] for text in texts]}


def test_large_texts_are_tokenised_in_pieces_and_give_the_same_tokens(monkeypatch):
    """Fails if a large document is tokenised whole, loses or mixes tokens, or small ones are not done together."""
    monkeypatch.setattr(packing, "PIECE", 100)
    texts, letters = ["ab cd " * 9, "x" * 450, "", "kl " * 70, *["small"] * 30], Letters()
    assert packing.ids_of([*texts[:2], [7, 8], *texts[2:]], letters, 7) == [
        *[[ord(c) for c in text] for text in texts[:2]], [8], *[[ord(c) for c in text] for text in texts[2:]]]
    assert max(letters.given) <= 100 and len(letters.given) < 12
    assert list(packing.pieces("aa bb cc dd", 6)) == ["aa bb", " cc dd"] and list(packing.pieces("abc", 3)) == ["abc"]
    tokenizer = architectures.tokenizer()
    text = " ".join(architectures.texts(5))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert packing.ids_of([text], tokenizer)[0] == whole  # a boundary of words is one of BPE


def test_a_tokenizer_that_does_not_know_the_texts_is_refused(tmp_path):
    """Fails if texts of <unk> alone are trained on, or a language of the user's own is refused as no English."""
    file = tmp_path / "a.txt"
    cases = (("zzz zzz", r"does not know these texts: \d\d%"), ("zab\u00ff", "has the token id 255, and m embeds 200"),
             ("ab", ""))
    for text, wrong in cases:
        file.write_text("\n\n".join([f"{text}a", text, text] * 33), encoding="utf-8")
        source = Source("tiny", dataset=str(file), core_dataset=str(file))
        if not wrong:
            inputs.check_tokenizer(source, Letters(), "m", 200)
            continue
        with pytest.raises(ValueError, match=wrong):
            inputs.check_tokenizer(source, Letters(), "m", 200)


def test_a_checkpoint_is_pointed_to_only_where_there_is_one(tmp_path, monkeypatch):
    """Fails if a loss that is no number sends the user to a file that is not there, or passes over one that is."""
    job, recent = SimpleNamespace(name="layer_1", sae=None), {"layer_1": [(torch.tensor(float("nan")), {})]}
    with open(tmp_path / "log.txt", "w") as log:
        monkeypatch.setattr(VOICE, "log", log)
        for there in (False, True):
            with pytest.raises(FloatingPointError, match="lower --lr or the term's weight") as raised:
                training_log.check_finite([job], recent, 1, lambda x: x)
            assert ("checkpoint.pt in the run's folder" in str(raised.value)) == there
            (tmp_path / "checkpoint.pt").touch()


def test_a_look_that_takes_long_is_said_and_a_short_one_is_not(capsys):
    """Fails if a minute passes in silence, or every run has a line more."""
    said, until = "", time.monotonic() + 20
    with text_files.patient("looking", after=0.05):
        while not said.endswith("\n") and time.monotonic() < until:
            time.sleep(0.01)
            said += capsys.readouterr().out
    with text_files.patient("not this", after=60):
        pass
    assert said + capsys.readouterr().out == "looking\n"
