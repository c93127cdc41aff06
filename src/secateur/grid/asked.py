"""What a grid is asked for: what its cells have in common, and the words of a command."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from secateur.assets import Bos
from secateur.engine.tokens import Count
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.grid.cells import Calibration, Cell
from secateur.methods import Method, Options, get_method
from secateur.model.budget import Budget, Convention
from secateur.model.handle import Model
from secateur.record import public_name

WINDOWS = ("samples", "length")  # of the calibration; may be given as if they were a method's options
PAPER = (0.25, 0.375, 0.5)  # sparsities of 2SSP's tables


@dataclass(frozen=True, kw_only=True)
class Asked(ABC):
    """What a grid is of, a `Comparison` or an `Ablation`, and what all its cells have in common.

    Attributes:
        of: whose parameters a sparsity is a share of.
        options: by method; `samples` and `length` there are those of its calibration.
        calibration: a text's name or file; samples, length: the preset's or the paper's of each method if None.
        count: "all" tokens of the calibration, or of chat data "responses" only.
        bos: whether the calibration's windows begin with the begin-of-sequence token; see `secateur.planning.Request`.
        text_field: the column of rows that holds text or conversations, where it is none that is known; of all texts.
        kind: a folder is of one kind; table: the name of its main table's files.
    """

    kind: ClassVar[str]
    table: ClassVar[str]

    of: Convention = "blocks"
    options: Mapping[str, Options] = field(default_factory=dict)
    calibration: str = "c4"
    samples: int | None = None
    length: int | None = None
    count: Count = "all"
    bos: Bos = "auto"
    text_field: str | None = None

    @abstractmethod
    def cells(self, model: Model) -> list[Cell]:
        """The cells in the table's order, the dense one first, a matched one after what it is matched to.

        Args:
            model: the dense one; it may be a hollow one.

        Raises:
            UnknownNameError, InvalidOptionError: a method, option, value, sparsity or calibration that cannot be.
        """

    @abstractmethod
    def write_tables(self, folder: Path) -> None:
        """Write the tables of all cells that are in the folder."""

    @property
    def settings(self) -> dict[str, object]:
        """As the folder's index has them, but for `bos`, which depends on the model there."""
        return {**asdict(self), "calibration": public_name(self.calibration)}

    def settle(
        self, model: Model, method: Method, *, text: str, seed: int, below: Options | None = None,
        above: Options | None = None,
    ) -> tuple[Options, Calibration]:  # fmt: skip
        """A method's own options, checked, and its calibration, whose shape is its paper's where none was given.

        Args:
            below: hold where nothing was given; above: hold in any case.

        Raises:
            UnknownNameError, InvalidOptionError: what the method would refuse; too few or too long windows.
        """
        for_all = {name: value for name in WINDOWS if (value := getattr(self, name)) is not None}
        given = {**(below or {}), **for_all, **self.options.get(method.name, {}), **(above or {})}
        samples, length = (given.pop(name, None) for name in WINDOWS)
        method.complete(given)
        samples, length = method.window_shape(model.max_length, samples, length)
        return given, Calibration(text=text, samples=samples, length=length, seed=seed, count=self.count, bos=self.bos)


def read_sparsities(asked: Iterable[str | float], blocks: int) -> list[float]:
    """Numbers, `paper` (25, 37.5, 50 %: the reference's -2) or `every-block` (each number of blocks but none and all,
    as a share of them: its -1), ascending and each once.

    Args:
        blocks: of the model.

    Raises:
        InvalidOptionError: another word, or a number outside (0, 1).
    """
    sparsities: set[float] = set()
    for word in asked:
        if word == "paper":
            sparsities.update(PAPER)
        elif word == "every-block":
            sparsities.update(count / blocks for count in range(1, blocks))
        else:
            try:
                sparsities.add(Budget(float(word)).sparsity)
            except (ValueError, InvalidOptionError):
                raise InvalidOptionError(
                    f"a sparsity is a number between 0 and 1, `paper` or `every-block`, not {word!r}"
                ) from None
    return sorted(sparsities)


def parse_options(asked: Iterable[str]) -> dict[str, Options]:
    """`METHOD.NAME=VALUE`, several of them -> by method and name.

    Raises:
        InvalidOptionError, UnknownNameError: not of that form, or no such method, option or value.
    """
    options: dict[str, dict[str, object]] = {}
    for word in asked:
        left, equals, text = word.partition("=")
        method, dot, name = left.partition(".")
        if not (equals and dot):
            raise InvalidOptionError(
                f"options of a method are METHOD.NAME=VALUE, as evopress.generations=4; not {word!r}"
            )
        name = name.replace("-", "_")
        options.setdefault(method, {})[name] = parse_value(get_method(method), name, text)
    return dict(options)


def parse_value(method: Method, name: str, text: str) -> object:
    """The value of one option, or of the calibration's samples or length.

    Raises:
        UnknownNameError, InvalidOptionError: no such option or value.
    """
    if name in WINDOWS:
        if not text.isdecimal():
            raise InvalidOptionError(f"{method.name}.{name} is a whole number, not {text!r}")
        return int(text)
    if name not in method.options:
        raise UnknownNameError.of(f"option of {method.name}", name, [*method.options, *WINDOWS])
    value = method.options[name].parse(text)
    method.complete({name: value})
    return value
