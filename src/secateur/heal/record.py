"""The record of a recovery, and the card of a checkpoint whatever was done last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from secateur.export import tier
from secateur.model.facts import environment, origin, sizes
from secateur.model.handle import Model
from secateur.record import Cost, HeldOutLoss, Record, Recovery, TrainingData, public_arguments, public_facts
from secateur.version import __version__

Curve = Sequence[tuple[int, float]]


def make_recovery_record(
    model: Model,
    *,
    model_fingerprint: str,
    fingerprint: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    steps: int,
    resumed_at: int | None,
    training: Curve,
    held_out: Curve,
    adapted: int,
    seconds: float,
    arguments: Mapping[str, Any] | None = None,
) -> Record:
    """Describe a finished recovery of `model`. It has no edits, so a record with a `recovery` is not replayed by edits.

    Args:
        model_fingerprint: of the model before; fingerprint: of the job.
        teacher: the source of the model that was learned from, None where labels were.
        training, held_out: (step, loss per counted token); the last of `held_out` is the merged model's.
        adapted: linear maps with an adapter.
    """
    layout = sizes(model.layout(), model)
    return Record(
        secateur=__version__,
        fingerprint=fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method="lora",
        seed=settings["seed"],
        tier=tier(model),
        model=origin(model, model_fingerprint),
        arguments=public_arguments(arguments or {}),
        environment=environment(model),
        cost=Cost(seconds=round(seconds, 1)),
        before=layout,
        after=layout,
        recovery=Recovery(
            objective="labels" if teacher is None else "distillation",
            teacher=public_facts(teacher) if teacher is not None else None,
            data=TrainingData(**data),
            settings=dict(settings),
            adapted_maps=adapted,
            steps=steps,
            resumed_at=resumed_at,
            held_out_loss=HeldOutLoss(
                before=held_out[0][1],
                after=held_out[-1][1],
                curve=[(step, round(loss, 6)) for step, loss in held_out],
            ),
            training_loss=[(step, round(loss, 6)) for step, loss in training],
        ),
        evaluations=[],
        edits=[],
        parents=model.parents,
    )
