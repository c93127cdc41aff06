"""How a cell's model is judged: the one place where a grid meets the parts of `judge`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from msgspec import convert, to_builtins

from secateur.engine.tokens import Tokens, read_tokens
from secateur.grid.pace import GENERATION, INFERENCE, PERPLEXITY, TASKS
from secateur.grid.pruning import Fields
from secateur.judge.generation import generation
from secateur.judge.inference import inference
from secateur.judge.judging import Judging
from secateur.judge.perplexity import perplexity_by_window
from secateur.judge.results import Generation, Perplexity, Sample, TaskResult
from secateur.judge.tasks import Planned, estimated_tokens, judge_tasks, plan_tasks
from secateur.model.handle import Model
from secateur.record import public_name
from secateur.report.results import InferencePair
from secateur.run import Observer, Run

WINDOWS = 150


class Part(Protocol):
    """Opens a part of a cell; gives what shows its progress."""

    def __call__(self, name: str, *, bars: int = 1) -> AbstractContextManager[Observer]: ...


class Judges:
    """What all cells of a grid are judged by. Its tasks are read at once, since an unknown one or a missing extra is to
    be said before gigabytes are loaded; `read` reads the texts and refuses what the model cannot be put through.

    Attributes:
        texts: windows by name.
    """

    def __init__(self, judging: Judging, *, data: Path | None, cache: Path | None) -> None:
        self.judging, self._data, self._cache = judging, data, cache
        self.texts: dict[str, Tokens] = {}
        self._plan: Sequence[Planned] = plan_tasks(
            judging.tasks, metric=judging.metric, limit=judging.limit, fewshot=judging.fewshot, data=data, cache=cache
        )

    def tokens(self) -> dict[str, float]:
        """About how many the texts and the tasks are; WINDOWS of a text that was not read and is wanted whole."""
        asked = self.judging
        windows = [text.samples for text in self.texts.values()] or [asked.samples or WINDOWS] * len(asked.texts)
        return {PERPLEXITY: asked.length * sum(windows), TASKS: estimated_tokens(self._plan)}

    def read(self, dense: Model) -> None:
        """Read the texts, with the dense model's tokenizer.

        Raises:
            As `Judging.check` and `read_tokens`.
        """
        self.judging.check(dense)
        self.texts = {
            name: read_tokens(
                dense, name, purpose="evaluation", length=self.judging.length, samples=self.judging.samples,
                data=self._data, cache=self._cache,
            )
            for name in self.judging.texts
        }  # fmt: skip

    def judge(
        self, model: Model, dense: Callable[[], Model], part: Part, *, dense_samples: Sequence[Sample] | None
    ) -> Iterator[Fields]:
        """A cell's judgements, one after the other.

        Args:
            dense: gives the dense model, the same at each call, or the model itself if it is that one.
            dense_samples: the dense model's samples of text, where they are known.
        """
        judging = self.judging
        if self.texts:
            with part(PERPLEXITY, bars=len(self.texts)) as observer:
                by_text = {}
                for name, tokens in self.texts.items():
                    shown, run = public_name(name), Run(observer=observer)
                    result = perplexity_by_window(model, tokens, run=run, label=f"perplexity on {name}")
                    by_text[shown] = convert({**result, "text": shown}, Perplexity)
            yield {"perplexity": by_text}
        if self._plan:
            with part(TASKS, bars=len(self._plan)) as observer:
                tasks = judge_tasks(model, self._plan, run=Run(observer=observer))
            yield {"tasks": convert(tasks, dict[str, TaskResult])}
        if judging.inference:
            with part(INFERENCE) as observer:
                pair = inference(
                    {"dense": dense(), "pruned": model}, prompt_length=judging.prompt_length,
                    new_tokens=judging.new_tokens, rounds=judging.rounds, batch_size=judging.batch_size,
                    run=Run(observer=observer),
                )  # fmt: skip
            yield {"inference": convert(pair, InferencePair)}
        if judging.prompts:
            with part(GENERATION) as observer:
                other = dense()
                samples = None if dense_samples is None else to_builtins(dense_samples)
                texts = generation(
                    model, judging.prompts, dense=None if other is model else other, dense_samples=samples,
                    decodings=judging.decodings, run=Run(observer=observer),
                )  # fmt: skip
            yield {"generation": convert(texts, Generation)}
