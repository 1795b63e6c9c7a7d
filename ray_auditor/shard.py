"""The rows of one unit, and their bytes: an Arrow IPC file with sorted, delta-coded feature indices.

Sorting and delta-coding under zstd stores an index row near its entropy; a reader accepts exactly the schema
written here, metadata included, and never an Arrow extension type.
"""

# Shape suffixes: N scored tokens, K = kept features.

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 2
MAX_BATCH_ROWS = 65_536  # a reader can skip within a shard
Bytes = bytes | mmap.mmap


class ShardError(ValueError):
    """A stored file is missing, damaged, or not of this release's schema; the text says what to do."""


class SchemaVersionError(ShardError):
    """A stored file of another release's schema: sound, and not for this release to replace."""


@dataclass(frozen=True)
class TokenRows:
    """The scored tokens of one unit, ordered by (suite, prompt, position), each once.

    Attributes:
        suite_N: int16, number of the suite.
        prompt_N: int32, number of the prompt within its suite.
        position_N: int32, position of the token within its prompt.
        top_idx_NK: int32 features, ascending; -1 (inactive) last.
        top_acts_NK: float32 activations in the order of `top_idx_NK`, 0 where inactive. A token whose
            residual was not finite has -1 and NaN in its whole row.
        fvu_err_N: float32, squared norm of the reconstruction error.
        fvu_total_N: float32, squared norm of the residual less the decoder bias.
        cosine_N: float32 in [-1, 1], cosine of the residual with the base's at the same token.
        change_N: float32 >= 0, norm of the residual less the base's, over the norm of the base's. The base
            itself, and a token whose residual equals the base's, has exactly 1 and 0; a token that was not
            finite has NaN in both.
    """

    suite_N: npt.NDArray[np.int16]
    prompt_N: npt.NDArray[np.int32]
    position_N: npt.NDArray[np.int32]
    top_idx_NK: npt.NDArray[np.int32]
    top_acts_NK: npt.NDArray[np.float32]
    fvu_err_N: npt.NDArray[np.float32]
    fvu_total_N: npt.NDArray[np.float32]
    cosine_N: npt.NDArray[np.float32]
    change_N: npt.NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.suite_N)

    @property
    def k(self) -> int:
        """K."""
        return int(self.top_idx_NK.shape[1])

    @classmethod
    def from_unsorted(
        cls,
        suite_N: npt.ArrayLike,
        prompt_N: npt.ArrayLike,
        position_N: npt.ArrayLike,
        top_idx_NK: npt.ArrayLike,
        top_acts_NK: npt.ArrayLike,
        fvu_err_N: npt.ArrayLike,
        fvu_total_N: npt.ArrayLike,
        cosine_N: npt.ArrayLike | None = None,
        change_N: npt.ArrayLike | None = None,
    ) -> "TokenRows":
        """Build rows from any token order and any feature order within a row (as a top-k returns them).

        Without `cosine_N` and `change_N` they are rows of the base.
        """
        suite_N, prompt_N = np.asarray(suite_N, np.int16), np.asarray(prompt_N, np.int32)
        cosine_N = np.ones(len(suite_N)) if cosine_N is None else cosine_N
        change_N = np.zeros(len(suite_N)) if change_N is None else change_N
        position_N = np.asarray(position_N, np.int32)
        order_N = np.lexsort((position_N, prompt_N, suite_N))
        idx_NK = np.asarray(top_idx_NK, np.int32)[order_N]
        # as unsigned, -1 is the largest index and goes last
        by_index_NK = np.argsort(idx_NK.view(np.uint32), axis=1, kind="stable")
        return cls(
            suite_N[order_N],
            prompt_N[order_N],
            position_N[order_N],
            np.take_along_axis(idx_NK, by_index_NK, 1),
            np.take_along_axis(np.asarray(top_acts_NK, np.float32)[order_N], by_index_NK, 1),
            np.asarray(fvu_err_N, np.float32)[order_N],
            np.asarray(fvu_total_N, np.float32)[order_N],
            np.asarray(cosine_N, np.float32)[order_N],
            np.asarray(change_N, np.float32)[order_N],
        )

    def check(self, *, k: int, d_sae: int) -> None:
        """Raise ValueError naming the first rule above that these rows break."""
        N, idx_NK, acts_NK = self.num_tokens, self.top_idx_NK, self.top_acts_NK
        for name, dtype, shape in (
            ("suite_N", np.int16, (N,)),
            ("prompt_N", np.int32, (N,)),
            ("position_N", np.int32, (N,)),
            ("top_idx_NK", np.int32, (N, k)),
            ("top_acts_NK", np.float32, (N, k)),
            ("fvu_err_N", np.float32, (N,)),
            ("fvu_total_N", np.float32, (N,)),
            ("cosine_N", np.float32, (N,)),
            ("change_N", np.float32, (N,)),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
        if N and (idx_NK.min() < -1 or idx_NK.max() >= d_sae):
            raise ValueError(f"top_idx_NK must be in [-1, {d_sae}), got [{idx_NK.min()}, {idx_NK.max()}]")
        later, earlier = idx_NK[:, 1:], idx_NK[:, :-1]
        if not np.all(np.where(later >= 0, (later > earlier) & (earlier >= 0), True)):
            raise ValueError("top_idx_NK must ascend with -1 last; use TokenRows.from_unsorted")
        inactive_NK = idx_NK < 0
        whole_N = (inactive_NK & np.isnan(acts_NK)).all(1)
        broken_NK = np.where(inactive_NK, acts_NK != 0, ~np.isfinite(acts_NK))
        if broken_NK[~whole_N].any():
            raise ValueError(
                "top_acts_NK must be finite, 0 where top_idx_NK is -1, or NaN in a whole inactive row"
            )
        if not np.all(
            whole_N | ((np.abs(self.cosine_N) <= 1) & (self.change_N >= 0) & (self.change_N < np.inf))
        ):
            raise ValueError(
                "cosine_N must be in [-1, 1] and change_N finite and >= 0 where the row is finite"
            )
        suite, prompt, position = (
            np.diff(column.astype(np.int64)) for column in (self.suite_N, self.prompt_N, self.position_N)
        )
        if not np.all((suite > 0) | ((suite == 0) & ((prompt > 0) | ((prompt == 0) & (position > 0))))):
            raise ValueError("rows must ascend by (suite, prompt, position); use TokenRows.from_unsorted")


def shard_schema(k: int, d_sae: int, metadata: Mapping[str, str]) -> Any:
    """The one Arrow schema of a shard; `metadata` is extended by the schema version."""
    index = pa.uint16() if d_sae <= 1 << 16 else pa.uint32()
    columns = {
        "suite": pa.int16(),
        "prompt": pa.int32(),
        "position": pa.int32(),
        "num_active": pa.uint8(),
        "top_idx_delta": pa.list_(pa.field("item", index, nullable=False), k),
        "top_acts": pa.list_(pa.field("item", pa.float32(), nullable=False), k),
        "fvu_err": pa.float32(),
        "fvu_total": pa.float32(),
        "cosine": pa.float32(),
        "change": pa.float32(),
    }
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns.items()],
        metadata={"schema_version": str(SCHEMA_VERSION), **dict(sorted(metadata.items()))},
    )


def encode_shard(rows: TokenRows, *, d_sae: int, metadata: Mapping[str, str]) -> bytes:
    """Shard bytes of checked rows; the same rows and metadata give the same bytes."""
    schema = shard_schema(rows.k, d_sae, metadata)
    num_active_N = (rows.top_idx_NK >= 0).sum(1, dtype=np.uint8)
    delta_NK = np.diff(rows.top_idx_NK, axis=1, prepend=np.int32(0))
    delta_NK[rows.top_idx_NK < 0] = 0
    index_dtype = schema.field("top_idx_delta").type.value_type.to_pandas_dtype()
    columns = [
        pa.array(rows.suite_N),
        pa.array(rows.prompt_N),
        pa.array(rows.position_N),
        pa.array(num_active_N),
        pa.FixedSizeListArray.from_arrays(
            delta_NK.astype(index_dtype).ravel(), type=schema.field("top_idx_delta").type
        ),
        pa.FixedSizeListArray.from_arrays(rows.top_acts_NK.ravel(), type=schema.field("top_acts").type),
        pa.array(rows.fvu_err_N),
        pa.array(rows.fvu_total_N),
        pa.array(rows.cosine_N),
        pa.array(rows.change_N),
    ]
    return write_ipc(pa.Table.from_arrays(columns, schema=schema))


def decode_shard(data: Bytes, *, k: int, d_sae: int, metadata: Mapping[str, str], path: Path) -> TokenRows:
    """Rows of `encode_shard`'s bytes; ShardError, naming `path`, when they are of any other schema."""
    table = read_ipc(data, shard_schema(k, d_sae, metadata), path)
    N = table.num_rows
    idx_NK, acts_NK = np.empty((N, k), np.int32), np.empty((N, k), np.float32)
    start = 0
    for batch in table.to_batches():
        stop = start + batch.num_rows
        idx_NK[start:stop] = _indices(batch, k)
        acts_NK[start:stop] = _values(batch.column("top_acts")).reshape(-1, k)
        start = stop
    suite, prompt, position = (table.column(name).to_numpy() for name in ("suite", "prompt", "position"))
    names = ("fvu_err", "fvu_total", "cosine", "change")
    fvu_err, fvu_total, cosine, change = (table.column(name).to_numpy() for name in names)
    return TokenRows(suite, prompt, position, idx_NK, acts_NK, fvu_err, fvu_total, cosine, change)


def write_ipc(table: Any) -> bytes:
    """An Arrow IPC file of `table`, zstd, in batches of at most `MAX_BATCH_ROWS`."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=True)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=MAX_BATCH_ROWS)
    return bytes(sink.getvalue())


def scan_shard(data: Bytes, *, k: int, d_sae: int, metadata: Mapping[str, str], path: Path) -> Any:
    """The same rows batch by batch, as Arrow: a batch is decompressed when it is asked for, and not before.

    Args:
        data: `encode_shard`'s bytes, mapped or read.
        k: The unit's.
        d_sae: The same.
        metadata: The same.
        path: Named in errors.

    Returns:
        pa.RecordBatchReader: The shard's columns, with `top_idx` (fixed list of int32, -1 where inactive) in
        place of `num_active` and `top_idx_delta`; all other columns are the shard's own buffers.

    Raises:
        ShardError: It is of any other schema, at once, or a batch is damaged, when it is asked for.
    """
    schema = shard_schema(k, d_sae, metadata)
    reader = open_ipc(data, schema, path)
    index = pa.field("top_idx", pa.list_(pa.field("item", pa.int32(), nullable=False), k), nullable=False)
    kept = [name for name in schema.names if name not in ("num_active", "top_idx_delta")]
    fields = [schema.field(name) for name in kept]
    fields.insert(kept.index("top_acts"), index)
    decoded = pa.schema(fields, metadata=schema.metadata)

    def batches() -> Iterator[Any]:
        for number in range(reader.num_record_batches):
            with _whole(path):
                batch = reader.get_batch(number)
                batch.validate(full=True)
            columns = {name: batch.column(name) for name in kept}
            flat = pa.array(_indices(batch, k).ravel())
            columns["top_idx"] = pa.FixedSizeListArray.from_arrays(flat, type=index.type)
            yield pa.RecordBatch.from_arrays([columns[name] for name in decoded.names], schema=decoded)

    return pa.RecordBatchReader.from_batches(decoded, batches())


def read_ipc(data: Bytes, schema: Any, path: Path) -> Any:
    """The table in `data` when its schema is exactly `schema`; ShardError, naming `path`, otherwise."""
    reader = open_ipc(data, schema, path)
    with _whole(path):
        table = reader.read_all()
        table.validate(full=True)
    return table


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Damage that pyarrow meets, as a ShardError that names `path`."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardError(
            f"{path} is not a whole Arrow file ({error}); delete it and run the sweep again"
        ) from error


def open_ipc(data: Bytes, schema: Any, path: Path) -> Any:
    """A reader of the batches in `data` when their schema is exactly `schema`; ShardError otherwise."""
    # before pyarrow parses: loading an extension type may run code that its author chose
    if data.find(b"ARROW:extension") >= 0:
        raise ShardError(f"{path} declares an Arrow extension type, so it is not a file of ours; delete it")
    with _whole(path):
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data)))
        found = reader.schema
        if not found.equals(schema, check_metadata=True):
            version = (found.metadata or {}).get(b"schema_version", b"none").decode(errors="replace")
            raise ShardError(
                f"{path} is not of this release's schema {SCHEMA_VERSION} (it says version {version}, fields "
                f"{found.names}); use the release that wrote it, or delete it and run the sweep again"
            )
    return reader


def _indices(batch: Any, k: int) -> npt.NDArray[np.int32]:
    delta_NK = _values(batch.column("top_idx_delta")).reshape(-1, k)
    idx_NK = np.cumsum(delta_NK, axis=1, dtype=np.int32)
    idx_NK[np.arange(k) >= batch.column("num_active").to_numpy()[:, None]] = -1
    return idx_NK


def _values(column: Any) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = column.flatten().to_numpy()
    return values
