"""A few made-up rows of each downstream data set, as the hub has them, and what lm-eval asks for the first of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LETTERS = ["A", "B", "C", "D", "E"]


def _arc(number: int, question: str = "question", answers: int = 4) -> dict[str, Any]:
    texts = [f"thing {number * place}" for place in range(answers)]
    return {
        "id": f"q{number}",
        question: f"What is {number}?",
        "choices": {"text": texts, "label": LETTERS[:answers]},
        "answerKey": LETTERS[number % answers],
    }


def _mmlu(subject: str, number: int) -> dict[str, Any]:
    return {
        "question": f" How many in {subject} {number}? ",
        "subject": subject,
        "choices": [str(number + place) for place in range(4)],
        "answer": (number * number) % 4,
    }


ROWS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "arc_challenge": {
        "validation": [_arc(n) for n in (7, 8)],
        "test": [_arc(1), _arc(2), _arc(3), _arc(4, answers=3)],
    },
    "arc_easy": {"validation": [_arc(n) for n in (5, 6)], "test": [_arc(n) for n in (2, 1, 4, 3)]},
    "boolq": {
        "validation": [
            {"question": f"is it {n}", "passage": f"Title -- It is {n % 3}.", "idx": n, "label": int(n % 3 > 0)}
            for n in range(1, 6)
        ]
    },
    "commonsense_qa": {
        "validation": [{**_arc(n, answers=5), "question": f" Where is {n}? "} for n in (1, 6, 3)]
    },
    "copa": {
        "validation": [
            {"premise": "The man slept.", "choice1": "He woke.", "choice2": "It rained.", "question": "effect",
             "idx": 0, "label": 0},
            {"premise": "The cup broke.", "choice1": "It was new.", "choice2": "It fell.", "question": "cause",
             "idx": 1, "label": 1},
        ]
    },
    "hellaswag": {
        "validation": [
            {"ind": n, "activity_label": "Baking [substeps]", "ctx_a": "A man stirs.", "ctx_b": "he",
             "ctx": "A man stirs. he", "endings": [f"eats [title] {n}", "runs  off.", "sits.", "flies."],
             "source_id": "s", "split": "val", "split_type": "indomain", "label": str(n % 4)}
            for n in (2, 3, 4)
        ]
    },
    "lambada_openai": {"test": [{"text": "the old dog saw a bird"}, {"text": "and then the dog"}]},
    "mmlu": {
        "dev": [_mmlu(subject, n) for subject in ("anatomy", "virology") for n in range(1, 6)],
        "test": [_mmlu("anatomy", n) for n in (7, 8)] + [_mmlu("virology", n) for n in (9, 10, 11, 12)],
    },
    "openbookqa": {
        "validation": [_arc(n, "question_stem") for n in (5, 6)],
        "test": [_arc(n, "question_stem") for n in (3, 1, 2)],
    },
    "piqa": {
        "validation": [
            {"goal": f"How do I open {n}?", "sol1": f"With {n} hands.", "sol2": "With a saw, slowly.", "label": n % 2}
            for n in range(1, 7)
        ]
    },
    "social_i_qa": {
        "validation": [
            {"context": "Tracy left.", "question": "Why?", "answerA": "bored", "answerB": "tired", "answerC": "late",
             "label": "3"}
        ]
    },
    "winogrande": {
        "validation": [
            {"sentence": "Ann helped Sue as _ was kind.", "option1": "Ann", "option2": "Sue", "answer": "1"},
            {"sentence": "Ann thanked Sue as _ had helped.", "option1": "Ann", "option2": "Sue", "answer": "2"},
        ]
    },
}  # fmt: skip

# task: [(context, continuation), ...] and the right one's place (None: the whole continuation must be likeliest),
# written down by hand from the task's definition
ASKED: dict[str, tuple[list[tuple[str, str]], int | None]] = {
    "arc_challenge": ([("Question: What is 1?\nAnswer:", f" thing {n}") for n in range(4)], 1),
    "arc_easy": ([("Question: What is 2?\nAnswer:", f" thing {2 * n}") for n in range(4)], 2),
    "boolq": ([("Title -- It is 1.\nQuestion: is it 1?\nAnswer:", each) for each in (" no", " yes")], 1),
    "commonsense_qa": (
        [("Question: Where is 1?\nA. thing 0\nB. thing 1\nC. thing 2\nD. thing 3\nE. thing 4\nAnswer:", f" {letter}")
         for letter in LETTERS],
        1,
    ),
    "copa": ([("The man slept therefore", "  he woke."), ("The man slept therefore", "  it rained.")], 0),
    "hellaswag": (
        [("Baking : A man stirs. He", each) for each in (" eats. 2", " runs off.", " sits.", " flies.")],
        2,
    ),
    "lambada_openai": ([("the old dog saw a", " bird")], None),
    "openbookqa": ([("What is 3?", f" thing {3 * n}") for n in range(4)], 3),
    "piqa": ([("Question: How do I open 1?\nAnswer:", each) for each in (" With 1 hands.", " With a saw, slowly.")], 1),
    "social_iqa": ([("Q: Tracy left. Why?\nA:", f" {each}") for each in ("bored", "tired", "late")], 2),
    "winogrande": ([("Ann helped Sue as Ann", " was kind."), ("Ann helped Sue as Sue", " was kind.")], 0),
    "mmlu": (
        [("The following are multiple choice questions (with answers) about anatomy.\n\n"
          "How many in anatomy 7?\nA. 7\nB. 8\nC. 9\nD. 10\nAnswer:", f" {letter}") for letter in "ABCD"],
        1,
    ),
}  # fmt: skip


def write_rows(folder: Path) -> Path:
    """A data folder with `ROWS`."""
    for name, splits in ROWS.items():
        for split, rows in splits.items():
            file = folder / "downstream" / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
