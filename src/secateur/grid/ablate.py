"""`ablate`: one choice of one method at a time, over seeds: both papers' ablations, as grids of the same engine."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from secateur.engine.tokens import Count
from secateur.errors import InvalidOptionError, SecateurError, UnknownNameError
from secateur.grid import inverted
from secateur.grid.cells import Cell, dense_cell
from secateur.grid.run import Grid, run_grid
from secateur.grid.words import CALIBRATION, calibration_of, parse_value, sparsities, split, windows
from secateur.methods import Method, get_method
from secateur.methods.two_ssp import plan as two_ssp_plan
from secateur.model.budget import Budget, Convention
from secateur.model.handle import Model
from secateur.record import public_name
from secateur.report.ablation import write_ablation_table


@dataclass(frozen=True, kw_only=True)
class What:
    """A choice that can be ablated.

    Attributes:
        method: whose choice it is, unless another is asked for.
        varies: an option of the method; `samples`, `length` or `text` of its calibration; or nothing.
        values: that are tried if none are given; the papers', the method's own among them.
        given: options of the calibration beside.
    """

    method: str
    varies: str
    values: tuple[Any, ...]
    given: Mapping[str, int] = field(default_factory=dict)
    help: str


TEXT, ORDER, NOTHING = "text", "rows-columns", ""
PLAIN, MATCHED = "2ssp", "2ssp-matched"  # values of ORDER beside the amounts of the inverted one
_ANY = (TEXT, NOTHING, *CALIBRATION)  # can be varied with any method
WHATS: dict[str, What] = {
    "calibration-size": What(
        method="2ssp", varies="samples", values=(2, 4, 8, 16, 32, 64, 128, 256), help="windows of the calibration"
    ),
    "calibration-source": What(
        method="2ssp", varies=TEXT, values=("c4", "wikitext2", "fineweb-edu"), help="the calibration's text"
    ),
    "calibration-length": What(
        method="slimgpt", varies="length", values=(64, 128, 256, 512, 1024, 2048), help="tokens per window"
    ),
    "repeats": What(
        method="2ssp", varies=NOTHING, values=("as given",), help="nothing but the draw of the calibration"
    ),
    "stage1-only": What(method="2ssp", varies="stage1_only", values=(False, True), help="2SSP without its stage 2"),
    "norm": What(method="2ssp", varies="norm", values=("l2", "l1"), help="2SSP's norm of activations"),
    "alpha": What(method="2ssp", varies="alpha", values=(0.5, 1.0, 1.5, 2.0, 3.0), help="2SSP's equation 5"),
    "balance": What(
        method="2ssp", varies="attentions", values=(), help="attention modules that 2SSP removes: every feasible number"
    ),
    "rows-columns": What(
        method="2ssp", varies=ORDER, values=(PLAIN, *inverted.AMOUNTS, MATCHED),
        help="2SSP with rows and columns inverted, as published (it removes more than asked) and at equal size",
    ),
    "schedule": What(
        method="slimgpt", varies="ratio", values=("log", "linear", "uniform", "log-decrease", "linear-decrease"),
        help="SlimGPT's ratios over the blocks",
    ),
    "groups": What(
        method="slimgpt", varies="group", values=("released", "paper", 128), help="FFN neurons that go at a time"
    ),
    "head-error": What(
        method="slimgpt", varies="head_error", values=("grouped", "ordinary", "exact"), help="how SlimGPT judges heads"
    ),
    "compensation": What(
        method="slimgpt", varies="compensate", values=(True, False), help="whether SlimGPT's columns make up for others"
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is ablated.

    Attributes:
        what: names from WHATS.
        values: in place of a single ablation's own; as text, read as the option reads it.
        method: in place of each ablation's own.
        sparsities: as `Comparison` has them; of: whose parameters they are shares of.
        seeds: repeats: 0 is the calibration text's first windows, any other a draw.
        options: of the method, by name, the same in all cells; `samples` and `length` are the calibration's.
        calibration, samples, length, count: as `Comparison` has them.
    """

    what: Sequence[str]
    values: Sequence[str] = ()
    method: str | None = None
    sparsities: Sequence[str | float] = (0.5,)
    seeds: Sequence[int] = (0, 1, 2)
    of: Convention = "blocks"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: str = "c4"
    samples: int | None = None
    length: int | None = None
    count: Count = "all"

    def cells(self, model: Model) -> list[Cell]:
        """The dense model, then by ablation, sparsity, value and seed.

        Raises:
            UnknownNameError, InvalidOptionError: an ablation, value or option that cannot be.
        """
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
        made = [dense_cell()]
        for name in self.what:
            for sparsity in sparsities(self.sparsities, len(model.numbers)):
                for value in self._values(model, name, sparsity):
                    made += [self._cell(model, name, value, sparsity, seed) for seed in self.seeds]
        return made

    def _method(self, what: What) -> Method:
        method = get_method(self.method or what.method)
        if what.varies == ORDER and method.name != what.method:
            raise InvalidOptionError(f"{method.name} has no rows and columns to invert; that is {what.method}'s")
        if what.varies not in (ORDER, *_ANY) and what.varies not in method.options:
            raise InvalidOptionError(f"{method.name} has no {what.varies}; that is a choice of {what.method}")
        return method

    def _values(self, model: Model, name: str, sparsity: float) -> list[Any]:
        what = WHATS[name]
        if not self.values:
            return list(what.values) if name != "balance" else self._feasible(model, sparsity)
        if what.varies in (ORDER, NOTHING):
            if unknown := [value for value in self.values if value not in what.values]:
                raise InvalidOptionError(f"{name} has {', '.join(what.values)}, not {', '.join(unknown)}")
            return list(self.values)
        if what.varies == TEXT:
            return list(self.values)
        return [parse_value(self._method(what), what.varies, value) for value in self.values]

    def _feasible(self, model: Model, sparsity: float) -> list[int]:
        """The numbers of attention modules with which 2SSP can meet the budget."""
        layout, budget = model.layout(), Budget(sparsity, of=self.of)
        found = []
        for count in range(sum(block.attention > 0 for block in layout.blocks.values()) + 1):
            try:
                two_ssp_plan(layout, budget, attentions=count)
            except SecateurError:
                continue
            found.append(count)
        if not found:
            raise InvalidOptionError(
                f"2ssp reaches {sparsity:.4g} of the {self.of} with no number of attention modules"
            )
        return found

    def _cell(self, model: Model, name: str, value: Any, sparsity: float, seed: int) -> Cell:
        what = WHATS[name]
        method = self._method(what)
        options = self._given(method)
        text = self.calibration
        if what.varies == TEXT:
            text = str(value)
        elif what.varies not in (ORDER, NOTHING):
            options[what.varies] = value
        own, given = split(method, options)
        shown = public_name(str(value)) if what.varies == TEXT else str(value)
        named = name if method.name == what.method else f"{method.name}-{name}"
        cell = Cell(
            name=_name(named, shown, sparsity, seed), method=method.name, label=f"{method.name}, {name} {shown}",
            sparsity=sparsity, of=self.of, options=own,
            calibration=calibration_of(
                method, text, given, seed=seed, count=self.count, max_length=model.max_length
            ),
            ablation={"what": name, "value": shown, "seed": seed, "of": method.name,
                      "terms": self._terms(model, what, method)},
        )  # fmt: skip
        if what.varies == ORDER and value in inverted.AMOUNTS:
            own = inverted.complete({**own, "amount": value})
            return replace(cell, method=inverted.NAME, label=f"{inverted.NAME}, {name} {shown}", options=own)
        if what.varies == ORDER and value == MATCHED:  # beside what the published one really removes
            return replace(cell, sparsity=None, matched_to=_name(named, inverted.PUBLISHED, sparsity, seed))
        return cell

    def _given(self, method: Method) -> dict[str, Any]:
        """Options, of the calibration too."""
        return {**windows(self.samples, self.length), **self.options.get(method.name, {})}

    def _terms(self, model: Model, what: What, method: Method) -> dict[str, Any]:
        """What all cells of an ablation of one method have in common: all but the value, the sparsity and the seed."""
        own, given = split(method, self._given(method))
        shape = calibration_of(
            method, self.calibration, given, seed=0, count=self.count, max_length=model.max_length
        )  # fmt: skip
        terms = {
            "of": self.of, "count": self.count, TEXT: public_name(self.calibration), "samples": shape.samples,
            "length": shape.length, **{f"{method.name}.{name}": each for name, each in method.complete(own).items()},
        }  # fmt: skip
        for varied in (what.varies, f"{method.name}.{what.varies}"):
            terms.pop(varied, None)
        return terms


def _name(what: str, value: str, sparsity: float, seed: int) -> str:
    """Of a cell's folder: nothing in it that a file system minds."""
    return f"{what}-{re.sub(r'[^A-Za-z0-9._-]+', '_', value)}-{sparsity:.6g}-seed{seed}"


def ablate(ablation: Ablation, grid: Grid) -> dict[str, dict[str, Any]]:
    """Run what is missing of an ablation and write `ablation-table.md`, `.csv`, `.json` and `.tex` after each cell:
    mean and standard deviation over the seeds.

    Returns:
        The cells of this ablation by name; failed ones have `status` "failed" and an `error`.

    Raises:
        SecateurError: as `run_grid` and `Ablation.cells` say.
    """
    settings = {**asdict(ablation), "calibration": public_name(ablation.calibration)}
    write_tables = functools.partial(write_ablation_table, grid.folder)
    return run_grid(replace(grid, kind="ablate", settings=settings), ablation.cells, write_tables)
