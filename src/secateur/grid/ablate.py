"""`ablate`: one choice of one method at a time, over seeds: both papers' ablations, as grids of the same engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from secateur.engine.tokens import wants_bos
from secateur.errors import InvalidOptionError, SecateurError, UnknownNameError
from secateur.grid import inverted
from secateur.grid.asked import WINDOWS, Asked, parse_value, read_sparsities
from secateur.grid.cells import DENSE_CELL, Cell
from secateur.grid.run import Grid, run_grid
from secateur.methods import Method, Options, as_before, get_method
from secateur.methods.two_ssp import balance
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.record import public_name
from secateur.report.ablation import NAME, write_ablation_table
from secateur.report.results import ABLATE, AblationTerms, CellResult

TEXT, ORDER, NOTHING = "text", "rows-columns", ""
MATCHED = "2ssp-matched"  # a value of ORDER beside 2ssp and the amounts of the inverted one
_ANY = (TEXT, NOTHING, *WINDOWS)  # can be varied with any method


class What(msgspec.Struct, frozen=True):
    """A choice that can be ablated: a row of ablations.toml, which says what the fields are."""

    method: str
    varies: str
    values: tuple[Any, ...]
    help: str


WHATS = msgspec.toml.decode(
    (Path(__file__).parent / "ablations.toml").read_bytes(), type=dict[str, What]
)  # its own file, since the command's help lists them


@dataclass(frozen=True, kw_only=True)
class Ablation(Asked):
    """What is ablated.

    Attributes:
        what: names from WHATS.
        values: in place of a single ablation's own; as text, read as the option reads it.
        method: in place of each ablation's own.
        sparsities: as `Comparison` has them.
        seeds: repeats: 0 is the calibration text's first windows, any other a draw.
        of, options, calibration, samples, length, count, bos: as `Asked` has them, the same in all cells.
    """

    kind: ClassVar[str] = ABLATE
    table: ClassVar[str] = NAME

    what: Sequence[str]
    values: Sequence[str] = ()
    method: str | None = None
    sparsities: Sequence[str | float] = (0.5,)
    seeds: Sequence[int] = (0, 1, 2)

    def cells(self, model: Model) -> list[Cell]:
        """Dense; then by ablation, sparsity, value and seed."""
        if self.values and len(self.what) != 1:
            raise InvalidOptionError("--values are those of one ablation; ask for one --what at a time")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InvalidOptionError(f"seeds are whole numbers, each once; not {list(self.seeds)}")
        for name in self.what:
            if name not in WHATS:
                raise UnknownNameError.of("ablation", name, WHATS)
        ablated = {self._method(WHATS[name]).name for name in self.what}
        if unused := sorted(set(self.options) - ablated):
            raise InvalidOptionError(f"options for {', '.join(unused)}, which is not ablated ({', '.join(ablated)} is)")
        return [DENSE_CELL] + [
            self._cell(model, name, value, sparsity, seed)
            for name in self.what
            for sparsity in read_sparsities(self.sparsities, len(model.numbers))
            for value in self._values(model, name, sparsity)
            for seed in self.seeds
        ]

    def _method(self, what: What) -> Method:
        method = get_method(self.method or what.method)
        if what.varies == ORDER and method.name != what.method:
            raise InvalidOptionError(f"{method.name} has no rows and columns to invert; that is {what.method}'s")
        if what.varies not in (ORDER, *_ANY) and what.varies not in method.options:
            raise InvalidOptionError(f"{method.name} has no {what.varies}; that is a choice of {what.method}")
        return method

    def _values(self, model: Model, name: str, sparsity: float) -> Sequence[object]:
        what = WHATS[name]
        if not self.values:
            return what.values if name != "balance" else _feasible(model, Budget(sparsity, of=self.of))
        if what.varies == TEXT:
            return self.values
        if what.varies not in (ORDER, NOTHING):
            return [parse_value(self._method(what), what.varies, value) for value in self.values]
        if unknown := [value for value in self.values if value not in what.values]:
            raise InvalidOptionError(f"{name} has {', '.join(map(str, what.values))}, not {', '.join(unknown)}")
        if MATCHED in self.values and inverted.PUBLISHED not in self.values:
            raise InvalidOptionError(f"{MATCHED} has the size of {inverted.PUBLISHED}, so ask for that as well")
        return [value for value in what.values if value in self.values]  # what is matched before what matches it

    def _cell(self, model: Model, name: str, value: object, sparsity: float, seed: int) -> Cell:
        what = WHATS[name]
        method, text = self._method(what), self.calibration
        varied: Options = {}
        if what.varies == TEXT:
            text = str(value)
        elif what.varies not in (ORDER, NOTHING):
            varied = {what.varies: value}
        options, calibration = self.settle(model, method, text=text, seed=seed, above=varied)
        shown = public_name(text) if what.varies == TEXT else str(value)
        named = name if method.name == what.method else f"{method.name}-{name}"
        cell = Cell(
            name=_name(named, shown, sparsity, seed), method=method.name, label=f"{method.name}, {name} {shown}",
            sparsity=sparsity, of=self.of, options=options, calibration=calibration,
            ablation=AblationTerms(
                what=name, of=method.name, value=shown, seed=seed, terms=self._terms(model, what, method)
            ),
        )  # fmt: skip
        if what.varies == ORDER and value in inverted.SIZES:
            if unknown := sorted(set(options) - {"alpha"}):
                raise InvalidOptionError(
                    f"2SSP with rows and columns inverted has no {', '.join(unknown)}; of 2ssp's options it takes "
                    "alpha only"
                )
            options = inverted.METHOD.complete({**options, "amount": value})
            return replace(cell, method=inverted.NAME, label=f"{inverted.NAME}, {name} {shown}", options=options)
        if what.varies == ORDER and value == MATCHED:  # beside what the published one really removes
            return replace(cell, sparsity=None, matched_to=_name(named, inverted.PUBLISHED, sparsity, seed))
        return cell

    def _terms(self, model: Model, what: What, method: Method) -> dict[str, object]:
        """What all cells of an ablation of one method have in common: all but the value, the sparsity and the seed."""
        options, shape = self.settle(model, method, text=self.calibration, seed=0)
        options = as_before(method.name, method.complete(options))
        terms = {
            "of": self.of, "count": self.count, TEXT: public_name(self.calibration), "samples": shape.samples,
            "length": shape.length, **({"bos": True} if wants_bos(model.family, self.bos) else {}),
            **({"text_field": self.text_field} if self.text_field else {}),
            **{f"{method.name}.{name}": value for name, value in options.items()},
        }  # fmt: skip
        varied = (what.varies, f"{method.name}.{what.varies}")
        return {name: value for name, value in terms.items() if name not in varied}

    def write_tables(self, folder: Path) -> None:
        write_ablation_table(folder)


def _feasible(model: Model, budget: Budget) -> list[int]:
    """The numbers of attention modules with which 2SSP can meet the budget."""
    layout = model.layout()
    feasible = []
    for count in range(sum(block.attention > 0 for block in layout.blocks.values()) + 1):
        with suppress(SecateurError):
            balance(layout, budget, attentions=count)
            feasible.append(count)
    if not feasible:
        raise InvalidOptionError(
            f"2ssp reaches {budget.sparsity:.4g} of the {budget.of} with no number of attention modules"
        )
    return feasible


def _name(what: str, value: str, sparsity: float, seed: int) -> str:
    """Of a cell's folder: nothing in it that a file system minds."""
    return f"{what}-{re.sub(r'[^A-Za-z0-9._-]+', '_', value)}-{sparsity:.6g}-seed{seed}"


def ablate(ablation: Ablation, grid: Grid) -> dict[str, CellResult]:
    """Run what is missing of an ablation and write `ablation-table.md`, `.csv`, `.json` and `.tex` after each cell:
    mean and standard deviation over the seeds.

    Returns:
        The cells of this ablation by name; failed ones have `status` "failed" and an `error`.

    Raises:
        SecateurError: as `run_grid` and `Asked.cells` say.
    """
    return run_grid(grid, ablation)
