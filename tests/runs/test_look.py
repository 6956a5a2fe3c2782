"""A text read by a run's SAE and its baseline's: python -m runs.look, and the passages that are built in."""

import io
import json
import math
import shutil
import sys

import pytest
import torch

from evals.dashboards import passages
from runs import beside, features, look
from runs.reading import read
from tests.pages.boards import HARMFUL, board

TEXT = "The cat sat on the mat.\nThen it slept."


class Signed:
    """An SAE of five features of three dimensions that fire with either sign."""

    W_FD = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, -3], [1, 1, 1], [0, 0, 0]])

    def encode(self, x):
        return x @ self.W_FD.T


def test_strongest_by_hand():
    """Fails if what is strongest is judged by the signed value, a silent feature is named, or a token that does not
    count has one."""
    x_TD = torch.tensor([[1.0, 2, 0], [0.5, 0, 1], [9, 9, 9], [0, 0, 0]])
    counts_T = torch.tensor([True, True, False, True])
    # the first token: 1, 4, 0, 3, 0; the second: .5, 0, −3, 1.5, 0
    expected = [[[1, 4.0], [3, 3.0], [0, 1.0]], [[2, -3.0], [3, 1.5], [0, 0.5]], [], []]
    assert passages.strongest(Signed(), x_TD, counts_T) == expected
    assert passages.strongest(Signed(), x_TD, counts_T, 1) == [pairs[:1] for pairs in expected]
    assert passages.activations(Signed(), x_TD, counts_T, [2, 4]) == {2: [[1, -3.0]], 4: []}
    many_TD = torch.ones(300, 3)  # several parts
    assert passages.strongest(Signed(), many_TD, torch.ones(300, dtype=torch.bool)) == [
        [[2, -3.0], [3, 3.0], [1, 2.0], [0, 1.0]]] * 300


def opened(reference, cache):
    """The record of a small run, its SAE and its model."""
    run = look.chosen(str(reference), None)
    return run, beside.trained(run), look.load_model(look.recorded(run), str(cache), "")


def test_passages_are_those_of_model_and_sae(reference, cache):
    """Fails if a passage's activations are not those of the model's pass, or BOS and tokens of huge norm have some."""
    run, sae, lm = opened(reference, cache)
    found = passages.of(passages.heard(lm, 2), sae, sae)
    assert [one["title"] for one in found] == list(passages.PASSAGES)
    for one, text in zip(found, passages.PASSAGES.values()):
        ids = [lm.bos, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]][:passages.TOKENS]
        assert one["run"] == one["baseline"] and len(one["run"]) == len(one["tokens"]) == len(ids)
        assert one["run"][0] == []
        if text.isascii():  # no token is part of a sign
            assert text.startswith("".join(one["tokens"][1:]))
        z_TF = sae.encode(lm.residual(torch.tensor([ids]), 2)[0])
        for pairs, z_F in zip(one["run"][1:], z_TF[1:].tolist()):
            expected = sorted(((f, a) for f, a in enumerate(z_F) if a), key=lambda pair: -abs(pair[1]))[:5]
            assert [pair[1] for pair in pairs] == pytest.approx([a for _, a in expected], rel=2e-3)
            assert all(math.isclose(z_F[f], a, rel_tol=2e-3) for f, a in pairs)
    x_TD, _ = passages.residual(lm, 2, torch.tensor(ids))
    bound = float(x_TD[1:].norm(dim=1).median())
    small = passages.of(passages.heard(lm, 2, bound), sae)[-1]
    assert small["baseline"] is None
    for pairs, whole, norm in zip(small["run"], found[-1]["run"], x_TD.norm(dim=1).tolist()):
        assert pairs == (whole if norm <= bound else [])


def board_of(peaks: dict[int, list[int]], explained: dict[int, str]) -> dict:
    """A board of five features whose strongest contexts are of these tokens; the peak of each is its number in vocab.
    """
    features_of = {str(feature): {"explanation": explained.get(feature), "groups": [
        {"name": "top", "contexts": [{"tokens": [9, 9, number, 9], "peak": 2} for number in numbers]},
        {"name": "interval 1", "contexts": [{"tokens": [9], "peak": 0}]}]} for feature, numbers in peaks.items()}
    return {"vocab": list("abcdefghij"), "features": features_of, "list": {"peak": [0, 1, 2, -1, 4]}, "baseline": None}


def test_what_a_feature_fires_on_by_hand():
    """Fails if a dashboard's tokens are not the distinct ones at the peaks, the most frequent first, or a feature
    without one is not told by its peak, or one that fires on none is told by the last token.
    """
    board = board_of({0: [5, 3, 3, 6, 5, 5, 7], 1: []}, {})
    known = {"vocab": board["vocab"], "features": board["features"], "peak": board["list"]["peak"]}
    assert [look.fires_on(known, feature) for feature in range(5)] == [["f", "d", "g"], ["b"], ["c"], [], ["e"]]
    assert look.fires_on(known | {"peak": None}, 4) == [] == look.fires_on(look.NOTHING, 0)


def test_labels_are_told_apart():
    """Fails if a label is not the best that is known, or what kinds of labels mean is not said of those there are."""
    one = {"explanation": "cats\n", "fires_on": [" a", "\n"], "promotes": [" x"]}
    three = [one, one | {"explanation": None}, one | {"explanation": None, "fires_on": []}]
    assert [look.says(feature) for feature in three] == ["cats↵", "“ a” “↵”", "→ “ x”"]
    assert look.says({"explanation": None, "fires_on": [], "promotes": []}) == ""
    what = {"features": {"run": {"1": three[1]}, "baseline": {"2": three[2]}}, "labels": look.LABELS}
    assert [line.split(": ")[0].strip() for line in look.explained(what)] == ["“ a” “ b”", "→ “ a” “ b”"]


def test_the_board_of_a_run_tells_of_its_baseline(reference, cache, capsys, monkeypatch):
    """Fails if features of run or baseline are not labelled by the run's board, a baseline that the board is not about
    is, or a damaged or missing board costs more than the labels.
    """
    run, _, _ = opened(reference, cache)
    asked = [str(reference), f"--cache_dir={cache}", "--text", TEXT, "--json"]

    def looked(kept):
        monkeypatch.setattr(features, "read", kept)
        assert look.main([*asked, "--baseline", str(reference)]) == 0
        return json.loads(capsys.readouterr().out)

    def missing(out, sae):
        raise FileNotFoundError

    without = looked(missing)
    assert without["labels"].keys() <= next(iter(without["features"]["run"].values())).keys()
    feature = without["passage"]["run"][1][0][0]
    assert all(one["fires_on"] == [] for one in without["features"]["run"].values())
    kept = board_of({feature: [3]}, {feature: "of cats"})
    kept["list"]["peak"] = [4 for _ in range(128)]
    of_run = looked(lambda out, sae: kept)["features"]["run"]
    assert of_run[str(feature)] | {"promotes": 0, "values": 0} == {"explanation": "of cats", "fires_on": ["d"],
                                                                   "promotes": 0, "values": 0}
    assert {one["fires_on"][0] for key, one in of_run.items() if key != str(feature)} == {"e"}
    beside_it = {"name": run.name, "l0": look.l0_of(run), "features": board_of({feature: [6]}, {})["features"]}
    assert look.known_beside(run, run) == look.known_of(run)
    monkeypatch.setattr(look, "known_of", lambda run: look.NOTHING)
    monkeypatch.setattr(features, "read", lambda out, sae: kept | {"baseline": beside_it})
    assert look.fires_on(look.known_beside(run, run), feature) == ["g"]
    assert look.fires_on(look.known_beside(run, run), feature + 1) == []
    monkeypatch.setattr(features, "read", lambda out, sae: kept | {"baseline": beside_it | {"l0": 1.5}})
    assert look.known_beside(run, run) is look.NOTHING


def test_the_command_on_a_run(reference, cache, capsys, tmp_path, monkeypatch):
    """Fails if what is printed is not what model and SAE give, wider than 80 columns, or lacks what is known."""
    run, sae, lm = opened(reference, cache)
    asked = [str(reference), f"--cache_dir={cache}"]
    assert look.main([*asked, "--text", TEXT, "--json", "--baseline", str(reference), "--top", "2"]) == 0
    what = json.loads(capsys.readouterr().out)
    assert "".join(what["passage"]["tokens"][1:]) == TEXT and what["left_out"] == 0
    ids = [lm.bos, *lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    z_TF = sae.encode(lm.residual(torch.tensor([ids]), 2)[0])
    for place in range(1, len(ids)):
        pairs = what["passage"]["run"][place]
        assert what["passage"]["baseline"][place] == pairs and len(pairs) <= 2
        assert pairs[0][1] == pytest.approx(float(z_TF[place].max()), rel=2e-3)
        assert int(z_TF[place].argmax()) == pairs[0][0]
    feature = what["passage"]["run"][1][0][0]
    known = what["features"]["run"][str(feature)]
    logits_V = lm.unembed(sae.W_dec[feature][None])[0]
    assert known["promotes"][0] == lm.tokenizer.decode([int(logits_V.argmax())])
    fires = [[t, pytest.approx(v, rel=2e-3)] for t, v in enumerate(z_TF[:, feature].tolist()) if v and t]
    assert known["values"] == fires and known["explanation"] is None

    kept = board(sae=run.section, features=128, boards=128, hostile=True)
    kept["features"][str(feature)] = {"groups": [], "explanation": "words \x1b[31m about cats " * 5}
    monkeypatch.setattr(features, "read", lambda out, sae: kept)
    (tmp_path / "text.txt").write_text("\x1b[31mcat \u202e" + TEXT * 20 + "中文")
    assert look.main([*asked, "--file", str(tmp_path / "text.txt")]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out and "\u202e" not in out
    assert "words · [31m about" in out.replace("·[", "· [") and "no baseline beside it: none is stored" in out
    assert "the text is cut after 31 tokens, the run's context: " in err and err.count("\n") == 1


def test_the_page_is_new_and_linked(reference, cache, capsys, tmp_path):
    """Fails if a file is overwritten, or a page in the run's folder does not lead to the dashboards that are there."""
    asked = [str(reference), f"--cache_dir={cache}", "--text", TEXT]
    page = tmp_path / "text.html"
    assert look.main([*asked, "--page", str(page)]) == 0
    assert "features/" not in page.read_text() and "<table" in page.read_text()
    before = page.read_bytes()
    capsys.readouterr()
    assert look.main([*asked, "--page", str(page)]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err and page.read_bytes() == before
    (section,) = read(reference)
    of_features, own = reference / features.FOLDER / f"{section}.html", reference / "own text.html"
    was_there = of_features.exists()
    try:
        of_features.parent.mkdir(exist_ok=True)
        of_features.touch()
        assert look.main([*asked, "--page", str(own)]) == 0
        assert f'href="features/{section}.html#' in own.read_text() and 'href="report.html"' in own.read_text()
    finally:
        own.unlink()
        if not was_there:
            of_features.unlink()


def test_what_cannot_be_looked_at_is_one_line(reference, cache, capsys, tmp_path, monkeypatch):
    """Fails if a mistake ends in a traceback, says nothing of use, or several SAEs are one too silently."""
    def said(*arguments) -> str:
        assert look.main([*map(str, arguments), f"--cache_dir={cache}"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1, err
        return err

    assert "there is no" in said(tmp_path / "none", "--text", "cat")
    (tmp_path / "begun").mkdir()
    assert "is no run's folder, it has no final_info.json: give" in said(tmp_path / "begun", "--text", "cat")
    assert "is empty" in said(reference, "--text", " \n")
    assert "give a text" in said(reference) and "give a text" in said(reference, "--text", "a", "--file", "b")
    text, nowhere = ("--text", "cat"), tmp_path / "none/text.html"
    assert f"there is no {tmp_path / 'None'}: name a file" in said(reference, "--file", tmp_path / "None")
    assert f"nor is there a folder {nowhere.parent}" in said(reference, "--file", nowhere)
    assert f"{tmp_path} is a folder: name a file in it" in said(reference, "--file", tmp_path)
    assert f"there is no folder {nowhere.parent} for text.html: make it" in said(reference, *text, "--page", nowhere)
    assert f"{tmp_path} is a folder: name a new file in it" in said(reference, *text, "--page", tmp_path)
    for name in ("text.html", "text-2.html"):
        (tmp_path / name).touch()
    assert f"name a new file: --page {tmp_path / 'text-3.html'}" in said(reference, *text, "--page",
                                                                         tmp_path / "text.html")
    assert "is a file, and no page can lie in it" in said(reference, *text, "--page", tmp_path / "text.html/a.html")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat \xff")))
    assert "stdin is no text in UTF-8: byte 0xff at 4" in said(reference, "--file", "-")
    assert "choose one of them with --sae: layer_2" in said(reference, "--text", "cat", "--sae", "layer_9")
    assert "no baseline named 'x'" in said(reference, "--text", "cat", "--baseline", "x")
    assert "another model" in said(reference, "--text", "cat", "--baseline", "smollm2-135m-instruct/topk")
    assert "unrecognized arguments: --tect" in said(reference, "--text", "cat", "--tect=x")
    assert "at least one feature" in said(reference, "--text", "cat", "--top", "0")
    info = look.recorded(look.chosen(str(reference), None))
    info["settings"]["model"] = "/nowhere/model"
    monkeypatch.setattr(look, "recorded", lambda run: info)
    assert "lay in /nowhere/model, and there is no such folder now" in said(reference, "--text", "cat")
    info["settings"] |= {"model": "synthetic", "profile": "synthetic"}
    assert "reads no text" in said(reference, "--text", "cat")


def test_several_saes_are_named(reference, cache, capsys, tmp_path):
    """Fails if one of several SAEs is taken unasked, or one that is named is not read."""
    out = tmp_path / "sweep"
    shutil.copytree(reference, out)
    sections = json.loads((out / "final_info.json").read_text())
    (name, section), = sections.items()
    (out / "final_info.json").write_text(json.dumps({name: section, "layer_2.k_4": section}))
    shutil.copytree(out / "sae" / name, out / "sae/layer_2.k_4")
    cfg = json.loads((out / "sae/layer_2.k_4/cfg.json").read_text())
    cfg["k"] = cfg["metadata"]["hyper"]["k"] = 4
    (out / "sae/layer_2.k_4/cfg.json").write_text(json.dumps(cfg))
    asked = [str(out), f"--cache_dir={cache}", "--text", HARMFUL[0], "--json"]
    assert look.main(asked) == 1
    assert f"has 2 SAEs: choose one of them with --sae: {name}, layer_2.k_4" in capsys.readouterr().err
    assert look.main([*asked, "--sae=layer_2.k_4"]) == 0
    what = json.loads(capsys.readouterr().out)
    assert what["sae"] == "layer_2.k_4" and max(map(len, what["passage"]["run"])) == 4
