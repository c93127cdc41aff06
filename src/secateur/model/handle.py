"""The model as secateur's other layers see it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InvalidEditError, InvalidOptionError, NumericalError, UnsupportedModelError
from secateur.hf import nothing_drawn, own_randomness, quiet_transformers
from secateur.model import configuration
from secateur.model import modeling_secateur as modeling
from secateur.model.described import Description
from secateur.model.family_plugins import state_family
from secateur.model.layout import Layout, ends_of
from secateur.model.modeling_secateur import FAMILIES, PREFIX, Family, classes, share_config
from secateur.model.refusals import ARCHITECTURE, not_a_model, refuse
from secateur.model.views import Block, Original
from secateur.record import Facts, Record

WHOLE = "load it whole (--no-stream, `stream=False`)"
HISTORY = "_secateur_history"  # attribute of a transformers model: where it came from and what it went through


class Model:
    """A causal language model with its tokenizer, its family's row and its origin.

    `with model.open(k) as block:` is the only way to a block's weights, `with model.open_ends():` the only one to those
    outside the blocks. Here, in memory, they cost nothing; a `StreamedModel` reads the weights, and keeps what was
    changed if it was opened for writing. Contexts may be nested; the weights are there until the outermost one ends.

    Args:
        hf: a transformers model of a supported family. It is adopted: its class becomes secateur's subclass of its
            stock class, so that `save_pretrained` stays right whatever is removed, and it is put into eval mode.
        tokenizer: its tokenizer, if there is one.
        source: where it came from (name, path, revision), if that is not known of `hf` already; goes into records.

    Raises:
        UnsupportedModelError: no transformers model, a wrapped one or one without a language-modelling head; no row for
            its family, or a setting that the row does not cover.
    """

    is_streamed = False  # whether the weights stay in files; of a hollow model, whether they will

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, source: Facts | None = None
    ) -> None:
        if reason := not_a_model(hf):
            raise UnsupportedModelError(reason)
        self.family = require_family(hf.config)
        _adopt(hf, self.family)
        self.hf: Any = hf
        self.tokenizer = tokenizer
        history = hf.__dict__.setdefault(HISTORY, {"source": {}, "parents": []})
        if source:
            history["source"] = dict(source)
        self.numbers: list[int] = list(range(len(self.blocks)))
        self.edits_applied = 0
        # For hidden states that are held elsewhere: (site, site, matrix), X <- X @ matrix takes those that wait at the
        # first site to the second. A `Rebase` stays where it is, `DropBlock` leads on to what comes after.
        self.rebases: list[tuple[int, int, torch.Tensor | None]] = []
        self._layout: tuple[object, Layout] | None = None  # with the edits and the vocabulary that it knows of
        # Walks under way: each says why an edit at a place (a block's number, None for the embedding) cannot be.
        self.guards: list[Callable[[int | None], str | None]] = []
        self.hf.eval()

    @property
    def source(self) -> Facts:
        """Where it came from; lies on `hf`, as `parents` does."""
        source: Facts = self.hf.__dict__[HISTORY]["source"]
        return source

    @source.setter
    def source(self, source: Facts) -> None:
        self.hf.__dict__[HISTORY]["source"] = source

    @property
    def parents(self) -> list[Record]:
        """Records of earlier prunings, on disk or in this session, oldest first; they go where `hf` goes."""
        parents: list[Record] = self.hf.__dict__[HISTORY]["parents"]
        return parents

    @parents.setter
    def parents(self, parents: list[Record]) -> None:
        self.hf.__dict__[HISTORY]["parents"] = parents

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks that are there, in order."""
        return self.hf.get_submodule(self.family.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def hidden_size(self) -> int:
        return int(self.hf.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model's positions allow, where the configuration says."""
        return getattr(self.hf.config, "max_position_embeddings", None)

    @property
    def is_parallel(self) -> bool:
        """Whether attention and MLP of a block both read what enters it."""
        said = self.family.parallel
        return bool(getattr(self.hf.config, said)) if isinstance(said, str) else said

    @property
    def head_cost(self) -> float:
        """What a token costs in the LM head, relative to one in an average block: about the parameters it meets."""
        layout = self.layout()
        return self.vocab_size * self.hidden_size * len(layout.blocks) / max(1, layout.block_parameters)

    def position(self, number: int) -> int:
        """Where block `number` of the model as loaded stands now.

        Raises:
            InvalidEditError: it is not there.
        """
        try:
            return self.numbers.index(number)
        except ValueError:
            raise InvalidEditError(f"block {number} is not there; blocks now: {self.numbers}") from None

    @contextmanager
    def open(self, number: int, *, write: bool = False) -> Iterator[Block]:
        """Give block `number` (of the model as loaded), its weights present until the context ends.

        Args:
            write: it may be changed, modules and all; else it must come out as it went in.
        """
        yield Block(number, self.blocks[self.position(number)], self.family)

    def original(self, number: int) -> Original:
        """Block `number` as it is now, to be opened later, whatever becomes of it."""
        with self.open(number) as block:
            return Original(block)

    @contextmanager
    def open_ends(self, *, write: bool = False) -> Iterator[None]:
        """Have the weights of embedding, final norm and head present until the context ends; `write` as in `open`."""
        yield

    @property
    def scratch(self) -> Path | None:
        """A streamed model's folder of temporary files, which goes with it."""
        return None

    def require_whole(self, what: str) -> None:
        """
        Raises:
            UnsupportedModelError: `what` needs all weights in memory at once, and they stay in files.
        """
        if self.is_streamed:
            raise UnsupportedModelError(f"{what} needs the whole model in memory, and this one is streamed; {WHOLE}")

    def state(self, number: int | None = None) -> dict[str, Tensor]:
        """What an open block holds, or (None) the open ends: tensors by their names in the model's `state_dict`."""
        inside = f"{self.family.blocks}."
        if number is None:
            return {name: tensor for name, tensor in self.hf.state_dict().items() if not name.startswith(inside)}
        place = self.position(number)
        state: dict[str, Tensor] = self.blocks[place].state_dict(prefix=f"{inside}{place}.")
        return state

    def layout(self) -> Layout:
        """The model in numbers; read off the modules anew after each edit."""
        state = self.edits_applied, tuple(self.numbers), ends_of(self.hf, self.family)
        if self._layout is None or self._layout[0] != state:
            self._layout = state, Layout.of(self)
        return self._layout[1]

    def hollow(self) -> Model:
        """A twin without weights (all on `meta`): the same layout, block numbers, tokenizer and source."""
        twin = hollow(copy.deepcopy(self.hf.config), self.dtype, self.source)
        twin.tokenizer, twin.parents = self.tokenizer, list(self.parents)
        twin.numbers, twin.edits_applied = list(self.numbers), self.edits_applied
        twin.is_streamed = self.is_streamed
        return twin

    def forget_block(self, number: int) -> None:
        """Take a block out of the model; for `surgery.apply` only."""
        position = self.position(number)
        del self.blocks[position]
        for place, block in enumerate(self.blocks):  # their slots in the cache
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place  # type: ignore[assignment]  # an attention's
        configuration.shorten(self.hf.config, position)
        self.numbers.remove(number)

    def state_config(self) -> None:
        """Bring the configuration up to date with the modules; for `surgery.apply` only."""
        shapes = [modeling.shape_of(block, self.family) for block in self.blocks]
        configuration.state_shapes(self.hf.config, self.family, shapes)
        configuration.state_ends(self.hf.config, ends_of(self.hf, self.family))

    def edited(self) -> None:
        """Take the model as it is now for the loaded one: blocks are numbered anew."""
        self.numbers = list(range(len(self.blocks)))
        self.rebases = []

    def fingerprint(self) -> str:
        """sha256 over the names, dtypes, shapes and bytes of all weights, block by block.

        Each block is read once, and found to be made of numbers on the way.

        Raises:
            NumericalError: a weight is NaN or Inf; names the block and the tensor.
        """
        whole = hashlib.sha256()
        with self.open_ends():
            whole.update(_digest(self.state(), ""))
        for number in self.numbers:
            with self.open(number) as block:
                whole.update(_digest(block.module.state_dict(), f"block {number}: "))
        return whole.hexdigest()


def _digest(state: Mapping[str, Tensor], where: str) -> bytes:
    """sha256 over tensors by name, all of which must be finite."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        # NaN and Inf come through a sum, a sixteenth of the cost of `isfinite`; but finite numbers may overflow in it
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise NumericalError(
                f"{where}{name} has NaN or Inf: the checkpoint is damaged, or was saved after a failed training"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.digest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in its own order, whatever its dtype; one on the CPU is not copied if it is contiguous."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def hollow(config: PreTrainedConfig, dtype: torch.dtype, source: Facts) -> Model:
    """The model that a stock or saved configuration describes, without weights (on `meta`)."""
    with torch.device("meta"), nothing_drawn(), quiet_transformers():
        return Model(AutoModelForCausalLM.from_config(config, dtype=dtype), source=source)


def with_random_weights(config: PreTrainedConfig, dtype: torch.dtype, device: str | torch.device) -> Model:
    """A model of the shapes that a stock or saved configuration describes, to be timed."""
    with own_randomness(0), torch.device(device), quiet_transformers(), torch.no_grad():
        model = Model(AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype))
        for parameter in model.hf.parameters():  # some maps on the residual branch have whatever lay in memory
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    return model


def require_family(config: Any) -> Family:
    """The row for a configuration.

    Raises:
        UnsupportedModelError: there is none, the model is of a kind that `refusals` names, or the row does not cover
            one of its settings.
    """
    family = modeling.family_of(config)
    refuse(Description("this model", config.to_dict()), *ARCHITECTURE)
    if family is None:
        raise UnsupportedModelError(
            f"models of type '{config.model_type}' are not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    for name, value in family.requires.items():
        if (getattr(config, name, None) or False) != value:  # None stands for False
            raise UnsupportedModelError(
                f"{family.model_type} models are supported with {name}={value} only; this one has "
                f"{name}={getattr(config, name, None)}"
            )
    return family


def require_same_vocabulary(model: Model, other: Model, purpose: str) -> None:
    """Raise where two models do not read the same tokens.

    Args:
        purpose: what compares them token by token, for the message.

    Raises:
        InvalidOptionError: another tokenizer, or another number of ids.
    """
    one, two = (each.tokenizer and each.tokenizer.get_vocab() for each in (model, other))
    if one != two or model.vocab_size != other.vocab_size:
        raise InvalidOptionError(
            f"{other.source.get('name', 'the other model')} has another tokenizer or vocabulary than the model; "
            f"{purpose} compares the two models token by token: give the dense model it was pruned from"
        )


def require_positions(max_length: int | None, length: int) -> None:
    """Raise InvalidOptionError for windows that are longer than a model's positions (None: without an end)."""
    if max_length is not None and length > max_length:
        raise InvalidOptionError(f"windows of {length} tokens; the model's positions end at {max_length}")


def _adopt(hf: PreTrainedModel, family: Family) -> None:
    """Make a stock model an instance of secateur's subclass."""
    own = classes(hf.config.model_type.removeprefix(PREFIX))
    config_class, model_class = own["AutoConfig"], own["AutoModelForCausalLM"]
    name, stock = type(hf).__name__, model_class.__mro__[2]
    if type(hf) is model_class:
        return
    if name == model_class.__name__:  # its `Removed` is not ours
        raise UnsupportedModelError(f"this {name} was made by the code in its checkpoint; load it with secateur")
    if type(hf) is not stock:
        raise UnsupportedModelError(
            f"{name} is not {stock.__name__}, the stock class with a language-modelling head, which is pruned; load "
            "the model by AutoModelForCausalLM"
        )
    config = copy.deepcopy(hf.config)
    config.__class__ = config_class
    config.__dict__["model_type"] = config_class.model_type  # set there when it came from a file
    state_family(config, family)
    hf.__class__ = model_class
    share_config(hf, config, family)
