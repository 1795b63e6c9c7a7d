import hashlib

import numpy as np
import pytest

from ray_auditor.reduce import reduce_prompts
from ray_auditor.store import Store, TokenRows, Unit
from ray_auditor.sums import read_sums

SUITES = ("general", "sql")


def make_rows(seed, num_tokens=40, k=4, d_sae=32):
    rng = np.random.default_rng(seed)
    idx_NK = np.argsort(rng.random((num_tokens, d_sae)), axis=1)[:, :k]
    at = np.arange(num_tokens)
    columns = (rng.random((num_tokens, k)) + 0.1, *rng.random((2, num_tokens)), *rng.random((2, num_tokens)))
    return TokenRows.from_unsorted(at // 20, at // 5 % 4, at, idx_NK, *columns)


@pytest.fixture
def kept(tmp_path):
    store = Store(tmp_path / "store")
    units = [
        Unit(key * 64, "b" * 64, "c" * 64, "blocks.1.hook_resid_post", "d" * 64, 4, 32, "cpu") for key in "ae"
    ]
    rows = [make_rows(seed) for seed in (0, 1)]
    for unit, one in zip(units, rows, strict=True):
        store.commit(unit, one, {})
    return store, units, rows


def read(kept, suites=SUITES, reads=None):
    store, (base, cand), rows = kept

    def base_rows():
        if reads is not None:
            reads.append(1)
        return rows[0]

    return read_sums(store, base.key, cand.key, suites, base_rows)


def test_sums_are_reduced_once_and_read_back_bit_for_bit(kept):
    store, (_, cand), rows = kept
    reads = []
    first, again = read(kept, reads=reads), read(kept, reads=reads)
    assert len(reads) == 1
    expected = reduce_prompts(*rows, suites=SUITES)
    assert first.equals(expected)
    assert again.equals(expected)
    assert (store.root / "sums" / f"{cand.key}.sums").is_file()


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-40], lambda data: data[:200] + b"x" + data[201:]]
)
def test_a_damaged_file_is_derived_anew(kept, damage):
    store, (_, cand), _rows = kept
    path = store.root / "sums" / f"{cand.key}.sums"
    good = read(kept)
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert read(kept).equals(good)
    assert path.read_bytes() == data


def test_sums_of_other_suites_or_another_version_are_derived_anew(kept, monkeypatch):
    reads = []
    read(kept, reads=reads)
    renamed = read(kept, suites=("general", "law"), reads=reads)
    assert set(renamed["suite"].to_pylist()) == {"general", "law"}
    monkeypatch.setattr("ray_auditor.sums.SUMS_VERSION", 99)
    read(kept, suites=("general", "law"), reads=reads)
    assert len(reads) == 3


def test_a_unit_that_is_not_committed_has_no_sums(kept):
    store, (base, _), _ = kept
    with pytest.raises(KeyError, match="not committed"):
        read_sums(store, base.key, "f" * 64, SUITES, lambda: None)


def test_an_extension_type_is_never_parsed(kept):
    store, (_, cand), _ = kept
    good = read(kept)
    path = store.root / "sums" / f"{cand.key}.sums"
    data = path.read_bytes()[64:] + b"ARROW:extension"
    path.write_bytes(hashlib.sha256(data).hexdigest().encode() + data)
    assert read(kept).equals(good)
