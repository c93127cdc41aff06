"""The model card that goes into every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.errors import UnknownNameError
from secateur.methods import Method, get_method
from secateur.record import public_name, remarks

_LOADING = {
    "A": """It is an unmodified {family} architecture and loads everywhere:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH")
```""",
    "B": """The stock {family} architecture cannot hold its blocks. With secateur installed:

```python
import secateur  # makes AutoModel know this model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH")
```

or, without it, by the modeling file that lies beside the weights (read it first):

```python
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```

Stock transformers with neither refuses to load it, on purpose: it would fill what is missing with random weights.""",
}

_CURVE = 12  # numbers of a curve on the card; the record has all


def card(record: Mapping[str, Any], method: Method | None) -> str:
    """Render the card of a pruning's record.

    Args:
        record: may have `recoveries`, the records of what was trained after the pruning.
        method: None where it is not installed here.
    """
    model = record["model"]
    before, after = record["before"], record["after"]
    achieved = record["sparsity"]["achieved"]
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}"),
        ("of these in blocks", f"{before['block_parameters']:,}", f"{after['block_parameters']:,}"),
        ("weights", _megabytes(before["weight_bytes"]), _megabytes(after["weight_bytes"])),
        ("blocks", before["blocks"], after["blocks"]),
        ("attention modules", before["attentions"], after["attentions"]),
        ("KV heads", f"{before['kv_heads']:,}", f"{after['kv_heads']:,}"),
        ("FFN neurons", f"{before['neurons']:,}", f"{after['neurons']:,}"),
    ]
    if after["stream_width"] != before["stream_width"]:
        rows.append(("hidden width", before["stream_width"], after["stream_width"]))
    rows += [
        (f"perplexity, {each['text']}, {each['samples']} x {each['length']}",
         f"{each['before']:.2f}", f"{each['after']:.2f}")
        for each in record.get("perplexity", [])
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {old} | {new} |" for name, old, new in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{_base_model(record)}tags:
- pruned
- secateur
- {record["method"]}
---

# {_name(model)}, pruned by {record["method"]}

{achieved["blocks"]:.1%} of the blocks' parameters ({achieved["model"]:.1%} of all) were removed by
{f"[{method.name}]({method.paper}): {method.summary}" if method else f"{record['method']}."}
{_earlier(record)}{training_sentence(record.get("recoveries", ()))} A pruned model is not the model it came from: judge
it on your own data.

| | before | after |
|---|---|---|
{table}

{training_section([*record["parents"], *record.get("recoveries", ())])}## Loading

{_LOADING[record["tier"]].format(family=model["family"])}

## How it was made

{_calibration(record)}{_notes(record)}
`secateur.json` has every argument, version and fingerprint, and the edits in order; secateur {record["secateur"]}.
{_cite(method)}"""


def recovered_card(record: Mapping[str, Any]) -> str:
    """Render the card of a dense model that was trained and never pruned."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{_base_model(record)}tags:
- secateur
- lora
---

# {public_name(record["model"]["name"])}, trained by LoRA

Nothing was removed. {training_sentence([record])}

{training_section([*record["parents"], record])}## Loading

{_LOADING[record["tier"]].format(family=record["model"]["family"])}

`secateur.json` has every argument, version and fingerprint; secateur {record["secateur"]}.
"""


def _cite(method: Method | None) -> str:
    return f"\n```bibtex\n{method.bibtex}\n```\n" if method else ""


def _name(model: Mapping[str, Any]) -> str:
    """One that was built in memory need not have a name."""
    return public_name(model.get("name") or f"a {model['family']} model")


def _earlier(record: Mapping[str, Any]) -> str:
    """A sentence on earlier prunings, with the share removed since the original."""
    prunings = [parent["method"] for parent in record["parents"] if "recovery" not in parent]
    if not prunings:
        return ""
    original = record["parents"][0]
    share = 1 - record["after"]["block_parameters"] / original["before"]["block_parameters"]
    chain = ", ".join(prunings)
    return (
        f"Before that, {_name(original['model'])} was pruned by {chain}: in all {share:.1%} of the "
        "original's block parameters are gone. "
    )


def _calibration(record: Mapping[str, Any]) -> str:
    used = record["calibration"]
    licence = f" (licence of the text: {used['licence']})" if "licence" in used else ""
    windows = f"{used.get('samples', '?')} windows of {used.get('length', '?')} tokens"
    name = public_name(used.get("name", "token ids as given"))
    return f"Calibration: {name}, {windows}, seed {record['seed']}{licence}."


def _notes(record: Mapping[str, Any]) -> str:
    """What the method said of this run, and its curves: lists of numbers, shortened to what fits a line."""
    lines = remarks(record)
    for name, note in record.get("notes", {}).items():
        if isinstance(note, list) and note and all(isinstance(value, (int, float)) for value in note):
            shown = [f"{value:.4g}" for value in note]
            if len(shown) > _CURVE:
                shown = [*shown[: _CURVE // 2], "...", *shown[-_CURVE // 2 :]]
            lines.append(f"{name[:1].upper()}{name[1:]}: {', '.join(shown)}.")
    return "".join(f"\n{line}" for line in lines)


def _base_model(record: Mapping[str, Any]) -> str:
    """The card's line that names the hub model at the root; nothing for a local one."""
    model = [*record["parents"], record][0]["model"]
    name = model.get("base_model") or model.get("repository")
    return f"base_model: {name}\n" if name else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def render_card(record: Mapping[str, Any]) -> str:
    """The card of a record, be it of a pruning or of a recovery.

    Raises:
        UnknownNameError: the record is of a pruning by a method that is not installed.
    """
    if "recovery" not in record:
        return card(record, get_method(record["method"]))
    chain = [*record["parents"], record]
    last = next((place for place in reversed(range(len(chain))) if "recovery" not in chain[place]), None)
    if last is None:
        return recovered_card(record)
    pruned = {**chain[last], "parents": chain[:last], "tier": record["tier"], "recoveries": chain[last + 1 :]}
    return card(pruned, _method(pruned["method"]))


def _method(name: str) -> Method | None:
    """The method, None for one of another package that is not there now."""
    try:
        return get_method(name)
    except UnknownNameError:
        return None


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
