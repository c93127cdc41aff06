"""Samples of text against loops by hand and transformers' own search, and the figures taken of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILY_NAMES, logits, tiny, tiny_tokenizer
from oracles import PROPERTY, Watcher, edited, lopsided
from transformers import GenerationConfig

from secateur.errors import DataError, InvalidOptionError
from secateur.judge.generation import GREEDY, REFERENCE_DECODING, REFERENCE_PROMPTS, distinct, generate, generation
from secateur.judge.results import Generation
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES
from secateur.run import Run
from secateur.surgery.edits import DropAttention

SHORT = replace(GREEDY, max_new_tokens=9)
BEAMS = replace(REFERENCE_DECODING, max_length=20)


def speaking(model: Model) -> Model:
    model.tokenizer = tiny_tokenizer(bos=model.family.needs_bos)
    return model


def ids_of(model: Model, prompt: str) -> list[int]:
    assert model.tokenizer is not None
    begin = [model.tokenizer.bos_token_id] if model.family.needs_bos else []
    return begin + list(model.tokenizer(prompt)["input_ids"])


def by_hand(model: Model, prompt: str, new_tokens: int, *, no_repeat: bool = False) -> list[int]:
    """The most probable next token, again and again; if asked, of those that complete no 3-gram twice."""
    ids = ids_of(model, prompt)
    for _ in range(new_tokens):
        scores = logits(model, torch.tensor([ids]))[0, -1].clone()
        for place in range(len(ids) - 2 if no_repeat else 0):
            if ids[place : place + 2] == ids[-2:]:
                scores[ids[place + 2]] = -math.inf
        ids.append(int(scores.argmax()))
    return ids[-new_tokens:]


# --- text ---


@pytest.mark.parametrize("no_repeat", [False, True])
@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", "dense"), ("qwen2", "first attention gone"), *((name, "lopsided") for name in FAMILY_NAMES)],
)
def test_text_is_continued_greedily(family: str, shape: str, no_repeat: bool) -> None:
    model = tiny(family) if shape == "dense" else lopsided(tiny(family))
    if shape == "first attention gone":
        model = edited(tiny(family), DropAttention(0))
    speaking(model)
    made = generate(model, "ab ab ab", replace(SHORT, no_repeat_ngram_size=3 * no_repeat))
    assert made.ids.tolist() == by_hand(model, "ab ab ab", 9, no_repeat=no_repeat)
    assert made.text == model.tokenizer.decode(made.ids, skip_special_tokens=True)  # type: ignore[union-attr]
    assert made.prompt_ids.tolist() == ids_of(model, "ab ab ab")
    assert not made.ended


def test_the_reference_is_as_published() -> None:
    assert REFERENCE_PROMPTS == ("Who is Albert Einstein?", "The theory of relativity")
    published = {
        "max_length": 128, "num_beams": 5, "no_repeat_ngram_size": 3, "early_stopping": True, "end": "tokenizer"
    }  # fmt: skip
    assert published.items() <= REFERENCE_DECODING.record().items()
    assert REFERENCE_DECODING.record()["max_new_tokens"] is None
    assert REFERENCE_DECODING.record()["do_sample"] is GREEDY.record()["do_sample"] is False


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_beams_are_transformers_own(family: str) -> None:
    """As the reference calls it: the text's whole length is limited, and the tokenizer's token ends it."""
    model = speaking(lopsided(tiny(family, vocab_size=len(tiny_tokenizer(bos=FAMILIES[family].needs_bos)))))
    tokenizer: Any = model.tokenizer
    prompt = "ab ab ab"
    end = by_hand(model, prompt, 9)[5]  # a token that is likely
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ids = torch.tensor([ids_of(model, prompt)])
    theirs = model.hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=20, num_beams=5, no_repeat_ngram_size=3,
        early_stopping=True, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    made = generate(model, prompt, BEAMS)
    assert made.text == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(made.ids) <= 20 - ids.shape[1]
    assert made.ended == (end in made.ids)


def test_the_models_own_settings_do_not_matter_and_stay() -> None:
    model = speaking(tiny("llama"))
    plain = generate(model, "ab ab", SHORT)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=2.5, num_beams=2, no_repeat_ngram_size=1, max_new_tokens=2
    )
    model.hf.generation_config = own
    assert generate(model, "ab ab", SHORT).ids.equal(plain.ids)
    assert model.hf.generation_config is own


@pytest.mark.parametrize("several", [False, True])
def test_text_ends_by_itself(several: bool) -> None:
    model = speaking(tiny("llama"))
    free = by_hand(model, "ab", 9)
    at = next(place for place in range(2, 9) if free[place] not in free[:place])
    model.hf.generation_config.eos_token_id = [96, free[at]] if several else free[at]
    made = generate(model, "ab", SHORT)
    assert made.ended
    assert made.ids.tolist() == free[: at + 1]
    assert not generate(model, "ab", replace(SHORT, end="tokenizer")).ended  # the tokenizer has no such token


def test_text_ends_where_the_positions_end() -> None:
    model = speaking(tiny("opt"))
    assert generate(model, "a" * 60).ids.tolist() == by_hand(model, "a" * 60, 4)
    for length in (64, 80):
        with pytest.raises(DataError, match=f"prompt has {length} tokens; the model's positions end at 64"):
            generate(model, "a" * length)
    with pytest.raises(DataError, match="prompt has 20 tokens; '2ssp' ends at 20"):
        generate(model, "a" * 20, BEAMS)


def test_text_needs_a_tokenizer_and_a_prompt_and_agreement_one_vocabulary() -> None:
    model = tiny("llama")
    with pytest.raises(DataError, match="no tokenizer"):
        generate(model, "a")
    with pytest.raises(DataError, match="prompt is empty"):
        generate(speaking(model), "")
    with pytest.raises(DataError, match="no prompt"):
        generation(model, [])
    with pytest.raises(InvalidOptionError, match="greedy agreement compares"):
        judged(model, ["ab"], dense=tiny("llama"))


# --- figures ---


def two_models(family: str) -> tuple[Model, Model]:
    """A model and one that is a little off, so that they agree here and there."""
    dense = speaking(tiny(family))
    model = copy.deepcopy(dense)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return dense, model


def judged(model: Model, prompts: list[str], **options: Any) -> Generation:
    return generation(model, prompts, **{"greedy": SHORT, "decodings": (), **options})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_agrees_with_itself(family: str) -> None:
    for model in (speaking(tiny(family)), speaking(lopsided(tiny(family)))):
        figures = judged(model, ["ab", "Who is it?"], dense=copy.deepcopy(model)).figures
        assert (figures.greedy_agreement, figures.common_prefix_tokens) == (1, 9)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_agreement_equals_a_loop_by_hand(family: str) -> None:
    dense, model = two_models(family)
    prompts = ["ab ab", "Who is it?", "The theory"]
    same, prefix = [], 0
    for prompt in prompts:
        start, told = ids_of(dense, prompt), by_hand(dense, prompt, 9)
        same += [
            int(logits(model, torch.tensor([start + told[:place]]))[0, -1].argmax()) == told[place]
            for place in range(9)
        ]
        mine = by_hand(model, prompt, 9)  # read freely, it agrees up to the first token that differs
        prefix += next((place for place in range(9) if mine[place] != told[place]), 9)
    figures = judged(model, prompts, dense=dense).figures
    assert figures.greedy_agreement == pytest.approx(sum(same) / len(same))
    assert figures.common_prefix_tokens == pytest.approx(prefix / len(prompts))


@pytest.mark.slow
def test_what_the_dense_model_said_need_not_be_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = two_models("llama")
    prompts, watcher = ["ab ab", "Who is it?"], Watcher()
    samples = judged(dense, prompts, decodings=(BEAMS,)).samples
    asked: list[int] = []
    expected = judged(model, prompts, dense=dense)
    dense.hf.register_forward_hook(lambda *_: asked.append(1))
    assert judged(model, prompts, dense=dense, dense_samples=samples, run=Run(observer=watcher)) == expected
    assert len(asked) == 2  # one forward per prompt
    assert watcher.shown == [("generation", 4, 4)]
    others = judged(dense, prompts, greedy=replace(SHORT, max_new_tokens=4)).samples
    assert judged(model, prompts, dense=dense, dense_samples=others) == expected  # of other settings: not used


def test_samples_are_of_every_prompt_and_decoding() -> None:
    model = speaking(tiny("llama"))
    report = judged(model, ["ab", "cd"], decodings=(BEAMS,))
    told = [(each.prompt, each.settings["name"]) for each in report.samples]
    assert told == [("ab", "greedy"), ("ab", "2ssp"), ("cd", "greedy"), ("cd", "2ssp")]
    for each in report.samples:
        decoding = SHORT if each.settings["name"] == "greedy" else BEAMS
        made = generate(model, each.prompt, decoding)
        assert (each.text, each.tokens, each.ended) == (made.text, made.ids.tolist(), made.ended)
        assert each.settings == decoding.record()
    assert report.figures.greedy_agreement is report.figures.common_prefix_tokens is None
    assert report.figures == judged(model, ["ab", "cd"]).figures  # of the greedy texts only


def test_the_share_that_ends_and_the_token_that_ends() -> None:
    model = speaking(tiny("llama"))
    prompts = ["ab", "The theory", "x", "Who is it?"]
    free = {prompt: by_hand(model, prompt, 9) for prompt in prompts}
    end = free["ab"][4]
    model.hf.generation_config.eos_token_id = end
    figures = judged(model, prompts).figures
    bodies = [ids[: ids.index(end)] if end in ids else ids for ids in free.values()]
    assert figures.ended_share == sum(end in ids for ids in free.values()) / 4 > 0
    assert figures.new_tokens == sum(map(len, bodies)) / 4
    for n in (1, 2, 3):
        assert getattr(figures, f"distinct_{n}") == distinct(bodies, n)


@PROPERTY
@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=4), st.integers(1, 4))
def test_distinct_counts_ngrams_within_texts(texts: list[list[int]], n: int) -> None:
    grams = ["".join(map(str, text))[at : at + n] for text in texts for at in range(len(text))]
    grams = [gram for gram in grams if len(gram) == n]
    assert distinct(texts, n) == (len(set(grams)) / len(grams) if grams else None)
