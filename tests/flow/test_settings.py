"""Settings, names and code given from outside: mistakes are named, nothing outside the run is touched or run."""

import json
import time

import pytest
import torch

import evals
import experiment
import variants
import variants.kit.saving
from evals.common.settings import choose
from runs import doubts, folder
from tests.runs.records import run as recorded
from tests.small_run import command
from variants.kit import interchange
from variants.kit.hyper import parse_hyper, parse_sweep

pytestmark = pytest.mark.usefixtures("no_pages")

MODE = """from variants import topk

class SAE(topk.SAE):
    def __init__(self, d_in, d_sae, k=32, mode="a", size=(1, 2), on=True, depth=None, some: "int | str" = 1):
        super().__init__(d_in, d_sae, k=k)
        self.mode = mode
"""


def module_of(tmp_path):
    (tmp_path / "moded.py").write_text(MODE)
    return variants.load(str(tmp_path / "moded.py"))


# ------------------------------------------------------------------------------------------------ the command line


WRONG = [
    (["--seed=99999999999999999999"], "--seed=99999999999999999999 is above 4,294,967,295"),
    (["--seed=-1"], "--seed=-1 is below 0"),
    (["--log_lines=0"], "--log_lines=0 is below 1"),
    (["--checkpoint_seconds=nan"], "--checkpoint_seconds=nan is no number"),
    (["--checkpoint_seconds=-1"], "--checkpoint_seconds=-1.0 is below 0"),
    (["--activation_cache_gb=nan"], "--activation_cache_gb=nan is no number"),
    (["--activation_cache_gb=lots"], "--activation_cache_gb=lots is no number of GB"),
    (["--activation_cache_gb=inf"], "--activation_cache_gb=inf is above"),
    (["--lm_batch_size=99999999"], "--lm_batch_size=99999999 is above 1,048,576"),
    (["--lm_batch_size=²"], "--lm_batch_size=² is no number of rows"),
    (["--num_tokens=99999999999999999999"], "--num_tokens=99999999999999999999 is above"),
    (["--num_tokens=9999999999", "--block_tokens=256"], "more than 1,000,000 blocks"),
    (["--d_sae=99999999999"], "--d_sae=99999999999 is above"),
    (["--max_norm_ratio=1"], "--max_norm_ratio=1.0 is below 1.01"),
    (["--lr=inf"], "--lr=inf is above"),
    (["--lr=nan"], "--lr=nan is no number"),
    (["--lr=0"], "--lr=0.0 is below"),
    (["--layers="], "--layers is given an empty value"),
    (["--layers=1,,2"], "--layers=1,,2 is not a list of block numbers"),
    (["--layers=-1"], "--layers=-1 is not a list"),
    (["--layers=1-3"], "--layers=1-3 is not a list"),
    (["--layers=1,1"], "names 1 twice"),
    (["--layers"], "--layers is given without a value"),
    (["--init_from="], "--init_from is given an empty value"),
    (["--text_field= "], "--text_field is given an empty value"),
    (["--out_dir", "=", "run_1"], "'run_1' after '=' belongs to no flag"),
    (["--hyper", "k=4,", "auxk_alpha=0"], "'auxk_alpha=0' after 'k=4,' belongs to no flag"),
    (["—seed=1"], "the nearest is --seed"),
    (["--evals="], "--evals is given an empty value"),
    (["--evals=core,core"], "--evals names core twice"),
    (["--hyper=k=abc"], "--hyper k=abc: k must be a number"),
    (["--sweep=k=20,x"], "--sweep k=x: k must be a number"),
    (["--eval_config=[1]"], "--eval_config is [1], not an object"),
    (['--eval_config={"core": null}'], "core is null"),
    (['--eval_config={"coree": {}}'], "no eval named 'coree'; the nearest is 'core'"),
    (['--eval_config={"core": {"context_size": 8, "context_size": 9}}'], "'context_size' is given twice"),
    (['--eval_config={"core": {"dataset": "../../etc/passwd"}}'],
     'core: dataset = "../../etc/passwd" would change nothing'),
]
MORE_WRONG = [  # seen when the model or the variant is known
    (["--context=1000000"], "has positions for 512 tokens"),
    (["--hyper=k=None"], "--hyper k=None: k must be a number"),
    (["--hyper=k=True"], "--hyper k=True: k must be a number"),
    (["--hyper=k=(1,2)"], "--hyper k=(1,2): k must be a number"),
    (["--hyper=auxk_alpha=1e999"], "--hyper auxk_alpha=1e999: auxk_alpha must be finite"),
    (["--hyper=k="], "--hyper k=: k is given no value"),
    (["--hyper=k=3,k=4"], "--hyper k=3,k=4: k is given twice"),
    (["--sweep=k=20,20"], "k is given the value 20 twice"),
    (["--sweep=k=20,auxk_alpha=0,k=40"], "k is given twice"),
    (['--eval_config={"sparse_probing": {"dataset_names": ["nothing"]}}'], "no data set 'nothing'"),
]


def cases(listed, *marks):
    return [pytest.param(arguments, words, id=" ".join(arguments), marks=marks) for arguments, words in listed]


@pytest.mark.parametrize("arguments, words", [*cases(WRONG), *cases(MORE_WRONG, pytest.mark.slow)])
def test_a_mistake_in_the_settings_is_named_at_once(tmp_path, cache, capsys, arguments, words):
    """Fails if the line does not name the setting and its value, comes late, or leaves more than words."""
    begun, worked = time.monotonic(), time.process_time()
    assert experiment.main(command(tmp_path / "run", cache, *arguments)) == 1
    took, worked, stderr = time.monotonic() - begun, time.process_time() - worked, capsys.readouterr().err
    assert words in stderr.splitlines()[0] and "to do: " in stderr and len(stderr) <= 1200, stderr
    assert worked < 10 and took < 50
    if (tmp_path / "run").exists():
        assert {p.name for p in (tmp_path / "run").iterdir()} <= folder.NOTHING_BUT_WORDS | {folder.LOCK}


def test_a_device_that_is_not_there_is_named(tmp_path, cache, capsys, monkeypatch):
    """Fails if --device=cuda without a GPU fails in torch's words, after the model was read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert experiment.main(command(tmp_path / "run", cache, "--device=cuda")) == 1
    assert "--device=cuda, and torch finds no CUDA GPU" in capsys.readouterr().err


def test_the_last_of_two_values_counts_and_that_is_said(capsys):
    """Fails if a flag that is given twice is overridden in silence, or the same value twice is remarked on."""
    assert experiment.parse_settings(["--seed=1", "--seed", "2", "--context=8", "--context=8"]).seed == 2
    assert capsys.readouterr().out == "note: --seed is given 2 times: the last, 2, counts\n"


@pytest.mark.parametrize("name", evals.names())
def test_an_evals_own_settings_pass_and_other_kinds_do_not(name):
    """Fails if the range of a setting excludes a default of its own, or a default's opposite in kind is let through."""
    for profile, own in evals.declared(name, "CONFIG").items():
        assert choose(name, profile, json.dumps({name: own}))[name] == own
        for key, value in own.items():
            for wrong in ({"x": {}}, [[]], float("nan"), "" if isinstance(value, str) else "9"):
                with pytest.raises(ValueError, match=f"{name}: {key} = "):
                    choose(name, profile, json.dumps({name: {key: wrong}}))


# ------------------------------------------------------------------------------------------ hyper-parameters and names


def test_what_may_be_meant_is_left_to_the_variant(tmp_path):
    """Fails if a value that some variant takes is refused: a fraction, or anything for None, text or two kinds."""
    given = parse_hyper(module_of(tmp_path), "k=1.5,depth=x,mode=3,size=[3],on=0,some=auto")
    assert given == dict(k=1.5, depth="x", mode=3, size=[3], on=0, some="auto")
    for wrong in ("on=2", "on=x", "size=3", "size=(1,a)", "size=('a','b')"):
        with pytest.raises(ValueError, match="must be"):
            parse_hyper(module_of(tmp_path), wrong)


def test_ordinary_names_of_a_sweep_stay_and_others_become_names_of_files(tmp_path):
    """Fails if names of stored results change, or a name is a path, a pattern, too long or another's."""
    module = module_of(tmp_path)
    assert list(parse_sweep(module, "k=20,0.03")) == [".k_20", ".k_0.03"]
    assert list(parse_sweep(module, "size=(-1, 0),(0,)")) == [".size_(-1, 0)", ".size_(0,)"]
    odd = ["/../x", "-..-x", "a*", "a?", "[0]", "a\nb", "ä", "y" * 260, "y" * 259 + "z"]
    names = list(parse_sweep(module, "mode=" + ",".join(odd)))
    assert len(set(names)) == len(odd) and max(map(len, names)) <= 160
    assert not any(set(name) & set("/*?[]\n\\") for name in names) and all(name.isascii() for name in names)


@pytest.mark.slow
def test_a_swept_path_stays_in_the_run(tmp_path, cache):
    """Fails if an SAE is written outside its run, what lies there is removed, or a long value fails late."""
    module_of(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    sweep = f"--sweep=mode=/../../../precious,{'long' * 65}"
    more = [f"--variant={tmp_path}/moded.py", sweep, "--evals=core", "--num_tokens=2048", "--allow_identical"]
    assert experiment.main(command(tmp_path / "run", cache, *more)) == 0
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    sections = json.loads((tmp_path / "run/final_info.json").read_text())
    assert set(sections) == {p.name for p in (tmp_path / "run/sae").iterdir()} and len(sections) == 2
    assert all("core.r2" in section["means"] for section in sections.values())


def test_saving_removes_nothing_but_a_saved_sae(tmp_path):
    """Fails if save_sae deletes a folder that it did not write, or one that its path leads to by .. or a link."""
    sae = variants.build(variants.load("topk"), 12, 40, dict(k=4))

    def save(place):
        variants.kit.saving.save_sae(place, sae, 1.0, variants.path("topk"), dict(k=4), {})

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for place in ("precious", "a/../precious", "link", "precious/thesis.txt"):
        with pytest.raises(ValueError, match="precious|link"):
            save(tmp_path / place)
    assert (tmp_path / "precious/thesis.txt").read_text() == "years of work" and len(list(tmp_path.iterdir())) == 2
    save(tmp_path / "sae")
    save(tmp_path / "sae")
    assert {p.name for p in (tmp_path / "sae").iterdir()} <= variants.kit.saving.FILES


def test_a_report_writes_inside_its_folder(tmp_path):
    """Fails if a name that a variant gives its file leads out of its report, or a plain one is changed."""
    (tmp_path / "mine.txt").write_text("mine")
    names = ["../mine.txt", str(tmp_path / "mine.txt"), "plots/a.png", "b.svg", "", "..", "x" * 300 + ".png"]
    folder.write_report(tmp_path / "report", {"a": 1.0}, {name: name for name in names})
    written = [p for p in (tmp_path / "report").rglob("*") if p.is_file()]
    assert len(written) == len(names)  # "" and .. share one; numbers.json
    assert {"a.png", "b.svg"} <= {p.name for p in written}
    assert (tmp_path / "mine.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------ code of others


def foreign(tmp_path, code: str, **cfg):
    """An SAE folder in the project's own format, with some variant.py."""
    from safetensors.torch import save_file

    sae = variants.build(variants.load("topk"), 32, 128, {})
    place = tmp_path / "theirs"
    place.mkdir()
    save_file({k: v.contiguous() for k, v in sae.state_dict().items()}, place / "state.safetensors")
    own = dict(architecture="variant", init=dict(d_in=32, d_sae=128), hyper={}, scale=1.0, d_in=32, d_sae=128,
               metadata=dict(model_name="tiny-gemma2", hook_name="blocks.2.hook_resid_post"))
    (place / "cfg.json").write_text(json.dumps(own | cfg))
    (place / "variant.py").write_text(code)
    return place


def test_code_from_elsewhere_runs_only_when_trusted(tmp_path, cache, capsys):
    """Fails if a variant.py that is none of variants/ is executed unasked, or cannot be asked for."""
    ran = tmp_path / "RAN"
    code = f"open({str(ran)!r}, 'w')\n" + variants.path("topk").read_text()
    place = foreign(tmp_path, code, variant="topk")
    evaluate = command(tmp_path / "run", cache, f"--init_from={place}", "--num_tokens=0", "--evals=none")
    for more in ([], ["--variant=topk"]):
        assert experiment.main([*evaluate, *more]) == 1
        first, advice = capsys.readouterr().err.splitlines()[:2]
        assert "variant.py is code that is not in variants/ (it differs from variants/topk.py)" in first
        assert "--trust_code" in advice
    for load in (lambda: variants.kit.saving.load_sae(place),
                 lambda: interchange.build(interchange.find(str(place))["theirs"])):
        with pytest.raises(ValueError, match="code that is not in variants/"):
            load()
    assert not ran.exists()
    trusted = variants.kit.saving.load_sae(place, trust_code=True)
    assert trusted.encode(torch.zeros(3, 32)).shape == (3, 128) and ran.exists()
    assert experiment.main([*evaluate, "--trust_code"]) == 0


@pytest.mark.parametrize("edit", [lambda code: code,
                                  lambda code: '"""Older words."""\n# and a comment\n' + code.partition('"""\n')[2]],
                         ids=["equal", "other words"])
def test_equal_code_is_the_projects_own(tmp_path, monkeypatch, edit):
    """Fails if a variant.py that does the same needs trust, or what lies beside it (an __init__.py) is executed."""
    place = foreign(tmp_path, edit(variants.path("topk").read_text()))
    (place / "__init__.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert interchange.settings_of(str(place))["variant"] == "topk"
    assert variants.kit.saving.load_sae(place).encode(torch.zeros(3, 32)).shape == (3, 128)
    assert not (tmp_path / "RAN").exists()


# ------------------------------------------------------------------------------------------ what a run's figures say


@pytest.mark.parametrize("means, config, words", [
    ({"core.r2": -0.01}, {}, "R² = -0.01000 is below 0"),
    ({"core.ce_loss_score": -0.2}, {}, "CE loss score = -0.2000 is below 0"),
    ({"core.ce_loss_score": 1.2}, {}, "CE loss score = 1.200 is above 1"),
    ({"core.frac_alive": 1.5}, {}, "impossible: core.frac_alive = 1.500"),
    ({"core.l0": 65.0}, dict(variant="mine", hyper=dict(target_l0=32)), "L0 = 65.00 is far from target_l0 = 32"),
    ({"core.l0": 40.0}, dict(variant="jumprelu", hyper=dict(target_l0=32, bandwidth=0.001)),
     "which was asked for (+25%): thresholds move by about the learning rate a step; raise --lr or --num_tokens, or "
     "widen --hyper bandwidth (now 0.001)"),
    ({"core.l0": 25.0}, dict(variant="mine", hyper=dict(target_l0=32)), "(-22%)"),
    ({"core.l0": 65.0}, dict(variant="abs_topk", hyper=dict(k=32)), "L0 = 65.00 is far from k = 32"),
    ({"core.l0": 15.0}, dict(variant="batch_topk", hyper=dict(k=32)), "L0 = 15.00 is far from k = 32"),
])
def test_figures_that_tell_of_a_failed_training_are_warned_of(means, config, words):
    """Fails if a run that reconstructs worse than none, or misses its sparsity by half, ends without a word."""
    (found,) = doubts.warnings(recorded("run", means, **config))
    assert words in found


@pytest.mark.parametrize("means, config", [
    ({"core.r2": 0.7, "core.ce_loss_score": 0.94, "core.l0": 30.0}, dict(variant="topk", hyper=dict(k=32))),
    ({"core.l0": 38.0}, dict(variant="jumprelu", hyper=dict(target_l0=32))),
    ({"core.l0": 47.0}, dict(variant="batch_topk", hyper=dict(k=32))),  # by theta, whose average still moves
    # not what it was trained to
    ({"core.l0": 90.0}, dict(variant="jumprelu", hyper=dict(target_l0=32), init_from="theirs", steps=0)),
    ({"core.l0": 90.0}, dict(variant="cosine_concepts", hyper=dict(k=8))),  # of its concepts
])
def test_healthy_figures_are_not_warned_of(means, config):
    """Fails if a sound run is called doubtful."""
    assert doubts.warnings(recorded("run", means, **config)) == []


@pytest.mark.slow
def test_settings_of_an_eval_that_is_not_chosen_are_said_to_change_nothing(tmp_path, capsys):
    """Fails if a run is refused for them, or they are ignored in silence."""
    assert experiment.main(["--profile=tiny", "--num_tokens=1024", "--evals=none",
                            '--eval_config={"core": {"batch_size_prompts": 4}}', "--device=cpu",
                            f"--cache_dir={tmp_path / 'cache'}", f"--out_dir={tmp_path / 'run'}"]) == 0
    assert "note: --eval_config: core is not among --evals" in capsys.readouterr().out
