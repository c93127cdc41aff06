"""Conditions: what is one, what is none, and of which figures they hold."""

from __future__ import annotations

import math
import operator
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import convert
from oracles import PROPERTY

from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.judge.gate import check, failures, known_names, parse
from secateur.judge.results import Evaluation, Failure, Judgement, TaskResult

# Alphabets of their own: for all of Unicode hypothesis makes tables, which takes seconds.
NAMES = st.text(string.ascii_letters + string.digits + "_.:/-", min_size=1)
ODD = string.printable + "ß∞☃٣\u2009\u2028\x00\x85\U0001f600"
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
SPACE = st.sampled_from(["", " ", "\t "])

JUDGED = convert(
    {
        "name": "m", "parameters": 1, "weight_bytes": 4,
        "perplexity": [{"text": "wikitext2", "perplexity": 12.0}, {"text": "/home/me/own.txt", "perplexity": 30.0}],
        "fidelity": [{"text": "chat.jsonl", "kl": 0.2, "loss": 1.5, "top1_agreement": 0.8}],
        "tasks": {
            "piqa": {"metric": "acc", "value": 0.7},
            "boolq": {"metric": "acc", "value": 0.5},
            "lambada": {"metric": "perplexity", "value": 40.0},
        },
        "generation": {
            "figures": {"distinct_1": 0.6, "distinct_2": 0.7, "distinct_3": 0.9, "ended_share": 0.5, "new_tokens": 9.0}
        },
    },
    Judgement,
)  # fmt: skip


def report(**values: float) -> Evaluation:
    """Beside a dense model whose tasks all have chance at 0.5."""
    tasks = {
        task: TaskResult(metric="acc", value=values.get(task, 0.8), stderr=0.01, chance=0.5)
        for task in ("piqa", "boolq")
    }
    dense = Judgement(name="d", parameters=2, weight_bytes=8, tasks={**tasks, "lambada": JUDGED.tasks["lambada"]})
    return Evaluation(model=JUDGED, against=dense)


def failing(text: str, **dense: float) -> list[tuple[str, float | None]]:
    return [(failure.figure, failure.value) for failure in failures(report(**dense), [parse(text)])]


@PROPERTY
@given(NAMES, st.sampled_from(sorted(SIGNS)), NUMBERS, NUMBERS, st.tuples(SPACE, SPACE, SPACE, SPACE))
def test_a_condition_is_read_back(name: str, sign: str, bound: float, value: float, space: tuple[str, ...]) -> None:
    """And its operator is Python's own."""
    read = parse(f"{space[0]}{name}{space[1]}{sign}{space[2]}{bound!r}{space[3]}")
    assert (read.name, read.operator, read.bound) == (name, sign, bound)
    assert read.holds(value) == SIGNS[sign](value, bound)


@PROPERTY
@given(st.one_of(st.text(ODD, max_size=20), st.text(alphabet="kl<>=0.1e+- nainf", max_size=9)))
def test_any_text_is_a_condition_or_a_typed_error(text: str) -> None:
    try:
        read = parse(text)
    except InvalidOptionError:
        return
    assert math.isfinite(read.bound)
    assert set(read.name).isdisjoint("<>= \n\t")


def test_the_mean_over_tasks_holds_only_those_that_tell_models_apart() -> None:
    assert failing("tasks<1") == [("tasks", 0.6)]  # and no perplexity
    assert failing("tasks<1", boolq=0.52) == [("tasks", 0.7)]
    assert failing("boolq<1", boolq=0.52) == [("boolq", 0.5)]  # by its own name it is there
    assert failing("tasks>-1", boolq=0.52, piqa=0.5) == [("tasks", None)]  # nothing to average


def test_without_the_dense_model_the_mean_over_tasks_is_refused_before_any_work() -> None:
    names = known_names(tasks=["piqa"])
    with pytest.raises(InvalidOptionError, match="--against"):
        check([parse("tasks<1")], names, dense=False)
    check([parse("tasks<1")], names, dense=True)
    check([parse("piqa<1")], names, dense=False)
    (failed,) = failures(Evaluation(model=JUDGED), [parse("tasks>-1")])
    assert failed == Failure(condition="tasks>-1", figure="tasks", value=None)


@pytest.mark.parametrize(
    "text",
    ["", "kl", ">0.1", "kl>", "kl=0.1", "kl==0.1", "kl!=0.1", "kl>0.1>0.2", "kl>>1", "kl=>1", "kl>nan", "kl>inf",
     "kl>1_000", "kl>0x10", "kl>1,5", "kl>0.1 or 1", "kl>ppl", "k l>1", "kl>1;", "__import__('os')>1=", "kl>٣",
     "kl>1e9999"],
)  # fmt: skip
def test_bad_conditions_are_refused(text: str) -> None:
    with pytest.raises(InvalidOptionError, match="NAME OP NUMBER"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl>0.1", [("kl:chat.jsonl", 0.2)]),
        ("kl>0.2", []),
        ("kl>=0.2", [("kl:chat.jsonl", 0.2)]),
        ("top1<0.9", [("top1:chat.jsonl", 0.8)]),
        ("loss<=1.5", [("loss:chat.jsonl", 1.5)]),
        ("ppl>10", [("ppl:wikitext2", 12.0), ("ppl:own.txt", 30.0)]),
        ("ppl>20", [("ppl:own.txt", 30.0)]),
        ("ppl:wikitext2>10", [("ppl:wikitext2", 12.0)]),
        ("ppl:own.txt < 3e1", []),
        ("tasks<0.61", [("tasks", 0.6)]),
        ("piqa>0.6", [("piqa", 0.7)]),
        ("boolq>0.6", []),
        ("distinct_3<0.95", [("distinct_3", 0.9)]),
        ("ended_share<0.5", []),
        ("greedy_agreement<0.1", [("greedy_agreement", None)]),  # not known: it cannot pass
    ],
)
def test_it_holds_of_these_figures(text: str, expected: list[tuple[str, float | None]]) -> None:
    assert failing(text) == expected


def test_all_conditions_are_looked_at() -> None:
    failed = failures(report(), [parse("kl>0.1"), parse("ppl>99"), parse("tasks<1")])
    assert [failure.condition for failure in failed] == ["kl>0.1", "tasks<1"]
    nothing = Judgement(name=None, parameters=1, weight_bytes=4)
    assert failures(Evaluation(model=nothing), [parse("kl>0.1")]) == []


def test_known_names_are_those_of_the_figures() -> None:
    names = known_names(
        perplexity=["wikitext2", "/home/me/own.txt"], fidelity=["chat.jsonl"], tasks=["piqa", "boolq"], generation=True
    )
    assert len(set(names)) == len(names)
    for name in names:  # each is there, and passes one of these two
        assert failing(f"{name}>-1e9") or failing(f"{name}<1e9"), name
    check([parse(f"{name}>1") for name in names], names, dense=True)
    assert known_names() == []
    assert known_names(fidelity=["a/b.txt"]) == ["kl", "kl:b.txt", "loss", "loss:b.txt", "top1", "top1:b.txt"]


def test_an_unknown_name_is_told_with_those_that_there_are() -> None:
    names = known_names(perplexity=["wikitext2"])
    with pytest.raises(UnknownNameError, match=r"unknown figure 'pql'\. Did you mean 'ppl'\? Known: ppl, ppl:w"):
        check([parse("ppl>1"), parse("pql>1")], names, dense=True)
    with pytest.raises(UnknownNameError, match="unknown figure 'kl'"):
        check([parse("kl>1")], names, dense=True)
    with pytest.raises(InvalidOptionError, match="'kl>1' has no figure to look at"):
        check([parse("kl>1")], [], dense=True)
    check([], [], dense=False)
