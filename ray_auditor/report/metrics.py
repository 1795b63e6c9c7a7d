"""A sweep as Prometheus metrics, in a file that node_exporter's textfile collector reads.

A file outlives the sweep, works without a port, and needs no client library: what a night left behind is
scraped in the morning.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_auditor.durable_file import put_file
from ray_auditor.report.candidate import STATUSES
from ray_auditor.report.finding import KINDS, list_findings
from ray_auditor.report.printable import printable

FILE = "metrics.prom"
STATES = ("ok", "failed", "running")  # of units, as the driver counts them

Sample = tuple[str, Mapping[str, str], float | None]
# Name -> kind and help: everything that is ever written, which the dashboard is held to.
METRICS = {
    "ray_auditor_running": ("gauge", "1 while a sweep runs, 0 when it has ended"),
    "ray_auditor_updated_timestamp_seconds": ("gauge", "When this file was written"),
    "ray_auditor_units": ("gauge", "Units of the running or last sweep by state"),
    "ray_auditor_units_expected": ("gauge", "Units of the running or last sweep, finished ones included"),
    "ray_auditor_elapsed_seconds": ("gauge", "Since the sweep began to compute"),
    "ray_auditor_tokens": ("gauge", "Tokens encoded by the running or last sweep"),
    "ray_auditor_tokens_per_second": ("gauge", "Tokens a second over the last minute"),
    "ray_auditor_time_left_seconds": ("gauge", "Time left at this pace"),
    "ray_auditor_time_left_low_seconds": ("gauge", "Lower end of its 95% interval"),
    "ray_auditor_time_left_high_seconds": ("gauge", "Upper end of its 95% interval"),
    "ray_auditor_work_seconds": ("gauge", "Time of the workers by part of the work"),
    "ray_auditor_work_weight_bytes": ("gauge", "Bytes of weights that were audited"),
    "ray_auditor_worker_tokens": ("gauge", "Tokens encoded by worker"),
    "ray_auditor_worker_seconds": ("gauge", "Time by worker and part of the work"),
    "ray_auditor_fetch_seconds": ("gauge", "Time of downloads, summed over those side by side"),
    "ray_auditor_fetched_bytes": ("gauge", "Bytes that downloads brought"),
    "ray_auditor_starved_seconds": ("gauge", "Time in which nothing ran because nothing had arrived"),
    "ray_auditor_candidates": ("gauge", "Candidates of the last finished sweep by status"),
    "ray_auditor_findings": ("gauge", "Findings of the last finished sweep by rule and state"),
    "ray_auditor_findings_new": ("gauge", "Findings that no earlier sweep reported for the same weights"),
    "ray_auditor_exit_code": ("gauge", "Exit code of the last finished sweep"),
}


class Metrics:
    """The file of one `out_dir`; what the last finished sweep found stays in it while the next one runs.

    Args:
        out_dir: Where it lies.
        work: Says what the work took so far, as `work` of the summary; None where nothing ran.
        now: Unix seconds.
    """

    def __init__(
        self,
        out_dir: Path,
        work: Callable[[], Mapping[str, Any] | None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.work, self.now = out_dir / FILE, work, now

    def progress(self, snapshot: Mapping[str, Any]) -> None:
        """Write a snapshot of `SweepProgress`."""
        running = float(snapshot["event"] != "ended")
        with suppress(OSError):  # an audit does not end because nobody could be told how far it is
            self._write([("ray_auditor_running", {}, running), *_live(snapshot, self.work())], keep=_FOUND)

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write what a finished sweep found, beside what is there of one that runs."""
        found = list(_found(summary))
        self._write(found, keep=METRICS.keys() - _FOUND)

    def _write(self, samples: Iterable[Sample], keep: Iterable[str]) -> None:
        kept = _read(self.path, set(keep) - {"ray_auditor_updated_timestamp_seconds"})
        sweep = {"sweep": self.path.parent.resolve().name}
        told = [*samples, ("ray_auditor_updated_timestamp_seconds", {}, self.now())]
        lines = _render([(name, sweep | dict(labels), value) for name, labels, value in told], kept)
        temp = self.path.parent / "store" / "tmp"
        data = "".join(lines).encode()
        put_file(self.path, data, temp=temp if temp.is_dir() else None, replace=True)


_FOUND = {
    "ray_auditor_candidates",
    "ray_auditor_findings",
    "ray_auditor_findings_new",
    "ray_auditor_exit_code",
}


def _live(snapshot: Mapping[str, Any], work: Mapping[str, Any] | None) -> Iterator[Sample]:
    states = Counter(dict.fromkeys(STATES, 0)) | Counter(snapshot["states"])
    for state in (*STATES, *sorted(states.keys() - set(STATES))):
        yield "ray_auditor_units", {"state": state}, states[state]
    yield "ray_auditor_units_expected", {}, snapshot["total"]
    yield "ray_auditor_elapsed_seconds", {}, snapshot["elapsed_s"]
    yield "ray_auditor_tokens", {}, snapshot["tokens"]
    yield "ray_auditor_tokens_per_second", {}, snapshot["tokens_per_s"]
    low, high = snapshot["time_left_ends_s"] or (None, None)
    yield "ray_auditor_time_left_seconds", {}, snapshot["time_left_s"]
    yield "ray_auditor_time_left_low_seconds", {}, low
    yield "ray_auditor_time_left_high_seconds", {}, high
    if work is None:
        return
    for part, seconds in work["total"]["seconds"].items():
        yield "ray_auditor_work_seconds", {"part": part}, seconds
    yield "ray_auditor_work_weight_bytes", {}, work["total"]["num_bytes"]
    for worker, spent in work["workers"].items():
        yield "ray_auditor_worker_tokens", {"worker": worker}, spent["num_tokens"]
        for part, seconds in spent["seconds"].items():
            yield "ray_auditor_worker_seconds", {"worker": worker, "part": part}, seconds
    yield "ray_auditor_fetch_seconds", {}, work["fetch"]["seconds"]
    yield "ray_auditor_fetched_bytes", {}, work["fetch"]["num_bytes"]
    yield "ray_auditor_starved_seconds", {}, work["waited_s"]


def _found(summary: Mapping[str, Any]) -> Iterator[Sample]:
    statuses = Counter(row["status"] for row in summary["candidates"])
    for status in STATUSES:
        yield "ray_auditor_candidates", {"status": status}, statuses[status]
    findings = list(list_findings(summary))
    counts = Counter((one.kind, "open" if one.acknowledged is None else "acknowledged") for one in findings)
    for rule in sorted({*KINDS, *(rule for rule, _ in counts)}):
        for state in ("acknowledged", "open"):  # 0, too: a series that ends is no finding that was closed
            yield "ray_auditor_findings", {"rule": rule, "state": state}, counts[rule, state]
    yield "ray_auditor_findings_new", {}, sum(one.new is True for one in findings)
    yield "ray_auditor_exit_code", {}, summary["exit_code"]


def _render(samples: Iterable[Sample], kept: Mapping[str, list[str]]) -> Iterator[str]:
    lines: dict[str, list[str]] = {name: list(known) for name, known in kept.items()}
    for name, labels, value in samples:
        assert name in METRICS, f"{name} is not declared"
        if value is not None:
            given = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
            lines.setdefault(name, []).append(f"{name}{{{given}}} {value}\n")
    for name, (kind, words) in METRICS.items():
        if name in lines:
            yield f"# HELP {name} {words}\n# TYPE {name} {kind}\n"
            yield from lines[name]


def _escape(text: str) -> str:
    return printable(text).replace("\\", r"\\").replace('"', r"\"")


def _read(path: Path, keep: set[str]) -> dict[str, list[str]]:
    """Lines of an earlier file by metric, of those to be kept."""
    if not path.is_file():
        return {}
    lines: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        name = line.partition(" ")[0].partition("{")[0]
        if name in keep:
            lines.setdefault(name, []).append(line)
    return lines
