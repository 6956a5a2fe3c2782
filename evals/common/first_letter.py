"""The first-letter task (SAEBench 0.6.0, `absorption`): words, prompts, the LM's activations at the words, probes for
26 letters.

A prompt is a newline and lines "<word> has the first letter: X", `max_icl_examples` of them with words drawn from the
same split, then the word itself. What would follow the word is left out: causal attention does not see it. A word is an
entry of the vocabulary that is ASCII letters after at most one leading space, and that the tokenizer gives as one token
after a newline (SAEBench would read the last piece of the others). With words_per_prompt = 1 this is the protocol; with
more, that many words follow the examples, each read at its place and then an example for the next; with 30 this costs
the LM an eighth, and every word has at least `max_icl_examples` examples.

Random numbers come from the run's seed (SAEBench ignores its own): one stream for the split and the prompts, one for
each probe.

Shapes: N words, L = 26 letters, D = d_model, F inputs of a probe, b rows of a batch, T positions.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from evals.common import layers, probes
from evals.model import memory
from evals.storage.identity import code_digest

LETTERS = string.ascii_lowercase
TRAIN_SHARE = 0.8
SETTINGS = ("max_words", "max_icl_examples", "words_per_prompt", "llm_batch_size", "min_GT_probe_f1",
            "min_feats_for_eval")


class NoScore(Exception):
    """Why there is no score, with the figure."""


# ------------------------------------------------------------------------------------------------ words and prompts


class Word(NamedTuple):
    """A word with the tokens of its line: `head` is the newline and the word, `tail` all that follows."""

    text: str
    letter: int
    head: list[int]
    tail: list[int]


def vocabulary(tokenizer) -> list[Word]:
    """All words of a tokenizer, by token id; NoScore if a prompt's tokens are not those of its lines in order."""
    texts = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = tokenizer.convert_tokens_to_string([token])
        # some sentencepiece decoders drop the space of a first token
        if token.startswith("▁") and not text.startswith(" "):
            text = " " + text
        if re.fullmatch(" ?[A-Za-z]+", text):
            texts[number] = text
    lines = [f"\n{text} has the first letter: {text.strip()[0].upper()}" for text in texts.values()]
    newline, *tokens = tokenizer(["\n", *lines], add_special_tokens=False)["input_ids"]
    cut = len(newline) + 1
    words = [Word(text, LETTERS.index(text.strip()[0].lower()), ids[:cut], ids[cut:])
             for (number, text), ids in zip(texts.items(), tokens) if ids[:cut] == [*newline, number]]

    sample = range(0, len(lines), max(1, len(lines) // 100))
    together = tokenizer("".join(lines[i] for i in sample), add_special_tokens=False)["input_ids"]
    if together != [token for i in sample for token in tokens[i]]:
        raise NoScore("the tokenizer gives the lines of a prompt other tokens than each line alone")
    return words


def prompts(words: list[Word], pool: list[Word], examples: int, together: int, bos: int,
            rng) -> list[tuple[list[int], list[int]]]:
    """(tokens, places of the words in them) for `together` words at a time, after `examples` others drawn from `pool`.

    NoScore if the pool has too few words.
    """
    if len(pool) < examples + together:
        raise NoScore(f"the vocabulary gives only {len(pool)} words for prompts of {examples} + {together}")
    made = []
    for start in range(0, len(words), together):
        group = words[start:start + together]
        shown = [word for word in rng.sample(pool, examples + len(group)) if word not in group][:examples]
        tokens, places = [bos], []
        for word in shown:
            tokens += word.head + word.tail
        for word in group:
            tokens += word.head
            places.append(len(tokens) - 1)
            tokens += word.tail
        made.append((tokens[:places[-1] + 1], places))
    return made


def at_words(setup, prompted: list[tuple[list[int], list[int]]], label: str, wanted: list[int]) -> dict[int, Tensor]:
    """The residual stream at the layers `wanted` at every word of the prompts, in order: {layer: x_ND}, on the CPU.

    In the LM's dtype.
    """
    size, found = setup.config["llm_batch_size"], {layer: [] for layer in wanted}
    size *= memory.batches_at_once(setup, size * max(len(tokens) for tokens, _ in prompted))
    batches = range(0, len(prompted), size)
    for start in setup.track(batches, f"absorption: {label}", len(batches), "batches"):
        rows = prompted[start:start + size]
        # padded on the right, which no word sees
        tokens_bT = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True,
                                 padding_value=setup.lm.bos)
        row = [i for i, (_, places) in enumerate(rows) for _ in places]
        column = [place for _, places in rows for place in places]
        for layer, x_bTD in memory.residual_of(setup, tokens_bT, wanted).items():
            found[layer].append(x_bTD[row, column].cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


# ------------------------------------------------------------------------------------------------ probes


@probes.one_thread()
@torch.enable_grad()
def fit_letters(rows_of: Callable[[Tensor], Tensor], letter_N: Tensor, width: int, batch: int, epochs: int, l1: float,
                weight_decay: float, rng: torch.Generator, device) -> tuple[Tensor, Tensor]:
    """26 linear probes at once, a letter against the rest: (W_LF, b_L); `rows_of`: row numbers -> inputs [b, F].

    Cross entropy with a positive's weight = negatives / positives, plus l1 · mean over letters of Σ|w|; Adam, 1e-2
    falling exponentially to 1e-5 over the epochs. `rng` gives nn.Linear's initialisation, then what a DataLoader draws
    per epoch: a number it has no use for here and the seed of the order, so that an equal seed repeats SAEBench's
    probe.
    """
    W_LF = torch.nn.init.kaiming_uniform_(torch.empty(len(LETTERS), width), a=math.sqrt(5), generator=rng)
    b_L = torch.empty(len(LETTERS)).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=rng)
    W_LF, b_L = (t.to(device).requires_grad_() for t in (W_LF, b_L))
    target_NL = functional.one_hot(letter_N, len(LETTERS)).float().to(device)
    positives_L = target_NL.sum(0).clamp_min(1)  # a small vocabulary may lack a letter
    weight_L = (len(target_NL) - positives_L) / positives_L
    optimiser = torch.optim.Adam([W_LF, b_L], weight_decay=weight_decay, fused=True)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1e-5 / 1e-2) ** (epoch / epochs)
        _, seed = (torch.empty((), dtype=torch.int64).random_(generator=rng).item() for _ in range(2))
        order_N = torch.randperm(len(letter_N), generator=torch.Generator().manual_seed(seed)).to(device)
        for index_b in order_N.split(batch):
            x_bF, target_bL = rows_of(index_b), target_NL[index_b]
            if W_LF.is_cuda:
                W_LF.grad, b_L.grad = probes.gradients(x_bF, target_bL, W_LF.detach(), b_L.detach(), weight_L)
                if l1:
                    W_LF.grad.add_(W_LF.detach().sign(), alpha=l1 / len(LETTERS))
            else:
                logit_bL = functional.linear(x_bF, W_LF, b_L)
                loss = functional.binary_cross_entropy_with_logits(logit_bL, target_bL, pos_weight=weight_L)
                optimiser.zero_grad()
                (loss + l1 * W_LF.abs().sum(1).mean()).backward()
            optimiser.step()
    return W_LF.detach(), b_L.detach()


def f1(predicted: Tensor, true: Tensor) -> Tensor:
    """F1 of boolean predictions along the first axis; 0 where nothing is predicted or true."""
    both, either = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
    return 2 * both.double() / either.clamp_min(1)


# ------------------------------------------------------------------------------------------------ what the LM gives


def measured(setup) -> dict[str, Tensor]:
    """What no SAE enters, from the cache or made now. NoScore if the tokenizer does not support the protocol.

    train_x, test_x [N, D] with train_letter, test_letter [N]; probe_LD; f1_L on the test words; second_x [N, D] with
    second_letter [N]: test words of letters with an F1 above min_GT_probe_f1 that their letter's probe finds, in new
    prompts (none if there are fewer such letters than min_feats_for_eval).
    """
    def depends_on(layer: int) -> dict:
        return {"lm": setup.lm.digest, "layer": layer, "settings": {key: setup.config[key] for key in SETTINGS},
                "seed": setup.seed, "torch": torch.__version__, "device": torch.device(setup.lm.device).type,
                "code": [code_digest(file) for file in (__file__, probes.__file__)]}

    most_words = setup.config["max_words"] or len(setup.lm.tokenizer.get_vocab())
    return layers.shared(setup, "first_letter", depends_on, 8 * most_words * setup.lm.d_model,
                         lambda wanted: _measure(setup, wanted))


def _measure(setup, wanted: list[int]) -> dict[int, dict[str, Tensor]]:
    """What `measured` gives for each of the layers `wanted`: the words pass the LM once, those found once a layer."""
    config = setup.config
    rng = random.Random(f"first letter {setup.seed}")
    words = vocabulary(setup.lm.tokenizer)
    chosen = rng.sample(words, min(config["max_words"] or len(words), len(words)))
    cut = int(TRAIN_SHARE * len(chosen))
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in wanted}
    for side, split in (("train", chosen[:cut]), ("test", chosen[cut:])):
        prompted = prompts(split, split, config["max_icl_examples"], config["words_per_prompt"], setup.lm.bos, rng)
        for layer, x_ND in at_words(setup, prompted, f"{side} words", wanted).items():
            found[layer] |= {f"{side}_x": x_ND, f"{side}_letter": torch.tensor([word.letter for word in split])}
    for layer, of in found.items():
        drawn = random.Random()
        drawn.setstate(rng.getstate())  # each layer goes on as if it were alone
        _add_found(setup, layer, of, words, chosen[cut:], drawn)
    return found


def _add_found(setup, layer: int, found: dict[str, Tensor], words: list[Word], test: list[Word], rng) -> None:
    """Fit the probe of a layer and add what it finds to what is known of the layer's words."""
    config, device = setup.config, setup.lm.device
    x_ND = found["train_x"].to(device).float()
    W_LD, b_L = fit_letters(x_ND.__getitem__, found["train_letter"], x_ND.shape[1], batch=64, epochs=50, l1=0.0,
                            weight_decay=1e-4, rng=probes.generator(setup.seed, "first letter", "probe"), device=device)
    positive_NL = torch.cat([functional.linear(x.to(device).float(), W_LD, b_L) > 0
                             for x in found["test_x"].split(4096)]).cpu()
    found["probe_LD"] = W_LD.cpu()
    found["f1_L"] = f1(positive_NL, functional.one_hot(found["test_letter"], len(LETTERS)).bool())

    good_L = found["f1_L"] > config["min_GT_probe_f1"]
    second = [word for word, positive_L in zip(test, positive_NL) if positive_L[word.letter] and good_L[word.letter]]
    if good_L.sum() < config["min_feats_for_eval"]:
        second = []
    found["second_letter"] = torch.tensor([word.letter for word in second], dtype=torch.int64)
    found["second_x"] = x_ND[:0].cpu()
    if second:
        prompted = prompts(second, words, config["max_icl_examples"], config["words_per_prompt"], setup.lm.bos, rng)
        found["second_x"] = at_words(setup, prompted, "words found, in new prompts", [layer])[layer]
