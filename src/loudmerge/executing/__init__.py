"""Executes a plan: streaming, staged beside OUT, published in one step, with a report."""
