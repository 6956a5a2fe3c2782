"""Where texts come from: what is trained on, what is held out, and the labelled texts of the probing evals.

Look first at source.py: a run's `Source` takes its texts from embedded.py (wheels of the package index), tiny.py (a
grammar) or, as a Gemma run does, from the hub or local files: text_files.py finds the files, streams.py reads their
documents, hub.py draws SAEBench's probing sets. splits.py divides documents, packing.py makes rows of tokens of them,
inputs.py asks before a run whether there is enough.
"""
