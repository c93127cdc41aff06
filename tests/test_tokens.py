"""Windows of a corpus, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CHARACTERS, tiny_tokenizer
from oracles import PROPERTY
from transformers import PreTrainedTokenizerFast

from secateur.assets import Text
from secateur.engine.tokens import Tokens, tokenize
from secateur.errors import DataError, InvalidOptionError

TOKENIZER = tiny_tokenizer()
CORPUS = "".join(CHARACTERS[(7 * i + i * i // 5) % len(CHARACTERS)] for i in range(103))
END = "<|im_end|>"


def plain(text: str) -> Text:
    return Text(name="corpus", text=text, conversations=None, provenance={"source": "file"})


def chat(*conversations: Sequence[tuple[str, str]]) -> Text:
    made = tuple([{"role": role, "content": content} for role, content in each] for each in conversations)
    return Text(name="talk", text=None, conversations=made, provenance={})


def windows(tokens: Tokens) -> list[str]:
    return [TOKENIZER.decode(row) for row in tokens.ids]


# --- windows ---


@PROPERTY
@given(st.text(CHARACTERS, min_size=6, max_size=60), st.integers(2, 6))
def test_seed_zero_cuts_the_text_into_consecutive_windows(text: str, length: int) -> None:
    tokens = tokenize(plain(text), TOKENIZER, length=length)
    whole = len(text) // length
    assert tokens.ids.shape == (whole, length)
    assert tokens.ids.dtype == torch.int64
    assert "".join(windows(tokens)) == text[: whole * length]
    assert torch.equal(tokens.weights, torch.ones(whole, length))
    assert tokens.weights.dtype == torch.float32


def test_another_seed_draws_from_the_same_windows_without_replacement() -> None:
    every = windows(tokenize(plain(CORPUS), TOKENIZER, length=10))
    assert len(set(every)) == 10
    drawn = {seed: windows(tokenize(plain(CORPUS), TOKENIZER, length=10, samples=6, seed=seed)) for seed in range(1, 6)}
    for seed, some in drawn.items():
        assert len(set(some)) == 6
        assert set(some) <= set(every)
        assert some == windows(tokenize(plain(CORPUS), TOKENIZER, length=10, samples=6, seed=seed))
    assert len({tuple(some) for some in drawn.values()}) == 5
    assert set().union(*drawn.values()) == set(every)  # from all windows, not from the first six
    assert sorted(windows(tokenize(plain(CORPUS), TOKENIZER, length=10, seed=3))) == sorted(every)
    assert tokenize(plain(CORPUS), TOKENIZER, length=10, samples=6, seed=2).source == {
        "source": "file", "name": "corpus", "samples": 6, "length": 10, "seed": 2, "count": "all",
        "bos": False, "windows_available": 10,
    }  # fmt: skip


def test_a_draw_keeps_weights_beside_their_ids() -> None:
    text = chat(*[[("user", f"Say {word}"), ("assistant", word)] for word in ("one", "seven", "eleven", "four", "ten")])
    in_order = tokenize(text, TOKENIZER, length=9, count="responses")
    drawn = tokenize(text, TOKENIZER, length=9, count="responses", seed=4)

    def pairs(tokens: Tokens) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        return [(tuple(i), tuple(w)) for i, w in zip(tokens.ids.tolist(), tokens.weights.tolist(), strict=True)]

    assert pairs(drawn) != pairs(in_order)
    assert sorted(pairs(drawn)) == sorted(pairs(in_order))


@pytest.mark.parametrize(("samples", "length", "there"), [(11, 10, 10), (1, 104, 0), (None, 200, 0), (3, 50, 2)])
def test_a_short_text_is_refused_with_what_it_has(samples: int | None, length: int, there: int) -> None:
    with pytest.raises(DataError, match=rf"'corpus'.* 103 .* {there} .* {length}\D.* {samples or 1} "):
        tokenize(plain(CORPUS), TOKENIZER, length=length, samples=samples)


@pytest.mark.parametrize(("samples", "length"), [(0, 10), (-1, 10), (1, 1), (1, 0), (1, -5)])
def test_windows_of_no_use_are_refused(samples: int, length: int) -> None:
    with pytest.raises(InvalidOptionError):
        tokenize(plain(CORPUS), TOKENIZER, length=length, samples=samples)


# --- Tokens ---


def test_the_fingerprint_depends_on_every_id_and_weight() -> None:
    tokens = tokenize(plain(CORPUS), TOKENIZER, length=5, samples=2)
    seen = {tokens.fingerprint()}
    for place in range(10):
        ids, weights = tokens.ids.clone(), tokens.weights.clone()
        ids.view(-1)[place] += 1
        weights.view(-1)[place] = 0.5
        seen |= {Tokens.of(ids, tokens.weights).fingerprint(), Tokens.of(tokens.ids, weights).fingerprint()}
    seen.add(Tokens.of(tokens.ids.view(5, 2)).fingerprint())
    assert len(seen) == 1 + 2 * 10 + 1
    assert Tokens.of(tokens.ids.clone(), source={"name": "other"}).fingerprint() in seen
    turned = Tokens.of(tokens.ids.T.contiguous().T)  # values, not memory
    assert not turned.ids.is_contiguous()
    assert turned.fingerprint() == tokens.fingerprint()


def test_first_cuts_ids_and_weights_alike() -> None:
    ids = torch.arange(20).view(4, 5)
    tokens = Tokens.of(ids, ids / 7)
    cut = tokens.first(2, 3)
    assert cut.ids.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert torch.equal(cut.weights, (ids / 7)[:2, :3])
    assert torch.equal(tokens.first(4).ids, ids)


@pytest.mark.parametrize(("samples", "length"), [(0, None), (5, None), (-1, 2), (1, 1), (1, 0), (1, 6)])
def test_first_refuses_more_than_there_is(samples: int, length: int | None) -> None:
    with pytest.raises(InvalidOptionError):
        Tokens.of(torch.zeros(4, 5)).first(samples, length)


# --- chat ---


def counted(tokens: Tokens) -> list[str]:
    """The runs of tokens that count, as text."""
    ids, weights = tokens.ids.flatten(), tokens.weights.flatten()
    assert set(weights.tolist()) <= {0.0, 1.0}
    runs: list[list[int]] = []
    for place in range(len(ids)):
        if weights[place]:
            if place == 0 or not weights[place - 1]:
                runs.append([])
            runs[-1].append(int(ids[place]))
    return [TOKENIZER.decode(run) for run in runs]


def one_window(text: Text, tokenizer: Any = TOKENIZER, **options: Any) -> Tokens:
    """The whole stream but at most its last token."""
    return tokenize(text, tokenizer, length=2, **options)


WORDS = st.text("abc XYZ.", min_size=1, max_size=12).filter(lambda text: text == text.strip())
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@PROPERTY
@given(st.lists(st.tuples(st.booleans(), TURNS), min_size=1, max_size=3))
def test_responses_are_what_the_assistant_says_and_its_end_mark(
    talks: list[tuple[bool, list[tuple[str, str]]]],
) -> None:
    conversations = []
    for system, turns in talks:
        said = [turn for question, answer in turns for turn in (("user", question), ("assistant", answer))]
        conversations.append([("system", "assistant")] * system + said)
    text = chat(*conversations)
    answers = [answer for _, turns in talks for _, answer in turns]
    assert counted(one_window(text, count="responses")) == [answer + END for answer in answers]
    assert one_window(text).weights.min() == 1


def test_chat_is_rendered_by_the_models_own_template() -> None:
    text = chat([("user", "Hi?"), ("assistant", "Ho!")], [("user", "And?"), ("assistant", "No.")])
    stream = "".join(windows(one_window(text, count="all")))
    want = (
        f"<|im_start|>user\nHi?{END}\n<|im_start|>assistant\nHo!{END}\n"
        f"<|im_start|>user\nAnd?{END}\n<|im_start|>assistant\nNo.{END}\n"
    )
    assert want.startswith(stream)
    assert len(stream) > len(want) - 12


REWRITES = (
    "{% for message in messages %}{% if loop.last or message.role != 'assistant' %}[{{ message.role }}] "
    "{{ message.content }}\n{% else %}[assistant] (gone)\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def other_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = other_template(REWRITES)
    once = [("user", "Hi?"), ("assistant", "Ho!")]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        one_window(chat([*once, *once]), tokenizer, count="responses")
    assert one_window(chat([*once, *once]), tokenizer, count="all").samples > 5
    weights = one_window(chat(once), tokenizer, count="responses").weights.flatten()
    assert weights.sum() in (3, 2)  # "Ho!", or "Ho" if the stream's last token found no partner


NO_START = (
    "{% for m in messages %}({{ m.role }}:{{ m.content }}){% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
)
ASKED = [("user", "Hi?"), ("assistant", "Ho!")]


@pytest.mark.parametrize(
    ("text", "tokenizer", "count", "reason"),
    [
        (chat(ASKED), other_template(NO_START), "responses", "rewrites earlier turns"),  # no start of the answer
        (chat(ASKED), other_template(None), "all", "no chat template"),
        (chat(ASKED), other_template(None), "responses", "no chat template"),
        (plain(CORPUS), TOKENIZER, "responses", "plain text"),
        (chat([("user", "Hi?")]), TOKENIZER, "responses", "no assistant message"),
    ],
)
def test_what_cannot_be_counted_is_refused(text: Text, tokenizer: Any, count: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        one_window(text, tokenizer, count=count)


def test_windows_without_an_answer_have_nothing_to_count() -> None:
    text = chat([("user", "a long question, and then a short answer"), ("assistant", "No.")])
    assert tokenize(text, TOKENIZER, length=20, count="responses").weights.any()
    with pytest.raises(DataError, match="no token of a response"):
        tokenize(text, TOKENIZER, length=20, samples=1, count="responses")
