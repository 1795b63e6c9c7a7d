"""The verbs that read a finished `out_dir` again, without a GPU, torch or Ray."""

import errno
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_auditor import open_store
from ray_auditor.acknowledgement import (
    acknowledge,
    append_acknowledgements,
    inputs_of,
    mark_acknowledged,
    read_acknowledgements,
)
from ray_auditor.config import AuditConfig
from ray_auditor.lease import Lease, LeaseHeld
from ray_auditor.outputs import write_outputs
from ray_auditor.reading_config import Format
from ray_auditor.report.candidate import MISFIT
from ray_auditor.report.comparison import compare, print_comparison
from ray_auditor.report.dossier import print_candidate
from ray_auditor.report.finding import EXIT_FAILED, exit_code_of, list_findings
from ray_auditor.report.terminal import print_acknowledged, print_summary
from ray_auditor.showing import print_feature, print_prompt

REQUIRED = {"candidates", "counts", "exit_code", "flags", "settings"}


def write_report(config: AuditConfig) -> int:
    """Print the summary of `out_dir` and write every output again, with what is acknowledged by now.

    Returns:
        The exit code that the sweep would give; 2 while one runs here, which writes its own.

    Raises:
        ValueError: There is no summary, or `out_dir` cannot be written.
    """
    out_dir = Path(config.out_dir)
    read_summary(out_dir)  # before a lease makes a folder that is not there
    try:
        summary = _write_again(out_dir)
    except LeaseHeld as held:
        sys.stderr.write(f"error: {held}; nothing was written\n")
        return EXIT_FAILED
    console = Console()
    print_summary(summary, console)
    console.print(f"report: {out_dir / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return int(summary["exit_code"])


def run_ack(config: AuditConfig) -> int:
    """Acknowledge a candidate's findings, or, when no candidate is given, print what stands of every finding.

    Returns:
        0.

    Raises:
        ValueError: There is no summary, or no such finding, or a setting is missing, or `out_dir` cannot be
            written.
    """
    out_dir, given = Path(config.out_dir), config.ack
    summary = read_summary(out_dir)
    findings = list(list_findings(summary))
    console = Console(soft_wrap=True)
    if given.candidate is not None:
        suites = [one.suite for one in findings if one.candidate == given.candidate]
        found = [
            one
            for one in findings
            if one.candidate == given.candidate and given.suite in (None, one.suite or MISFIT)
        ]
        if not found:
            bound = "a candidate with a finding" if not suites else f"one of {suites}"
            name, value = ("candidate", given.candidate) if not suites else ("suite", given.suite)
            raise ValueError(f"ack.{name} must be {bound}, got {value!r}; say ray-auditor ack out_dir=DIR")
        kept = [
            acknowledge(one, inputs_of(summary), who=given.who, why=given.why, until=given.until)
            for one in found
        ]
        with _writing(out_dir):
            append_acknowledgements(out_dir, kept)
        try:
            summary = _write_again(out_dir)
        except LeaseHeld as held:
            console.print(
                "kept; another process writes here: run ray-auditor report to see it"
                if held.brief
                else "kept; a sweep runs here, and the next report will show it"
            )
            return 0
    else:
        mark_acknowledged(summary, read_acknowledgements(out_dir))
    print_acknowledged(summary, console)
    return 0


def run_diff(config: AuditConfig) -> int:
    """Print how a finished sweep differs from an earlier one.

    Returns:
        0 when no finding is new or changed and no result was lost, 1 otherwise.

    Raises:
        ValueError: A sweep is not given or not there, or they cannot be compared.
    """
    given = config.diff
    for name, path in (("before", given.before), ("after", given.after)):
        if path is None:
            raise ValueError(f"diff.{name} must be given, got none; say ray-auditor diff OUT_DIR OUT_DIR")
    comparison = compare(read_summary(Path(given.before or "")), read_summary(Path(given.after or "")))
    console = Console()
    if given.format is Format.json:
        console.file.write(json.dumps(comparison.to_json(), indent=1, allow_nan=False) + "\n")
    else:
        print_comparison(comparison, console)
    return int(comparison.alerts)


def _write_again(out_dir: Path) -> dict[str, Any]:
    with _writing(out_dir), Lease(out_dir, brief=True):
        summary = read_summary(out_dir)
        mark_acknowledged(summary, read_acknowledgements(out_dir))
        summary["exit_code"] = exit_code_of(summary)
        return write_outputs(summary, out_dir)


@contextmanager
def _writing(out_dir: Path) -> Iterator[None]:
    """A folder that may not be written, as a ValueError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ValueError(
            f"out_dir must be a folder that can be written, got {out_dir}: {error}; give a copy of it"
        ) from error


def show_candidate(config: AuditConfig) -> int:
    """Print one candidate, or, from the shards, one of its features or prompts.

    Raises:
        ValueError: No candidate was named, or the sweep has no such candidate, suite or prompt.
    """
    summary, given, console = read_summary(Path(config.out_dir)), config.show, Console()
    if given.candidate is None:
        raise ValueError("show.candidate must be given, got none; say ray-auditor show CANDIDATE out_dir=DIR")
    if given.feature is None and given.prompt is None:
        print_candidate(summary, given.candidate, given.suite, console)
        return 0
    try:
        store = open_store(config.out_dir)
        if given.prompt is None:
            assert given.feature is not None
            print_feature(store, given.candidate, given.feature, given.suite, console)
        elif given.suite is None:
            raise ValueError("suite must be given with a prompt, got none; add show.suite=NAME")
        else:
            print_prompt(store, given.candidate, given.suite, given.prompt, given.feature, console)
    except ValueError as error:
        named = re.match("(candidate|suite|prompt|feature) must", str(error))
        raise ValueError(f"show.{error}" if named else str(error)) from error
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
