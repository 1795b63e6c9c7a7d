"""The per-prompt sums of committed units, kept beside them so that no token is read twice.

    <store>/sums/<unit_key>.sums    the sha256 of what follows, in hex, and an Arrow IPC file

A file names what it was derived from; one that is missing, damaged, or of anything else is derived anew.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from ray_auditor.durable_file import put_file
from ray_auditor.reduce import reduce_prompts
from ray_auditor.shard import TokenRows
from ray_auditor.store import Store

SUMS_VERSION = 1  # of what `reduce_prompts` computes: raise it when that changes
DERIVED_FROM = b"derived_from"
DIGEST_BYTES = 64


def read_sums(
    store: Store, base_key: str, unit_key: str, suites: Sequence[str], base: Callable[[], TokenRows]
) -> Any:
    """The `reduce_prompts` table of a unit against a base.

    Args:
        store: Holds both units.
        base_key: Unit key of the base.
        unit_key: Unit key of the finetune.
        suites: Suite names, as `reduce_prompts` takes them.
        base: Reads the base's rows; called when the table has to be derived.

    Raises:
        KeyError: A unit is not committed.
        ShardError: A unit is damaged.
        NonfiniteActivations: As `reduce_prompts`.
    """
    commits = (store.read_commit(key) for key in (base_key, unit_key))
    parts = [str(SUMS_VERSION), *(commit.shard_sha256 for commit in commits), *suites]
    derived_from = hashlib.sha256("\0".join(parts).encode()).hexdigest().encode()
    path = store.root / "sums" / f"{unit_key}.sums"
    if path.is_file():
        kept = _parse(path.read_bytes(), derived_from)
        if kept is not None:
            return kept
    table = reduce_prompts(base(), store.read_rows(unit_key), suites=suites)
    table = table.replace_schema_metadata({DERIVED_FROM: derived_from})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    path.parent.mkdir(exist_ok=True)
    data = sink.getvalue().to_pybytes()
    put_file(path, _digest(data) + data, temp=store.root / "tmp", replace=True)
    return table


def _parse(data: bytes, derived_from: bytes) -> Any:
    """The table in `data`; None when it is not whole, or derived from anything else."""
    digest, data = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    # before pyarrow parses: loading an extension type may run code that its author chose
    if digest != _digest(data) or b"ARROW:extension" in data:
        return None
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    return table if (table.schema.metadata or {}).get(DERIVED_FROM) == derived_from else None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
