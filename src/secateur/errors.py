"""Typed errors. Every message says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of every error that secateur raises on purpose."""


class UnsupportedModelError(SecateurError):
    """The model's family, or this particular model, cannot be pruned by secateur."""


class UnsupportedEditError(SecateurError):
    """The model's family cannot do this edit; the message gives the reason."""


class InvalidEditError(SecateurError):
    """An edit names a block, neuron or head that is not there."""


class InfeasibleBudgetError(SecateurError):
    """The asked sparsity cannot be reached; the message gives the reachable range."""


class UnknownNameError(SecateurError):
    """A method, text, metric or option of that name does not exist."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Build the message: what was asked, the nearest known name, and all known names."""
        names = sorted(known)
        by_lower = {known.lower(): known for known in names}
        near = difflib.get_close_matches(name.lower(), by_lower, n=1)
        hint = f" Did you mean '{by_lower[near[0]]}'?" if near else ""
        return cls(f"unknown {kind} '{name}'.{hint} Known: {', '.join(names)}.")


class NameTakenError(SecateurError):
    """A method or family of that name is registered already."""


class InvalidOptionError(SecateurError):
    """An option's value is out of its range or of the wrong kind."""


class DataError(SecateurError):
    """A text or data file is missing, empty, unreadable or too short."""


class FetchError(SecateurError):
    """A model or text could not be fetched; the message names the cause and the way out."""


class MissingExtraError(SecateurError):
    """An optional dependency is needed; the message names the extra to install."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        return cls(f"{purpose} needs the package '{package}': pip install 'secateur[{extra}]'.")


class EngineError(SecateurError):
    """Another program that runs models failed or died; the message ends with what it said last."""


class WorkersError(SecateurError):
    """Workers could not be started or reached, died once too often, or do not see what this process sees."""


class CheckpointError(SecateurError):
    """A checkpoint is missing, damaged or inconsistent."""


class UnsupportedExportError(SecateurError):
    """A format cannot hold the model exactly; the message gives the reason, and the nearest format that can."""


class OutputExistsError(SecateurError):
    """The output folder holds something else; nothing was overwritten."""


class OutputError(SecateurError):
    """The output folder cannot be written."""


class OutputBusyError(OutputError):
    """Another process is about to write the output folder."""


class JournalError(SecateurError):
    """A journal is of another job, or cannot be read; nothing was taken from it."""


class NumericalError(SecateurError):
    """A computation gave NaN or Inf where a finite number is needed."""


class Interrupted(KeyboardInterrupt):
    """The user's interrupt (Ctrl-C) in a run that can be resumed; the message says where it stands and how."""
