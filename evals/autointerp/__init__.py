"""Automated interpretability (SAEBench 0.6.0, `autointerp`): can a judge say what a latent responds to, and foresee
where it fires?

Per latent the judge, a language model, explains 15 windows of text in which the latent fires (tokens above 1 % of its
maximum marked), then says by that explanation in which of 14 unmarked windows it fires: 2 of the strongest, 2 drawn in
proportion to the squared activation, 10 at random. Score: share of the 14 it gets right; mean over latents, which are a
random sample.

The random numbers differ from SAEBench, whose one stream depends on the order in which a judge's threads answer: each
latent has generators of its own. Activations are fp32 (SAEBench: bf16). A latent that fires in fewer places below its
strongest windows than are drawn gets random windows for the rest (SAEBench: arbitrary silent ones). The prompts are our
own. EOS stays between documents for every tokenizer, masked like BOS and padding (SAEBench drops all padding tokens,
with them EOS and BOS where they are the same token, as in GPT-2's and Pythia's tokenizers: documents then touch).
Corrected, beside the compatible score, which takes random windows for silent and leaves unusable predictions out:
  autointerp_score_checked    random windows labelled by what fires in them; predictions in another form than asked for
                              (JSON, "Answer: 2-4", "none of them") are read too; an unusable one has nothing right
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from functools import partial

import torch

from evals import Result
from evals.autointerp import judge
from evals.autointerp.windows import Case, Window, cases_of
from evals.common import errors, probes

EVAL_TYPE_ID = "autointerp"
MASKED = True

METRICS = {
    "autointerp_score": "higher",
    "autointerp_std_dev": "",
    "autointerp_score_checked": "higher",
    "autointerp_latents": "",  # that got an answer
    "autointerp_unparsable_share": "",  # of the predictions: those that autointerp_score leaves out
    "autointerp_failed_requests": "",
    "autointerp_random_windows_active": "",  # share of the windows that the compatible score takes for silent
}

RANGES = {
    "dead_latent_threshold": (0, 1_000_000_000),
    "act_threshold_frac": (0.0, 1.0),
    "request_timeout": (0.1, 86400.0),
}

CONFIG = {
    "gemma": {
        "dataset_name": "monology/pile-uncopyrighted",
        "total_tokens": 2_000_000,
        "llm_context_size": 128,
        "llm_batch_size": 32,
        "n_latents": 1000,
        "dead_latent_threshold": 15,  # firings in total_tokens
        "buffer": 10,  # tokens of a window on either side of its centre
        "act_threshold_frac": 0.01,  # of the maximum: above it a token is active
        "n_top_ex_for_generation": 10,
        "n_iw_sampled_ex_for_generation": 5,
        "n_top_ex_for_scoring": 2,
        "n_random_ex_for_scoring": 10,
        "n_iw_sampled_ex_for_scoring": 2,
        "max_tokens_in_explanation": 30,
        "max_concurrent": 10,  # requests
        "request_timeout": 60,  # seconds
        "request_tries": 6,
    },
    "embedded": {
        "dataset_name": "held-out",
        "total_tokens": 100_000,
        "llm_context_size": 128,
        "llm_batch_size": 16,
        "n_latents": 100,
        "dead_latent_threshold": 15,
        "buffer": 10,
        "act_threshold_frac": 0.01,
        "n_top_ex_for_generation": 10,
        "n_iw_sampled_ex_for_generation": 5,
        "n_top_ex_for_scoring": 2,
        "n_random_ex_for_scoring": 10,
        "n_iw_sampled_ex_for_scoring": 2,
        "max_tokens_in_explanation": 30,
        "max_concurrent": 10,
        "request_timeout": 60,
        "request_tries": 6,
    },
    "tiny": {
        "dataset_name": "held-out",
        "total_tokens": 5_000,
        "llm_context_size": 32,
        "llm_batch_size": 16,
        "n_latents": 6,
        "dead_latent_threshold": 15,
        "buffer": 5,
        "act_threshold_frac": 0.01,
        "n_top_ex_for_generation": 10,
        "n_iw_sampled_ex_for_generation": 5,
        "n_top_ex_for_scoring": 2,
        "n_random_ex_for_scoring": 10,
        "n_iw_sampled_ex_for_scoring": 2,
        "max_tokens_in_explanation": 30,
        "max_concurrent": 4,
        "request_timeout": 60,
        "request_tries": 6,
    },
}

# without the judge's own time, two answers a latent, max_concurrent at once; without a judge the eval is skipped
# gemma: 2,000,000 tokens to the layer (774); of an SAE the same encoded (3 s of an H200) and windows of 1,000 latents
# embedded: windows alone 2.5, with what asking takes of the CPU 28 s
COST = {"gemma": (800, 500), "embedded": (28, 8), "tiny": (8, 2)}
COST_BY = (("total_tokens",),)

NOTE = ("autointerp_score takes random windows for silent even where the latent fires in them "
        "(autointerp_score_checked looks); a judge that always answers \"None\" gets 10 of 14 right, .714. Scores of "
        "different judges do not compare.")

SKIPPED = ("skipped, no autointerp_score: set OPENAI_API_KEY (and OPENAI_BASE_URL for another endpoint than OpenAI's, "
           f"AUTOINTERP_MODEL for another model than {judge.DEFAULT_MODEL})")


def repositories(config: dict, source) -> list[str]:
    """The hub data sets it reads; none where it will be skipped."""
    return [] if config["dataset_name"] == "held-out" or judge.endpoint() is None else [config["dataset_name"]]


def held_out(config: dict) -> tuple[int, int]:
    """Tokens of held-out text: the fewest it can do with, and what it asks for."""
    if config["dataset_name"] != "held-out" or judge.endpoint() is None:
        return 0, 0
    return config["llm_context_size"], config["total_tokens"]


def outside() -> list[str]:
    """Address and model of the judge; [] while there is none: a skipped result is made again once there is one."""
    at = judge.endpoint()
    return [at.base_url, at.model] if at else []


def read_ahead(source, config: dict, seed: int) -> None:
    """Read the first of the texts, which are kept: what is wrong with them shows before anything is trained."""
    from evals.texts import streams

    for name in repositories(config, source):
        streams.look(name, cache_dir=source.cache_dir)


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings; to be skipped for want of a judge is none."""
    problems = []
    try:
        judge.endpoint()
    except ValueError as error:
        problems.append(f"autointerp: {error}")
    counts = [key for key in config if key.startswith("n_")]
    counts += ["buffer", "total_tokens", "max_concurrent", "request_tries"]
    problems += [f"autointerp: {key} = {config[key]!r}\nset it to a whole number, 1 or more"
                 for key in counts if not isinstance(config[key], int) or config[key] < 1]
    if config["llm_context_size"] <= 2 * config["buffer"]:
        problems.append(f"autointerp: a row of {config['llm_context_size']} tokens has no window with "
                        f"{config['buffer']} tokens on either side\nset llm_context_size above 2 * buffer")
    return problems


@torch.no_grad()
def run(setup, saes: dict) -> dict[str, Result]:
    """Judge every SAE; {SAE name: Result}. PermissionError, ValueError or ConnectionError if the judge is of no use."""
    at, config = judge.endpoint(), setup.config
    if at is None:
        setup.say(f"autointerp: {SKIPPED}")
        return {name: _result(config, [], [SKIPPED], []) for name in saes}
    cases, problems = cases_of(setup, saes)
    with judge.Judge(at, setup.cache.folder / "judge", config["request_timeout"], config["request_tries"],
                     config["max_concurrent"], say=lambda line: setup.say(f"autointerp: {line}")) as asked:
        verdicts = _verdicts(setup, asked, cases)
    details = [{"judge_model": at.model, "judge_base_url": at.base_url}]
    return {name: _result(config, verdicts[name], problems[name], details) for name in saes}


# ---------------------------------------------------------------------------------------------- what the judge is asked

UNIT = "Inside a neural network there is a unit that is active on some word, part of a word, phrase or subject. "

EXPLAIN = UNIT + (
    "You get short passages of text in which it is active, the strongest first; what it is active on is enclosed in << "
    "and >>. Say in one sentence of at most 20 words what the unit is active on. Describe what most of the marked "
    "places have in common and be no narrower than they are: some units want one exact word or spelling, others almost "
    "any word of a passage about some subject. Mention capital letters and punctuation only where they matter. Use no "
    "formatting and no long list of words. Four examples of good answers: \"This unit activates on the word 'river' in "
    "names of places\", \"This unit activates on verbs of motion in the past tense\", \"This unit activates on the "
    "letters 'qu' inside a word\", \"This unit activates on text about court decisions\".")

FORESEE = UNIT + (
    "You get a short description of what it is active on and {number} numbered passages of text. Decide for each "
    "passage whether the unit would be active on at least one word or part of a word in it, and take the description "
    "in a wide rather than a narrow sense. Answer only with the numbers of those passages, separated by commas, for "
    "example \"{example}\", or with the word \"None\" if there is no such passage. Write nothing else.")


def explaining(case: Case) -> list[dict]:
    """The chat that asks for an explanation."""
    return [{"role": "system", "content": EXPLAIN},
            {"role": "user", "content": f"The passages:\n\n{passages(case.generation, case.threshold)}"}]


def foreseeing(case: Case, explanation: str, seed: int) -> list[dict]:
    """The chat that asks in which windows the latent fires; `seed` draws the numbers that show an answer's form."""
    n, n_fixed = len(case.scoring), sum(not w.random for w in case.scoring)
    drawn = torch.randperm(n, generator=probes.generator(seed, "autointerp", "example", case.latent))[:n_fixed] + 1
    example = ", ".join(map(str, drawn.sort().values.tolist()))
    asked = f"The unit activates on {explanation}.\n\nThe passages:\n\n{passages(case.scoring)}"
    return [{"role": "system", "content": FORESEE.format(number=n, example=example)},
            {"role": "user", "content": asked}]


def passages(windows: list[Window], threshold: float = math.inf) -> str:
    """Numbered lines of text with the tokens above the threshold in << >>."""
    lines = []
    for n, window in enumerate(windows, 1):
        marked = [f"<<{token}>>" if act > threshold else token for token, act in zip(window.tokens, window.acts)]
        lines.append(f"{n}. " + "".join(marked).replace("\ufffd", "").replace("\n", "↵"))
    return "\n".join(lines)


FENCED = re.compile(r"```\w*\n?(.*?)(?:```|$)", re.DOTALL)
ITEM = r"[0-9]{1,4}(?:\s*(?:-|–|—|to|through)\s*[0-9]{1,4})?"
LIST = rf"{ITEM}(?:(?:\s*[,;&/]\s*(?:and\s+)?|\s+and\s+|\s+){ITEM})*"
LABEL = (r"(?:[a-z' ]*\b(?:passages?|numbers?|indices|index|answer|examples?|active (?:on|in))"
         r"(?: (?:is|are|would be))?\s*:?\s*)?")
NONE = re.compile(r"(?:none|no (?:such )?passages?)\b[^0-9]*", re.IGNORECASE)
ALL = re.compile(r"all(?: of)?(?: (?:them|these|the))?(?: ([0-9]+))?(?: numbered)?(?: passages?)?\s*\.?", re.IGNORECASE)
LISTED = re.compile(rf"{LABEL}({LIST})\s*\.?", re.IGNORECASE)
# a single number with text behind it may be the passage of that number, written out again
SEVERAL = rf"{ITEM}(?:\s*,\s*(?:and\s+)?|\s+and\s+){LIST}"
EXPLAINED = re.compile(
    rf"{LABEL}({SEVERAL})\s*[.:(–—-][^0-9].*|{LABEL}({LIST}),?\s+(?:because|since)\b.*", re.IGNORECASE)


def unwrapped(answer: str) -> str:
    """An answer without the code fence or the bold type that it begins with."""
    found = FENCED.match(answer.strip())
    text = found.group(1).strip() if found else answer.strip()
    return re.sub(r"^\*\*(.+?)\*\*", r"\1", text)


def explanation_in(answer: str) -> str:
    """What follows the last "activates on"; out of JSON, bold type or behind a label, too."""
    text = unwrapped(answer)
    in_json = re.fullmatch(r"\{\s*\"\w+\"\s*:\s*\"(.*?)\"?\s*\}?", text, re.DOTALL)  # its end may be cut off
    if in_json:
        text = in_json.group(1)
    text = re.sub(r"^(?:explanation|answer|summary)\s*:\s*", "", text, flags=re.IGNORECASE)
    return text.split("activates on")[-1].rstrip(".").strip()


def numbers_in(answer: str) -> list[int] | None:
    """The numbers of an answer, [] for "None", or None if it is no list of numbers: SAEBench's reading of it."""
    parts = [part.strip() for part in answer.strip().rstrip(".").replace("and", ",").replace("None", "").split(",")]
    parts = [part for part in parts if part]
    return [int(part) for part in parts] if all(part.isdecimal() and len(part) < 9 for part in parts) else None


def windows_in(answer: str, number: int) -> list[int] | None:
    """The windows, 1 to `number`, that an answer names in whatever form; None if that is not certain."""
    strict = numbers_in(answer)
    if strict is not None:
        return strict
    text = unwrapped(answer)
    found = _in_json(text, number)
    if found is not None:
        return found
    text = re.sub(r"\\boxed\{([^}]*)\}", r"\1", text)
    labels = list(re.finditer(r"\banswers?\b(?: is| are)?\W*:", text, re.IGNORECASE))
    text = text[labels[-1].end() :] if labels else text
    lines = [re.sub(r"^(?:[-•]\s+)?|[*`\"“”$\[\]]", "", line).strip() for line in text.splitlines()]
    read = [_in_line(line, number) for line in lines if line]
    if not read:
        return None
    if None not in read:
        return sorted({n for line in read for n in line})
    first, last = read[0], read[-1]  # an explanation stands behind the answer or before it
    if first is not None and last is not None:
        return first if first == last else None
    return last if first is None else first


def _in_json(text: str, number: int) -> list[int] | None:
    """The one list in an answer that is JSON, if it has nothing but windows' numbers."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list) or not all(map(_is_whole, value)):
        return None
    return _within(sorted({int(n) for n in value}), number)


def _is_whole(value) -> bool:
    """Whether a part of JSON is a whole number, or writes one in digits."""
    if isinstance(value, str):
        return value.isdecimal()
    return type(value) is int  # True is none


def _in_line(line: str, number: int) -> list[int] | None:
    """The windows that a line is about, if it is about nothing else."""
    if NONE.fullmatch(line):
        return []
    found = ALL.fullmatch(line)
    if found:
        return list(range(1, number + 1)) if found.group(1) in (None, str(number)) else None
    found = LISTED.fullmatch(line) or EXPLAINED.fullmatch(line)
    if not found:
        return None
    windows = set()
    for item in re.findall(ITEM, next(group for group in found.groups() if group)):
        ends = [int(n) for n in re.findall("[0-9]+", item)]
        if ends[0] > ends[-1]:
            return None
        windows.update(range(ends[0], min(ends[-1], number + 1) + 1), ends)
    return _within(sorted(windows), number)


def _within(windows: list[int], number: int) -> list[int] | None:
    return windows if all(1 <= n <= number for n in windows) else None


FIRST = 3  # latents by which a judge shows whether it can be used at all


def _verdicts(setup, asked: judge.Judge, cases: dict[str, list[Case]]) -> dict[str, list[dict]]:
    """What the judge says to each case, {"explanation", "answer"} or {"failed": reason}, in the order of the cases.

    Says beforehand how many requests are still to be paid for. If none of the first latents gets a usable answer, no
    more are paid for: ConnectionError or ValueError.
    """
    n_scored = sum(n for key, n in setup.config.items() if key.endswith("_for_scoring"))
    first = partial(asked.ask, max_tokens=setup.config["max_tokens_in_explanation"])
    second = partial(asked.ask, max_tokens=2 * n_scored + 5)  # a number and a comma are a token each

    def verdict(case: Case) -> dict:
        try:
            explanation = explanation_in(first(explaining(case)))
            return {"case": case, "explanation": explanation,
                    "answer": second(foreseeing(case, explanation, setup.seed))}
        except judge.Unanswered as reason:
            return {"case": case, "failed": str(reason), "advice": reason.advice}

    def outstanding(case: Case) -> list[tuple[list[dict], int]]:
        """The requests that were not answered before, each with its limit."""
        explanation = asked.known(explaining(case), **first.keywords)
        chat = foreseeing(case, explanation_in(explanation or ""), setup.seed)
        prediction = (chat, second.keywords["max_tokens"])
        if explanation is None:
            return [(explaining(case), first.keywords["max_tokens"]), prediction]
        return [prediction] if asked.known(chat, **second.keywords) is None else []

    def forget(verdicts: list[dict]) -> None:
        """Ask again once the server or its model is mended under the same name."""
        for v in verdicts:
            asked.forget(explaining(v["case"]), **first.keywords)
            if "answer" in v:
                asked.forget(foreseeing(v["case"], v["explanation"], setup.seed), **second.keywords)

    def answers() -> Iterator[tuple]:
        """(item, verdict) of every item, of the first ones by themselves."""
        verdicts, later = [], unpaid[len(tried) :]
        for item, found in asked.each(ask, tried):
            verdicts.append(found)
            yield item, found
        decisive = later or len(tried) == len(items)
        if verdicts and decisive and not any(_usable(v) for v in verdicts):
            forget(verdicts)
            raise _useless(asked.where, verdicts)
        if later and asked.form.room:
            setup.say(f"autointerp: {asked.forecast(requests_of(later))}")
        yield from asked.each(ask, [item for item in items if item not in tried])

    def requests_of(items: list[tuple]) -> list[tuple[list[dict], int]]:
        return [request for item in items for request in missing[item]]

    def ask(item: tuple[str, int]) -> dict:
        name, k = item
        return verdict(cases[name][k])

    items = [(name, k) for name, of_sae in cases.items() for k in range(len(of_sae))]
    missing = {(name, k): outstanding(cases[name][k]) for name, k in items}
    unpaid = [item for item in items if missing[item]]
    tried = unpaid[:FIRST]
    setup.say(f"autointerp: {asked.forecast(requests_of(unpaid))}")
    done = dict(setup.track(answers(), "autointerp: judge", len(items), "latents"))
    setup.say(f"autointerp: {asked.spent()}")
    return {name: [done[name, k] for k in range(len(of_sae))] for name, of_sae in cases.items()}


def _usable(verdict: dict) -> bool:
    return bool(verdict.get("explanation")) and windows_in(verdict["answer"], len(verdict["case"].scoring)) is not None


def _useless(judge_at: str, verdicts: list[dict]) -> Exception:
    """The error for a judge of whose first verdicts none can be used."""
    answered = [v for v in verdicts if "failed" not in v]
    if not answered:
        return ConnectionError(f"{judge_at} has an answer for none of the first {len(verdicts)} latents: "
                               f"{verdicts[0]['failed']}\n{verdicts[0]['advice']}")
    answer = answered[0]["answer"] if answered[0]["explanation"] else "(an empty explanation)"
    words = " ".join(answer.split())
    return ValueError(f"{judge_at} answers none of the first {len(verdicts)} latents in a form that can be read: "
                      f"{words[:120]!r}, where numbers of passages like \"2, 5\" or \"None\" are asked for\n"
                      "set AUTOINTERP_MODEL to a model that follows instructions, or mend its chat template on the "
                      "server; nothing more was sent")


# ------------------------------------------------------------------------------------------------ scores


def _result(config: dict, verdicts: list[dict], problems: list[str], details: list[dict]) -> Result:
    """The Result of one SAE."""
    failures = [v["failed"] for v in verdicts if "failed" in v]
    scored = [_scored(v["case"], v["explanation"], v["answer"]) for v in verdicts if "failed" not in v]
    compatible = [s["score"] for s in scored if s["score"] is not None]
    checked = [s["score_checked"] for s in scored]
    unparsable, unusable = len(scored) - len(compatible), sum(s["predictions checked"] is None for s in scored)
    if failures:
        most = sorted(set(failures), key=lambda reason: (-failures.count(reason), reason))
        counted = [f"{failures.count(reason)} × {reason}" for reason in most[:3]]
        reasons = ", ".join([*counted, *["…" for _ in most[3:4]]])
        problems = [*problems, f"no answer to {len(failures)} requests ({reasons}): {len(failures)} of {len(verdicts)} "
                               "latents are not scored"]
    if unparsable:
        problem = f"{unparsable} of {len(scored)} predictions are no list of numbers: not in autointerp_score"
        if not compatible:
            problem += ", which has no value"
        if unusable < unparsable:  # the rest has nothing right in it
            problem += f"; {unparsable - unusable} of them are read all the same for autointerp_score_checked"
        else:
            problem += ", nothing right in autointerp_score_checked"
        problems = [*problems, problem]
    active = [s["random windows active"] / config["n_random_ex_for_scoring"] for s in scored]
    errors_of = {"autointerp_score": compatible, "autointerp_score_checked": checked}
    return Result(
        metrics={"autointerp": {"autointerp_score": _mean(compatible), "autointerp_std_dev": _deviation(compatible)}},
        corrected={
            "autointerp_score_checked": _mean(checked),
            "autointerp_latents": len(scored) if verdicts else None,
            "autointerp_unparsable_share": unparsable / len(scored) if scored else None,
            "autointerp_failed_requests": len(failures) if verdicts else None,
            "autointerp_random_windows_active": _mean(active),
        },
        stderrs={name: _deviation(values) / math.sqrt(len(values))  # over latents
                 for name, values in errors_of.items() if errors.enough([1.0] * len(values))},
        details=details,
        unstructured={str(s["latent"]): s for s in scored},
        problems=problems,
    )


def _scored(case: Case, explanation: str, answer: str) -> dict:
    """One latent in SAEBench's terms; windows are numbered from 1."""
    predictions, checked = numbers_in(answer), windows_in(answer, len(case.scoring))
    fires = [max(w.acts) > case.threshold for w in case.scoring]
    taken = [active and not w.random for active, w in zip(fires, case.scoring)]
    return {
        "latent": case.latent,
        "explanation": explanation,
        "predictions": predictions,
        "predictions checked": checked,
        "correct seqs": [n for n, active in enumerate(taken, 1) if active],
        "score": None if predictions is None else share_right(predictions, taken),
        "correct seqs checked": [n for n, active in enumerate(fires, 1) if active],
        "score_checked": 0.0 if checked is None else share_right(checked, fires),
        "random windows active": sum(fires) - sum(taken),
        "logs": "\n\n".join([passages(case.generation, case.threshold), explanation,
                             passages(case.scoring, case.threshold), answer]),
    }


def share_right(predictions: list[int], active: list[bool]) -> float:
    """Share of windows, numbered from 1, that are predicted to be what they are."""
    return sum((n in predictions) == is_active for n, is_active in enumerate(active, 1)) / len(active)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
