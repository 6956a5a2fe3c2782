"""What a training step does otherwise on a GPU, held on a CPU by stand-ins for kernels and by the compiler."""

import subprocess
import sys

import pytest
import torch

import experiment
import variants
from tests import OWN_VARIANTS, PROJECT
from tests.flow.test_golden import RECIPES
from variants import base
from variants.kit import compiled, copies, gpu, precision, sparse
from variants.kit import update as updating
from variants.kit.steps import gradients

D, F, B, STEPS = 16, 96, 64, 12
FIELD = [name for name in OWN_VARIANTS if variants.load(name).SAE.data_parallel]
WAYS = [*FIELD, *(way for way, (name, _) in RECIPES.items() if name in FIELD)]  # with what their keywords turn on


class Kernels:
    """Kernels' mathematics in PyTorch, as kernels.py describes it."""

    @staticmethod
    def sizes(parameter_FD, grad_FD, along_F, square_F):
        along_F.copy_((grad_FD * parameter_FD).sum(1) / parameter_FD.pow(2).sum(1))
        square_F.copy_((grad_FD - along_F[:, None] * parameter_FD).pow(2).sum(1))

    @staticmethod
    def step(parameter, grad, mean, square, scale, along_F, unit, count, lr, betas, eps, low=None):
        grad = (grad - along_F[:, None] * parameter if unit else grad) / scale
        mean.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
        square.mul_(betas[1]).add_(grad * grad, alpha=1 - betas[1])
        moved = lr / (1 - betas[0] ** count) * mean / ((square / (1 - betas[1] ** count)).sqrt() + eps)
        new = parameter - moved
        parameter.data.copy_(new / new.norm(dim=1, keepdim=True) if unit else new)  # as a kernel: unseen by torch
        if low is not None:
            low.copy_(parameter)


def trained(name: str, steps: int = STEPS):
    """A variant after some steps of which gradients grow large enough to be clipped, and its optimiser's state."""
    name, given = RECIPES.get(name, (name, {}))
    torch.manual_seed(0)
    # 32 steps of a pursuit in few dimensions leave nothing but rounding to choose by
    hyper = {"k": 4} if name == "matching_pursuit" else given
    sae = variants.load(name).SAE(D, F, **hyper)
    x_ND = torch.randn(steps * B, D, generator=torch.Generator().manual_seed(1)) / D**0.5
    sae.initialise(x_ND)
    optimizer = experiment.make_optimizer(sae, 1e-2)
    for step, x_BD in enumerate(x_ND.split(B)):
        experiment.train_step(sae, optimizer, base.Batch(x_BD * (1 + step)), base.Progress(step, steps, 0, 10**9))
    return sae, optimizer


@pytest.mark.parametrize("name", FIELD)
def test_a_step_by_kernels_is_adams(name, monkeypatch):
    """Fails if projecting, clipping, Adam, its count or the rows' norm are other than torch's where kernels do them."""
    theirs, their_optimizer = trained(name)
    plain, used = updating._plain, []

    def suits(sae, optimizer):  # as on a GPU: from the second step on
        begun = all("exp_avg" in optimizer.state[p] for p in sae.parameters() if p.requires_grad)
        used.append(begun)
        return begun

    assert not plain(theirs, their_optimizer)  # on a CPU, where nothing may change
    monkeypatch.setattr(updating, "_plain", suits)
    monkeypatch.setattr(updating, "LARGE", D * F)
    monkeypatch.setattr(gpu, "kernels", lambda: Kernels)
    mine, my_optimizer = trained(name)
    assert used == [False] + [True] * (STEPS - 1)
    for (key, a), b in zip(mine.named_parameters(), theirs.parameters()):
        assert (a - b).norm() < 1e-4 * b.norm() + 1e-6, key
    for number, state in their_optimizer.state_dict()["state"].items():
        assert my_optimizer.state_dict()["state"][number]["step"] == state["step"] == STEPS


def test_adams_count_is_heard_where_torch_steps_in_between(monkeypatch):
    """Fails if a step without some gradient, which torch takes, leaves the host's count of Adam's steps behind."""
    counts = []

    class Counting(Kernels):
        @staticmethod
        def step(*given):
            counts.append(given[7])
            Kernels.step(*given)

    begun = iter([False, True, True, False, False, True, True])
    monkeypatch.setattr(updating, "_plain", lambda sae, optimizer: next(begun))
    monkeypatch.setattr(updating, "LARGE", D * F)
    monkeypatch.setattr(gpu, "kernels", lambda: Counting)
    trained("topk", 7)
    assert counts == [2, 2, 3, 3, 6, 6, 7, 7]  # W_dec and W_enc


def test_another_optimiser_is_left_to_torch():
    """Fails if kernels, which know Adam as it comes, take the step of something else."""
    sae, optimizer = trained("topk")
    for p in sae.parameters():
        p.grad = torch.zeros_like(p)
    assert isinstance(optimizer, torch.optim.Adam)
    whole = [updating._suits(p, optimizer.state[p]) for p in sae.parameters()]
    assert not any(whole)  # none lies on a GPU
    others = [torch.optim.AdamW(sae.parameters()), torch.optim.SGD(sae.parameters(), lr=0.1),
              torch.optim.Adam(sae.parameters(), weight_decay=0.1), torch.optim.Adam(sae.parameters(), amsgrad=True),
              torch.optim.Adam([sae.W_dec])]
    for other in others:
        other.state = optimizer.state
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(updating, "_suits", lambda p, state: True)
            assert not updating._plain(sae, other) and updating._plain(sae, optimizer)


def test_a_copy_counts_until_its_weight_changes():
    """Fails if a stale copy is multiplied with, or a fresh one is not used, or one outlives training."""
    W, dtype = torch.nn.Parameter(torch.randn(4, 3)), copies.DTYPE
    copy_of = copies.room(W)
    copy_of.copy_(W.detach())
    copies.hold(W, copy_of)
    assert copies.low(W, dtype) is copy_of and copies.room(W) is copy_of
    assert copies.low(W, torch.float16).dtype == torch.float16
    with torch.no_grad():
        W.mul_(2)
    assert copies.low(W, dtype) is not copy_of and torch.equal(copies.low(W, dtype), W.detach().to(dtype))
    copies.hold(W, copy_of)
    copies.forget(torch.nn.ParameterList([W]))
    assert copies.low(W, dtype) is not copy_of


WRITES = {"after_step": "def after_step(self, batch, progress):\n        self.W_dec.data.clamp_(-1, 1)",
          "a function of the file": "def after_step(self, batch, progress):\n        clamp(self)",
          "a decorated method": "@torch.no_grad()\n    def after_step(self, batch, progress):\n        clamp(self)",
          "a property": "@property\n    def theirs(self):\n        return self.W_dec.data",
          "a function within": "def after_step(self, batch, progress):\n        (lambda: self.W_dec.data.zero_())()"}


@pytest.mark.parametrize("where", WRITES)
def test_a_variant_that_writes_data_gets_no_copies(where, tmp_path):
    """Fails if an edited copy of topk is multiplied by weights as they were before what it writes through .data."""
    source = variants.path("topk").read_text(encoding="utf-8")
    at = source.index("    def after_step")
    helper = ""
    if "clamp(self)" in WRITES[where]:
        helper = "\n\n@torch.no_grad()\ndef clamp(sae):\n    sae.W_dec.data.clamp_(-1, 1)\n"
    (tmp_path / "mine.py").write_text(source[:at] + "    " + WRITES[where] + "\n" + helper, encoding="utf-8")
    assert copies.allowed(variants.load("topk").SAE)  # whose initialise writes b_dec.data, before training
    assert not copies.allowed(variants.load(str(tmp_path / "mine.py")).SAE)
    assert not copies.allowed(variants.load("gated").SAE)  # which does not say that it may


def as_on_a_gpu(monkeypatch):
    """Losses go the way that they go on a GPU: in autocast's bf16, few features dense, nothing counted."""
    monkeypatch.setattr(precision, "lower", lambda x: torch.bfloat16)
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    for module in (sparse, base):
        monkeypatch.setattr(module, "few_positive", lambda z_BF: False)
        monkeypatch.setattr(module, "sparse_pays", lambda *sizes: False)


def gradients_of(sae, x_BD, step: int = 900) -> dict[str, torch.Tensor]:
    """Gradients and terms of a loss, in autocast's bf16."""
    sae.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = compiled.loss_of(sae, base.Batch(x_BD), base.Progress(step, 10**4, step * B, 10**4 * B))
    loss.backward()
    return {key: p.grad.clone() for key, p in sae.named_parameters() if p.requires_grad} | terms


@pytest.mark.parametrize("name", WAYS)
def test_a_gpus_products_have_the_losses_gradients(name, monkeypatch):
    """Fails if gradients by the products that a GPU takes (listed, kept, low) are others than autograd's in fp64."""
    sae, _ = trained(name, 4)
    sae.dead_on_host = 0
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(2)) / D**0.5
    found = [gradients_of(sae, x_BD)]
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)
        found.append(gradients_of(sae, x_BD))
    for key, value in found[0].items():
        if not value.any():  # no feature is dead
            assert not found[1][key].any()
            continue
        cosine = torch.cosine_similarity(value.flatten().float(), found[1][key].flatten().float(), dim=0)
        assert cosine > 0.98, (key, cosine)  # top-k turns bf16's rounding into other features now and then


def test_a_loss_that_does_not_compile_runs_as_it_is(monkeypatch):
    """Fails if an error of the compiler, in a loss or its backward pass, ends a run, or is not said once."""
    def broken(loss):
        def run(batch, progress):
            raise RuntimeError("no compiler")
        return run

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no compiler")

    def late(loss):
        def run(batch, progress):
            value, terms = loss(batch, progress)
            return Backward.apply(value), terms
        return run

    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(2)) / D**0.5
    progress = base.Progress(900, 10**4, 0, 10**9)
    for made in (broken, late):
        sae, _ = trained("topk", 4)
        expected, said = gradients(sae, base.Batch(x_BD), progress, print)[0], []
        wanted = sae.W_enc.grad.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "_pays", lambda *given: True)
            patch.setattr(compiled, "_compiled", made)
            for _ in range(2):
                assert gradients(sae, base.Batch(x_BD), progress, said.append)[0] == expected
        assert torch.equal(sae.W_enc.grad, wanted) and len(said) == 1 and "no compiler" in said[0]
        compiled.forget(sae)


@pytest.mark.slow
def test_losses_compile_once_and_are_the_losses():
    """Fails if a long run's loss is compiled anew from step to step, or has other gradients than the plain one.

    In a process of its own: inductor imports setuptools, which is particular about what was imported before.
    """
    done = subprocess.run([sys.executable, "-m", "tests.variants.test_gpu_steps"], cwd=PROJECT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines() == [name for name in WAYS if trained(name, 1)[0].compiled_loss]


def compile_loss(name: str, patch: pytest.MonkeyPatch) -> None:
    """AssertionError for what that test is for."""
    torch.compiler.reset()
    as_on_a_gpu(patch)
    sae, _ = trained(name, 4)
    sae.dead_on_host, found = 0, []
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(2)) / D**0.5
    assert not compiled._pays(base.Batch(x_BD), base.Progress(0, 10**6, 0, 10**9))  # on a CPU nothing may change
    for pays in (False, True):
        patch.setattr(compiled, "_pays", lambda *given, pays=pays: pays)
        for step in (0, 1, 70, 71):
            sae.dead_on_host = step  # features die
            gradients_of(sae, x_BD, step)
        torch._dynamo.utils.counters.clear()
        found.append(gradients_of(sae, x_BD))
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"], "compiled anew"
    assert compiled._losses[sae] is not None, "it gave up"
    for key, value in found[0].items():
        assert (value - found[1][key]).norm() <= 1e-5 * value.norm() + 1e-9, (name, key)


if __name__ == "__main__":
    for way in WAYS:
        if trained(way, 1)[0].compiled_loss:
            with pytest.MonkeyPatch.context() as patched:
                compile_loss(way, patched)
            print(way, flush=True)
