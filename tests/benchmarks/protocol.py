"""What the evals cost at Gemma's shape, for `python -m tests.benchmarks.evals --model gemma-2-2b-shape`.

Random weights, made on the device, and made texts: the machine needs neither hub nor files. Texts have the lengths and
numbers of the gemma profile's, for time does not depend on what they say. Each eval runs with the gemma profile's
settings but for a share of its data (SHARES): first with an empty store, then another SAE with the store kept. What is
scaled is everything but the parts that do not grow with that share, which have a factor of their own (PARTS).

Two things are put in place of what random weights cannot do: the first letter of a word shows in its embedding, so that
absorption's probes find words, and answers count as right (ravel's completions, unlearning's questions). autointerp
is measured up to the judge. The solvers of scikit-learn see features of noise, which costs other steps than real ones.

Times are between events on the GPU's stream, of parts within parts without those; `rest` is what is in none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import evals
import experiment
from evals.cache import Cache
from evals.common.settings import choose
from evals.model import language_model
from tests.benchmarks import training
from variants import topk
from variants.kit.trained import TrainedSAE

BLOCKS, LAYER, WIDTH, K, WORDS = 26, 12, 16_384, 80, 139_585  # words: those of Gemma's vocabulary
NARROW = dict(vocab_size=3_000, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
              head_dim=16, query_pre_attn_scalar=16)  # in place of what they are: to try it without a GPU
LETTERS, SHOWN = "abcdefghijklmnopqrstuvwxyz", 8.0  # how far a word's letter stands out of its embedding
GOAL = {  # seconds of set-up and of an SAE; 12 and 5 minutes in all
    "core": (40, 10), "sparse_probing": (60, 15), "tpp": (0, 2), "scr": (60, 5), "absorption": (120, 20),
    "sae_probes": (150, 60), "autointerp": (20, 5), "unlearning": (15, 45), "ravel": (300, 120)}
ATTRIBUTES = {"city": ("Country", "Continent", "Language"),
              "nobel_prize_winner": ("Country of Birth", "Field", "Gender")}
ASKED = 270_000  # prompts of RAVEL that the model completes
SETS = {"canrager/amazon_reviews_mcauley_1and5_sentiment": 2, "fancyzhx/ag_news": 4}  # classes, of the others 5

# the share of an eval's data that is measured, and the factor to all of it
SHARES = {
    "core": (dict(n_eval_reconstruction_batches=20, n_eval_sparsity_variance_batches=200), 10),
    "ravel": (dict(num_pairs_per_attribute=500), 10),
    "sparse_probing": (dict(dataset_names=["LabHC/bias_in_bios_class_set1"]), 36 / 5),
    "absorption": (dict(max_words=WORDS // 10, min_GT_probe_f1=0.0, min_feats_for_eval=1), 10),
    "unlearning": (dict(dataset_size=128, text_rows=8), 8),
    "sae_probes": (dict(dataset_names=None), 113 / 16),  # the first 16
    "scr": (dict(dataset_names=["LabHC/bias_in_bios_class_set1"]), 8),  # one of the pairs
    "tpp": (dict(dataset_names=["LabHC/bias_in_bios_class_set1"]), 2),
    "autointerp": (dict(dataset_name="held-out", total_tokens=200_000), 10),
}
NARROWED = {  # further, for the narrow model
    "core": dict(n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=3),
    "sparse_probing": dict(probe_train_set_size=80, probe_test_set_size=40, k_values=[1, 2]),
    "tpp": dict(probe_train_set_size=80, probe_test_set_size=40, probe_epochs=2),
    "scr": dict(probe_train_set_size=80, probe_test_set_size=40, probe_epochs=2),
    "absorption": dict(max_words=600, k_sparse_probe_num_epochs=2),
    "sae_probes": dict(max_rows=130, max_tokens=64),
    "autointerp": dict(total_tokens=20_000, n_latents=20),
    "unlearning": dict(dataset_size=16, seq_len=64, text_rows=4),
    "ravel": dict(num_pairs_per_attribute=20, min_correct_prompts=20, num_epochs=1),
}

# (what, module, function, factor; None: the eval's)
POOLED = ("pooling", "common.pooling", "_encoded_and_pooled", None)
PARTS = {
    "core": (("SAE", "core", "_apply", None), ("logits", "core", "_losses", None),
             ("cosines", "core", "_max_cosine", 1), ("details", "core", "_details", 1)),
    "sparse_probing": (POOLED, ("full probes", "common.probes", "fit_linear_probe", None),
                       ("lbfgs", "common.probes", "sparse_probe_accuracy", None),
                       ("newton", "common.probes", "converged_probe_accuracy", None),
                       ("ranking", "common.probes", "by_mean_difference", None)),
    "tpp": (POOLED, ("probes", "common.concept_probes", "fit", None),
            ("ablations", "common.concept_probes", "ablations", None), ("scores", "tpp", "_scores", None)),
    "scr": (POOLED, ("probes", "common.concept_probes", "fit", None),
            ("ablations", "common.concept_probes", "ablations", None), ("scores", "scr", "_right", None),
            ("bootstrap", "scr", "_drawn_scores", None)),
    "absorption": (("vocabulary", "common.first_letter", "vocabulary", 1),
                   ("letters' probes", "common.first_letter", "fit_letters", None),
                   ("split features", "absorption", "split_features", None),
                   ("words", "absorption", "_of_words", None)),
    "sae_probes": (("LM probes", "sae_probes", "baselines", None), ("features", "sae_probes", "sparse_features", None)),
    "autointerp": (("windows", "autointerp.windows", "_keep", None), ("features", "autointerp.windows", "_seen", None),
                   ("cases", "autointerp.windows", "case", 1)),
    "unlearning": (("questions", "unlearning.questions", "always_right", None),
                   ("densities", "unlearning", "_densities", None), ("edits", "unlearning", "_harms", None)),
    "ravel": (("known prompts", "ravel", "known_prompts", 0), ("masks", "ravel", "fit_masks", None),
              ("gradients", "ravel", "_gradient", None), ("scores", "ravel", "completed_right", None)),
}


HEAD = ("| eval | first SAE s | one more s | share of the data | all: set-up s | all: a SAE s | goal | GPU GB | "
        "store GB |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")


class Enough(Exception):
    """Ends an eval when its time is over."""


def run(args) -> None:
    """Measure the chosen evals and print a row for each as it ends."""
    narrow, started = args.model == "narrow", time.monotonic()
    shape = training.GEMMA | (NARROW if narrow else {})
    layer, width = (0, 512) if narrow else (LAYER, args.width)
    lm = language_model_of(shape, 2 if narrow else BLOCKS, args.device)
    texts = Texts(lm.tokenizer.words)
    saes = [random_sae(lm, layer, width, seed) for seed in range(2)]
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    through = "TransformerLens' bridge" if lm.bridge else "the plain model"
    print(f"{args.model}, {lm.n_layers} blocks, layer {layer}, width {width:,}, {lm.dtype}, {card}, torch "
          f"{torch.__version__}, evals through {through}; ready after {time.monotonic() - started:.0f} s", flush=True)
    rows, left, until = [HEAD], args.evals.split(","), started + args.seconds
    while left and time.monotonic() < until:
        name = left.pop(0)
        try:
            rows.append(measured(args, name, lm, layer, texts, saes, until, narrow))
        except Enough as stop:
            rows.append(f"| {name} | stopped: {stop} |")
        except Exception as error:  # noqa: BLE001  one eval's crash must not cost the others' rows
            if narrow:
                raise
            rows.append(f"| {name} | failed: {type(error).__name__}: {' '.join(str(error).split())[:300]} |")
        print(rows[-1], flush=True)
    if left:
        print(f"not reached: {', '.join(left)}")
    print("\n" + "\n".join(rows), flush=True)


def measured(args, name: str, lm, layer: int, texts: Texts, saes: list, until: float, narrow: bool) -> str:
    """Measure an eval, print what its parts took, and return its row. Enough where the time is over before."""
    smaller, factor = SHARES[name]
    config = choose(name, "gemma", "")[name] | smaller | (NARROWED[name] if narrow else {})
    if name == "sae_probes":
        config["dataset_names"] = list(importlib.import_module("evals.sae_probes.sets").NAMES[:2 if narrow else 16])
    seconds, whole, peak = [], [], 0.0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.store or None))
        put_in_place(stack, name, texts, narrow)
        for title, sae in zip(("first SAE", "one more SAE"), saes):
            cache, parts = Cache(Path(folder), 100), Watched(args.device)
            setup = experiment.make_setup(SimpleNamespace(seed=0, layers=str(layer)), lm, layer, config, texts, cache)
            setup = dataclasses.replace(setup, say=lambda line: None, track=until_then(until))
            training.forget_peak(args.device)
            start = training.now(args.device)
            try:
                with contextlib.ExitStack() as watching:
                    parts.put_around_eval(watching, name, lm)
                    if args.profile == name:
                        watching.enter_context(profiled(args.device, title))
                    results = work_of(name)(setup, {"sae": sae})
            finally:
                seconds.append(training.now(args.device) - start)
                taken = parts.seconds()
                shown = [f"{what} {of_it:.2f}" for what, of_it in taken.most_common() if of_it >= 0.005]
                print(f"  {name}, {title}: {', '.join(shown)}, rest {seconds[-1] - taken.total():.2f} s", flush=True)
            own = {what: of for what, _, _, of in PARTS[name] if of is not None}
            own["known prompts"] = ASKED / texts.asked
            whole.append(sum(of_it * own.get(what, factor) for what, of_it in taken.items())
                         + factor * max(0.0, seconds[-1] - taken.total()))
            if args.device == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated() / 1e9)
        stored = cache.size() / 1e9
    for problem in [problem for result in results.values() for problem in result.problems]:
        print(f"  {name}: {problem[:200]}", flush=True)
    set_up, of_sae = GOAL[name]
    cells = [name, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"1/{factor:.4g}", f"{max(0.0, whole[0] - whole[1]):.0f}",
             f"{whole[1]:.1f}", f"{set_up} + {of_sae}", f"{peak:.1f}", f"{stored:.2f}"]
    return f"| {' | '.join(cells)} |"


def work_of(name: str):
    """(setup, saes) -> results of an eval; of autointerp what the judge would be given."""
    if name != "autointerp":
        return evals.load(name).run
    from evals.autointerp import windows

    @torch.no_grad()
    def cases(setup, saes: dict) -> dict:
        windows.cases_of(setup, saes)
        return {}

    return cases


def until_then(until: float):
    """What an eval gets as `track`: the items, until the time is over."""
    def track(items, label: str = "", *about):
        for item in items:
            if time.monotonic() > until:
                raise Enough(f"the time was over in {label}")
            yield item
    return track


@contextlib.contextmanager
def profiled(device: str, title: str):
    """The operations that take most of the GPU's and of the host's time, printed."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=kinds) as found:
        yield
    for key in (["self_device_time_total"] if device == "cuda" else []) + ["self_cpu_time_total"]:
        print(f"\n{title}, by {key}\n{found.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=60)}")


class Watched(training.Parts):
    """Time by part of an eval, each without the parts inside it."""

    def put_around_eval(self, stack: contextlib.ExitStack, name: str, lm) -> None:
        """Time the functions of PARTS, of the language model, the SAE and the store until the stack closes."""
        self.whole = [what for what, _, _, factor in PARTS[name] if factor is not None]
        places = [(what, importlib.import_module(f"evals.{module}"), function)
                  for what, module, function, _ in PARTS[name]]
        places += [("LM to the layer", lm, "residual"), ("LM from the layer", lm, "finish"), ("unembed", lm, "unembed"),
                   ("encode", TrainedSAE, "encode"), ("decode", TrainedSAE, "decode"), ("store", Cache, "_store"),
                   ("read", Cache, "_stored")]
        for what, owner, attribute in places:
            stack.enter_context(mock.patch.object(owner, attribute, self.timed(what, getattr(owner, attribute))))

    def timed(self, name: str, function):
        within = super().timed(name, function)

        @functools.wraps(function)
        def run(*args, **kwargs):
            if any(what in self.whole for what in self.open):  # that has a factor of its own
                return function(*args, **kwargs)
            return within(*args, **kwargs)

        return run

    def seconds(self) -> Counter:
        training.now(self.device)
        found = Counter()
        for name, outer, start, stop in self.spans:
            taken = stop - start if self.device == "cpu" else start.elapsed_time(stop) / 1e3
            found[name] += taken
            if outer:
                found[outer] -= taken
        return found


# ------------------------------------------------------------------------------------------------ model and SAEs


def language_model_of(shape: dict, blocks: int, device: str) -> language_model.LanguageModel:
    """A Gemma 2 of that shape with random weights, on the device, and a tokenizer of made words."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(**shape, num_hidden_layers=blocks, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        direction_LD = torch.randn(len(LETTERS), config.hidden_size, dtype=dtype)
    tokenizer = made_tokenizer(config.vocab_size)
    ids, letters = zip(*((tokenizer.convert_tokens_to_ids(word), LETTERS.index(word.strip()[0]))
                         for word in tokenizer.words))
    weight_VD = hf.get_input_embeddings().weight
    with torch.no_grad():
        ids, letters = (torch.tensor(numbers, device=device) for numbers in (ids, letters))
        weight_VD[ids] += SHOWN * weight_VD.std() * direction_LD[letters]
    return language_model.LanguageModel(hf, tokenizer, "gemma-2-2b-shape", f"random {blocks} blocks")


def made_tokenizer(size: int):
    """A tokenizer with a vocabulary of that size: words with a space before them, letters, signs; and its `words`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng, words = random.Random(0), {}
    while len(words) < min(WORDS, size - 500):
        words[" " + "".join(rng.choices(LETTERS, k=rng.randint(4, 9)))] = None
    known = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *map(chr, range(32, 127)), *(f" {c}" for c in "ABCD"), *words]
    known += [f"<unused{i}>" for i in range(size - len(known))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[A-Za-z]+|."), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                        unk_token="<unk>", padding_side="right", model_max_length=8192,
                                        clean_up_tokenization_spaces=False)
    tokenizer.words = list(words)
    return tokenizer


def random_sae(lm, layer: int, width: int, seed: int) -> TrainedSAE:
    """A TopK SAE of random directions, biased to the mean of some activations so that it fires as a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = topk.SAE(lm.d_model, width, k=max(2, K * width // WIDTH)).to(lm.device)
        x_BTD = lm.residual(torch.randint(100, lm.vocab_size, (4, 64), device=lm.device), layer)[:, 1:]
    sae.b_dec.data = x_BTD.float().mean((0, 1))
    return TrainedSAE(sae, 1.0).to(lm.device)


# ------------------------------------------------------------------------------------------------ texts


class Texts:
    """Stands in for evals.texts.source.Source: random words, in the numbers that the gemma profile's settings ask for.

    A text has 40 to 160 tokens (of sae_probes 86 on average and up to 1024, of unlearning 600 to 1400).
    """

    kind, cache_dir, data_dir, asked = "made", None, None, 1

    def __init__(self, words: list[str]):
        self.words, self.rng = words, random.Random(1)

    def text(self, least: int, most: int, words: list[str] | None = None) -> str:
        return "".join(self.rng.choices(words or self.words, k=self.rng.randint(least, most)))

    def documents(self, split: str):
        rng = random.Random(split)
        while True:
            yield "".join(rng.choices(self.words, k=rng.randint(100, 900)))

    def digest(self, split: str) -> str:
        return "made"

    def probing(self, config: dict) -> dict:
        """Labelled texts, as many of each class as the settings ask for."""
        counts = {split: config[f"probe_{split}_set_size"] // 2 for split in ("train", "test")}
        return {name: {f"class {i}": {split: [self.text(40, 160) for _ in range(n)] for split, n in counts.items()}
                       for i in range(SETS.get(name, 5))} for name in config["dataset_names"]}

    def probing_digest(self, config: dict) -> str:
        return f"made {config['dataset_names']}"

    def combinations(self, texts, config: dict) -> dict:
        """scr's run: half as many mixed texts of each sign as pure ones."""
        sizes = {split: config[f"probe_{split}_set_size"] // 2 for split in ("train", "test")}
        return {"a pair": {sign: {split: [self.text(40, 160) for _ in range(n // (1 if sign[0] == sign[1] else 2))]
                                  for split, n in sizes.items()} for sign in ("++", "+-", "-+", "--")}}

    def prompts(self, source, config: dict) -> dict:
        """sae_probes' data sets: 2,957 rows each, as on average, of which a third repeats others."""
        number = min(config["max_rows"], 2_957)
        found = {}
        for name in config["dataset_names"]:
            lengths = [1 + min(1022, int(self.rng.expovariate(1 / 86))) for _ in range(number * 2 // 3)]
            rows = [self.text(n, n) for n in lengths]
            rows += rows[:number - len(rows)]
            found[name] = [(text, i % 2) for i, text in enumerate(rows)]
        return found

    def table(self, kind: str, source) -> tuple[dict, dict]:
        """RAVEL's: four templates of an attribute, 500 entities of two tokens."""
        names = ["".join(self.words[2 * i:2 * i + 2])[1:] for i in range(500)]
        templates = {of: [f"{self.text(4, 10)} %s{self.text(4, 10)}" for _ in range(4)] for of in ATTRIBUTES[kind]}
        entities = {name: {of: self.words[i % 20].strip() for of in ATTRIBUTES[kind]} for i, name in enumerate(names)}
        self.asked = len(ATTRIBUTES) * 3 * 4 * len(entities)
        return templates, entities

    def material(self, narrow: bool, source, config: dict, seed: int):
        """unlearning's: an eighth of the 533 and 308 questions that gemma-2-2b-it answers right, and documents.

        What is to be forgotten has words of its own, those from x to z, so that features tell it from the rest.
        """
        from evals.unlearning.questions import SIDES, Material, Question

        words = {"forget": [word for word in self.words if word[1] >= "x"],
                 "retain": [word for word in self.words if word[1] < "x"]}
        numbers = dict(zip(SIDES, (24, 24) if narrow else (533 // 8, 308 // 8)))
        length, rows = config["seq_len"], config["dataset_size"]
        asked, documents, measuring = {}, {}, {}
        for side in SIDES:
            text = functools.partial(self.text, words=words[side])
            subject = config[f"{side}_subjects"][0]
            asked[side] = [Question(subject, text(40, 120), [text(3, 12) for _ in range(4)], i % 4)
                           for i in range(numbers[side])]
            documents[side] = [text(length // 2, length * 3 // 2) for _ in range(rows + rows // 4)]
            measuring[side] = [text(100, 200) for _ in range(2 * config["text_rows"])]
        return Material(asked, documents, measuring)


def put_in_place(stack: contextlib.ExitStack, name: str, texts: Texts, narrow: bool) -> None:
    """Give an eval these texts, and right answers, until the stack closes."""
    places = []
    if name == "sae_probes":
        sets = importlib.import_module("evals.sae_probes.sets")
        places = [(sets, "read", texts.prompts), (sets, "identity", lambda kind: "made")]
    if name == "scr":
        runs = dict.fromkeys(choose(name, "gemma", "")[name]["dataset_names"], texts.combinations)
        places = [(importlib.import_module("evals.scr.pairs"), "RUNS", {"made": runs})]
    if name == "ravel":
        table = {kind: functools.cache(functools.partial(texts.table, kind)) for kind in ATTRIBUTES}
        places = [(importlib.import_module("evals.ravel.prompts"), "OWN", {"made": table}),
                  (importlib.import_module("evals.ravel"), "matches", lambda *about: True)]
    if name == "unlearning":
        questions = importlib.import_module("evals.unlearning.questions")
        places = [(questions, "load", functools.partial(texts.material, narrow)),
                  (questions, "identity", lambda source, config: "made"), (questions, "always_right", in_every_order)]
    for owner, attribute, value in places:
        stack.enter_context(mock.patch.object(owner, attribute, value))


def in_every_order(setup, asked: list) -> list:
    """Ask all of the questions with their options in every order, and take them for right."""
    from evals.unlearning import questions

    for order in questions.PERMUTATIONS:
        prompts = [questions.prompt(setup.lm.tokenizer, question, order) for question in asked]
        questions._predicted(setup, *questions.encoded(setup.lm, prompts), "questions")
    return asked
