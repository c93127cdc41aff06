"""Data sets of the hub, and data sets saved to disk: everything that needs the package `datasets`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.constants import ENV_VARS_TRUE_VALUES
from huggingface_hub.errors import HfHubHTTPError

from secateur.assets.catalog import KnownText, Place
from secateur.assets.rows import table_columns
from secateur.errors import DataError, FetchError, MissingExtraError

_NOT_THERE = {
    "RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError", "RemoteEntryNotFoundError",
}  # fmt: skip
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_NO_PLACE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_INSTEAD = "Without a hub: --data DIR (or SECATEUR_DATA) with the text, a file of your own, or the text 'demo'."


def load_hub(known: KnownText, place: Place) -> list[str]:
    """The documents of a hub data set.

    Raises:
        FetchError: the hub cannot be reached or refuses.
        MissingExtraError: `datasets` is not here.
    """
    datasets = _datasets(f"reading {known.repository} from the hub")
    split = place.splits[0]
    # Whatever goes wrong below goes wrong inside these two libraries or the network, in dozens of exception
    # classes of three HTTP stacks; each of them is for the user a fetch that failed.
    try:
        with _quiet(datasets):
            rows = datasets.load_dataset(
                known.repository,
                known.config,
                data_files={split: place.data_file} if place.data_file else None,
                split=split,
                revision=known.revision,
                # A stream reads the few megabytes that are asked for, not the shard of hundreds.
                streaming=place.documents is not None,
            )
            return [row["text"] for row in itertools.islice(rows, place.documents)]
    except Exception as error:
        page = f"https://huggingface.co/datasets/{known.repository}"
        raise hub_error(known.repository, error, page=page, instead=_INSTEAD, revision=known.revision) from error


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


def hub_error(repository: str, error: Exception, *, page: str, instead: str, revision: str | None = None) -> FetchError:
    """What failed, and the way out, from any exception of the hub's libraries.

    Args:
        page: where the repository is shown, and its licence accepted.
        instead: what can be done without a hub.
        revision: that was asked for.
    """
    if isinstance(error, FetchError):
        return error
    chain = list(_causes(error))
    names = {cls.__name__ for cause in chain for cls in type(cause).__mro__}
    answer = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    status = getattr(answer and answer.response, "status_code", None)
    cause = answer or chain[-1]  # transformers and `datasets` put words of their own around it
    said = f"({type(cause).__name__}: {' '.join(str(cause).split())[:300]})"
    token = "give your token by `hf auth login` or HF_TOKEN"
    if "GatedRepoError" in names or any("is a gated dataset" in str(cause) for cause in chain):
        return FetchError(f"{repository} is gated: accept its licence at {page}, then {token}. {said}")
    if any("Invalid credentials" in str(cause) for cause in chain):
        return FetchError(f"cannot fetch {repository}: the hub does not know your token; {token} anew. {said}")
    not_cached = "LocalEntryNotFoundError" in names and is_offline_mode()
    if not_cached or any("OfflineModeIsEnabled" in f"{type(cause).__name__} {cause}" for cause in chain):
        return FetchError(f"cannot fetch {repository}: {_offline_by()} is set; unset it. {instead} {said}")
    if "RevisionNotFoundError" in names:
        asked = f"revision '{revision}'" if revision else "such revision"
        return FetchError(f"{repository} has no {asked}: a branch, a tag or a whole commit of {page}/tree/main. {said}")
    if names & _NOT_THERE:
        return FetchError(
            f"the hub has no {repository} as it was asked for, or it is private: look at {page}; for a "
            f"private one {token}. {said}"
        )
    if status in (401, 403):
        return FetchError(
            f"the hub refuses {repository}: your token needs the right to read it, and {page} may say more. {said}"
        )
    if status is not None:
        return FetchError(f"the hub cannot serve {repository} now (status {status}): try again later. {instead} {said}")
    if any(isinstance(cause, OSError) and cause.errno in _NO_PLACE for cause in chain):
        return FetchError(f"cannot write {repository} to the hub's cache: make room, or set HF_HOME. {said}")
    return FetchError(
        f"could not fetch {repository} from the hub: check the network, the proxy and HF_ENDPOINT. {instead} {said}"
    )


def _offline_by() -> str:
    """The variable that forbids asking the hub, whichever of its libraries reads it."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ENV_VARS_TRUE_VALUES), _OFFLINE[0])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


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
