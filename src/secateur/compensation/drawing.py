"""Text drawn from the dense model: more of what it knows than any calibration shows, for training towards it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError
from secateur.hf import own_randomness, quiet_transformers
from secateur.judge.generation import own_settings_aside
from secateur.judge.inference import kv_bytes
from secateur.model.handle import Model
from secateur.run import Run

PROMPT = 16  # tokens of a window that a drawn one begins with; what follows is the model's own
_CACHE_BYTES = 4 * 2**30  # of keys and values, for the windows drawn at once


def with_drawn(model: Model, tokens: Tokens, run: Run, rounds: int) -> Tokens:
    """The windows, and behind them `rounds` times as many that begin like them and go on as the model draws, token by
    token from its whole distribution. End-of-text tokens are never drawn. A journaled step per round.

    Each drawn token takes a forward of one token: so a round counts as a forward of all windows. It goes through the
    whole model, all of which must be in memory.

    Raises:
        InvalidOptionError: windows not longer than the prompt.
    """
    if not rounds:
        return tokens
    if tokens.length <= PROMPT:
        raise InvalidOptionError(f"text is drawn behind {PROMPT} tokens; windows of {tokens.length} have no more")
    drawn = [_round(model, tokens, run, number) for number in range(rounds)]
    ids = torch.cat([tokens.ids, *drawn])
    return Tokens.of(ids, torch.cat([tokens.weights, torch.ones(len(ids) - tokens.samples, tokens.length)]))


def _round(model: Model, tokens: Tokens, run: Run, number: int) -> Tensor:
    """As many windows as there are: (samples, length)."""
    layout, config = model.layout(), model.hf.config
    each = kv_bytes(layout, config, tokens.length, model.dtype.itemsize)
    rows = min(tokens.samples, max(1, _CACHE_BYTES // max(1, each)))

    def draw() -> Tensor:
        run.meter.block_tokens += tokens.ids.numel() * len(model.numbers)
        run.meter.asked_tokens += tokens.ids.numel() * len(model.numbers)
        run.meter.head_tokens += tokens.ids.numel()
        if run.rehearses:
            return torch.zeros_like(tokens.ids)
        parts = []
        with run.progress(f"text drawn, {number + 1}", tokens.samples) as advance:
            for at in range(0, tokens.samples, rows):
                prompts = tokens.ids[at : at + rows, :PROMPT].to(model.device)
                seed = run.rng("drawn", number, at).initial_seed() % 2**32
                parts.append(_continued(model, prompts, tokens.length, seed))
                advance(len(prompts))
        return torch.cat(parts)

    return run.step(f"text drawn {number}", draw, scratch_bytes=rows * each)


def _continued(model: Model, prompts: Tensor, length: int, seed: int) -> Tensor:
    """Prompts (rows, tokens) on to (rows, length), on the CPU."""
    ends = model.hf.generation_config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=length - prompts.shape[1], do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        suppress_tokens=[ends] if isinstance(ends, int) else ends,
    )  # fmt: skip
    with torch.inference_mode(), quiet_transformers(), own_randomness(seed), own_settings_aside(model):
        mask = torch.ones_like(prompts)
        output = model.hf.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)
    return torch.as_tensor(output).cpu().clone()
