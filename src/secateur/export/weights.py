"""The weights of a model in safetensors files, written block by block.

The files are those that `save_pretrained` writes, to the byte; but it takes all weights at once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from secateur.hf import generation_settings_aside
from secateur.model.stored import TensorFile
from secateur.quantities import bytes_of


class Parts(Protocol):
    """What `write_model` writes: a `Model`, or one that is made of a model's weights part by part."""

    hf: Any  # whose class and configuration are written, and say what the tensors are called in a file
    numbers: list[int]

    def state(self, number: int | None = None) -> dict[str, Tensor]:
        """What an open block holds, or (None) the open ends; those of closed parts are worth their shapes only."""

    def open(self, number: int) -> AbstractContextManager[Any]:
        """Have a block's weights present until the context ends."""

    def open_ends(self) -> AbstractContextManager[None]:
        """The same for what lies outside the blocks."""


def write_model(model: Parts, folder: Path, max_shard_size: str) -> dict[str, str]:
    """Write the configuration, the generation settings, the code that they name, and the weights.

    Each block is read once. The model's class and configuration say what its tensors are called in a file.

    Returns:
        The sha256 of each file with weights, by name.
    """
    with generation_settings_aside(model.hf):
        model.hf.save_pretrained(folder, state_dict={})  # all but the weights
    write_generation(model.hf.generation_config, folder)
    names = Names(model.hf)
    hollow = names.in_file(model.hf.state_dict(), hollow=True)
    part_of = {name: part for part in (None, *model.numbers) for name in names.in_file(model.state(part), hollow=True)}

    def read(part: int | None) -> dict[str, Tensor]:
        return names.in_file(model.state(part))

    with model.open_ends():
        return write_tensors(hollow, part_of, model.open, read, folder, max_shard_size)


def write_generation(settings: GenerationConfig | None, folder: Path) -> None:
    """Write a model's generation settings as they are: transformers saves none that contradict one another, although it
    loads them."""
    if settings is not None:
        settings = copy.deepcopy(settings)
        settings.compile_config = None  # of a run
        settings.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)


def write_tensors(
    hollow: Mapping[str, Tensor],
    part_of: Mapping[str, int | None],
    opened: Callable[[int], AbstractContextManager[Any]],
    read: Callable[[int | None], Mapping[str, Tensor]],
    folder: Path,
    max_shard_size: str,
) -> dict[str, str]:
    """Write tensors into safetensors files, with an index if there are several; the ends must be open.

    Args:
        hollow: all of them on `meta`, by their names in the files, in the order in which shards are filled.
        part_of: the block (None: the ends) that each belongs to.
        opened: has a block's weights present until its context ends; each block is opened once.
        read: gives the tensors of a part that is open.

    Returns:
        The sha256 of each file, by name.
    """
    split = split_torch_state_dict_into_shards(dict(hollow), max_shard_size=bytes_of(max_shard_size))
    if split.is_sharded:
        facts = {"total_parameters": sum(tensor.numel() for tensor in hollow.values()), **split.metadata}
        index = {"metadata": facts, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(closing(TensorFile(folder / file, {name: hollow[name] for name in inside})))
            for file, inside in split.filename_to_tensors.items()
        }
        for part, some in groupby(sorted(hollow), key=part_of.__getitem__):  # the order that each file has
            with nullcontext() if part is None else opened(part):
                state = read(part)
                for name in some:
                    files[split.tensor_to_filename[name]].put(name, state[name])
    return {file: written.sha256() for file, written in files.items()}


class Names:
    """Which of a model's tensors are saved, and under which names: transformers decides it, here for one part of the
    model at a time."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        state = {name: tensor.to("meta") for name, tensor in hf.state_dict().items()}
        ignored = hf._keys_to_ignore_on_save or ()
        self._saved = remove_tied_weights_from_state_dict(state, hf).keys() - set(ignored)

    def in_file(self, state: Mapping[str, Tensor], *, hollow: bool = False) -> dict[str, Tensor]:
        """The tensors of a part that are saved, as they are in the file: names, order and form.

        Args:
            hollow: without their values.
        """
        saved = {name: tensor.to("meta") if hollow else tensor for name, tensor in state.items() if name in self._saved}
        written: dict[str, Tensor] = revert_weight_conversion(self._hf, saved)
        return written
