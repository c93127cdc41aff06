"""Saving: tier A (a stock architecture) where the layout allows, else tier B (our own model type)."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.errors import CheckpointError, InvalidOptionError, OutputError, OutputExistsError
from secateur.folders import disk_full_as_oserror, new_folder, resolved
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.model.modeling_secateur import MODEL_FOR_CAUSAL_LM_MAPPING, plain_config
from secateur.model.refusals import Description
from secateur.record import RECORD

Tier = Literal["A", "B"]
SUMS = "SHA256SUMS"  # of the weight files, as `sha256sum -c` reads it


def tier(model: Model) -> Tier:
    """The most widely loadable tier that is exact.

    A: the unmodified architecture; loads everywhere. B: stock tensor names under a model type of our own; loads in
    transformers with `import secateur`, or with `trust_remote_code=True` through the modeling file beside it.
    """
    return "A" if _stock_config(model) is not None else "B"


def save(
    model: Model,
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Tier:
    """Write the model, its tokenizer and further text files into `folder`, whole or not at all.

    Args:
        files: name -> content; record and card.
        overwrite: replace a folder that is there.
        max_shard_size: larger models are sharded, with an index.

    Raises:
        What `check_output` raises.
    """
    check_output(folder, overwrite=overwrite, max_shard_size=max_shard_size)
    stock = _stock_config(model)
    with new_folder(folder, overwrite=overwrite) as partial, disk_full_as_oserror():
        with quiet_transformers():
            with _as_stock(model, stock) if stock is not None else nullcontext():
                model.hf.save_pretrained(partial, max_shard_size=max_shard_size)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(partial)
        for name, content in (files or {}).items():
            # an input's name may have bytes that are no UTF-8 (surrogates here): a record must not fail over them
            (partial / name).write_bytes(content.encode("utf-8", "backslashreplace"))
        sums = ""
        for weights in sorted(partial.glob("*.safetensors")):
            weights.chmod((partial / "config.json").stat().st_mode)  # safetensors makes them private; the usual mode
            sums += f"{_sha256(weights)}  {weights.name}\n"
        (partial / SUMS).write_text(sums, encoding="utf-8")
    return "A" if stock is not None else "B"


@contextmanager
def _as_stock(model: Model, stock: PreTrainedConfig) -> Iterator[None]:
    """For the time of the context the model is of its stock class, which may rename tensors as it writes them."""
    hf, config, adopted = model.hf, model.hf.config, type(model.hf)
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(stock)]
    hf.__class__, hf.config = stock_class, stock
    try:
        yield
    finally:
        hf.__class__, hf.config = adopted, config


def verify_weights(about: Description) -> bool:
    """Compare the weight files with the sums that `save` wrote; a checkpoint without sums is left alone.

    Reading is all it costs, about a second per gigabyte; but files of the hub are fetched if they are not there yet.
    `sha256sum -c SHA256SUMS` does the same.

    Returns:
        Whether there were sums to compare with.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    path = about.file(SUMS)
    if path is None:
        return False
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or Path(name).name != name:
            raise CheckpointError(f"{path} is damaged: {line[:80]!r} is no line of a sha256 and a file's name")
        weights = about.file(name)
        if weights is None:
            instead = "it was not uploaded, or cannot be fetched now" if about.on_hub else "restore it from a copy"
            raise CheckpointError(f"{about.name} has no {name}, which {SUMS} lists; {instead}")
        if _sha256(weights) != digest:
            raise CheckpointError(
                f"{weights} is not the file that secateur wrote: its sha256 differs from {SUMS}. If it is "
                f"damaged, restore it from a copy; if it was changed on purpose, take {SUMS} away"
            )
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(folder: Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
    """Raise what `save` would raise for its arguments; for callers that work for hours first.

    Raises:
        OutputExistsError: the folder is there and not to be overwritten; or it is, but secateur did not write it.
        OutputError: nothing can be written there.
        InvalidOptionError: the size is none.
    """
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?B", max_shard_size.strip(), re.IGNORECASE):
        raise InvalidOptionError(f"the shard size is a number with a unit, as 5GB or 500MB, not {max_shard_size!r}")
    folder = resolved(folder)
    if folder.exists():
        if not folder.is_dir():
            raise OutputExistsError(f"{folder} is a file; a folder is needed")
        if not (folder / RECORD).is_file() and any(folder.iterdir()):
            raise OutputExistsError(
                f"{folder} holds something that secateur did not write; it is not overwritten: choose another folder"
            )
        if not overwrite:
            raise OutputExistsError(f"{folder} exists; choose another folder, or ask for it to be overwritten")
    parent = next(path for path in folder.parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise OutputError(f"{folder} cannot be written: no right to write in {parent}")


def _stock_config(model: Model) -> PreTrainedConfig | None:
    """The configuration of the unmodified architecture; None where it cannot hold the layout."""
    layout, family = model.layout(), model.family
    if not layout.uniform:
        return None
    first = next(iter(layout.blocks.values()))
    shape, config = first.shape, model.hf.config
    if not family.free_head_dim and shape.query_heads * first.head_dim != config.hidden_size:
        return None
    plain: Any = plain_config(config, family, [shape])
    values: dict[str, Any] = {family.width: shape.width, family.query_heads: shape.query_heads}
    if family.kv_heads:
        values[family.kv_heads] = shape.kv_heads
    if family.free_head_dim:
        values["head_dim"] = first.head_dim
    for name, value in values.items():
        setattr(plain, name, value)
    stock_class: Any = CONFIG_MAPPING[family.model_type]
    stock: Any = copy.deepcopy(plain)
    stock.__class__ = stock_class
    stock.__dict__.pop("model_type", None)  # the class has it
    if getattr(stock, "auto_map", None):
        del stock.auto_map
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_class]
    stock.architectures = [stock_model.__name__]
    stock.dtype = str(model.dtype).removeprefix("torch.")
    try:
        stock.validate()  # Llama's own check wants a hidden size that the number of heads divides
    except StrictDataclassError:
        return None
    return stock
