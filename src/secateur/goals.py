"""What must be met, instead of a sparsity: bytes, speed or loss; and the search for the sparsity that meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar, get_args

from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.judge.judging import Judging
from secateur.model.layout import Layout
from secateur.quantities import bytes_of, share_of
from secateur.record import Facts, GoalName, public_name

P = TypeVar("P", bound="Sized")
Tried = list[tuple[float, float]]  # (sparsity, figure)
SpeedOf = Literal["token", "prompt"]
STEPS: dict[GoalName, float] = {"bytes": 0.001, "speedup": 0.01, "perplexity_increase": 0.01}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a pruned model must meet; exactly one of the first three.

    Attributes:
        target_bytes: of all weights at the model's dtype, at most; as "200MB", or a whole number.
        target_speedup: at least so many times as fast as the dense model, measured on the device in paired rounds.
        max_perplexity_increase: at most this share more perplexity than the dense model, as 0.25 or "25%".
        speedup_of: what is to be faster: each further "token", or the "prompt".
        judging: how speed is measured (`prompt_length`, `new_tokens`, `rounds`, `batch_size`), and on which texts the
            perplexity (`texts`, `length`, `samples`): it must hold on each. Without texts windows of the calibration
            text are held out, of the calibration's length.
        tolerance: sparsities are tried in steps of this; 0.001 for bytes, 0.01 for others if None.

    Raises:
        InvalidOptionError: none of the goals, or more than one; a value out of its range.
    """

    target_bytes: int | str | None = None
    target_speedup: float | None = None
    max_perplexity_increase: float | str | None = None
    speedup_of: SpeedOf = "token"
    judging: Judging = field(default_factory=Judging)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        given = [self.target_bytes, self.target_speedup, self.max_perplexity_increase]
        if sum(value is not None for value in given) != 1:
            raise InvalidOptionError("a goal is one of target_bytes, target_speedup and max_perplexity_increase")
        if self.speedup_of not in get_args(SpeedOf):
            raise InvalidOptionError(f"a speedup is of one of {', '.join(get_args(SpeedOf))}, not {self.speedup_of!r}")
        asked = self.asked  # refuses what is no size and no share
        if self.name == "speedup" and asked <= 1:
            raise InvalidOptionError(f"a speedup is a number above 1, as 1.5, not {self.target_speedup!r}")
        if self.name == "perplexity_increase" and asked <= 0:
            raise InvalidOptionError(
                f"a perplexity's increase is a share above 0, as 0.25 or 25%, not {self.max_perplexity_increase!r}"
            )
        if not 0.0001 <= self.step <= 0.25:
            raise InvalidOptionError(f"the tolerance is a sparsity from 0.0001 to 0.25, not {self.tolerance!r}")

    @property
    def name(self) -> GoalName:
        if self.target_bytes is not None:
            return "bytes"
        return "speedup" if self.target_speedup is not None else "perplexity_increase"

    @property
    def asked(self) -> float:
        if self.target_bytes is not None:
            return bytes_of(self.target_bytes, "the target of bytes")
        if self.target_speedup is not None:
            return share_of(self.target_speedup, "a speedup")
        return share_of(self.max_perplexity_increase, "a perplexity's increase")

    @property
    def step(self) -> float:
        return STEPS[self.name] if self.tolerance is None else self.tolerance

    @property
    def is_loss(self) -> bool:
        """Whether it limits what is removed, and is known of a pruned model only."""
        return self.name == "perplexity_increase"

    def meets(self, figure: float) -> bool:
        return figure >= self.asked if self.name == "speedup" else figure <= self.asked

    def measured_by(self) -> Facts:
        """For the record; what is private has its public name."""
        judging = self.judging
        if self.name == "speedup":
            names = ("prompt_length", "new_tokens", "rounds", "batch_size")
            return {"of": self.speedup_of, **{name: getattr(judging, name) for name in names}}
        if self.name == "bytes":
            return {}
        texts = [public_name(name) for name in judging.sources]
        return {"texts": texts, "samples": judging.samples, **({"length": judging.length} if texts else {})}

    @property
    def facts(self) -> Facts:
        """What makes two goals one."""
        return {"goal": self.name, "asked": self.asked, "by": self.measured_by(), "tolerance": self.step}

    def words(self, figure: float) -> str:
        """A figure of this goal's kind, for a message."""
        if self.name == "bytes":
            return f"{figure / 1e6:,.1f} MB of weights"
        return f"{figure:.3g} times the speed" if self.name == "speedup" else f"{figure:+.1%} perplexity"


class Sized(Protocol):
    """What is known of a pruning before it is run; as `secateur.planning.Plan` has it."""

    @property
    def after(self) -> Layout: ...

    @property
    def approximate(self) -> bool: ...


class Plans(Generic[P]):
    """What a pruning would be at the sparsities that a goal's steps allow.

    Args:
        plan_at: raises InfeasibleBudgetError where a method cannot reach a sparsity.
        words: says a figure, for messages; as the goal does if None.

    Raises:
        InfeasibleBudgetError: none can be reached.
    """

    def __init__(
        self, goal: Goal, plan_at: Callable[[float], P], *, words: Callable[[float], str] | None = None
    ) -> None:
        self.goal, self.count, self._plan_at = goal, round(1 / goal.step), plan_at
        self._words = words or goal.words
        self._plans: dict[int, P | None] = {}
        self._why: InfeasibleBudgetError | None = None
        self._feasible, self.first_plan = self._first()

    def _first(self) -> tuple[int, P]:
        """The first place that has a plan, and the plan."""
        for place in _between(0, self.count, 64):
            if (there := self.at(place)) is not None:
                return place, there
        assert self._why is not None  # narrows the type; there are places
        raise self._why

    def at(self, place: int) -> P | None:
        """The plan at so many steps; None where there is none."""
        if place not in self._plans:
            try:
                self._plans[place] = self._plan_at(self.sparsity(place))
            except InfeasibleBudgetError as error:
                self._plans[place], self._why = None, error
        return self._plans[place]

    def sparsity(self, place: int) -> float:
        return round(place / self.count, 6)

    def meet(self, figure: Callable[[P], float]) -> tuple[P, float, Tried]:
        """The smallest sparsity that meets the goal, or the largest that keeps within a loss, by bisection.

        The figure is taken to rise or fall with the sparsity all along, as a measured one does but for noise; what is
        returned meets the goal in any case.

        Returns:
            The plan, its figure, and (sparsity, figure) of all that was tried, in order. Of plans that come to the same
            only the first is tried; where that was a pruning it is also what is returned, since its steps are known.

        Raises:
            InfeasibleBudgetError: no sparsity meets it; says what can be reached.
        """
        goal, figures, tried = self.goal, dict[int, tuple[P, float]](), Tried()
        low, high = 0, self.count
        while high - low > 1:
            near = (place for place in _between(low, high, 8) if self.at(place) is not None)  # there may be gaps
            place = next(near, (low + high) // 2)
            if (there := self.at(place)) is None:
                past = place > self._feasible
            else:
                if (known := self._known(there, figures)) is None:
                    known = there, figure(there)
                    tried.append((self.sparsity(place), known[1]))
                figures[place] = known if goal.is_loss else (there, known[1])
                past = goal.meets(known[1]) != goal.is_loss
            low, high = (low, place) if past else (place, high)
        met = [place for place, (_, value) in figures.items() if goal.meets(value)]
        if not met:
            raise InfeasibleBudgetError(self._unreachable(tried))
        return *figures[max(met) if goal.is_loss else min(met)], tried

    def smaller(self, there: P) -> P:
        """The next plan that leaves less.

        Raises:
            InfeasibleBudgetError: there is none.
        """
        place = next(place for place, known in self._plans.items() if known is there)
        low, high = place, self.count
        found = None
        while high - low > 1:
            near = (place for place in _between(low, high, 8) if self.at(place) is not None)  # there may be gaps
            place = next(near, (low + high) // 2)
            other = self.at(place)
            if other is not None and other.after.parameters < there.after.parameters:
                found, high = other, place
            elif other is None and found is None:  # beyond the method's reach
                high = place
            else:
                low = place
        if found is None:
            raise InfeasibleBudgetError(
                f"{self._words(self.goal.asked)} cannot be reached by this method; the nearest that it reaches is at a "
                f"sparsity of {self.sparsity(low):.4g}"
            )
        return found

    def _known(self, there: P, figures: Mapping[int, tuple[P, float]]) -> tuple[P, float] | None:
        """A plan that comes to the same, with its figure."""
        if self.goal.is_loss and there.approximate:
            return None
        return next((known for known in figures.values() if known[0].after == there.after), None)

    def _unreachable(self, tried: Tried) -> str:
        if not tried:
            return f"no sparsity was found at which {self._words(self.goal.asked)} could be tried"
        most = self.goal.name == "speedup"
        sparsity, figure = (max if most else min)(tried, key=lambda one: one[1])
        return (
            f"at {'least' if most else 'most'} {self._words(self.goal.asked)} cannot be reached by this method; the "
            f"nearest is {self._words(figure)}, at a sparsity of {sparsity:.4g}"
        )


def _between(low: int, high: int, parts: int) -> Iterator[int]:
    """The places between two others in halves, quarters ... down to so many parts."""
    halves = [2**power for power in range(1, parts.bit_length())]
    places = (low + (high - low) * part // whole for whole in halves for part in range(1, whole, 2))
    return (place for place in dict.fromkeys(places) if low < place < high)
