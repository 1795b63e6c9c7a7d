"""What an audit keeps on disk: one Arrow shard per unit, made true by one commit record.

Layout under the store's root; nothing else in the project knows it:

    shards/<unit_key>-<first 16 of the shard's sha256>.arrow
    residuals/<unit_key>-<first 16 of its sha256>.bin    beside the base's shard: what candidates are held to
    commits/<unit_key>.json        the only truth: a shard without a commit does not exist
    suites/<suites_key>.arrow      the prompts, for drill-down
    tmp/                           files being written; each is locked by its writer

Shards and residuals are named by their content, so writing one again is harmless and repairs a damaged copy.
The commit is put if absent (a hard link of a synced file), so of two writers exactly one wins and a kill at
any moment leaves a unit absent or whole.
"""

import hashlib
import mmap
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_auditor.durable_file import put_file, remove_if_stale
from ray_auditor.shard import (
    SCHEMA_VERSION,
    Bytes,
    SchemaVersionError,
    ShardError,
    TokenRows,
    decode_shard,
    encode_shard,
    read_ipc,
    scan_shard,
    write_ipc,
)
from ray_auditor.unit import Commit, NondeterminismError, Unit

__all__ = ["Commit", "NondeterminismError", "ShardError", "Store", "SuitePrompt", "TokenRows", "Unit"]

MAX_COMMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class SuitePrompt:
    """One tokenised prompt; `suite_id` and `prompt` are the values that `TokenRows` carries.

    `content` marks the tokens that lie in the prompt's own text and `token_texts` has the piece of `text`
    that each token stands for; both have the length of `token_ids`.
    """

    suite_id: int
    suite: str
    prompt: int
    text: str
    token_ids: Sequence[int]
    token_texts: Sequence[str]
    content: Sequence[bool]


def _suites_schema(suites_key: str) -> Any:
    columns = {
        "suite_id": pa.int16(),
        "suite": pa.string(),
        "prompt": pa.int32(),
        "text": pa.large_string(),
        "token_ids": pa.list_(pa.int32()),
        "token_texts": pa.list_(pa.string()),
        "content": pa.list_(pa.bool_()),
    }
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns.items()],
        metadata={"schema_version": str(SCHEMA_VERSION), "suites_key": suites_key},
    )


class Store:
    """The units of one output folder. Any number of processes may open and write the same root."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        """Open or create the store, and remove what killed writers left in `tmp/`; or change nothing."""
        self.root = Path(root)
        if read_only:
            return
        for name in ("shards", "residuals", "commits", "suites", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for path in (self.root / "tmp").iterdir():
            remove_if_stale(path)

    def has(self, unit_key: str) -> bool:
        """Whether the unit is committed and its files are whole; a damaged unit counts as absent.

        Raises:
            SchemaVersionError: It is there in another release's schema.
        """
        try:
            commit = self.read_commit(unit_key)
            self._read_shard(commit)
            if commit.residuals_name is not None:
                self._map_residuals(commit)
        except SchemaVersionError:
            raise
        except (KeyError, ShardError):
            return False
        return True

    def commit(
        self,
        unit: Unit,
        rows: TokenRows,
        record: Mapping[str, Any],
        residuals: npt.NDArray[np.uint8] | None = None,
    ) -> Commit:
        """Write the unit's rows and make them true.

        Args:
            unit: What was computed.
            rows: Scored tokens with K = `unit.k`; checked here, see `TokenRows.check`.
            record: JSON-able note kept beside the shard; it takes no part in comparing attempts. Its
                `seconds`, if it has some, gain `write`: what the shard took.
            residuals: Bytes that `read_residuals` gives back, contiguous; at least one.

        Returns:
            The commit that counts: this one, or an earlier one with the same files.

        Raises:
            ValueError: The rows break a rule of `TokenRows`, or the filesystem has no hard links.
            NondeterminismError: The unit is already committed with other rows.
        """
        begun = time.perf_counter()
        rows.check(k=unit.k, d_sae=unit.d_sae)
        shard = encode_shard(rows, d_sae=unit.d_sae, metadata=unit.metadata())
        sha256 = hashlib.sha256(shard).hexdigest()
        mine = Commit(
            SCHEMA_VERSION, unit.key, asdict(unit), sha256, len(shard), rows.num_tokens, dict(record)
        )
        if residuals is not None:
            residuals_sha256 = hashlib.sha256(residuals.data).hexdigest()
            mine = replace(mine, residuals_sha256=residuals_sha256, residuals_bytes=residuals.nbytes)
        note = mine.to_json()
        if len(note) > MAX_COMMIT_BYTES:
            raise ValueError(f"record must fit {MAX_COMMIT_BYTES} bytes, got {len(note)}; keep less in it")
        if residuals is not None:
            self._put(self._residuals_path(mine), residuals.data, replace=True)
        self._put(self.root / "shards" / mine.shard_name, shard, replace=True)
        if "seconds" in record:
            seconds = record["seconds"] | {"write": round(time.perf_counter() - begun, 4)}
            note = replace(mine, record={**record, "seconds": seconds}).to_json()
        if self._put(self._commit_path(unit.key), note, replace=False):
            return mine
        if not self.has(unit.key):  # damaged since, so absent: this attempt takes its place
            self._put(self._commit_path(unit.key), note, replace=True)
            return mine
        theirs = self.read_commit(unit.key)
        if (theirs.shard_sha256, theirs.residuals_sha256) != (sha256, mine.residuals_sha256):
            raise NondeterminismError(
                f"unit {unit.key} is committed with shard sha256 {theirs.shard_sha256}, this attempt has "
                f"{sha256}: the engine is not deterministic, or engine_class {unit.engine_class!r} omits "
                f"what changes results; delete {self._commit_path(unit.key)} to prefer the new attempt"
            )
        return theirs

    def read_rows(self, unit_key: str) -> TokenRows:
        """Read the unit's rows.

        Raises:
            KeyError: The unit is not committed.
            ShardError: The shard is missing, differs from its commit, or is not of this schema.
        """
        commit = self.read_commit(unit_key)
        unit = Unit(**commit.unit)
        path = self.root / "shards" / commit.shard_name
        shard = self._read_shard(commit)
        return decode_shard(shard, k=unit.k, d_sae=unit.d_sae, metadata=unit.metadata(), path=path)

    def scan_rows(self, unit_key: str) -> Any:
        """Map the unit's shard and give its batches as `scan_shard` does; raises as `read_rows`."""
        commit = self.read_commit(unit_key)
        unit = Unit(**commit.unit)
        path = self.root / "shards" / commit.shard_name
        return scan_shard(
            self._read_shard(commit, mapped=True),
            k=unit.k,
            d_sae=unit.d_sae,
            metadata=unit.metadata(),
            path=path,
        )

    def read_residuals(self, unit_key: str) -> npt.NDArray[np.uint8]:
        """Map the bytes that were committed beside the unit; processes share the pages they do not write.

        Raises:
            KeyError: The unit is not committed, or without such bytes.
            ShardError: They are missing or differ from the commit.
        """
        commit = self.read_commit(unit_key)
        if commit.residuals_name is None:
            raise KeyError(f"unit {unit_key} was committed without residuals in {self.root}")
        return self._map_residuals(commit)

    def read_record(self, unit_key: str) -> dict[str, Any]:
        """The note given to `commit`; KeyError when the unit is not committed."""
        return self.read_commit(unit_key).record

    def read_commit(self, unit_key: str) -> Commit:
        """The unit's commit; KeyError when absent, ShardError when it is not one of ours."""
        path = self._commit_path(unit_key)
        if not path.is_file():
            raise KeyError(f"unit {unit_key} is not committed in {self.root}")
        if path.stat().st_size > MAX_COMMIT_BYTES:
            raise ShardError(f"{path} is over {MAX_COMMIT_BYTES} bytes, so not a commit of ours; delete it")
        return Commit.parse(path.read_bytes(), path)

    def list_commits(self) -> list[Commit]:
        """Every committed unit, ordered by unit key."""
        return [self.read_commit(path.stem) for path in sorted((self.root / "commits").glob("*.json"))]

    def list_stamps(self) -> dict[str, str]:
        """By unit key, how the files of every committed unit look from outside, in two looks at folders.

        Equal stamps of a unit that was whole mean that nobody wrote to it since. No file is opened.
        """
        if not (self.root / "shards").is_dir():
            return {}
        commits = {path.name.removesuffix(".json"): path for path in os.scandir(self.root / "commits")}
        stamps: dict[str, str] = {}
        with os.scandir(self.root / "shards") as shards:
            for shard in shards:
                key = shard.name.partition("-")[0]
                if key in commits:
                    looks = [commits[key].stat(), shard.stat()]
                    stamp = ":".join(f"{s.st_ino}.{s.st_size}.{s.st_mtime_ns}.{s.st_ctime_ns}" for s in looks)
                    stamps[key] = f"{stamps[key]};{stamp}" if key in stamps else stamp
        return stamps

    def write_suites(self, suites_key: str, prompts: Sequence[SuitePrompt]) -> None:
        """Keep the prompts for drill-down; the same again is fine, others under one key are a ShardError."""
        table = pa.Table.from_pylist(
            [asdict(prompt) for prompt in prompts], schema=_suites_schema(suites_key)
        )
        path = self._suites_path(suites_key)
        if self._put(path, write_ipc(table), replace=False):
            return
        scored = [(one.suite, one.prompt, list(one.token_ids), list(one.content)) for one in prompts]
        kept = self.read_suites(suites_key)
        if scored != [(one.suite, one.prompt, list(one.token_ids), list(one.content)) for one in kept]:
            raise ShardError(f"{path} holds other prompts than its key says; delete it and run again")

    def read_suites(self, suites_key: str) -> list[SuitePrompt]:
        """The prompts in written order; KeyError when absent, ShardError when not of this schema."""
        return [SuitePrompt(**row) for row in self.suites_table(suites_key).to_pylist()]

    def suites_table(self, suites_key: str) -> Any:
        """The same as an Arrow table, a row a prompt."""
        path = self._suites_path(suites_key)
        if not path.is_file():
            raise KeyError(f"suites {suites_key} are not in {self.root}")
        return read_ipc(path.read_bytes(), _suites_schema(suites_key), path)

    def _read_shard(self, commit: Commit, *, mapped: bool = False) -> Bytes:
        """The bytes the commit speaks of; ShardError when they are not there."""
        path = self.root / "shards" / commit.shard_name
        remedy = "run the sweep again: it computes the unit again"
        if not path.is_file():
            raise ShardError(f"{path} is missing though unit {commit.unit_key} is committed; {remedy}")
        num_bytes = path.stat().st_size
        if num_bytes != commit.num_bytes:
            raise ShardError(f"{path} has {num_bytes} bytes, its commit says {commit.num_bytes}; {remedy}")
        with path.open("rb") as file:
            shard: Bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file.read()
        sha256 = hashlib.sha256(shard).hexdigest()
        if sha256 != commit.shard_sha256:
            raise ShardError(f"{path} has sha256 {sha256}, its commit says {commit.shard_sha256}; {remedy}")
        return shard

    def _map_residuals(self, commit: Commit) -> npt.NDArray[np.uint8]:
        """The file the commit speaks of, mapped; ShardError when it is not there."""
        path = self._residuals_path(commit)
        remedy = "run the sweep again: it computes the base again"
        found = path.stat().st_size if path.is_file() else -1
        if found != commit.residuals_bytes:
            raise ShardError(f"{path} must have {commit.residuals_bytes} bytes, got {found}; {remedy}")
        mapped: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, mode="c")
        sha256 = hashlib.sha256(mapped.data).hexdigest()
        if sha256 != commit.residuals_sha256:
            raise ShardError(
                f"{path} has sha256 {sha256}, its commit says {commit.residuals_sha256}; {remedy}"
            )
        return mapped

    def _residuals_path(self, commit: Commit) -> Path:
        assert commit.residuals_name is not None, f"{commit.unit_key} has no residuals"
        return self.root / "residuals" / commit.residuals_name

    def _commit_path(self, unit_key: str) -> Path:
        return self.root / "commits" / f"{_hex_key(unit_key)}.json"

    def _suites_path(self, suites_key: str) -> Path:
        return self.root / "suites" / f"{_hex_key(suites_key)}.arrow"

    def _put(self, target: Path, data: bytes | memoryview, *, replace: bool) -> bool:
        return put_file(target, data, temp=self.root / "tmp", replace=replace)


def _hex_key(key: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", key):
        raise ValueError(f"a store key must be 64 lower-case hex digits, got {key[:80]!r}")
    return key
