"""Where a model's weights lie, what identifies them, and what can be wrong with them, told before a run."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evals.model import architecture, checks, language_model, places
from evals.storage import network
from tests import architectures


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return architectures.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


@pytest.fixture
def lm(folder):
    return load(folder)


def load(folder, name="m"):
    return language_model.load(folder, name, torch.float32, "cpu")


def configure(folder, **changed):
    """Other values in config.json."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))


def test_the_content_of_a_folder_is_its_identity(folder, tmp_path):
    """Fails if another name or time makes another model, or other weights under the same name, size and time do not."""
    before = places.identity(folder)
    assert places.identity(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    weights = folder / "model.safetensors"
    found, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert places.identity(folder) != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no files"):
        places.identity(tmp_path / "empty")


def test_two_models_of_the_hub_never_share_a_digest(llama, tmp_path, monkeypatch):
    """Fails if a snapshot is not known by its commit, or a folder that a user names in the hub's cache is.

    Two models would share cached activations, or a folder would be taken for the commit that once was in it.
    """
    digests = set()
    pinned = [("google/gemma-2-2b", "a" * 40), ("google/gemma-2-2b-it", "a" * 40), ("google/gemma-2-2b", "b" * 40)]
    for name, commit in pinned:
        place = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / commit
        if not place.exists():
            shutil.copytree(llama, place)
        monkeypatch.setattr(network, "PINNED", {("model", name): commit})
        digests.add(load(place, name).digest)
    assert digests == {f"{name}@{commit}:float32" for name, commit in pinned}
    before = places.known_identity(str(place), "", "")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert places.known_identity(str(place), "", "") != before


def in_shards(folder):
    """The index of the same weights in several files."""
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder / "model.safetensors.index.json"


def cut(file, n):
    file.write_bytes(file.read_bytes()[:-n])


def adapter(folder, base):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


def adapter_alone(folder):
    (folder / "config.json").unlink()
    adapter(folder, "google/gemma-2-2b")


def gguf(folder):
    (folder / "model.safetensors").rename(folder / "m.gguf")


def gguf_alone(folder):
    gguf(folder)
    (folder / "config.json").unlink()


def pickle_cut(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin", 500)


def other_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{i}": 400 + i for i in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


SPOILT = {
    "adapter": adapter_alone,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "shard": lambda folder: sorted(in_shards(folder).parent.glob("model-0*.safetensors"))[1].unlink(),
    "cut": lambda folder: cut(folder / "model.safetensors", 10),
    "encoder": lambda folder: (folder / "config.json").write_text(transformers.T5Config().to_json_string()),
    "quantised": lambda folder: configure(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
    "unknown type": lambda folder: configure(folder, model_type="nothing_known"),
    "index cut": lambda folder: cut(in_shards(folder), 5),
    "index of nothing": lambda folder: in_shards(folder).write_text("{}"),
    "gguf": gguf,
    "gguf alone": gguf_alone,
    "adapter beside": lambda folder: adapter(folder, "x/y"),
    "config cut": lambda folder: cut(folder / "config.json", 5),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "pickle cut": pickle_cut,
    "integers": lambda folder: rewrite(folder, lambda w: w | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
    "no blocks": lambda folder: configure(folder, num_hidden_layers=0),
    "tokenizer cut": lambda folder: cut(folder / "tokenizer.json", 200),
    "tokenizer of another model": other_tokenizer,
}


@pytest.mark.parametrize("how, words", [
    ("adapter", "PEFT adapter of google/gemma-2-2b.*\n.*merge_and_unload"),
    ("no config", "no config.json\n"),
    ("no tokenizer", "no tokenizer .*\n.*save_pretrained"),
    ("no weights", "lacks model.safetensors\n"),
    ("shard", "lacks model-00002-of-.*\ncopy the folder whole"),
    ("cut", r"model.safetensors is damaged or cut off \([\d,]+ bytes\)\n"),
    ("encoder", "type t5, which is no causal language model\n"),
    ("quantised", "is quantised, and its format needs a package: .*\n.*before it was quantised"),
    ("unknown type", "config.json: .*nothing_known.*\n.*pip install -U transformers"),
    ("index cut", "safetensors.index.json is damaged or cut off: .*\ncopy it again"),
    ("index of nothing", "safetensors.index.json names no weight files"),
    ("gguf", "lacks model.safetensors; m.gguf is GGUF, and not read\n"),
    ("gguf alone", "no config.json; m.gguf is GGUF, and not read\n"),
    ("adapter beside", "PEFT adapter of x/y beside the files of a model\nmerge it first"),
    ("config cut", "config.json is damaged or cut off: "),
    ("empty", r"model.safetensors is damaged or cut off \(0 bytes\)\n"),
    ("pickle cut", r"pytorch_model.bin is damaged or cut off \([\d,]+ bytes\)\n"),
    ("integers", "holds integers as weights, and config.json no quantization_config .*: model.norm.weight\n"),
    ("no blocks", "says that it has no blocks\n"),
    ("tokenizer cut", "tokenizer.json is damaged or cut off: "),
    ("tokenizer of another model",
     r"has 50 ordinary tokens beyond the 400 .* such as 400 \('more0'\): it is another model's\n")])
def test_a_folder_that_cannot_serve_is_refused_from_its_files_alone(folder, how, words):
    """Fails if a folder passes preflight, or is filled up in silence, or ends in another library's words."""
    SPOILT[how](folder)
    with pytest.raises(ValueError, match=words):
        places.shape(str(folder), 4)


def test_weights_that_would_be_made_up_are_refused(folder):
    """Fails if a missing weight becomes a random one: two runs would differ under one digest."""
    configure(folder, num_hidden_layers=4)
    words = r"lacks weights that its configuration asks for: model.layers.3.* and \d+ more\n"
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_blocks_that_the_configuration_does_not_have_are_not_left_out(folder):
    """Fails if a model is cut short in silence, or the one with a file too many in its index is refused."""
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert places.shape(str(folder), 4)["n_layers"] == 3  # transformers takes the whole file first
    configure(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match="has weights of block 2, and its configuration says 2 blocks\n"):
        load(folder)


def rewrite(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def with_weight(key, change):
    """Weights whose `key` is changed."""
    return lambda weights: weights | {key: change(weights[key].clone())}


def with_row(number, value):
    def change(weight):
        weight[number] = value
        return weight
    return change


UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("change, words", [
    (lambda w: {key: value for key, value in w.items() if key != "lm_head.weight"},
     "lacks weights .*: lm_head.weight\n"),
    (lambda w: {key.replace("model.", "other."): value for key, value in w.items()},
     "lacks .* and has others .*: other.embed_tokens.weight"),
    (lambda w: w | {DOWN: torch.ones(32, 60)}, rf"another shape .*: {DOWN}, \[32, 60\] instead of \[32, 64\]\n"),
    (lambda w: w | {"model.layers.1.mlp.down_proj.bias": torch.ones(32)},
     "makes no use of: model.layers.1.mlp.down_proj.bias\n"),
    (with_weight(DOWN, with_row(3, math.nan)),
     f"{DOWN} holds NaN or infinite values in float32: 64 of its 2,048, first in row 3\n"),
    (with_weight(EMBED, with_row(300, math.inf)), f"{EMBED} holds NaN or .* first in row 300, the token 300 "),
    (lambda w: w | {DOWN: 1e300 * w[DOWN].double()}, f"{DOWN} holds NaN or infinite values in float32: 2,048 of"),
    (lambda w: w | {key: 0 * value for key, value in w.items() if "layers.1." in key},
     "all matrices of block 1 are 0\n"),
    (with_weight(EMBED, lambda x: 0 * x), "its embeddings are all 0\n"),
    (with_weight(EMBED, lambda x: 1e25 * x),
     r"values up to \d[.\d]*e\+2\d before block 0, in its embeddings: their squares overflow\n"),
    (with_weight(EMBED, lambda x: 1e12 * x), "block 0 changes nothing: what it adds .* is lost in rounding"),
    (with_weight(DOWN, lambda x: 1e30 * x),
     r"values up to .* after block 1, with weights up to .* \(mlp.down_proj.weight\): their squares"),
    (with_weight(UP, lambda x: 1e38 * x),
     "NaN or infinite values after block 1 in float32: it overflows with weights up to .*mlp.up_proj")])
def test_weights_that_are_no_model_are_refused_at_the_load(folder, change, words):
    """Fails if weights are made up or left out, or training finds out that a model gives no numbers."""
    rewrite(folder, change)
    with pytest.raises((ValueError, RuntimeError), match=words):
        load(folder)


def test_what_old_files_hold_beside_the_weights_is_no_fault(folder, capsys):
    """Fails if an old version's buffer is taken for a weight, or a matrix of zeros ends the run or passes unsaid."""
    rewrite(folder, lambda w: w | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8), DOWN: 0 * w[DOWN]})
    load(folder)
    assert f"has matrices of zeros alone: {DOWN}\n" in capsys.readouterr().out


def test_the_token_that_gives_nan_is_named_and_not_its_neighbours(lm):
    """Fails if the first token that has NaN is blamed: attention carries it to earlier tokens of the row too."""
    lm.hf.get_input_embeddings().weight.data[77] = math.nan
    tokens_BT = torch.tensor([[lm.bos, 5, 6, 7, 8], [lm.bos, 9, 10, 77, 11]])
    x_ND = lm.residuals(tokens_BT, [1])[1][:, 1:].flatten(0, 1)
    assert int((~x_ND.isfinite().all(-1)).nonzero()[0]) == 4  # the 9, which is innocent
    said = str(checks.not_finite(lm, 1, x_ND, tokens_BT[:, 1:].flatten()))
    assert "for the token 77 ('" in said and "first before block 0, in its embeddings, in float32" in said
    lm.hf.get_input_embeddings().weight.data[77] = 0.1
    seen = []

    def in_company(module, args, output):  # no token alone does it
        return output * math.nan if seen[-1].shape[1] > 3 and (seen[-1] == 77).any() else output

    lm.blocks[1].register_forward_hook(in_company)
    lm.backbone.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]),
                                          with_kwargs=True)
    x_ND = lm.residuals(tokens_BT[1:], [1])[1][:, 1:].flatten(0, 1)
    said = str(checks.not_finite(lm, 1, x_ND, tokens_BT[1, 1:]))
    assert "for the token 77 ('" in said and "after the 2 before it, first after block 1" in said


def test_few_tokens_that_hold_most_of_the_norm_are_named(folder):
    """Fails if outliers are not named with their shares, worked out by hand, or ordinary spread is taken for them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = SimpleNamespace(tokenizer=tokenizer, bos=0, special_ids={0})
    x_ND, tokens_N = torch.ones(1000, 4), torch.arange(1000) % 100 + 10
    x_ND[torch.arange(1000) // 100 % 2 == 1] *= -1  # every token as often as its opposite: a mean of 0
    assert checks.outliers(x_ND * torch.linspace(0.5, 4, 1000)[:, None], tokens_N, lm) is None
    for nothing in (torch.zeros(0, 4), torch.zeros(9, 4)):  # a rank without tokens; a dead stream
        assert checks.outliers(nothing, tokens_N[:len(nothing)], lm) is None
    x_ND[tokens_N == 20] *= 30  # 10 of 1,000 tokens, each 900 times a common one's square: 9000 / 9990
    x_ND[5] *= 20  # the token 15: 400 / 10389
    said = checks.outliers(x_ND.bfloat16(), tokens_N, lm)
    assert said.startswith("1.10% of tokens, over 10 times as far from the mean as the median token, hold 90.5% of the "
                           "variance: ")
    assert f"{tokenizer.decode([20])!r} (id 20): 1.00% of tokens, 86.6%; " in said
    assert f"{tokenizer.decode([15])!r} (id 15): 0.10% of tokens, 3.9%;" in said
    assert "--max_norm_ratio=10 leaves them out" in said
    # 1 in 50,000: a tail that the first tokens of a block do not hold
    x_ND, tokens_N = x_ND[:500].repeat(100, 1).clamp(-1, 1), tokens_N.repeat(50)
    x_ND[-1] *= 1000
    assert checks.outliers(x_ND, tokens_N, lm).startswith("0.002% of tokens, ")
    lm.bos = int(tokens_N[-1])
    lm.special_ids = {lm.bos}
    said = checks.outliers(x_ND, tokens_N, lm)
    assert "training is about these, and evals measure the rest" in said and said.endswith(": leave --keep_bos out")


@pytest.mark.parametrize("shift, advice", [(0, "--max_norm_ratio=10"), (3, "--max_norm_ratio=10"),
                                           (10, "--max_norm_ratio=2.5"), (1000, "another layer")])
def test_outliers_are_found_beside_a_mean(folder, shift, advice):
    """Fails if the spread is taken for part of the norm, or a bound is named that leaves the outliers in.

    Spread 1, a mean of `shift` in another direction, 1 token in 100 at 60: 36 of 37 parts of the variance.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = SimpleNamespace(tokenizer=tokenizer, bos=0, special_ids={0})
    x_ND, tokens_N = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)) / 8, torch.arange(5000) % 100
    x_ND[:, 0] += shift
    assert checks.outliers(x_ND, tokens_N, lm) is None
    x_ND[tokens_N == 7, 1] += 60
    said = checks.outliers(x_ND, tokens_N, lm)
    assert said.startswith("1.00% of tokens, ") and "hold 97." in said and advice in said, said


@pytest.mark.parametrize("name", ["./no/such", "a/b/c", "~/nope"])
def test_a_mistyped_folder_is_no_name_on_the_hub(name):
    """Fails if the network is blamed for a typing mistake."""
    with pytest.raises(FileNotFoundError, match=f"no folder {name}\n"):
        places.known_identity(name, "", "")


def test_code_of_a_model_s_own_is_not_run(folder):
    """Fails if it is run, or the advice is to check the file."""
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}))
    (folder / "configuration_mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="code of its own .* that is not run\n"):
        places.shape(str(folder), 4)


def test_a_broken_tokenizer_is_one_line(folder):
    """Fails if another library's paragraph, or a KeyError alone, is the message."""
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded: .*\nsave it again"):
        places.tokenizer(str(folder), "", "")


def test_a_tokenizer_without_bos_takes_eos_and_without_both_is_refused(folder):
    """Fails if rows begin with a made-up token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    assert architecture.bos_of(tokenizer, "m") == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token\n"):
        places.tokenizer(str(folder), "", "")


def test_a_model_that_cannot_be_cut_is_refused_with_the_figure(lm):
    """Fails if a model whose blocks see more than the residual stream gets a result: here block 2 sees the tokens."""
    checks.trial(lm, [0, 1, 2])
    seen = []
    lm.hf.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    lm.blocks[2].register_forward_hook(lambda module, args, output: output + seen[-1])
    words = r"m \(llama\) gives other logits when .* after block 1 .* differ by [\d.]+ of their norm"
    with pytest.raises(RuntimeError, match=words):
        checks.trial(lm, [1])


def test_a_model_that_sees_later_tokens_is_refused(lm):
    """Fails if a model that is not causal is taken for one; here block 0 adds what the next token has."""
    lm.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + args[0].roll(-1, 1), *args[1:]))
    words = r"is not causal: another last token changes .* block 1 by [\d.]+ of their norm"
    with pytest.raises(RuntimeError, match=words):
        checks.trial(lm, [1])


def test_nan_is_named_before_training(lm):
    """Fails if a model that gives NaN is found out by the SAE's loss."""
    lm.blocks[1].mlp.down_proj.weight.data.fill_(float("nan"))
    words = "NaN or infinite values after block 1 in float32: its mlp.down_proj.weight holds such"
    with pytest.raises(RuntimeError, match=words):
        checks.trial(lm, [1])


def test_refusals_say_what_to_do(monkeypatch):
    """Fails if an expired token, a missing grant, a proxy and a dead network get the same advice."""
    import httpx
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    def error(cls, code, words):
        made = cls.__new__(cls)
        Exception.__init__(made, words)
        made.response = httpx.Response(code)
        return made

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    fine = "Please enable access to public gated repositories in your fine-grained token settings"
    cases = [(error(HfHubHTTPError, 401, "Invalid credentials in Authorization header"), "invalid or expired",
              "hf auth login` again"),
             (error(GatedRepoError, 403, "not in the authorized list"), "no access to it yet", "ask for access on"),
             (error(HfHubHTTPError, 403, fine), "fine-grained", "settings/tokens"),
             (error(RepositoryNotFoundError, 404, "no"), "no model o/n, or it is private, and there is no such folder",
              "check the name"),
             (error(HfHubHTTPError, 429, "Too Many Requests"), "asks to wait", "start again later"),
             (httpx.ProxyError("407 Proxy Authentication Required"), "through the proxy", "HTTPS_PROXY"),
             (httpx.ConnectError("Name or service not known"), "cannot be reached", "check the network")]
    for given, what, advice in cases:
        first, second = network.refusal(given, "model", "o/n").splitlines()
        assert what in first and advice in second and "o/n" in first
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(network, "_stored_token", lambda: None)
    said = network.refusal(error(GatedRepoError, 401, "Please log in"), "model", "o/n")
    assert "no token is given\naccept its licence" in said


def test_patience_waits_as_long_as_asked_and_only_for_what_may_pass(monkeypatch):
    """Fails if Retry-After is ignored, a 404 asked again, a dead network waited for, or the last error lost."""
    import httpx

    waits = []
    monkeypatch.setattr(network.time, "sleep", waits.append)
    monkeypatch.setattr(network, "HEARD", {"last": ""})

    def failing(*errors):
        left = list(errors)

        def work():
            if left:
                raise left.pop(0)
            return "done"
        return work

    def http(code, **headers):
        request = httpx.Request("GET", "http://h")
        return httpx.HTTPStatusError(str(code), request=request,
                                     response=httpx.Response(code, headers=headers, request=request))

    passing = [http(429, **{"Retry-After": "17"}), http(503), httpx.ReadTimeout("slow")]
    assert network.patiently("x", failing(*passing)) == "done" and waits == [17, 2, 4]
    waits.clear()
    with pytest.raises(httpx.HTTPStatusError):
        network.patiently("x", failing(http(404)))
    assert waits == []
    for _ in range(2):  # the second that is asked is not waited for again
        with pytest.raises(httpx.ConnectError):
            network.patiently("x", failing(*[httpx.ConnectError("refused")] * 9))
        assert waits == [1, 2]
    waits.clear()
    network.HEARD["last"] = "an answer"  # an outage in the middle of a run is waited out
    assert network.patiently("x", failing(*[httpx.ConnectError("refused")] * 6)) == "done"
    assert waits == [1, 2, 4, 8, 16, 32]
    waits.clear()
    with pytest.raises(httpx.HTTPStatusError, match="500"):
        network.patiently("x", failing(*[http(500)] * 9))
    assert waits == [1, 2, 4, 8, 16, 32]
