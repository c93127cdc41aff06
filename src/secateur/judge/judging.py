"""Judging models: by what, and how; one model after the other, part by part, for `evaluate` and for grids alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from msgspec import UNSET, structs

from secateur.assets import Bos
from secateur.engine.tokens import Count, Tokens, TokenSource, read_tokens
from secateur.errors import InvalidOptionError
from secateur.judge.fidelity import fidelity
from secateur.judge.gate import check, failures, known_names, parse
from secateur.judge.generation import GREEDY, Decoding, check_prompt, generation
from secateur.judge.inference import at_least_one, inference, longest_prompt, weight_bytes
from secateur.judge.perplexity import perplexity, without_windows
from secateur.judge.results import Evaluation, Judgement, Sample
from secateur.judge.tasks import Planned, check_tokenizer, estimated_tokens, judge_tasks, plan_tasks
from secateur.model.coerce import ModelSource, borrowed
from secateur.model.handle import Model, require_same_vocabulary
from secateur.model.load import TokenizerSource
from secateur.run import Observer, Run

PERPLEXITY, FIDELITY, TASKS = "perplexity", "fidelity", "tasks"
INFERENCE, GENERATION = "inference", "generation"


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What a model is put through.

    Attributes:
        texts: names or files to take the perplexity on; or by a name of one's own whatever `read_tokens` reads.
        length, samples: windows of each, all of one length; all that a text has if `samples` is None.
        bos: whether windows, prompts and what tasks ask begin with the begin-of-sequence token; "auto": if the model's
            family needs it, and else windows without, prompts and tasks as the tokenizer begins a text. "never" leaves
            prompts to the tokenizer too.
        tasks: names of tasks or suites; `limit` documents of each, all if None; `fewshot` and `metric` the suite's own
            if None. See `secateur.judge.tasks.plan_tasks`.
        inference: time the prompt and each further token, and count bytes, with `prompt_length`, `new_tokens`, `rounds`
            and `batch_size`. See `secateur.judge.inference`.
        prompts: continued greedily, and by `decodings` too. See `secateur.judge.generation`.

    Raises:
        InvalidOptionError: a number below 1; decodings of no prompt; texts without a name, or two of one.
    """

    texts: Sequence[str | Path] | Mapping[str, TokenSource] = ()
    length: int = 2048
    samples: int | None = None
    bos: Bos = "auto"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    fewshot: int | None = None
    metric: str | None = None
    inference: bool = False
    prompt_length: int = 256
    new_tokens: int = 16
    rounds: int = 5
    batch_size: int = 1
    prompts: tuple[str, ...] = ()
    decodings: tuple[Decoding, ...] = ()

    def __post_init__(self) -> None:
        numbers = ("samples", "limit", "length", "prompt_length", "new_tokens", "rounds", "batch_size")
        at_least_one(**{name: getattr(self, name) for name in numbers})
        _by_name(self.texts)
        if self.decodings and not self.prompts:
            raise InvalidOptionError("there is no prompt to continue; give one as --generate (`prompts`)")

    @property
    def sources(self) -> Mapping[str, TokenSource]:
        """The texts by name."""
        return _by_name(self.texts)

    def check(self, model: Model) -> None:
        """Refuse what this model cannot be put through, which would else be found after hours; reads no weights.

        Raises:
            InvalidOptionError: more new tokens than the model has positions.
            UnsupportedModelError: tasks, prompts or times of a model that is streamed.
            DataError: tasks or prompts for a model without a tokenizer that fits; an empty prompt, or one too long for
                a decoding's limit or the model's positions.
        """
        if self.tasks or self.inference or self.prompts:
            model.require_whole("judging by tasks, time or text")
        if self.tasks:
            check_tokenizer(model, self.bos)
        if self.inference:
            longest_prompt(model, self.new_tokens, self.prompt_length)
        for prompt in self.prompts:
            for decoding in (GREEDY, *self.decodings):
                check_prompt(model, prompt, decoding, bos=self.bos)


class JudgedPart(Protocol):
    """Opens a part of the judging; gives what shows its progress, in so many bars one after the other."""

    def __call__(self, name: str, *, bars: int = 1) -> AbstractContextManager[Observer]: ...


@dataclass(frozen=True)
class Judge:
    """A judging with its tasks read, and the place of its texts; for all models that are compared."""

    judging: Judging
    tasks: Sequence[Planned]
    data: Path | None = None
    cache: Path | None = None
    text_field: str | None = None

    @classmethod
    def of(
        cls, judging: Judging, *, data: Path | None = None, cache: Path | None = None, text_field: str | None = None
    ) -> Judge:
        """Read the tasks, since an unknown one or a missing extra is to be said before gigabytes are loaded.

        Args:
            data, cache: folders with texts and rows, and of what was fetched.
            text_field: as `read_tokens` has it.

        Raises:
            As `plan_tasks`.
        """
        asked = {name: getattr(judging, name) for name in ("metric", "limit", "fewshot")}
        return cls(judging, plan_tasks(judging.tasks, **asked, data=data, cache=cache), data, cache, text_field)

    def task_tokens(self) -> float:
        """About how many tokens the tasks are."""
        return estimated_tokens(self.tasks)

    def windows(self, model: Model) -> dict[str, Tokens]:
        """The judging's texts by name, in the model's tokens.

        Raises:
            As `Judging.check` and `read_tokens`.
        """
        self.judging.check(model)
        return self.read(model, self.judging.sources, "all")

    def read(self, model: Model, texts: Mapping[str, TokenSource], count: Count | None) -> dict[str, Tokens]:
        """Texts by name, in the judging's windows; `count` as `read_tokens` has it."""
        read = {
            name: read_tokens(
                model, text, purpose="evaluation", length=self.judging.length, samples=self.judging.samples,
                count=count, bos=self.judging.bos, data=self.data, cache=self.cache,
                text_field=self.text_field,
            )
            for name, text in texts.items()
        }  # fmt: skip
        return {name: replace(tokens, source={**tokens.source, "name": name}) for name, tokens in read.items()}

    def judge(
        self,
        model: Model,
        texts: Mapping[str, Tokens],
        part: JudgedPart,
        *,
        own: Mapping[str, Tokens] | None = None,
        dense: Callable[[], Model] | None = None,
        dense_samples: Sequence[Sample] | None = None,
        suffix: str = "",
    ) -> Iterator[Evaluation]:
        """Judge a model; yields what is known after each part, the last time all of it.

        Args:
            texts: of `windows`.
            own: texts to compare the model with the dense one on.
            dense: gives the dense model, the same at each call, or `model` itself if it is that one. They are timed in
                turn, so that a change of the machine's speed hits both: its time stands under `against`.
            dense_samples: the dense model's samples of text, where they are known.
            suffix: of the bars' labels.

        Raises:
            NumericalError: the model gives NaN or Inf.
        """
        judging, known = self.judging, Evaluation(model=_about(model))
        if texts:
            with part(PERPLEXITY, bars=len(texts)) as observer:
                measured = [
                    perplexity(model, tokens, run=Run(observer=observer), label=f"perplexity on {text}{suffix}")
                    for text, tokens in texts.items()
                ]
            yield (known := _with(known, perplexity=measured))
        if own and dense is not None:
            with part(FIDELITY, bars=len(own)) as observer:
                compared = [
                    fidelity(model, dense(), tokens, run=Run(observer=observer), label=f"fidelity on {text}{suffix}")
                    for text, tokens in own.items()
                ]
            yield (known := _with(known, fidelity=compared))
        if self.tasks:
            with part(TASKS, bars=len(self.tasks)) as observer:
                tasks = judge_tasks(model, self.tasks, bos=judging.bos, run=Run(observer=observer))
            yield (known := _with(known, tasks=tasks))
        if judging.inference:
            with part(INFERENCE) as observer:
                times = inference(
                    {"model": model, **({"against": dense()} if dense else {})}, prompt_length=judging.prompt_length,
                    new_tokens=judging.new_tokens, rounds=judging.rounds, batch_size=judging.batch_size,
                    run=Run(observer=observer),
                )  # fmt: skip
                if dense is not None:
                    against = structs.replace(_about(dense()), inference=times["against"])
                    known = structs.replace(known, against=against)
            yield (known := _with(known, inference=times["model"]))
        if judging.prompts:
            with part(GENERATION) as observer:
                other = dense() if dense is not None else None
                text = generation(
                    model, judging.prompts, dense=None if other is model else other, dense_samples=dense_samples,
                    decodings=judging.decodings, bos=judging.bos, run=Run(observer=observer),
                    label=f"generation{suffix}",
                )  # fmt: skip
            yield (known := _with(known, generation=text))
        yield known


def evaluate(
    model: ModelSource,
    judging: Judging,
    *,
    against: ModelSource | None = None,
    fidelity_on: Sequence[str | Path] | Mapping[str, TokenSource] = (),
    fail_if: Sequence[str] = (),
    data: Path | None = None,
    cache: Path | None = None,
    text_field: str | None = None,
    run: Run | None = None,
    tokenizer: TokenizerSource | None = None,
) -> Evaluation:
    """Judge a model, and beside it another one on the same tokens.

    Args:
        model: a folder, a hub id or "demo"; a `Source`; a `Model`; or a transformers model, which is as it was
            afterwards, but in eval mode. `against` may be each of these too.
        judging: what both are put through. The two are timed alternately.
        against: usually the dense model; reported under "against".
        fidelity_on: texts, as `judging` has them, to compare the model with `against` on, in the judging's windows; of
            chat data only responses count.
        fail_if: conditions such as "kl>0.1"; see `secateur.judge.gate`. `tasks`, their mean, needs `against`.
        data, cache, text_field: see `secateur.engine.tokens.read_tokens`.
        run: its observer shows the progress.
        tokenizer: of both models, or the name of one, where it does not lie where they were loaded from.

    Returns:
        A `Judgement` of each, with what was asked; with `fail_if` also the conditions that hold.

    Raises:
        InvalidOptionError, UnknownNameError: a condition that is none, or asks for a figure that cannot be told;
            fidelity without a model to be faithful to. Before any work, as are errors on texts, and those of
            `Judging.check`.
    """
    observer = (run or Run()).observer
    conditions = [parse(each) for each in fail_if]
    judge, compared = Judge.of(judging, data=data, cache=cache, text_field=text_field), _by_name(fidelity_on)
    tasks = [task.name for task in judge.tasks]
    names = known_names(
        perplexity=list(judging.sources), fidelity=list(compared), tasks=tasks, generation=bool(judging.prompts)
    )
    check(conditions, names, dense=against is not None)
    if compared and against is None:
        raise InvalidOptionError("fidelity compares with the dense model; give it as --against (`against`)")
    with ExitStack() as stack:
        own = stack.enter_context(borrowed(model, tokenizer, cache=cache))
        other = own if against is model else None
        if against is not None and other is None:
            other = stack.enter_context(borrowed(against, tokenizer, cache=cache))
        report = _evaluate(own, other, judge, compared, observer)
    return structs.replace(report, failed=failures(report, conditions)) if conditions else report


def _evaluate(
    model: Model, against: Model | None, judge: Judge, compared: Mapping[str, TokenSource], observer: Observer
) -> Evaluation:
    judging = judge.judging
    if against is not None and (compared or judging.prompts):
        require_same_vocabulary(model, against, "fidelity" if compared else "greedy agreement")
    texts = judge.windows(model)
    own = judge.read(model, compared, None)

    def part(name: str, *, bars: int = 1) -> AbstractContextManager[Observer]:
        return nullcontext(observer)

    dense = None
    if against is not None:
        apart = replace(judge, judging=replace(judging, inference=False))
        *_, report = apart.judge(against, judge.windows(against), part, suffix=" (against)")
        dense = _figures(report.model)
    samples = dense.generation.samples if dense and dense.generation else None
    *_, report = judge.judge(
        model, texts, part, own=own, dense=(lambda: against) if against else None, dense_samples=samples
    )
    if dense is not None:
        timed = report.against.inference if report.against else UNSET
        report = structs.replace(report, against=structs.replace(dense, inference=timed))
    return structs.replace(report, model=_figures(report.model))


def _by_name(texts: Sequence[str | Path] | Mapping[str, TokenSource]) -> Mapping[str, TokenSource]:
    if isinstance(texts, Mapping):
        return texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, (str, Path)) for text in texts):
        raise InvalidOptionError('texts are a list of names and paths; others need a name, as {"mine": [...]}')
    by_name = {str(text): text for text in texts}
    if len(by_name) < len(texts):
        raise InvalidOptionError(f"each text once, by a name of its own, not {', '.join(map(str, texts))}")
    return by_name


def _about(model: Model) -> Judgement:
    return Judgement(
        name=model.source.get("name"), parameters=model.layout().parameters, weight_bytes=weight_bytes(model)
    )


def _with(known: Evaluation, **results: object) -> Evaluation:
    return structs.replace(known, model=structs.replace(known.model, **results))


def _figures(judgement: Judgement) -> Judgement:
    """Of perplexities the figures only."""
    texts = judgement.perplexity
    return structs.replace(judgement, perplexity=texts and [without_windows(result) for result in texts])
