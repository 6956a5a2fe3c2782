"""SAEs of SAELens and dictionary_learning read as variants:
features against each library's formulas, written out or its own.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

import variants.kit.saving
from variants import base
from variants.kit import interchange, saelens
from variants.kit.trained import TrainedSAE
from variants.preflight import ways

D, N_FEATURES, K = 6, 40, 5


def relu_codes(s, x, threshold=0.0):
    """ReLU features of dictionary_learning's classes with nn.Linear layers that encode x − b_dec, above a threshold."""
    z = torch.relu((x - s["b_dec" if "b_dec" in s else "bias"]) @ s["encoder.weight"].T + s["encoder.bias"])
    return torch.where(z > threshold, z, 0.0)


def k_largest(z, k):
    """Each row's k largest, the rest 0; by sorting, not by topk."""
    return torch.where(z >= z.sort(dim=-1, descending=True).values[..., k - 1 : k], z, 0.0)


def gated_codes(s, x):
    pi = (x - s["decoder_bias"]) @ s["encoder.weight"].T
    return torch.where(pi + s["gate_bias"] > 0, torch.relu(s["r_mag"].exp() * pi + s["mag_bias"]), 0.0)


def jumprelu_codes(s, x):
    z = x @ s["W_enc"] + s["b_enc"]
    return torch.where(z > s["threshold"], torch.relu(z), 0.0)


def matryoshka_codes(s, x):
    z = torch.relu((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"])
    return torch.where(z > s["threshold"], z, 0.0)


LINEAR = {"encoder.weight": (N_FEATURES, D), "encoder.bias": (N_FEATURES,), "decoder.weight": (D, N_FEATURES)}
PLAIN = {"W_enc": (D, N_FEATURES), "b_enc": (N_FEATURES,), "W_dec": (N_FEATURES, D), "b_dec": (D,)}
TOPK = dict(k=torch.tensor(K, dtype=torch.int), threshold=torch.tensor(0.7))
# class, random tensors, given tensors, trainer's configuration, features, variant, hyper-parameters
DICTIONARIES = [
    ("AutoEncoder", LINEAR | {"bias": (D,)}, {}, {}, relu_codes, "standard", {}),
    ("AutoEncoder", LINEAR | {"bias": (D,)}, {}, {"trainer_class": "StandardTrainerAprilUpdate"}, relu_codes,
     "standard_april", {}),
    ("AutoEncoderNew", LINEAR | {"decoder.bias": (D,)}, {}, {},
     lambda s, x: torch.relu(x @ s["encoder.weight"].T + s["encoder.bias"]), "standard_april", {}),
    ("GatedAutoEncoder", {"encoder.weight": (N_FEATURES, D), "decoder.weight": (D, N_FEATURES), "decoder_bias": (D,),
                          "r_mag": (N_FEATURES,), "gate_bias": (N_FEATURES,), "mag_bias": (N_FEATURES,)}, {}, {},
     gated_codes, "gated", {}),
    # thresholds from below 0, where the library's ReLU decides, to above
    ("JumpReluAutoEncoder", PLAIN, {"threshold": torch.linspace(-1, 2, N_FEATURES)}, {"target_l0": 7}, jumprelu_codes,
     "jumprelu",
     {"target_l0": 7}),
    ("AutoEncoderTopK", LINEAR | {"b_dec": (D,)}, TOPK, {"k": K}, lambda s, x: k_largest(relu_codes(s, x), K), "topk",
     {"k": K}),
    ("BatchTopKSAE", LINEAR | {"b_dec": (D,)}, TOPK, {"k": K}, lambda s, x: relu_codes(s, x, 0.7), "batch_topk",
     {"k": K}),
    # no threshold yet: the library then passes all that ReLU does
    ("BatchTopKSAE", LINEAR | {"b_dec": (D,)}, TOPK | dict(threshold=torch.tensor(-1.0)), {}, relu_codes, "batch_topk",
     {"k": K}),
    ("MatryoshkaBatchTopKSAE", PLAIN, TOPK | dict(group_sizes=torch.tensor([8, 32])),
     {"group_weights": [5, 4, 3, 2, 1]}, matryoshka_codes,
     "matryoshka_batch_topk", {"k": K, "weights": (5, 4, 3, 2, 1)}),
]


def write_dictionary(folder, dict_class, state, config):
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    trainer = dict(dict_class=dict_class, layer=3, lm_name="org/lm", submodule_name="resid_post_layer_3") | config
    (folder / "config.json").write_text(json.dumps(dict(trainer=trainer, buffer={})))


@pytest.mark.parametrize("dict_class, shapes, given, config, codes, variant, hyper", DICTIONARIES)
def test_dictionaries_keep_their_features(tmp_path, dict_class, shapes, given, config, codes, variant, hyper):
    """Fails if a tensor goes to the wrong place, untransposed, unscaled, centring or a sign is misread."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in shapes.items()} | given
    write_dictionary(tmp_path / "ae", dict_class, state, config)
    (name, found), = interchange.find(str(tmp_path / "ae")).items()
    assert (name, found.variant, found.hyper, found.d_in, found.d_sae,
            found.scale) == ("ae", variant, hyper, D, N_FEATURES, None)
    assert found.metadata == dict(model_name="org/lm", hook_name="blocks.3.hook_resid_post", layer=3)
    x = 2 * torch.randn(3, 50, D)
    sae, expected = interchange.build(found), codes(state, x)
    assert 0.05 < (expected > 0).float().mean() < 0.95
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    b_dec = next(state[n] for n in ("b_dec", "bias", "decoder_bias", "decoder.bias") if n in state)
    torch.testing.assert_close(sae.decode(expected), expected @ W_dec + b_dec, rtol=1e-5, atol=1e-4)


def test_a_fraction_is_a_mean_or_refused(tmp_path):
    """Fails if a k that is said in the configuration alone is cut to a whole number, for a count or for a mean."""
    state = {name: torch.zeros(shape) for name, shape in (LINEAR | {"b_dec": (D,)}).items()}
    for dict_class in ("BatchTopKSAE", "AutoEncoderTopK"):
        write_dictionary(tmp_path / dict_class, dict_class, state, {"k": 1.5})
    assert interchange.find(str(tmp_path / "BatchTopKSAE"))["BatchTopKSAE"].hyper == {"k": 1.5}
    with pytest.raises(ValueError, match="AutoEncoderTopK with k = 1.5: .* whole number of .*\ncorrect"):
        interchange.find(str(tmp_path / "AutoEncoderTopK"))
    assert interchange.build(interchange.find(str(tmp_path / "BatchTopKSAE"))["BatchTopKSAE"]).k == 1.5


def test_a_folder_of_dictionaries_gives_one_entry_each_in_order(tmp_path):
    """Fails if only the first is read, trainer_10 comes before trainer_2, or the file itself is no valid place."""
    torch.manual_seed(0)
    for i in (10, 2):
        state = {name: torch.randn(shape) for name, shape in (LINEAR | {"bias": (D,)}).items()}
        write_dictionary(tmp_path / f"trainer_{i}", "AutoEncoder", state, {})
    assert list(interchange.find(str(tmp_path))) == ["trainer_2", "trainer_10"]
    assert list(interchange.find(str(tmp_path / "trainer_2" / "ae.pt"))) == ["trainer_2"]


# ------------------------------------------------------------------------------------------------ SAELens


def random_saelens(cfg):
    """A SAELens SAE of a configuration, with random weights: decoder rows of any norm, thresholds from -.2 to 1."""
    from sae_lens import SAE, TrainingSAE

    torch.manual_seed(0)
    training = cfg["architecture"] in ("batchtopk", "matryoshka_batchtopk") or cfg.pop("training", False)
    sae = (TrainingSAE if training else SAE).from_dict(dict(d_in=D, d_sae=N_FEATURES) | cfg)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.linspace(-0.2, 1, N_FEATURES) if name == "threshold" else torch.randn(p.shape) * 0.7)
    return sae


SAELENS = [
    ({"architecture": "standard"}, "standard"), ({"architecture": "gated"}, "gated"),
    ({"architecture": "jumprelu"}, "jumprelu"),
    ({"architecture": "topk", "k": K}, "topk"), ({"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
                                                 "topk"),
    ({"architecture": "abstopk", "k": K}, "abs_topk"),
    ({"architecture": "matching_pursuit", "max_iterations": K, "residual_threshold": 0.0,
      "stop_on_duplicate_support": False}, "matching_pursuit"),
]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("cfg, variant", SAELENS)
def test_saelens_folders_keep_their_features(tmp_path, cfg, variant, centred):
    """Fails if centring is folded with the wrong sign or into one gate, norms miss the ranking, or thresholds merge."""
    metadata = dict(model_name="lm", hook_name="blocks.4.hook_resid_post", sae_lens_version="6.0.0")
    if variant == "jumprelu":  # so it says, but its thresholds differ
        metadata["training_architecture"] = "batchtopk"
    theirs = random_saelens(cfg | dict(apply_b_dec_to_input=centred, metadata=metadata))
    theirs.save_model(tmp_path / "theirs")
    found = interchange.find(str(tmp_path / "theirs"))["theirs"]
    k = cfg.get("k", cfg.get("max_iterations"))
    assert (found.variant, found.hyper.get("k"), found.scale) == (variant, k, None)
    assert found.metadata == dict(model_name="lm", hook_name="blocks.4.hook_resid_post", layer=4)
    sae, x = interchange.build(found), 2 * torch.randn(3, 50, D)
    expected = theirs.encode(x)
    assert 0.05 < (expected != 0).float().mean() < 0.95
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), theirs.decode(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cfg, variant, hyper", [
    ({"architecture": "batchtopk", "k": 4}, "batch_topk", {"k": 4}),
    ({"architecture": "matryoshka_batchtopk", "k": 4, "matryoshka_widths": [10, N_FEATURES]}, "matryoshka_batch_topk",
     {"k": 4}),
    ({"architecture": "standard", "training": True}, "standard_april", {}),
])
def test_what_saelens_trained_goes_on_as_the_same_architecture(tmp_path, cfg, variant, hyper):
    """Fails if an SAE that SAELens saves under another name for inference is taken for that name's first variant."""
    theirs = random_saelens(cfg)
    if "topk_threshold" in dict(theirs.named_buffers()):
        theirs.topk_threshold.fill_(0.4)
    theirs.save_inference_model(tmp_path / "theirs")
    found = interchange.find(str(tmp_path / "theirs"))["theirs"]
    assert (found.variant, found.hyper) == (variant, hyper)
    from sae_lens import SAE

    x = 2 * torch.randn(50, D)
    torch.testing.assert_close(interchange.build(found).encode(x), SAE.load_from_disk(tmp_path / "theirs").encode(x),
                               rtol=1e-5, atol=1e-5)


OLD = dict(d_in=D, d_sae=N_FEATURES, hook_point="blocks.7.hook_resid_pre", hook_point_layer=7, model_name="gpt2-small",
           dtype="torch.float32", normalize_activations=False)


def write_saelens(folder, cfg, **tensors):
    """A SAELens folder with fixed random weights, besides `tensors`; returns them all."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in PLAIN.items()} | tensors
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return weights


def test_saelens_folders_of_before_version_6(tmp_path):
    """Fails if the old names of activation, k or hook are not known, or a fine-tuning factor touches the features."""
    factor = torch.linspace(0.5, 2, N_FEATURES)
    w = write_saelens(tmp_path / "old", OLD | dict(activation_fn_str="topk", activation_fn_kwargs={"k": K},
                                                   finetuning_scaling_factor=True),
                      finetuning_scaling_factor=factor)
    found = interchange.find(str(tmp_path / "old"))["old"]
    assert (found.variant, found.hyper) == ("topk", {"k": K})
    # which left block 6
    assert found.metadata == dict(model_name="gpt2-small", hook_name="blocks.7.hook_resid_pre", layer=6)
    sae, x = interchange.build(found), torch.randn(50, D)
    z = k_largest(torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), K)
    torch.testing.assert_close(sae.encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(z), (z * factor) @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-4)
    write_saelens(tmp_path / "unused", OLD, scaling_factor=torch.ones(N_FEATURES))
    assert interchange.build(interchange.find(str(tmp_path / "unused"))["unused"]).encode(x).shape == (50, N_FEATURES)


@pytest.mark.slow
def test_a_pretrained_release_is_read_like_a_folder(monkeypatch):
    """Fails if the hub's SAE is converted otherwise than a saved one, or an unreachable hub ends in a traceback."""
    import sae_lens

    theirs = random_saelens({"architecture": "jumprelu", "apply_b_dec_to_input": False})
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda release, sae_id: theirs)
    place = "gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical"
    (name, found), = interchange.find(place).items()
    x = 2 * torch.randn(50, D)
    torch.testing.assert_close(interchange.build(found).encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    assert (name, found.variant) == ("layer_12_width_16k_canonical", "jumprelu")

    def unreachable(release, sae_id):
        raise OSError("name not known\nand much more")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", unreachable)
    saelens.read_release.cache_clear()
    for wrong, error, message in [
        (place, ConnectionError, "did not give it: name not known\ncheck the connection"),
        (place.replace("2b-pt-res-canonical", "2b-res-canonical"), FileNotFoundError,
         "nearest is 'gemma-scope-2b-pt-res-canonical'\n"),
        (place.replace("16k", "16"), ValueError, "nearest is 'layer_12/width_16k/canonical'\n"),
    ]:
        with pytest.raises(error, match=message.replace("(", r"\(")) as raised:
            interchange.find(wrong)
        assert str(raised.value).count("\n") == 1


# ----------------------------------------------------------------------------------------------- runs, scales, refusals


def trained(name, scale=1.0, **hyper):
    """A variant with random weights on activations over `scale`: unit rows, random biases, thresholds from .2 to 1."""
    torch.manual_seed(0)
    sae = variants.build(variants.load(name), D, N_FEATURES, hyper)
    base.normalise_decoder(sae.W_dec)
    for bias in ("b_enc", "b_dec", "b_gate", "b_mag", "r_mag"):
        if hasattr(sae, bias):
            getattr(sae, bias).data.normal_(0, 0.3)
    if hasattr(sae, "theta"):
        sae.theta.data.copy_(torch.linspace(0.2, 1, N_FEATURES) if sae.theta.ndim else torch.tensor(0.4))
    return sae


def test_a_run_gives_its_saes_by_name_in_either_format(tmp_path):
    """Fails if a threshold SAE comes back as JumpReLU, the own format loses its scale, a half-written one is read."""
    source = tmp_path / "mine.py"
    source.write_text("from variants import topk\n\nclass SAE(topk.SAE):\n"
                      "    def encode(self, x):\n        return super().encode(x) ** 2\n")
    mine, batch = trained(str(source), k=K), trained("batch_topk", k=4)
    metadata = dict(model_name="lm", hook_name="model.layers.2", context_size=8)
    for name, sae, file, hyper in [("layer_2.k_5", mine, source, {"k": K}),
                                   ("layer_2", batch, variants.path("batch_topk"), {})]:
        variants.kit.saving.save_sae(tmp_path / "run_1" / "sae" / name, sae, 3.0, file, hyper, metadata)
    (tmp_path / "run_1" / "sae" / ".layer_3.tmp").mkdir()
    (tmp_path / "run_1" / "sae" / ".layer_3.tmp" / "cfg.json").write_text("{}")
    found = interchange.find(str(tmp_path / "run_1"))
    assert list(found) == ["layer_2", "layer_2.k_5"]
    assert [(f.scale, f.hyper["k"]) for f in found.values()] == [(None, 4), (3.0, K)]
    assert all(f.metadata == dict(model_name="lm", hook_name="model.layers.2", layer=2) for f in found.values())
    assert (found["layer_2"].variant, found["layer_2.k_5"].variant[-10:]) == ("batch_topk", "variant.py")
    x = 3 * torch.randn(50, D)
    for name, sae in [("layer_2", batch), ("layer_2.k_5", mine)]:
        again = TrainedSAE(interchange.build(found[name], trust_code=True), found[name].scale or 1.0)
        torch.testing.assert_close(again.encode(x), TrainedSAE(sae, 3.0).encode(x), rtol=1e-5, atol=1e-5)
    assert interchange.build(found["layer_2"]).theta.item() == pytest.approx(3 * 0.4, rel=1e-5)


def saved(folder, name, **hyper):
    """The place of a trained SAE of layer 2."""
    variants.kit.saving.save_sae(folder / "layer_2", trained(name, **hyper), 3.0, variants.path(name), hyper, {})
    return str(folder / "layer_2")


def test_a_schedule_is_not_inherited(tmp_path):
    """Fails if a k that has fallen begins anew where an SAE is trained further, or anything else is forgotten."""
    place = saved(tmp_path, "topk", k=K, auxk_alpha=0.5, k_start=3 * K, k_share=0.5)
    module = variants.load("topk")
    assert interchange.hypers_of(place, module, {}) == {"": dict(k=K, auxk_alpha=0.5)}
    assert interchange.hypers_of(place, module, dict(k_start=20)) == {"": dict(k=K, auxk_alpha=0.5, k_start=20)}


@pytest.mark.parametrize("name", ["jumprelu", "topk"])  # of x and of x − b_dec
def test_an_sae_without_an_encoder_is_no_beginning_of_one_with_it(name, tmp_path):
    """Fails if it ends in a KeyError, or the encoder stays random without a word."""
    place = saved(tmp_path, "matching_pursuit", k=K)
    with pytest.raises(ValueError, match=f"of matching_pursuit do not fit variants.{name}, not even W_enc and W_dec\n"):
        interchange.adopt(trained(name), place, "layer_2")


def test_a_random_baseline_begins_as_itself_alone(tmp_path):
    """Fails if a trained decoder may go by the name of the random one, or a baseline cannot be evaluated again."""
    module, random = variants.load("frozen_decoder"), saved(tmp_path / "1", "frozen_decoder", k=K, frozen="decoder")
    with pytest.raises(ValueError, match="would be a trained topk here\n.*--variant=topk"):
        ways.check(module, {"": dict(k=K)}, False, saved(tmp_path / "2", "topk", k=K))
    with pytest.raises(ValueError, match="it has frozen=decoder, and with frozen=all"):
        ways.check(module, {"": dict(k=K, frozen="all")}, False, random)
    ways.check(module, {"": dict(k=K)}, False, random)
    ways.check(variants.load("topk"), {"": dict(k=K)}, False, random)


@pytest.mark.parametrize("name", ["standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka_batch_topk"])
def test_rescaling_by_hand(name):
    """Fails if a bias or threshold keeps its raw unit, r_mag or a weight is divided, "no threshold yet" becomes one."""
    sae, x = trained(name), torch.randn(50, D)
    expected, x_hat = sae.encode(x), sae.decode(sae.encode(x))
    assert 0.05 < (expected > 0).float().mean() < 0.95
    interchange.rescale(sae, 37.0)
    torch.testing.assert_close(sae.encode(x / 37) * 37, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x / 37)) * 37, x_hat, rtol=1e-5, atol=1e-5)
    if name == "batch_topk":
        sae.theta.fill_(-1.0)
        interchange.rescale(sae, 37.0)
        assert sae.theta == -1


V6 = dict(architecture="standard", d_in=D, d_sae=N_FEATURES, normalize_activations="none", reshape_activations="none")


@pytest.mark.parametrize("cfg, message", [
    (V6 | dict(normalize_activations="expected_average_only_in"),
     "'expected_average_only_in'.*\n.*fold_activation_norm_scaling_factor"),
    (OLD | dict(normalize_activations=True), "'expected_average_only_in'"),
    (V6 | dict(normalize_activations="layer_norm"), "'layer_norm'.*\n.*another SAE"),
    (V6 | dict(reshape_activations="hook_z", metadata=dict(hook_name="blocks.1.attn.hook_z")), "reads hook_z.*\n"),
    (OLD | dict(hook_point="blocks.1.hook_mlp_out"), "reads blocks.1.hook_mlp_out.*\n"),
    (V6 | dict(metadata=dict(hook_name="blocks.1.hook_mlp_in", hook_name_out="blocks.1.hook_mlp_out")),
     "transcoder from .*hook_mlp_in"),
    (V6 | dict(architecture="skip_transcoder"), "'skip_transcoder'\nknown: standard, topk, gated, jumprelu"),
    (V6 | dict(architecture="batchtopk"), "'batchtopk'\n.*save_inference_model"),
    (V6 | dict(architecture="topk"), "says no k\n"),
    (V6 | dict(architecture="topk", k=1.5), "k = 1.5: .* whole number"),
    (V6 | dict(architecture="matching_pursuit", residual_threshold=0.0), "says no max_iterations\n"),
    (V6 | dict(architecture="matching_pursuit", max_iterations=5), "stops by residual_threshold or stop_on_dup.*\n"),
    (OLD | dict(activation_fn_str="tanh-relu"), "'tanh-relu'\n"),
    (V6 | dict(architecture="gated"),
     "do not fit the variant gated: missing: b_gate, b_mag, r_mag; unexpected: b_enc\n"),
    (V6 | dict(d_sae=7), "of another shape: b_enc .39. instead of .40.\n"),
])
def test_refusals_of_saelens(tmp_path, cfg, message):
    """Fails if what changes features, or another architecture's weights, are read silently, or advice is missing."""
    write_saelens(tmp_path / "sae", cfg, **({"b_enc": torch.zeros(39)} if cfg["d_sae"] == 7 else {}))
    with pytest.raises(ValueError, match=message) as raised:
        interchange.build(interchange.find(str(tmp_path / "sae"))["sae"])
    assert str(raised.value).startswith(str(tmp_path / "sae")) and str(raised.value).count("\n") == 1


def test_refusals_of_other_places(tmp_path):
    """Fails if a wrong place is not named with what was found there."""
    (tmp_path / "notes.txt").write_text("")
    torch.save({"bias": torch.zeros(1)}, tmp_path / "x.pt")
    write_dictionary(tmp_path / "custom" / "ae", "CustomSAE", {"W": torch.zeros(1)}, {})
    write_dictionary(tmp_path / "code" / "ae", "AutoEncoder", {"bias": RefusedCode()}, {})
    write_dictionary(tmp_path / "mlp" / "ae", "AutoEncoder",
                     {n: torch.zeros(s) for n, s in (LINEAR | {"bias": (D,)}).items()},
                     {"submodule_name": "mlp_out_layer_3"})
    (tmp_path / "bare" / "ae").mkdir(parents=True)
    (tmp_path / "bare" / "ae" / "cfg.json").write_text("{}")
    for place, error, message in [
        ("nowhere", FileNotFoundError, "there is no such folder\ngive a SAELens folder"),
        ("", ValueError, "no SAE found; there is .*notes.txt"),
        ("notes.txt", ValueError, "no SAE found; there is a file"),
        ("custom/ae", ValueError, "'CustomSAE'\nknown: AutoEncoder, "),
        ("mlp/ae", ValueError, "reads mlp_out_layer_3.*\n"),
        ("code/ae", ValueError, "more than tensors.*\n"),
        ("bare", FileNotFoundError, "sae_weights.safetensors is missing; there is cfg.json\n"),
    ]:
        with pytest.raises(error, match=message) as raised:
            interchange.find(str(tmp_path / place))
        assert str(raised.value).count("\n") == 1


class RefusedCode:
    """Pickled, it is an instruction to call a function on loading."""

    def __reduce__(self):
        return print, ("code of a pickle ran",)


def test_an_edited_variant_is_not_used_for_weights_it_was_not_made_for(tmp_path, monkeypatch):
    """Fails if an edited variants/topk.py evaluates earlier weights as if unchanged, or is saved as SAELens' TopK."""
    sae, original = trained("topk", k=K), variants.path("topk")
    variants.kit.saving.save_sae(tmp_path / "before", sae, 3.0, original, {"k": K}, {})
    edited = tmp_path / "topk.py"
    edited.write_text(original.read_text().replace(".scatter(-1, index, top)", ".scatter(-1, index, top + 1)"))
    path = variants.path
    monkeypatch.setattr(variants, "path", lambda name: edited if name == "topk" else path(name))
    found = interchange.find(str(tmp_path / "before"))["before"]
    with pytest.raises(ValueError, match="variants/topk.py gives these weights other features"):
        interchange.build(found)
    changed = trained("topk", k=K)
    variants.kit.saving.save_sae(tmp_path / "after", changed, 3.0, edited, {"k": K}, {})
    assert not (tmp_path / "after" / "sae_weights.safetensors").exists()
    x = 3 * torch.randn(20, D)
    again = variants.kit.saving.load_sae(tmp_path / "after").encode(x)
    assert torch.equal(again, TrainedSAE(changed,
                                              3.0).encode(x)) and not torch.equal(again, TrainedSAE(sae, 3.0).encode(x))
