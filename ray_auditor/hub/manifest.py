"""A manifest: a file of the user's own that names every candidate, one a row.

Columns: `repo` (on the hub) or `path` (a folder, relative to the manifest), and optionally `id` (default: the
repo, or the folder's name) and `revision` (default `main`; a commit costs one request less). Others are free.
"""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_auditor.hub.listing import Page
from ray_auditor.hub.remote import Listed

PAGE_SIZE = 1000
FORMATS = (".jsonl", ".csv", ".parquet")
COLUMNS = ("id", "repo", "path", "revision")


class Manifest:
    """A manifest on disk. A cursor is the number of rows read.

    Raises:
        ValueError: There is no such file, or its name has none of the three endings.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file() or self.path.suffix not in FORMATS:
            raise ValueError(f"candidates.path must be a file ending in {', '.join(FORMATS)}, got {path!r}")
        self.path = self.path.resolve()

    @property
    def identity(self) -> list[Any]:
        """The file as it is now."""
        status = self.path.stat()
        return [str(self.path), status.st_size, status.st_mtime_ns]

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """Every page from `cursor` on.

        Raises:
            ValueError: A row names no candidate; says which.
        """
        number = int(cursor or 0)
        rows = islice(enumerate(self._rows(), start=1), number, None)
        while batch := list(islice(rows, PAGE_SIZE)):
            number += len(batch)
            yield Page([self._listed(i, row) for i, row in batch], str(number))
        yield Page([], None)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.path.suffix == ".jsonl":
            with self.path.open("rb") as lines:
                numbered = enumerate(lines, start=1)
                yield from (_parse(number, line) for number, line in numbered if line.strip())
        elif self.path.suffix == ".csv":
            with self.path.open(newline="", encoding="utf-8") as lines:
                yield from csv.DictReader(lines, strict=True)
        else:
            with _open_parquet(self.path) as table:
                columns = [name for name in table.schema_arrow.names if name in COLUMNS]
                for batch in table.iter_batches(PAGE_SIZE, columns=columns):
                    yield from batch.to_pylist()

    def _listed(self, number: int, row: dict[str, Any]) -> Listed:
        named = {name: row.get(name) or "" for name in COLUMNS}
        if not all(isinstance(value, str) for value in named.values()):
            raise ValueError(f"{self.path.name} row {number}: {', '.join(COLUMNS)} must be text")
        if bool(named["repo"]) == bool(named["path"]):
            raise ValueError(f"{self.path.name} row {number} must name a repo or a path, and not both")
        if named["repo"]:
            return Listed(named["id"] or named["repo"], named["repo"], named["revision"] or "main")
        folder = self.path.parent / Path(named["path"]).expanduser()
        return Listed(named["id"] or folder.name, str(folder), is_local=True)


def _parse(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"candidates.path must hold JSON lines, line {number} is none") from error
    if not isinstance(row, dict):
        raise ValueError(f"candidates.path must hold objects, line {number} is {line[:40]!r}")
    return row


def _open_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"candidates.path must be a Parquet file, got {path}: {error}") from error
