"""Judging a model: perplexity, latency, samples of its text, downstream tasks (`secateur.evaluation.tasks`)."""

from secateur.evaluation.generate import generate
from secateur.evaluation.latency import latency
from secateur.evaluation.perplexity import perplexity

__all__ = ["generate", "latency", "perplexity"]
