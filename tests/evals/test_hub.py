"""The imitated hub itself: its repositories, its refusals and its faults, as the hub's own libraries see them."""

import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests import PROJECT
from tests.hub import Hub, read, repositories, serving

PILE, NEWS, GEMMA = "monology/pile-uncopyrighted", "fancyzhx/ag_news", "google/gemma-2-2b"
NEWS_FILE = "data/train-00000-of-00001.parquet"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Requests of this process go to loopback, whatever proxies and settings the machine has."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")  # comes before one that the user has stored
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def ask(hub: Hub, path: str, token: str = "hf_good", **headers: str):
    """The open answer to a plain GET."""
    request = urllib.request.Request(hub.url + path, headers={"Authorization": f"Bearer {token}", **headers})
    return urllib.request.urlopen(request, timeout=20)


def download(hub: Hub, cache: Path, name: str, file: str, kind: str = "dataset",
             token: str | bool = "hf_good", **options) -> Path:
    return Path(hf_hub_download(name, file, repo_type=kind, endpoint=hub.url, token=token, cache_dir=cache, **options))


def run(hub: Hub, home: Path, script: str):
    """What a Python script prints as JSON that asks the hub from a process of its own."""
    ended = subprocess.run([sys.executable, "-c", script], env=hub.environment(home=home), capture_output=True,
                           text=True, timeout=120, cwd=PROJECT)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ repositories


@pytest.mark.slow
def test_the_repositories_are_small_and_always_the_same(hub_root, tmp_path):
    """Fails if they outgrow 30 MB, or a build gives other bytes than the one before."""
    assert sum(f.stat().st_size for f in hub_root.rglob("*") if f.is_file()) < 30e6
    again = [GEMMA, PILE, NEWS, "cais/mmlu", "adamkarvonen/ravel_prompts"]
    repositories.build(tmp_path, again)
    for folder in tmp_path.glob("*/*/*/main"):
        assert read(folder).commit == read(hub_root / folder.relative_to(tmp_path)).commit, folder


def test_a_snapshot_is_the_repository(hub, hub_root, tmp_path):
    """Fails if a download lacks a file or changes one, or its commit is not the one the hub names."""
    for kind, name in (("model", GEMMA), ("dataset", PILE), ("dataset", "adamkarvonen/ravel_prompts")):
        folder = Path(snapshot_download(name, repo_type=kind, endpoint=hub.url, token="hf_good", cache_dir=tmp_path))
        wanted = read(hub_root / f"{kind}s" / name / "main")
        assert folder.name == wanted.commit == HfApi(endpoint=hub.url).repo_info(name, repo_type=kind).sha
        assert all((folder / path).read_bytes() == file.read_bytes() for path, file in wanted.files.items())
        assert len([f for f in folder.rglob("*") if f.is_file()]) == len(wanted.files)


LOADING = """
import json, datasets
from datasets import load_dataset
found = {}
configs = {"Helsinki-NLP/europarl": "en-fr", "cais/mmlu": "human_aging", "cais/wmdp": "wmdp-bio",
           "Salesforce/wikitext": "wikitext-2-raw-v1", "texts/two-configs": "stories"}
plain = ["monology/pile-uncopyrighted", "Skylion007/openwebtext", "LabHC/bias_in_bios",
         "canrager/amazon_reviews_mcauley_1and5", "fancyzhx/ag_news", "cais/wmdp-bio-forget-corpus",
         "texts/pretokenised", "texts/null-row", "texts/parquet", "texts/private"]
for name, config in [*configs.items(), *((name, None) for name in plain)]:
    whole, streamed = load_dataset(name, config), load_dataset(name, config, streaming=True)
    assert {s: next(iter(d)) for s, d in whole.items()} == {s: next(iter(d)) for s, d in streamed.items()}, name
    assert whole["train" if "train" in whole else "test"].features, name
    found[name] = {split: [d.num_rows, streamed[split].num_shards, sorted(d.column_names)]
                   for split, d in whole.items()}
files = load_dataset("parquet", data_files="hf://datasets/codeparrot/github-code/data/train-*.parquet",
                     split="train", streaming=True)
found["codeparrot/github-code"] = {"train": [sum(1 for _ in files), files.num_shards, sorted(next(iter(files)))]}
for name in ("codeparrot/github-code", "texts/two-configs", "texts/closed"):
    try:
        load_dataset(name)
    except Exception as error:
        found[name + " refused"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.mark.slow
def test_datasets_reads_every_repository_whole_and_as_a_stream(hub, tmp_path):
    """Fails if a data set cannot be loaded by its name, or has other splits, rows, files or columns than are meant."""
    found = run(hub, tmp_path, LOADING)
    loaded = {name: splits for name, splits in found.items() if isinstance(splits, dict)}
    columns = {name: columns for name, splits in loaded.items() for _, _, columns in splits.values()}
    rows = {name: {split: n for split, (n, _, _) in splits.items()} for name, splits in loaded.items()}
    assert found[PILE] == {"train": [1800, 30, ["meta", "text"]]}
    assert found["Skylion007/openwebtext"] == {"train": [3200, 80, ["text"]]}
    assert found["Helsinki-NLP/europarl"] == {"train": [600, 2, ["translation"]]}
    assert rows["LabHC/bias_in_bios"] == {"train": 3360, "test": 2240, "dev": 560}
    assert rows["texts/two-configs"] == {"train": 200, "validation": 20, "test": 20}
    assert columns["LabHC/bias_in_bios"] == ["gender", "hard_text", "profession"]
    assert columns["canrager/amazon_reviews_mcauley_1and5"] == ["category", "rating", "text"]
    assert columns["cais/wmdp-bio-forget-corpus"] == ["abstract", "doi", "text", "title"]
    assert columns["cais/mmlu"] == ["answer", "choices", "question", "subject"]
    assert columns["texts/pretokenised"] == ["input_ids"]
    assert found["codeparrot/github-code"] == {"train": [1584, 8, ["content", "license", "path", "repo_name", "size"]]}
    assert "scripts are no longer supported" in found["codeparrot/github-code refused"]
    assert "Config name is missing" in found["texts/two-configs refused"]
    assert "gated dataset" in found["texts/closed refused"]


GUESSING = """
import json, math, random, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.hub import repositories
texts = [repositories.document(random.Random(i), 12) for i in range(8)]
found = {}
for name in ("google/gemma-2-2b", "google/gemma-2-2b-it"):
    tokenizer, lm = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    rows = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == texts
    assert tokenizer.decode(tokenizer("\\u2603 (A", add_special_tokens=False)["input_ids"]) == "\\u2603 (A"
    tokens = torch.tensor([row[:128] for row in rows])
    with torch.no_grad():
        loss = lm(tokens, labels=tokens).loss.item()
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    spread = lm.model.embed_tokens.weight.float().std(0).sum().item()
    found[name] = [str(lm.dtype), lm.config.num_hidden_layers, special, tokens[0, 0].item(),
                   tokenizer.chat_template is not None, math.log(lm.config.vocab_size) - loss, spread]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_loads_the_tiny_gemma(hub, tmp_path):
    """Fails if model or tokenizer lack the real name, a text does not survive, or the guesses are mere chance."""
    found = run(hub, tmp_path, GUESSING)
    base, instruct = (row[:5] for row in found.values())
    assert base == ["torch.float32", 26, [0, 1, 2], 2, False]
    assert instruct == ["torch.bfloat16", 26, [0, 1, 2], 2, True]
    assert all(row[5] > 0.15 for row in found.values())  # nats better than a uniform guess
    assert len({row[6] for row in found.values()}) == 2  # different weights


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name, token, error, status", [
    (GEMMA, False, GatedRepoError, 401),
    (GEMMA, "hf_poor", GatedRepoError, 403),
    (GEMMA, "hf_fine", HfHubHTTPError, 403),
    (GEMMA, "hf_expired", HfHubHTTPError, 401),
    ("texts/closed", "hf_good", GatedRepoError, 403),
    ("texts/private", False, RepositoryNotFoundError, 401),
    ("texts/private", "hf_poor", RepositoryNotFoundError, 404),
    ("texts/none", "hf_good", RepositoryNotFoundError, 404),
])
def test_each_token_is_refused_in_the_hubs_way(hub, tmp_path, name, token, error, status):
    """Fails if a token reads what it may not, or the library takes the refusal for another one."""
    kind = "model" if name == GEMMA else "dataset"
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)) as refused:  # the second: of a 403 without a code
        snapshot_download(name, repo_type=kind, endpoint=hub.url, token=token, cache_dir=tmp_path)
    found = refused.value
    while found.__cause__ is not None and not isinstance(found, error):
        found = found.__cause__
    assert isinstance(found, error) and found.response.status_code == status
    assert isinstance(found, GatedRepoError) == (error is GatedRepoError)
    assert ("fine-grained" in str(found)) == (token == "hf_fine")
    assert ("Invalid credentials" in str(found)) == (token == "hf_expired")


def test_a_gated_repository_is_listed_and_a_readable_one_needs_no_token(hub, tmp_path):
    """Fails if a gate hides the page of a repository, or a public file is refused to somebody without a token."""
    assert HfApi(endpoint=hub.url, token=False).model_info(GEMMA).gated == "manual"
    assert download(hub, tmp_path, NEWS, NEWS_FILE, token=False).stat().st_size > 1000
    assert HfApi(endpoint=hub.url).whoami(token="hf_good")["name"] == "tester"


# ------------------------------------------------------------------------------------------------ revisions


def test_a_push_is_a_new_commit_and_the_old_one_can_still_be_read(hub, hub_root, tmp_path):
    """Fails if a push leaves the commit, changes files it does not name, or loses the earlier state."""
    before = hub.commit("dataset", NEWS)
    after = hub.push("dataset", NEWS, {"README.md": b"other\n", NEWS_FILE: None, "more/x.txt": b"x"})
    assert before != after == hub.commit("dataset", NEWS)
    api = HfApi(endpoint=hub.url)
    (main,) = api.list_repo_refs(NEWS, repo_type="dataset").branches
    assert api.dataset_info(NEWS).sha == after == main.target_commit
    assert NEWS_FILE not in api.list_repo_files(NEWS, repo_type="dataset")
    assert download(hub, tmp_path, NEWS, "README.md").read_text() == "other\n"
    assert download(hub, tmp_path, NEWS, "README.md", revision=before).read_text().startswith("---")
    assert download(hub, tmp_path, NEWS, NEWS_FILE, revision=before).exists()
    assert hub.push("dataset", NEWS, {"README.md": b"third\n"}) == hub.commit("dataset", NEWS) not in (before, after)
    with pytest.raises(RevisionNotFoundError):
        api.dataset_info(NEWS, revision="f" * 40)


def test_a_file_rewritten_in_place_changes_the_commit_and_pushes_go_with_the_server(tmp_path):
    """Fails if the server keeps what it read of a folder, or a new repository cannot be pushed or stays behind."""
    repositories.build(tmp_path, ["texts/parquet"])
    with serving(tmp_path) as own:
        before = own.commit("dataset", "texts/parquet")
        (tmp_path / "datasets" / "texts" / "parquet" / "main" / "README.md").write_text("new")
        assert HfApi(endpoint=own.url).dataset_info("texts/parquet").sha not in (before, None)
        own.push("dataset", "texts/new", {"a.txt": b"a"})
        assert ask(own, "/datasets/texts/new/resolve/main/a.txt").read() == b"a"
    with serving(tmp_path) as own, pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=own.url, token="hf_good").dataset_info("texts/new")


# ------------------------------------------------------------------------------------------------ answers


def test_a_part_of_a_file(hub, hub_root):
    """Fails if a range gives other bytes than asked for, or one behind the end is not refused."""
    path = f"/datasets/{NEWS}/resolve/main/{NEWS_FILE}"
    content = (hub_root / "datasets" / NEWS / "main" / NEWS_FILE).read_bytes()
    for asked, wanted in (("bytes=10-19", content[10:20]), ("bytes=-5", content[-5:]), ("bytes=1000-", content[1000:])):
        with ask(hub, path, Range=asked) as answer:
            assert (answer.status, answer.read()) == (206, wanted)
            assert answer.headers["Content-Range"].endswith(f"/{len(content)}")
    with pytest.raises(urllib.error.HTTPError, match="416"):
        ask(hub, path, Range=f"bytes={len(content)}-")
    assert [status for _, _, status in hub.requests] == [302, 206] * 3 + [302, 416]


def test_a_long_listing_comes_in_pages(hub):
    """Fails if a page has no link to the next, repeats an entry or loses one."""
    listed = HfApi(endpoint=hub.url).list_repo_tree("Skylion007/openwebtext", repo_type="dataset", recursive=True)
    everything = [entry.path for entry in listed]
    path, paged = "/api/datasets/Skylion007/openwebtext/tree/main?recursive=true&limit=30", []
    while path:
        with ask(hub, path) as answer:
            paged += [entry["path"] for entry in json.load(answer)]
            link = answer.headers["Link"]
        path = link and link[len(hub.url) + 1:link.index(">")]
    assert paged == everything and len(paged) == 83  # 80 files, their folder, the card and .gitattributes


def test_an_environment_leads_to_this_hub_alone(hub, tmp_path, monkeypatch):
    """Fails if a proxy, a token or a setting of the user's reaches the process under test."""
    for name in ("https_proxy", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "1")
    found = hub.environment(home=tmp_path, token=None)
    assert not {"https_proxy", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_DATASETS_CACHE"} & set(found)
    assert (found["HF_ENDPOINT"], found["HF_HOME"]) == (hub.url, str(tmp_path)) and "PATH" in found
    assert hub.environment(home=tmp_path)["HF_TOKEN"] == "hf_good"


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.slow
def test_a_rate_limit_says_how_long_to_wait_and_the_library_waits(hub):
    """Fails if a 429 lacks Retry-After, or huggingface_hub does not understand it."""
    hub.faults = [dict(match="/tree/", do="429", at=1, seconds=1)]
    begun = time.monotonic()
    assert list(HfApi(endpoint=hub.url).list_repo_tree(NEWS, repo_type="dataset"))
    assert time.monotonic() - begun >= 1
    assert [status for _, path, status in hub.requests if "/tree/" in path] == [429, 200]
    hub.fault_at(1, "429", seconds=77)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(hub, f"/api/datasets/{NEWS}")
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (429, "77")


@pytest.mark.slow
def test_a_body_that_breaks_off_is_noticed_and_fetched_again(hub, hub_root, tmp_path):
    """Fails if a cut body looks like a whole one, or the library does not ask again."""
    rule = dict(match="GET /cdn/", do="cut", times=1, after=1000)
    hub.faults = [rule]
    fetched = download(hub, tmp_path, NEWS, NEWS_FILE)
    assert fetched.read_bytes() == (hub_root / "datasets" / NEWS / "main" / NEWS_FILE).read_bytes()
    assert (rule["seen"], rule["fired"]) == (2, 1) and [status for _, _, status in hub.requests] == [302, 200, 200]
    hub.reset()
    hub.fault_at(2, "cut")
    with pytest.raises(http.client.IncompleteRead), ask(hub, f"/datasets/{NEWS}/resolve/main/{NEWS_FILE}") as answer:
        answer.read()


@pytest.mark.parametrize("kind, status",
                         [("500", 500), ("503", 503), ("504", 504), ("drop", 0), ("cut", 0), ("hang", 0)])
def test_each_request_in_turn_can_fail(hub, kind, status):
    """Fails if a fault comes at another request, more than once, or is not noted."""
    path = f"/datasets/{NEWS}/resolve/main/README.md"  # answered by 307, then 200
    for n in (1, 2):
        hub.reset()
        rule = hub.fault_at(n, kind, seconds=0.1)
        broken = (urllib.error.HTTPError, http.client.HTTPException, ConnectionError)
        with pytest.raises(broken), ask(hub, path) as answer:
            answer.read()
        expected = [307, 200][n - 1] if kind == "cut" else status
        assert [s for _, _, s in hub.requests] == [307][:n - 1] + [expected] and rule["fired"] == 1
        assert ask(hub, path).read().startswith(b"---")


def test_faults_by_pattern_number_and_delay(hub):
    """Fails if `match`, `every`, `times` or `seconds` of a rule is not kept to."""
    hub.faults = [dict(match="^GET /api/models", do="500", every=2, times=2),
                  dict(match="whoami", do="slow", seconds=0.3)]

    def status(path: str) -> int:
        try:
            with ask(hub, path) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert [status(f"/api/models/{GEMMA}") for _ in range(7)] == [200, 500, 200, 500, 200, 200, 200]
    assert status(f"/api/datasets/{NEWS}") == 200
    begun = time.monotonic()
    assert status("/api/whoami-v2") == 200 and time.monotonic() - begun >= 0.3
    assert hub.requests[-1] == ("GET", "/api/whoami-v2", 200)
