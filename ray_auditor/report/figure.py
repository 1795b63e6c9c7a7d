"""Geometry and shades of the page's figures; the template draws them and sets the numbers beside them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ray_auditor.report.candidate import Candidate, SuiteRate
from ray_auditor.report.summary import Summary

Z_BOUNDS = (1.0, 2.0, 3.0, 5.0)
CHANGE_BOUNDS = (0.1, 0.25, 0.5, 0.75)
PANEL_WIDTH, PANEL_HEIGHT = 300, 210
PANEL_LEFT, PANEL_RIGHT, PANEL_TOP, PANEL_BOTTOM = 46, 290, 10, 174
INTERVAL_WIDTH = 220


def z_shade(z: float | None) -> str:
    """Class of a heat map cell: `z-none`, `z-0`, `z-p1` to `z-p4` above or `z-n1` to `z-n4` below the usual.

    The shade follows the number as it is shown, to one decimal.
    """
    if z is None:
        return "z-none"
    step = sum(round(abs(z), 1) >= bound for bound in Z_BOUNDS)
    return "z-0" if step == 0 else f"z-{'p' if z > 0 else 'n'}{step}"


def change_shade(overlap: int | None, k: int) -> str:
    """Class of a token by the share of its kept features that differ: `t-0` to `t-4`, or `t-none`."""
    if overlap is None:
        return "t-none"
    return f"t-{sum(1 - overlap / max(k, 1) >= bound for bound in CHANGE_BOUNDS)}"


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high` (data) over `start` to `end` (drawing units), with round ticks.

    It is linear; with `is_log` linear around zero and logarithmic away from it (inverse hyperbolic sine).
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def at(self, value: float) -> float:
        """Position of a value in drawing units."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.asinh(low), math.asinh(high), math.asinh(value)
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def fit_scale(values: Iterable[float | None], start: float, end: float, intervals: int = 6) -> Scale:
    """The axis that holds zero and every given value, its ends on round ticks."""
    known = [value for value in values if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    if high == low:
        high = 1.0
    rough = (high - low) / intervals
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * magnitude for nice in (1, 2, 2.5, 5, 10) if nice * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


@dataclass(frozen=True)
class Dot:
    """One candidate in a panel, in drawing units; flagged dots carry the candidate's name."""

    candidate: Candidate
    rate: SuiteRate
    x: float
    y: float
    y_low: float | None
    y_high: float | None
    flagged: bool

    @property
    def label_left(self) -> bool:
        """Whether the name fits only on the left of the dot."""
        return self.x > (PANEL_LEFT + PANEL_RIGHT) / 2


@dataclass(frozen=True)
class Panel:
    """Difference rate against general shift on one suite; `undetermined` candidates have no dot."""

    suite: str
    dots: tuple[Dot, ...]
    undetermined: int


def _dot(summary: Summary, candidate: Candidate, suite: str, x: Scale, y: Scale) -> Dot | None:
    general, rate = candidate.suites.get(summary.general), candidate.suites[suite]
    if general is None or general.shift is None or rate.difference_rate is None:
        return None
    low, high = (None if end is None else y.at(end) for end in (rate.ci_low, rate.ci_high))
    flagged = (candidate.id, suite) in summary.flagged_cells
    return Dot(candidate, rate, x.at(general.shift), y.at(rate.difference_rate), low, high, flagged)


def rate_scale(rates: Iterable[SuiteRate], start: float, end: float) -> Scale:
    """The axis that holds the given difference rates and their intervals."""
    values = [value for rate in rates for value in (rate.difference_rate, rate.ci_low, rate.ci_high)]
    return fit_scale(values, start, end)


def draw_panels(summary: Summary, shown: tuple[Candidate, ...]) -> tuple[Scale, Scale, tuple[Panel, ...]]:
    """Lay out one panel a suite on shared axes.

    Returns:
        The axis of the general shift (features per token), the axis of the difference rate, and the panels.
    """
    general = [rate for candidate in shown if (rate := candidate.suites.get(summary.general))]
    tasks = [
        candidate.suites[suite]
        for candidate in shown
        for suite in summary.suites
        if suite in candidate.suites
    ]
    x = fit_scale((rate.shift for rate in general), PANEL_LEFT, PANEL_RIGHT)
    y = rate_scale(tasks, PANEL_BOTTOM, PANEL_TOP)
    panels = []
    for suite in summary.suites:
        drawn = [_dot(summary, candidate, suite, x, y) for candidate in shown if suite in candidate.suites]
        dots = tuple(dot for dot in drawn if dot is not None)
        panels.append(Panel(suite, dots, len(drawn) - len(dots)))
    return x, y, tuple(panels)
