"""The preflight check: each way to get a variant wrong ends in its own message, and variants that are right pass."""


import sys

import pytest
import torch

import variants
from tests import FIXTURES
from tests.variants.common import GEMMA, line_of, preflight
from variants import base
from variants.kit.sparse import taken
from variants.preflight import budget, memory, messages, trial
from variants.preflight.trial import pretend_dead

BROKEN = FIXTURES / "broken_variants"
GOOD = FIXTURES / "good_variants"
SHIPPED = [variants.path("topk"), variants.path("standard")]


def run(name, hyper=None, **changes):
    return preflight(name, GEMMA, hyper, **dict(reference_files=SHIPPED) | changes)


# ------------------------------------------------------------------------------------- what is wrong, where, what to do


@pytest.mark.parametrize("name, place, words", [
    ("missing_class", None, ["no class SAE", "TopKSAE"]),
    ("import_error", "import base, layers", ["cannot import name 'layers'"]),
    ("loss_signature", "def loss(self, x)", ["loss(self, x)", "loss(self, batch, progress)"]),
    ("attribute_error", "self.W_decoder", ["no attribute 'W_decoder'", "nearest", "'W_dec'"]),
    ("context_unpacked", "n, _ = x.shape", ["too many values to unpack", "[batch, context, d_in]"]),
    ("context_dimension", "def encode", ["other features for x [8, 7,", "dim=-1"]),
    ("nan_loss", "share_BF.log()", ["loss is nan", "logarithm"]),
    ("nan_gradient", ".sqrt()", ["gradient of W_enc is not finite", "infinite slope"]),
    ("detached_term", "coactivation =", ["'coactivation' has no gradient", ".detach()"]),
    ("zero_weight", "l1 =", ["'l1' is multiplied by 0"]),
    ("forgotten_term", "ortho =", ["'ortho' is returned but never added"]),
    ("unused_parameter", "self.gate =", ["parameter gate gets no gradient"]),
    ("left_out", "def parameter_groups", ["b_enc has a gradient but never changes"]),
    ("zero_initialised", "self.W_dec =", ["no feature ever fires", "W_dec and W_enc start as all zeros"]),
    ("always_on", "def encode", ["100% of the features are active"]),
    ("ineffective", "auxk_alpha, damping", ["bit-identically to topk", "no effect", "--allow_identical"]),
    ("python_state", "self.threshold = 0.0", ["threshold is learned", "register_buffer"]),
    ("encode_tuple", "def encode", ["a tuple (Tensor, Tensor)"]),
    ("float_loss", "return reconstruction.item()", ["the loss is a float", "return the tensor"]),
    ("float_term", "l1.item()", ["'l1' is a float", "no .item() or float()"]),
    ("wrong_sign", "def loss", ["reconstruction gets worse", "sign"]),
    ("reversed_gradient", "def loss", ["loss does not fall", "sign"]),
    ("kept_graph", "def loss", ["second time", "store it with .detach()"]),
    ("wrong_counters", "def __init__", ["320 features", "counters for 160"]),
    ("asks_for_contexts", "attention_layers =", ["layer -1 from the SAE's own", "has 0 below"]),
])
def test_broken_variant_ends_in_its_message(name, place, words):
    """Fails if the mistake passes, or is reported as another one or at another line."""
    file = BROKEN / f"{name}.py"
    with pytest.raises(Exception) as caught:
        run(file)
    message = str(caught.value)
    expected = f"{file.name}:{line_of(file, place)}: " if place else file.name
    assert message.startswith(expected) and all(w in message for w in words), message
    assert len(message.split("\n")) == 2 and len(message) < 700


def test_syntax_error_has_its_line(tmp_path):
    """Fails if the line of a syntax error is lost, or the exception's type."""
    file = tmp_path / "mine.py"
    file.write_text("from variants import base\n\nclass SAE(base.SAE)\n    pass\n")
    with pytest.raises(SyntaxError, match=r"mine.py:3: expected ':': class SAE\(base.SAE\)") as caught:
        run(file)
    assert messages.where(caught.value, file) == "mine.py:3"


@pytest.mark.parametrize("line, name", [
    ("from variants import ranks", "ranks"), ("import variants.contexts", "contexts"),
    ("from variants.imperative import Imperative", "imperative")])
def test_what_moved_to_the_kit_is_said_where_it_lies(tmp_path, monkeypatch, line, name):
    """Fails if a file that imports what once lay in variants/ is told to install a package or to check its spelling."""
    file = tmp_path / "mine.py"
    file.write_text(f"import torch\n{line}\n")
    monkeypatch.delitem(sys.modules, f"variants.{name}", raising=False)  # of a variant of that name, tried before
    with pytest.raises(ImportError) as caught:
        run(file)
    place, advice = str(caught.value).split("\n")
    assert place.startswith("mine.py:2: ")
    assert advice == f"it lies in variants/kit now: from variants.kit import {name}"


def test_where_finds_the_variants_frame_behind_the_wrapping():
    """Fails if the place is taken from the check or from torch instead of the user's file."""
    file = BROKEN / "context_unpacked.py"
    with pytest.raises(ValueError) as caught:
        run(file)
    assert messages.where(caught.value, file) == f"context_unpacked.py:{line_of(file, 'n, _ = x.shape')}"
    assert messages.where(caught.value, BROKEN / "always_on.py") is None


def test_settings_that_train_nothing_are_refused():
    """Fails if 0 steps, a zero learning rate or a misspelt hyper-parameter are let through."""
    with pytest.raises(ValueError, match="0 training steps.*2048"):
        run("topk", total_steps=0)
    with pytest.raises(ValueError, match="learning rate is 0"):
        run("topk", lr=0)
    with pytest.raises(ValueError, match="no hyper-parameter 'auxk'; the nearest is 'auxk_alpha'"):
        run("topk", {"auxk": 1})


# ------------------------------------------------------------------------------------------------ what is right


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(GOOD.glob("*.py")), ids=lambda p: p.stem)
def test_good_variant_passes_without_a_remark(file):
    """Fails if the check refuses what researchers do: sampled Gram terms, EMA buffers, gates, widths, curricula."""
    assert run(file).notes == []


@pytest.mark.slow
@pytest.mark.parametrize("name, hyper, remark", [
    ("topk", {}, "this is the unmodified topk"),
    ("standard", {}, "this is the unmodified standard"),
    ("topk", {"k": 320}, "this is topk with k=320"),  # more than the small d_sae would be otherwise
])
def test_shipped_variants_pass_and_are_recognised(name, hyper, remark):
    """Fails if a baseline is refused, or an unmodified copy is not called one."""
    found = run(name, hyper)
    assert found.notes == [remark]
    assert found.parameters == 2 * 2304 * 16384 + 16384 + 2304 and found.parameter_bytes == 4 * found.parameters


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [
    dict(d_in=576, d_sae=2304, batch_size=1024, total_steps=900),
    dict(d_in=16, d_sae=64, batch_size=32, total_steps=1),
    dict(d_in=24, d_sae=56, batch_size=56, total_steps=2),
])
def test_small_real_sizes_pass(sizes):
    """Fails if the synthetic sizes collide with a narrow SAE, or a run of one step counts as an ablation."""
    for name in ("topk", "standard"):
        assert len(run(name, **sizes).notes) == 1


def test_ablation_is_a_remark_not_an_error():
    """Fails if a penalty set to 0 on purpose is refused like one that is 0 by mistake."""
    notes = run("standard", {"l1_penalty": 0}).notes
    assert all("(with l1_penalty=0)" in note for note in notes if "standard.py" in note)
    assert any("'l1' is multiplied by 0" in note for note in notes) and any("no sparse code" in note for note in notes)


def test_sizes_that_only_fit_the_real_width_are_tried_at_it(tmp_path):
    """Fails if hyper-parameters that must add up to d_sae make a variant uncheckable."""
    file = tmp_path / "groups.py"
    adding_up = "l1_penalty=0.02, groups=(100, 300)):\n        assert sum(groups) == d_sae"
    file.write_text((GOOD / "wider.py").read_text().replace("l1_penalty=0.02):", adding_up))
    run(file, d_sae=400)
    with pytest.raises(AssertionError, match="groups.py"):
        run(file, d_sae=500)


@pytest.mark.slow
def test_nothing_of_the_process_is_changed():
    """Fails if the check consumes random numbers, or leaves torch in another mode."""
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(GOOD / "gram_sample.py")
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()
    assert not torch.is_anomaly_enabled() and torch.get_num_threads() == threads


# ---------------------------------------------------------------------------------------------- same as a known variant


def edited(tmp_path, old, new):
    source = variants.path("topk").read_text()
    assert source.count(old) == 1
    file = tmp_path / "edited.py"
    file.write_text(source.replace(old, new))
    return file


@pytest.mark.slow
def test_an_effect_on_dead_features_late_in_the_run_is_seen(tmp_path):
    """Fails if the steps never exercise auxk at the end of the run: this edit changes nothing else."""
    def doubled_after(fraction):
        new = f"self.auxk_alpha * auxk * (2 if progress.fraction > {fraction} else 1),"
        return edited(tmp_path, "self.auxk_alpha * auxk,", new)

    assert run(doubled_after(0.99)).notes == []
    never = doubled_after(1.5)
    with pytest.raises(ValueError, match=r"edited.py:\d+: .*bit-identically to topk"):
        run(never)
    assert "bit-identically to topk" in run(never, allow_identical=True).notes[0]


def test_a_dense_code_runs_if_that_is_asked_for():
    """Fails if --allow_dense does not let it through, or lets it through without a mark."""
    found = run(BROKEN / "always_on.py", allow_dense=True)
    assert found.active == 1 and any("no sparse code (with --allow_dense)" in note for note in found.notes)


@pytest.mark.slow
def test_a_file_of_the_users_own_beside_the_variants_harms_no_other(tmp_path, monkeypatch):
    """Fails if a broken, endless or exiting file in variants/ stops the check of another one."""
    monkeypatch.setattr(trial, "SECONDS", 0.5)
    own = {"exits": "import sys\nsys.exit()\n", "loops": "while True:\n    pass\n", "broken": "def f(:\n", "empty": ""}
    for name, text in own.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert run("topk", reference_files=[*tmp_path.glob("*.py"), *SHIPPED]).notes == ["this is the unmodified topk"]


def test_somebody_s_leftover_is_no_reason_to_refuse_what_it_was_made_from(tmp_path):
    """Fails if an unmodified variant is refused because a file beside it, with another text, trains as it does."""
    leftover = edited(tmp_path, "        e_BD = batch.x -", "        unused = 2 * self.k\n        e_BD = batch.x -")
    assert run("topk", reference_files=[leftover, *SHIPPED]).notes == ["this is the unmodified topk"]
    with pytest.raises(ValueError, match="bit-identically to topk"):
        run(leftover)


@pytest.mark.slow
def test_comments_and_defaults_do_not_make_another_variant(tmp_path):
    """Fails if a copy with a new comment is refused as ineffective, or one with another default is unmodified."""
    copy = edited(tmp_path, "        self.note_fired", "        # remember them\n        self.note_fired")
    assert run(copy).notes == ["this is the unmodified topk"]
    assert run(edited(tmp_path, "k=32,", "k=48,")).notes == ["this is topk with k=48"]


# ------------------------------------------------------------------------------------------------ memory


def test_grown_tells_products_from_sums_and_samples():
    """Fails if a dimension grows by the wrong law. Small B, D, F = 50, 20, 100; ladders to 200, 80, 1600; real 10x."""
    def length(rule):
        small = (50, 20, 100)
        def at(axis, factor):
            return rule(*(n * factor if i == axis else n for i, n in enumerate(small)))
        ladders = [(at(i, 2), at(i, f // 2), at(i, f), 10.0) for i, f in enumerate((4, 4, 16))]
        return memory.grown(rule(*small), rule(100, 40, 200), ladders)

    assert length(lambda B, D, F: F) == pytest.approx(16000)
    assert length(lambda B, D, F: B * F) == pytest.approx(2000 * 16000)
    assert length(lambda B, D, F: F * (F - 1) // 2) == pytest.approx(16000**2 / 2, rel=0.01)
    assert length(lambda B, D, F: D + F) == pytest.approx(800 + 16000)
    assert length(lambda B, D, F: int(0.8 * F)) == pytest.approx(12800)
    assert length(lambda B, D, F: min(512, F)) == pytest.approx(512)
    assert length(lambda B, D, F: 7) == 7


@pytest.mark.slow
@pytest.mark.parametrize("file", [*SHIPPED, GOOD / "gram_sample.py", GOOD / "two_decoders.py",
                                  BROKEN / "gram_matrix.py"],
                         ids=lambda p: p.stem)
@taken(sparse=False)  # the path that is followed from size to size
def test_forecast_agrees_with_a_measured_step(file):
    """Fails if the forecast is off by a tenth from torch's own allocator, for a step too large to be just measured."""
    B, D, F = 4160, 32, 4096
    module = variants.load(str(file))
    torch.manual_seed(0)
    sae = variants.build(module, D, F, {})
    x_BD = torch.nn.functional.normalize(torch.randn(B, D), dim=1)
    sae.initialise(x_BD)
    pretend_dead(sae)
    progress = base.Progress(2440, 2441, 2440 * B, 2441 * B)
    batch = base.Batch(x=x_BD)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sae.loss(batch, progress)[0].backward()
    live = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    found = run(file, d_in=D, d_sae=F, batch_size=B, reference_files=[])
    # the allocator also counts gradients, which the forecast leaves to the parameters
    assert found.step_peak_bytes <= 1.1 * highest
    assert found.step_peak_bytes + found.parameter_bytes >= 0.9 * highest
    trace = memory.trace_step(module.__file__, sae.requires_grad_(True), batch, progress)
    assert found.step_peak_bytes == pytest.approx(trace.peak(memory.n_bytes(trace)), rel=0.1)


REVIVE = """from variants import topk

class SAE(topk.SAE):
    def revive(self, optimizer, batch, progress):
        moment_FD = optimizer.state[self.W_dec]["exp_avg_sq"]
        (moment_FD @ moment_FD.T).fill_diagonal_(0)
"""


@pytest.mark.parametrize("given, words", [
    ("optimizer, batch, progress", "[16384, 16384] (1.0 GiB) at mine.py:6"),
    ("batch, progress", "revive(self, batch, progress) has the wrong arguments, it is called as revive(self, opt")])
def test_what_revives_features_is_looked_at(given, words, tmp_path):
    """Fails if its arguments are first seen in a step, or what it allocates is in no forecast."""
    file = tmp_path / "mine.py"
    file.write_text(REVIVE.replace("optimizer, batch, progress", given))
    try:
        message = budget.too_large(run(file, allow_identical=True), 2**30)
    except Exception as error:  # noqa: BLE001
        message = str(error)
    assert words in message


@pytest.mark.slow
def test_tensors_that_cannot_fit_are_named():
    """Fails if an F x F or B x B x F tensor is missed, misplaced or misjudged, or a sample taken for one."""
    gram, pairs = BROKEN / "gram_matrix.py", BROKEN / "token_pairs.py"
    message = budget.too_large(run(gram), 4 * 2**30)
    assert f"[16384, 16384] (1.0 GiB) at gram_matrix.py:{line_of(gram, 'cosine_FF =')}" in message
    assert "the machine has 4.0 GiB\nreduce --batch_size or --d_sae" in message
    message = budget.too_large(run(pairs), 100 * 2**30)
    assert f"[2048, 2048, 16384] (256.0 GiB) at token_pairs.py:{line_of(pairs, 'pairs_BBF =')}" in message
    sampled = run(GOOD / "gram_sample.py")
    assert budget.too_large(sampled, 4 * 2**30) is None and sampled.step_peak_bytes < 1.5e9


@pytest.mark.slow
def test_forecast_takes_the_path_of_the_machine():
    """Fails if topk's forecast for a GPU leaves out the dense features [B, F], or a measured CPU step has them."""
    gpu = run("topk", accelerator=True).step_peak_bytes
    assert gpu > 4 * 2048 * 16384 * 4  # z before and after the choice, their gradients, besides decoder-sized tensors
    sizes = dict(d_in=64, d_sae=16384, batch_size=1024)
    cpu, gpu = (run("topk", accelerator=a, **sizes).step_peak_bytes for a in (False, True))
    assert gpu - cpu > 1024 * 16384 * 4


# ------------------------------------------------------------------------------------------------ remarks


@pytest.mark.slow
def test_what_fails_or_waits_only_on_a_gpu_is_remarked(tmp_path):
    """Fails if synchronisation, a CPU tensor or a dtype clash under autocast goes unnoticed without a GPU."""
    def notes(lines):
        file = tmp_path / "mine.py"
        file.write_text("import torch\nfrom variants import base\n\n\nclass SAE(base.SAE):\n"
                        "    def loss(self, batch, progress):\n"
                        "        a_BF = (batch.x - self.b_dec) @ self.W_enc\n"
                        + "".join(f"        {line}\n" for line in lines)
                        + "        r = base.reconstruction_loss(batch.x - self.decode(torch.relu(a_BF + self.b_enc)))\n"
                          "        self.note_fired(torch.relu(a_BF + self.b_enc))\n"
                          "        return r, {'r': r}\n")
        return run(file).notes

    assert notes(["scale = 1.0"]) == []
    assert ["mine.py:8 waits for the GPU" in n for n in notes(["a_BF = a_BF * (1 + 0 * a_BF.mean().item())"])] == [True]
    assert ["mine.py:8 waits for the GPU" in n for n in notes(["kept = a_BF[a_BF > 0].sum()"])] == [True]
    assert ["mine.py:8 mixes devices" in n for n in notes(["a_BF = a_BF * torch.ones(a_BF.shape[1])"])] == [True]
    assert ["mine.py:9 fails under bf16 autocast" in n for n in notes([
        "top, index = a_BF.topk(8, -1)",
        "a_BF = torch.zeros(a_BF.shape, device=a_BF.device).scatter(1, index, top)"])] == [True]


@pytest.mark.slow
@pytest.mark.skipif("clustered" not in variants.names(), reason="clustered is deleted")
def test_a_variant_that_differs_in_its_groups_alone_is_no_reason_to_refuse_either():
    """Fails if `clustered`, which trains like `standard`, is refused, or makes the unmodified `standard` refused."""
    assert any("bit-identically to standard" in note for note in run("clustered").notes)
    assert run("standard", reference_files=[variants.path("clustered")]).notes == []
