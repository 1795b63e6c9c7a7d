"""Where a candidate lies among the others, by its score and by looks that are cheaper than the score."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ray_auditor.report.candidate import Candidate
from ray_auditor.report.number import UNDETERMINED, decimal, signed, significant

Measure = Callable[[Candidate], float | None]
Show = Callable[[float | None], str]


@dataclass(frozen=True)
class Rank:
    """One measure of one candidate, as a number and as it is shown.

    Rank 1 strays most, None where the measure is not determined.
    """

    name: str
    value: float | None
    text: str
    rank: int | None
    total: int

    @property
    def place(self) -> str:
        """Such as `3 of 29`."""
        return UNDETERMINED if self.rank is None else f"{self.rank:,} of {self.total:,}"


MEASURES: tuple[tuple[str, Measure, Show, int], ...] = (
    ("score", lambda one: one.score, signed, 1),
    ("‖ΔW‖ / ‖W‖", lambda one: one.relative_change, significant, 1),
    ("spectral share of ΔW", lambda one: one.spectral_share, significant, 1),
    ("residual change, mean", lambda one: one.change, significant, 1),
    ("residual cosine, mean", lambda one: one.cosine, lambda value: decimal(value, 4), -1),
)  # the last: 1 where more is rank 1, -1 where less is


@dataclass
class Ranking:
    """The audited candidates of a sweep, to rank one of them by every measure.

    More is rank 1, save for the cosine, where less is.
    """

    candidates: Iterable[Candidate]
    _sorted: dict[str, list[float]] = field(default_factory=dict)

    def _rank(self, candidate: Candidate, name: str, measure: Measure, show: Show, sign: int) -> Rank:
        if name not in self._sorted:
            values = (measure(one) for one in self.candidates)
            self._sorted[name] = sorted(sign * value for value in values if value is not None)
        ordered, own = self._sorted[name], measure(candidate)
        rank = None if own is None else len(ordered) - bisect_right(ordered, sign * own) + 1
        return Rank(name, own, show(own), rank, len(ordered))

    def of(self, candidate: Candidate) -> tuple[Rank, ...]:
        """The candidate by every measure, the score first; the mean difference is that of its own suite."""
        ranks = [self._rank(candidate, *one) for one in MEASURES]
        suite = candidate.suite
        if suite is not None:

            def measure(one: Candidate) -> float | None:
                return one.mean_difference.get(suite)

            ranks.append(self._rank(candidate, f"mean difference on {suite}", measure, significant, 1))
        return tuple(ranks)
