"""What is known of a model without its weights, where its files are, and whether they are those that were written."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from secateur.assets.cache import sha256_of
from secateur.assets.hub import hub_error
from secateur.errors import CheckpointError, FetchError
from secateur.hf import quiet_transformers

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it


@dataclass(frozen=True)
class Description:
    """What is known of a model without its weights: on disk, on the hub, or in memory.

    Attributes:
        name: the folder or hub id, or other words for it: the subject of the messages.
        config: what its config.json says; empty where there is none.
        folder: where it lies, None on the hub or in memory.
        on_hub: whether further files may be asked of the hub.
        listing: names of its files, where they were asked of the hub.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None = None
    on_hub: bool = False
    revision: str | None = None
    listing: tuple[str, ...] = ()

    @property
    def type(self) -> str | None:
        """The model type; None where the configuration names none, or something that is no name."""
        return kind if isinstance(kind := self.config.get("model_type"), str) and kind else None

    def file(self, name: str) -> Path | None:
        """One of its files, if it is there; with HF_HUB_OFFLINE, if it was fetched before.

        Raises:
            FetchError: the hub has it or may have it, and does not give it.
        """
        if self.folder is not None:
            return path if (path := self.folder / name).is_file() else None
        if not self.on_hub:
            return None
        # The cache knows what a commit does not have, too.
        cached = try_to_load_from_cache(self.name, name, revision=self.revision) if self.pinned else None
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None
        try:
            with quiet_transformers():
                return Path(hf_hub_download(self.name, name, revision=self.revision))
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # of three HTTP stacks
            if is_offline_mode():
                return None
            # Taken for a file that is not there, it would cost a model its history or its tokenizer in silence.
            raise self.fetch_error(error) from error

    def fetch_error(self, error: Exception) -> FetchError:
        """What an exception of the hub's libraries means for this model."""
        instead = (
            f"'{self.name}' is no folder here either. HF_HUB_OFFLINE=1 takes what was fetched before. Without a hub: "
            "the path of a model folder, or the model 'demo'."
        )
        page = f"https://huggingface.co/{self.name}"
        return hub_error(self.name, error, page=page, instead=instead, revision=self.revision)

    def listed(self) -> Description:
        """The same with the names of its files on the hub, as far as it tells them; for `has`."""
        try:
            return replace(self, listing=tuple(HfApi().list_repo_files(self.name, revision=self.revision)))
        except Exception:  # they only serve a better message
            return self

    @property
    def pinned(self) -> bool:
        """Whether its revision is a commit, which never changes."""
        return re.fullmatch("[0-9a-f]{40}", self.revision or "") is not None

    @property
    def commit(self) -> str | None:
        """What the revision stands for on the hub; its cache has a folder per commit."""
        path = self.file("config.json") if self.on_hub else None
        return path.parent.name if path and re.fullmatch("[0-9a-f]{40}", path.parent.name) else None

    def json(self, name: str) -> dict[str, Any] | None:
        """One of its JSON files, if it is there; {} for one that cannot be read."""
        path = self.file(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def has(self, pattern: str) -> bool:
        """Whether one of its files, if they are known, is called so."""
        return bool(fnmatch.filter(self.listing, pattern) if self.folder is None else any(self.folder.glob(pattern)))


def describe(location: str, revision: str | None = None) -> Description:
    """Where a model's files are: in a folder, or on the hub. Nothing is read.

    Raises:
        CheckpointError: it can be neither.
    """
    folder = Path(location)
    here = os.path.exists(location)  # unlike Path.exists, false for a name that no folder can have
    if not here and (folder.is_absolute() or location.startswith((".", "~")) or len(folder.parts) > 2):
        raise CheckpointError(f"there is no folder {folder}")
    if os.path.isfile(location):
        raise CheckpointError(f"{folder} is a file; give the model's folder, with config.json and safetensors")
    return Description(location, {}, folder if here else None, not here, revision)


# --- sums of the weight files, beside them ---


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the sha256 of files, by name, beside them."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / SUMS).write_text(text, encoding="utf-8")


def verify_weights(about: Description) -> bool:
    """Compare the weight files with the sums beside them; a checkpoint without sums is left alone.

    Reading is all it costs, about a second per gigabyte; but files of the hub are fetched if they are not there yet.

    Returns:
        Whether there were sums to compare with.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    path = about.file(SUMS)
    if path is None:
        return False
    for name, digest in _sums(path).items():
        weights = about.file(name)
        if weights is None:
            instead = "it was not uploaded, or cannot be fetched now" if about.on_hub else "restore it from a copy"
            raise CheckpointError(f"{about.name} has no {name}, which {SUMS} lists; {instead}")
        if sha256_of(weights) != digest:
            raise CheckpointError(
                f"{weights} is not the file that secateur wrote: its sha256 differs from {SUMS}. If it is "
                f"damaged, restore it from a copy; if it was changed on purpose, take {SUMS} away"
            )
    return True


def weight_files(folder: Path) -> list[str]:
    """The files with weights that secateur wrote into a folder, whether or not they are still there."""
    return list(_sums(path)) if (path := folder / SUMS).is_file() else []


def _sums(path: Path) -> dict[str, str]:
    """The sha256 of each file that a checkpoint's sums list, by name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    sums = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or Path(name).name != name:
            raise CheckpointError(f"{path} is damaged: {line[:80]!r} is no line of a sha256 and a file's name")
        sums[name] = digest
    return sums
