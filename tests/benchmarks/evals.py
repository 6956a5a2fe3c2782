"""How long the evals take, for one SAE and for several, beside SAEBench's own code:
python -m tests.benchmarks.evals [--saebench | --cost]

The embedded model with untrained TopK SAEs (time does not depend on training): each eval with an empty cache, then
again with what the language model gave kept. `--saebench` runs the same work through SAEBench 0.6.0 in the same process
where its code runs without a hub; it must be importable (pip install --no-deps sae-bench==0.6.0 and what it imports),
the project does not need it. `--cost` says what the evals' COST is measured by, beside what they declare: one SAE with
an empty cache, another with it kept, and the speed of whole passes of the language model before and after. Times
are CPU seconds of the process on `--threads` threads: on a shared machine those can be compared, wall time cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import evals
import experiment
from evals.cache import Cache
from evals.common.settings import choose
from tests.benchmarks import protocol
from variants import topk
from variants.kit.trained import TrainedSAE

K, WIDTHS = 32, (14, 9, 15, 9, 14, 9)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="embedded", choices=("embedded", "gemma-2-2b-shape", "narrow"),
                        help="others than embedded: tests/benchmarks/protocol.py")
    parser.add_argument("--evals", help="of gemma-2-2b-shape in this order")
    parser.add_argument("--saes", type=int, default=6, help="how many beside one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--saebench", action="store_true")
    parser.add_argument("--cost", action="store_true", help="of the embedded profile, as the evals' COST tells it")
    parser.add_argument("--cache_dir", default="", help="where models and wheels lie; nothing else is taken from it")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=protocol.WIDTH, help="of gemma-2-2b-shape")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which gemma-2-2b-shape stops")
    parser.add_argument("--profile", default="", help="of gemma-2-2b-shape: the eval whose operations are shown")
    parser.add_argument("--store", default="", help="of gemma-2-2b-shape: the folder in which it keeps things")
    args = parser.parse_args(argv)
    if args.model != "embedded":
        args.evals = args.evals or ",".join(name for name in protocol.SHARES if name in evals.names())
        protocol.run(args)
        return
    usual = [name for name in evals.names() if "embedded" in evals.declared(name, "CONFIG")]
    args.evals = args.evals or ",".join(name for name in usual if args.cost or name != "autointerp")
    torch.set_num_threads(args.threads)
    flags = [f"--{key}={value}" for key, value in (("cache_dir", args.cache_dir), ("data_dir", args.data_dir)) if value]
    settings, _ = experiment.resolve(experiment.parse_settings(["--profile=embedded", *flags]))
    lm, source = experiment.load_language_model(settings), experiment.make_source(settings)
    layer = experiment.layers_of(settings)[0]
    if args.cost:
        print_costs(args.evals.split(","), settings, lm, layer, source)
        return
    saes = {str(i): trained(lm, settings, layer, i) for i in range(args.saes)}
    print(f"{lm.name}, layer {layer}, width {settings.d_sae:,}, torch {torch.__version__}, {args.threads} thread(s); "
          "CPU seconds")
    header = ["1 SAE, first", "again", f"{args.saes} SAEs, first", "again"]
    if args.saebench:
        header += ["SAEBench, 1", "another"]
    print(" " * 16 + "".join(f"{title:>{width}}" for title, width in zip(header, WIDTHS)))
    for name in args.evals.split(","):
        row = []
        for chosen in (dict(list(saes.items())[:1]), saes):
            with tempfile.TemporaryDirectory() as folder:
                setup = quiet_setup(name, settings, lm, layer, source, folder)
                row += [seconds(evals.load(name).run, setup, chosen) for _ in range(2)]
        if args.saebench and name in REFERENCES:
            with tempfile.TemporaryDirectory() as folder:
                row += [seconds(reference, name, setup, saes[str(i)], folder) for i in range(2)]
        print(f"{name:16}" + "".join(f"{value:{width}.1f}" for value, width in zip(row, WIDTHS)), flush=True)


def quiet_setup(name: str, settings, lm, layer: int, source, folder: str):
    """What an eval is given, with that folder for a cache and nobody told."""
    config = choose(name, settings.profile, "")[name]
    setup = experiment.make_setup(settings, lm, layer, config, source, Cache(Path(folder), 20))
    return dataclasses.replace(setup, say=lambda line: None, track=lambda items, *rest: items)


def print_costs(names: list[str], settings, lm, layer: int, source) -> None:
    """A row for each eval: CPU seconds, thousands of tokens that take as long, COST, and what COST foretells."""
    print(f"{lm.name}, layer {layer}, width {settings.d_sae:,}, torch {torch.__version__}, {torch.get_num_threads()} "
          "thread(s); CPU seconds\n"
          "| eval | one SAE, nothing kept | another | tokens/s | once, thousands | each | declared | foretold, one SAE "
          "| / measured | another | / measured |\n" + "|---" + "|--:" * 10 + "|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            setup, took, speeds = quiet_setup(name, settings, lm, layer, source, folder), [], [speed(lm, layer)]
            for i in range(2):
                sae = trained(lm, settings, layer, i)
                took.append(seconds(protocol.work_of(name), setup, {"sae": sae}))
                speeds.append(speed(lm, layer))
        rate, declared = sum(speeds) / len(speeds), evals.cost(name, settings.profile, setup.config)
        first, another = sum(declared) / rate, declared[1] / rate
        once, each = ((took[0] - took[1]) * rate / 1e3, took[1] * rate / 1e3)
        print(f"| `{name}` | {took[0]:.1f} | {took[1]:.1f} | {rate:.0f} | {once:.1f} | {each:.1f} | "
              f"{declared[0] / 1e3:g}, {declared[1] / 1e3:g} | {first:.0f} | {first / took[0]:.2f} | {another:.1f} | "
              f"{another / took[1]:.2f} |", flush=True)


@torch.no_grad()
def speed(lm, layer: int) -> float:
    """Tokens a CPU second through the whole language model as evals pass it, head included: two passes of 8 × 128."""
    tokens_BT = torch.randint(lm.vocab_size, (8, 128))
    took = [seconds(lambda: lm.unembed(lm.finish(lm.residual(tokens_BT, layer), layer))) for _ in range(3)]
    return 2 * tokens_BT.numel() / sum(took[1:])  # the first makes TransformerLens' bridge


def trained(lm, settings, layer: int, seed: int) -> TrainedSAE:
    """A TopK SAE of random directions, biased to the mean of some activations so that it fires as a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = topk.SAE(lm.d_model, settings.d_sae, k=K)
        x_BTD = lm.residual(torch.randint(lm.vocab_size, (4, 64)), layer)[:, 1:]
    sae.b_dec.data = x_BTD.mean((0, 1))
    return TrainedSAE(sae, 1.0)


def seconds(work, *args) -> float:
    start = time.process_time()
    work(*args)
    return time.process_time() - start


# -------------------------------------------------------------------------------------------- SAEBench on the same work


def reference(name: str, setup, sae: TrainedSAE, folder: str) -> None:
    """SAEBench's evaluation of one SAE; `folder` keeps its activations from one SAE to the next, as its runs do."""
    import jaxtyping

    # before its modules are imported: their annotations admit no TransformerBridge
    jaxtyping.config.update("jaxtyping_disable", True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            REFERENCES[name](setup, sae, folder)
        finally:
            torch.set_grad_enabled(True)


def theirs(sae: TrainedSAE, setup):
    """The SAE as SAEBench wants it."""
    from sae_bench.custom_saes.topk_sae import TopKSAE

    own = TopKSAE(sae.sae.d_in, sae.sae.d_sae, K, setup.lm.name, setup.layer, torch.device("cpu"), torch.float32)
    weights = {key: getattr(sae.sae, key).detach() for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    own.load_state_dict(own.state_dict() | weights)
    own.cfg.architecture_str = "topk"  # core asks for it; its own config class has none
    return own.requires_grad_(False)


def reference_core(setup, sae, folder) -> None:
    from sae_bench.evals.core import main
    from sae_bench.evals.core.eval_config import CoreEvalConfig

    from evals.texts import packing

    config = setup.config
    batch = config["batch_size_prompts"]
    batches = config["n_eval_reconstruction_batches"], config["n_eval_sparsity_variance_batches"]
    rows_RT = packing.pack(setup.texts(), setup.lm.tokenizer, config["context_size"], setup.lm.bos,
                           batch * sum(batches))
    parts = iter(rows_RT.split(batch))
    store = SimpleNamespace(get_batch_tokens=lambda size: next(parts), reset_input_dataset=lambda: None,
                            store_batch_size_prompts=batch, context_size=config["context_size"])
    asked = CoreEvalConfig(model_name=setup.lm.name, batch_size_prompts=batch, n_eval_reconstruction_batches=batches[0],
                           n_eval_sparsity_variance_batches=batches[1], exclude_special_tokens_from_reconstruction=True,
                           compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
                           compute_variance_metrics=True, compute_featurewise_density_statistics=True,
                           compute_featurewise_weight_based_metrics=True)
    with torch.no_grad():
        main.run_evals(theirs(sae, setup), store, setup.lm.bridge, asked, ignore_tokens=set(setup.lm.special_ids))


def texts_of(setup) -> dict:
    """{data set: ({class: train texts}, {class: test texts})} of a probing config."""
    sets = setup.data.probing(setup.config)
    return {name: tuple({label: texts[split] for label, texts in of.items()} for split in ("train", "test"))
            for name, of in sets.items()}


def reference_probing(setup, sae, folder) -> None:
    from sae_bench.evals.sparse_probing import main
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.sae_bench_utils import dataset_info

    config, sets = setup.config, texts_of(setup)
    asked = SparseProbingEvalConfig(model_name=setup.lm.name, context_length=config["context_length"],
                                    k_values=config["k_values"], llm_batch_size=config["llm_batch_size"],
                                    sae_batch_size=config["sae_batch_size"], llm_dtype="float32")
    main.dataset_utils.get_multi_label_train_test_data = lambda name, *rest: sets[name]
    for name, (train, _) in sets.items():
        dataset_info.chosen_classes_per_dataset[name] = list(train)
        torch.manual_seed(42)
        main.run_eval_single_dataset(name, asked, theirs(sae, setup), setup.lm.bridge, setup.layer, setup.hook_name,
                                     "cpu", folder, True)


def reference_tpp(setup, sae, folder) -> None:
    from sae_bench.evals.scr_and_tpp import main
    from sae_bench.sae_bench_utils import dataset_info

    sets = texts_of(setup)
    main.dataset_creation.get_train_test_data = lambda name, *rest: sets[name]
    for name, (train, _) in sets.items():
        dataset_info.chosen_classes_per_dataset[name] = list(train)
        main.COLUMN2_VALS_LOOKUP[name] = None
        main.run_eval_single_dataset(name, scr_and_tpp(setup, False), theirs(sae, setup), setup.lm.bridge, setup.layer,
                                     setup.hook_name, "cpu", folder, True)


def reference_scr(setup, sae, folder) -> None:
    from sae_bench.evals.scr_and_tpp import main

    from evals.scr import pairs

    def six_sets(of: dict, split: str) -> dict[str, list[str]]:
        pp, pn, np, nn = (of[sign][split] for sign in pairs.COMBINATIONS)  # first attribute: profession, second: gender
        half = len(pn)
        return {"male / female": pp[:half] + np, "female_data_only": pn + nn[:half],
                "professor / nurse": pp[:half] + pn, "nurse_data_only": np + nn[:half],
                "male_professor / female_nurse": pp, "female_nurse_data_only": nn}

    for name, of in pairs.Source(setup.data).probing(setup.config).items():
        main.dataset_creation.get_train_test_data = lambda *rest, of=of: (six_sets(of, "train"), six_sets(of, "test"))
        main.COLUMN2_VALS_LOOKUP[name] = ("a", "b")
        main.run_eval_single_dataset(name, scr_and_tpp(setup, True), theirs(sae, setup), setup.lm.bridge, setup.layer,
                                     setup.hook_name, "cpu", folder, True, ("a", "b"))


def scr_and_tpp(setup, perform_scr: bool):
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

    config = setup.config
    return ScrAndTppEvalConfig(model_name=setup.lm.name, perform_scr=perform_scr,
                               context_length=config["context_length"], llm_batch_size=config["llm_batch_size"],
                               sae_batch_size=config["sae_batch_size"], llm_dtype="float32",
                               n_values=config["n_values"], lower_vram_usage=False)


REFERENCES = {"core": reference_core, "sparse_probing": reference_probing, "tpp": reference_tpp, "scr": reference_scr}

if __name__ == "__main__":
    main()
