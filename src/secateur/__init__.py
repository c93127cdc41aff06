"""secateur: structured pruning of large language models.

Importing it makes transformers' Auto classes load the checkpoints that stock architectures cannot hold.
"""

from secateur.api import Pruned, prune, save
from secateur.engine.tokens import Tokens
from secateur.errors import SecateurError
from secateur.evaluation.judging import Judging
from secateur.healing import Recovered, recover
from secateur.judging import evaluate
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.load import load, register
from secateur.run import Run
from secateur.version import __version__

register()

__all__ = [
    "Budget",
    "Judging",
    "Model",
    "Pruned",
    "Recovered",
    "Run",
    "SecateurError",
    "Tokens",
    "__version__",
    "evaluate",
    "load",
    "prune",
    "recover",
    "save",
]
