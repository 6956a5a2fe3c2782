"""A board as evals/dashboards describes it, made by hand: small, and if asked of texts that harm a careless page."""

from __future__ import annotations

import random

HARMFUL = ("<script>document.title='harmed'</script>", "<img src=x onerror=\"document.title='harmed'\">",
           "</script><b>", "\" onmouseover=\"document.title='harmed'", "javascript:document.title='harmed'",
           "&lt;&amp;", "]]>", "<!--", "\u202egnol", "\u2028", "\u0000", "'); document.title='harmed'; ('",
           "${document.title='harmed'}", "__proto__")
PLAIN = (" the", " cat", " sat", " on", " mats", ".", "\n", " in", " Paris", " and", " then", " slept", " 42", " é",
         "中")


def board(sae: str = "layer_9", features: int = 40, boards: int = 12, hostile: bool = False, baseline: bool = True,
          text: bool = True) -> dict:
    """A board of so many features, of which `boards` have a dashboard."""
    draw, vocab = random.Random(0), list(HARMFUL if hostile else PLAIN)
    name = HARMFUL[0] if hostile else "topk"
    density = [round(10 ** draw.uniform(-4, -0.5), 5) if draw.random() > 0.1 else 0.0 for _ in range(features)]
    largest = [round(draw.uniform(2, 30), 3) if share else 0.0 for share in density]

    def context(top: float, row: int) -> dict:
        tokens = [draw.randrange(len(vocab)) for _ in range(21)]
        return {"tokens": tokens, "values": [[9, round(top / 2, 3)], [10, top]], "peak": 10, "row": row,
                "cut": [row % 2 == 0, True]}

    def histogram(low: float, high: float) -> dict:
        edges = [round(low + (high - low) * i / 50, 4) for i in range(51)]
        return {"edges": edges, "counts": [draw.randrange(100) for _ in range(50)]}

    def words(sign: int) -> list:
        return [[vocab[i % len(vocab)], round(sign * (3 - i * 0.2), 3)] for i in range(10)]

    def dashboard(feature: int, of_run: bool) -> dict:
        top = largest[feature] or 1.0
        groups = [{"name": "top", "from": top, "to": top, "contexts": [context(top, row) for row in range(20)]}]
        for number in (range(10, 0, -1) if of_run else ()):
            low, high = top * (number - 1) / 10, top * number / 10
            within = round((low + high) / 2, 3)
            groups.append({"name": f"interval {number}", "from": low, "to": high,
                           "contexts": [context(within, row) for row in range(5)]})
        why = [draw.choice(["densest", "rarest", "random", "best probe", "new", "absorbed letter", "explained"])]
        own = [[(feature + n) % features, round(0.9 - n / 10, 3)] for n in range(1, 6)]
        theirs = [[(feature + n) % features, round(0.8 - n / 10, 3)] for n in range(3)]
        return {"why": why if of_run else [], "density": density[feature], "max": largest[feature], "groups": groups,
                "histogram": histogram(0, top), "logits": {"top": words(1), "bottom": words(-1), **histogram(-3, 3)},
                "own": own if of_run else [], "theirs": theirs if of_run and baseline else [],
                "cofiring": [[(feature + n) % features, round(0.5 / n, 3)] for n in range(1, 6)] if of_run else [],
                "classes": [f"{name}: math"] if of_run and feature % 3 == 0 else [],
                "letters": ["s"] if of_run and feature % 5 == 0 else [],
                "explanation": f"{name} words about cats" if of_run and feature % 4 == 0 else None,
                "score": 0.81 if of_run and feature % 4 == 0 else None}

    chosen = [feature for feature in range(features) if density[feature]][:boards] if text else []
    nearest = [(feature + 1) % features for feature in range(features)]
    cosine = [round(draw.uniform(0.1, 1), 4) for _ in range(features)]
    new = [int(share > 0 and value < 0.7) for share, value in zip(density, cosine)]
    peak = [feature % len(vocab) if share else -1 for feature, share in enumerate(density)]
    beside = {"name": f"{name} at L0 32", "variant": "standard", "l0": 40.5, "problem": None,
              "new": {"count": sum(new), "of": sum(map(bool, density)), "threshold": 0.7},
              "features": {str(nearest[feature]): dashboard(nearest[feature], False) for feature in chosen}}
    told = [[[feature, 3.5] for feature in chosen[:5]] for _ in range(15)]
    passages = [{"title": f"{name} passage", "tokens": [vocab[i % len(vocab)] for i in range(15)], "run": told,
                 "baseline": told if baseline else None}]
    return {"sae": sae, "variant": name, "model": "smollm2-135m-instruct", "hook_name": "blocks.9.hook_resid_post",
            "layer": 9, "d_in": 16, "d_sae": features, "either_sign": False,
            "text": {"dataset": "held-out", "tokens": 4064, "rows": 32, "context": 128} if text else None,
            "list": {"density": density, "max": largest, "own_nearest": nearest, "own_cosine": cosine,
                     "nearest": nearest if baseline else None, "cosine": cosine if baseline else None,
                     "new": new if baseline else None, "encoder_cosine": cosine, "peak": peak if text else None},
            "health": {"l0": {"edges": [i * 2 for i in range(33)], "counts": [draw.randrange(200) for _ in range(32)]},
                       "norms": [round(draw.uniform(20, 40), 3) for _ in range(200)],
                       "errors": [round(draw.uniform(5, 12), 3) for _ in range(200)]},
            "vocab": vocab if text else [], "features": {str(f): dashboard(f, True) for f in chosen},
            "baseline": beside if baseline else None, "passages": passages if text else []}
