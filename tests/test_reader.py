"""A finished sweep read from a program: the same values, nothing copied, nothing changed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import ray_auditor
from ray_auditor import shard
from ray_auditor.outputs import write_outputs
from ray_auditor.reader import StoreReader
from ray_auditor.store import Store
from tests.made_store import D_SAE, PLANTED, PLANTED_FEATURE, REFUSED, K, make_out_dir


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "MAX_BATCH_ROWS", 100)  # so that a shard has many batches
        return make_out_dir(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def summary(out_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out_dir / "summary.json").read_text())
    return found


@pytest.fixture
def store(out_dir: Path) -> StoreReader:
    return ray_auditor.open_store(out_dir)


def test_candidates_and_rates_are_the_summary_s(store: StoreReader, summary: dict[str, Any]) -> None:
    rows = store.candidates().to_pylist()
    assert len(rows) == len(summary["candidates"])
    flags = {flag["candidate"]: flag for flag in summary["flags"]}
    for row, said in zip(rows, summary["candidates"], strict=True):
        for name in ("id", "kind", "status", "reason", "score", "score_low", "suite", "unit_key", "why"):
            assert row[name] == said[name]
        assert row["rule"] == flags.get(row["id"], {}).get("rule")
        assert row["relative_change"] == (said["rivals"] or {}).get("relative_change")
    cells = {(row["candidate"], row["suite"]): row for row in store.rates().to_pylist()}
    assert len(cells) == sum(len(row["suites"]) for row in summary["candidates"])
    for row in summary["candidates"]:
        for suite, cell in row["suites"].items():
            assert {name: cells[row["id"], suite][name] for name in cell} == cell
    assert store.about["settings"] == summary["settings"]
    assert store.about["limits"] == summary["limits"]


def mapping_of(path: Path) -> tuple[int, int]:
    """First and last address at which a file is mapped into this process."""
    ends = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    return min(start for start, _ in ends), max(stop for _, stop in ends)


@pytest.mark.parametrize("name", ["candidates", "rates"])
def test_columns_lie_in_the_file_and_stay_there(out_dir: Path, name: str) -> None:
    before = pa.total_allocated_bytes()
    table = getattr(ray_auditor.open_store(out_dir), name)()
    assert pa.total_allocated_bytes() == before
    first, last = mapping_of(out_dir / f"{name}.arrow")
    addresses = [
        buffer.address
        for column in table.columns
        for chunk in column.chunks
        for buffer in (
            *chunk.buffers(),
            *(chunk.dictionary.buffers() if hasattr(chunk, "dictionary") else ()),
        )
        if buffer is not None and buffer.size
    ]
    assert len(addresses) > table.num_columns
    assert all(first <= address < last for address in addresses)


def test_numpy_pandas_and_polars_see_the_same_memory(store: StoreReader) -> None:
    rates = store.rates()
    frame = rates.to_pandas(types_mapper=pd.ArrowDtype)
    for name in rates.column_names[2:]:  # after the two names
        assert pa.array(frame[name]).buffers()[1].address == rates[name].chunk(0).buffers()[1].address
    shift = rates["shift"].chunk(0)
    assert not shift.null_count
    address = shift.buffers()[1].address
    assert shift.to_numpy(zero_copy_only=True).ctypes.data == address
    series = pl.from_arrow(store.rates().select(["shift", "z"]))["shift"]
    assert series.to_numpy(allow_copy=False).ctypes.data == address
    np.testing.assert_array_equal(series.to_numpy(), shift.to_numpy())


def test_shards_are_the_rows_batch_by_batch(store: StoreReader, out_dir: Path) -> None:
    for candidate in (None, PLANTED):
        key = store.base_key if candidate is None else store.unit_key(candidate)
        rows = Store(out_dir / "store").read_rows(key)
        reader = store.shards(candidate)
        batches = list(reader)
        assert len(batches) > 3
        table = pa.Table.from_batches(batches)
        for name in ("suite", "prompt", "position", "fvu_err", "fvu_total", "cosine", "change"):
            np.testing.assert_array_equal(table[name].to_numpy(), getattr(rows, f"{name}_N"))
        idx = table["top_idx"].combine_chunks().flatten().to_numpy().reshape(-1, K)
        np.testing.assert_array_equal(idx, rows.top_idx_NK)
        acts = table["top_acts"].combine_chunks().flatten().to_numpy().reshape(-1, K)
        np.testing.assert_array_equal(acts, rows.top_acts_NK)


def test_a_batch_is_made_when_it_is_asked_for(store: StoreReader) -> None:
    before = pa.total_allocated_bytes()
    reader = store.shards(PLANTED)
    opened = pa.total_allocated_bytes() - before
    batch = reader.read_next_batch()
    one = pa.total_allocated_bytes() - before
    rest = list(reader)
    assert opened < one / 2
    assert one < (pa.total_allocated_bytes() - before) / 3
    assert batch.num_rows == rest[0].num_rows == 100


def test_features_lead_to_what_was_planted(store: StoreReader, summary: dict[str, Any]) -> None:
    top = store.features(PLANTED, "sql").slice(0, 1).to_pylist()[0]
    assert (top["feature"], top["rate_base"], top["rate_candidate"]) == (PLANTED_FEATURE, 0.0, 1.0)
    (said, *_) = summary["details"][PLANTED]["sql"]["features"]
    assert {name: said[name] for name in top if name != "suite"} == {
        name: value for name, value in top.items() if name != "suite"
    }
    everywhere = store.features(PLANTED, num_features=3)
    assert pc.unique(everywhere["suite"]).to_pylist() == ["legal", "sql"]
    assert everywhere.num_rows == 6
    assert pc.max(everywhere["feature"]).as_py() < D_SAE


def test_prompts_are_the_suites(store: StoreReader) -> None:
    prompt = store.prompts().to_pylist()[0]
    assert (prompt["suite"], prompt["prompt"]) == (store.suites[0], 0)
    assert "".join(prompt["token_texts"]) == prompt["text"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/planted-sq", r"must be a listed one, got 'org/planted-sq'; nearest: \['org/planted-sql'"),
        (REFUSED, "must be one that ran, got 'org/broken': rejected:json: not JSON"),
    ],
)
def test_a_candidate_that_is_not_there_is_named(store: StoreReader, name: str, said: str) -> None:
    for read in (store.features, store.shards):
        with pytest.raises(ValueError, match=said):
            read(name)


def test_what_is_no_sweep_is_named_and_left_alone(out_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no candidates\.arrow; say ray-auditor report out_dir="):
        ray_auditor.open_store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for data in (b"", b"junk", (out_dir / "candidates.arrow").read_bytes()[:-9]):
        (tmp_path / "candidates.arrow").write_bytes(data)
        with pytest.raises(ValueError, match="is not a whole Arrow file"):
            ray_auditor.open_store(tmp_path)
    (tmp_path / "candidates.arrow").write_bytes((out_dir / "rates.arrow").read_bytes())
    with pytest.raises(ValueError, match="is of another release"):
        ray_auditor.open_store(tmp_path)


def test_a_sweep_of_an_earlier_release_is_named_once(out_dir: Path, tmp_path: Path) -> None:
    summary = json.loads((out_dir / "summary.json").read_text())
    del summary["settings"]["suite_names"]
    write_outputs(summary, tmp_path)
    with pytest.raises(ValueError, match=r"of a sweep of this release, .* no suite_names; sweep again"):
        ray_auditor.open_store(tmp_path)


def test_reading_changes_nothing_and_loads_no_engine(out_dir: Path) -> None:
    def looks() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in out_dir.rglob("*")}

    before = looks()
    program = (
        "import sys, ray_auditor\n"
        f"store = ray_auditor.open_store({str(out_dir)!r})\n"
        f"store.rates(), store.features({PLANTED!r}), store.shards().read_all(), store.prompts()\n"
        "print(*sorted({'torch', 'ray', 'vllm', 'transformers', 'hydra'} & sys.modules.keys()), 'none')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"none\n", done.stdout)
    assert looks() == before
