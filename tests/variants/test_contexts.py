"""Contexts and attention patterns: the model's pass, the sparse form, and batches of whole rows."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from evals.model import built_in
from evals.model.language_model import LanguageModel
from variants import base
from variants.kit import contexts

# four rows of 5 positions: row 0 has an inner BOS at position 3, row 1 holds nothing but BOS, row 3 is cut off after
# one token
CONTEXT = 5
PLACE = torch.tensor([1, 2, 4, 11, 12, 13, 14, 16], dtype=torch.int32)


# ------------------------------------------------------------------------------------------------ the model's pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: built_in.tiny_folder(tmp_path_factory.mktemp("cache"), name) for name in ("gemma2", "llama")}


def language_model(folders, architecture):
    sizes = dict(vocab_size=512, bos_token_id=2, eos_token_id=1)
    torch.manual_seed(0)
    if architecture == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.5, **sizes))
    elif architecture == "gpt_neox":
        hf = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                              intermediate_size=64, initializer_range=0.5, **sizes))
    else:
        hf = AutoModelForCausalLM.from_pretrained(folders[architecture], dtype=torch.float32)
    return LanguageModel(hf, AutoTokenizer.from_pretrained(folders["llama"]), architecture, architecture)


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "gpt2", "gpt_neox"])
def test_patterns_and_residuals_equal_the_plain_eager_model(folders, architecture):
    """Fails if a pattern is another block's or no mean of heads, the pass is not eager, or the model stays changed."""
    lm, tokens_BT = language_model(folders, architecture), torch.randint(5, 60, (3, 24))
    before, given = lm.residuals(tokens_BT, [0, 2]), lm.hf.config._attn_implementation
    x, patterns = lm.residuals_and_attention(tokens_BT, [0, 2], [1, 3])
    assert lm.hf.config._attn_implementation == given
    assert all(torch.equal(x_BTD, before[layer]) for layer, x_BTD in lm.residuals(tokens_BT, [0, 2]).items())
    lm.hf.set_attn_implementation("eager")
    with torch.no_grad():
        truth = lm.hf(tokens_BT, output_attentions=True, output_hidden_states=True, use_cache=False)
    assert sorted(x) == [0, 2] and sorted(patterns) == [1, 3]
    for layer in x:
        assert torch.equal(x[layer], truth.hidden_states[layer + 1])
    for layer, pattern_BTT in patterns.items():
        expected = truth.attentions[layer]
        assert pattern_BTT.dtype == torch.float16 and (pattern_BTT - expected.mean(1)).abs().max() < 1e-3
        assert (expected[:, 0] - expected.mean(1)).abs().max() > 1e-2  # one head alone would not pass
        assert (pattern_BTT.float().sum(-1) - 1).abs().max() < 5e-3 and not pattern_BTT.triu(1).any()


def test_the_pass_stops_at_the_last_attention_and_forgets_its_hooks(folders):
    """Fails if a block's MLP is computed for its attention alone, or an exception leaves the model eager or hooked."""
    lm, tokens_BT = language_model(folders, "llama"), torch.randint(5, 60, (2, 8))
    lm.blocks[2].mlp.register_forward_pre_hook(lambda module, args: pytest.fail("the MLP of block 2 was computed"))
    x, patterns = lm.residuals_and_attention(tokens_BT, [0], [0, 2])
    assert sorted(x) == [0] and sorted(patterns) == [0, 2]
    with pytest.raises(IndexError):
        lm.residuals_and_attention(tokens_BT + 10**6, [0], [1])
    assert lm.hf.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in lm.hf.modules())


def test_an_attention_without_patterns_is_named(folders, monkeypatch):
    """Fails if the missing pattern of an architecture surfaces later as a KeyError, or not at all."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", lambda *a, **k: (original(*a, **k)[0], None))
    lm = language_model(folders, "llama")
    with pytest.raises(RuntimeError, match=r"llama \(llama\) gives no attention patterns in block 1\n"):
        lm.residuals_and_attention(torch.randint(5, 60, (2, 8)), [0], [1, 2])


# ------------------------------------------------------------------------------------------------ rows and pairs


def test_rows_of_step_are_all_rows_in_as_many_steps_as_asked_for():
    """Fails if a rounding loses or repeats a row, or a step without rows (a mean over nothing: NaN) is handed out."""
    order_R = torch.tensor([6, 0, 3, 1, 5, 2, 4])
    assert [rows.tolist() for rows in contexts.rows_of_step(7, 3, order_R)] == [[6, 0], [3, 1], [5, 2, 4]]
    with pytest.raises(ValueError, match="8 steps cannot share 7 contexts"):
        contexts.rows_of_step(7, 8, order_R)


def random_block(threshold=None):
    """A block on PLACE whose tokens, x and patterns tell where they come from; patterns above the diagonal, too."""
    pattern_RATT = torch.rand(4, 3, CONTEXT, CONTEXT, generator=torch.Generator().manual_seed(0)).half()
    x_ND = PLACE[:, None] * torch.tensor([1.0, 100.0])
    block = dict(tokens_N=PLACE + 1000, place_N=PLACE)
    if threshold is None:
        return block | dict(attention_RATT=pattern_RATT), x_ND, pattern_RATT
    pairs = contexts.sparse_attention(pattern_RATT, PLACE, CONTEXT, threshold)
    return block | dict(zip(("pair_query_P", "pair_key_P", "pair_attention_PA"), pairs)), x_ND, pattern_RATT


@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_sparse_attention_is_what_a_loop_over_pairs_finds(threshold):
    """Fails if BOS columns, the diagonal or later keys enter, one layer above the threshold is too few, or rows mix."""
    block, _, pattern_RATT = random_block(threshold)
    query_P, key_P, value_PA = block["pair_query_P"], block["pair_key_P"], block["pair_attention_PA"]
    expected = []
    for i, query in enumerate(PLACE.tolist()):
        for j, key in enumerate(PLACE.tolist()):
            values = pattern_RATT[query // CONTEXT, :, query % CONTEXT, key % CONTEXT].tolist()
            if j < i and query // CONTEXT == key // CONTEXT and any(value > threshold for value in values):
                expected.append((i, j, *values))
    assert list(zip(query_P.tolist(), key_P.tolist(), *value_PA.T.tolist())) == expected and 0 < len(expected) < 9
    assert query_P.dtype == key_P.dtype == torch.int32 and value_PA.dtype == torch.float16


# ------------------------------------------------------------------------------------------------ batches


def test_take_of_permuted_rows_by_hand():
    """Fails if rows are not in the order asked for, or a row without tokens shifts the numbers of the others."""
    block, x_ND, pattern_RATT = random_block()
    rows = torch.tensor([2, 1, 0])
    batch = contexts.take(block, rows, CONTEXT, x_ND.half(), "cpu")
    place = [11, 12, 13, 14, 1, 2, 4]
    assert batch["x"].tolist() == [[p, 100.0 * p] for p in place] and batch["x"].dtype == torch.float32
    assert batch["tokens"].tolist() == [p + 1000 for p in place]
    assert batch["positions"].tolist() == [1, 2, 3, 4, 1, 2, 4]
    assert batch["contexts"].tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert torch.equal(batch["attention"], pattern_RATT[rows].float()) and batch["attention"].dtype == torch.float32
    assert all(batch[name].dtype == torch.int64 for name in ("tokens", "positions", "contexts"))
    del block["attention_RATT"]
    assert sorted(contexts.take(block, rows, CONTEXT, x_ND, "cpu")) == ["contexts", "positions", "tokens", "x"]


def test_pairs_of_permuted_rows_point_at_the_same_tokens():
    """Fails if pairs are not moved with their row, or one is lost or doubled."""
    block, x_ND, pattern_RATT = random_block(0.6)
    rows = torch.tensor([3, 2, 1, 0])
    batch = contexts.take(block, rows, CONTEXT, x_ND, "cpu")
    query_P, key_P = batch["pairs"]
    assert batch["pairs"].dtype == torch.int64 and batch["pair_attention"].dtype == torch.float32
    assert torch.equal(batch["contexts"][query_P], batch["contexts"][key_P])
    found = pattern_RATT[rows[batch["contexts"][query_P]], :, batch["positions"][query_P], batch["positions"][key_P]]
    assert torch.equal(batch["pair_attention"], found.float())
    place_B = batch["x"][:, 0]
    expected = {(int(PLACE[i]), int(PLACE[j])) for i, j in zip(block["pair_query_P"], block["pair_key_P"])}
    got = list(zip(place_B[query_P].int().tolist(), place_B[key_P].int().tolist()))
    assert set(got) == expected and len(got) == len(expected)
    only_row_0 = contexts.take(block, torch.tensor([0]), CONTEXT, x_ND, "cpu")
    assert only_row_0["pairs"].shape[1] == sum(query < 5 for query, _ in expected)


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_take_never_reads_the_device(threshold):
    """Fails if a size or an index depends on a value on the device: meta tensors have none."""
    block, x_ND, _ = random_block(threshold)
    on_host = contexts.take(block, torch.tensor([2, 0]), CONTEXT, x_ND, "cpu")
    host = ("place_N", "pair_query_P", "pair_key_P")
    block = {name: tensor if name in host else tensor.to("meta") for name, tensor in block.items()}
    batch = contexts.take(block, torch.tensor([2, 0]), CONTEXT, x_ND.to("meta"), "meta")
    assert {name: (t.shape, t.dtype, t.is_meta) for name, t in batch.items()} == {
        name: (t.shape, t.dtype, True) for name, t in on_host.items()}


def test_synthetic_batches_look_like_those_of_training():
    """Fails if a token lies in the wrong context, a pattern is not causal, or the two forms disagree about it."""
    x_BD, state = torch.randn(17, 3), torch.get_rng_state()
    dense = base.Batch(**contexts.synthetic(x_BD, (-1, 0), None, 5))
    sparse = base.Batch(**contexts.synthetic(x_BD, (-1, 0), 0.3, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dense.x, x_BD) and torch.equal(dense.tokens, sparse.tokens)
    assert dense.contexts.tolist() == [0] * 7 + [1] * 7 + [2] * 3
    assert dense.positions.tolist() == [1, 2, 3, 4, 5, 6, 7] * 2 + [1, 2, 3]
    assert dense.attention.shape == (3, 2, 8, 8) and not dense.attention.triu(1).any()
    assert (dense.attention.sum(-1) - 1).abs().max() < 5e-3
    query_P, key_P = sparse.pairs
    values_PA = dense.attention[dense.contexts[query_P], :, dense.positions[query_P], dense.positions[key_P]]
    assert torch.equal(values_PA, sparse.pair_attention) and (values_PA > 0.3).any(1).all() and (key_P < query_P).all()
    same_BB = dense.contexts[:, None] == dense.contexts
    pattern_ABB = dense.attention[dense.contexts, :, dense.positions][:, :, dense.positions].movedim(1, 0)
    assert len(query_P) == ((pattern_ABB > 0.3).any(0) & same_BB).tril(-1).sum() > 0
    assert not hasattr(base.Batch(**contexts.synthetic(x_BD, (), None, 5)), "attention")
