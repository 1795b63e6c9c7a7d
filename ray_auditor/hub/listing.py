"""A listing that survives its reader: every id once, and the cursor to go on from, in one small file.

Repositories move between a hub's pages while these are read, so an id can come twice; and a listing of
millions takes hours, so it must not start again when something breaks. A page's ids and the cursor behind it
are one transaction: after a kill at any moment the listing goes on with no gap and no repeat.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_auditor.hub.remote import Listed, RemoteFile

VERSION = 1  # of the tables
MAX_AGE_S = 24 * 3600.0  # an older beginning says too little about tonight's hub

_SCHEMA = """
CREATE TABLE IF NOT EXISTS listed (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, repo TEXT, revision TEXT, files TEXT, is_local INTEGER,
    bases TEXT
);
CREATE TABLE IF NOT EXISTS state (identity TEXT, cursor TEXT, is_done INTEGER, begun REAL);
"""


@dataclass(frozen=True)
class Page:
    """Some candidates, and the cursor that leads on; None behind the last."""

    items: list[Listed]
    cursor: str | None


class Pages(Protocol):
    """A source that can be read from any of its cursors."""

    @property
    def identity(self) -> list[Any]:
        """JSON value; a cursor is good for a source with the same one."""

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """Pages from `cursor` on, from the first for None."""


def read_listing(path: Path, source: Pages, *, limit: int | None = None) -> Iterator[Listed]:
    """Every candidate of a source once, in its order.

    A listing of the same source that was broken off less than a day ago is taken up where it stopped; a
    finished one is made anew. Memory does not grow with the number of candidates.

    Args:
        path: The file that keeps the listing.
        source: Where the candidates are.
        limit: The most candidates to give; None: all.

    Raises:
        ValueError: One id stands for two different candidates.
        SourceError: The source stopped answering; what came until then is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield from _read(path, source, limit)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} must be a listing of ours ({error}); delete it") from error


def _read(path: Path, source: Pages, limit: int | None) -> Iterator[Listed]:
    with closing(sqlite3.connect(path, timeout=60)) as db:
        # A killed process loses nothing by it; what a power cut could lose, another listing finds again.
        db.execute("PRAGMA synchronous = OFF")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != VERSION:  # another release's: a listing can be made anew
            db.executescript("DROP TABLE IF EXISTS listed; DROP TABLE IF EXISTS state")
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {VERSION}")
        cursor, num_known = _take_up(db, json.dumps([source.identity, limit]))
        for row in db.execute(
            "SELECT id, repo, revision, files, is_local, bases FROM listed ORDER BY number"
        ):
            yield _from_row(row)
        if num_known == limit:
            return
        for page in source.pages(cursor):
            room = None if limit is None else limit - num_known
            with db:
                fresh = [listed for listed in page.items if _add(db, listed)][:room]
                is_done = page.cursor is None or len(fresh) == room
                db.execute("UPDATE state SET cursor = ?, is_done = ?", (page.cursor, is_done))
            num_known += len(fresh)
            yield from fresh
            if is_done:
                return


def _take_up(db: sqlite3.Connection, identity: str) -> tuple[str | None, int]:
    """Cursor and number of ids of a listing that was broken off; otherwise begin a new one."""
    state = db.execute("SELECT identity, cursor, is_done, begun FROM state").fetchone()
    if state is not None:
        was, cursor, is_done, begun = state
        if was == identity and not is_done and 0 <= time.time() - begun < MAX_AGE_S:
            (num_known,) = db.execute("SELECT count(*) FROM listed").fetchone()
            return cursor, num_known
    with db:
        db.execute("DELETE FROM listed")
        db.execute("DELETE FROM state")
        db.execute("INSERT INTO state VALUES (?, NULL, 0, ?)", (identity, time.time()))
    return None, 0


def _add(db: sqlite3.Connection, listed: Listed) -> bool:
    """Keep a candidate unless its id is known; whether it was new."""
    files = json.dumps([astuple(file) for file in listed.files]) if listed.files is not None else None
    bases = json.dumps(listed.bases)
    row = (listed.id, listed.repo, listed.revision, files, int(listed.is_local), bases)
    if db.execute(
        "INSERT OR IGNORE INTO listed (id, repo, revision, files, is_local, bases) VALUES (?, ?, ?, ?, ?, ?)",
        row,
    ).rowcount:
        return True
    (repo,) = db.execute("SELECT repo FROM listed WHERE id = ?", (listed.id,)).fetchone()
    if repo != listed.repo:  # a hub's repository may have moved on between two pages; it is still the same
        raise ValueError(f"candidates must have distinct ids, got {listed.id!r} for two of them")
    return False


def _from_row(row: tuple[str, str, str, str | None, int, str]) -> Listed:
    name, repo, revision, files, is_local, bases = row
    known = None if files is None else tuple(RemoteFile(*file) for file in json.loads(files))
    return Listed(name, repo, revision, known, bool(is_local), tuple(json.loads(bases)))
