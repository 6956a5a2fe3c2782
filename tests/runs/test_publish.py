"""What is published of a run: it loads where nothing of this project is, hides no doubt, and shows nothing of here."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml

import variants
from runs import card, outward, publish
from tests import PROJECT
from variants.kit import saving

HOSTILE = ("<script>document.title='harmed'</script>", "![x](https://harm.example/x.png)", "`</code>` | a | b",
           "[x](javascript:harm)", "\n# not a heading", "---\nlicense: mit", "**bold** __init__ $x$", "\u202egnol")


@pytest.fixture
def offline(monkeypatch):
    """No address can be reached, and asking for one is an error that no library may swallow quietly."""
    asked = []

    def connect(self, address):
        asked.append(address)
        raise OSError(f"asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert not asked


@pytest.fixture
def run(reference, tmp_path):
    """A copy of the small run, to be changed."""
    return Path(shutil.copytree(reference, tmp_path / "run_1"))


def change(file, edit):
    document = json.loads(file.read_text(encoding="utf-8"))
    edit(document)
    file.write_text(json.dumps(document), encoding="utf-8")


def published(run, *more):
    """The folder that the command writes; the small run's code is not sparse, so it must be asked for."""
    out = run.with_name("out")
    assert publish.main([str(run), "--out", str(out), "--despite_warnings", *more]) == 0
    return out


def parts_of(out):
    """(what the front matter says, the text) of a card."""
    text = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def run_code(out, body, monkeypatch):
    """What the card's code makes, where the hub would give the folder."""
    import huggingface_hub

    (source,) = re.findall(r"```python\n(.*?)```", body, re.S)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(out))
    made = {}
    exec(source, made)
    return made


def test_it_loads_without_this_project(run, offline, monkeypatch, capsys):
    """Fails if SAELens reads other features from the folder, the card's code does not run, or a result is changed."""
    out = published(run, "--repo", "me/tiny", "--license", "apache-2.0")
    assert "hf upload me/tiny " in capsys.readouterr().out
    data, body = parts_of(out)
    assert data["library_name"] == "saelens" and data["license"] == "apache-2.0"
    assert {"sparse-autoencoder", "mechanistic-interpretability", "saelens"} <= set(data["tags"])
    assert "base_model" not in data  # weights that were drawn at random are on no hub
    made = run_code(out, body, monkeypatch)
    from sae_lens import SAE

    assert isinstance(made["sae"], SAE) and made["features"].shape == (8, 128)
    ours = saving.load_sae(run / "sae/layer_2")
    x_ND = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made["sae"].encode(x_ND), ours.encode(x_ND), rtol=1e-4, atol=1e-4)
    same = ["final_info.json", "verdict.json", *(file.relative_to(run) for file in run.glob("eval_results/*/*.json"))]
    assert len(same) == 5
    for name in same:
        assert (out / name).read_bytes() == (run / name).read_bytes()
    means = json.loads((run / "final_info.json").read_text())["layer_2"]["means"]
    told = {metric["type"]: metric["value"] for result in data["model-index"][0]["results"]
            for metric in result["metrics"]}
    assert told["core.ce_loss_score"] == means["core.ce_loss_score"] and len(told) > 5


def test_nothing_of_this_machine_is_in_it(run):
    """Fails if a path, in whatever it was said, is in a file of the folder, or a text of a model's is changed."""
    home, there = Path.home(), f"{run.resolve()}/sae/layer_2"
    evaluated = next(run.glob("eval_results/core/*.json"))
    change(evaluated, lambda d: d.update(eval_result_unstructured=f"#!/usr/bin/env python at {home}/x/secret.py"))
    change(run / "final_info.json", lambda d: d["layer_2"]["problems"].extend(
        [f"core failed: no such file {there}", "no such file: /data/mine/corpus.txt"]))
    (run / "report.html").write_text(f"<p>{there} and {PROJECT}/experiment.py</p>")
    out = published(run)
    for file in out.rglob("*"):
        text = file.read_bytes() if file.is_file() else b""
        for place in (str(run.resolve()), str(run.parent), f"{home}/", str(PROJECT), "/data/mine"):
            assert place.encode() not in text, file
    said = json.loads((out / evaluated.relative_to(run)).read_text())["eval_result_unstructured"]
    assert said == "#!/usr/bin/env python at secret.py"
    assert (out / "report.html").read_text() == "<p>layer_2 and experiment.py</p>"
    body = parts_of(out)[1]
    assert "no such file: corpus.txt" in body and "no such file layer\\_2" in body


@pytest.mark.parametrize("leak", ["hf_" + "a" * 34, "the value of MY_TOKEN", "code"])
def test_secrets_are_refused(run, monkeypatch, capsys, leak):
    """Fails if a token, a secret of the environment or a path in code is written, or a folder is left behind."""
    monkeypatch.setenv("MY_TOKEN", "the value of MY_TOKEN")
    if leak == "code":
        (run / "sae/layer_2/variant.py").write_text(f"PLACE = {str(PROJECT)!r}\n")
    else:
        change(run / "run_info.json", lambda d: d["settings"].update(note=leak) or d.pop("sha256"))
    assert publish.main([str(run), "--despite_warnings"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing is written" in err and leak not in err.replace("code", "")
    assert [file.name for file in run.parent.iterdir()] == ["run_1"]


def test_hostile_texts_stay_texts(run):
    """Fails if a name, note or problem becomes HTML, a link, a picture, a heading, front matter or a row of a table."""
    markdown = pytest.importorskip("markdown_it")

    def edit(document):
        entry = document["layer_2"]
        entry["problems"] = list(HOSTILE)
        entry["config"] |= dict(variant=HOSTILE[0] + HOSTILE[2], model=HOSTILE[1], dataset=HOSTILE[5],
                                hyper={HOSTILE[3]: HOSTILE[4]})

    plain = parts_of(published(run))[1]
    shutil.rmtree(run.with_name("out"))
    change(run / "final_info.json", edit)
    change(run / "run_info.json", lambda d: d["settings"].update(note=HOSTILE[0] + HOSTILE[2]) or d.pop("sha256"))
    data, body = parts_of(published(run))
    assert "license" not in data and data["model-index"][0]["name"].startswith(HOSTILE[0])

    def kinds(text):
        tokens = markdown.MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text)
        inner = [child for token in tokens for child in token.children or ()]
        return [token.type for token in (*tokens, *inner)], "".join(t.content for t in inner)

    before, _ = kinds(plain)
    after, shown = kinds(body)
    for kind in ("html_block", "html_inline", "link_open", "image", "strong_open", "heading_open", "hr"):
        assert after.count(kind) == before.count(kind), kind
    assert after.count("tr_open") == before.count("tr_open") + 1  # the note's row
    assert after.count("td_open") == before.count("td_open") + 2
    for text in (*HOSTILE[:4], "# not a heading", "--- license: mit", HOSTILE[6], "gnol"):
        assert text in shown
    assert "\u202e" not in body


def test_what_sae_lens_lacks_keeps_its_code(run, monkeypatch):
    """Fails if an SAE in the own format is not there whole, the card does not say so, or its code does not load it."""
    module = variants.load("clustered")
    sae = variants.build(module, 32, 128, {}, {})
    shutil.rmtree(run / "sae/layer_2")
    saving.save_sae(run / "sae/layer_2", sae, 2.0, variants.path("clustered"), {}, {})
    out = published(run)
    place = out / "blocks.2.hook_resid_post"
    assert sorted(file.name for file in place.iterdir()) == ["cfg.json", "state.safetensors", "variant.py"]
    body = parts_of(out)[1]
    assert "SAELens has no architecture" in body
    made = run_code(out, body, monkeypatch)
    x_ND = torch.randn(20, 32)
    torch.testing.assert_close(made["sae"].encode(x_ND), saving.load_sae(run / "sae/layer_2").encode(x_ND))


def test_a_sweep_has_a_folder_each(run):
    """Fails if an SAE of a sweep is missing, lies over another, or --sae does not choose."""
    shutil.copytree(run / "sae/layer_2", run / "sae/layer_2.k_8")
    core = next(run.glob("eval_results/core/*.json"))
    shutil.copyfile(core, core.with_name("topk_layer_2.k_8_eval_results.json"))
    change(run / "final_info.json", lambda d: d.update({"layer_2.k_8": d["layer_2"]}))
    out = published(run)
    found = sorted(str(file.parent.relative_to(out)) for file in out.rglob("cfg.json"))
    assert found == ["blocks.2.hook_resid_post", "blocks.2.hook_resid_post/k_8"]
    assert "### `blocks.2.hook_resid_post/k_8`" in parts_of(out)[1]
    shutil.rmtree(out)
    out = published(run, "--sae", "layer_2.k_8")
    assert [str(file.parent.relative_to(out)) for file in out.rglob("cfg.json")] == ["blocks.2.hook_resid_post/k_8"]
    assert [file.name for file in out.glob("eval_results/*/*")] == ["topk_layer_2.k_8_eval_results.json"]


def test_the_baseline_and_the_random_line_stand_beside(run):
    """Fails if the card lacks the error, the baseline's figure, or that a frozen random decoder does as well."""
    stored = PROJECT / "runs/baseline/smollm2-135m-instruct"
    baseline = json.loads((stored / "standard/frontier.json").read_text())
    name, theirs = next(iter(baseline.items()))
    frozen = [one for file in sorted((stored / "frozen_decoder").glob("*.json"))
              for one in json.loads(file.read_text()).values() if one["means"].get("core.ce_loss_score") is not None]
    metric = "core.ce_loss_score"
    floor = min(frozen, key=lambda one: abs(one["means"]["core.l0"] - theirs["means"]["core.l0"]))
    mine = {"core.l0": theirs["means"]["core.l0"], metric: min(one["means"][metric] for one in frozen) / 2}
    (run / "sae/layer_2").rename(run / "sae/layer_9")
    config = theirs["config"] | dict(variant="topk")
    change(run / "final_info.json", lambda d: d.update(
        layer_9=d.pop("layer_2") | dict(means=mine, stderrs={metric: 0.00123}, config=config)))
    data, body = parts_of(published(run))
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert floor["config"]["d_sae"] == theirs["config"]["d_sae"]
    row = next(line for line in body.splitlines() if line.startswith(f"| `{metric}`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].endswith("± 0.0012") and cells[2].startswith(f"{theirs['means'][metric]:.4f}"[:5]), name
    assert cells[4] == "worse" and float(cells[6]) > mine[metric]
    assert re.search(r"\*\*Random line:\*\* not better than a frozen random decoder.*ce\\_loss\\_score", body)


def test_refused_in_a_line(run, capsys):
    """Fails if a run that shows nothing, is unfinished or was changed is published unasked, or a file is lost."""
    def said(*arguments):
        assert publish.main([str(argument) for argument in arguments]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("nothing written: ")
        return err

    out = run.with_name("out")
    assert "the verdict is suspect" in said(run)
    assert "there is no folder" in said(run.with_name("run_2"))
    assert "owner/name" in said(run, "--repo", "tiny; rm -rf")
    assert "--license" in said(run, "--license", "mine: [x]")
    assert "there are layer_2" in said(run, "--sae", "layer_3", "--despite_warnings")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is not empty" in said(run, "--out", out, "--despite_warnings")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    shutil.rmtree(out)

    change(run / "verdict.json", lambda d: d.update(verdict="failed", why="the eval core failed"))
    assert "the verdict is failed: the eval core failed" in said(run)
    card_text = (published(run) / "README.md").read_text(encoding="utf-8")
    assert card_text.index("Published despite warnings") < card_text.index("the eval core failed")
    change(run / "final_info.json", lambda d: d["layer_2"]["means"].update({"core.r2": 0.99}))
    change(run / "verdict.json", lambda d: d.update(verdict="better", why=None))
    doubts = publish.doubts_of(run, *publish.read(run, []))
    assert "changed since the run ended: final_info.json" in doubts
    change(run / "run_info.json", lambda d: d.update(status="running") or d.pop("sha256"))
    assert "is not finished (running)" in said(run, "--despite_warnings", "--out", run.with_name("other"))
    weights = run / "sae/layer_2/sae_weights.safetensors"
    change(run / "run_info.json", lambda d: d.update(status="finished"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64
    weights.write_bytes(data)
    assert "weights" in said(run, "--despite_warnings", "--out", run.with_name("other"))
    assert not run.with_name("other").exists()


def test_names_of_the_hub():
    """Fails if a folder is given out as a model or data set of the hub, or a path stays in a text."""
    assert card.hub_model("google/gemma-2-2b") == "google/gemma-2-2b" and card.hub_model("my-folder") is None
    assert card.hub_dataset("owner/name:config:train") == "owner/name" and card.hub_dataset("owner/a/b") is None
    assert outward.no_paths("see ~/data/a.txt, C:\\Users\\me\\b.txt and/or https://x.org/a/b 1/2") == (
        "see a.txt, b.txt and/or https://x.org/a/b 1/2")
