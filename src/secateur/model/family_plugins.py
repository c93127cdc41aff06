"""Families that other packages add: a row of theirs stands beside those of the table and travels with what is saved."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.errors import CheckpointError, InvalidOptionError, NameTakenError
from secateur.model.modeling_secateur import FAMILIES, NOT_PRE_NORM, PREFIX, ROW, Family, classes, row_from

IN_TABLE = frozenset(FAMILIES)  # before any other is registered
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
        _check_row(row)
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
    own = classes(model_type)
    for auto, cls in own.items():
        key = cls.model_type if auto == "AutoConfig" else own["AutoConfig"]
        getattr(transformers, auto).register(key, cls, exist_ok=True)
    return True


def register_all() -> None:
    """Do so for every family of the table, and of the packages that are installed beside this one."""
    for model_type in FAMILIES:
        register_classes(model_type)
    for entry in entry_points(group=GROUP):
        _register_plugin(entry)


def state_family(config: PreTrainedConfig, family: Family) -> None:
    """Write a row that is not in the table into a saved model's configuration, where it is more than the default."""
    if family.model_type not in IN_TABLE:
        default = asdict(Family(model_type=""))
        setattr(config, ROW, {name: value for name, value in asdict(family).items() if value != default[name]})


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
        row = checked_row(config[ROW])
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


# --- what a row may have ---------------------------------------------------------------------------------------------


def checked_row(row: Any) -> Family:
    """A row from plain data that somebody else wrote.

    Raises:
        ValueError: it is no row; says what would be one.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a family's row is an object with its names, not {row!r}")
    if unknown := sorted(set(map(str, row)) - _FORM.keys()):
        raise ValueError(f"a family has no '{unknown[0]}'; it has {', '.join(_FORM)}")
    if "model_type" not in row:
        raise ValueError("a family's row names its model_type")
    family = row_from(row)
    _check_row(family)
    return family


def _check_row(family: Family) -> None:
    """Raise ValueError where a row has something else than the names and paths that a row has."""
    for name, (fits, form) in _FORM.items():
        value = getattr(family, name)
        if not (fits(value) or (value is None and name in _MAY_BE_NONE)):
            raise ValueError(f"a family's {name} is {form}, not {value!r}")
    if (family.qkv_layout == "separate") != (len(family.qkv) == 3):
        raise ValueError(f"qkv_layout '{family.qkv_layout}' does not go with {len(family.qkv)} projections in qkv")
    plain = len(family.attention_norms) == len(family.mlp_norms) == len(family.mlp) == 1
    if family.no_rebase is None and (not plain or family.shared_norms):
        raise ValueError(f"a family whose stream can be rebased has one norm before each module; {NOT_PRE_NORM}")


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _some(*counts: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) in counts and all(map(_PATH, value))


def _pairs(key: Callable[[Any], bool], fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(key(name) and fits(each) for name, each in value.items())


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


_IDENTIFIER = r"[A-Za-z]\w*"
_NAME, _PATH = _matches(_IDENTIFIER), _matches(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*")
_MAY_BE_NONE = (
    "default_width", "kv_heads", "no_rebase", "dropouts", "multiplier", "not_llama", "rope_share", "rope_scalings",
)  # fmt: skip
_COUNTS = _pairs(_matches(rf"(config\.)?{_IDENTIFIER}"), _matches("query_heads|kv_heads|query_rows"))
# By field of a row: whether a value fits, and what would.
_FORM: dict[str, tuple[Callable[[Any], bool], str]] = {
    name: (fits, form)
    for names, fits, form in (
        ("model_type", _matches(r"[A-Za-z0-9][\w.-]*"), "a model_type of transformers"),
        ("blocks", _matches(rf"{_IDENTIFIER}(\.{_IDENTIFIER})+"), "the dotted path of the list of blocks"),
        ("attention out mlp_out final_norm", _PATH, "the dotted path of a module"),
        ("qkv", _some(1, 3), "the paths of one or three projections"),
        ("mlp_in", _some(1, 2), "the paths of one or two projections"),
        ("mlp", _some(1, 2, 3), "the paths of one to three modules"),
        ("attention_norms mlp_norms shared_norms", _some(0, 1, 2), "the paths of up to two norms"),
        ("dropouts", _some(2), "the paths of two modules"),
        ("qkv_layout", _matches("separate|blocks|per_head"), "'separate', 'blocks' or 'per_head'"),
        ("counts", _COUNTS, "attributes with 'query_heads', 'kv_heads' or 'query_rows'"),
        ("head_dim cache width query_heads kv_heads multiplier", _NAME, "the name of an attribute"),
        ("fused_mlp_in free_head_dim post_norms needs_bos", _is(bool), "true or false"),
        ("parallel", _is(bool, str), "true, false, or the name of a setting"),
        ("rope_theta rope_share", _NAME, "the name of a setting"),
        ("default_width", _is(int), "a whole number"),
        ("requires", _pairs(_NAME, _is(bool, int, float, str, type(None))), "settings with their values"),
        ("cannot", _pairs(_NAME, _is(str)), "names of edits with reasons"),
        ("no_rebase not_llama", _is(str), "a reason"),
        ("rope_scalings", _pairs(_NAME, _is(list, tuple)), "kinds of RoPE scaling with the keys of each"),
    )
    for name in names.split()
}
