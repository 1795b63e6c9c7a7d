"""Geometry and shades of the page's figures; the template draws them and sets the numbers beside them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_auditor.report.candidate import Candidate, SuiteRate
from ray_auditor.report.summary import Summary

Z_BOUNDS = (1.0, 2.0, 3.0, 5.0)
CHANGE_BOUNDS = (0.1, 0.25, 0.5, 0.75)
PANEL_WIDTH, PANEL_HEIGHT = 300, 210
PANEL_LEFT, PANEL_RIGHT, PANEL_TOP, PANEL_BOTTOM = 46, 290, 10, 174
INTERVAL_WIDTH = 220
NAME_WIDTH, NAME_HEIGHT, LETTER_WIDTH = 120, 11, 6
CROWD_CELL, CROWD_BOUNDS = 4, (1, 10, 100)
MIN_SHIFT = 0.01  # of k: whose general shift is smaller is no reference either (docs/method.md)


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
    """One candidate in a panel, in drawing units; `named` dots carry the candidate's name."""

    candidate: Candidate
    rate: SuiteRate
    x: float
    y: float
    y_low: float | None
    y_high: float | None
    flagged: bool
    named: bool = False
    label_left: bool = False


@dataclass(frozen=True)
class Panel:
    """Difference rate against general shift on one suite.

    `undetermined` candidates have no dot, nor have those `off_scale`, whose general shift is too small to
    divide by; see `least_shift`.
    """

    suite: str
    dots: tuple[Dot, ...]
    undetermined: int
    off_scale: int


def least_shift(summary: Summary) -> float:
    """The smallest general shift that is drawn, features per token; 0 where k is not recorded."""
    return MIN_SHIFT * (summary.k or 0)


def _moved(summary: Summary, candidate: Candidate) -> bool:
    general = candidate.suites.get(summary.general)
    return general is not None and general.shift is not None and general.shift >= least_shift(summary)


def _dot(summary: Summary, candidate: Candidate, suite: str, x: Scale, y: Scale) -> Dot | None:
    general, rate = candidate.suites.get(summary.general), candidate.suites[suite]
    if general is None or general.shift is None or rate.difference_rate is None:
        return None
    if not _moved(summary, candidate):
        return None
    low, high = (None if end is None else y.at(end) for end in (rate.ci_low, rate.ci_high))
    flagged = (candidate.id, suite) in summary.flagged_cells
    return Dot(candidate, rate, x.at(general.shift), y.at(rate.difference_rate), low, high, flagged)


def rate_scale(rates: Iterable[SuiteRate], start: float, end: float) -> Scale:
    """The axis that holds the given difference rates and their intervals."""
    values = [value for rate in rates for value in (rate.difference_rate, rate.ci_low, rate.ci_high)]
    return fit_scale(values, start, end)


def _name(dots: Sequence[Dot]) -> tuple[Dot, ...]:
    """Flagged dots get their names, the first ones first, but for names that would cover another.

    A name stands where it fits, on the side where it lies over fewer dots.
    """
    taken: list[tuple[float, float]] = []
    named = []
    x_N, y_N = np.array([(dot.x, dot.y) for dot in dots], dtype=float).reshape(-1, 2).T
    for dot in dots:
        if not dot.flagged:
            named.append(dot)
            continue
        width = min(NAME_WIDTH, LETTER_WIDTH * len(dot.candidate.id) + 12)
        beside_N = abs(y_N - dot.y) < NAME_HEIGHT
        fits = {True: dot.x - width > PANEL_LEFT, False: dot.x + width < PANEL_WIDTH}
        covered = {
            left: int(
                (beside_N & (x_N != dot.x) & ((x_N < dot.x) == left) & (abs(x_N - dot.x) < width)).sum()
            )
            for left in (False, True)
        }
        label_left = min(covered, key=lambda left: (not fits[left], covered[left]))
        dot = replace(dot, label_left=label_left)
        middle = dot.x + (-NAME_WIDTH if label_left else NAME_WIDTH) / 2
        is_free = all(abs(middle - x) > NAME_WIDTH or abs(dot.y - y) > NAME_HEIGHT for x, y in taken)
        if is_free:
            taken.append((middle, dot.y))
            dot = replace(dot, named=True)
        named.append(dot)
    return tuple(named)


@dataclass(frozen=True)
class Axes:
    """The axes that all panels share: general shift (features per token) and difference rate."""

    x: Scale
    y: Scale


def fit_axes(summary: Summary) -> Axes:
    """The axes that hold every audited candidate on every suite, but for those off scale."""
    general = (one.suites.get(summary.general) for one in summary.audited)
    tasks = (
        rate
        for one in summary.audited
        if _moved(summary, one)
        for suite, rate in one.suites.items()
        if suite != summary.general and rate.difference_rate is not None
    )
    x = fit_scale((rate.shift for rate in general if rate), PANEL_LEFT, PANEL_RIGHT)
    return Axes(x, rate_scale(tasks, PANEL_BOTTOM, PANEL_TOP))


def draw_panels(summary: Summary, shown: Sequence[Candidate], axes: Axes) -> tuple[Panel, ...]:
    """Lay out one panel a suite, with a dot for each of the candidates shown."""
    panels = []
    for suite in summary.suites:
        drawn = [
            _dot(summary, candidate, suite, axes.x, axes.y)
            for candidate in shown
            if suite in candidate.suites
        ]
        dots = _name([dot for dot in drawn if dot is not None])
        off_scale = sum(
            one.suites[suite].difference_rate is not None and not _moved(summary, one)
            for one in shown
            if suite in one.suites
        )
        panels.append(Panel(suite, dots, len(drawn) - len(dots) - off_scale, off_scale))
    return tuple(panels)


def draw_crowd(summary: Summary, axes: Axes) -> dict[str, tuple[str, ...]]:
    """By suite, where all audited candidates lie: squares that hold at least `CROWD_BOUNDS` of them.

    Returns:
        One SVG path a bound, empty where no square holds so many.
    """
    shades, least = {}, least_shift(summary)
    for suite in summary.suites:
        points = np.array(
            [
                (general.shift, rate.difference_rate)
                for one in summary.audited
                if (general := one.suites.get(summary.general)) is not None
                and (rate := one.suites.get(suite)) is not None
                and general.shift is not None
                and general.shift >= least
                and rate.difference_rate is not None
            ],
            dtype=float,
        ).reshape(-1, 2)
        ends = ((axes.x, PANEL_LEFT), (axes.y, PANEL_TOP))
        places = np.stack(
            [
                (
                    scale.start
                    + (values - scale.low) / (scale.high - scale.low) * (scale.end - scale.start)
                    - edge
                )
                // CROWD_CELL
                for values, (scale, edge) in zip(points.T, ends, strict=True)
            ],
            axis=1,
        ).astype(int)
        squares, counts = np.unique(places, axis=0, return_counts=True)
        shades[suite] = tuple(_squares(squares[counts >= bound].tolist()) for bound in CROWD_BOUNDS)
    return shades


def _squares(places: Iterable[tuple[int, int]]) -> str:
    side = CROWD_CELL
    return "".join(
        f"M{PANEL_LEFT + side * column} {PANEL_TOP + side * row}h{side}v{side}h-{side}"
        for column, row in places
    )
