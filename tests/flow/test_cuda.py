"""What only a GPU can show; skipped without one.

`python -m tests.flow.test_cuda` runs it without pytest, and needs torch and transformers alone.
"""

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch

import experiment
import variants
from evals.model import language_model
from evals.model.checks import ROUNDING
from tests import OWN_VARIANTS
from variants import base
from variants.kit import compiled, contexts, copies, gpu
from variants.kit import update as updating
from variants.kit.hyper import hyperparameters
from variants.kit.sparse import taken
from variants.kit.steps import gradients
from variants.kit.update import update

try:
    import pytest

    pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
except ImportError:
    pass

DEVICE, D, F, B = "cuda", 64, 1024, 252  # contexts of 7 tokens fill the batch


@contextmanager
def no_wait():
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stepped(name: str, device: str, steps: int, inside=nullcontext, free: int = 0) -> tuple[base.SAE, list[float]]:
    """A variant after some steps on sparse data, all but the first `free` of them within `inside`; the losses."""
    generator = torch.Generator().manual_seed(3)
    atoms_AD = torch.nn.functional.normalize(torch.randn(128, D, generator=generator), dim=1)
    share_NA = torch.rand(steps * B, 128, generator=generator)
    x_ND = torch.where(share_NA > 0.94, share_NA, 0.0) @ atoms_AD
    x_ND = x_ND / x_ND.pow(2).sum(1).mean().sqrt()
    torch.manual_seed(0)
    module = variants.load(name)
    sae = variants.build(module, D, F, {"k": 8} if "k" in hyperparameters(module) else {}).to(device)
    sae.initialise(x_ND[:1024].to(device))
    optimizer, losses = experiment.make_optimizer(sae, 1e-3), []
    needs = sae.needs_contexts or sae.attention_layers
    made = [contexts.synthetic(x_BD, sae.attention_layers, sae.attention_threshold, i) if needs else dict(x=x_BD)
            for i, x_BD in enumerate(x_ND.split(B))]
    made = [base.Batch(**{key: value.to(device) for key, value in fields.items()}) for fields in made]
    for step, batch in enumerate(made):
        progress = base.Progress(step, steps, step * B, steps * B)
        if step % 16 == 0:
            sae.look(progress)
        with inside() if step >= free else nullcontext():
            losses.append(experiment.train_step(sae, optimizer, batch, progress)[0])
    return sae, [float(loss) for loss in losses]


def test_every_variant_learns_on_a_gpu_what_it_learns_on_the_cpu():
    """Fails if bf16, a device or a GPU's own path (dense top-k, auxk unranked, compiled steps) changes training."""
    for name in OWN_VARIANTS:
        (here, expected), (there, found) = (stepped(name, device, 48) for device in ("cpu", DEVICE))
        last, last_found = sum(expected[-8:]) / 8, sum(found[-8:]) / 8
        said = f"{name}: loss {last_found:.4f} on the GPU, {last:.4f} on the CPU"
        assert abs(last_found - last) < 0.05 * abs(last), said
        if here.unit_norm_decoder:
            assert (there.W_dec.norm(dim=1) - 1).abs().max() < 1e-5, name


def test_no_step_waits_for_the_gpu():
    """Fails if a step of a variant of the field reads a value back, or takes a shape from data."""
    for name in OWN_VARIANTS:
        if variants.load(name).SAE.data_parallel:
            stepped(name, DEVICE, 24, no_wait, free=8)  # what is compiled or allocated at first may wait


def test_wide_saes_have_the_gradients_of_dense_products():
    """Fails if the sparse path that a GPU takes from some width on computes something else, or waits at a fixed k."""
    wide = 2**16
    batch = base.Batch(torch.randn(B, D, generator=torch.Generator().manual_seed(0)).to(DEVICE) / D**0.5)
    progress = base.Progress(50, 100, 50 * B, 100 * B)
    for name, hyper in (("topk", {"k": 8}), ("batch_topk", {"k": 8}), ("matryoshka_batch_topk", {"k": 8}),
                        ("standard", {})):
        found = {}
        for sparse in (True, False):
            with taken(sparse):
                torch.manual_seed(0)
                sae = variants.build(variants.load(name), D, wide, hyper).to(DEVICE)
                if name == "standard":  # few features
                    sae.b_enc.data -= 3 * sae.pre_activations(batch.x).detach().std()
                sae.tokens_since_fired[::40] = 10**6
                sae.look(progress)
                gradients(sae, batch, progress, print)
                with no_wait() if name == "topk" else nullcontext():
                    loss, _ = gradients(sae, batch, progress, print)
            found[sparse] = [loss, *(p.grad.float() for p in sae.parameters())]
        for a, b in zip(found[True], found[False]):
            assert (a - b).norm() < 0.02 * b.norm(), (name, a.shape, float((a - b).norm() / b.norm()))


def test_kernels_do_what_pytorch_does():
    """Fails if top_k chooses others than the largest, or an optimiser's step differs from project, clip, Adam, norm."""
    kernels = gpu.kernels()
    assert kernels, "the line printed above says why"
    for columns, k in ((1000, 7), (16384, 80), (2**16, 20), (2**18, 5)):
        normal_RC = torch.randn(40, columns, device=DEVICE)
        for values_RC in (normal_RC, normal_RC.relu().round()):
            assert kernels.takes(values_RC, k)
            index_RK = kernels.top_k(values_RC, k)
            found = values_RC.gather(1, index_RK).sort(1).values
            assert torch.equal(found, values_RC.topk(k).values.sort(1).values), (columns, k)
            assert (index_RK.sort(1).values.diff(dim=1) > 0).all(), "one feature was chosen twice"
    for name in OWN_VARIANTS:
        if variants.load(name).SAE.data_parallel:
            one, two, optimizers = *(stepped(name, DEVICE, 4)[0] for _ in range(2)), []
            begun = [p.detach().clone() for p in one.parameters()]
            for sae, used in ((one, kernels), (two, None)):
                optimizer = experiment.make_optimizer(sae, 1e-3)
                with mock.patch.object(gpu, "kernels", lambda used=used: used), \
                        mock.patch.object(updating, "LARGE", 2**12):
                    for step in range(3):
                        generator = torch.Generator(DEVICE).manual_seed(step)
                        for p in (p for p in sae.parameters() if p.requires_grad):
                            p.grad = torch.randn(p.shape, generator=generator, device=DEVICE) * 10.0**step
                        update(sae, optimizer)
                optimizers.append(optimizer.state_dict()["state"])
            for a, b, start in zip(one.parameters(), two.parameters(), begun):
                if not a.requires_grad:
                    assert torch.equal(a, start) and torch.equal(b, start), name
                    continue
                assert (b - start).norm() > 0 and (a - b).norm() <= 1e-3 * (b - start).norm(), name
            for number, state in optimizers[0].items():
                for key, value in state.items():
                    other = optimizers[1][number][key]
                    assert (value - other).norm() <= 1e-4 * other.norm(), (name, key)  # 1 - .999 is rounded there


def test_copies_of_the_weights_change_nothing():
    """Fails if a kept bf16 copy is not the weight's rounding, or outlives a change of the weight between two steps."""
    batch = base.Batch(torch.randn(B, D, generator=torch.Generator().manual_seed(0)).to(DEVICE) / D**0.5)
    sae, losses = stepped("topk", DEVICE, 4)[0], []
    for change in (lambda: None, lambda: sae.W_dec.mul_(0.5)):
        with torch.no_grad():
            change()
        for allowed in (True, False):
            if not allowed:
                copies.forget(sae)
            losses.append(gradients(sae, batch, base.Progress(8, 99, 0, 10**9), print)[0])
        assert losses[-1] == losses[-2]
    assert losses[0] != losses[2]


def test_a_compiled_loss_is_the_loss():
    """Fails if a variant's loss does not compile here, has another value or gradient, or a step of it waits."""
    batch = base.Batch(torch.randn(B, D, generator=torch.Generator().manual_seed(0)).to(DEVICE) / D**0.5)
    for name in OWN_VARIANTS:
        if not variants.load(name).SAE.compiled_loss:
            continue
        found, sae = [], stepped(name, DEVICE, 8)[0]
        for total in (compiled.PAYS_FROM - 1, compiled.PAYS_FROM):
            said = []
            for step in (3, 500, 501):
                with no_wait() if step == 501 else nullcontext():
                    loss, _ = gradients(sae, batch, base.Progress(step, total, step * B, total * B), said.append)
            assert not said, said
            found.append([loss, *(p.grad.clone() for p in sae.parameters() if p.requires_grad)])
        for a, b in zip(*found):
            assert (a - b).norm() <= 1e-3 * b.norm(), (name, a.shape, float((a - b).norm() / b.norm()))


def random_gemma(dtype: torch.dtype) -> language_model.LanguageModel:
    """Four narrow blocks with Gemma-2's head size, soft-capping and two kinds of mask."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=256, query_pre_attn_scalar=256,
                          sliding_window=64)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").to(DEVICE)
    return language_model.LanguageModel(hf, SimpleNamespace(bos_token_id=2, eos_token_id=1, pad_token_id=0), "random",
                                        "random")


def test_the_compiled_pass_is_the_plain_one_and_does_not_wait():
    """Fails if the block does not compile here, gives other residuals, or a later pass asks the device for anything."""
    for dtype, flex_from in ((torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 64)):
        lm = random_gemma(dtype)
        lm.flex_from = flex_from
        tokens_BT = torch.randint(5, 512, (8, 128), device=DEVICE)
        plain = lm.residuals(tokens_BT, [1, 3])
        for rows in (8, 5):
            with no_wait() if rows < 8 else nullcontext():
                found = lm.training_residuals(tokens_BT[:rows], [1, 3], 8)
            for layer, x_BTD in found.items():
                error = float((x_BTD.float() - plain[layer][:rows].float()).norm() / x_BTD.float().norm())
                assert error < ROUNDING[dtype], (dtype, flex_from, layer, error)
        assert lm.compiled and lm.flex_from == flex_from, "the line printed above says why"


def test_a_step_without_memory_goes_on_in_parts():
    """Fails if a real out-of-memory ends a run, or what the failed attempt held is not given back."""
    said, total = [], torch.cuda.get_device_properties(0).total_memory
    batch = base.Batch(torch.randn(16384, 64, device=DEVICE) / 8)
    sae = variants.load("standard").SAE(64, 16384).to(DEVICE)
    torch.cuda.empty_cache()
    # z alone, [B, F], is .5 to 1.1 GB
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5e9) / total)
    try:
        loss, _ = gradients(sae, batch, base.Progress(50, 100, 0, 1), said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said and sae.batch_parts > 1 and loss.isfinite() and sae.W_enc.grad.isfinite().all()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: nothing was tested")
    for title, test in list(globals().items()):
        if title.startswith("test_"):
            test()
            print(f"{title}: passed", flush=True)
