"""Geometry of the null's held-out scores with the candidates' on the same axis.

Across, positions are per cent of the drawing's width, so that it fits any window with its letters at their
size; down, they are pixels.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray_auditor.report.candidate import Candidate, Flag
from ray_auditor.report.figure import Scale, fit_scale
from ray_auditor.report.summary import Summary

START, END = 2.0, 98.0
DOT_WIDTH = 1.9  # per cent: a dot on a phone
DOT_HEIGHT, LABEL_HEIGHT, ROW_HEIGHT, GAP = 7, 20, 19, 12
MAX_LEVELS = 12  # of dots, then bars
NAMED = 30
LADDER = (0.0, *(step * 10.0**power for power in range(7) for step in (1, 3)))
SQUEEZED = 4  # candidates so many times above the null leave it less than a quarter of a linear axis


@dataclass(frozen=True)
class Swarm:
    """Scores as dots that do not hide each other, or as bars where they are too many.

    Attributes:
        label: What they are.
        top: Where the label starts.
        foot: Where dots and bars stand.
        dots: (across, down, name, score).
        bars: (left, width, height, count).
    """

    label: str
    top: int
    foot: int
    dots: tuple[tuple[float, int, str, float], ...]
    bars: tuple[tuple[float, float, float, int], ...]


@dataclass(frozen=True)
class Named:
    """One flagged candidate in a row of its own; `low` is the lower end of its score."""

    flag: Flag
    score_low: float | None
    x: float
    low: float | None
    y: int

    @property
    def label_left(self) -> bool:
        """Whether the name stands on the left."""
        return self.x > (START + END) / 2


@dataclass(frozen=True)
class Strip:
    """The whole drawing, `height` pixels high.

    `top_score` is the null's highest; `num_above` candidates are above all of it by their p, which compares
    each with a benign finetune under the fit that did not see that one.
    """

    scale: Scale
    swarms: tuple[Swarm, ...]
    named: tuple[Named, ...]
    top_score: float
    num_above: int
    height: int


def fit_scores(null: Sequence[float], others: Sequence[float]) -> Scale:
    """The axis of scores: linear, unless that would squeeze the null into a corner."""
    values = [*null, *others]
    if max(values) <= SQUEEZED * max([*null, 1.0]):
        return fit_scale(values, START, END)
    low = next((0.0 - one for one in LADDER if -one <= min(values)), min(values))
    high = next((one for one in LADDER if one >= max(values)), max(values))
    ticks = sorted({0.0 + sign * one for one in LADDER for sign in (-1, 1) if low <= sign * one <= high})
    return Scale(low, high, START, END, tuple(ticks), is_log=True)


def _levels(xs: Iterable[float]) -> list[int] | None:
    """The lowest level for each position, ascending, at which it touches no earlier one; None if too many."""
    last: list[float] = []
    levels = []
    for x in xs:
        level = next((at for at, end in enumerate(last) if x - end >= DOT_WIDTH), len(last))
        if level == MAX_LEVELS:
            return None
        last[level : level + 1] = [x]
        levels.append(level)
    return levels


def _swarm(label: str, scores: Sequence[tuple[str, float]], scale: Scale, top: int) -> Swarm:
    ordered = sorted(scores, key=lambda one: (one[1], one[0]))
    xs = [scale.at(score) for _, score in ordered]
    levels = _levels(xs)
    body = top + LABEL_HEIGHT
    if levels is not None:
        foot = body + (max(levels, default=0) + 1) * DOT_HEIGHT
        dots = tuple(
            (x, foot - level * DOT_HEIGHT - DOT_HEIGHT // 2, name, score)
            for x, level, (name, score) in zip(xs, levels, ordered, strict=True)
        )
        return Swarm(label, top, foot, dots, ())
    height = MAX_LEVELS * DOT_HEIGHT
    counts = Counter(int((x - START) // DOT_WIDTH) for x in xs)
    bars = tuple(
        (round(START + at * DOT_WIDTH, 1), DOT_WIDTH, round(height * count / max(counts.values()), 1), count)
        for at, count in sorted(counts.items())
    )
    return Swarm(f"{label}; the highest bar holds {max(counts.values()):,}", top, body + height, (), bars)


def _scores(candidates: Iterable[Candidate]) -> list[tuple[str, float]]:
    return [(one.id, one.score) for one in candidates if one.score is not None]


def draw_strip(summary: Summary) -> Strip | None:
    """Lay out the null's scores, the candidates without a flag, and a row for each of the first flags.

    Returns:
        None when no candidate was held to a null population.
    """
    if not summary.has_p:
        return None
    null = list(summary.null_scores.items())
    flags = [flag for flag in summary.flags if summary.by_id[flag.candidate].score is not None]
    named, more = flags[:NAMED], flags[NAMED:]
    rest = _scores(row for row in summary.audited if row.status != "flagged")
    every = _scores(summary.audited)
    lows = [low for flag in named if (low := summary.by_id[flag.candidate].score_low) is not None]
    scale = fit_scores([score for _, score in null], [*(score for _, score in every), *lows])
    swarms, top = [], 0
    for label, scores in (
        (f"{len(null):,} benign finetunes", null),
        (f"{len(rest):,} candidates without a flag", rest),
        (f"{len(more):,} more flagged candidates", _scores(summary.by_id[flag.candidate] for flag in more)),
    ):
        if scores:
            swarms.append(_swarm(label, scores, scale, top))
            top = swarms[-1].foot + GAP
    rows = []
    for at, flag in enumerate(named):
        row = summary.by_id[flag.candidate]
        low = None if row.score_low is None else scale.at(row.score_low)
        y = top + at * ROW_HEIGHT + ROW_HEIGHT // 2
        rows.append(Named(flag, row.score_low, scale.at(row.score or 0.0), low, y))
    top_score = max(summary.null_scores.values())
    num_above = sum(row.p is not None and round(row.p * (len(null) + 1)) == 1 for row in summary.audited)
    return Strip(scale, tuple(swarms), tuple(rows), top_score, num_above, top + len(rows) * ROW_HEIGHT + 26)
