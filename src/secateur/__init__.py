"""secateur: structured pruning of large language models.

Importing it makes transformers' Auto classes load the checkpoints that stock architectures cannot hold.
"""

from secateur.engine.tokens import Tokens
from secateur.errors import SecateurError
from secateur.heal.recover import Recovered, recover
from secateur.judge.evaluate import evaluate
from secateur.judge.judging import Judging
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.load import load, register
from secateur.output import save
from secateur.pruning import Pruned, prune
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
