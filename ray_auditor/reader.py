"""A finished sweep as Arrow tables, for notebooks and other programs: read only, without torch or Ray."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_auditor.features import MovedFeature, moved_features
from ray_auditor.store import Store, TokenRows
from ray_auditor.tables import ABOUT, SCHEMA_VERSION, candidates_schema, rates_schema

ROWS_CACHED = 24  # units whose rows stay in memory: a look at one candidate leads to the next
SETTINGS = {"k", "suite_names", "suites_key", "unit_keys"}  # what is asked of the sweep's
FEATURES = pa.schema(
    [pa.field("suite", pa.string(), nullable=False), pa.field("feature", pa.int32(), nullable=False)]
    + [
        pa.field(one.name, pa.float64())
        for one in fields(MovedFeature)
        if one.name not in ("feature", "examples")
    ]
)


@contextmanager
def _there() -> Iterator[None]:
    """What a store does not have, as a ValueError."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{error.args[0]}; copy the store, too, or run the sweep again") from error


class StoreReader:
    """What a sweep left in its `out_dir`; made by `ray_auditor.open_store`.

    `candidates` and `rates` are mapped into memory: their columns lie in the file, and are read when they are
    touched. Shards are compressed, so that their batches are made when they are asked for.

    Raises:
        ValueError: There is no finished sweep of this release.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._store = Store(self.path / "store", read_only=True)
        self._candidates = self._open("candidates.arrow", candidates_schema())
        if missing := SETTINGS - (self.about.get("settings") or {}).keys():
            raise ValueError(
                f"path must be the out_dir of a sweep of this release, got {self.path}, whose settings have "
                f"no {min(missing)}; sweep again: what is committed is not computed twice"
            )
        self.read_rows = lru_cache(ROWS_CACHED)(self._read_rows)

    def candidates(self) -> Any:
        """pa.Table: one row a listed candidate; docs/schema.md has the columns."""
        return self._candidates

    def rates(self) -> Any:
        """pa.Table: one row a candidate and suite; docs/schema.md has the columns."""
        return self._rates

    def features(self, candidate: str, suite: str | None = None, *, num_features: int = 20) -> Any:
        """The features that moved most, computed from the shards.

        Args:
            candidate: A candidate that ran.
            suite: One suite, or None for all but the general one.
            num_features: At most so many of each suite.

        Returns:
            pa.Table: `suite`, `feature` (int32), and the rates, activations and ranks of `MovedFeature`, by
            suite, what moved most first.

        Raises:
            ValueError: No such candidate or suite, or it did not run.
        """
        if suite is not None and suite not in self.suites:
            raise ValueError(f"suite must be one of {list(self.suites)}, got {suite!r}")
        base, rows = self.base_rows, self.read_rows(self.unit_key(candidate))
        found = [
            {"suite": name} | {field: getattr(one, field) for field in FEATURES.names[1:]}
            for number, name in enumerate(self.suites)
            if (name == suite if suite is not None else number)
            for one in moved_features(base, rows, number, 0, num_features=num_features, num_examples=0)
        ]
        return pa.Table.from_pylist(found, schema=FEATURES)

    def shards(self, candidate: str | None = None) -> Any:
        """Every scored token's features, batch by batch.

        Args:
            candidate: A candidate that ran; None is the base.

        Returns:
            pa.RecordBatchReader: `suite` (int16, a place in `suites`), `prompt`, `position`, `top_idx` (fixed
            list of int32, ascending, -1 where inactive), `top_acts`, `fvu_err`, `fvu_total`, `cosine`,
            `change`.

        Raises:
            ValueError: No such candidate, or it did not run.
        """
        with _there():
            return self._store.scan_rows(self.base_key if candidate is None else self.unit_key(candidate))

    def prompts(self) -> Any:
        """pa.Table: `suite_id`, `suite`, `prompt`, `text`, `token_ids`, `token_texts` and `content`."""
        return self._prompts

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the sweep says as a whole: `settings`, `counts`, `limits`, `noise_floor` and others."""
        about: dict[str, Any] = json.loads(self._candidates.schema.metadata[ABOUT])
        return about

    @property
    def suites(self) -> Sequence[str]:
        """Names of the suites, in the order of their numbers; the first is the general one."""
        return tuple(self.about["settings"]["suite_names"])

    @cached_property
    def d_sae(self) -> int:
        """Features of the SAE."""
        with _there():
            return int(self._store.read_commit(self.base_key).unit["d_sae"])

    @property
    def base_key(self) -> str:
        """Unit key of the base."""
        return str(self.about["settings"]["unit_keys"]["base"])

    @property
    def base_rows(self) -> TokenRows:
        """The base's scored tokens."""
        return self.read_rows(self.base_key)

    def unit_key(self, candidate: str) -> str:
        """The unit of a candidate that ran.

        Raises:
            ValueError: There is none; the message names the nearest ids, or the reason.
        """
        ids = self._candidates["id"]
        at = pc.index(ids, candidate).as_py()
        if at < 0:
            near = difflib.get_close_matches(candidate, ids.to_pylist(), n=3, cutoff=0.4)
            raise ValueError(f"candidate must be a listed one, got {candidate!r}; nearest: {near}")
        status, key, reason = (
            self._candidates[name][at].as_py() for name in ("status", "unit_key", "reason")
        )
        if status not in ("ok", "flagged", "sae_misfit"):
            raise ValueError(f"candidate must be one that ran, got {candidate!r}: {reason or status}")
        return str(key)

    def _read_rows(self, unit_key: str) -> TokenRows:
        with _there():
            return self._store.read_rows(unit_key)

    @cached_property
    def _rates(self) -> Any:
        return self._open("rates.arrow", rates_schema())

    @cached_property
    def _prompts(self) -> Any:
        with _there():
            return self._store.suites_table(self.about["settings"]["suites_key"])

    def _open(self, name: str, schema: Any) -> Any:
        path = self.path / name
        remedy = f"say ray-auditor report out_dir={self.path}"
        if not path.is_file():
            raise ValueError(
                f"path must be the out_dir of a finished sweep, got {self.path}: no {name}; {remedy}"
            )
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a whole Arrow file ({error}); {remedy}") from error
        version = (table.schema.metadata or {}).get(b"schema_version", str(SCHEMA_VERSION).encode())
        if not table.schema.equals(schema) or version != str(SCHEMA_VERSION).encode():
            raise ValueError(f"{path} is of another release; {remedy}")
        return table
