"""What lies beside a model's weights and pruning does not change: its tokenizer's files, licences and notices.

They are copied as they are. A tokenizer that was changed in memory is written anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.repocard import metadata_load
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file

from secateur.errors import CheckpointError, FetchError
from secateur.export.spelling import TOKENIZER_CONFIG, add_old_tokenizer_class
from secateur.model.described import Description, describe
from secateur.model.handle import Model

logger = logging.getLogger(__name__)

# Whatever a licence asks to be handed on, by whatever name; code and weights are never among it.
_LICENCE = re.compile(
    r"licen[cs]e|notice|copying|copyright|patents|legal|policy|agreement|terms|disclaimer|use.guide|openrail"
    r"|acceptable.?use|third.?party|attribution|authors|credits|(?<![a-z])(eula|rail)(?![a-z])",
    re.IGNORECASE,
)
_LICENCE_FOLDER = "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee][Ss]"  # whatever lies below it, however deep
_NO_TEXT = (
    ".py", ".ipynb", ".sh", ".so", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
    ".pkl", ".npz", ".parquet", ".zip", ".gz", ".tar",
)  # fmt: skip
# What transformers' tokenizers, and converters to other formats, read: vocabularies, and what lies around them.
_VOCABULARY = re.compile(
    r"(vocab|tekken)\.json|merges\.txt|vocab\.txt|bpe\.codes|[\w.-]+\.tiktoken"
    r"|[\w.-]*(tokenizer|spiece|sentencepiece|bpe)[\w.-]*\.model[\w.]*"
)
_TOKENIZER = re.compile(
    r"(tokenizer[\w.-]*|special_tokens_map|added_tokens|chat_template|normalizer)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja|" + _VOCABULARY.pattern
)
_OF_A_VOCABULARY = ("model", "normalizer", "pre_tokenizer")  # in tokenizer.json: what vocabulary files say too
_OF_A_CALL = ("truncation", "padding")  # in tokenizer.json: what the last call asked for
_OF_A_PLACE = ("is_local", "local_files_only", "name_or_path")  # in tokenizer_config.json


def write_beside(model: Model, folder: Path) -> None:
    """Put tokenizer and licences into a folder that has the configuration already."""
    if (origin := _origin(model.hf.config._name_or_path, model)) is not None:
        _copy(origin, filter(_is_licence, _names(origin)), folder)
    if model.tokenizer is not None:
        _write_tokenizer(model.tokenizer, _origin(model.tokenizer.name_or_path, model), folder)


def licence_of(model: Model) -> str | None:
    """The licence that the checkpoint's card or secateur's catalogue states."""
    if licence := model.source.get("licence") or model.source.get("license"):
        return str(licence)
    origin = _origin(model.hf.config._name_or_path, model)
    try:
        card = origin.file("README.md") if origin else None
        stated = (metadata_load(card) or {}).get("license") if card else None
    except Exception:  # the hub's, or of whatever the reader of YAML is; what was pruned is not lost over it
        return None
    return stated if isinstance(stated, str) else None


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, origin: Description | None, folder: Path) -> None:
    """Copy the tokenizer's files where they make this very tokenizer, else write what it is now.

    Of one that was written anew the files of an unchanged vocabulary still come along: converters read them.
    """
    copied = _copy(origin, filter(_TOKENIZER.fullmatch, _names(origin)), folder) if origin else []
    original, contents = _loaded(folder) if copied else None, _contents(tokenizer)
    if (before := None if original is None else _contents(original)) != contents:
        same = original is not None and before is not None and _same_vocabulary(original, before, tokenizer, contents)
        vocabulary = [path for path in copied if same and _VOCABULARY.fullmatch(path.name)]
        for path in set(copied).difference(vocabulary):
            path.unlink()
        tokenizer.save_pretrained(folder)
        if vocabulary and ((written := _loaded(folder)) is None or _contents(written) != contents):
            for path in vocabulary:  # they are in the way of what was changed
                path.unlink()
            tokenizer.save_pretrained(folder)
    add_old_tokenizer_class(folder)


def _loaded(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a folder's files make; None where they make none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # the tokenizers' own errors are plain ones; the one in memory is written then
        return None
    return tokenizer


def _same_vocabulary(
    original: PreTrainedTokenizerBase, before: dict[str, Any], tokenizer: PreTrainedTokenizerBase, now: dict[str, Any]
) -> bool:
    """Whether all tokens of the original have their ids still and texts are split as before; tokens may be added.

    Args:
        before, now: the two tokenizers' `_contents`.
    """
    files = [contents.get("tokenizer.json", {}) for contents in (before, now)]
    unchanged = all(files[0].get(part) == files[1].get(part) for part in _OF_A_VOCABULARY)
    return unchanged and original.get_vocab().items() <= tokenizer.get_vocab().items()


def _contents(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that a tokenizer is, by the files that it writes."""
    with TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        contents: dict[str, Any] = {path.name: path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
    for file, passing in (("tokenizer.json", _OF_A_CALL), (TOKENIZER_CONFIG, _OF_A_PLACE)):
        if file in contents:
            contents[file] = {key: value for key, value in json.loads(contents[file]).items() if key not in passing}
    return contents


def _origin(location: str, model: Model) -> Description | None:
    """Where something was read from; None for what was made in memory, or is not there any more."""
    revision = model.source.get("revision") if location == model.source.get("repository") else None
    with contextlib.suppress(CheckpointError):
        origin = describe(location, revision) if location else None
        # a name of the hub is one that its cache has: a folder that was moved away is not looked for elsewhere
        if origin and (origin.folder or _snapshot(origin)):
            return origin
    return None


def _snapshot(origin: Description) -> Path | None:
    """The folder in the hub's cache that has what was fetched so far."""
    for name in (CONFIG_NAME, TOKENIZER_CONFIG):
        with contextlib.suppress(OSError, ValueError):  # as transformers says that it is not there
            if path := cached_file(origin.name, name, revision=origin.revision, local_files_only=True):
                return Path(path).parent
    return None


def _names(origin: Description) -> list[str]:
    """Its files, in its folder, those right below and licences' folders, with paths as a hub has them."""
    folder = origin.folder or _snapshot(origin)
    if origin.folder is None:
        if listing := origin.listed().listing:
            return list(listing)
        logger.warning("%s: only what is in the hub's cache is handed on, since the hub does not answer", origin.name)
    patterns = ("*", "[!.]*/*", f"{_LICENCE_FOLDER}/*/**/*")
    paths = [path for pattern in patterns for path in folder.glob(pattern)] if folder else []
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()] if folder else []


def _is_licence(name: str) -> bool:
    """Whether a file's name, or that of the folder it lies in, speaks of a licence."""
    parts = name.split("/")
    near = len(parts) <= 2 or fnmatchcase(parts[0], _LICENCE_FOLDER)
    text = not name.lower().endswith(_NO_TEXT) and not any(part.startswith(".") for part in parts)
    return near and text and bool(_LICENCE.search(name))


def _copy(origin: Description, names: Iterable[str], folder: Path) -> list[Path]:
    """Copy the given files of it; those that cannot be had are left out. Returns the copies."""
    copied = []
    for name in names:
        try:
            if path := origin.file(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copied.append(Path(shutil.copyfile(path, folder / name)))
        except (FetchError, PermissionError) as error:  # what was pruned is not lost over it
            logger.warning("%s is not handed on: %s", name, error)
    return copied
