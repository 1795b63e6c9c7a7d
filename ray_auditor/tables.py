"""A summary as two Arrow files that a reader maps into memory: candidates, and their rates by suite."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from ray_auditor.report.finding import list_findings

SCHEMA_VERSION = 1
NAMES = pa.dictionary(pa.int32(), pa.string())
ABOUT = b"sweep"  # the metadata key under which a table holds what is said of the sweep as a whole
ABOUT_KEYS = (
    "counts", "exit_code", "noise_floor", "sae_gate", "limits", "settings", "versions", "generated_at"
)  # fmt: skip

TEXTS = (
    "id", "kind", "status", "reason", "suite", "rule", "why", "declared_base", "unit_key", "content_sha256",
    "acknowledged_by", "acknowledged_until",
)  # fmt: skip
NUMBERS = ("score", "score_low", "p", "q", "joint_p", "relative_change", "spectral_share")
RATES = (
    "overlap", "shift", "difference_rate", "ci_low", "ci_high", "d_abs", "d_overlap", "jaccard", "cosine",
    "change", "fvu", "base_fvu", "z", "miss_z", "mean_difference",
)  # fmt: skip


def candidates_schema() -> Any:
    """One row a listed candidate, in the order of the summary."""
    return pa.schema(
        [pa.field(name, pa.string(), nullable=name not in ("id", "status")) for name in TEXTS]
        + [pa.field(name, pa.float64()) for name in NUMBERS]
        + [pa.field("new", pa.bool_())]
    )


def rates_schema() -> Any:
    """One row a candidate and suite, both as dictionaries."""
    return pa.schema(
        [pa.field("candidate", NAMES, nullable=False), pa.field("suite", NAMES, nullable=False)]
        + [pa.field("tokens", pa.int64(), nullable=False)]
        + [pa.field(name, pa.float64()) for name in RATES]
        + [pa.field("over_rate", pa.bool_())]
    )


def candidates_table(summary: Mapping[str, Any]) -> Any:
    """The candidates of a summary; what it says of the sweep as a whole is the schema's metadata."""
    findings = {finding.candidate: finding for finding in reversed(list(list_findings(summary)))}
    rows = []
    for row in summary["candidates"]:
        finding = findings.get(row["id"])
        said = (finding.acknowledged if finding else None) or {}
        rows.append(
            {name: row.get(name) for name in (*TEXTS, *NUMBERS)}
            | {name: (row.get("rivals") or {}).get(name) for name in ("relative_change", "spectral_share")}
            | {"acknowledged_by": said.get("who"), "acknowledged_until": said.get("until")}
            | ({"rule": finding.rule, "new": finding.new} if finding else {"new": None})
        )
    about = {name: summary.get(name) for name in ABOUT_KEYS}
    metadata = {ABOUT: json.dumps(about).encode(), b"schema_version": str(SCHEMA_VERSION).encode()}
    return as_table(rows, candidates_schema().with_metadata(metadata))


def rates_table(summary: Mapping[str, Any]) -> Any:
    """The cells of a summary."""
    cells = [
        (row["id"], suite, cell, (row.get("rivals") or {}).get("mean_difference") or {})
        for row in summary["candidates"]
        for suite, cell in (row.get("suites") or {}).items()
    ]
    schema = rates_schema()
    columns = {
        "candidate": _dictionary(name for name, _, _, _ in cells),
        "suite": _dictionary(suite for _, suite, _, _ in cells),
        "tokens": pa.array([int(cell.get("tokens") or 0) for _, _, cell, _ in cells], pa.int64()),
        "mean_difference": pa.array([means.get(suite) for _, suite, _, means in cells], pa.float64()),
    }
    for field in schema:
        if field.name not in columns:
            columns[field.name] = pa.array([cell.get(field.name) for _, _, cell, _ in cells], field.type)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _dictionary(names: Iterable[str]) -> Any:
    return pa.array(map(_text, names), pa.string()).dictionary_encode().cast(NAMES)


def as_table(rows: list[dict[str, Any]], schema: Any) -> Any:
    """Rows as a table, text that is not UTF-8 escaped."""
    columns = [
        pa.array(
            [_text(row[field.name]) if pa.types.is_string(field.type) else row[field.name] for row in rows],
            field.type,
        )
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _text(value: str | None) -> str | None:
    """Text that is UTF-8: a folder's name need not be."""
    return None if value is None else value.encode("utf-8", "backslashreplace").decode()


def to_ipc(table: Any) -> bytes:
    """An Arrow IPC file in one batch, not compressed, so that a reader's columns lie in the file itself."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    data: bytes = sink.getvalue().to_pybytes()
    return data
