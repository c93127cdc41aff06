"""Text drawn from the dense model: more of what it knows than any calibration shows, for training towards it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError
from secateur.hf import generation_settings_aside, own_randomness, quiet_transformers
from secateur.judge.inference import kv_bytes
from secateur.model.handle import Model
from secateur.run import Run

PROMPT = 16  # tokens of a piece of a window that a drawn one begins with; what follows is the model's own
PIECE = 512  # tokens, at most: a longer text would be slow to draw, as each token looks at all before it
_CACHE_BYTES = 4 * 2**30  # of keys and values, for the windows drawn at once


def with_drawn(model: Model, tokens: Tokens, run: Run, rounds: int) -> Tokens:
    """The windows, and behind them `rounds` times as many, whose pieces begin like theirs and go on as the model draws,
    token by token from its whole distribution. End-of-text tokens are never drawn. A journaled step per round.

    Each drawn token takes a forward of one token: so a round counts as a forward of all windows. It goes through the
    whole model, all of which must be in memory.

    Raises:
        InvalidOptionError: windows not longer than the prompt.
        UnsupportedModelError: the model is streamed.
    """
    if not rounds:
        return tokens
    model.require_whole("drawing text (refine's; it can train on the calibration's: --refine-text calibration)")
    if tokens.length <= PROMPT:
        raise InvalidOptionError(f"text is drawn behind {PROMPT} tokens; windows of {tokens.length} have no more")
    drawn = [_round(model, tokens, run, number) for number in range(rounds)]
    ids = torch.cat([tokens.ids, *drawn])
    return Tokens.of(ids, torch.cat([tokens.weights, torch.ones(len(ids) - tokens.samples, tokens.length)]))


def _round(model: Model, tokens: Tokens, run: Run, number: int) -> Tensor:
    """As many windows as there are: (samples, length)."""
    size = min(PIECE, tokens.length)
    each = kv_bytes(model.layout(), model.hf.config, size, model.dtype.itemsize)
    whole = tokens.length // size * size
    # What is left of a window behind its whole pieces is one more, of another length.
    pieces = tokens.ids[:, :whole].reshape(-1, size), tokens.ids[:, whole:]
    begin = getattr(model.hf.config, "bos_token_id", None)
    if begin is not None and (tokens.ids[:, 0] == begin).all():  # as each window does, each piece begins a text
        pieces = pieces[0].clone(), pieces[1].clone()
        for some in pieces:
            some[:, :1] = begin
    rows = min(len(pieces[0]), max(1, _CACHE_BYTES // max(1, each)))

    def count(forwarded: int) -> None:
        run.meter.block_tokens += forwarded * len(model.numbers)
        run.meter.asked_tokens += forwarded * len(model.numbers)
        run.meter.head_tokens += forwarded

    def draw() -> Tensor:
        if run.rehearses:
            count(tokens.ids.numel())
            return torch.zeros_like(tokens.ids)
        seed = run.rng("drawn", number).initial_seed() % 2**32
        with run.progress(f"text drawn, {number + 1}", tokens.ids.numel()) as advance, own_randomness(seed):

            def done(forwarded: int) -> None:
                count(forwarded)
                advance(forwarded)

            parts = [_drawn(model, some, rows, done) for some in pieces]
        return torch.cat([part.reshape(tokens.samples, -1) for part in parts], dim=1)

    return run.step(f"text drawn {number}", draw, scratch_bytes=rows * each)


def _drawn(model: Model, pieces: Tensor, rows: int, done: Callable[[int], None]) -> Tensor:
    """Pieces (pieces, length) of which all but the prompt is drawn, `rows` at a time; on the CPU. `done` is called with
    each few tokens that went through the model."""
    done(pieces[:, :PROMPT].numel())
    if pieces.shape[1] <= PROMPT:
        return pieces
    ends = model.hf.generation_config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=pieces.shape[1] - PROMPT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        suppress_tokens=[ends] if isinstance(ends, int) else ends,
    )  # fmt: skip
    drawn, watched = [], StoppingCriteriaList([_Watched(done)])
    with torch.inference_mode(), quiet_transformers(), generation_settings_aside(model.hf):
        for some in pieces.split(rows):
            prompts = some[:, :PROMPT].to(model.device)
            mask = torch.ones_like(prompts)
            output = model.hf.generate(
                input_ids=prompts, attention_mask=mask, generation_config=settings, stopping_criteria=watched
            )
            drawn.append(torch.as_tensor(output).cpu())
    return torch.cat(drawn)


class _Watched(StoppingCriteria):
    """Stops nothing: it is where transformers lets one look on, after each token of a batch."""

    def __init__(self, done: Callable[[int], None]) -> None:
        self._done = done

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._done(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
