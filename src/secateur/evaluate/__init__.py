"""Judging a model: perplexity, latency, samples of its text."""

from secateur.evaluate.generate import generate
from secateur.evaluate.latency import latency
from secateur.evaluate.perplexity import perplexity

__all__ = ["generate", "latency", "perplexity"]
