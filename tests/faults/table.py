"""Faults that an audit must survive: a row each, what is demanded, what happens, and the test that shows it.

A test declares its row with `fault` and reports every outcome to the fixture `seen`, which holds them to the
row's: so the column of the written table that says what was seen cannot be wrong while the tests pass.
"""

import ast
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "faults.md"
MODULES = ("test_sources", "test_weights", "test_formats", "test_adapters", "test_elsewhere")
TABLES = {
    "A": ("Hub and sources", 23),
    "B": ("Files and formats", 26),
    "C": ("Adapters and lineage", 12),
    "D": ("Compute and numbers", 0),
    "E": ("Orchestration, storage, time", 0),
    "F": ("Statistics and report", 0),
}
HEAD = """# Faults

What an audit meets in strangers' repositories, on networks and on disks, and what becomes of it.
Written by `python tests/faults/write_table.py`; a test holds this file to the tests.

`ok` is audited; `ok, NOTE` is audited with that finding in its row; `rejected` is the repository's fault and
is not looked at again until its files change; `skipped` is sound and not for this auditor; `deferred` is
tried in the next sweep; `failed` is ours or the network's. Whatever one candidate does, the others finish
(`tests/test_driver.py`).
"""


@dataclass(frozen=True)
class Fault:
    """One row."""

    row: str
    what: str
    demanded: str
    seen: tuple[str, ...]
    why: str  # where what is seen is not what was demanded at first, the reason
    test: str


FAULTS: list[Fault] = []


def fault(
    row: str, what: str, *, demanded: str, seen: str, why: str = ""
) -> Callable[..., Callable[..., None]]:
    """Declare a test's row; `seen` lists every outcome, separated by `; `."""

    def declare(test: Callable[..., None]) -> Callable[..., None]:
        name = f"{Path(sys.modules[test.__module__].__file__ or '').name}::{test.__name__}"
        assert re.fullmatch(rf"test_{row[0]}{int(row[1:]):02}_\w+", test.__name__), f"{name} is row {row}'s"
        found = Fault(row, what, demanded, tuple(seen.split("; ")), why, f"tests/faults/{name}")
        FAULTS.append(found)
        test.fault = found  # type: ignore[attr-defined]
        return test

    return declare


def elsewhere(row: str, what: str, *, demanded: str, seen: str, test: str, why: str = "") -> None:
    """Declare a row that a test of another folder shows, as FILE::NAME."""
    file, _, name = test.partition("::")
    names = {
        node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert name in names, f"{test} is not there"
    FAULTS.append(Fault(row, what, demanded, tuple(seen.split("; ")), why, test))


def read_faults() -> list[Fault]:
    """Every declared row, in order."""
    for path in (ROOT, FOLDER, FOLDER.parent / "hub"):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    for name in MODULES:
        importlib.import_module(name)
    distinct = {(found.row, found.test): found for found in FAULTS}
    return sorted(distinct.values(), key=lambda one: (one.row[0], int(one.row[1:]), one.test))


def render(faults: list[Fault]) -> str:
    """The page."""
    parts = [HEAD]
    for letter, (title, _) in TABLES.items():
        rows = [one for one in faults if one.row[0] == letter]
        parts.append(f"\n## {letter}. {title}\n")
        parts.append("| | fault | demanded | seen | test |\n|---|---|---|---|---|\n")
        for one in rows:
            seen = ", ".join(f"`{outcome}`" for outcome in one.seen)
            seen += f"; {one.why}" if one.why else ""
            link = f"[{one.test.partition('::')[2]}](../{one.test.partition('::')[0]})"
            parts.append(f"| {one.row} | {one.what} | {one.demanded} | {seen} | {link} |\n")
    return "".join(parts)
