"""The model card that goes into every checkpoint, made of its record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from huggingface_hub import ModelCardData

from secateur.errors import UnknownNameError
from secateur.methods import Method, get_method
from secateur.record import Facts, Record, Recovery, public_name

_LOADING = {
    "A": """It is an unmodified {family} architecture, which loads {loads_in}and in the tools that know it:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH")
```""",
    "B": """The stock {family} architecture cannot hold its blocks. It loads with secateur installed, in the
versions of transformers that secateur requires:

```python
import secateur  # makes AutoModel know this model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH")
```

or, without secateur, {loads_in}by the modeling file that lies beside the weights (read it first):

```python
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```

Stock transformers with neither refuses to load it, and so does transformers 4, on purpose: it would fill what is
missing with random weights.""",
}
_OBJECTIVES = {"labels": "on the data itself", "distillation": "on the dense model's predictions"}
_REFINE = "refine"  # the filter, as records name it
_CURVE = 12  # numbers of a curve on the card; the record has all


def card(
    record: Record, *, licence: str | None = None, loading: str | None = None, library: str = "transformers"
) -> str:
    """Render the card: of the last pruning and what was trained since, or of a dense model that was trained.

    Args:
        licence: the source's, where it is known.
        library: what loads it, as the hub calls it.
        loading: what it says of loading, where that is not what the record's tier says.

    Raises:
        UnknownNameError: the record is of a pruning by a method that is not installed.
    """
    chain = record.chain
    origin = next((step.model for step in chain if step.model.keys() & {"base_model", "repository"}), {})
    last = max((place for place, step in enumerate(chain) if step.recovery is None), default=-1)
    pruning, trained = chain[last] if last >= 0 else None, chain[last + 1 :]
    name = _name(record.chain[last].model)
    if pruning is None:
        assert record.recovery is not None  # what has no pruning is a training
        title, text, history = f"{name}, trained {record.recovery.way}", f"Nothing was removed. {_trained(trained)}", ""
        citation = ""
    else:
        method = _method(pruning)
        title = f"{name}, pruned by {pruning.method}"
        text = _removed(pruning, method) + _earlier(chain[: last + 1]) + _trained(trained)
        text += " A pruned model is not the model it came from: judge\nit on your own data.\n\n" + _table(pruning)
        history = f"## How it was made\n\n{_origin(origin)}{_calibration(pruning)}{_notes(pruning)}\n"
        citation = f"\n```bibtex\n{method.bibtex}\n```\n" if method else ""
    recoveries = [_recovery(step.recovery) for step in chain if step.recovery is not None]
    recovery = "## Recovery\n\n" + "\n".join(recoveries) + "\n" if recoveries else ""
    tags = ("pruned", "structured-pruning", "secateur", pruning.method) if pruning else ("secateur", record.method)
    edits = ", and the edits in order" if pruning else ""
    return f"""{_front_matter(library, tags, origin, licence)}
# {title}

{text}

{recovery}## Loading

{loading or _LOADING[record.tier].format(family=record.model["family"], loads_in=_loads_in(record))}

{history}`secateur.json` has every argument, version and fingerprint{edits}; secateur {(pruning or record).secateur}.
{citation}"""


def export_card(
    source: Facts, record: Record | None, to: str, loads_in: str, *, kept: str | None, library: str, usage: str,
    licence: str | None,
) -> str:  # fmt: skip
    """Render the card of an export: that of its model with other words on loading, or a short one.

    Args:
        source: on the model.
        record: of how it was made, if secateur made it.
        to: the format's name.
        loads_in: what loads it, in words.
        kept: the type of its numbers; None where it is the model's own.
        library, licence: as `card`.
        usage: the commands that load it.
    """
    but = f" but for what {kept}, the type of its matrices, rounds" if kept else ""
    loading = (
        f"This is the model in the format `{to}`, with the same logits{but}. It loads in {loads_in}.\n"
        "What is said here of secateur's own files is true of the checkpoint it was exported from.\n\n"
        f"{usage}"
    )
    if record is not None:
        return card(record, licence=licence, loading=loading, library=library)
    head = _front_matter(library, ("secateur",), source, licence)
    return f"{head}\n# {public_name(source.get('name') or 'a model')}, as {to}\n\n## Loading\n\n{loading}\n"


def _front_matter(library: str, tags: Sequence[str], origin: Facts, licence: str | None) -> str:
    """What the hub reads. No `base_model_relation`: the hub has no word for a pruned model."""
    data = ModelCardData(
        library_name=library, pipeline_tag="text-generation", tags=list(tags),
        base_model=origin.get("base_model") or origin.get("repository"),
        license=licence.lower() if licence else None,  # as the hub spells its licences
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def _loads_in(record: Record) -> str:
    """Earlier records do not say it."""
    return f"in {record.loads_in} " if record.loads_in else ""


def _method(pruning: Record) -> Method | None:
    """The method; None where it is of another package that is not there now."""
    with suppress(UnknownNameError):
        return get_method(pruning.method)
    return None


def _name(model: Facts) -> str:
    """One that was built in memory need not have a name."""
    return public_name(model.get("name") or f"a {model['family']} model")


def _removed(pruning: Record, method: Method | None) -> str:
    share = pruning.achieved
    by = f"[{method.name}]({method.paper}): {method.summary}" if method else f"{pruning.method}."
    removed = f"{share.blocks:.1%} of the blocks' parameters ({share.model:.1%} of all) were removed by\n{by}\n"
    sparsity, goal = pruning.sparsity, pruning.goal
    fitted = [name for name in pruning.filters or () if name != _REFINE]
    if fitted:
        removed += f"What stayed makes up for it, fitted on the calibration: {', '.join(fitted)}.\n"
    if (refined := (pruning.filters or {}).get(_REFINE)) is not None:
        drawn = refined.get("text") == "drawn" and refined["passes"] > 1
        text = " and text that the original drew behind it" if drawn else ""
        removed += f"What stayed was then trained towards the original's predictions, on the calibration{text}.\n"
    if goal is not None:
        removed += f"The size was searched for a {goal.sentence}.\n"
    return removed + (f"It was {sparsity.sentence}.\n" if sparsity and sparsity.reason else "")


def _earlier(chain: Sequence[Record]) -> str:
    """A sentence on the prunings before the last one, with the share removed since the original."""
    methods = [step.method for step in chain[:-1] if step.recovery is None]
    if not methods:
        return ""
    share = 1 - chain[-1].after.block_parameters / chain[0].before.block_parameters
    return (
        f"Before that, {_name(chain[0].model)} was pruned by {', '.join(methods)}: in all {share:.1%} of the "
        "original's block parameters are gone. "
    )


def _table(pruning: Record) -> str:
    before, after = pruning.before, pruning.after
    fields = {
        "parameters": "parameters", "of these in blocks": "block_parameters", "blocks": "blocks",
        "attention modules": "attentions", "KV heads": "kv_heads", "FFN neurons": "neurons",
    }  # fmt: skip
    rows = [(name, f"{getattr(before, field):,}", f"{getattr(after, field):,}") for name, field in fields.items()]
    rows.insert(2, ("weights", f"{before.weight_bytes / 1e6:.1f} MB", f"{after.weight_bytes / 1e6:.1f} MB"))
    if after.stream_width != before.stream_width:
        rows.append(("hidden width", f"{before.stream_width}", f"{after.stream_width}"))
    for text in pruning.perplexity or ():
        label = (
            f"perplexity, {text.text}, {text.samples} x {text.length}{', with begin-of-sequence' if text.bos else ''}"
        )
        rows.append((label, f"{text.before:.2f}", f"{text.after:.2f}"))
    return "\n".join(["| | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def _origin(model: Facts) -> str:
    """A sentence on the hub's model at the root, and its commit."""
    if not (model.get("source") == "hub" and model.get("revision")):
        return ""
    repository, commit = model["repository"], model["revision"]
    return f"Made from [{repository}](https://huggingface.co/{repository}/tree/{commit}) at commit `{commit}`. "


def _calibration(pruning: Record) -> str:
    used = pruning.calibration or {}
    licence = f" (licence of the text: {used['licence']})" if "licence" in used else ""
    windows = f"{used.get('samples', '?')} windows of {used.get('length', '?')} tokens"
    windows += ", each begun by the begin-of-sequence token" if used.get("bos") else ""
    name = public_name(used.get("name", "token ids as given"))
    return f"Calibration: {name}, {windows}, seed {pruning.seed}{licence}."


def _notes(pruning: Record) -> str:
    """What the method said of this run, and its curves: lists of numbers, shortened to what fits a line."""
    lines = pruning.remarks
    for name, note in (pruning.notes or {}).items():
        if isinstance(note, list) and note and all(isinstance(value, (int, float)) for value in note):
            shown = [f"{value:.4g}" for value in note]
            if len(shown) > _CURVE:
                shown = [*shown[: _CURVE // 2], "...", *shown[-_CURVE // 2 :]]
            lines.append(f"{name[:1].upper()}{name[1:]}: {', '.join(shown)}.")
    return "".join(f"\n{line}" for line in lines)


def _trained(steps: Sequence[Record]) -> str:
    """A sentence on what was trained after the pruning."""
    if not steps:
        return "Nothing was trained afterwards."
    trained = [step.recovery for step in steps if step.recovery is not None]
    rows = " and ".join(f"{each.way} on {each.data.train:,} rows of {each.data.name}" for each in trained)
    return f"Afterwards it was trained {rows}; see Recovery."


def _recovery(recovery: Recovery) -> str:
    data, settings, losses = recovery.data, recovery.settings, recovery.held_out_loss
    unit = "nats per token"
    if recovery.objective == "labels":
        unit += f"; perplexity {_exp(losses.before)} to {_exp(losses.after)}"
    licence = "not known to secateur; find it out before you publish or use the model"
    if data.licence is not None:
        licence = f"{data.licence} (known by {data.licence_known_by}); it may bind this model too"
    what = "All weights were trained, in float32."
    if recovery.adapted_maps:
        lora = f"rank {settings['rank']}, alpha {settings['alpha']:g}, dropout {settings['dropout']:g}"
        what = f"LoRA ({lora}) on {recovery.adapted_maps} linear maps, merged afterwards."
    schedule = f"AdamW, learning rate {settings['lr']:g} along a cosine, {settings['warmup_steps']} warm-up steps"
    rows = f"{recovery.steps:,} steps of {settings['global_batch']} rows, at most {settings['max_length']} tokens each"
    if recovery.tokens_seen:
        rows += f" ({recovery.tokens_seen[-1][1]:,} tokens)"
    return f"""{what}
{rows}, {_OBJECTIVES[recovery.objective]}; {schedule}, seed {settings["seed"]}.

- data: {data.name} ({data.form}), {data.train:,} rows trained on
- licence of the data: {licence}
- loss on {data.held_out:,} rows held out: {losses.before:.4f} before, {losses.after:.4f} after ({unit})
"""


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):.2f}"
