"""Every file a sweep's summary becomes: written together, each there whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_auditor.durable_file import put_file
from ray_auditor.report.finding import list_findings
from ray_auditor.report.html import render_html
from ray_auditor.report.junit import render_junit
from ray_auditor.report.markdown import render_markdown
from ray_auditor.report.metrics import Metrics
from ray_auditor.report.sarif import render_sarif
from ray_auditor.tables import as_table, candidates_table, rates_table, to_ipc

OUTPUTS = (
    "candidates.arrow",
    "rates.arrow",
    "findings.parquet",
    "findings.sarif",
    "junit.xml",
    "findings.md",
    "report.html",
    "summary.json",
)

FINDINGS = pa.schema(
    [
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("suite", pa.string()),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("tokens", pa.int64()),
        pa.field("overlap", pa.float64()),
        pa.field("shift", pa.float64()),
        pa.field("difference_rate", pa.float64()),
        pa.field("ci_low", pa.float64()),
        pa.field("ci_high", pa.float64()),
        pa.field("z", pa.float64()),
        pa.field("miss_z", pa.float64()),
        pa.field("p", pa.float64()),
        pa.field("q", pa.float64()),
        pa.field("unit_key", pa.string()),
        pa.field("content_sha256", pa.string()),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("new", pa.bool_()),
        pa.field("acknowledged_by", pa.string()),
        pa.field("acknowledged_until", pa.string()),
    ]
)


def write_outputs(summary: Mapping[str, Any], out_dir: Path) -> dict[str, Any]:
    """Write every output of a summary into `out_dir`, and its metrics.

    `summary.json` comes last, for the others follow from it.

    Args:
        summary: What `summary.json` is to hold.
        out_dir: Where; files are made ready in its store, or beside where there is none.

    Returns:
        The summary as a reader of the file sees it.

    Raises:
        ValueError: The summary contradicts itself; nothing was written.
    """
    data = to_json(summary)
    read_back: dict[str, Any] = json.loads(data)  # what a reader sees is what every output shows
    rendered = {
        "candidates.arrow": to_ipc(candidates_table(read_back)),
        "rates.arrow": to_ipc(rates_table(read_back)),
        "findings.parquet": _parquet(findings_table(read_back)),
        "findings.sarif": render_sarif(read_back).encode(),
        "junit.xml": render_junit(read_back),
        "findings.md": render_markdown(read_back).encode(),
        "report.html": render_html(read_back).encode(),
        "summary.json": data.encode(),
    }
    temp = out_dir / "store" / "tmp"
    for name in OUTPUTS:
        put_file(out_dir / name, rendered[name], temp=temp if temp.is_dir() else None, replace=True)
    Metrics(out_dir).conclude(read_back)
    return read_back


def to_json(summary: Mapping[str, Any]) -> str:
    """A summary as JSON, a line a candidate, flag or setting: for `grep`, and several times faster."""
    lines = (f"{json.dumps(key)}: {_lines(value)}" for key, value in summary.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(one, allow_nan=False) for one in value) + "\n]"
    if isinstance(value, dict) and value:
        pairs = (f"{json.dumps(key)}: {json.dumps(one, allow_nan=False)}" for key, one in value.items())
        return "{\n" + ",\n".join(pairs) + "\n}"
    return json.dumps(value, allow_nan=False)


def findings_table(summary: Mapping[str, Any]) -> Any:
    """One row a finding, in the schema `FINDINGS`; docs/schema.md has the columns."""
    candidates = {row["id"]: row for row in summary["candidates"]}
    rows = []
    for finding in list_findings(summary):
        row = candidates[finding.candidate]
        said = finding.acknowledged or {}
        known = {
            "candidate": finding.candidate,
            "suite": finding.suite,
            "rule": finding.rule,
            "score": finding.score,
            "fingerprint": finding.fingerprint,
            "new": finding.new,
            "acknowledged_by": said.get("who"),
            "acknowledged_until": said.get("until"),
        }
        cell = row["suites"].get(finding.suite) or {}
        rows.append({name: known.get(name, cell.get(name, row.get(name))) for name in FINDINGS.names})
    return as_table(rows, FINDINGS)


def _parquet(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
