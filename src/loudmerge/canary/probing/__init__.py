"""Upstream code run: a piece of it alone, in a process of its own that may do nothing else."""
