"""Every architecture that people train SAEs on: residuals, the rest of the pass and logits are the model's own."""

import json
import math

import pytest
import torch
import transformers

import experiment
from evals.model import checks, language_model, places
from evals.texts import packing, tiny
from tests import architectures
from variants.preflight import budget

pytestmark = pytest.mark.usefixtures("no_pages")

LAYER = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def saved(folder, name):
    """The folder of the tiny random model of that architecture, saved once."""
    where = folder / name
    return where if where.exists() else architectures.save(name, where)


NAMES = list(architectures.configurations())
WITH_PAGES = ["gpt2", "mamba"]  # what pages need of a model, evals need too: one with attention and one without


@pytest.fixture
def model(name, folder):
    """(name, folder of the tiny random model)"""
    return name, saved(folder, name)


def untouched(where):
    """The model by transformers alone; eager, since other kernels may drop Gemma-2's soft-capping in silence."""
    return transformers.AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager").eval()


def hooked(hf, tokens_BT, change):
    """(block LAYER's output, logits) of an untouched model whose output there is replaced by change(output)."""
    seen = []

    def hook(module, args, output):
        x_BTD = output[0] if isinstance(output, tuple) else output
        seen.append(x_BTD.clone())
        new = change(x_BTD)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    lists = [m for m in hf.get_decoder().children() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    handle = lists[0][LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logits = hf(input_ids=tokens_BT, use_cache=False).logits
    handle.remove()
    return seen[0], logits


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_residuals_and_what_follows_them_are_the_model_s_own(model):
    """Fails if an eval's residual is not the block's output, what follows another one not the untouched model's.

    A scale, a cap, a bias, a mask or a position may be lost there. The sizes must be the model's, too.
    """
    name, where = model
    tokens_BT = torch.randint(5, 390, (3, 24), generator=torch.Generator().manual_seed(1))
    plain = untouched(where)
    lm = language_model.load(where, name, torch.float32, "cpu")
    checks.trial(lm, [0, LAYER, 2])
    truth, _ = hooked(plain, tokens_BT, lambda x: x)
    for x_BTD in (lm.residuals(tokens_BT, [LAYER])[LAYER], lm.residual(tokens_BT, LAYER)):
        assert (x_BTD - truth).abs().max() < 1e-4 * truth.abs().max()
    for change in (lambda x: x, lambda x: 0.5 * x.roll(1, -1), torch.zeros_like):
        _, expected = hooked(plain, tokens_BT, change)
        logits = lm.unembed(lm.finish(change(truth), LAYER))
        assert (logits - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert bool(expected.std() < 1e-6) == lm.uniform_when_ablated
    shape = places.shape(str(where), 4)
    assert (shape["d_model"], shape["n_layers"]) == (truth.shape[-1], 3)
    assert shape["bytes"] == 4 * sum(p.numel() for p in plain.parameters())
    assert 3 * shape["block_parameters"] < shape["bytes"] / 4
    assert budget.rows_per_pass(1e9, 24, 4 * shape["d_model"], "cpu") > 0
    assert shape["positions"] in (architectures.POSITIONS, 2048, None) and math.isfinite(float(logits.detach().sum()))


def test_the_bridge_is_used_where_it_agrees_and_only_there(folder, capsys):
    """Fails if another model's residuals are taken for Cohere's, in silence, or Llama loses TransformerLens' hooks."""
    for name, agrees in (("llama", True), ("gpt2", True), ("cohere", False), ("deepseek_v2", False),
                         ("gemma3_wrapped", False)):
        lm = language_model.load(saved(folder, name), name, torch.float32, "cpu")
        assert (lm.bridge is not None) == agrees
        for _ in range(2):
            lm.residual(torch.zeros(1, 3, dtype=torch.long), 1)
        assert capsys.readouterr().out.count("go through the plain model") == (not agrees)


def test_gradients_pass_through_what_follows(folder):
    """Fails if RAVEL's masks would get no gradient through `finish` and `unembed`."""
    lm = language_model.load(saved(folder, "gpt2"), "gpt2", torch.float32, "cpu")
    x_BTD = torch.randn(2, 5, 32, requires_grad=True)
    lm.unembed(lm.finish(x_BTD, LAYER))[:, -1, 7].sum().backward()
    assert x_BTD.grad[:, -1].abs().max() > 0 and x_BTD.grad[:, 0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.pages) for name in WITH_PAGES),
                                  *(name for name in NAMES if name not in WITH_PAGES)])
def test_a_whole_run_measures_the_model_itself(model, folder, tmp_path):
    """Fails if a run breaks on a family without Llama's names, core's loss without an SAE is not the model's, or no
    dashboards can be made of one.
    """
    name, where = model
    config = {"core": {"batch_size_prompts": 2, "n_eval_reconstruction_batches": 4,
                       "n_eval_sparsity_variance_batches": 4}}
    flags = ["--profile=tiny", f"--model={where}", "--layers=1", "--device=cpu", "--num_tokens=4096",
             f"--cache_dir={folder / 'cache'}", f"--eval_config={json.dumps(config)}",
             f"--out_dir={tmp_path / 'run'}"]
    assert experiment.main(flags) == 0
    assert (tmp_path / "run/features/layer_1.html").exists() == (name in WITH_PAGES)
    means = json.loads((tmp_path / "run/final_info.json").read_text())["layer_1"]["means"]
    hf = untouched(where)
    rows_RT = packing.pack(tiny.documents("heldout"), architectures.tokenizer(), 32, 0, 8)
    with torch.no_grad():
        logits = hf(input_ids=rows_RT, use_cache=False).logits.float()
    ordinary = rows_RT[:, :-1] > 1  # neither BOS nor EOS
    ce = torch.nn.functional.cross_entropy(logits[:, :-1][ordinary], rows_RT[:, 1:][ordinary])
    assert means["core.ce_loss_without_sae"] == pytest.approx(float(ce), abs=1e-4)
    assert means["core.l0"] > 0 and means["sparse_probing.sae_top_1_test_accuracy"] > 0.4
