"""Judging a model: perplexity, fidelity to the dense one, what running it costs, its text, and a gate for all that."""

from secateur.evaluation.fidelity import fidelity
from secateur.evaluation.generation import generation
from secateur.evaluation.inference import inference
from secateur.evaluation.perplexity import perplexity

__all__ = ["fidelity", "generation", "inference", "perplexity"]
