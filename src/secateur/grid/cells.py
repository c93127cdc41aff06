"""What a grid is made of: cells, each one pruning and its judgement, fully specified before anything is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.assets import Bos
from secateur.compensation import REFITS, get_filter
from secateur.engine.tokens import Count, Tokens, read_tokens
from secateur.errors import DataError
from secateur.grid import inverted
from secateur.methods import Method, Options, as_before, get_method
from secateur.model.budget import Budget, Convention
from secateur.model.handle import Model
from secateur.report.results import DENSE, AblationTerms


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The first `samples` rows of a text's token matrix, each cut to `length` tokens."""

    text: str
    samples: int
    length: int
    seed: int = 0
    count: Count = "all"
    bos: Bos = "auto"


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
        refit: as `secateur.planning.Request` has it.
        calibration: None for the dense model.
        matched_to: the name of the cell whose achieved size this one is to have.
        ablation: in an ablation, which choice of which method this is.

    Raises:
        InvalidOptionError: a sparsity outside (0, 1).
    """

    name: str
    method: str
    label: str
    sparsity: float | None = None
    of: Convention = "blocks"
    round_to: int = 1
    options: Options = field(default_factory=dict)
    refit: bool = False
    calibration: Calibration | None = None
    matched_to: str | None = None
    ablation: AblationTerms | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            Budget(self.sparsity, of=self.of, round_to=self.round_to)

    @property
    def budget(self) -> Budget:
        """Of a cell that is pruned and whose size is known."""
        assert self.sparsity is not None  # narrows the type
        return Budget(self.sparsity, of=self.of, round_to=self.round_to)

    @property
    def shown_method(self) -> str:
        """The method as tables know it: with a refit it is another one."""
        return f"{self.method} + refit" if self.refit else self.method

    @property
    def complete_options(self) -> Options:
        """With the method's defaults: two cells that say the same in other words are the same."""
        return {} if self.method == DENSE else self.made_by.complete(self.options)

    @property
    def made_by(self) -> Method:
        """The method; not of the dense model."""
        return inverted.METHOD if self.method == inverted.NAME else get_method(self.method)

    def identity(self, judged_by: str, calibration: str | None) -> str:
        """sha256 of all that decides its figures."""
        terms: dict[str, object] = {
            "method": self.method,
            "sparsity": self.sparsity,
            "of": self.of,
            "round_to": self.round_to,
        }
        if self.refit:
            terms["refit"] = {each.name: dict(get_filter(each.name).options) for each in REFITS}
        seed = self.calibration.seed if self.calibration else None
        options = as_before(self.method, self.complete_options)
        return digest(judged_by, {**terms, "options": options, "seed": seed}, calibration)


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


DENSE_CELL = Cell(name=DENSE, method=DENSE, label=DENSE)


class Matrices:
    """The calibration tokens of a grid: one matrix per text and seed, of which each cell has its first rows.

    So two methods that want 32 and 128 windows share the first 32, and a shorter window is the beginning of a longer.

    Args:
        places: `data`, `cache` and `text_field` of `read_tokens`.

    Raises:
        DataError: a text has fewer windows than some cell needs. Said before any cell is run.
    """

    def __init__(self, model: Model, cells: Iterable[Cell], **places: Any) -> None:
        by_text: dict[tuple[str, int, Count, Bos], list[tuple[str, Calibration]]] = {}
        for cell in cells:
            if (wanted := cell.calibration) is not None:
                by_text.setdefault(_matrix_of(wanted), []).append((cell.method, wanted))
        self._matrices = {key: _matrix(model, some, **places) for key, some in by_text.items()}

    def rows(self, wanted: Calibration) -> Tokens:
        whole = self._matrices[_matrix_of(wanted)]
        cut = whole.first(wanted.samples, wanted.length)
        return replace(cut, source={**whole.source, "samples": wanted.samples, "length": wanted.length})

    def fingerprint(self, wanted: Calibration | None) -> str | None:
        """Of a cell's tokens; None for the dense model."""
        return self.rows(wanted).fingerprint() if wanted is not None else None


def _matrix_of(wanted: Calibration) -> tuple[str, int, Count, Bos]:
    """What calibrations on rows of one matrix have in common."""
    return wanted.text, wanted.seed, wanted.count, wanted.bos


def _matrix(model: Model, wanted: Sequence[tuple[str, Calibration]], **places: Any) -> Tokens:
    """The tokens of methods that share text and seed: as many and as long windows as one of them needs."""
    calibrations = [calibration for _, calibration in wanted]
    first, windows = calibrations[0], {method: calibration.samples for method, calibration in wanted}
    try:
        return read_tokens(
            model, first.text, purpose="calibration", samples=max(one.samples for one in calibrations),
            length=max(one.length for one in calibrations), seed=first.seed, count=first.count, bos=first.bos,
            **places,
        )  # fmt: skip
    except DataError as error:
        asked = ", ".join(f"{method} {windows[method]}" for method in sorted(windows, key=lambda m: -windows[m]))
        raise DataError(
            f"{error}. Windows asked for: {asked}; --samples sets all methods', METHOD.samples one's"
        ) from error
