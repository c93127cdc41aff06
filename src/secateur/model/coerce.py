"""A model from whatever people have one in: a name, a transformers model, or a `Model`. The one place for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from huggingface_hub import constants
from transformers import PreTrainedModel

from secateur.assets import resolve_model
from secateur.errors import UnsupportedModelError
from secateur.model.described import describe
from secateur.model.handle import Model
from secateur.model.load import Source, TokenizerSource, as_tokenizer, record_of, tokenizer_beside
from secateur.model.refusals import not_a_model, require_weights
from secateur.record import Facts, Record

ModelSource: TypeAlias = "Model | PreTrainedModel | Source | str | Path"  # what `handed` takes

# What transformers models came from and went through in this session; they themselves keep no history.
_HISTORY: WeakKeyDictionary[PreTrainedModel, tuple[Facts, list[Record]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with the interface of `Source`."""

    model: Model

    @property
    def name(self) -> str:
        return str(self.model.source.get("name", ""))

    @property
    def device_type(self) -> str:
        return self.model.device.type

    def load(self) -> Model:
        return self.model

    def hollow(self, *, tokenizer: bool = False) -> Model:
        return self.model


@contextmanager
def handed(
    source: ModelSource, tokenizer: TokenizerSource | None = None, *, cache: Path | None = None, keep: bool = False
) -> Iterator[Source | Loaded]:
    """What a function was given as a model. A transformers model is adopted, and itself again at the end: its class and
    configuration are stock ones.

    Args:
        source: a folder, a hub id or "demo", loaded with the defaults of `load`; a `Source`; a model in memory.
        tokenizer: the model's, or the name of one. A transformers model's is else looked for where it came from.
        cache: where `demo` lies.
        keep: a transformers model stays adopted, unless there was an error and no edit.

    Raises:
        UnsupportedModelError: it is no model, or one that cannot be pruned as it is.
    """
    if isinstance(source, (str, Path)):
        source = Source(name=str(source), cache=cache)
    if isinstance(source, Source):
        yield source if tokenizer is None else replace(source, tokenizer=tokenizer)
        return
    if not isinstance(source, Model):
        if reason := not_a_model(source):
            raise UnsupportedModelError(reason)
        release = _releasing(source)
        model = _adopted(source, look=tokenizer is None)
    elif (model := source).device.type == "meta":
        require_weights(model.hf)
    if tokenizer is not None:
        model.tokenizer = as_tokenizer(tokenizer)
    try:
        yield Loaded(model)
    except BaseException:
        keep = False
        raise
    finally:
        if isinstance(source, PreTrainedModel):
            _HISTORY[source] = model.source, model.parents
            if not (keep or model.edits_applied):
                release()


@contextmanager
def borrowed(
    source: ModelSource, tokenizer: TokenizerSource | None = None, *, cache: Path | None = None, keep: bool = False
) -> Iterator[Model]:
    """The model that `handed` stands for, loaded."""
    with handed(source, tokenizer, cache=cache, keep=keep) as given:
        yield given.load()


def _releasing(hf: PreTrainedModel) -> Callable[[], None]:
    """What gives a transformers model, and all in it, the class and the configurations back that they have now."""
    kind = type(hf)
    stated = [(ref(part), part.__dict__["config"]) for part in hf.modules() if "config" in part.__dict__]

    def release() -> None:
        hf.__class__ = kind
        for still_there, config in stated:
            if (part := still_there()) is not None:
                part.config = config

    return release


def _cached_commits(name: str) -> list[str]:
    """The commits of a hub model that the hub's cache has; none of a name that is no hub id."""
    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return [commit.name for commit in folder.glob("*")] if name else []


def _adopted(hf: Any, *, look: bool) -> Model:
    """Args: look: for its tokenizer."""
    require_weights(hf)
    name, commit = str(hf.name_or_path or ""), None
    model = Model(hf, source={"name": name} if name else {})
    if os.path.isdir(name):
        name = os.path.abspath(name)  # a folder called "demo" is no demo model
    elif commits := _cached_commits(name):  # transformers does not say of which it is
        commit = commits[0] if len(commits) == 1 else None
    else:  # it was not loaded from the hub: nothing is asked of it
        name = ""
    if hf in _HISTORY:
        model.source, model.parents = _HISTORY[hf]
    elif name:
        _, provenance = resolve_model(name)
        record = record_of(describe(name, commit))
        model.source = {**model.source, **provenance}
        model.parents = [*record.parents, record.alone] if record else []
    if look and name:
        model.tokenizer = tokenizer_beside(name, describe(name, commit))
    return model
