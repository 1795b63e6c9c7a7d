"""The report's first words: what stands out, how sure that is, what was not audited. Never an assurance."""

from dataclasses import dataclass

from ray_auditor.report.number import percent, percent_interval
from ray_auditor.report.summary import NOT_AUDITED, Flag, Summary

NAMED = 3


@dataclass(frozen=True)
class Headline:
    """What a reader must take away; `named` are the strongest flags, one a candidate, `more` the rest.

    Ids and suites are as listed, not yet made printable.
    """

    opening: str
    named: tuple[Flag, ...]
    more: int
    how_sure: str
    not_audited: str

    @property
    def stands_out(self) -> str:
        """The first statement as one plain sentence."""
        if not self.named:
            return f"{self.opening}."
        more = f", and {self.more:,} more" if self.more else ""
        return f"{self.opening}: {', '.join(map(_name, self.named))}{more}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _name(flag: Flag) -> str:
    where = "over all suites" if flag.suite is None else f"on {flag.suite}"
    return f"{flag.candidate} {where}" + (f" ({flag.measure})" if flag.score is not None else "")


def _opening(summary: Summary, num_flagged: int) -> str:
    if not summary.candidates:
        return "Nothing was listed, so nothing was audited and nothing can be said"
    if not summary.audited:
        return "No listed candidate was audited, so nothing can be said about any of them"
    audited = _count(len(summary.audited), "audited candidate")
    if not num_flagged and len(summary.audited) == 1:
        return "The one audited candidate does not stand out on any suite, by the rules below"
    if not num_flagged:
        return f"None of {audited} stands out on any suite, by the rules below"
    return f"{num_flagged:,} of {audited} {'stands' if num_flagged == 1 else 'stand'} out"


def _how_sure(summary: Summary) -> str:
    if not summary.audited:
        return "There is no result to be sure of."
    parts = []
    for flag in summary.flags[:1]:
        rate = summary.by_id[flag.candidate].suites.get(flag.suite or "")
        if rate is not None and rate.difference_rate is not None:
            interval = percent_interval(rate.ci_low, rate.ci_high)
            parts.append(f"The strongest differs by {percent(rate.difference_rate)}, interval {interval}.")
    if summary.has_z:
        parts.append("A score ranks a candidate among its peers of this sweep.")
    else:
        parts.append("There are too few peers to compare with: rates stand alone.")
    parts.extend(limit.strip().rstrip(".") + "." for limit in summary.limits[:1])
    return " ".join(parts)


def _not_audited(summary: Summary) -> str:
    listed, missing = len(summary.candidates), len(summary.not_audited)
    if not listed:
        return "Nothing was listed."
    if not missing:
        return f"Every listed candidate has a result ({listed:,} of {listed:,})."
    lost = ", ".join(
        f"{summary.counts[status]:,} {status}" for status in NOT_AUDITED if summary.counts[status]
    )
    return f"{missing:,} of {_count(listed, 'listed candidate')}: {lost}. Nothing is known about them."


def write_headline(summary: Summary) -> Headline:
    """Say what a reader must take away from a sweep."""
    strongest = {flag.candidate: flag for flag in reversed(summary.flags)}
    named = tuple(sorted(strongest.values(), key=summary.flags.index))
    return Headline(
        opening=_opening(summary, len(named)),
        named=named[:NAMED],
        more=max(len(named) - NAMED, 0),
        how_sure=_how_sure(summary),
        not_audited=_not_audited(summary),
    )
