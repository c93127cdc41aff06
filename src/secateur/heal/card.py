"""What a card says of training: a sentence, and a section with data, licence, settings and losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_OBJECTIVES = {"labels": "on the data's own responses", "distillation": "on the dense model's predictions"}


def training_sentence(recoveries: Sequence[Mapping[str, Any]]) -> str:
    """What was trained after the pruning."""
    if not recoveries:
        return "Nothing was trained afterwards."
    data = " and ".join(f"{_data(each)['train']:,} rows of {_data(each)['name']}" for each in recoveries)
    return f"Afterwards it was trained by LoRA on {data}; see Recovery."


def training_section(chain: Iterable[Mapping[str, Any]]) -> str:
    """The section on every recovery in a chain of records; nothing where there is none."""
    parts = [_recovery(each) for each in chain if "recovery" in each]
    return "## Recovery\n\n" + "\n".join(parts) + "\n" if parts else ""


def _recovery(record: Mapping[str, Any]) -> str:
    told, data = record["recovery"], _data(record)
    settings, losses = told["settings"], told["held_out_loss"]
    before, after = losses["before"], losses["after"]
    unit = "nats per token"
    if told["objective"] == "labels":
        unit += f"; perplexity {_exp(before)} to {_exp(after)}"
    lora = f"rank {settings['rank']}, alpha {settings['alpha']:g}, dropout {settings['dropout']:g}"
    schedule = f"AdamW, learning rate {settings['lr']:g} along a cosine, {settings['warmup_steps']} warm-up steps"
    rows = f"{told['steps']:,} steps of {settings['global_batch']} rows, at most {settings['max_length']} tokens each"
    return f"""LoRA ({lora}) on {told["adapted_maps"]} linear maps, merged afterwards.
{rows}, {_OBJECTIVES[told["objective"]]}; {schedule}, seed {settings["seed"]}.

- data: {data["name"]} ({data["form"]}), {data["train"]:,} rows trained on
- licence of the data: {_licence(data)}
- loss on {data["held_out"]:,} rows held out: {before:.4f} before, {after:.4f} after ({unit})
"""


def _licence(data: Mapping[str, Any]) -> str:
    if data["licence"] is None:
        return "not known to secateur; find it out before you publish or use the model"
    return f"{data['licence']} (known by {data['licence_known_by']}); it may bind this model too"


def _data(record: Mapping[str, Any]) -> Mapping[str, Any]:
    data: Mapping[str, Any] = record["recovery"]["data"]
    return data


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):.2f}"
