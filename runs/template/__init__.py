"""A template for AI-Scientist: the files that its client expects, with a thin experiment.py that starts this runner.

The files lie in files/ as they are written, but for three words that are filled in; `python -m runs.template DEST`
writes them.
"""
