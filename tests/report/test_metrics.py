"""What Prometheus scrapes, read by its own parser, and the dashboard that asks for it."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from ray_auditor.outputs import write_outputs
from ray_auditor.report.finding import exit_code_of
from ray_auditor.report.metrics import FILE, METRICS, Metrics
from ray_auditor.report.progress import SweepProgress
from tests.report.test_progress import Clock

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "deploy" / "grafana" / "ray-auditor.json"
SPENT = {"num_units": 7, "num_tokens": 700, "num_bytes": 9_000, "seconds": {"forward": 5.0, "wait": 1.5}}
WORK = {
    "wall_s": 9.0, "waited_s": 0.5, "fetch": {"seconds": 3.0, "num_bytes": 12},
    "total": SPENT, "workers": {'host"\n\\-7\x1b': SPENT},
}  # fmt: skip


def scraped(out_dir: Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, without the sweep's; what the parser refuses, a scraper would."""
    found = {}
    for family in text_string_to_metric_families((out_dir / FILE).read_text()):
        assert (family.type, family.documentation) == METRICS[family.name]
        for sample in family.samples:
            assert sample.labels["sweep"] == out_dir.name
            labels = tuple(sorted((key, text) for key, text in sample.labels.items() if key != "sweep"))
            assert (sample.name, labels) not in found
            found[sample.name, labels] = sample.value
    return found


def run(out_dir: Path) -> None:
    """A sweep of twelve units, one of which fails, told to the metrics every ten seconds."""
    clock = Clock()
    metrics = Metrics(out_dir, lambda: WORK, now=lambda: 1_700_000_000.0)
    progress = SweepProgress(12, console=Console(file=io.StringIO()), clock=clock, tell=metrics.progress)
    with progress:
        for step in range(9):
            clock.now += 10
            progress.update({"ok": step, "failed": int(step > 4), "running": 2}, 1000 * step, ["a", "b"])
        assert scraped(out_dir)["ray_auditor_running", ()] == 1.0
        kept = progress.snapshot()
    found = scraped(out_dir)
    assert found["ray_auditor_running", ()] == 0.0
    assert found["ray_auditor_units", (("state", "ok"),)] == 8
    assert found["ray_auditor_units", (("state", "failed"),)] == 1
    assert found["ray_auditor_units_expected", ()] == 12
    assert found["ray_auditor_tokens", ()] == 8000
    assert found["ray_auditor_tokens_per_second", ()] == kept["tokens_per_s"] == 100
    assert found["ray_auditor_time_left_seconds", ()] == kept["time_left_s"]
    ends = [found[f"ray_auditor_time_left_{end}_seconds", ()] for end in ("low", "high")]
    assert ends == kept["time_left_ends_s"]
    assert found["ray_auditor_updated_timestamp_seconds", ()] == 1_700_000_000


def test_a_running_sweep_is_scraped(tmp_path: Path) -> None:
    run(tmp_path)
    found = scraped(tmp_path)
    assert found["ray_auditor_work_seconds", (("part", "forward"),)] == 5.0
    assert found["ray_auditor_work_weight_bytes", ()] == 9_000
    worker = ("worker", 'host"<U+000A>\\-7<U+001B>')
    assert found["ray_auditor_worker_seconds", (("part", "wait"), worker)] == 1.5
    assert found["ray_auditor_worker_tokens", (worker,)] == 700
    assert found["ray_auditor_fetched_bytes", ()] == 12
    assert found["ray_auditor_starved_seconds", ()] == 0.5


def test_a_file_that_cannot_be_written_or_read_ends_no_sweep(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"ray_auditor_exit_code\xff\xfe{ \n")
    run(tmp_path)
    gone = tmp_path / "gone"
    clock = Clock()
    tell = Metrics(gone).progress
    with SweepProgress(2, console=Console(file=io.StringIO()), clock=clock, tell=tell) as progress:
        clock.now += 60
        progress.update({"ok": 1}, 10)
    assert not gone.exists()


def test_what_a_sweep_found_stays_while_the_next_one_runs(tmp_path: Path, summary: dict[str, Any]) -> None:
    summary["flags"][0]["acknowledged"] = dict.fromkeys(("who", "why", "until", "at"), "x")
    summary["exit_code"] = exit_code_of(summary)
    run(tmp_path)
    write_outputs(summary, tmp_path)
    first = scraped(tmp_path)
    for status, count in Counter(row["status"] for row in summary["candidates"]).items():
        assert first["ray_auditor_candidates", (("status", status),)] == count
    assert first["ray_auditor_candidates", (("status", "deferred"),)] == 0
    assert first["ray_auditor_findings", (("rule", "null_q"), ("state", "acknowledged"))] == 1
    assert first["ray_auditor_findings", (("rule", "above_null"), ("state", "acknowledged"))] == 0
    opened = sum(value for (name, labels), value in first.items() if name == "ray_auditor_findings") - 1
    assert opened == len(summary["flags"])  # one is closed, and a misfit is a finding
    assert first["ray_auditor_findings_new", ()] == sum(flag["new"] for flag in summary["flags"])
    assert first["ray_auditor_exit_code", ()] == 2
    assert first["ray_auditor_units", (("state", "ok"),)] == 8  # of the sweep that found it
    run(tmp_path)
    assert (
        scraped(tmp_path).items() >= {key: value for key, value in first.items() if "find" in key[0]}.items()
    )


def test_every_query_of_the_dashboard_asks_for_what_is_exported(
    tmp_path: Path, summary: dict[str, Any]
) -> None:
    run(tmp_path)
    write_outputs(summary | {"exit_code": 2}, tmp_path)
    exported: dict[str, set[str]] = {}
    for name, labels in scraped(tmp_path):
        exported.setdefault(name, {"sweep"}).update(key for key, _ in labels)
    assert exported.keys() == METRICS.keys()
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [
        (target["expr"], target["legendFormat"]) for one in dashboard["panels"] for target in one["targets"]
    ]
    queries += [(one["definition"], "") for one in dashboard["templating"]["list"] if "definition" in one]
    assert len(queries) > 12
    for query, legend in queries:
        names = re.findall(r"\bray_auditor_\w+", query)
        assert names, query
        for name in names:
            assert name in exported, f"{name} is not exported"
        for name, matchers in re.findall(r"(ray_auditor_\w+)\{([^}]*)\}", query):
            assert {one.split("=")[0].rstrip("!") for one in matchers.split(",")} <= exported[name]
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            assert label in exported[names[0]]
    asked = {name for query, _ in queries for name in re.findall(r"\bray_auditor_\w+", query)}
    assert METRICS.keys() - asked == {"ray_auditor_tokens", "ray_auditor_fetch_seconds"}


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_the_interval_of_the_time_left_holds_as_often_as_it_says(spread: float) -> None:
    rng, held, total = np.random.default_rng(0), 0, 400
    for _ in range(total):
        paces = np.maximum(1e-3, rng.gamma(1 / spread**2, 10 * spread**2, 60))
        clock = Clock()
        with SweepProgress(60, console=Console(file=io.StringIO()), clock=clock, interval_s=1e9) as progress:
            progress.update({"ok": 0}, 0)
            for number, pace in enumerate(paces[:20], 1):
                clock.now += float(pace)
                progress.update({"ok": number}, 0)
            low, high = progress.time_left_ends_s or (np.inf, -np.inf)
        held += int(low <= paces[20:].sum() <= high)
    assert 0.91 <= held / total <= 0.99


def test_too_few_units_have_no_interval() -> None:
    clock = Clock()
    with SweepProgress(9, console=Console(file=io.StringIO()), clock=clock) as progress:
        for number in range(6):
            progress.update({"ok": number}, 0)
            assert (progress.time_left_ends_s is None) is (number < 5)
            clock.now += 1
