"""Judging a model: perplexity, fidelity to the dense one, cost of inference, its text, downstream tasks, and a gate."""
