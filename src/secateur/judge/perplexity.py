"""Perplexity over windows, as the papers take it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from msgspec import UNSET, convert, structs, to_builtins
from torch import Tensor

from secateur.engine.loss import NegativeLogLikelihood, sample_losses
from secateur.engine.spill import STATE_BYTES, room_for
from secateur.engine.sweep import DENSE, propagate
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.judge.results import Perplexity
from secateur.model.handle import Model
from secateur.record import MeasuredPerplexity, public_name
from secateur.run import Advance, Run


def perplexity(model: Model, tokens: Tokens, *, run: Run | None = None, label: str = "perplexity") -> Perplexity:
    """exp of the mean negative log-likelihood over all counted predictions; each window predicts length - 1 tokens.

    One window at a time goes through a block, as many windows one after the other as `STATE_BYTES` holds, logits come
    in chunks. Perplexities of different window lengths must not be compared; `ratio` refuses to.

    Returns:
        With what paired comparisons need of each window: `nll` is the mean of `window_nll` weighed by
        `window_predictions`. Windows where nothing counts are left out.

    Raises:
        NumericalError: the model gives NaN or Inf.
    """
    run, metric = run or Run(), NegativeLogLikelihood()
    sums = torch.zeros(tokens.samples, dtype=torch.float64)
    run.meter.asked_tokens += tokens.ids.numel() * len(model.numbers)
    with run.progress(label, tokens.samples * len(model.numbers)) as done, model.open_ends():
        for group in window_groups(range(tokens.samples), tokens.length, model):
            states = window_states(model, tokens.ids[group], run, done)
            for sample, hidden in zip(group, states, strict=True):
                sums[sample] = sample_losses(model, [hidden], tokens, sample, metric, run)[0]
    counts = tokens.weights[:, 1:].double().sum(dim=1)
    nll = float(sums.sum() / counts.sum())
    if not math.isfinite(nll):
        raise NumericalError("the model's loss is NaN or Inf; try --dtype float32")
    counted = counts > 0  # of chat data, a window may have nothing that counts
    windows = (sums / counts)[counted]
    return Perplexity(
        perplexity=_exp(nll), nll=nll,
        nll_stderr=float(windows.std() / math.sqrt(len(windows))) if len(windows) > 1 else None,
        text=tokens.source.get("name"), samples=tokens.samples, length=tokens.length,
        predictions=int((tokens.weights[:, 1:] > 0).sum()), bos=bool(tokens.source.get("bos")),
        fingerprint=tokens.fingerprint(),
        window_nll=windows.tolist(), window_predictions=counts[counted].tolist(),
    )  # fmt: skip


def recalled_perplexity(model: Model, tokens: Tokens, run: Run, when: str) -> Perplexity:
    """As `perplexity`, as a step of the run, which an interrupted one does not measure again.

    Args:
        when: in the run, as "before".
    """
    key = f"{when}/{tokens.source.get('name')}/{tokens.fingerprint()}"
    return convert(run.step(key, lambda: to_builtins(perplexity(model, tokens, run=run))), Perplexity)


def window_groups(samples: Sequence[int], length: int, *models: Model) -> Iterator[list[int]]:
    """The windows in groups whose hidden states in all the models `STATE_BYTES` holds, of one window at least.

    Each block is read once per group, so those of streamed models are all together, with states in files. A window's
    figures do not depend on who is in its group.
    """
    if samples and any(model.is_streamed for model in models):
        yield list(samples)
        return
    window_bytes = sum(length * model.hidden_size * model.dtype.itemsize for model in models)
    size = max(1, STATE_BYTES // window_bytes)
    for start in range(0, len(samples), size):
        yield list(samples[start : start + size])


def window_states(model: Model, ids: Tensor, run: Run, done: Advance) -> Tensor:
    """Hidden states after the last block, one window at a time: ids (samples, length) -> (samples, length, hidden)."""
    room = room_for(model, ids.numel() * model.hidden_size * model.dtype.itemsize, STATE_BYTES)
    return propagate(model, ids, [DENSE], run=run, rows_at_once=1, done=done, room=room)[DENSE]


def ratio(dense: Perplexity, other: Perplexity) -> float:
    """How many times the perplexity of `dense` the other one's is.

    Raises:
        InvalidOptionError: they were not taken over the same tokens in windows of the same length. A token of a long
            window is predicted from more, so its perplexity is lower whatever the model.
    """
    if dense.length != other.length:
        raise InvalidOptionError(
            f"perplexities over windows of {dense.length} and of {other.length} tokens cannot be compared; take "
            "both at one length"
        )
    if dense.fingerprint != other.fingerprint:
        raise InvalidOptionError(
            f"perplexities over different tokens ({dense.text}, {dense.samples} windows, and {other.text}, "
            f"{other.samples}) cannot be compared; take both on one text, by one tokenizer"
        )
    return _exp(_known(other.nll) - _known(dense.nll))


def before_and_after(before: Perplexity, after: Perplexity) -> MeasuredPerplexity:
    """For a record: a text's perplexity before a pruning and after it, under the text's public name."""
    figures = structs.asdict(after) | {"text": public_name(str(after.text))}
    del figures["window_nll"], figures["window_predictions"]
    return MeasuredPerplexity(**figures, before=_known(before.perplexity), after=_known(after.perplexity))


def without_windows(result: Perplexity) -> Perplexity:
    """The figures only; each window's loss is for comparisons by window."""
    return structs.replace(result, window_nll=UNSET, window_predictions=UNSET)


def _known(figure: float | None) -> float:
    assert figure is not None, "a figure that was not measured but read from a file"
    return figure


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
