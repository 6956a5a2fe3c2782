"""What is known about recorded runs: reading them in every shape, comparing, reporting, their folders."""
