"""Models larger than memory: the weights stay in their files, and come in block by block."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key

from secateur.errors import CheckpointError, InvalidEditError, UnsupportedModelError
from secateur.hf import quiet_transformers
from secateur.model.described import Description
from secateur.model.handle import WHOLE, Model
from secateur.model.memory import trim_heap
from secateur.model.shelf import Home, Shelf
from secateur.model.stored import Stored, floating_dtype, stored_in, weight_files
from secateur.model.views import Block, Original, twin
from secateur.record import Facts


@dataclass(frozen=True)
class _Lent:
    """A parameter of an open part as it came out of its home."""

    parameter: weakref.ReferenceType[nn.Parameter]
    version: int
    address: int
    home: Home

    @classmethod
    def of(cls, parameter: nn.Parameter, home: Home) -> _Lent:
        return cls(weakref.ref(parameter), parameter._version, parameter.data_ptr(), home)

    def is_still(self, parameter: nn.Parameter) -> bool:
        same = self.parameter() is parameter and self.version == parameter._version
        return same and self.address == parameter.data_ptr()


class StreamedModel(Model):
    """A model whose weights lie in files: a block has weights only inside `open`, what lies outside the blocks only
    inside `open_ends`; all else is on `meta`, buffers apart.

    Contexts may be nested and several blocks open at a time; each is in memory until its outermost context ends, and
    the block after it is being read meanwhile. What was changed must have been opened for writing; it goes to a scratch
    folder, and comes back from there. Handles to parameters are worth nothing once their part is closed.

    Args:
        hf: on `meta`, its buffers on the device; see `skeleton`.
        stored: where its tensors lie, by their names in its `state_dict`; see `named`.
        device: where what is open lies.
        scratch: the folder in which that for edited blocks is made; the system's for temporary files if None.

    Attributes:
        openings: how often each block (None: the ends) came in.

    Raises:
        UnsupportedModelError: it cannot be read block by block.
    """

    is_streamed = True

    def __init__(
        self,
        hf: Any,
        stored: Mapping[str, Stored],
        *,
        device: torch.device,
        scratch: Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: Facts | None = None,
    ) -> None:
        super().__init__(hf, tokenizer, source)
        self.openings: Counter[int | None] = Counter()
        self._device = torch.empty(0, device=device).device  # "cuda" with its number
        self._shelf = Shelf(self._device, scratch)
        self._entered: Counter[int | None] = Counter()  # how often each of those that are open
        self._lent: dict[int | None, list[_Lent]] = {}
        self._writable: set[int | None] = set()
        self._last: int | None = None
        self._homes: dict[int | None, list[Home]] = {
            part: [_home(names, parameter, stored) for parameter, names in self._parameters(part)]
            for part in (None, *self.numbers)
        }

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def scratch(self) -> Path:
        return self._shelf.folder

    @property
    def bytes_read(self) -> int:
        """Of files, so far."""
        return self._shelf.bytes_read

    @contextmanager
    def open(self, number: int, *, write: bool = False) -> Iterator[Block]:
        place = self.position(number)
        with self._present(number, write):
            yield Block(number, self.blocks[place], self.family)

    @contextmanager
    def open_ends(self, *, write: bool = False) -> Iterator[None]:
        with self._present(None, write):
            yield

    def original(self, number: int) -> Original:
        """Holds no weights while it is closed: they are read again from where they lie now."""
        block = Block(number, twin(self.blocks[self.position(number)]), self.family)
        slots = _slots_of(block.module)
        homes = self._homes[number]
        if number in self._writable:  # what it is by now lies nowhere yet
            names = {str(place): parameter for place, (parameter, _) in enumerate(_unique(slots))}
            homes = list(self._shelf.put(names).values())
        _fill(slots, [torch.empty_like(parameter, device="meta") for parameter, _ in _unique(slots)])
        return _StreamedOriginal(block, homes, self._shelf)

    def edited(self) -> None:
        kept = [self._homes[number] for number in self.numbers]
        super().edited()
        self._homes = {None: self._homes[None], **dict(enumerate(kept))}

    @contextmanager
    def _present(self, part: int | None, write: bool) -> Iterator[None]:
        if not self._entered[part]:
            self._bring(part)
        self._entered[part] += 1
        if write:
            self._writable.add(part)
        try:
            yield
        finally:
            self._entered[part] -= 1
            if not self._entered[part]:
                self._put_away(part)

    def _bring(self, part: int | None) -> None:
        homes = self._homes[part]
        with torch.inference_mode(False):  # what that makes has no version, by which a change is noticed
            self._fill(part, self._shelf.fetch(homes))
        self._lent[part] = [
            _Lent.of(parameter, home) for (parameter, _), home in zip(self._parameters(part), homes, strict=True)
        ]
        self.openings[part] += 1
        if part is None:
            return
        place = self.position(part)
        in_order = place == 0 or self._last == self.numbers[place - 1]
        self._last = part
        if in_order and place + 1 < len(self.numbers) and not self._entered[after := self.numbers[place + 1]]:
            self._shelf.read_ahead(self._homes[after])

    def _put_away(self, part: int | None) -> None:
        lent, writable = self._lent.pop(part), part in self._writable
        self._writable.discard(part)
        if part is not None and part not in self.numbers:  # it was dropped while it was open
            return
        present = {names[0]: parameter for parameter, names in self._parameters(part)}
        by_id = {id(parameter): each for each in lent if (parameter := each.parameter()) is not None}
        homes = {
            name: each.home
            for name, parameter in present.items()
            if (each := by_id.get(id(parameter))) is not None and each.is_still(parameter)
        }
        changed = {name: parameter for name, parameter in present.items() if name not in homes}
        same = not changed and len(homes) == len(lent)
        if not same and writable:
            homes |= self._shelf.put(changed) if changed else {}
            self._homes[part] = [homes[name] for name in present]
        self._fill(part, [torch.empty_like(parameter, device="meta") for parameter in present.values()])
        trim_heap()
        if not same and not writable:
            what = "what lies outside the blocks" if part is None else f"block {part}"
            raise InvalidEditError(f"{what} was changed, but not opened for writing (`write=True`); the change is lost")

    def _parameters(self, part: int | None) -> list[tuple[nn.Parameter, list[str]]]:
        """Those of a part, shared ones once, each with all its names in the model's `state_dict`."""
        return _unique(self._slots(part))

    def _slots(self, part: int | None) -> list[_Slot]:
        blocks = self.family.blocks
        if part is not None:
            return _slots_of(self.blocks[self.position(part)], f"{blocks}.{self.position(part)}")
        return [slot for slot in _slots_of(self.hf) if not slot[1].startswith(f"{blocks}.")]

    def _fill(self, part: int | None, tensors: Sequence[Tensor]) -> None:
        _fill(self._slots(part), tensors)


class _StreamedOriginal(Original):
    """Of a streamed model: its weights come in while it is open, and go."""

    def __init__(self, block: Block, homes: Sequence[Home], shelf: Shelf) -> None:
        self.block, self._homes, self._shelf = block, homes, shelf

    @contextmanager
    def open(self) -> Iterator[Block]:
        slots = _slots_of(self.block.module)
        closed = [parameter for parameter, _ in _unique(slots)]
        _fill(slots, self._shelf.fetch(self._homes))
        try:
            yield self.block
        finally:
            _fill(slots, closed)


_Slot = tuple[nn.Module, str, str]  # whose a parameter is, the owner's path with a dot, the parameter's name


def _slots_of(root: nn.Module, path: str = "") -> list[_Slot]:
    return [
        (owner, f"{inside}." if inside else "", name)
        for inside, owner in root.named_modules(prefix=path)
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]


def _unique(slots: Sequence[_Slot]) -> list[tuple[nn.Parameter, list[str]]]:
    """The parameters there, shared ones once, each with all its names."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for owner, path, name in slots:
        parameter: Any = owner._parameters[name]
        found.setdefault(id(parameter), (parameter, []))[1].append(f"{path}{name}")
    return list(found.values())


def _fill(slots: Sequence[_Slot], tensors: Sequence[Tensor]) -> None:
    """Replace all parameters there, shared ones alike."""
    old = _unique(slots)  # held, so that no new one has the id of an old one
    new = {
        id(parameter): nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        for (parameter, _), tensor in zip(old, tensors, strict=True)
    }
    for owner, _, name in slots:
        owner._parameters[name] = new[id(owner._parameters[name])]


def _home(names: Sequence[str], parameter: Tensor, stored: Mapping[str, Stored]) -> Home:
    return Home(next(stored[name] for name in names if name in stored), parameter.dtype)


# --- from a checkpoint ---


def from_checkpoint(
    location: str, config: PreTrainedConfig, dtype: str, device: str, about: Description, scratch: Path | None
) -> StreamedModel:
    """A model in a folder or on the hub, of which the configuration was read. Of its weights only the headers are.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is not there or of another shape.
        UnsupportedModelError: it cannot be read block by block.
    """
    files: dict[str, Stored] = {}
    for file in weight_files(about):
        files |= stored_in(file)
    stated = config.dtype or floating_dtype(files.values())
    chosen: Any = stated if dtype == "auto" else getattr(torch, dtype)
    hf = skeleton(config, chosen, torch.device(device))
    hf.name_or_path = hf.config.name_or_path = location
    try:
        with quiet_transformers():
            hf.generation_config = GenerationConfig.from_pretrained(location, revision=about.revision or "main")
    except OSError:  # it has none; then the configuration's is right
        pass
    stored = named(files, hf, location)
    return StreamedModel(hf, stored, device=torch.device(device), scratch=scratch)


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model whose parameters are on `meta`, in the dtypes that they are loaded in, and whose buffers,
    which no file has, are on the device with their values."""
    with torch.device("meta"), quiet_transformers():
        hf: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for part in hf.modules():
        part._is_hf_initialized = not part._buffers
    for parameter in hf.parameters():
        parameter._is_hf_initialized = True
    buffers = dict(hf.named_non_persistent_buffers())
    if others := sorted(name for name, _ in hf.named_buffers() if name not in buffers):
        raise UnsupportedModelError(f"{config.model_type} has weights that are no parameters ({others[0]}); {WHOLE}")
    for name, buffer in buffers.items():
        _set_buffer(hf, name, torch.empty_like(buffer, device="cpu"))
    hf.initialize_weights()  # as from_pretrained gives buffers their values
    for name, buffer in hf.named_buffers():
        _set_buffer(hf, name, buffer.to(device))
    if plan := hf._get_dtype_plan(dtype):  # what is kept in float32
        pattern = build_glob_alternation(list(plan))[0]
        for name, parameter in hf.named_parameters():
            if pattern.search(name):
                parameter.data = parameter.data.to(torch.float32)
    return hf


def _set_buffer(hf: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    hf.get_submodule(path)._buffers[own] = value


def named(files: Mapping[str, Stored], hf: Any, location: str) -> dict[str, Stored]:
    """What lies in files, by its name in the model's `state_dict`: transformers' own rules rename it.

    Tensors that the model has no place for are left alone, as transformers leaves them.

    Raises:
        CheckpointError: a tensor is not there, or not of the model's shape.
        UnsupportedModelError: one is put together from several, or the head is tied to another matrix than its own.
    """
    hollow = hf.state_dict()
    rules = get_model_conversion_mapping(hf)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    stored: dict[str, Stored] = {}
    for name, each in files.items():
        target, converted = rename_source_key(name, renamings, converters, hf.base_model_prefix, hollow)
        if target not in hollow and name in hollow:
            target, converted = name, None
        if target in hollow and converted is not None:
            raise UnsupportedModelError(
                f"{location}: {target} is made from other tensors ({name}) as the model is loaded, so it cannot be "
                f"streamed; {WHOLE}"
            )
        if target in hollow:
            stored[target] = each
    hf._weight_conversions = [rule for rule in rules if rule.was_used()]  # for saving, as from_pretrained notes it
    _check(stored, hollow, hf, location)
    return stored


def _check(stored: Mapping[str, Stored], hollow: Mapping[str, Tensor], hf: Any, location: str) -> None:
    missing = hollow.keys() - stored.keys()
    for target, origin in hf.all_tied_weights_keys.items():
        if target in stored and origin in stored:
            if not torch.equal(stored[target].read(), stored[origin].read()):
                raise UnsupportedModelError(
                    f"{location}: its configuration ties {target} to {origin}, but they differ; {WHOLE}"
                )
        elif target in stored or origin in stored:
            missing -= {target, origin}
    if patterns := hf._keys_to_ignore_on_load_missing:
        missing = {name for name in missing if not any(re.search(pattern, name) for pattern in patterns)}
    wrong = {name for name, each in stored.items() if each.shape != tuple(hollow[name].shape)}
    for what, names in (("missing keys", missing), ("mismatched keys", wrong)):
        if names:
            raise CheckpointError(f"{location} is not a whole model: {what}: {', '.join(sorted(names)[:3])} ...")
