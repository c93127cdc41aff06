"""Tables: rows of values, declared by column, as Markdown, CSV, JSON, LaTeX and for the page. The JSON and the CSV have
the numbers as they are, the others rounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from secateur.report.looks import NBSP

Value = str | float | int | None
Row = Mapping[str, Value]
S = TypeVar("S")  # what a row is of


@dataclass(frozen=True)
class Column(Generic[S]):
    """One column.

    Attributes:
        key: of the rows' values.
        value: a row's, of what the row is of.
        form: how a number is shown: a format, or a function.
        better: whether the low or the high numbers are the better ones, where that is known.
        sd: a standard deviation that is shown behind the value; its key is the column's with ":sd".
        grey: says nothing; shown, but not to be read.
        hidden: in the files of numbers only.
        page: the part of the page that shows it; of a column that is not hidden the main table, "" for none.
        files: whether it is in files at all, or on the page only.
        hint: what the page says of it.
        sort: the key of the number that it sorts by, where its own is none.
    """

    key: str
    title: str
    value: Callable[[S], Value] | None = None
    form: str | Callable[[float], str] = ""
    better: Literal["low", "high"] | None = None
    sd: Callable[[S], float | None] | None = None
    grey: bool = False
    hidden: bool = False
    page: str | None = None
    files: bool = True
    hint: str = ""
    sort: str = ""

    @property
    def part(self) -> str:
        return self.page if self.page is not None else "" if self.hidden else MAIN

    @property
    def keys(self) -> list[str]:
        return [self.key, f"{self.key}:sd"] if self.sd else [self.key]


MAIN = "main"


@dataclass(frozen=True)
class Table:
    """Rows of values by key; None where there is none.

    Attributes:
        group: the key whose equal values belong together.
        bold: places of the rows whose number is set in bold, by the column's key.
        unsure: those of which that is not known, likewise; the page says so.
        notes: sentences below it.
    """

    columns: Sequence[Column[Any]]
    rows: Sequence[Row]
    group: str | None = None
    bold: Mapping[str, Collection[int]] = field(default_factory=dict)
    unsure: Mapping[str, Collection[int]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def shown(self) -> list[Column[Any]]:
        return [column for column in self.columns if column.files and not column.hidden]

    @property
    def written(self) -> list[Column[Any]]:
        """Those of the files of numbers."""
        return [column for column in self.columns if column.files]

    def on_page(self, part: str) -> list[Column[Any]]:
        """Those of a part of the page that have a value at all."""
        columns = [column for column in self.columns if column.part == part]
        return [column for column in columns if any(row.get(column.key) is not None for row in self.rows)]

    def has(self, place: int, columns: Iterable[Column[Any]]) -> bool:
        """Whether a row has a value in any of some columns."""
        return any(self.rows[place].get(column.key) is not None for column in columns)


def rows_of(columns: Sequence[Column[S]], sources: Iterable[S]) -> list[dict[str, Value]]:
    """Every column's value of every source, and its standard deviation."""
    rows: list[dict[str, Value]] = []
    for source in sources:
        row: dict[str, Value] = {}
        for column in columns:
            row[column.key] = column.value(source) if column.value else None
            if column.sd:
                row[f"{column.key}:sd"] = column.sd(source)
        rows.append(row)
    return rows


def text(column: Column[Any], row: Row) -> str:
    """A value as it is shown; "" where there is none."""
    value = row.get(column.key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not column.form:
        return str(value)
    form, sd = column.form, row.get(f"{column.key}:sd") if column.sd else None
    both = (each for each in (value, sd) if isinstance(each, (int, float)))
    return " ± ".join(form(each) if callable(form) else format(each, form) for each in both)


def typeset(words: str) -> str:
    """As a page has it, where there is a minus sign and no line begins with a unit."""
    return words.replace("-", "\u2212").replace("%", f"{NBSP}%").replace(" points", f"{NBSP}points")


def markdown(table: Table) -> str:
    lines = [
        "| " + " | ".join(_escape_markdown(column.title) for column in table.shown) + " |",
        "|" + "".join("---|" if not column.form else "---:|" for column in table.shown),
    ]
    for place, row in enumerate(table.rows):
        shown = _marked(table, place, row, _escape_markdown, grey="*{}*", bold="**{}**")
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{_escape_markdown(note)}\n" for note in table.notes)])


def comma_separated(table: Table) -> str:
    """All columns, hidden ones too, numbers in full; an empty field where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [key for column in table.written for key in column.keys]
    writer.writerow(keys)
    writer.writerows([["" if row.get(key) is None else row[key] for key in keys] for row in table.rows])
    return out.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    columns = [
        {"key": column.key, "title": column.title, "better": column.better,
         "sd": f"{column.key}:sd" if column.sd else None, "grey": column.grey}
        for column in table.written
    ]  # fmt: skip
    dropped = {key for column in table.columns if not column.files for key in column.keys}
    rows = [{key: value for key, value in row.items() if key not in dropped} for row in table.rows]
    return {"columns": columns, "rows": rows, "notes": list(table.notes)}


def latex(table: Table, *, caption: str) -> str:
    """A `table` for booktabs and xcolor."""
    body = []
    for place, row in enumerate(table.rows):
        shown = _marked(table, place, row, _latex_number, grey=r"\textcolor{{gray}}{{{}}}", bold=r"\textbf{{{}}}")
        body.append(" & ".join(shown) + r" \\")
        after = table.rows[place + 1] if place + 1 < len(table.rows) else None
        if table.group is not None and after is not None and after.get(table.group) != row.get(table.group):
            body.append(r"\midrule")
    alignment = "".join("r" if column.form else "l" for column in table.shown)
    lines = [
        "% needs the packages booktabs and xcolor",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(escape_latex(column.title) for column in table.shown) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip\footnotesize {escape_latex(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _marked(
    table: Table, place: int, row: Row, escape: Callable[[str], str], *, grey: str, bold: str
) -> list[str]:  # fmt: skip
    """A row's shown values, escaped; grey and bold ones as the formats have it."""
    shown = []
    for column in table.shown:
        words = escape(text(column, row))
        if words and column.grey:
            words = grey.format(words)
        elif words and place in table.bold.get(column.key, ()):
            words = bold.format(words)
        shown.append(words)
    return shown


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def escape_latex(words: str) -> str:
    """Every character that LaTeX reads as a command or does not show, spelled out."""
    return "".join(_LATEX.get(character, character) for character in words)


def _latex_number(words: str) -> str:
    return escape_latex(words).replace("±", r"$\pm$")


def _escape_markdown(words: str) -> str:
    return " ".join(words.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").split())
