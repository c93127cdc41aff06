"""`secateur.json`: all that is needed to repeat a run, and to replay it where its edits carry no tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from secateur.assets.files import kind_of
from secateur.errors import CheckpointError
from secateur.folders import write_file

FORMAT = 1
RECORD = "secateur.json"
Facts = dict[str, Any]  # on a model, a text or a machine: as many as its source gives
Curve = list[tuple[int, float]]  # (step, loss per counted token)
GoalName = Literal["bytes", "speedup", "perplexity_increase"]

_ROWS = ("edits", "notes")  # parts with one line per entry
_BY_TEXT = ("perplexity", "fidelity")  # parts of an evaluation with one entry per text
_PATHS = ("name", "asked", "path")  # of what was read from this machine
_PATH_OPTIONS = ("--out", "--data", "--cache-dir", "--log-file")


class Sizes(Struct, kw_only=True):
    """Of a layout, at the model's dtype; `stream_width` is the residual stream's where it is narrowest."""

    parameters: int
    block_parameters: int
    weight_bytes: int
    blocks: int
    attentions: int
    mlps: int
    neurons: int
    kv_heads: int
    stream_width: int


class Shares(Struct, kw_only=True):
    """The removed share of the blocks' parameters, and of the whole model's."""

    blocks: float
    model: float


class Sparsity(Struct, kw_only=True, omit_defaults=True):
    """What was asked for, as `Budget` has it, and what came of it.

    Attributes:
        reason: why the two differ, where they do by more than is printed.
    """

    asked: float
    of: str
    round_to: int
    achieved: Shares
    reason: str | None = None

    @property
    def got(self) -> float:
        """The achieved share, of what was asked for."""
        return self.achieved.model if self.of == "model" else self.achieved.blocks

    @property
    def sentence(self) -> str:
        """Asked, got, why."""
        whole = "all parameters" if self.of == "model" else "the blocks' parameters"
        why = f": {self.reason}" if self.reason else ""
        return f"asked for {self.asked:.2%} of {whole}, got {self.got:.2%}{why}"


class Cost(Struct, kw_only=True, omit_defaults=True):
    """Seconds; of a pruning also its work in tokens, and as forwards of the whole model, done and asked for."""

    seconds: float
    block_tokens: int | None = None
    head_tokens: int | None = None
    forwards: float | None = None
    forwards_asked: float | None = None


class MetGoal(Struct, kw_only=True, omit_defaults=True):
    """A goal that the sparsity was searched for (`secateur.goals.Goal`).

    Attributes:
        asked, got: bytes of weights, times the dense model's speed, or the share by which the perplexity rose.
        by: how it was measured.
        tried: (sparsity, figure) in the order tried; for bytes and speed of rehearsed layouts, then
            of real prunings where a method decides on the way.
        tolerance: of the sparsity.
        cost: of the search, with the work of all that was pruned and judged for it.
    """

    goal: GoalName
    asked: float
    got: float
    by: Facts = {}
    tried: list[tuple[float, float]]
    tolerance: float
    cost: Cost

    @property
    def sentence(self) -> str:
        """Asked, got, and how it came about."""
        if self.goal == "bytes":
            asked, got = f"at most {self.asked / 1e6:,.1f} MB of weights", f"{self.got / 1e6:,.1f} MB"
        elif self.goal == "speedup":
            asked, got = f"at least {self.asked:.4g} times the speed per {self.by.get('of')}", f"{self.got:.3g} times"
        else:
            asked, got = f"at most {self.asked:+.1%} perplexity", f"{self.got:+.1%}"
            asked += (
                f" on {', '.join(self.by.get('texts', ())) or 'windows of the calibration text that were held out'}"
            )
        end = "largest" if self.goal == "perplexity_increase" else "smallest"
        return (
            f"goal: {asked}, got {got}; {end} sparsity that meets it, to {self.tolerance:.4g} "
            f"({len(self.tried)} tried in {self.cost.seconds:.0f} s)"
        )


class MeasuredPerplexity(Struct, kw_only=True, omit_defaults=True):
    """A text's perplexity before and after the pruning; all else as `judge.results.Perplexity` has it, of after."""

    perplexity: float | UnsetType = UNSET
    nll: float | UnsetType = UNSET
    nll_stderr: float | UnsetType | None = UNSET
    text: str
    samples: int
    length: int
    predictions: int | UnsetType = UNSET
    bos: bool | UnsetType = UNSET
    fingerprint: str | UnsetType = UNSET
    before: float
    after: float


class TrainingData(Struct, kw_only=True, omit_defaults=True):
    """What a recovery was trained and measured on: numbers of rows, and of tokens of the rows trained on; whether each
    row was begun by the begin-of-sequence token in any case."""

    name: str
    form: str
    sha256: str | None = None
    text_sha256: str | None = None
    revision: str | None = None
    rows: int
    dropped: int
    cut: int
    train: int
    held_out: int
    train_tokens: int
    counted_tokens: int
    bos: bool = False
    licence: str | None
    licence_known_by: str | None
    fingerprint: str


class HeldOutLoss(Struct, kw_only=True):
    """Nats per counted token over the rows held out; the last of the curve is the merged model's."""

    before: float
    after: float
    curve: Curve


class Recovery(Struct, kw_only=True):
    """What a recovery was.

    Attributes:
        objective: labels or distillation.
        teacher: the model that was learned from, None where labels were.
        settings: as `secateur.heal.Settings` has them.
        adapted_maps: linear maps with an adapter; 0 where all weights were trained.
        trained_parameters: those of the adapters, or all.
        tokens_seen: (step, tokens of all training rows up to it), for each step that a curve has.
        resumed_at: the step from which it went on, None if it began at the beginning.
    """

    objective: str
    teacher: Facts | None
    data: TrainingData
    settings: Facts
    adapted_maps: int
    steps: int
    resumed_at: int | None
    held_out_loss: HeldOutLoss
    training_loss: Curve
    trained_parameters: int | None = None
    tokens_seen: list[tuple[int, int]] = []

    @property
    def way(self) -> str:
        """In words, for after "trained"."""
        return "by LoRA" if self.adapted_maps else "in full"


class Record(Struct, kw_only=True, omit_defaults=True):
    """One step in a model's life: a pruning, or a recovery, which has a `recovery` and no edits.

    Attributes:
        fingerprint: the identity of the outcome: on one kind of device, two runs of one identity give the same model.
        filters: by name, with their options; None where there were none.
        engine: what the layout was kept for (`prune --for`); None where for none.
        loads_in: the versions of transformers that the checkpoint loads in, in words; without secateur.
        model, calibration: public facts; the model's are of before.
        arguments: the command line or call as given.
        environment: what else may move a last digit.
        goal: what the sparsity was searched for, where none was asked for.
        notes: what the method said of its run; those that are text are for readers, lists of numbers are curves.
        edits: in order, as `secateur.surgery.edits.to_json` gives them.
        parents: the records of earlier steps, oldest first; they have none themselves.
    """

    secateur: str
    format: int
    fingerprint: str
    created: str
    method: str
    options: Facts | None = None
    filters: Facts | None = None
    seed: int
    engine: str | None = None
    sparsity: Sparsity | None = None
    tier: str
    loads_in: str | None = None
    model: Facts
    calibration: Facts | None = None
    arguments: Facts
    environment: Facts
    cost: Cost
    goal: MetGoal | None = None
    before: Sizes
    after: Sizes
    recovery: Recovery | None = None
    perplexity: list[MeasuredPerplexity] | None = None
    evaluations: list[Facts]
    notes: Facts | None = None
    edits: list[Facts]
    parents: list[Record] = []

    def __post_init__(self) -> None:
        """Raise ValueError where a part is missing that a reader asks for, some of them hours after it was loaded."""
        wanted: dict[str, object] = {"model.family": self.model.get("family")}
        wanted |= {f"edits[{place}].edit": edit.get("edit") for place, edit in enumerate(self.edits)}
        if self.recovery is None:
            parts = ("options", "sparsity", "calibration", "perplexity", "notes")
            wanted |= {name: getattr(self, name) for name in parts}
            wanted |= {f"cost.{name}": getattr(self.cost, name) for name in ("forwards", "forwards_asked")}
        if missing := [name for name, value in wanted.items() if value is None]:
            raise ValueError(f"`{missing[0]}` is missing")

    @property
    def achieved(self) -> Shares:
        """What a pruning removed."""
        assert self.sparsity is not None, "a recovery removes nothing"
        return self.sparsity.achieved

    @property
    def chain(self) -> list[Record]:
        """All steps, this one the last."""
        return [*self.parents, self]

    @property
    def alone(self) -> Record:
        """Without its parents, as a later record holds it."""
        return structs.replace(self, parents=[])

    @property
    def remarks(self) -> list[str]:
        """The notes that are meant for readers."""
        return [note for note in (self.notes or {}).values() if isinstance(note, str)]

    def to_json(self) -> Facts:
        """The entries of `secateur.json`."""
        entries: Facts = msgspec.to_builtins(self)
        return {**entries, "parents": entries.get("parents", [])}

    def summary(self) -> Facts:
        """The entries but the long ones: what the commands print as JSON."""
        return {name: value for name, value in self.to_json().items() if name not in ("edits", "parents")}


def read_record(path: Path) -> Record | None:
    """The record of a checkpoint's folder, or in a file; None where there is none.

    Raises:
        CheckpointError: it is damaged; the message names the part.
    """
    return (read := _read(path)) and read[1]


def _read(path: Path) -> tuple[Facts, Record] | None:
    """What a file or folder has, as it is and as a record."""
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    try:
        return entries, msgspec.convert(entries, Record)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged, or no record of secateur: {error}. "
            "Restore it, or take it away to use the model without its history"
        ) from error


def append_evaluation(folder: Path, evaluation: Facts) -> None:
    """Add an evaluation to a checkpoint's record, atomically; a folder without one is left alone."""
    if (read := _read(folder)) is not None:
        entries, _ = read  # as they are: a newer secateur may have written more than is known here
        entries["evaluations"].append(_public_evaluation(evaluation))
        write_file(folder / RECORD, _text(entries) + "\n")


def dump(record: Record) -> str:
    """JSON with one entry per line, but each edit and note, and each list of numbers, on one line: a record is read by
    people too."""
    return _text(record.to_json()) + "\n"


def _text(value: object, indent: str = "", *, levels: int = 99) -> str:
    """A JSON value, spread over lines as deep as `levels`."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(one, (int, float)) for one in value)
    if levels == 0 or numbers or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    inside = indent + "  "
    if isinstance(value, dict):
        names = ((json.dumps(name, ensure_ascii=False), 1 if name in _ROWS else levels - 1) for name in value)
        lines = [
            f"{name}: {_text(one, inside, levels=deep)}"
            for (name, deep), one in zip(names, value.values(), strict=True)
        ]
    else:
        lines = [_text(one, inside, levels=levels - 1) for one in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inside}" + f",\n{inside}".join(lines) + f"\n{indent}{closing}"


# --- what is private ---


def public_name(name: str, *, local: bool = False) -> str:
    """A hub id or name as it is; of a path its last part, since records and cards are published and paths are private.

    What a file is, its sha256 says. A relative path looks like a hub id (`owner/name`) if it has two parts: it is none
    if it is there, or ends as a text's file does.

    Args:
        local: it is known to be a path.
    """
    path = PurePath(name)
    if (
        local
        or path.is_absolute()
        or name.startswith((".", "~"))
        or len(path.parts) > 2
        or kind_of(path)
        or os.path.exists(name)
    ):
        return path.name or name
    return name


def public_facts(facts: Mapping[str, object]) -> Facts:
    """The same facts on a model or text with public names. What comes from the hub or PyPI has no others."""
    if facts.get("source") in ("hub", "pypi"):
        return dict(facts)
    local = _PATHS if facts.get("source") else ()
    return {
        name: public_name(value, local=name in local) if isinstance(value, str) else value
        for name, value in facts.items()
    }


def public_arguments(arguments: Mapping[str, object]) -> Facts:
    """The same arguments with public names; of a command line, in each word and behind each `--option=`."""

    def public(value: Any, before: Any = None) -> Any:
        if isinstance(value, (list, tuple)):
            return [public(each, previous) for previous, each in zip([None, *value], value, strict=False)]
        if not isinstance(value, str):
            return value
        option, equals, given = value.partition("=")
        if value.startswith("--") and equals:
            return option + equals + listed(given, option in _PATH_OPTIONS)
        return listed(value, before in _PATH_OPTIONS)

    def listed(value: str, local: bool) -> str:  # texts come with commas between, and so may paths of them
        return public_name(value, local=True) if local else ",".join(public_name(each) for each in value.split(","))

    return {name: public(value) for name, value in arguments.items()}


def _public_evaluation(evaluation: Facts) -> Facts:
    """The same with public names of models and texts."""

    def public(judged: Facts) -> Facts:
        texts = {part: [public_facts(each) for each in judged[part]] for part in _BY_TEXT if part in judged}
        name = judged.get("name")
        return {**judged, **({"name": public_name(name)} if name else {}), **texts}

    return {key: public(value) if isinstance(value, dict) else value for key, value in evaluation.items()}
