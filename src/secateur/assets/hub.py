"""Data sets of the hub, and data sets saved to disk: everything that needs the package `datasets`."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.assets.catalog import KnownText, Place
from secateur.assets.rows import table_columns
from secateur.errors import DataError, FetchError, MissingExtraError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_THERE = {
    "RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError", "RevisionNotFoundError",
    "EntryNotFoundError",
}  # fmt: skip
_INSTEAD = "Without a hub: --data DIR (or SECATEUR_DATA) with the text, a file of your own, or the text 'demo'."


def load_hub(known: KnownText, place: Place) -> tuple[list[str], str]:
    """The documents of a hub data set, and the commit they were read at.

    Raises:
        FetchError: the hub cannot be reached or refuses.
        MissingExtraError: `datasets` is not here.
    """
    datasets = _datasets(f"reading {known.repository} from the hub")
    split = place.splits[0]
    # Whatever goes wrong below goes wrong inside these two libraries or the network, in dozens of exception
    # classes of three HTTP stacks; each of them is for the user a fetch that failed.
    try:
        revision = _resolve(known)
        with _quiet(datasets):
            rows = datasets.load_dataset(
                known.repository,
                known.config,
                data_files={split: place.data_file} if place.data_file else None,
                split=split,
                revision=revision,
                # A stream reads the few megabytes that are asked for, not the shard of hundreds.
                streaming=place.documents is not None,
            )
            return [row["text"] for row in itertools.islice(rows, place.documents)], revision
    except Exception as error:
        page = f"https://huggingface.co/datasets/{known.repository}"
        raise hub_error(known.repository, error, page=page, instead=_INSTEAD) from error


def open_folder(path: Path) -> Any:
    """The `Dataset` or `DatasetDict` that `save_to_disk` wrote. Raises DataError or MissingExtraError."""
    datasets = _datasets(f"reading {path}")
    try:
        with _quiet(datasets):
            return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a data set written by datasets.save_to_disk: {error}") from error


def load_folder(path: Path, splits: tuple[str, ...], documents: int | None) -> tuple[list[str], str | None]:
    """The first `documents` (None: all) of a folder that `save_to_disk` wrote, and their split if named.

    Of several splits, the first of `splits` that is there. Raises DataError or MissingExtraError.
    """
    loaded = open_folder(path)
    wanted = " or ".join(f"'{split}'" for split in splits)
    if isinstance(loaded, dict):  # a DatasetDict
        split = next((split for split in splits if split in loaded), None)
        if split is None:
            raise DataError(f"{path} has the splits {', '.join(loaded)}; {wanted} is needed.")
        loaded = loaded[split]
    else:
        # A slice calls itself "train[:1000]"; an unnamed one is taken at its folder's word.
        split = str(loaded.split).split("[")[0] if loaded.split is not None else None
        if split is not None and split not in splits:
            raise DataError(f"{path} holds the split '{split}'; {wanted} is needed.")
    if "text" not in loaded.column_names:
        raise DataError(f"{path} has the columns {', '.join(loaded.column_names)}; it needs one called 'text'.")
    return list(loaded[:documents]["text"]), split


def is_dataset(source: object) -> bool:
    """Whether it is a `datasets.Dataset`; the package is imported then."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset)


def dataset_rows(
    dataset: Any, field: str | None, where: str = "the data set"
) -> tuple[str, Iterator[tuple[str, object]], dict[str, str]]:
    """Of a `datasets.Dataset` its name, (where, row) of every row with the columns that are read, and what is known.

    Raises:
        DataError: no column holds text.
    """
    columns = table_columns(dataset.column_names, where, field)
    facts = {"source": "dataset"} | ({"split": str(dataset.split)} if dataset.split is not None else {})
    rows = enumerate(dataset.with_format(None).select_columns(columns), start=1)
    # What was read from files goes by its reader's name.
    name = dataset.info.dataset_name if dataset.info.dataset_name != dataset.info.builder_name else "a data set"
    return name, ((f"{where}, row {number}", row) for number, row in rows), facts


def _resolve(source: KnownText) -> str:
    """The commit that the source's revision stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        sha = HfApi().dataset_info(source.repository, revision=source.revision).sha
    except OfflineModeIsEnabled:
        # A pinned commit needs no resolving, and `datasets` may have it in its own cache.
        if source.revision is not None and _COMMIT.fullmatch(source.revision):
            return source.revision
        raise
    if sha is None:
        raise FetchError(f"the hub names no commit for {source.repository}, revision {source.revision}.")
    return sha


def hub_error(repository: str, error: Exception, *, page: str, instead: str) -> FetchError:
    """What failed, and the way out, from any exception of the hub's libraries.

    Args:
        page: where the repository is shown, and its licence accepted.
        instead: what can be done without a hub.
    """
    if isinstance(error, FetchError):
        return error
    chain = list(_causes(error))
    names = {cls.__name__ for cause in chain for cls in type(cause).__mro__}
    said = f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    if "GatedRepoError" in names or any("gated" in str(cause).lower() for cause in chain):
        return FetchError(
            f"{repository} is gated: accept its licence at {page}, then give your token by `hf auth login` "
            f"or HF_TOKEN. {said}"
        )
    if "OfflineModeIsEnabled" in names or any("OfflineModeIsEnabled" in str(cause) for cause in chain):
        return FetchError(f"cannot fetch {repository}: HF_HUB_OFFLINE is set; unset it. {instead} {said}")
    if names & _NOT_THERE:
        return FetchError(
            f"the hub has no {repository} as it was asked for, or it is private: look at {page}; for a "
            f"private one give your token by `hf auth login` or HF_TOKEN. {said}"
        )
    return FetchError(
        f"could not fetch {repository} from the hub: check the network, the proxy and HF_ENDPOINT. {instead} {said}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError.of("datasets", "data", purpose) from None
    return datasets


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars from `datasets`, which is put back as it was: only the CLI shows progress."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
