"""What is published of a run: it loads where nothing of this project is, hides no doubt, and shows nothing of here."""

import gzip
import json
import math
import re
import shutil
import socket
from base64 import b64decode, b64encode
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml

import variants
from runs import card, features, neuronpedia, outward, publish, report
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


@pytest.fixture
def without_pages(monkeypatch):
    """The report and the features pages, which take seconds, are not made."""
    monkeypatch.setattr(publish, "pages", lambda *about: [])


def change(file, edit):
    document = json.loads(file.read_text(encoding="utf-8"))
    edit(document)
    file.write_text(json.dumps(document), encoding="utf-8")


def published(run, *more):
    """The folder that the command writes; the small run's code is not sparse, so it must be asked for."""
    out = run.with_name("out")
    assert publish.main([str(run), "--out", str(out), "--despite_warnings", *more]) == 0
    return out


def change_board(run, **changed):
    """Another board, of which a feature is told otherwise."""
    board = features.read(run, "layer_2")
    board["model"] = changed.pop("model", board["model"])
    next(iter(board["features"].values())).update(changed)
    features.write(run, board)


def board_in(page):
    """The lines that features.js reads in a page."""
    packed = re.search(r'<script type="application/json" id="board">"(.*?)"</script>', page.read_text("utf-8"))
    return gzip.decompress(b64decode(packed[1])).decode()


def parts_of(out):
    """(what the front matter says, the text) of a card."""
    text = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def run_code(out, body, monkeypatch):
    """What the card's code makes, where the hub would give the folder's files."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders

    def download(repo_id, filename, force_download=False):
        if not (out / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(out / filename)

    (source,) = re.findall(r"```python\n(.*?)```", body, re.S)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(out))
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    made = {}
    exec(source, made)
    return made


def test_it_loads_without_this_project(run, without_pages, offline, monkeypatch, capsys):
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
    evaluated = {file.parent.name: file for file in run.glob("eval_results/*/*.json")}
    # SAEBench's folders, see get_results_filepath and run_all_evals_custom_saes.py there
    theirs = {"core": "core", "sparse_probing": "sparse_probing", "sae_probes": "sparse_probing_sae_probes"}
    assert evaluated.keys() == theirs.keys()
    same = {run / name: out / name for name in ("final_info.json", "verdict.json")}
    same |= {file: out / "eval_results" / theirs[name] / file.name for name, file in evaluated.items()}
    for ours, handed_on in same.items():
        assert handed_on.read_bytes() == ours.read_bytes()
    for file in out.glob("eval_results/*/*.json"):
        document = json.loads(file.read_text())
        assert file.name == f"{document['sae_lens_release_id']}_{document['sae_lens_id']}_eval_results.json"
    means = json.loads((run / "final_info.json").read_text())["layer_2"]["means"]
    told = {metric["type"]: metric["value"] for result in data["model-index"][0]["results"]
            for metric in result["metrics"]}
    assert told["core.ce_loss_score"] == means["core.ce_loss_score"] and len(told) > 5


@pytest.mark.slow
def test_nothing_of_this_machine_is_in_it(run):
    """Fails if a path, in whatever it was said, is in a file of the folder, or a text of a model's is changed."""
    home, there = Path.home(), f"{run.resolve()}/sae/layer_2"
    evaluated = next(run.glob("eval_results/core/*.json"))
    change(evaluated, lambda d: d.update(eval_result_unstructured=f"#!/usr/bin/env python at {home}/x/secret.py"))
    change(run / "final_info.json", lambda d: d["layer_2"]["problems"].extend(
        [f"core failed: no such file {there}", "no such file: /data/mine/corpus.txt"]))
    change(evaluated, lambda d: d["eval_config"].update(model_name="/some/dir/mymodel"))
    change(run / "run_info.json", lambda d: d["settings"].update(
        model="/some/dir/mymodel", dataset="/my texts/a.txt", note="as /data/mine/plan.md says") or d.pop("sha256"))
    change_board(run, model="/some/dir/mymodel", explanation=f"see {home}/private/x and C:\\y", score=0.5)
    out = published(run)
    for file in out.rglob("*"):
        text = file.read_bytes() if file.is_file() else b""
        if file.suffix == ".gz":
            text = gzip.decompress(text)
        if file.parent.name == "features" and file.suffix == ".html":
            text = text.split(b'id="board">')[0] + board_in(file).encode()
        for place in (str(run.resolve()), str(run.parent), f"{home}/", str(PROJECT), "/data/mine", "/some/dir"):
            assert place.encode() not in text, file
    said = json.loads((out / evaluated.relative_to(run)).read_text())["eval_result_unstructured"]
    assert said == "#!/usr/bin/env python at secret.py"
    page = (out / "features/layer_2.html").read_text("utf-8")
    assert " · on mymodel · " in page and '"see x and C:\\\\y"' in board_in(out / "features/layer_2.html")
    assert "no such file: corpus.txt" in (out / "report.html").read_text("utf-8")
    info = publish.read(run, [])[0]["settings"]
    assert (info["model"], info["dataset"], info["note"]) == ("mymodel", "a.txt", "as plan.md says")
    body = parts_of(out)[1]
    assert "no such file: corpus.txt" in body and "no such file layer\\_2" in body


@pytest.mark.slow
def test_pages_are_of_what_is_published(run):
    """Fails if a page of an earlier training, of a damaged board, or another run of the folder is in it."""
    other = Path(shutil.copytree(run, run.with_name("other_run")))
    change(other / "final_info.json", lambda d: d["layer_2"]["config"].update(seed=1))
    report.again(run)
    assert "../other_run/report.html" in (run / "report.html").read_text("utf-8")
    (run / "features/layer_2.html").write_text("of another training")
    (run / "variant_report/layer_2").mkdir(parents=True, exist_ok=True)
    (run / "variant_report/layer_2/notes.txt").write_text("of the variant's own")
    out = published(run)
    for page in out.rglob("*.html"):
        leads = re.findall(r'href="([^"#:]+)', page.read_text("utf-8"))
        assert all((page.parent / unquote(link)).is_file() for link in leads), leads
    assert "variant_report/layer_2/notes.txt" in (out / "report.html").read_text("utf-8")
    assert "other_run" not in (out / "report.html").read_text("utf-8")
    assert "Features of layer_2" in (out / "features/layer_2.html").read_text("utf-8")
    shutil.rmtree(out)
    (run / "features/layer_2.json.gz").unlink()
    assert not (published(run) / "features").exists()


def test_secrets_in_pages_are_seen(tmp_path):
    """Fails if a key is not seen in the board of a page, or in a picture that lies in one as text."""
    key = b"hf_" + b"a" * 34
    for hidden in (gzip.compress(b'{"explanation": "' + key + b'"}'), b"<svg><desc>" + key + b"</desc>"):
        shown = b64encode(hidden).decode()
        for page in (f'<script id="board">"{shown}"</script>', f'<img src="data:image/svg+xml;base64,{shown}">'):
            (tmp_path / "page.html").write_text(page)
            with pytest.raises(ValueError, match="page.html holds a key"):
                outward.check_clean(tmp_path, tmp_path)
    (tmp_path / "page.html").write_text(f'<p id="{"a" * 41}">"{"A" * 44}"</p>')  # no base64, and none of anything
    outward.check_clean(tmp_path, tmp_path)


@pytest.mark.parametrize("command", [publish, neuronpedia])
def test_a_key_in_several_tokens_is_seen(run, monkeypatch, capsys, command):
    """Fails if a key whose tokens stand in one context is handed on, or two halves in two contexts are taken for one.
    """
    board = features.read(run, "layer_2")
    feature, told = next(iter(board["features"].items()))
    board["vocab"] += ["hf_abcdefgh", "ijklmnop", "qrstuvwx", " "]
    n = len(board["vocab"])
    parts, told["groups"] = [n - 4, n - 3, n - 2], [told["groups"][0]]
    made = {"values": [], "peak": 0, "row": 0, "cut": [False, False]}
    told["groups"][0]["contexts"] = [{"tokens": [n - 1, number], **made} for number in parts]
    outward.check_contexts(board["features"], board, run)
    told["groups"][0]["contexts"].append({"tokens": [n - 1, *parts], **made})
    features.write(run, board)
    more = ["--despite_warnings"] if command is publish else []
    assert command.main([str(run), *more]) == 1
    err = capsys.readouterr().err
    assert f"a context of feature {feature} in features/layer_2.json.gz holds a key" in err
    assert "remove that file" in err and "abcdefgh" not in err and err.count("\n") == 1
    assert [file.name for file in run.parent.iterdir()] == ["run_1"]


@pytest.mark.parametrize("leak", ["hf_" + "a" * 34, "the value of MY_TOKEN", "code",
                                  pytest.param("board", marks=pytest.mark.slow)])
def test_secrets_are_refused(run, monkeypatch, capsys, leak):
    """Fails if a token, a secret of the environment or a path in code is written, or a folder is left behind."""
    monkeypatch.setenv("MY_TOKEN", "the value of MY_TOKEN")
    if leak != "board":  # in no page: they need not be made
        monkeypatch.setattr(publish, "pages", lambda *about: [])
    if leak == "board":
        change_board(run, explanation="words like hf_" + "a" * 34)
    elif leak == "code":
        (run / "sae/layer_2/variant.py").write_text(f"PLACE = {str(PROJECT)!r}\n")
    else:
        change(run / "run_info.json", lambda d: d["settings"].update(note=leak) or d.pop("sha256"))
    assert publish.main([str(run), "--despite_warnings"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing is written" in err
    assert "hf_a" not in err and "the value of MY_TOKEN" not in err
    assert [file.name for file in run.parent.iterdir()] == ["run_1"]


def test_hostile_texts_stay_texts(run, without_pages):
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


def test_what_sae_lens_lacks_keeps_its_code(run, without_pages, monkeypatch):
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


def test_the_hub_reads_the_card(run, without_pages, offline):
    """Fails if huggingface_hub finds no valid metadata in the card, or other figures, licence or tags than were given.
    """
    from huggingface_hub import ModelCard

    found = ModelCard((published(run, "--license", "cc-by-4.0") / "README.md").read_text(encoding="utf-8")).data
    assert (found.license, found.library_name, found.base_model) == ("cc-by-4.0", "saelens", None)
    assert "saelens" in found.tags and found.model_name == "topk SAE of tiny-gemma2, layer 2"
    means = json.loads((run / "final_info.json").read_text())["layer_2"]["means"]
    assert len(found.eval_results) > 5
    assert all(one.metric_value == means[one.metric_type] for one in found.eval_results)


def test_a_sweep_has_a_folder_each(run, without_pages):
    """Fails if an SAE of a sweep is missing, lies over another, or --sae does not choose."""
    shutil.copytree(run / "sae/layer_2", run / "sae/layer_2.k_8")
    core = next(run.glob("eval_results/core/*.json"))
    shutil.copyfile(core, core.with_name("topk_layer_2.k_8_eval_results.json"))
    change(run / "final_info.json", lambda d: d.update({"layer_2.k_8": d["layer_2"]}))
    out = published(run)
    found = sorted(str(file.parent.relative_to(out)) for file in out.rglob("cfg.json"))
    assert found == ["blocks.2.hook_resid_post", "blocks.2.hook_resid_post/k_8"]
    assert "### `blocks.2.hook_resid_post/k_8`" in parts_of(out)[1]
    from sae_lens import SAE

    assert all(SAE.load_from_disk(str(out / name)).cfg.d_sae == 128 for name in found)
    shutil.rmtree(out)
    out = published(run, "--sae", "layer_2.k_8")
    assert [str(file.parent.relative_to(out)) for file in out.rglob("cfg.json")] == ["blocks.2.hook_resid_post/k_8"]
    assert [file.name for file in out.glob("eval_results/*/*")] == ["topk_layer_2.k_8_eval_results.json"]


def test_the_baseline_and_the_random_line_stand_beside(run, without_pages):
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


def test_every_figure_of_the_card_by_hand(run, without_pages):
    """Fails if a figure, error, difference or L0 of the card is not final_info.json's or the baseline's, a value
    between two SAEs has no ~, or one of an SAE of another L0 does not say so.
    """
    stored = PROJECT / "runs/baseline/smollm2-135m-instruct"
    below, above = "layer_9.l1_penalty_0.14", "layer_9"
    a = json.loads((stored / "standard/frontier.json").read_text())[below]
    b = json.loads((stored / "standard/final_info.json").read_text())[above]
    frozen = json.loads((stored / "frozen_decoder/frontier.json").read_text())
    ends = frozen["layer_9.k_32"], frozen["layer_9.k_64"]
    ce, auc, l0 = "core.ce_loss_score", "sae_probes.sae_top_1_test_auc", 33.0
    mine = {"core.l0": l0, ce: 0.95, "core.r2": 0.5, auc: 0.7}
    errors = {ce: 0.0031, auc: 0.05}
    (run / "sae/layer_2").rename(run / "sae/layer_9")
    config = b["config"] | dict(variant="topk")
    change(run / "final_info.json", lambda d: d.update(
        layer_9=d.pop("layer_2") | dict(means=mine, stderrs=errors, config=config)))
    body = parts_of(published(run))[1]

    def between(first, second, metric, kind="means"):
        low, high = first["means"]["core.l0"], second["means"]["core.l0"]
        share = math.log(l0 / low) / math.log(high / low)
        return first[kind][metric] * (1 - share) + second[kind][metric] * share

    def cells_of(metric):
        row = next(line for line in body.splitlines() if line.startswith(f"| `{metric}`"))
        return [cell.strip() for cell in row.strip("|").split("|")][1:]

    for metric in (ce, "core.r2"):
        ours, theirs, difference, verdict, _, random = cells_of(metric)
        expected = between(a, b, metric)
        assert theirs.startswith("~") and random.startswith("~")
        assert float(ours.split(" ±")[0]) == mine[metric]
        assert float(theirs[1:].split(" ±")[0]) == pytest.approx(expected, rel=1e-4)
        assert float(random[1:]) == pytest.approx(between(*ends, metric), rel=1e-4)
        assert float(difference) == pytest.approx(mine[metric] - expected, abs=1e-4)
        assert verdict == ("better" if mine[metric] > expected else "worse")
    assert cells_of(ce)[0] == "0.9500 ± 0.0031"
    assert float(cells_of(ce)[1].split("± ")[1]) == pytest.approx(between(a, b, ce, "stderrs"), rel=0.05)
    assert cells_of("core.l0")[0] == "33.00"
    ours, theirs, difference, *_ = cells_of(auc)
    assert ours == "0.7000 ± 0.05" and theirs.endswith(f" (L0 {b['means']['core.l0']:.2f})")
    assert float(theirs.split(" ±")[0]) == pytest.approx(b["means"][auc], rel=1e-4)
    assert float(difference) == pytest.approx(0.7 - b["means"][auc], abs=1e-4)
    assert ("The baseline is standard. It has no SAE of L0 33.00: ~values lie between the baseline's SAEs of L0 "
            f"{a['means']['core.l0']:.2f} and {b['means']['core.l0']:.2f}.") in body
    assert f"In `sae_probes` its SAE of L0 {b['means']['core.l0']:.2f} alone was measured" in body


def test_refused_in_a_line(run, without_pages, capsys):
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


@pytest.mark.parametrize("command", [publish, neuronpedia])
def test_a_run_is_named_from_inside(tmp_path, monkeypatch, capsys, command):
    """Fails if the folder we are in, or one above it, is no name of a run, or / ends in a traceback."""
    (tmp_path / "run_1/sae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run_1/sae")
    assert outward.beside(Path(".."), "_hub") == tmp_path / "run_1_hub"
    assert outward.beside(Path("../../run_1"), "_hub") == Path("../../run_1_hub")
    monkeypatch.chdir(tmp_path / "run_1")
    assert outward.beside(Path("."), "_hub") == tmp_path / "run_1_hub"
    for folder in (".", "/"):
        assert command.main([folder]) == 1
        assert capsys.readouterr().err.startswith("nothing written: ")


def test_names_of_the_hub():
    """Fails if a folder is given out as a model or data set of the hub, or a path stays in a text."""
    assert card.hub_model("google/gemma-2-2b") == "google/gemma-2-2b" and card.hub_model("my-folder") is None
    assert card.hub_dataset("owner/name:config:train") == "owner/name" and card.hub_dataset("owner/a/b") is None
    assert outward.no_paths("see ~/data/a.txt, C:\\Users\\me\\b.txt and/or https://x.org/a/b 1/2") == (
        "see a.txt, b.txt and/or https://x.org/a/b 1/2")
