"""What reaches over a network or onto the disk: made once, known by its bytes, made again when damaged.

network.py asks the hub, with patience, and keeps to one commit of a repository; made.py keeps folders that were made;
identity.py hashes files. Tensors are kept one floor below, in evals/cache.py.
"""
