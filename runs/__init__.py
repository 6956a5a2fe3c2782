"""What is known about recorded runs: reading them in every shape there has been, comparing, reporting,
their folders.
"""
