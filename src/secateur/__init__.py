"""secateur: structured pruning of large language models.

Its names are read when they are asked for, so that `import secateur` and the commands' help cost nothing. Once it is
imported, before transformers or after it, transformers' Auto classes load the checkpoints that stock architectures
cannot hold.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur import auto
from secateur.errors import SecateurError
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.driver import Filter
    from secateur.engine.tokens import Tokens
    from secateur.goals import Goal
    from secateur.heal.recover import Recovered, recover
    from secateur.judge.judging import Judging, evaluate
    from secateur.model.budget import Budget
    from secateur.model.family_plugins import Family, register_family
    from secateur.model.handle import Model
    from secateur.model.load import Source, load
    from secateur.output import Output, save
    from secateur.planning import Request
    from secateur.pruning import Pruned
    from secateur.run import Run
    from secateur.running import prune, prune_to
    from secateur.workers.session import Workers

_HOMES = {
    "Budget": "model.budget",
    "Family": "model.family_plugins",
    "Filter": "driver",
    "Goal": "goals",
    "Judging": "judge.judging",
    "Model": "model.handle",
    "Output": "output",
    "Pruned": "pruning",
    "Recovered": "heal.recover",
    "Request": "planning",
    "Run": "run",
    "Source": "model.load",
    "Tokens": "engine.tokens",
    "Workers": "workers.session",
    "evaluate": "judge.judging",
    "load": "model.load",
    "prune": "running",
    "prune_to": "running",
    "recover": "heal.recover",
    "register_family": "model.family_plugins",
    "save": "output",
}

auto.register_beside_transformers()

__all__ = [
    "Budget",
    "Family",
    "Filter",
    "Goal",
    "Judging",
    "Model",
    "Output",
    "Pruned",
    "Recovered",
    "Request",
    "Run",
    "SecateurError",
    "Source",
    "Tokens",
    "Workers",
    "__version__",
    "evaluate",
    "load",
    "prune",
    "prune_to",
    "recover",
    "register_family",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"secateur.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
