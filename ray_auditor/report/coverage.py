"""What was covered: from listed to flagged, what the last sweep knew, the floor under every shift."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_auditor.report.candidate import MISFIT, SCREENED, Candidate, Flag, SuiteRate
from ray_auditor.report.summary import Summary


def stages(summary: Summary) -> list[tuple[str, int, str]]:
    """The funnel: stage, candidates that reached it, and what was lost on the way to it."""
    counts = summary.counts

    def lost(*statuses: str) -> str:
        return ", ".join(f"{counts[status]:,} {status}" for status in statuses if counts[status])

    listed, audited = len(summary.candidates), len(summary.audited)
    admitted = listed - counts["rejected"] - counts["skipped"]
    return [
        ("listed", listed, ""),
        ("admitted", admitted, lost("rejected", "skipped")),
        ("audited", audited, lost(MISFIT, SCREENED, "failed", "deferred")),
        ("flagged", counts["flagged"], ""),
    ]


@dataclass
class Since:
    """Candidates that are where they are for one reason: `new`, `unchanged`, `changed weights`.

    `num_news` counts those whose flag no earlier sweep reported for the same weights.
    """

    why: str
    num_listed: int = 0
    num_audited: int = 0
    num_flagged: int = 0
    num_news: int = 0


def since_last(summary: Summary) -> list[Since]:
    """What is new since the last sweep, by reason; empty where that was not recorded."""
    news = {flag.candidate for flag in summary.flags if flag.new}
    found: dict[str, Since] = {}
    for row in summary.candidates:
        if row.why is None:
            continue
        one = found.setdefault(row.why, Since(row.why))
        one.num_listed += 1
        one.num_audited += row.audited
        one.num_flagged += row.status == "flagged"
        one.num_news += row.id in news
    return sorted(found.values(), key=lambda one: (-one.num_news, -one.num_flagged, one.why))


def floors(summary: Summary) -> list[tuple[str, float | None, float | None, float | None]]:
    """Per suite: the base against itself, and the smallest and largest mean shift of a candidate."""
    rows = []
    for suite, floor in sorted(summary.noise_floor.items()):
        rates = (row.suites.get(suite) for row in summary.audited)
        shifts = [rate.shift for rate in rates if rate is not None and rate.shift is not None]
        rows.append((suite, floor, min(shifts, default=None), max(shifts, default=None)))
    return rows


def flags_of(summary: Summary) -> Mapping[str, Sequence[Flag]]:
    """Flags by candidate."""
    found: dict[str, list[Flag]] = {}
    for flag in summary.flags:
        found.setdefault(flag.candidate, []).append(flag)
    return found


def misfits(summary: Summary, num: int) -> list[tuple[Candidate, SuiteRate | None, str, SuiteRate | None]]:
    """Per candidate that the SAE does not fit: the general suite, and where it fits worst beside the base."""
    rows = []
    for row in summary.misfits[:num]:
        ratios = {
            name: rate.fvu / rate.base_fvu for name, rate in row.suites.items() if rate.fvu and rate.base_fvu
        }
        worst = max(ratios, key=lambda name: (ratios[name], name), default="")
        rows.append((row, row.suites.get(summary.general), worst, row.suites.get(worst)))
    return rows
