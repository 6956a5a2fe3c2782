"""Feature dashboards: the contexts in which some features fire most, and the tokens that their directions promote."""

from __future__ import annotations

from collections.abc import Callable

import torch

from evals import Setup
from evals.common import positions
from evals.model import memory
from evals.storage import network
from evals.texts import packing

ROWS, CONTEXT = 32, 128  # held-out text looked at: 4096 tokens
FEATURES, CONTEXTS, WINDOW, LOGITS = 12, 4, 10, 6


def boards(looked_at: dict[str, tuple[Setup, object]], say: Callable[[str], None]) -> list[dict]:
    """The dashboards of several SAEs {name: (setup, TrainedSAE)}, each with its `sae`; none, said, without text."""
    try:
        return [dict(board, sae=name) for name, asked in looked_at.items() if asked[0].lm.reads_text
                for board in dashboards(*asked)]
    except (packing.TooLittleText, OSError) as error:
        say(f"report: no feature dashboards: {network.first_line(error)}")
        return []


def dashboards(setup: Setup, sae) -> list[dict]:
    """Dashboards of a TrainedSAE: {feature, density, max_activation, contexts [[(token, activation)]], top_logits
    [(token, value)]}.

    The features are spread evenly over the ranks of density among those that fire more than once in 4096 held-out
    tokens.
    """
    def make():
        tokens_RT = packing.pack(setup.texts(), setup.lm.tokenizer, CONTEXT, setup.lm.bos, ROWS)
        x = [memory.residual(setup, part).cpu() for part in tokens_RT.split(8)]
        return dict(tokens=tokens_RT, x=torch.cat(x))

    depends_on = dict(model=setup.lm.digest, layer=setup.layer, texts=setup.texts_digest, rows=ROWS, context=CONTEXT)
    kept = setup.cache.get("dashboards", depends_on, make)
    tokens_RT = kept["tokens"]
    body_RT = positions.within(setup, kept["x"], ~torch.isin(tokens_RT, torch.tensor(sorted(setup.lm.special_ids))))

    def by_rows(work):
        """work(z_rTF, body_rT1) of a few rows of features after the other."""
        def encoded(x_rTD, body_rT):
            return work(sae.encode(x_rTD.to(setup.lm.device)), body_rT.to(setup.lm.device)[..., None])

        return memory.by_rows(setup, "the features of dashboards", encoded, kept["x"], body_RT, most=4)

    fired_F = by_rows(lambda z_rTF, body_rT1: ((z_rTF != 0) & body_rT1).sum((0, 1))[None]).sum(0)
    candidates = (fired_F > 1).nonzero().squeeze(1)
    if not len(candidates):
        return []
    by_density = candidates[fired_F[candidates].argsort(descending=True, stable=True)]
    spread = torch.linspace(0, len(by_density) - 1, min(FEATURES, len(by_density))).round().long()
    chosen = by_density[spread.to(by_density.device)]
    # encoding twice is cheaper than keeping [tokens, F]
    acts_RTC = by_rows(lambda z_rTF, body_rT1: (z_rTF[..., chosen] * body_rT1).cpu())
    logits_CV = promoted(setup.lm, sae.W_dec[chosen])
    read = setup.lm.tokenizer.decode
    found = []
    for c, feature in enumerate(chosen.tolist()):
        acts_RT = acts_RTC[..., c]
        size_RT = acts_RT.abs()  # a feature may fire with either sign
        best_R = size_RT.amax(1).topk(min(CONTEXTS, len(acts_RT)))
        contexts = []
        for row, peak in zip(best_R.indices.tolist(), best_R.values.tolist()):
            if peak > 0:
                at = int(size_RT[row].argmax())
                span = range(max(at - WINDOW, 0), min(at + WINDOW + 1, acts_RT.shape[1]))
                contexts.append([(read([int(tokens_RT[row, t])]), float(acts_RT[row, t])) for t in span])
        best_V = logits_CV[c].topk(min(LOGITS, logits_CV.shape[1]))
        top_logits = [(read([i]), float(v)) for i, v in zip(best_V.indices.tolist(), best_V.values.tolist())]
        strongest = float(acts_RT.flatten()[size_RT.argmax()])
        found.append(dict(feature=feature, density=float(fired_F[feature] / body_RT.sum()), max_activation=strongest,
                          contexts=contexts, top_logits=top_logits))
    return found


def promoted(lm, W_CD: torch.Tensor) -> torch.Tensor:
    """Logits [C, V] that directions of the residual stream promote by themselves; [C, 0] if the head takes no such."""
    if lm.d_final != lm.d_model:
        return W_CD.new_zeros(len(W_CD), 0).cpu()
    return lm.unembed(W_CD.to(lm.dtype)).float().cpu()
