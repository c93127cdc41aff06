"""What a grid is made of: cells, each one pruning and its judgement, fully specified before anything is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.engine.tokens import Count, Tokens, read_tokens
from secateur.errors import DataError, InvalidOptionError, SecateurError
from secateur.model.budget import Budget, Convention
from secateur.model.handle import Model
from secateur.record import public_facts

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The first `samples` rows of a text's token matrix, each cut to `length` tokens."""

    text: str
    samples: int
    length: int
    seed: int = 0
    count: Count = "all"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pruning of the dense model.

    Attributes:
        name: of its folder.
        method: a registered one, one that exists in memory only, or "dense".
        label: shown in tables.
        sparsity: None for the dense model, and for a matched cell until the cell that it is matched to is there.
        of, round_to: as `Budget` has them.
        options: the method's, as given; defaults fill the rest.
        calibration: None for the dense model.
        matched_to: the name of the cell whose achieved size this one is to have.
        ablation: in an ablation: `what`, `value` and `seed`.
    """

    name: str
    method: str
    label: str
    sparsity: float | None = None
    of: Convention = "blocks"
    round_to: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    matched_to: str | None = None
    ablation: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            Budget(self.sparsity, of=self.of, round_to=self.round_to)  # raises InvalidOptionError

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides its figures, but for the model, the tokens and the judging."""
        told = {key: getattr(self, key) for key in ("method", "sparsity", "of", "round_to")}
        return {**told, "options": dict(self.options), "seed": self.calibration.seed if self.calibration else None}


def dense_cell() -> Cell:
    return Cell(name=DENSE, method=DENSE, label=DENSE)


def check_names(cells: Sequence[Cell]) -> None:
    """Raise InvalidOptionError where two cells would share a folder."""
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidOptionError(f"asked for twice: {', '.join(twice)}")


class Matrices:
    """The calibration tokens of a grid: one matrix per text and seed, of which each cell has its first rows.

    So two methods that want 32 and 128 windows share the first 32, and a shorter window is the beginning of a longer.

    Raises:
        DataError: a text has fewer windows than some cell needs. Said before any cell is run.
    """

    def __init__(self, model: Model, cells: Iterable[Cell], *, data: Path | None, cache: Path | None) -> None:
        wanted: dict[tuple[str, int, Count], list[Cell]] = {}
        for cell in cells:
            if (each := cell.calibration) is not None:
                wanted.setdefault((each.text, each.seed, each.count), []).append(cell)
        self._matrices = {key: _matrix(model, some, data=data, cache=cache) for key, some in wanted.items()}

    def rows(self, wanted: Calibration) -> Tokens:
        whole = self._matrices[wanted.text, wanted.seed, wanted.count]
        cut = whole.first(wanted.samples, wanted.length)
        return replace(cut, source={**whole.source, "samples": wanted.samples, "length": wanted.length})


def _matrix(model: Model, cells: Sequence[Cell], *, data: Path | None, cache: Path | None) -> Tokens:
    """The tokens of cells that share text and seed: as many and as long windows as one of them needs."""
    some = [cell.calibration for cell in cells if cell.calibration is not None]
    samples, length = max(each.samples for each in some), max(each.length for each in some)
    try:
        return read_tokens(
            model, some[0].text, purpose="calibration", samples=samples, length=length, seed=some[0].seed,
            count=some[0].count, data=data, cache=cache,
        )  # fmt: skip
    except DataError as error:
        wanted = {cell.method: cell.calibration.samples for cell in cells if cell.calibration is not None}
        asked = ", ".join(f"{method} {wanted[method]}" for method in sorted(wanted, key=lambda name: -wanted[name]))
        raise DataError(
            f"{error}. Windows asked for: {asked}; --samples sets all methods', METHOD.samples one's"
        ) from error


def calibration_facts(tokens: Tokens) -> dict[str, Any]:
    """What a cell's file says of its calibration."""
    return {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()}


def in_words(error: BaseException) -> str:
    """An error as a cell's file and the table have it; of one that was not foreseen, its kind too."""
    return str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
