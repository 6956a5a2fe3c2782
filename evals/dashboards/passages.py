"""How an SAE reads a text: of each token the features that fire most. A few passages to look at are built in.

Shapes: T tokens of a text, t of a part of it, D = d_model, F features, C chosen features, K features of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = 96  # of a passage, BOS included: a tokenizer that cuts finer leaves the end out
STRONGEST = 5
AT_ONCE = 128  # tokens of which all features are held

PASSAGES = {
    "encyclopaedia": "The Danube rises in the Black Forest of Germany and flows southeast for about 2,850 kilometres "
                     "before it reaches the Black Sea. It passes through ten countries and four capital cities, "
                     "Vienna, Bratislava, Budapest and Belgrade. In Roman times the river marked the northern border "
                     "of the empire.",
    "dialogue": "“You’re late again,” said Maria, without looking up.\n“The train didn’t move for an hour. I called "
                "you twice!”\n“My phone was off.” She closed the book. “Did you bring the keys?”\n“No,” he admitted. "
                "“I thought you had them.”\nShe laughed, but not because it was funny.",
    "code": "def mean(values, default=None):\n    \"\"\"The average of a list of numbers.\"\"\"\n    total = 0.0\n    "
            "for i, value in enumerate(values):\n        if value is None:\n            continue\n        total += "
            "value\n    return total / len(values) if values else default\n\nprint(mean([1, 2, 3.5]))",
    "review": "I wanted to love this blender, but after three weeks the motor started to smell of burnt plastic. The "
              "customer service was friendly and refunded me within two days, which is why I give it two stars "
              "instead of one. For smoothies it was great while it lasted; for nuts or ice, look elsewhere.",
    "numbers, two languages": "Shopping for 12 June:\n1. flour, 2 kg ($3.20)\n2. eggs, 10 pieces ($2.99)\n"
                              "3. butter ($2.49)\nTotal: $8.68\n\nLiebe Anna, kannst du bitte auch noch Brot "
                              "mitbringen? Der Laden schließt heute um sechs.",
}


def ids_of(lm, text: str, most: int) -> tuple[Tensor, int]:
    """BOS and the tokens of a text, [T] with T ≤ most, and how many of its tokens there was no room for."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([lm.bos, *ids[:most - 1]]), max(0, len(ids) - (most - 1))


def spelled(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False) if ids else []


def residual(lm, layer: int, tokens_T: Tensor, max_norm: float | None = None) -> tuple[Tensor, Tensor]:
    """The residual stream [T, D] after block `layer`, and the mask [T] of the tokens whose features count.

    BOS, other special tokens and those of a norm above max_norm do not: the SAE was trained without them.
    """
    x_TD = lm.residuals(tokens_T[None].to(lm.device), [layer])[layer][0].float()
    counts_T = ~torch.isin(tokens_T, torch.tensor(sorted(lm.special_ids))).to(x_TD.device)
    if max_norm is not None:
        counts_T = counts_T & (x_TD.norm(dim=1) <= max_norm)
    return x_TD, counts_T


def strongest(sae, x_TD: Tensor, counts_T: Tensor, n: int = STRONGEST) -> list[list[list]]:
    """Of each token up to n [feature, activation] that fire, the strongest of either sign first; of equal ones the
    lower number. sae: a TrainedSAE.
    """
    found = []
    for x_tD, counts_t in zip(x_TD.split(AT_ONCE), counts_T.split(AT_ONCE)):
        z_tF = _encoded(sae, x_tD, counts_t)
        index_tK = z_tF.abs().topk(min(n, z_tF.shape[1]), dim=1).indices
        pairs = zip(index_tK.tolist(), z_tF.gather(1, index_tK).tolist())
        found += [sorted(([f, short(a)] for f, a in zip(*of_token) if a), key=lambda pair: (-abs(pair[1]), pair[0]))
                  for of_token in pairs]
    return found


def activations(sae, x_TD: Tensor, counts_T: Tensor, features: list[int]) -> dict[int, list[list]]:
    """{feature: [[place, activation] where it fires]} of some features."""
    index_C = torch.tensor(features, dtype=torch.long, device=x_TD.device)
    parts = zip(x_TD.split(AT_ONCE), counts_T.split(AT_ONCE))
    z_TC = torch.cat([_encoded(sae, x_tD, counts_t)[:, index_C] for x_tD, counts_t in parts])
    return {feature: [[t, short(a)] for t, a in enumerate(z_T) if a] for feature, z_T in zip(features, z_TC.T.tolist())}


def _encoded(sae, x_tD: Tensor, counts_t: Tensor) -> Tensor:
    """Activations [t, F]; 0 where a token does not count, or one is no number."""
    return (sae.encode(x_tD) * counts_t[:, None]).nan_to_num(0.0, 0.0, 0.0)


def short(value: float) -> float:
    """Four digits of it."""
    return float(f"{value:.4g}")


def heard(lm, layer: int, max_norm: float | None = None) -> list[tuple[str, list[str], Tensor, Tensor]]:
    """Of each built-in passage its title, its tokens' texts and what `residual` gives of it, which serves all SAEs of a
    layer. [] where the model reads no text.
    """
    if not lm.reads_text:
        return []
    found = []
    for title, text in PASSAGES.items():
        tokens_T, _ = ids_of(lm, text, TOKENS)
        found.append((title, spelled(lm.tokenizer, tokens_T.tolist()), *residual(lm, layer, tokens_T, max_norm)))
    return found


def of(passages: list[tuple[str, list[str], Tensor, Tensor]], run_sae, baseline_sae=None) -> list[dict]:
    """`passages` of a board (evals/dashboards): those that were `heard` as run and baseline read them.

    Both SAEs lie on the model's device.
    """
    found = []
    for title, tokens, x_TD, counts_T in passages:
        theirs = None if baseline_sae is None else strongest(baseline_sae, x_TD, counts_T)
        found.append({"title": title, "tokens": tokens, "run": strongest(run_sae, x_TD, counts_T), "baseline": theirs})
    return found
