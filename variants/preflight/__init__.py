"""What a variant must show on synthetic data before anything expensive starts.

check: the demands, one function each; trial: building and training on synthetic data; memory: what a step will take at
the real sizes; messages: the words, and the line of the user's file.
"""
