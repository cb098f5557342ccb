"""The base, the trained model and OUT, run: KL, top-1 agreement and greedy samples."""
