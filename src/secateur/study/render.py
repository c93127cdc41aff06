"""Tables as Markdown, CSV, JSON and LaTeX. The JSON and the CSV have the numbers as they are, the others rounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: of the rows' values.
        form: how Markdown and LaTeX show a number.
        better: "low" or "high" where the best of a group is set in bold.
        sd: the key of a standard deviation that is shown behind the value.
        grey: says nothing; shown, but not to be read.
        hidden: in the files of numbers only.
    """

    key: str
    title: str
    form: str = ""
    better: Literal["low", "high"] | None = None
    sd: str | None = None
    grey: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of values by key; None where there is none.

    Attributes:
        group: the key within whose equal values the best is looked for.
        beside: the key of what a row only stands beside; where it has a value, the row is not in the running.
        notes: sentences below it.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    group: str | None = None
    beside: str | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if not column.hidden]

    def best(self, column: Column) -> set[int]:
        """Places of the rows that have a group's best value; none where a group has one value only."""
        if column.better is None or column.grey or self.group is None:
            return set()
        groups: dict[Any, list[int]] = {}
        for place, row in enumerate(self.rows):
            running = self.beside is None or row.get(self.beside) is None
            if running and row.get(column.key) is not None and row.get(self.group) is not None:
                groups.setdefault(row[self.group], []).append(place)
        choose = min if column.better == "low" else max
        best: set[int] = set()
        for places in groups.values():
            value = choose(self.rows[place][column.key] for place in places)
            if len(places) > 1:
                best |= {place for place in places if self.rows[place][column.key] == value}
        return best


def markdown(table: Table) -> str:
    lines = [
        "| " + " | ".join(_escape_markdown(column.title) for column in table.shown) + " |",
        "|" + "".join("---|" if not column.form else "---:|" for column in table.shown),
    ]
    best = {column.key: table.best(column) for column in table.shown}
    for place, row in enumerate(table.rows):
        shown = []
        for column in table.shown:
            text = _escape_markdown(_text(column, row))
            if text and column.grey:
                text = f"*{text}*"
            elif place in best[column.key]:
                text = f"**{text}**"
            shown.append(text)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{_escape_markdown(note)}\n" for note in table.notes)])


def comma_separated(table: Table) -> str:
    """All columns, hidden ones too, numbers in full; an empty field where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [key for column in table.columns for key in (column.key, column.sd) if key]
    writer.writerow(keys)
    for row in table.rows:
        writer.writerow(["" if row.get(key) is None else row[key] for key in keys])
    return out.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    columns = [
        {"key": column.key, "title": column.title, "better": column.better, "sd": column.sd, "grey": column.grey}
        for column in table.columns
    ]
    return {"columns": columns, "rows": [dict(row) for row in table.rows], "notes": list(table.notes)}


def latex(table: Table, *, caption: str) -> str:
    """A `table` for booktabs and xcolor."""
    best = {column.key: table.best(column) for column in table.shown}
    body = []
    for place, row in enumerate(table.rows):
        shown = []
        for column in table.shown:
            text = escape_latex(_text(column, row)).replace("±", r"$\pm$")
            if text and column.grey:
                text = rf"\textcolor{{gray}}{{{text}}}"
            elif place in best[column.key]:
                text = rf"\textbf{{{text}}}"
            shown.append(text)
        body.append(" & ".join(shown) + r" \\")
        after = table.rows[place + 1] if place + 1 < len(table.rows) else None
        if table.group is not None and after is not None and after.get(table.group) != row.get(table.group):
            body.append(r"\midrule")
    alignment = "".join("r" if column.form else "l" for column in table.shown)
    heading = " & ".join(escape_latex(column.title) for column in table.shown)
    lines = [
        "% needs the packages booktabs and xcolor",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        heading + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip\footnotesize {escape_latex(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Every character that LaTeX reads as a command or does not show, spelled out."""
    return "".join(_LATEX.get(character, character) for character in text)


def _escape_markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").split())


def _text(column: Column, row: Row) -> str:
    value = row.get(column.key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not column.form:
        return str(value)
    sd = row.get(column.sd) if column.sd else None
    return format(value, column.form) + (f" ± {sd:{column.form}}" if sd is not None else "")
