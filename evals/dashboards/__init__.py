"""What can be looked at in a trained SAE: all of its features in figures, some hundreds of them in dashboards, and how
it reads a few passages. Made from held-out text in one pass of the language model for all SAEs of a layer.

A *board* is what is known of one SAE, plain JSON (kept by runs/features.py, shown by runs/page/features.py, exported by
runs/neuronpedia.py). F features; activations and norms in units of the raw residual stream; a token is its text.

    sae, variant, model, hook_name   names: "layer_9", "topk", …
    layer, d_in, d_sae               numbers
    either_sign                      whether features fire with negative values too
    text        {"dataset": its name, "tokens": looked at, special ones left out, "rows", "context": tokens a row}; None
                where the model reads no text: then features, passages and vocab are empty
    list        columns of F values: density (share of tokens on which it fires), max (the largest activation, of either
                sign), own_nearest and own_cosine (the other row of its own decoder that is most like it), nearest and
                cosine (that of the baseline's decoder), encoder_cosine (encoder with decoder); a column is None where
                there is nothing of the kind, and own_nearest is -1 for a dictionary of one
    health      {"l0": {"edges", "counts"}: tokens by active features; "norms", "errors": ‖x‖ and ‖x − x̂‖ of up to a
                thousand tokens, evenly spread}
    vocab       the texts of the tokens that contexts use, by number
    features    {"123": a dashboard}
    baseline    None, or {"name": of the SAE that is compared with, "variant", "l0", "problem": None or why there are no
                dashboards, "features": {"77": a dashboard of the baseline's}}: the nearest of each of `features`, on
                the same text
    passages    [{"title", "tokens": [text], "run": of each token up to 5 [feature, activation], strongest first,
                "baseline": the same, or None}]

A dashboard is

    why         reasons for which it was chosen: "densest", "rarest", "random", "best probe", "new", "absorbed letter",
                "explained"; of the baseline's: []
    density, max
    groups      [{"name": "top" or "interval 3", "from", "to": activations, "contexts": […]}]: 20 of the strongest (each
                another row while there are enough), then 5 each of 10 equal intervals from 0 to max, the highest first;
                intervals without a context are left out
    histogram   {"edges": 51, "counts": 50} of the activations that are not 0
    logits      None where the model has no head for directions, or {"top": [[token, logit] × 10], "bottom": the same,
                lowest first, "edges": 51, "counts": 50, over the vocabulary}
    own         [[feature, cosine] × 5]: the rows of its own decoder that are most like it
    theirs      [[feature, cosine] × 3] of the baseline's decoder; [] without one
    cofiring    [[feature, φ] × 5]: those that fire on the same tokens, by the φ coefficient (Pearson's of firing)
    classes     ["arxiv_field: math", …] that probes with few features chose it for
    letters     ["s", …] whose first-letter probe it serves
    explanation, score    of autointerp, or None

A context is {"tokens": [number in vocab], "values": [[place in tokens, activation], …] where it fires, "peak": the
place it was chosen for, "row": of the text, "cut": [whether text before, after it was left out]}.
"""
