"""Where a result goes: its folder is checked before any work, claimed during it, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from msgspec.structs import replace

from secateur.card import card, export_card
from secateur.errors import InvalidOptionError, OutputExistsError
from secateur.export import Tier, check_output, export_options, nbytes, require_export
from secateur.export import export as write_export
from secateur.export import save as save_checkpoint
from secateur.export.beside import licence_of
from secateur.folders import claimed, require_space, resolved
from secateur.model.described import weight_files
from secateur.model.handle import Model
from secateur.model.load import Source
from secateur.record import RECORD, Record, dump, read_record


class Result(Protocol):
    """What is written: a model with the account of how it came to be (`Pruned`, `Recovered`)."""

    @property
    def model(self) -> Model: ...

    @property
    def record(self) -> Record: ...


@dataclass(frozen=True)
class Outcome:
    """What a folder holds in the end.

    Attributes:
        was_there: by an earlier run of the same job; nothing was done.
    """

    record: Record
    was_there: bool


@dataclass(frozen=True)
class Output:
    """A folder that a pruning or a recovery is to write.

    Attributes:
        overwrite: replace it if it is there.
        max_shard_size: larger models are saved in shards, as "5GB".
        keep_run: leave the folder beside it, from which a killed run goes on, when it is written.
        keep_states: as `Run` has it.
    """

    folder: Path
    overwrite: bool = False
    max_shard_size: str = "5GB"
    keep_run: bool = False
    keep_states: int = 0

    def check(self, *inputs: object) -> None:
        """Refuse, before any work, what could not be written in the end.

        Args:
            inputs: models and texts that are read; the folder must not hold one that names a file or folder here.

        Raises:
            OutputExistsError, OutputError: the folder cannot be written, see `check_output`. One that holds a record is
                let through, since it may be this very result: `holds` tells.
            InvalidOptionError: it holds an input, or the shard size is none.
        """
        target = resolved(self.folder)
        if self.overwrite or not (target / RECORD).is_file():
            check_output(self.folder, overwrite=self.overwrite, max_shard_size=self.max_shard_size)
        for name in inputs:
            if not isinstance(name, (str, Path)) or not name:
                continue
            if os.path.exists(name) and target in (Path(name).resolve(), *Path(name).resolve().parents):
                raise InvalidOptionError(
                    f"--out {self.folder} holds {name}, which this run reads; choose another folder"
                )

    def holds(self, fingerprint: str) -> Record | None:
        """The folder's record if it has the result of this identity already, and is not to be overwritten; None if
        there is nothing.

        Raises:
            OutputExistsError: it holds something else, or not all files of that result.
        """
        folder = resolved(self.folder)
        if self.overwrite or not folder.exists():
            return None
        record = read_record(folder) if folder.is_dir() else None
        if record is not None and record.fingerprint == fingerprint:
            if missing := [name for name in weight_files(folder) if not (folder / name).is_file()]:
                raise OutputExistsError(
                    f"{self.folder} holds this result without {', '.join(missing)}; give --overwrite, or another --out"
                )
            return record
        what = "another pruning or recovery" if record else "something that secateur did not write"
        raise OutputExistsError(f"{self.folder} exists and holds {what}; choose another --out, or give --overwrite")

    def write(self, result: Result) -> Tier:
        """Write a checkpoint with record and card; return its tier.

        Raises:
            OutputExistsError: the folder is there and not to be overwritten.
        """
        files = {RECORD: dump(result.record), "README.md": card(result.record, licence=licence_of(result.model))}
        return save_checkpoint(
            result.model, self.folder, files=files, overwrite=self.overwrite, max_shard_size=self.max_shard_size
        )


def save(result: Result, folder: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> Tier:
    """Write a checkpoint with record and card, whole or not at all; return its tier.

    Args:
        result: what `prune` or `recover` returned. A model without an account is saved by its own `save_pretrained`.

    Raises:
        OutputExistsError: the folder exists and `overwrite` is off.
        InvalidOptionError: it is no result.
    """
    if not (isinstance(getattr(result, "record", None), Record) and isinstance(result.model, Model)):
        raise InvalidOptionError(
            f"save takes what prune or recover returned, with its record, not a {type(result).__name__}; "
            "a transformers model alone is saved by its save_pretrained"
        )
    return Output(Path(folder), overwrite, max_shard_size).write(result)


def export(
    model: Model | Result,
    to: str,
    folder: str | Path,
    *,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Write a model for an engine, with a card, whole or not at all.

    Args:
        model: what `load`, `prune` or `recover` returned; it stays as it is.
        to: a format of `secateur.export.EXPORTS`.
        options: of the format: `type` of gguf, `max_shard_size` of the others.

    Raises:
        UnsupportedExportError: the format cannot hold the model exactly; says which can.
        OutputExistsError: the folder exists and `overwrite` is off.
        OutputBusyError, OutputError: another process is about to write it, or it cannot be written.
    """
    record = None if isinstance(model, Model) else model.record
    model = model if isinstance(model, Model) else model.model
    output = Output(Path(folder), overwrite)
    check_output(output.folder, overwrite=overwrite)
    with claimed(output.folder):
        _export(model, record, to, output, options)


def _export(model: Model, record: Record | None, to: str, output: Output, options: Mapping[str, Any]) -> None:
    """Write an export with its card into a folder that is claimed."""
    if record is None and model.parents:
        record = replace(model.parents[-1], parents=model.parents[:-1])
    form = require_export(model, to, **options)
    kept = export_options(to, options).get("type")
    text = export_card(
        model.source, record, to, form.loads_in(model), kept=kept, library=form.LIBRARY, usage=form.USAGE,
        licence=licence_of(model),
    )  # fmt: skip
    write_export(model, to, output.folder, files={"README.md": text}, overwrite=output.overwrite, **options)


def export_to(source: Source, to: str, output: Output, **options: Any) -> str:
    """Load a model and write it for an engine; what can be refused is refused before a weight is read.

    Returns:
        What loads it, in words.

    Raises:
        OutputBusyError, OutputError: another process is about to write the folder, or it cannot be written.
        SecateurError: what `export`, `load` and `Output.check` raise.
    """
    check_output(output.folder, overwrite=output.overwrite)
    output.check(source.name)
    with claimed(output.folder):
        hollow = source.hollow(tokenizer=True)
        loads_in = require_export(hollow, to, **options).loads_in(hollow)
        require_space(output.folder, nbytes(hollow, to, **options))
        _export(source.load(), None, to, output, options)
    return loads_in
