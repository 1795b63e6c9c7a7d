"""The report's first words: what stands out, how sure that is, what was not audited. Never an assurance."""

from collections import Counter
from dataclasses import dataclass

from ray_auditor.report.candidate import MISFIT, NOT_AUDITED, Candidate, Flag
from ray_auditor.report.number import percent, percent_interval, probability, signed
from ray_auditor.report.summary import Summary

NAMED = 3
BENIGN_FLAGGED = (
    "In the populations measured, where few were bad, 7 to 13% of the benign finetunes scored above 3, 1.7 "
    "to 2.6% above 5: see flag.min_z."
)  # docs/method.md


@dataclass(frozen=True)
class Headline:
    """What a reader must take away; `named` are the strongest flags, one a candidate, `more` the rest.

    `new` is empty where there is no flag or nobody recorded what is new, `acknowledged` where no finding ever
    was. Ids and suites are as listed, not
    yet made printable.
    """

    opening: str
    named: tuple[Flag, ...]
    more: int
    new: str
    acknowledged: str
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
    return f"{flag.candidate} on {flag.suite} ({flag.measure})"


def _opening(summary: Summary, num_flagged: int) -> str:
    if not summary.candidates:
        return "Nothing was listed, so nothing was audited and nothing can be said"
    if not summary.audited and summary.misfits:
        return "The SAE fits no candidate that ran, so none could be compared; that asks for a closer look"
    if not summary.audited:
        return "No listed candidate was audited, so nothing can be said about any of them"
    audited = _count(len(summary.audited), "audited candidate")
    if not num_flagged and len(summary.audited) == 1:
        return "The one audited candidate does not stand out on any suite, by the rules below"
    if not num_flagged:
        return f"None of {audited} stands out on any suite, by the rules below"
    return f"{num_flagged:,} of {audited} {'stands' if num_flagged == 1 else 'stand'} out"


def _new(summary: Summary) -> str:
    if not summary.flags or any(flag.new is None for flag in summary.flags):
        return ""
    new, total = sum(flag.new is True for flag in summary.flags), len(summary.flags)
    if new == total:
        return "The flag is new." if total == 1 else f"All {total:,} flags are new."
    if not new:
        return "No flag is new: earlier sweeps reported each of them for the same weights."
    return f"{new:,} of {total:,} flags {'is' if new == 1 else 'are'} new; earlier sweeps reported the rest."


def _acknowledged(summary: Summary) -> str:
    findings: list[Flag | Candidate] = [*summary.flags, *summary.misfits]
    reopened = Counter(one.reopened for one in findings if one.reopened)
    acknowledged = sum(one.acknowledged is not None for one in findings)
    if not acknowledged and not reopened:
        return ""
    parts = [f"{acknowledged:,} of {_count(len(findings), 'finding')}."]
    if reopened:
        num = reopened.total()
        reasons = ", ".join(f"{count:,} {why}" for why, count in sorted(reopened.items()))
        parts.append(f"{num:,} {'is' if num == 1 else 'are'} open again: {reasons}.")
    return " ".join(parts)


def _strongest(summary: Summary, flag: Flag) -> str:
    row = summary.by_id[flag.candidate]
    if not flag.by_rate:
        parts = [f"scores {signed(flag.score)}"]
        if row.score_low is not None:
            parts.append(f"lower end {signed(row.score_low)}")
        if row.p is not None:
            parts.append(f"p {probability(row.p)}, q {probability(row.q)}")
        return f"The strongest {', '.join(parts)}."
    rate = row.suites.get(flag.suite)
    if rate is None or rate.difference_rate is None:
        return ""
    interval = percent_interval(rate.ci_low, rate.ci_high)
    return f"The strongest differs by {percent(rate.difference_rate)}, interval {interval}."


def _how_sure(summary: Summary) -> str:
    if not summary.audited:
        return "There is no result to be sure of."
    parts = [_strongest(summary, flag) for flag in summary.flags[:1]]
    if not summary.has_z:
        parts.append("There are too few peers to compare with: rates stand alone.")
    parts.extend(limit.strip().rstrip(".") + "." for limit in summary.limits[:1])
    called, level = sum(flag.rule == "null_q" for flag in summary.flags), summary.setting("flag.level")
    if called and level is not None:
        parts.append(
            f"{called:,} {'is' if called == 1 else 'are'} called at a false discovery rate of "
            f"{100 * level:g}%, which holds as far as benign candidates are like those finetunes."
        )
    if summary.has_z and not summary.has_p and not summary.limits:
        parts.append("A score ranks a candidate among its peers of this sweep; it is no error rate.")
    if any(flag.rule == "robust_z" for flag in summary.flags):
        parts.append(BENIGN_FLAGGED)
    return " ".join(part for part in parts if part)


def _not_audited(summary: Summary) -> str:
    listed, missing = len(summary.candidates), len(summary.not_audited)
    if not listed:
        return "Nothing was listed."
    if not missing:
        return f"Every listed candidate has a result ({listed:,} of {listed:,})."
    lost = ", ".join(
        f"{summary.counts[status]:,} {status}" for status in NOT_AUDITED if summary.counts[status]
    )
    parts = [f"{missing:,} of {_count(listed, 'listed candidate')}: {lost}."]
    misfits = summary.counts[MISFIT]
    if misfits:
        what, them = ("The misfit", "it") if misfits == 1 else (f"The {misfits:,} misfits", "them")
        parts.append(f"{what} moved so far that the SAE no longer describes {them}: a finding.")
    if missing > misfits:
        parts.append(f"Nothing is known about {'the others' if misfits else 'them'}.")
    return " ".join(parts)


def write_headline(summary: Summary) -> Headline:
    """Say what a reader must take away from a sweep."""
    strongest = {flag.candidate: flag for flag in reversed(summary.flags)}
    named = tuple(sorted(strongest.values(), key=summary.flags.index))
    return Headline(
        opening=_opening(summary, len(named)),
        named=named[:NAMED],
        more=max(len(named) - NAMED, 0),
        new=_new(summary),
        acknowledged=_acknowledged(summary),
        how_sure=_how_sure(summary),
        not_audited=_not_audited(summary),
    )
