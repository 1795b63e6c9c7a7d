"""Where a candidate lies among the others, by its score and by looks that are cheaper than the score."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ray_auditor.report.candidate import Candidate
from ray_auditor.report.number import UNDETERMINED, decimal, signed, significant

Measure = Callable[[Candidate], float | None]


@dataclass(frozen=True)
class Rank:
    """One measure of one candidate; rank 1 strays most, None where the measure is not determined."""

    name: str
    text: str
    rank: int | None
    total: int

    @property
    def place(self) -> str:
        """Such as `3 of 29`."""
        return UNDETERMINED if self.rank is None else f"{self.rank:,} of {self.total:,}"


def _less_alike(candidate: Candidate) -> float | None:
    return None if candidate.cosine is None else 1 - candidate.cosine


MEASURES: tuple[tuple[str, Measure, Callable[[Candidate], str]], ...] = (
    ("score", lambda one: one.score, lambda one: signed(one.score)),
    ("‖ΔW‖ / ‖W‖", lambda one: one.relative_change, lambda one: significant(one.relative_change)),
    ("spectral share of ΔW", lambda one: one.spectral_share, lambda one: significant(one.spectral_share)),
    ("residual change, mean", lambda one: one.change, lambda one: significant(one.change)),
    ("residual cosine, mean", _less_alike, lambda one: decimal(one.cosine, 4)),
)


@dataclass
class Ranking:
    """The audited candidates of a sweep, to rank one of them by every measure.

    More is rank 1, save for the cosine, where less is.
    """

    candidates: Iterable[Candidate]
    _sorted: dict[str, list[float]] = field(default_factory=dict)

    def _rank(self, name: str, measure: Measure, candidate: Candidate, text: str) -> Rank:
        if name not in self._sorted:
            values = (measure(one) for one in self.candidates)
            self._sorted[name] = sorted(value for value in values if value is not None)
        ordered, own = self._sorted[name], measure(candidate)
        rank = None if own is None else len(ordered) - bisect_right(ordered, own) + 1
        return Rank(name, text, rank, len(ordered))

    def of(self, candidate: Candidate) -> tuple[Rank, ...]:
        """The candidate by every measure, the score first; the mean difference is that of its own suite."""
        ranks = [self._rank(name, measure, candidate, text(candidate)) for name, measure, text in MEASURES]
        suite = candidate.suite
        if suite is not None:

            def measure(one: Candidate) -> float | None:
                return one.mean_difference.get(suite)

            text = significant(measure(candidate))
            ranks.append(self._rank(f"mean difference on {suite}", measure, candidate, text))
        return tuple(ranks)
