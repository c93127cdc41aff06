"""Samples of a model's text."""

from __future__ import annotations

import torch

from secateur.errors import DataError
from secateur.model.handle import Model
from secateur.quiet import quiet_transformers


def generate(model: Model, prompt: str, *, new_tokens: int = 64) -> str:
    """Continue `prompt` greedily, no 3-gram twice. The prompt is taken as it is, without a chat template.

    Returns:
        The new text only; shorter where the model's positions end.

    Raises:
        DataError: the model has no tokenizer, or another model's; the prompt is empty, or too long for the model's
            positions.
    """
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer, so it cannot be given text")
    encoded = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    if not encoded["input_ids"].numel():
        raise DataError("the prompt is empty")
    if (highest := int(encoded["input_ids"].max())) >= model.vocab_size:
        raise DataError(f"the tokenizer does not fit the model: token id {highest}, vocabulary {model.vocab_size}")
    if model.max_length is not None:
        length = encoded["input_ids"].shape[1]
        if length >= model.max_length:
            raise DataError(f"the prompt has {length} tokens; the model's positions end at {model.max_length}")
        new_tokens = min(new_tokens, model.max_length - length)
    pads = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)
    with torch.inference_mode(), quiet_transformers():
        output = model.hf.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            no_repeat_ngram_size=3,
            pad_token_id=next((i for i in pads if i is not None), 0),
        )
    new = output[0, encoded["input_ids"].shape[1] :]
    return str(model.tokenizer.decode(new, skip_special_tokens=True))
