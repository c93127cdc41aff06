"""Options that several commands share: each is declared here once, and those that go together form a group."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from secateur.cli.guard import note
from secateur.errors import InvalidOptionError

if TYPE_CHECKING:
    from secateur.driver import Filter
    from secateur.goals import Goal
    from secateur.judge.judging import Judging
    from secateur.model.load import Source
    from secateur.output import Outcome
    from secateur.record import Record
    from secateur.workers.session import Workers

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or `demo` (SmolLM2-135M-Instruct).")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
CacheDir = Annotated[Path | None, typer.Option(envvar="SECATEUR_CACHE", help="Where fetched models and texts lie.")]
TextField = Annotated[
    str | None,
    typer.Option(
        help="Column of a file's rows that holds text or conversations.",
        show_default="text, messages, conversations, instruction, prompt, content",
    ),
]
FILES = "a .txt, .jsonl, .json, .csv, .tsv or .parquet file (.gz and .zst, too)"
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to stderr.")]

OF = typer.Option(help="A share of the `blocks`' parameters or of the whole `model`'s.", show_default="blocks")
OfShare = Annotated[str, OF]
BOS = typer.Option(
    help="Begin each window, prompt and task with the begin-of-sequence token: always, never (prompts begin as the "
    "tokenizer has it), or auto, if the model's family needs it.",
    show_default="auto",
)
SEED = typer.Option(help="0: the text's first windows, as the papers do; n: a draw of them.", show_default="0")
ROUND_TO = typer.Option(help="Round FFN widths to a multiple of this, in methods that choose them.", show_default="1")
For = Annotated[
    str,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Keep within the layouts that an engine runs unpatched: stock (an unmodified architecture, for all), "
        "llama.cpp, vllm, or any.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")]
KeepRun = Annotated[
    bool, typer.Option("--keep-run", help="Keep OUT.run, from which a killed run goes on, when OUT is there.")
]
KeepStates = Annotated[
    int,
    typer.Option(
        "--keep-states",
        min=0,
        help="Keep a walk's hidden states in OUT.run after every so many blocks: so much less is run again when a "
        "killed run goes on. 0: all blocks before are run again, as always beside a dense reference (secateur).",
    ),
]
SHARD_SIZE = typer.Option("--max-shard-size", help="Larger models are saved in shards.", show_default="5GB")
ShardSize = Annotated[str, SHARD_SIZE]
SPARSITIES = (
    "Numbers between 0 and 1 with commas between; `paper` is 0.25,0.375,0.5, `every-block` every number of blocks."
)

GridOut = Annotated[
    Path | None, typer.Option("--out", help="Folder of the grid; a run that was stopped goes on there.")
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METHOD.NAME=VALUE",
        help="An option of one method, as evopress.generations=4; `samples` and `length` are its calibration's. "
        "May be repeated.",
    ),
]
GridDryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the cells with what their parts would take.")]

PAPERS = "each paper's number"
_REFERENCE = "2ssp"  # among prompts: the reference's, and its decoding


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Where a model comes from, and where it goes."""

    PANEL: ClassVar[str] = "Model and data"

    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1 ...; auto spreads over all. CUDA where there is one, if not given."),
    ] = None
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto"
    revision: Revision = None
    cache_dir: CacheDir = None

    def of(self, model: str) -> Source:
        """The model of that name, and how it is to be loaded."""
        from secateur.model.load import Source

        return Source(name=model, device=self.device, dtype=self.dtype, revision=self.revision, cache=self.cache_dir)


@dataclass(frozen=True, kw_only=True)
class StreamOptions(ModelOptions):
    """And whether its weights stay in their files."""

    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Leave the weights in their files and bring in one block at a time, or load them whole.",
            show_default="stream what does not fit the free memory",
        ),
    ] = None

    def of(self, model: str) -> Source:
        return replace(super().of(model), stream=self.stream)


@dataclass(frozen=True, kw_only=True)
class SourceOptions(StreamOptions):
    """And where the texts come from."""

    data: Annotated[
        Path | None,
        typer.Option(envvar="SECATEUR_DATA", help="Folder with the named texts, for machines without a hub."),
    ] = None
    text_field: TextField = None


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Processes that share the work, by Ray."""

    PANEL: ClassVar[str] = "Workers"

    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Share the work among N processes, by Ray; the result is that of one."),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="--workers: of the Ray cluster with that head, or of the one that this machine is in (`auto`).",
            show_default="of this machine",
        ),
    ] = None
    worker_cpus: Annotated[
        int | None,
        typer.Option(help="--workers: CPUs of each, and its threads.", show_default="this machine's, divided"),
    ] = None
    worker_gpus: Annotated[
        float | None, typer.Option(help="--workers: GPUs of each.", show_default="1 for a model on CUDA, else 0")
    ] = None

    def of(self) -> Workers | None:
        """The workers, if any are asked for.

        Raises:
            InvalidOptionError: an option of workers without them.
        """
        from secateur.workers.session import Workers

        given = {"ray": self.ray, "worker-cpus": self.worker_cpus, "worker-gpus": self.worker_gpus}
        if self.workers is None:
            if asked := [name for name, value in given.items() if value is not None]:
                raise InvalidOptionError(f"--{asked[0]} is of --workers, which is not given")
            return None
        return Workers(count=self.workers, address=self.ray, cpus=self.worker_cpus, gpus=self.worker_gpus)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is told, and where."""

    PANEL: ClassVar[str] = "Output"

    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning"
    log_file: Annotated[Path | None, typer.Option(help="Log to this file too.")] = None
    as_json: Json = False

    def tell(self, outcome: Outcome, folder: Path, show: Callable[[Record, Path], None]) -> None:
        """What was written, or was there already: as JSON, or as `show` prints it."""
        if outcome.was_there:
            note(f"{folder} already holds this result; `secateur eval` measures it")
        if self.as_json:
            print(json.dumps({"out": str(folder), **outcome.record.summary()}))
        else:
            show(outcome.record, folder)


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """What must be met, instead of a sparsity."""

    PANEL: ClassVar[str] = "Goals, instead of --sparsity"

    target_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Weights of at most this size, as 200MB or 1.5GiB.")
    ] = None
    target_speedup: Annotated[
        float | None,
        typer.Option(help="At least so many times the dense model's speed, timed on this device in paired rounds."),
    ] = None
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="At most this share more perplexity, as 0.25 or 25%, on each --perplexity text, or else on windows of "
            "the calibration text that are held out.",
        ),
    ] = None
    speedup_of: Annotated[
        str | None,
        typer.Option(help="--target-speedup: of each further `token`, or of the `prompt`.", show_default="token"),
    ] = None
    prompt_length: Annotated[
        int | None, typer.Option(help="--target-speedup: tokens of the prompt.", show_default="256")
    ] = None
    new_tokens: Annotated[int | None, typer.Option(help="--target-speedup: tokens after it.", show_default="16")] = None
    rounds: Annotated[int | None, typer.Option(help="--target-speedup: measured rounds.", show_default="5")] = None
    batch_size: Annotated[int | None, typer.Option(help="--target-speedup: prompts at once.", show_default="1")] = None
    tolerance: Annotated[
        float | None,
        typer.Option(help="Sparsities are tried in steps of this.", show_default="0.001 for bytes, else 0.01"),
    ] = None

    def of(self, judging: Judging) -> Goal | None:
        """The goal, if one is asked for, with how it is measured.

        Raises:
            InvalidOptionError: an option of a goal that was not asked for.
        """
        from secateur.goals import Goal

        given = {name: value for name, value in vars(self).items() if value is not None}
        goals = [name for name in ("target_bytes", "target_speedup", "max_perplexity_increase") if name in given]
        timed = {name for name in given if name not in goals and name != "tolerance"}
        if given and not goals:
            raise InvalidOptionError(f"--{min(given).replace('_', '-')} is of a goal, and none is given")
        if timed and "target_speedup" not in goals:
            raise InvalidOptionError(f"--{min(timed).replace('_', '-')} is of --target-speedup, which is not given")
        if not goals:
            return None
        judging = replace(judging, **{name: given.pop(name) for name in timed - {"speedup_of"}})
        return Goal(judging=judging, **given)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a pruning is calibrated on: fields of `secateur.planning.Request`."""

    PANEL: ClassVar[str] = "Calibration"

    calibration: Annotated[
        str | None,
        typer.Option(
            help=f"c4, wikitext2, fineweb-edu, demo, or {FILES}.",
            show_default="c4; for the demo model without --data, demo",
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(help="Calibration: windows.", show_default=PAPERS)] = None
    length: Annotated[int | None, typer.Option(help="Calibration: tokens per window.", show_default=PAPERS)] = None
    count: Annotated[str, typer.Option(help="Which tokens count: all, or only the responses in chat data.")] = "all"


@dataclass(frozen=True, kw_only=True)
class CompensationOptions:
    """What makes up for what goes: filters, in the order in which edits go through them."""

    PANEL: ClassVar[str] = "Compensation"

    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="Refit output projections to make up for what goes; for whole modules those that stay."
        ),
    ] = False
    refine: Annotated[
        bool,
        typer.Option(
            "--refine", help="At the end train the weights that stay, by KL from the dense model's predictions."
        ),
    ] = False
    refine_passes: Annotated[
        float | None, typer.Option(help="--refine: windows to train on, in calibrations.", show_default="2")
    ] = None
    refine_rate: Annotated[
        float | None,
        typer.Option(
            help="--refine: peak of the learning rate, as a share of each matrix's root mean square.",
            show_default="0.001",
        ),
    ] = None
    refine_text: Annotated[
        str | None,
        typer.Option(
            help="--refine: beyond one pass, text `drawn` from the dense model, mixed with the calibration's, or the "
            "`calibration` again.",
            show_default="drawn",
        ),
    ] = None

    def filters(self) -> list[Filter]:
        """
        Raises:
            InvalidOptionError: an option of a filter that was not asked for.
        """
        from secateur.compensation import get_filter

        given = {"passes": self.refine_passes, "rate": self.refine_rate, "text": self.refine_text}
        options = {name: value for name, value in given.items() if value is not None}
        if options and not self.refine:
            raise InvalidOptionError(f"--refine-{next(iter(options))} is of --refine, which is not given")
        return [get_filter("refine", **options)] if self.refine else []


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The texts that the perplexity is taken on."""

    PANEL: ClassVar[str] = "Judging: perplexity"

    texts: Annotated[
        str | None,
        typer.Option(help="Texts to take the perplexity on, commas between.", show_default="wikitext2; demo for demo"),
    ] = None
    eval_samples: Annotated[
        int | None, typer.Option(help="First windows of each text; 0 for all.", show_default="20")
    ] = None
    eval_length: Annotated[int | None, typer.Option(help="Tokens per window of each text.", show_default="2048")] = None

    def applied(self, judging: Judging) -> Judging:
        """The judging with what was given."""
        texts = None if self.texts is None else tuple(words(self.texts))
        judging = _given(judging, texts=texts, length=self.eval_length)
        return judging if self.eval_samples is None else replace(judging, samples=self.eval_samples or None)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Downstream tasks."""

    PANEL: ClassVar[str] = "Judging: tasks"

    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Suites (2ssp, slimgpt), lm-eval's tasks, or paths of task files (.yaml); may be repeated. "
            '"" for none of those that a preset has.',
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")] = None
    fewshot: Annotated[
        int | None,
        typer.Option(help="Solved examples before each question; the suite's or the task's if not given."),
    ] = None

    def applied(self, judging: Judging) -> Judging:
        """The judging with what was given."""
        tasks = None if self.tasks is None else tuple(words(self.tasks))
        return _given(judging, tasks=tasks, limit=self.limit, fewshot=self.fewshot)


@dataclass(frozen=True, kw_only=True)
class RunningOptions:
    """What it costs to run the model, and its text."""

    PANEL: ClassVar[str] = "Judging: running it"

    inference: Annotated[
        bool | None,
        typer.Option(
            "--inference/--no-inference",
            help="Time the prompt and each further token; count bytes and memory.",
            show_default="no",
        ),
    ] = None
    prompt_length: Annotated[
        int | None, typer.Option(help="--inference: tokens of the prompt.", show_default="256")
    ] = None
    new_tokens: Annotated[int | None, typer.Option(help="--inference: tokens after it.", show_default="16")] = None
    rounds: Annotated[
        int | None, typer.Option(help="--inference: measured rounds, after one to warm up.", show_default="5")
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="--inference: prompts at once.", show_default="1")] = None
    generate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT",
            help="Continue this prompt greedily; may be repeated. 2ssp stands for the two prompts of the 2SSP "
            "reference, and for --beams.",
        ),
    ] = None
    beams: Annotated[
        bool,
        typer.Option("--beams", help="Continue prompts as the 2SSP reference does, too: 5 beams, no 3-gram twice."),
    ] = False

    def applied(self, judging: Judging) -> Judging:
        """The judging with what was given. Prompts that were given replace others with how they are continued."""
        from secateur.judge.generation import REFERENCE_DECODING, REFERENCE_PROMPTS

        judging = _given(
            judging, inference=self.inference, prompt_length=self.prompt_length, new_tokens=self.new_tokens,
            rounds=self.rounds, batch_size=self.batch_size,
        )  # fmt: skip
        given = self.generate or ()
        decodings = (REFERENCE_DECODING,) if self.beams or _REFERENCE in given else ()
        if given:
            prompts = [prompt for word in given for prompt in (REFERENCE_PROMPTS if word == _REFERENCE else (word,))]
            return replace(judging, prompts=tuple(dict.fromkeys(prompts)), decodings=decodings)
        return replace(judging, decodings=decodings) if decodings else judging


def words(given: str | Sequence[str] | None) -> list[str]:
    """The words of a flag with commas, repeated or not: "a, b" -> ["a", "b"]."""
    several = [given] if isinstance(given, str) else given or ()
    return [word for each in several for part in each.split(",") if (word := part.strip())]


def _given(judging: Judging, **settings: object) -> Judging:
    return replace(judging, **{name: value for name, value in settings.items() if value is not None})  # type: ignore[arg-type]  # each is of its field's type
