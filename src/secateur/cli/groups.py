"""Options by the group: a command takes a group as one argument; typer sees a flag per field, in the group's panel."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from typer.models import OptionInfo

Command = Callable[..., None]


def grouped(command: Command, flags: Iterable[inspect.Parameter] = ()) -> Command:
    """The command with the fields of its groups as flags, and with further ones, which its `**` takes.

    A group is a dataclass whose fields are options, each with a default; its `PANEL` heads them in the help.

    Raises:
        TypeError: a field has no default, or is no option.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = typing.get_type_hints(group, include_extras=True)
        parameters += [_flag(group, field, hints[field.name]) for field in dataclasses.fields(group)]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        filled = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **filled)

    signature = [*parameters, *flags]
    call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]  # mypy knows no signature of one's own
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    del call.__wrapped__  # typer would look through to the bare signature
    return call


def _flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A field as typer takes it; the option itself may stand in other commands, in no panel."""
    kind, *metadata = typing.get_args(hint) or (hint,)
    if field.default is dataclasses.MISSING or not metadata or not isinstance(metadata[0], OptionInfo):
        raise TypeError(f"{group.__name__}.{field.name} must be an option with a default")
    option = copy.copy(metadata[0])
    option.rich_help_panel = group.PANEL
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
    )
