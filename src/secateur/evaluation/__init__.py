"""Judging a model: perplexity, fidelity to the dense one, what running it costs, its text, and a gate for all that."""
