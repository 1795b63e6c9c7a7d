"""What earlier sweeps found out and tonight's need not ask again: one small file beside the units.

It says nothing that could not be found again: a sweep without it downloads and admits anew, and computes
nothing twice, for the store's commits are the only truth.
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

VERSION = 1  # of the tables
COMMIT_S = 1.0  # the most a kill can lose
ADMISSION_VERSION = 3  # of what admission refuses or notes; raise it when a rule changes

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pins (origin TEXT, repo TEXT, revision TEXT, pinned TEXT,
    PRIMARY KEY (origin, repo, revision)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS admissions (key TEXT, class TEXT, admission TEXT,
    PRIMARY KEY (key, class)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audits (id TEXT PRIMARY KEY, audit TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reported (candidate TEXT, suite TEXT, content TEXT, inputs TEXT, rank INTEGER,
    first_seen TEXT, PRIMARY KEY (candidate, suite, content, inputs, rank)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refusals (unit TEXT PRIMARY KEY, refusal TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS whole (unit TEXT PRIMARY KEY, stamp TEXT) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Admission:
    """What admission said of some files, under a base: refused with a reason, or a content to be audited."""

    status: str  # "admitted", or why not
    reason: str | None
    kind: str | None
    content: str | None  # content_sha256
    notes: tuple[str, ...] = ()
    declared_base: str | None = None


@dataclass(frozen=True)
class Audit:
    """How a candidate stood at the end of a sweep: what it was, under which inputs, and what came of it."""

    content: str | None
    status: str
    parts: dict[str, str]  # base, SAE, suites, settings


class Reported(NamedTuple):
    """What a finding was reported of."""

    candidate: str
    suite: str
    content: str
    inputs: str  # base, SAE, hook, suites and k


class Ledger:
    """The file, for one sweep at a time, and any of its threads.

    Raises:
        ValueError: It is damaged, or of a newer release.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._committed = time.monotonic()
        self._writing = threading.RLock()  # a transaction is the connection's, whichever thread began it
        try:
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise ValueError(
                    f"out_dir must hold a ledger of version {VERSION}, got {version} in {path}; delete it, "
                    "another release's: what is committed stays"
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"out_dir must hold a ledger of ours, got {path}: {error}; delete it: what is committed stays"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.commit()
        self._db.close()

    def pin(self, origin: str, repo: str, commit: str) -> Any | None:
        """What was kept of a repository at a commit, which cannot change."""
        row = self._db.execute(
            "SELECT pinned FROM pins WHERE origin = ? AND repo = ? AND revision = ?", (origin, repo, commit)
        ).fetchone()
        return json.loads(row[0]) if row else None

    def keep_pin(self, origin: str, repo: str, commit: str, pinned: Any) -> None:
        """Keep a JSON value for `pin`."""
        row = (origin, repo, commit, json.dumps(pinned))
        with self._writing:
            self._db.execute("INSERT OR REPLACE INTO pins VALUES (?, ?, ?, ?)", row)
            self._commit_if_due()

    def admission(self, key: str, admission_class: str) -> Admission | None:
        """What was said of files with this key."""
        row = self._db.execute(
            "SELECT admission FROM admissions WHERE key = ? AND class = ?", (key, admission_class)
        ).fetchone()
        if row is None:
            return None
        status, reason, kind, content, notes, declared = json.loads(row[0])
        return Admission(status, reason, kind, content, tuple(notes), declared)

    def contents(self, key: str) -> list[str]:
        """Contents of files with this key, under whatever rules they were admitted."""
        rows = self._db.execute("SELECT admission FROM admissions WHERE key = ?", (key,))
        said = (Admission(*json.loads(admission)) for (admission,) in rows)
        return [one.content for one in said if one.content]

    def keep_admission(self, key: str, admission_class: str, admission: Admission) -> None:
        """Keep what admission said for `admission`."""
        row = (key, admission_class, json.dumps(astuple(admission)))
        with self._writing:
            self._db.execute("INSERT OR REPLACE INTO admissions VALUES (?, ?, ?)", row)
            self._commit_if_due()

    def audits(self) -> dict[str, Audit]:
        """How every candidate stood, by id."""
        rows = self._db.execute("SELECT id, audit FROM audits")
        return {name: Audit(**json.loads(audit)) for name, audit in rows}

    def reported(self) -> dict[Reported, int]:
        """Everything that was ever reported, with the rank of the surest rule that did, the surest 0."""
        rows = self._db.execute(
            "SELECT candidate, suite, content, inputs, MIN(rank) FROM reported GROUP BY 1, 2, 3, 4"
        )
        return {Reported(*one): rank for *one, rank in rows}

    def conclude(self, audits: Mapping[str, Audit], findings: Iterable[tuple[Reported, int]]) -> None:
        """Keep how a sweep ended, in one step."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._writing, self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO audits VALUES (?, ?)",
                ((name, json.dumps(asdict(audit))) for name, audit in audits.items()),
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO reported VALUES (?, ?, ?, ?, ?, ?)",
                ((*found, rank, now) for found, rank in findings),
            )

    def refusals(self) -> dict[str, tuple[str, str]]:
        """By unit key, code and text of what showed, while it ran, that a candidate is at fault."""
        rows = self._db.execute("SELECT unit, refusal FROM refusals")
        return {unit: tuple(json.loads(refusal)) for unit, refusal in rows}

    def keep_refusals(self, refusals: Mapping[str, tuple[str, str]]) -> None:
        """Keep them for `refusals`: the same unit would show the same again."""
        with self._writing, self._db:
            rows = ((unit, json.dumps(refusal)) for unit, refusal in refusals.items())
            self._db.executemany("INSERT OR REPLACE INTO refusals VALUES (?, ?)", rows)

    def fact(self, name: str) -> str | None:
        """One remembered value."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def keep_fact(self, name: str, value: str) -> None:
        """Remember it for `fact`."""
        with self._writing, self._db:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def stamps(self) -> dict[str, str]:
        """By unit key, how the unit's files looked when they were last found whole."""
        return dict(self._db.execute("SELECT unit, stamp FROM whole"))

    def keep_stamps(self, stamps: Mapping[str, str]) -> None:
        """Keep them for `stamps`."""
        with self._writing, self._db:
            self._db.executemany("INSERT OR REPLACE INTO whole VALUES (?, ?)", stamps.items())

    def forget_stamps(self) -> None:
        """Have every unit hashed again."""
        with self._writing, self._db:
            self._db.execute("DELETE FROM whole")

    def commit(self) -> None:
        """Make what was kept so far last."""
        with self._writing:
            self._db.commit()
            self._committed = time.monotonic()

    def _commit_if_due(self) -> None:
        if time.monotonic() - self._committed > COMMIT_S:
            self.commit()


def admission_class(parts: Sequence[Any]) -> str:
    """What admission depends on besides the files: the base, the layers read, the largest rank, the rules."""
    return hashlib.sha256(json.dumps([ADMISSION_VERSION, *parts]).encode()).hexdigest()


def explain(before: Audit | None, content: str | None, parts: Mapping[str, str]) -> str:
    """Why a candidate is where it is tonight.

    Args:
        before: How it stood at the end of the last sweep.
        content: What its weights are now; None when it was refused.
        parts: The other inputs now.

    Returns:
        str: `new`, `policy retry` for what failed or was deferred, `unchanged`, or `changed weights`,
        `changed base`, `changed sae`, `changed suites`, `changed settings`, joined by `, `.
    """
    if before is None:
        return "new"
    if before.status in ("failed", "deferred"):
        return "policy retry"
    changed = ["weights"] if content != before.content else []
    changed += [name for name, value in parts.items() if before.parts.get(name) != value]
    return ", ".join(f"changed {name}" for name in changed) or "unchanged"
