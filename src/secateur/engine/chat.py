"""Chat data as a token stream in which the assistant's words can be told from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.assets import Conversation
from secateur.errors import DataError


def render_chat(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *, responses_only: bool
) -> tuple[Tensor, Tensor]:
    """Render each conversation by the model's own template and pack all into one stream.

    Returns:
        ids (tokens,) int64 and weights (tokens,) float32: one everywhere, or one on the assistant's messages (with
        the end-of-turn mark that the model has to produce) and zero elsewhere.

    Raises:
        DataError: no chat template; no response at all; a template that rewrites earlier turns, for which the
            responses cannot be located.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give plain text (`text`) instead of `messages`")
    ids: list[int] = []
    weights: list[float] = []
    for row, conversation in enumerate(conversations):
        text = render_conversation(tokenizer, conversation, row)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=responses_only, verbose=False)
        ids += encoded["input_ids"]
        if not responses_only:
            weights += [1.0] * len(encoded["input_ids"])
            continue
        spans = response_spans(tokenizer, conversation, text, row)
        weights += map(float, counted(encoded["offset_mapping"], spans))
    if not any(weights):
        raise DataError("the conversations have no assistant message to count")
    return torch.tensor(ids), torch.tensor(weights)


def counted(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token, of which `offsets` gives the characters, lies wholly inside one of `spans`.

    A token of spaces only may have an empty offset where it ends, since some tokenizers trim them; a special token that
    stands for no character has the offset (0, 0).
    """
    return [any(a <= start and a < end <= b for a, b in spans) for start, end in offsets]


def response_spans(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str, row: int = 0
) -> list[tuple[int, int]]:
    """Character spans (start, end) in the rendered `text` that the assistant has to produce."""
    spans = []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        prompt = render_conversation(tokenizer, conversation[:turn], row, prompt=True)
        answered = render_conversation(tokenizer, conversation[: turn + 1], row)
        if not (answered.startswith(prompt) and text.startswith(answered.rstrip())):
            raise DataError(
                "the model's chat template rewrites earlier turns, so responses cannot be located; "
                "cut the conversations to one turn each, or count all tokens"
            )
        spans.append((len(prompt), len(answered.rstrip())))
    return spans


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, row: int, *, prompt: bool = False
) -> str:
    """The text of a conversation by the model's own template; with the opening of an answer if `prompt`."""
    if not messages:  # many templates read the first message without asking whether there is one
        raise DataError(f"conversation {row + 1} begins with the assistant; a user's message must come first")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template raises whatever it likes
        raise DataError(f"conversation {row + 1} does not suit the model's chat template: {error}") from error
