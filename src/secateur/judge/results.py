"""What each judgement of a model gives, typed; the same on disk as in Python (of a number that is none, null).

A field that can be UNSET is one that some files have not: older ones, or those of a judgement that did not ask for it.
It is false, so `result.window_nll or []` reads it.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

Scalar = str | int | float | bool | None
Facts = dict[str, Any]  # where a text or rows came from, as its reader tells it


class Perplexity(Struct, frozen=True, kw_only=True):
    """exp of the mean loss over all counted predictions of one text.

    Attributes:
        nll: nats per token; nll_stderr: over windows, None of a single one.
        text: its name; samples, length: windows, and tokens in each; predictions: how many were counted.
        bos: whether each window began with the begin-of-sequence token; in older files none did.
        fingerprint: of the tokens.
        window_nll: each counted window's own loss; window_predictions: what it weighs.
    """

    perplexity: float | None = None
    nll: float | None = None
    nll_stderr: float | None = None
    text: str | None = None
    samples: int | None = None
    length: int | None = None
    predictions: int | None = None
    bos: bool | UnsetType = UNSET
    fingerprint: str = ""
    window_nll: list[float | None] | UnsetType = UNSET
    window_predictions: list[float] | UnsetType = UNSET


class Fidelity(Struct, frozen=True, kw_only=True):
    """How faithful a model is to its dense one on one text.

    Attributes:
        loss, dense_loss: nats per token; kl: KL(dense || model), nats per token.
        top1_agreement: share of places where both find the same token most probable.
        loss_stderr, kl_stderr, top1_agreement_stderr: over windows, None of a single one.
        text, count: its name, and which of its tokens counted; samples, length, predictions, bos: as of `Perplexity`.
        window_nll, window_kl, window_top1, window_predictions: of each counted window.
    """

    loss: float | None = None
    loss_stderr: float | None = None
    dense_loss: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    top1_agreement_stderr: float | None = None
    text: str | None = None
    count: str | None = None
    samples: int | None = None
    length: int | None = None
    predictions: int | None = None
    bos: bool | UnsetType = UNSET
    window_nll: list[float] = field(default_factory=list)
    window_kl: list[float] = field(default_factory=list)
    window_top1: list[float] = field(default_factory=list)
    window_predictions: list[float] = field(default_factory=list)


class Inference(Struct, frozen=True, kw_only=True):
    """What running one model costs: medians over the rounds.

    Attributes:
        prefill_ms: of the whole prompts; token_ms: of one further token of each; throughput_tokens_s: new tokens of all
            prompts per second, the prompts' time included.
        prefill_ms_iqr, token_ms_iqr: the interquartile range, None of a single round.
        prefill_ms_rounds, token_ms_rounds, throughput_tokens_s_rounds: the value in each round.
        kv_bytes_per_token: what one sequence's KV cache grows by.
        peak_memory_bytes, peak_memory_by: the most memory, and how it was measured.
        prompt_length, new_tokens, rounds, batch_size: what was asked.
    """

    prefill_ms: float | None = None
    prefill_ms_iqr: float | None = None
    prefill_ms_rounds: list[float] | UnsetType = UNSET
    token_ms: float | None = None
    token_ms_iqr: float | None = None
    token_ms_rounds: list[float] | UnsetType = UNSET
    throughput_tokens_s: float | None = None
    throughput_tokens_s_rounds: list[float] | UnsetType = UNSET
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    peak_memory_bytes: int | None = None
    peak_memory_by: str | None = None
    prompt_length: int | None = None
    new_tokens: int | None = None
    rounds: int | None = None
    batch_size: int | None = None


class Sample(Struct, frozen=True, kw_only=True):
    """One prompt's continuation.

    Attributes:
        tokens: the new ids; ended: by itself, before a limit; settings: all that decided the text.
    """

    prompt: str
    text: str
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    settings: dict[str, Scalar] = field(default_factory=dict)


class GenerationFigures(Struct, frozen=True, kw_only=True):
    """Of the greedy texts. Shares in 0..1; None where there is nothing to count, or no dense model to agree with.

    Attributes:
        distinct_1, distinct_2, distinct_3: distinct n-grams of tokens among all.
        ended_share: of texts that ended by themselves; new_tokens: the mean.
        greedy_agreement: places in the dense model's texts where both pick the same token.
        common_prefix_tokens: how far, on average, the model agrees from the start.
    """

    distinct_1: float | None = None
    distinct_2: float | None = None
    distinct_3: float | None = None
    ended_share: float | None = None
    new_tokens: float | None = None
    greedy_agreement: float | None = None
    common_prefix_tokens: float | None = None


class Generation(Struct, frozen=True, kw_only=True):
    """Samples by prompt and decoding, and the figures of the greedy ones."""

    samples: list[Sample] = field(default_factory=list)
    figures: GenerationFigures = GenerationFigures()


class TaskResult(Struct, frozen=True, kw_only=True):
    """One downstream task.

    Attributes:
        value: in the metric's own unit (acc in 0..1), None where it is no number; stderr: None where the metric is no
            mean.
        chance: what guessing gives, None where there is no such level.
        fewshot, fewshot_split: solved examples before each question, and whence ("" without).
        per_document: in the documents' order; empty if the metric has no number per document.
        truncated: sequences that lost their beginning, being longer than the model's positions.
        source: of the rows; harness: lm-eval's version.
        bos: whether what was asked began with the begin-of-sequence token; None: as the tokenizer begins a text.
    """

    task: str = ""
    metric: str
    value: float | None
    stderr: float | None = None
    documents: int | None = None
    chance: float | None = None
    fewshot: int | None = None
    fewshot_split: str = ""
    per_document: list[float] = field(default_factory=list)
    truncated: int = 0
    source: Facts = field(default_factory=dict)
    harness: str | UnsetType = UNSET
    bos: bool | UnsetType | None = UNSET


class Judgement(Struct, frozen=True, kw_only=True):
    """All that one model was judged by; what was not asked for is UNSET."""

    name: str | None
    parameters: int
    weight_bytes: int
    perplexity: list[Perplexity] | UnsetType = UNSET
    fidelity: list[Fidelity] | UnsetType = UNSET
    inference: Inference | UnsetType = UNSET
    generation: Generation | UnsetType = UNSET
    tasks: dict[str, TaskResult] | UnsetType = UNSET


class Failure(Struct, frozen=True, kw_only=True):
    """A condition of `--fail-if` that holds, and the figure of which it does; `value` is None where it is not known."""

    condition: str
    figure: str
    value: float | None


class Evaluation(Struct, frozen=True, kw_only=True):
    """What `evaluate` gives: of the model, of the one beside it, and the conditions that hold."""

    model: Judgement
    against: Judgement | UnsetType = UNSET
    failed: list[Failure] | UnsetType = UNSET
