"""Running a model's blocks one by one, and its head on its own, without copying any family's forward.

The trick for both: the model's own forward runs with its list of blocks swapped for stand-ins. A stand-in that
records gives each block's inputs (positions, masks, rotary embeddings); one that injects gives the head's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.processor import warn_if_slow
from secateur.engine.spill import Room
from secateur.model.handle import Model
from secateur.model.layout import Layout

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and by keyword


class Done(Exception):  # noqa: N818  # it says that enough was seen, and is no error
    """Ends a forward of which no more is wanted."""


class _Recorder(nn.Module):
    """Stands for a block: notes what it is called with and passes the hidden states on; the last one ends it there.

    What comes after the blocks may not take the states that enter them: the residual stream may change its width.
    """

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not registered as a submodule
        self._last = last
        self.hidden: Tensor | None = None
        self.arguments: Arguments = ((), {})

    def __getattr__(self, name: str) -> Any:  # some models read attributes of their blocks, as `attention_type`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, (args, kwargs)
        if self._last:
            raise Done
        return hidden_states


class _Injector(nn.Module):
    """Stands for all blocks: whatever came in, these hidden states go out."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden.to(hidden_states.device)


@contextmanager
def _swapped(model: Model, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    parent_path, _, name = model.family.blocks.rpartition(".")
    parent = model.hf.get_submodule(parent_path)
    real = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(stand_ins))
    try:
        yield
    finally:
        setattr(parent, name, real)


class BlockInputs:
    """What the blocks of one model are called with, for sequences of one length.

    For unpadded sequences of equal length the arguments beside the hidden states depend on the shape only, so they are
    recorded once per batch size.
    """

    def __init__(self, model: Model) -> None:
        warn_if_slow(model)
        self._model = model
        self._arguments: dict[tuple[int, int], dict[int, Arguments]] = {}  # by shape and block number

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states that enter the first block: ids (batch, length) -> (batch, length, hidden)."""
        hidden, arguments = self._record(ids)
        self._arguments.setdefault((ids.shape[0], ids.shape[1]), arguments)
        return hidden

    def embed_windows(self, ids: Tensor, batch_size: int, room: Room | None = None) -> Tensor:
        """As `embed`, some windows at a time, so that masks and the like stay small; never two copies of the result."""
        room = room or Room()
        hidden: Tensor | None = None
        with self._model.open_ends():
            for start in range(0, len(ids), batch_size):
                some = self.embed(ids[start : start + batch_size])
                if hidden is None:
                    hidden = room.put(some) if len(some) == len(ids) else room.empty(some, (len(ids), *some.shape[1:]))
                hidden[start : start + batch_size] = some
        assert hidden is not None  # narrows the type; there is at least one window
        return hidden

    @torch.no_grad()
    def arguments(self, number: int, batch: int, length: int) -> Arguments:
        """What block `number` is called with beside the hidden states, for a batch of that shape."""
        if (batch, length) not in self._arguments:
            ids = torch.zeros(batch, length, dtype=torch.long)
            self._arguments[batch, length] = self._record(ids)[1]
        return self._arguments[batch, length][number]

    def _record(self, ids: Tensor) -> tuple[Tensor, dict[int, Arguments]]:
        model = self._model
        last = len(model.blocks) - 1
        recorders = [_Recorder(block, place == last) for place, block in enumerate(model.blocks)]
        inner = model.hf.get_submodule(model.family.blocks.rpartition(".")[0])
        with model.open_ends(), _swapped(model, recorders), suppress(Done):
            inner(input_ids=ids.to(model.device), use_cache=False)
        hidden = recorders[0].hidden
        if hidden is None:
            raise RuntimeError("the model's forward did not call its blocks")
        return hidden, {n: recorder.arguments for n, recorder in zip(model.numbers, recorders, strict=True)}


def run_block(module: Callable[..., Any], hidden: Tensor, arguments: Arguments) -> Tensor:
    """One block's output hidden states, (batch, length, hidden)."""
    args, kwargs = arguments
    output = module(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def head_logits(model: Model, hidden: Tensor) -> Tensor:
    """Final norm and LM head: hidden states after the last block (tokens, hidden) -> logits (tokens, vocabulary)."""
    return head_logits_with_grad(model, hidden)


def head_logits_with_grad(model: Model, hidden: Tensor) -> Tensor:
    """As `head_logits`, for training: gradients flow to `hidden`.

    Each token is given as a sequence of its own, since the head does not mix tokens and positions are bounded.
    """
    rows = hidden[:, None]  # (tokens, 1, hidden)
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=model.device)
    with model.open_ends(), _swapped(model, [_Injector(rows)]):
        return model.hf(input_ids=ids, use_cache=False).logits[:, 0]


def activation_bytes(model: Model, length: int, layout: Layout | None = None) -> int:
    """What one row takes inside a block: a few hidden states, and the widest MLP's gate, up and product; of the model,
    or of what it would be with another layout."""
    width = max(block.shape.width for block in (layout or model.layout()).blocks.values())
    return length * (4 * model.hidden_size + 3 * width) * model.dtype.itemsize
