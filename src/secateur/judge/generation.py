"""Samples of a model's text, and figures that show when generation breaks, which it does before perplexity does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from msgspec import structs
from torch import Tensor
from transformers import GenerationConfig

from secateur.assets import Bos
from secateur.engine.tokens import begun, bos_id_of
from secateur.errors import DataError
from secateur.hf import generation_settings_aside, quiet_transformers
from secateur.judge.results import Generation, GenerationFigures, Sample, Scalar
from secateur.model.handle import Model, require_same_vocabulary
from secateur.run import Run


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is continued. The fields but `name` and `end` are transformers' own; nothing is ever drawn.

    Attributes:
        max_new_tokens: without the prompt; max_length: with it. None is no limit but the other one's.
        end: whose end-of-text token ends a text: the model's own settings' (chat models may have several), or the
            tokenizer's alone.
    """

    name: str
    max_new_tokens: int | None = None
    max_length: int | None = None
    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False
    end: Literal["model", "tokenizer"] = "model"

    def record(self, *, begun: bool = False) -> dict[str, Scalar]:
        """All that decides the text, for records.

        Args:
            begun: the prompt begins with the begin-of-sequence token in any case.
        """
        fixed = {"do_sample": False, "repetition_penalty": 1.0, "length_penalty": 1.0}
        return {**asdict(self), **fixed, **({"bos": True} if begun else {})}


GREEDY = Decoding(name="greedy", max_new_tokens=128)

# What `--evaluate_qualitative` of 2SSP's reference does. Its 128 tokens count the prompt. It leaves open whether to
# draw, which some models' own settings would; here that is off.
REFERENCE_DECODING = Decoding(
    name="2ssp", max_length=128, num_beams=5, no_repeat_ngram_size=3, early_stopping=True, end="tokenizer"
)
REFERENCE_PROMPTS = ("Who is Albert Einstein?", "The theory of relativity")


@dataclass(frozen=True)
class Continuation:
    """What came after a prompt.

    Attributes:
        prompt_ids: (prompt,), with the tokenizer's special tokens, begun as `bos` says; ids: (new,), with the
            end-of-text token if any.
        ended: by itself, before a limit.
    """

    prompt_ids: Tensor
    ids: Tensor
    text: str
    ended: bool


def generate(model: Model, prompt: str, decoding: Decoding = GREEDY, *, bos: Bos = "auto") -> Continuation:
    """Continue `prompt`, which is taken as it is, without a chat template; shorter where the model's positions end.

    Args:
        bos: whether it begins with the begin-of-sequence token in any case: "always", or "auto", if the family needs
            it. Else it begins as the tokenizer begins a text.

    Raises:
        DataError: the model has no tokenizer, or another model's; the prompt is empty, or too long for the decoding's
            limit or the model's positions.
    """
    model.require_whole("continuing a prompt")
    ids, room = check_prompt(model, prompt, decoding, bos=bos)
    ids, tokenizer = ids.to(model.device), model.tokenizer
    assert tokenizer is not None  # narrows the type; `check_prompt` refused
    end = model.hf.generation_config.eos_token_id if decoding.end == "model" else None
    end = tokenizer.eos_token_id if end is None else end
    ends = [end] if isinstance(end, int) else list(end or ())
    pads = (tokenizer.pad_token_id, *ends)
    settings = GenerationConfig(
        max_new_tokens=room, num_beams=decoding.num_beams, no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        early_stopping=decoding.early_stopping, eos_token_id=ends or None,
        pad_token_id=next((i for i in pads if i is not None), 0), do_sample=False, repetition_penalty=1.0,
        length_penalty=1.0,
    )  # fmt: skip
    with torch.inference_mode(), quiet_transformers(), generation_settings_aside(model.hf):
        output = model.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new = output[0, ids.shape[1] :].cpu()
    found = [place for place, token in enumerate(new.tolist()) if token in ends]
    new = new[: found[0] + 1] if found else new  # the best beam may be shorter than the longest, and padded
    return Continuation(ids[0].cpu(), new, str(tokenizer.decode(new, skip_special_tokens=True)), bool(found))


def check_prompt(model: Model, prompt: str, decoding: Decoding, *, bos: Bos = "auto") -> tuple[Tensor, int]:
    """A prompt's ids with the tokenizer's special tokens, (1, length), and how many tokens may follow; `bos` as
    `generate` has it.

    Raises:
        DataError: as `generate`.
    """
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer, so it cannot be given text")
    own = torch.tensor(model.tokenizer(prompt)["input_ids"], dtype=torch.long)
    ids = begun(own, torch.ones(len(own)), bos_id_of(model, bos))[0][None]
    if not ids.numel():
        raise DataError("the prompt is empty")
    if (highest := int(ids.max())) >= model.vocab_size:
        raise DataError(f"the tokenizer does not fit the model: token id {highest}, vocabulary {model.vocab_size}")
    length, rooms = ids.shape[1], [] if decoding.max_new_tokens is None else [decoding.max_new_tokens]
    for what, limit in (
        ("the model's positions end", model.max_length),
        (f"'{decoding.name}' ends", decoding.max_length),
    ):
        if limit is not None and length >= limit:
            raise DataError(f"the prompt has {length} tokens; {what} at {limit}")
        rooms += [] if limit is None else [limit - length]
    return ids, min(rooms)


def generation(
    model: Model,
    prompts: Sequence[str] = REFERENCE_PROMPTS,
    *,
    dense: Model | None = None,
    dense_samples: Sequence[Sample] | None = None,
    decodings: Sequence[Decoding] = (REFERENCE_DECODING,),
    greedy: Decoding = GREEDY,
    bos: Bos = "auto",
    run: Run | None = None,
    label: str = "generation",
) -> Generation:
    """Continue prompts greedily, and by other decodings; judge the greedy text.

    Args:
        dense: the model that the pruned one is compared with; without it there is no agreement.
        dense_samples: the dense model's `samples` for these prompts, where they are known; else they are generated.
        decodings: further ones; by default the 2SSP reference's.
        bos: as `generate` has it.

    Returns:
        A sample for each prompt and decoding, and the figures of the greedy texts, of all together. Both models are
        given the dense model's greedy texts to agree on.

    Raises:
        DataError: see `generate`; no prompt.
        InvalidOptionError: the dense model has another vocabulary.
    """
    if not prompts:
        raise DataError("no prompt is given")
    if dense is not None:
        require_same_vocabulary(model, dense, "greedy agreement")
    asked = [(prompt, decoding) for prompt in prompts for decoding in (greedy, *decodings)]
    begins = bos_id_of(model, bos) is not None
    plain: dict[str, Continuation] = {}  # by prompt, the greedy ones
    samples: list[Sample] = []
    with (run or Run()).progress(label, len(asked) + len(prompts) * (dense is not None)) as done:
        for prompt, decoding in asked:
            text = generate(model, prompt, decoding, bos=bos)
            if decoding is greedy:
                plain[prompt] = text
            samples.append(
                Sample(
                    prompt=prompt, text=text.text, tokens=text.ids.tolist(), ended=text.ended,
                    settings=decoding.record(begun=begins),
                )
            )  # fmt: skip
            done(1)
        figures = _figures(list(plain.values()))
        if dense is not None:
            settings = greedy.record(begun=begins)
            known = {told.prompt: told.tokens for told in dense_samples or () if told.settings == settings}
            agreed = []
            for prompt, text in plain.items():
                new = torch.tensor(known[prompt]) if prompt in known else generate(dense, prompt, greedy, bos=bos).ids
                agreed.append(_agreement(model, dense, text.prompt_ids, new))
                done(1)
            prefixes = [int(each.long().cumprod(dim=0).sum()) for each in agreed]
            figures = structs.replace(
                figures,
                greedy_agreement=float(torch.cat(agreed).double().mean()),
                common_prefix_tokens=sum(prefixes) / len(prefixes),
            )
    return Generation(samples=samples, figures=figures)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams of tokens as a share of all, over all texts together; None where there are none."""
    grams = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _figures(texts: Sequence[Continuation]) -> GenerationFigures:
    bodies = [text.ids[: len(text.ids) - text.ended].tolist() for text in texts]  # without the token that ends
    return GenerationFigures(
        distinct_1=distinct(bodies, 1), distinct_2=distinct(bodies, 2), distinct_3=distinct(bodies, 3),
        ended_share=sum(text.ended for text in texts) / len(texts), new_tokens=sum(map(len, bodies)) / len(bodies),
    )  # fmt: skip


@torch.inference_mode()
def _agreement(model: Model, dense: Model, prompt: Tensor, new: Tensor) -> Tensor:
    """Whether both models pick the same token at each place of the dense model's text, (new,) bool.

    Both read the text as a whole. The dense model's own picks are not taken from how it was generated: rounding differs
    with and without a cache, and a tie would count as a disagreement.
    """
    ids = torch.cat([prompt, new])[None, :-1]
    picks = [
        each.hf(input_ids=ids.to(each.device), use_cache=False, logits_to_keep=len(new)).logits[0].argmax(dim=-1).cpu()
        for each in (model, dense)
    ]
    return picks[0] == picks[1]
