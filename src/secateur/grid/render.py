"""Tables as Markdown, CSV, JSON and LaTeX. The JSON and the CSV have the numbers as they are, the others rounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: of the rows' values.
        form: how Markdown and LaTeX show a number.
        better: whether the low or the high numbers are the better ones, where that is known.
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
        group: the key whose equal values belong together.
        bold: places of the rows whose number is set in bold, by the column's key.
        notes: sentences below it.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    group: str | None = None
    bold: Mapping[str, Collection[int]] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if not column.hidden]


def markdown(table: Table) -> str:
    lines = [
        "| " + " | ".join(_escape_markdown(column.title) for column in table.shown) + " |",
        "|" + "".join("---|" if not column.form else "---:|" for column in table.shown),
    ]
    for place, row in enumerate(table.rows):
        shown = []
        for column in table.shown:
            text = _escape_markdown(_text(column, row))
            if text and column.grey:
                text = f"*{text}*"
            elif text and place in table.bold.get(column.key, ()):
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
    body = []
    for place, row in enumerate(table.rows):
        shown = []
        for column in table.shown:
            text = escape_latex(_text(column, row)).replace("±", r"$\pm$")
            if text and column.grey:
                text = rf"\textcolor{{gray}}{{{text}}}"
            elif text and place in table.bold.get(column.key, ()):
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
