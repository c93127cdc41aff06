"""Families that other packages add: a row of theirs stands beside those of the table and travels with what is saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.errors import CheckpointError, InvalidOptionError, NameTakenError
from secateur.model.modeling_secateur import FAMILIES, PREFIX, ROW, Family, check_row, classes, row_from

GROUP = "secateur.families"  # of entry points: each is a row, or several


def register_family(row: Family) -> None:
    """Let models of one more family be pruned: one whose class transformers has, described by its row.

    What is saved carries the row. It loads wherever secateur is, and by `trust_remote_code` where it is not; neither
    needs the package that registered the row.

    Raises:
        InvalidOptionError: the row is none, or transformers has no causal language model of its `model_type`.
        NameTakenError: another row has that name.
    """
    try:
        check_row(row)
    except ValueError as error:
        raise InvalidOptionError(str(error)) from error
    if FAMILIES.get(row.model_type, row) != row:
        raise NameTakenError(f"there is another family '{row.model_type}'; a family has one row")
    if not register_classes(row.model_type):
        raise InvalidOptionError(f"transformers has no causal language model of type '{row.model_type}'")
    FAMILIES[row.model_type] = row


def register_classes(model_type: str) -> bool:
    """Make transformers' Auto classes load checkpoints pruned from a stock type; False if it has no such type."""
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    config_class, model_class = classes(model_type)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return True


def register_all() -> None:
    """Do so for every family of the table, and of the packages that are installed beside this one."""
    for model_type in FAMILIES:
        register_classes(model_type)
    for entry in entry_points(group=GROUP):
        _register_plugin(entry)


def accept_row(config: Mapping[str, Any], name: str) -> None:
    """Have the classes ready for a checkpoint that brings its family's row.

    Args:
        config: what its config.json says.
        name: of the checkpoint, for the message.

    Raises:
        CheckpointError: what it brings is no row.
    """
    kind = str(config.get("model_type"))
    if ROW not in config or not kind.startswith(PREFIX):
        return
    try:
        row = row_from(config[ROW])
    except ValueError as error:
        raise CheckpointError(f"{name}: the family that its config.json describes is none: {error}") from error
    if kind != PREFIX + row.model_type:
        raise CheckpointError(f"{name}: its config.json names {kind} and describes the family {row.model_type}")
    register_classes(row.model_type)


def _register_plugin(entry: EntryPoint) -> None:
    """Somebody else's package must not break ours: whatever it does is told, and its families are left out."""
    before = dict(FAMILIES)
    try:
        loaded = entry.load()
        for row in loaded if isinstance(loaded, Iterable) else [loaded]:
            if not isinstance(row, Family):
                raise TypeError(f"{row!r} is no secateur.Family")
            register_family(row)
    except (Exception, SystemExit) as error:
        for name in FAMILIES.keys() - before.keys():
            del FAMILIES[name]
        logging.getLogger(__name__).warning(
            "the family '%s' of %s cannot be used: %s", entry.name, entry.value, error or type(error).__name__
        )
