"""A model from whatever people have one in: a name, a transformers model, or a `Model`. The one place for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from weakref import ref

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel

from secateur.assets import resolve_model
from secateur.errors import UnsupportedModelError
from secateur.model.described import describe
from secateur.model.handle import HISTORY, Model
from secateur.model.load import Source, TokenizerSource, as_tokenizer, record_of, tokenizer_beside
from secateur.model.refusals import not_a_model, require_weights

ModelSource: TypeAlias = "Model | PreTrainedModel | Source | str | Path"  # what `handed` takes


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with the interface of `Source`; `tokenizer` is one that was given with it."""

    model: Model
    tokenizer: TokenizerSource | None = None

    @property
    def name(self) -> str:
        return str(self.model.source.get("name", ""))

    @property
    def main_device(self) -> torch.device:
        return self.model.device

    def load(self) -> Model:
        return self.model

    def hollow(self, *, tokenizer: bool = False) -> Model:
        return self.model


@contextmanager
def handed(
    source: ModelSource, tokenizer: TokenizerSource | None = None, *, cache: Path | None = None, adopt: bool = False
) -> Iterator[Source | Loaded]:
    """What a function was given as a model. A transformers model is adopted, and itself again at the end: its class and
    configuration are stock ones. A `Model` has its own tokenizer again.

    Args:
        source: a folder, a hub id or "demo", loaded with the defaults of `load`; a `Source`; a model in memory.
        tokenizer: the model's, or the name of one. A transformers model's is else looked for where it came from.
        cache: where `demo` lies.
        adopt: it stays adopted, and with the tokenizer, unless there was an error and no edit.

    Raises:
        UnsupportedModelError: it is no model, or one that cannot be pruned as it is.
    """
    if isinstance(source, (str, Path)):
        source = Source(name=str(source), cache=cache)
    if isinstance(source, Source):
        yield source if tokenizer is None else replace(source, tokenizer=tokenizer)
        return
    model, edits = None, 0
    if isinstance(source, Model):
        model, edits = source, source.edits_applied
        if model.device.type == "meta":
            require_weights(model.hf)
        release: Callable[[], None] = partial(setattr, model, "tokenizer", model.tokenizer)
    elif reason := not_a_model(source):
        raise UnsupportedModelError(reason)
    else:
        release = _releasing(source)
    try:
        model = model or _adopted(source, look=tokenizer is None)
        if tokenizer is not None:
            model.tokenizer = as_tokenizer(tokenizer)
        yield Loaded(model, tokenizer)
    except BaseException:
        adopt = False
        raise
    finally:
        if not adopt and (model is None or model.edits_applied == edits):
            release()


@contextmanager
def borrowed(
    source: ModelSource, tokenizer: TokenizerSource | None = None, *, cache: Path | None = None, adopt: bool = False
) -> Iterator[Model]:
    """The model that `handed` stands for, loaded."""
    with handed(source, tokenizer, cache=cache, adopt=adopt) as given:
        yield given.load()


def _releasing(hf: PreTrainedModel) -> Callable[[], None]:
    """What gives a transformers model, and all in it, the class and the configurations back that they have now."""
    kind, has_history = type(hf), HISTORY in hf.__dict__
    stated = [(ref(part), part.__dict__["config"]) for part in hf.modules() if "config" in part.__dict__]

    def release() -> None:
        hf.__class__ = kind
        if not has_history:
            hf.__dict__.pop(HISTORY, None)
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
    name, commit, known = str(hf.name_or_path or ""), None, any(hf.__dict__.get(HISTORY, {}).values())
    model = Model(hf, source={"name": name} if name and not known else None)
    if os.path.isdir(name):
        name = os.path.abspath(name)  # a folder called "demo" is no demo model
    elif commits := _cached_commits(name):  # transformers does not say of which it is
        commit = commits[0] if len(commits) == 1 else None
    else:  # it was not loaded from the hub: nothing is asked of it
        name = ""
    if name and not known:
        _, provenance = resolve_model(name)
        model.source = {**model.source, **provenance}
        # of several commits, the history of the newest need not be this one's
        record = record_of(describe(name, commit)) if commit or os.path.isdir(name) else None
        model.parents = [*record.parents, record.alone] if record else []
    if look and name:
        model.tokenizer = tokenizer_beside(name, describe(name, commit))
    return model
