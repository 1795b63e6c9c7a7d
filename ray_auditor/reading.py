"""The verbs `report` and `show`: read a finished `out_dir` again, without a GPU, torch or Ray."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_auditor.config import AuditConfig
from ray_auditor.report.dossier import print_candidate
from ray_auditor.report.html import write_html
from ray_auditor.report.terminal import print_summary

REQUIRED = {"candidates", "counts", "exit_code", "flags", "settings"}


def write_report(config: AuditConfig) -> int:
    """Print the summary of `out_dir` and write its `report.html` again.

    Returns:
        The exit code the sweep gave.

    Raises:
        ValueError: There is no summary.
    """
    out_dir = Path(config.out_dir)
    summary = read_summary(out_dir)
    write_html(summary, out_dir / "report.html")
    console = Console()
    print_summary(summary, console)
    console.print(f"report: {out_dir / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return int(summary["exit_code"])


def show_candidate(config: AuditConfig) -> int:
    """Print one candidate: its score, flags, suites, ranks and moved features.

    Raises:
        ValueError: No candidate was named, or the summary does not list it.
    """
    summary = read_summary(Path(config.out_dir))
    if config.show.candidate is None:
        raise ValueError("show.candidate must be given, got none; say ray-auditor show CANDIDATE out_dir=DIR")
    print_candidate(summary, config.show.candidate, config.show.suite, Console())
    return 0


def read_summary(out_dir: Path) -> dict[str, Any]:
    """Read `summary.json` of a finished sweep.

    Raises:
        ValueError: It is missing or not JSON.
    """
    path = out_dir / "summary.json"
    if not path.is_file():
        raise ValueError(
            f"out_dir must hold a finished sweep, got {out_dir}: no summary.json; run a sweep first"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; run the sweep again") from error
    missing = REQUIRED - summary.keys() if isinstance(summary, dict) else REQUIRED
    if missing:
        raise ValueError(f"{path} must be a sweep's summary, it has no {min(missing)}; run the sweep again")
    result: dict[str, Any] = summary
    return result
