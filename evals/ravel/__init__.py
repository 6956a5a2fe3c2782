"""RAVEL: can the features of one attribute of an entity be swapped without its other attributes (SAEBench 0.6.0,
`ravel`)?

Prompts that the LM completes right are paired. In a cause pair base and source differ in the attribute, and the swap
must make the base's completion the source's; in an isolation pair both prompts ask for another attribute, and the
base's must stay. Per attribute a mask over the features is trained: at the entity's last token the layer's output
becomes decode((1 − s)·encode(base) + s·encode(source)), without the error, s = sigmoid(m/T) with T from 1 to 1e-4,
cross-entropy on the wanted first token; then the hard mask m > 0 is scored by greedy completions. Mean over attributes,
then over kinds of entity.

The masks of all attributes are trained in the same passes of the LM (six times fewer, and no mask sees another).
Pairs come from one random.Random per attribute, seeded by run seed and names, used in SAEBench's order.
Mask, temperature and loss are fp32 (SAEBench: temperature and loss in the LM's dtype). Corrected metrics beside the
compatible ones:
  *_unseen_prompts   on test pairs neither of whose prompts stands in a training pair; a cause pair whose two first
                     tokens coincide is left out (SAEBench counts it as isolation)
Standard errors: entities are the sample. The attributes are the protocol's own, three or six, and no sample; a test
pair has two entities, its base's and its source's, and pairs that share one are not independent: clustered by both
(evals/common/errors.py).

Shapes: P prompts the LM completes right, U of them in pairs, N test pairs, b rows of a batch, T positions, D = d_model,
F features, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from evals import Result, files
from evals.cache import digest
from evals.common import errors, pooling
from evals.model import memory
from evals.ravel.prompts import (
    ATTRIBUTES,
    OWN,
    REPOSITORY,
    Known,
    Pair,
    Task,
    all_prompts,
    best_entities,
    full_batches,
    make_tasks,
    matches,
    settled,
)
from evals.storage.identity import code_digest

EVAL_TYPE_ID = "ravel"

METRICS = {
    "disentanglement_score": "higher",
    "cause_score": "higher",
    "isolation_score": "higher",
    "disentanglement_score_unseen_prompts": "higher",
    "cause_score_unseen_prompts": "higher",
    "isolation_score_unseen_prompts": "higher",
}

NOTE = ("RAVEL scores compare SAEs on the same model and settings only: they depend on which prompts the model "
        "completes right. In the embedded profile (150 cities, templates of its own) a mask that swaps nothing, or "
        "everything, already scores about a third.")

RANGES = {"train_test_split": (0.01, 0.99), "learning_rate": (1e-9, 1e3)}

CONFIG = {
    "gemma": {
        "entity_attribute_selection": {
            "city": ["Country", "Continent", "Language"],
            "nobel_prize_winner": ["Country of Birth", "Field", "Gender"],
        },
        "top_n_entities": 500,
        "min_correct_prompts": 200,  # an attribute with fewer has no score
        "num_pairs_per_attribute": 5000,  # of either kind
        "train_test_split": 0.7,
        "learning_rate": 1e-3,
        "num_epochs": 2,
        "n_generated_tokens": 6,
        "llm_batch_size": 8,  # pairs of one training step of a mask
        "completion_batch_size": 256,
    },
    # 74 steps instead of 1750: the learning rate is as many times larger, so that a mask can move as far. Half of the
    # pairs are for testing, which costs a quarter of training and decides the standard error.
    "embedded": {
        "entity_attribute_selection": {"city": ["Country", "Continent", "Language"]},
        "top_n_entities": 500,
        "min_correct_prompts": 100,
        "num_pairs_per_attribute": 300,
        "train_test_split": 0.5,
        "learning_rate": 0.024,
        "num_epochs": 2,
        "n_generated_tokens": 6,
        "llm_batch_size": 8,
        "completion_batch_size": 32,
    },
    "tiny": {
        "entity_attribute_selection": {"animal": ["Place", "Food"]},
        "top_n_entities": 500,
        "min_correct_prompts": 4,
        "num_pairs_per_attribute": 8,
        "train_test_split": 0.5,
        "learning_rate": 0.1,
        "num_epochs": 2,
        "n_generated_tokens": 3,
        "llm_batch_size": 2,
        "completion_batch_size": 8,
    },
}

# not scaled: what is made once are the completions of all prompts, and an SAE takes steps and pairs
# gemma: 270,000 prompts completed, by the goals of tests/benchmarks/protocol.py 300 s of an H200 (published: 45 minutes
# of an RTX 3090, which is 14,600); of an SAE 120 s, 1,750 steps for all masks and their test completions
COST = {"gemma": (17000, 7700), "embedded": (33, 42), "tiny": (5, 2)}

SIDES = ("cause_score", "isolation_score")


def repositories(config: dict, source) -> list[str]:
    """The hub data set it reads in the gemma profile."""
    return [REPOSITORY]


def wheels(kind: str) -> list[str]:
    """The wheel with the cities that are asked about."""
    return ["cities"] if kind == "embedded" else []


def read_ahead(source, config: dict, seed: int) -> None:
    """Read the prompts, which are kept: what is wrong with them shows before anything is trained."""
    next(all_prompts(source, config), None)


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings."""
    counts = ("top_n_entities", "num_epochs", "n_generated_tokens", "completion_batch_size")
    problems = [f"ravel: {key} = {config[key]} leaves nothing to do\nset {key} to 1 or more"
                for key in counts if config[key] < 1]
    kinds = OWN.get(facts.get("source"))
    for kind, attributes in config["entity_attribute_selection"].items():
        if kinds is not None and kind not in kinds:
            problems.append(f"ravel: the {facts['profile']} profile has no entities of the kind {kind!r}\n"
                            f"choose among {', '.join(kinds)} in entity_attribute_selection")
        if len(set(attributes)) < 2:
            problems.append(f"ravel: {kind} has only the attribute {', '.join(attributes) or 'none'}, isolation needs "
                            "another one\n"
                            "give entity_attribute_selection two or more attributes of each kind of entity")
        known = ATTRIBUTES.get(facts.get("source"), {}).get(kind, attributes)
        unknown = [name for name in attributes if name not in known]
        if unknown:
            problems.append(f"ravel: {kind} has no attribute {unknown[0]!r}\nchoose among {', '.join(known)}")
        if "Timezone" in attributes:
            problems.append("ravel: completions with time zones cannot be marked here\n"
                            "leave Timezone out of entity_attribute_selection")
    pairs, share = 2 * min(config["min_correct_prompts"], config["num_pairs_per_attribute"]), config["train_test_split"]
    if not pairs * min(share, 1 - share) >= config["llm_batch_size"] > 0:
        problems.append(f"ravel: {pairs} pairs split at train_test_split = {share} do not give a training and a test "
                        f"batch of {config['llm_batch_size']}\n"
                        "raise min_correct_prompts and num_pairs_per_attribute, or lower llm_batch_size")
    return problems


def run(setup, saes: dict) -> dict[str, Result]:
    """Train and score the masks of every SAE; {SAE name: Result}."""
    known, asked = known_prompts(setup)
    tasks, problems = make_tasks(known, asked, setup.config, setup.seed)
    if not tasks:
        problems = [*problems, "ravel: nothing is left to train a mask for: no disentanglement_score, no cause_score, "
                               "no isolation_score"]
        return {name: _result(known, [], [], [], problems) for name in saes}
    setup.say(f"ravel: {len(known)} of {sum(asked.values())} prompts completed right, {len(tasks)} attributes, "
              f"{sum(len(task.test) for task in tasks)} test pairs")
    x, entity_PD = residuals(setup, known, tasks)
    entity_UD = entity_PD[entity_PD.any(1)]
    results = {}
    for name, sae in saes.items():
        bad = unfit(sae, entity_UD, setup)
        if bad:
            why = f"NaN or inf in the SAE's output for {bad} of {len(entity_UD)} prompts"
            results[name] = _result(known, [], [], [], [*problems, f"ravel: {why}: no disentanglement_score"])
            continue
        masks = fit_masks(setup, sae, known, tasks, x, entity_PD, name)
        right = completed_right(setup, sae, known, tasks, masks, x, entity_PD, name)
        results[name] = _result(known, tasks, masks, right, problems)
    return results


# ------------------------------------------------------------------------------------------------ prompts


def known_prompts(setup) -> tuple[list[Known], Counter]:
    """The prompts of the entities with most right completions, and how many were asked per (kind, attribute)."""
    config, lm = setup.config, setup.lm
    prompts = list(all_prompts(setup.data, config))

    def done(i: int, text: str) -> bool:
        return settled(prompts[i].text, prompts[i].value, text)

    def residual(rows: list[int], tokens_bT: Tensor, step: int) -> Tensor:
        return lm.residual(tokens_bT, setup.layer)

    def make() -> dict[str, Tensor]:
        tokens = _tokens(lm, [prompt.text for prompt in prompts])
        said, first = complete(setup, tokens, done, residual, "ravel: completions")
        right = [matches(prompt.text, prompt.value, text) for prompt, text in zip(prompts, said)]
        return {"right": torch.tensor(right), "first": torch.tensor(first)}

    # whichever the layer, the passes up to it and from it are one pass of the model
    depends_on = {"lm": lm.digest, "prompts": digest([[p.text, p.value] for p in prompts]),
                  "tokens": config["n_generated_tokens"], "batch": config["completion_batch_size"],
                  "code": [code_digest(file) for file in files("ravel")],
                  "torch": torch.__version__, "device": torch.device(lm.device).type}
    stored = setup.cache.get("ravel-completions", depends_on, make)
    right = [i for i, ok in enumerate(stored["right"].tolist()) if ok]
    best = best_entities([prompts[i] for i in right], config["top_n_entities"])
    kept = [i for i in right if (prompts[i].kind, prompts[i].entity) in best]
    tokens, remainders = _tokens(lm, [prompts[i].text for i in kept]), _tokens(lm, [prompts[i].remainder for i in kept])
    first, known = stored["first"].tolist(), []
    for i, ids, rest in zip(kept, tokens, remainders):
        position = len(ids) - len(rest)  # the remainder's BOS stands for the entity's last token
        prompt = prompts[i]
        known.append(Known(prompt.kind, prompt.attribute, prompt.value, prompt.text, ids, position, first[i],
                           prompt.entity))
    return known, Counter((prompt.kind, prompt.attribute) for prompt in prompts)


def _tokens(lm, texts: list[str]) -> list[list[int]]:
    return [[lm.bos, *ids] for ids in lm.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


# ------------------------------------------------------------------------------------------------ language model


def residuals(setup, known: list[Known], tasks: list[Task]) -> tuple[dict[int, Tensor], Tensor]:
    """The residual stream {prompt: x_TD} of all bases and at the last entity token of every prompt in a pair, entity_PD
    (others 0).

    In the LM's dtype; at Gemma's size up to 60,000 bases of about 25 tokens, 7 GB: on the CPU, of a GPU as long as half
    of its memory is free on the GPU.
    """
    pairs = [pair for task in tasks for pair in [*itertools.chain(*task.train), *task.test]]
    bases = {pair.base for pair in pairs}
    used = sorted(bases | {pair.source for pair in pairs}, key=lambda i: (-len(known[i].tokens), known[i].tokens))
    tokens_UT = pad_sequence([torch.tensor(known[i].tokens) for i in used], batch_first=True,
                             padding_value=setup.lm.bos)
    length_U, size = torch.tensor([len(known[i].tokens) for i in used]), setup.config["completion_batch_size"]
    x, entity_PD = {}, None
    batches = pooling.activation_batches(setup, tokens_UT, length_U, size)
    for rows, x_bTD in setup.track(batches, "ravel: residuals", math.ceil(len(used) / size), "batches"):
        if entity_PD is None:
            entity_PD = x_bTD.new_zeros(len(known), x_bTD.shape[-1])
        entity_PD[used[rows]] = x_bTD[range(len(x_bTD)), [known[i].position for i in used[rows]]]
        if not memory.has_room(x_bTD):
            x_bTD = x_bTD.cpu()
        for i, x_TD in zip(used[rows], x_bTD):
            if i in bases:
                x[i] = x_TD[: len(known[i].tokens)].clone()
    return x, entity_PD


@torch.no_grad()
def complete(setup, tokens: list[list[int]], done: Callable[[int, str], bool], residual: Callable[..., Tensor],
             label: str) -> tuple[list[str], list[int]]:
    """Greedy completions as text and their first tokens; a row ends early once done(row, text) or at a special token.

    `residual(rows, tokens_bT, step)` gives the stream after the layer, padded on the right, from which the LM goes on.
    """
    lm, size = setup.lm, setup.config["completion_batch_size"]
    made: list[list[int]] = [[] for _ in tokens]
    said = [""] * len(tokens)
    pending = list(range(len(tokens)))
    for step in range(setup.config["n_generated_tokens"]):
        pending.sort(key=lambda i: -len(tokens[i]))  # like lengths together, the longest first
        batches = [pending[start:start + size] for start in range(0, len(pending), size)]
        for rows in setup.track(batches, f"{label}, token {step + 1}", len(batches), "batches"):
            sequences = [torch.tensor(tokens[i] + made[i]) for i in rows]
            tokens_bT = pad_sequence(sequences, batch_first=True, padding_value=lm.bos).to(lm.device)
            said_next = partial(_said_next, setup, partial(residual, step=step))
            last = [len(sequence) - 1 for sequence in sequences]
            next_b = memory.by_rows(setup, "the language model", said_next, rows, tokens_bT, last,
                                    each=tokens_bT.shape[1])
            for i, token in zip(rows, next_b.tolist()):
                made[i].append(token)
        for i, text in zip(pending, lm.tokenizer.batch_decode([made[i] for i in pending])):
            said[i] = text
        pending = [i for i in pending if made[i][-1] not in lm.special_ids and not done(i, said[i])]
    return said, [ids[0] for ids in made]


def _said_next(setup, residual: Callable, rows: list[int], tokens_bT: Tensor, last: list[int]) -> Tensor:
    h_bTD = setup.lm.finish(residual(rows, tokens_bT), setup.layer)
    return setup.lm.unembed(h_bTD[range(len(rows)), last]).argmax(-1)


# ------------------------------------------------------------------------------------------------ masks


def interchange(sae, base_bD: Tensor, source_bD: Tensor, share_F: Tensor) -> Tensor:
    """decode((1 − s)·encode(base) + s·encode(source)), [b, D]; differentiable in s."""
    with torch.no_grad():
        base_bF, source_bF = sae.encode(base_bD), sae.encode(source_bD)
    return sae.decode((1 - share_F) * base_bF + share_F * source_bF)


def interchanged(sae, entity_PD: Tensor, pairs: list[list[Pair]], shares: list[Tensor]) -> Tensor:
    """`interchange` for the pairs of each share_F, one after the other, [b, D]; on a GPU from one pass of the SAE."""
    if not shares[0].is_cuda:
        vectors = ([entity_PD[[pair.base for pair in of]], entity_PD[[pair.source for pair in of]]] for of in pairs)
        return torch.cat([interchange(sae, *of, share_F) for of, share_F in zip(vectors, shares)])
    every = [pair for of in pairs for pair in of]
    entity_cD = entity_PD[[pair.base for pair in every] + [pair.source for pair in every]].to(shares[0].device)
    with torch.no_grad():
        base_bF, source_bF = sae.encode(entity_cD).chunk(2)
    share_bF = torch.cat([share_F.expand(len(of), -1) for of, share_F in zip(pairs, shares)])
    return sae.decode((1 - share_bF) * base_bF + share_bF * source_bF)


def put(x_bTD: Tensor, position: list[int], patch_bD: Tensor) -> Tensor:
    """x with each row's vector at its position replaced."""
    index = (torch.arange(len(x_bTD), device=x_bTD.device), torch.tensor(position, device=x_bTD.device))
    return x_bTD.index_put(index, patch_bD.to(x_bTD.dtype))


def temperatures(steps: int) -> list[float]:
    """From 1 to 1e-4 in equal ratios."""
    return torch.logspace(0, -4, steps).tolist()


@torch.enable_grad()
def fit_masks(setup, sae, known: list[Known], tasks: list[Task], x: dict[int, Tensor], entity_PD: Tensor,
              name: str) -> list[Tensor]:
    """The masks m_F of all tasks after training; each has its own batches, temperatures and gradient."""
    config, lm = setup.config, setup.lm
    F = sae.encode(entity_PD[:1].to(lm.device)).shape[-1]
    masks = [torch.zeros(F, device=lm.device, requires_grad=True) for _ in tasks]
    optimiser = torch.optim.Adam(masks, lr=config["learning_rate"])
    plans = [list(zip(task.train * config["num_epochs"], temperatures(len(task.train) * config["num_epochs"])))
             for task in tasks]
    steps = list(itertools.zip_longest(*plans))
    for step in setup.track(steps, f"ravel: masks of {name}", len(steps), "steps"):
        # features are encoded again in every step: kept for all pairs they would take 30 GB at a width of 65k
        parts = [(part[0], torch.sigmoid(mask_F / part[1])) for mask_F, part in zip(masks, step) if part]
        patch_bD = interchanged(sae, entity_PD, *map(list, zip(*parts)))
        pairs = [pair for of, _ in parts for pair in of]
        x_bTD = pad_sequence([x[pair.base].to(lm.device) for pair in pairs], batch_first=True)
        position = [known[pair.base].position for pair in pairs]
        last = [len(known[pair.base].tokens) - 1 for pair in pairs]
        target_b = torch.tensor([known[pair.wanted].first for pair in pairs], device=lm.device)
        optimiser.zero_grad()
        patch_bD.backward(memory.by_rows(setup, "the language model", partial(_gradient, setup), patch_bD.detach(),
                                         x_bTD, position, last, target_b, each=x_bTD.shape[1]))
        optimiser.step()
    return [mask_F.detach() for mask_F in masks]


def _gradient(setup, patch_bD: Tensor, x_bTD: Tensor, position: list[int], last: list[int], target_b: Tensor) -> Tensor:
    """Gradient [b, D] of a step's loss with respect to the patches; the loss is a sum over rows."""
    patch_bD.requires_grad_()
    h_bTD = setup.lm.finish(put(x_bTD, position, patch_bD), setup.layer)
    logits_bV = setup.lm.unembed(h_bTD[range(len(h_bTD)), last])
    # batches are full, so this is the sum of each mask's own mean
    loss = functional.cross_entropy(logits_bV.float(), target_b, reduction="sum") / setup.config["llm_batch_size"]
    return torch.autograd.grad(loss, patch_bD)[0]


@torch.no_grad()
def completed_right(setup, sae, known: list[Known], tasks: list[Task], masks: list[Tensor], x: dict[int, Tensor],
                    entity_PD: Tensor, name: str) -> list[list[bool]]:
    """Per task and test pair, whether the completion under the hard mask gives the wanted value."""
    lm = setup.lm
    pairs = [pair for task in tasks for pair in task.test]
    patch_ND = torch.cat([interchanged(sae, entity_PD, [batch], [(mask_F > 0).float()])
                          for task, mask_F in zip(tasks, masks)
                          for batch in full_batches(task.test, setup.config["llm_batch_size"])])

    def residual(rows: list[int], tokens_bT: Tensor, step: int) -> Tensor:
        if step:
            clean_bTD = lm.residual(tokens_bT, setup.layer)
        else:
            clean_bTD = pad_sequence([x[pairs[i].base].to(lm.device) for i in rows], batch_first=True)
        return put(clean_bTD, [known[pairs[i].base].position for i in rows], patch_ND[rows])

    def done(i: int, text: str) -> bool:
        return settled(*question[i], text)

    question = [(known[pair.base].text, known[pair.wanted].value) for pair in pairs]
    tokens = [known[pair.base].tokens for pair in pairs]
    said, _ = complete(setup, tokens, done, residual, f"ravel: scores of {name}")
    right = iter([matches(*asked, text) for asked, text in zip(question, said)])
    return [[next(right) for _ in task.test] for task in tasks]


def unfit(sae, entity_UD: Tensor, setup) -> int:
    """Number of entity vectors whose reconstruction is not finite."""
    def broken(x_bD: Tensor) -> Tensor:
        return (~sae.decode(sae.encode(x_bD.to(setup.lm.device))).isfinite()).any(1)

    with torch.no_grad():
        return int(memory.by_rows(setup, "the features", broken, entity_UD,
                                  most=setup.config["completion_batch_size"]).sum())


# ------------------------------------------------------------------------------------------------ scores


Counted = dict[str, list[tuple[Pair, bool]]]  # {side: its test pairs, and whether the completion was right}


def counted(known: list[Known], task: Task, right: list[bool]) -> tuple[Counted, Counted]:
    """The test pairs of one attribute by the side they count on: as SAEBench counts, and those of unseen prompts."""
    seen = {i for batch in task.train for pair in batch for i in (pair.base, pair.source)}
    compatible, corrected = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    for pair, ok in zip(task.test, right):
        coincide = known[pair.base].first == known[pair.source].first
        compatible[SIDES[not pair.cause or coincide]].append((pair, ok))
        if not (pair.cause and coincide or pair.base in seen or pair.source in seen):
            corrected[SIDES[not pair.cause]].append((pair, ok))
    return compatible, corrected


def scores(found: Counted) -> dict:
    """{score: value} of one attribute, with its numbers of pairs."""
    values = {side: sum(ok for _, ok in pairs) / len(pairs) if pairs else None for side, pairs in found.items()}
    both = None if None in values.values() else sum(values.values()) / 2
    return {**values, "disentangle_score": both, "pairs": {side: len(pairs) for side, pairs in found.items()}}


def _result(known: list[Known], tasks: list[Task], masks: list[Tensor], right: list[list[bool]],
            problems: list[str]) -> Result:
    """The Result of one SAE; without tasks nothing is scored."""
    names = {"disentanglement_score": "disentangle_score", "cause_score": "cause_score",
             "isolation_score": "isolation_score"}
    pairs = [counted(known, task, ok) for task, ok in zip(tasks, right)]
    per_task = [tuple(map(scores, sides)) for sides in pairs]
    weights = mean_weights([task.kind for task in tasks])
    problems, summary, stderrs = list(problems), {}, {}
    for suffix, which in (("", 0), ("_unseen_prompts", 1)):
        for metric, key in names.items():
            values = [found[which][key] for found in per_task]
            measured = bool(values) and None not in values
            summary[metric + suffix] = sum(w * value for w, value in zip(weights, values)) if measured else None
            error = standard_error(known, weights, [found[which] for found in pairs], SUMS[key]) if measured else None
            stderrs |= {} if error is None else {metric + suffix: error}
        for task, found in zip(tasks, per_task):
            problems += [f"ravel: {task.kind}_{task.attribute} has no test pair for {side}{suffix}: no score"
                         for side, number in found[which]["pairs"].items() if not number]
    unstructured: dict = {}
    for task, mask_F, (compatible, corrected) in zip(tasks, masks, per_task):
        unstructured.setdefault(f"{task.kind}_results", {})[f"{task.kind}_{task.attribute}"] = compatible | {
            "unseen_prompts": corrected, "features_in_mask": int((mask_F > 0).sum())}
    return Result({"ravel": {metric: summary[metric] for metric in names}},
                  {metric: value for metric, value in summary.items() if metric not in names}, stderrs, [],
                  unstructured, problems)


SUMS = {side: (side,) for side in SIDES} | {"disentangle_score": SIDES}  # the sides that a score is the mean of


def mean_weights(kinds: list[str]) -> list[float]:
    """The weight of each attribute in the mean over kinds of entity of the mean over attributes."""
    per_kind = Counter(kinds)
    return [1 / len(per_kind) / per_kind[kind] for kind in kinds]


def standard_error(known: list[Known], weights: list[float], found: list[Counted],
                   sides: tuple[str, ...]) -> float | None:
    """Standard error of Σ w · (mean over sides of the share of right pairs), clustered by both entities of a pair."""
    influence, entities = [], []
    for weight, of in zip(weights, found):
        for pairs in (of[side] for side in sides):
            mean = sum(ok for _, ok in pairs) / len(pairs)
            influence += [weight / len(sides) * (ok - mean) / len(pairs) for _, ok in pairs]
            entities += [tuple((known[i].kind, known[i].entity) for i in (pair.base, pair.source)) for pair, _ in pairs]
    return errors.of_sum(torch.tensor(influence, dtype=torch.float64), *zip(*entities))
