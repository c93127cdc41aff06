"""A grid's folder: `compare.json`, a folder per cell that is there whole or not at all, and the tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from msgspec import UNSET, json, structs

from secateur.engine.tokens import Tokens, wants_bos
from secateur.errors import OutputError, OutputExistsError
from secateur.folders import new_folder, resolved, write_file
from secateur.grid.cells import Cell, digest
from secateur.judge.judging import Judging
from secateur.model.facts import configuration, environment
from secateur.model.handle import Model
from secateur.record import public_arguments, public_facts, public_name
from secateur.report import results
from secateur.report.results import CellResult, Index
from secateur.version import __version__

RUNS = ".runs"
_CPU = Path("/proc/cpuinfo")
_TERMS = (  # that a comparison's cells share
    "of", "round_to", "calibration", "seed", "count", "bos", "text_field", "samples", "length",
)  # fmt: skip
_EARLIER = {"bos": False, "text_field": None}  # of the calibration, what older folders do not say


class GridFolder:
    """The folder of a comparison or an ablation.

    Raises:
        OutputError: it cannot be one.
    """

    def __init__(self, path: Path) -> None:
        self.path = resolved(path)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; choose another folder")

    def index(self) -> Index | None:
        """What `compare.json` says; None if there is none.

        Raises:
            DataError: it is damaged.
            OutputExistsError: the folder holds something else.
        """
        if (self.path / results.INDEX).is_file():
            return results.read_index(self.path)
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if any(not name.startswith(".") for name in names - {results.CELLS}):  # another process may have begun just now
            raise OutputExistsError(f"{self.path} holds something that is no comparison; choose another --out")
        return None

    def write_index(self, index: Index) -> None:
        """Write the index; with the cells of earlier runs, or of another process, after the new ones, and all commands,
        each once."""
        old = self.index() or index
        commands = [*old.all_commands, *index.all_commands]
        index = structs.replace(
            index, created=old.created, cells=list(dict.fromkeys([*index.cells, *old.cells])),
            commands=[words for place, words in enumerate(commands) if words not in commands[:place]],
        )  # fmt: skip
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / results.INDEX, results.dumps(index))
        except OSError as error:
            raise OutputError(f"{self.path / results.INDEX} cannot be written: {error.strerror or error}") from error

    @property
    def runs(self) -> Path:
        """Where the steps of unfinished cells lie; it goes with the last of them."""
        return self.path / RUNS

    def run_path(self, key: str) -> Path:
        """Where the steps of unfinished cells lie that share them."""
        return self.runs / key[:16]

    def cell_path(self, name: str) -> Path:
        return self.path / results.CELLS / name

    def cell(self, name: str) -> CellResult | None:
        """A cell's file; None if it has not been made."""
        return results.read_cell(self.path, name)

    def cells(self, names: Iterable[str]) -> dict[str, CellResult]:
        """Those of the cells that are there, in this order."""
        return {name: cell for name in names if (cell := self.cell(name)) is not None}

    def write_cell(self, cell: CellResult) -> CellResult:
        """Write a cell, whole or not at all, and give what can be read of it: of a number that is none, None.

        One that is there has failed, or it would not have been made again.
        """
        with new_folder(self.cell_path(cell.name), overwrite=True) as partial:
            (partial / results.CELL).write_text(results.dumps(cell), encoding="utf-8")
        written = self.cell(cell.name)
        assert written is not None  # narrows the type
        return written

    def check(self, index: Index, cells: Sequence[Cell]) -> list[str]:
        """Refuse a folder that was made with other arguments; give the names of the cells that earlier runs have.

        Raises:
            OutputExistsError: what differs stands in it.
        """
        if (old := self.index()) is None:
            return []
        if names := _differing(old, index):
            raise OutputExistsError(
                f"{self.path} was made with other arguments ({', '.join(names)} differ); choose another --out, "
                "or give the same. Methods and sparsities may be added"
            )
        if names := _unequal_terms(self.cells(old.cells).values(), cells):
            raise OutputExistsError(
                f"{self.path} has cells of the same ablation on other terms ({', '.join(names)} differ); choose "
                "another --out, or give the same. Seeds, values and sparsities may be added"
            )
        return old.cells


def make_index(
    kind: str, dense: Model, judging: Judging, texts: Mapping[str, Tokens], cells: Sequence[Cell], *,
    settings: Mapping[str, object], arguments: Mapping[str, object],
) -> Index:  # fmt: skip
    """The content of a new `compare.json`; of `bos` it has what came of it on this model: None where
    windows begin without, prompts and tasks as the tokenizer has it, as all did before this could be asked."""
    layout, fingerprint = dense.layout(), dense.fingerprint()
    by_text = {
        public_name(name): {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()}
        for name, tokens in texts.items()
    }
    prints = {name: facts["fingerprint"] for name, facts in by_text.items()}
    bos = wants_bos(dense.family, judging.bos) or (False if judging.bos == "never" else None)
    judged = {**asdict(replace(judging, texts=())), "texts": list(by_text), "bos": bos}
    decided = {name: value for name, value in judged.items() if name != "bos" or bos is not None}
    return Index(
        kind=kind,
        model=results.ModelFacts(
            name=public_facts(dense.source).get("name"), fingerprint=fingerprint, parameters=layout.parameters,
            block_parameters=layout.block_parameters, blocks=len(layout.blocks), hidden_size=layout.ends.hidden,
            family=dense.family.model_type, configuration=digest(configuration(dense)),
        ),
        arguments=public_arguments(arguments),
        settings=json.decode(json.encode({**judged, "grid": settings})),  # as it will be read
        texts=by_text,
        machine=machine(),
        versions={"secateur": __version__, **environment(dense)},
        created=now(),
        judged_by=digest(fingerprint, decided, prints, __version__),
        cells=[cell.name for cell in cells],
    )  # fmt: skip


def _differing(old: Index, new: Index) -> list[str]:
    """What two indices of one folder may not differ in, and do; [] where they fit."""
    had, wanted = {**_EARLIER, **old.settings.get("grid", {})}, new.settings["grid"]
    shared = _TERMS if new.kind == results.COMPARE else ()
    terms = [name for name in shared if name in had and had[name] != wanted[name]]
    if old.model.configuration not in (UNSET, new.model.configuration):
        terms.append("the model's configuration")
    if (old.kind, old.judged_by) == (new.kind, new.judged_by):
        return terms  # calibrated otherwise, cells would seem to be on equal terms
    had_model = structs.replace(old.model, configuration=new.model.configuration)
    names = terms + ["kind"] * (old.kind != new.kind) + ["model"] * (had_model != new.model)
    judging = [name for name in new.settings if name != "grid"]
    names += [name for name in judging if old.settings.get(name) != new.settings[name]]
    return names or ["the texts' content, or secateur's version"]


def _unequal_terms(earlier: Iterable[CellResult], cells: Iterable[Cell]) -> list[str]:
    """In what cells of one ablation of one method differ beside its value, sparsity and seed. Rows of such cells would
    pass for a spread over seeds, or for the value's doing."""
    terms = {(of.what, of.of): of.terms for cell in cells if (of := cell.ablation) is not None}
    names: dict[str, None] = {}
    for cell in earlier:
        of = cell.ablation
        if cell.done and of is not None and (wanted := terms.get((of.what, of.of))) is not None:
            had, wants = {**_EARLIER, **of.terms}, {**_EARLIER, **wanted}
            names |= {name: None for name in had if had[name] != wants.get(name)}
    return list(names)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """Processor, cores and threads, in one line."""
    name = platform.processor() or platform.machine()
    if _CPU.is_file():
        lines = _CPU.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    return f"{threads}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else threads
