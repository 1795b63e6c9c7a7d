import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_auditor.shard import MAX_BATCH_ROWS, decode_shard, encode_shard, write_ipc
from ray_auditor.store import NondeterminismError, ShardError, Store, SuitePrompt, TokenRows, Unit

UNIT = Unit("a" * 64, "b" * 64, "c" * 64, "blocks.15.hook_resid_post", "d" * 64, 8, 1024, "vllm cpu float32")


RESIDUALS = np.random.default_rng(1).integers(0, 256, 9000, np.uint8)


def make_rows(num_tokens=300, k=8, d_sae=1024, seed=0, min_active=0):
    rng = np.random.default_rng(seed)
    idx_NK = np.argsort(rng.random((num_tokens, d_sae)), axis=1)[:, :k].astype(np.int32)
    acts_NK = rng.exponential(size=(num_tokens, k)).astype(np.float32) + np.float32(1e-3)
    inactive_NK = np.arange(k) >= rng.integers(min_active, k + 1, num_tokens)[:, None]
    idx_NK[inactive_NK], acts_NK[inactive_NK] = -1, 0
    prompt_N = np.arange(num_tokens) // 7 % 11
    return TokenRows.from_unsorted(
        np.arange(num_tokens) // 77 % 3,
        prompt_N,
        rng.permutation(num_tokens) + 3,
        idx_NK,
        acts_NK,
        rng.random(num_tokens),
        rng.random(num_tokens),
        rng.uniform(-1, 1, num_tokens),
        rng.exponential(size=num_tokens),
    )


def assert_same(a, b):
    for field in dataclasses.fields(TokenRows):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def shard_path(store):
    (path,) = (store.root / "shards").iterdir()
    return path


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 200), st.integers(1, 32), st.sampled_from([40, 1 << 16, (1 << 16) + 1]), st.integers(0, 9)
)
def test_rows_come_back_bit_for_bit(num_tokens, k, d_sae, seed):
    rows = make_rows(num_tokens, k, 40, seed)
    rows.top_idx_NK[rows.top_idx_NK == 39] = d_sae - 1  # the last index, at the edge of uint16
    rows.check(k=k, d_sae=d_sae)
    data = encode_shard(rows, d_sae=d_sae, metadata={"unit_key": "x"})
    assert data == encode_shard(rows, d_sae=d_sae, metadata={"unit_key": "x"})
    assert_same(decode_shard(data, k=k, d_sae=d_sae, metadata={"unit_key": "x"}, path=Path("x")), rows)


def test_index_type_and_batch_size_follow_the_schema():
    rows = make_rows(MAX_BATCH_ROWS + 5, 2, 4)
    for d_sae, index in ((1 << 16, pa.uint16()), ((1 << 16) + 1, pa.uint32())):
        reader = pa.ipc.open_file(pa.BufferReader(encode_shard(rows, d_sae=d_sae, metadata={})))
        assert reader.schema.field("top_idx_delta").type.value_type == index
        assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [MAX_BATCH_ROWS, 5]


def test_indices_cost_less_than_their_plain_bytes():
    rng = np.random.default_rng(0)
    zipf_F = 1 / np.arange(10, 16394)
    keys_NF = rng.gumbel(size=(2000, 16384)) + np.log(zipf_F)
    idx_NK = np.argpartition(-keys_NF, 32, axis=1)[:, :32]
    n = len(idx_NK)
    zeros = np.zeros(n)
    rows = TokenRows.from_unsorted(zeros, zeros, np.arange(n), idx_NK, np.ones((n, 32)), zeros, zeros)
    assert len(encode_shard(rows, d_sae=16384, metadata={})) / n < 56  # 64 as uint16, 128 as int32


def test_a_token_that_is_not_finite_is_stored_as_such(tmp_path):
    rows = make_rows(5)
    rows.top_idx_NK[2], rows.top_acts_NK[2] = -1, np.nan
    rows.cosine_N[2] = rows.change_N[2] = np.nan
    store = Store(tmp_path)
    store.commit(UNIT, rows, {})
    assert_same(store.read_rows(UNIT.key), rows)


@pytest.mark.parametrize(
    ("name", "index", "value", "match"),
    [
        ("top_idx_NK", (0, 0), 1024, r"top_idx_NK must be in \[-1, 1024\)"),
        ("top_idx_NK", (0, 0), -2, r"top_idx_NK must be in \[-1, 1024\)"),
        ("top_idx_NK", (0, 3), 0, "must ascend"),
        ("top_idx_NK", (0, 3), -1, "must ascend"),
        ("top_acts_NK", (0, 3), np.nan, "must be finite"),
        ("top_acts_NK", (0, 3), np.inf, "must be finite"),
        ("cosine_N", 4, 1.001, r"cosine_N must be in \[-1, 1\]"),
        ("cosine_N", 4, np.nan, r"cosine_N must be in \[-1, 1\]"),
        ("change_N", 4, -0.1, "change_N finite and >= 0"),
        ("change_N", 4, np.inf, "change_N finite and >= 0"),
        ("position_N", 1, 0, "rows must ascend"),
        ("suite_N", 0, 2, "rows must ascend"),
    ],
)
def test_commit_refuses_rows_that_break_a_rule(tmp_path, name, index, value, match):
    rows = make_rows(50, min_active=8)
    getattr(rows, name)[index] = value
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=match):
        store.commit(UNIT, rows, {})
    assert not store.list_commits()


def test_commit_refuses_other_types_and_activations_of_nothing(tmp_path):
    store, rows = Store(tmp_path), make_rows(50)
    with pytest.raises(ValueError, match=r"top_acts_NK must be float32 \(50, 8\), got float64"):
        store.commit(UNIT, dataclasses.replace(rows, top_acts_NK=rows.top_acts_NK.astype(float)), {})
    with pytest.raises(ValueError, match=r"top_idx_NK must be int32 \(50, 16\)"):
        store.commit(dataclasses.replace(UNIT, k=16), rows, {})
    rows.top_acts_NK[rows.top_idx_NK < 0] = 1
    with pytest.raises(ValueError, match="0 where top_idx_NK is -1"):
        store.commit(UNIT, rows, {})


def test_the_key_depends_on_every_part_and_on_nothing_else():
    keys = {UNIT.key, dataclasses.replace(UNIT).key}
    assert len(keys) == 1
    for field in dataclasses.fields(Unit):
        value = getattr(UNIT, field.name)
        keys.add(
            dataclasses.replace(UNIT, **{field.name: value + (1 if isinstance(value, int) else "x")}).key
        )
    assert len(keys) == 1 + len(dataclasses.fields(Unit))
    with pytest.raises(ValueError, match=r"sae.k must be in \[1, 128\], got 300"):
        dataclasses.replace(UNIT, k=300)
    with pytest.raises(ValueError, match="d_sae must be in"):
        dataclasses.replace(UNIT, d_sae=7)


def test_a_committed_unit_is_read_by_a_store_opened_later(tmp_path):
    rows = make_rows()
    assert not Store(tmp_path).has(UNIT.key)
    with pytest.raises(KeyError, match="not committed"):
        Store(tmp_path).read_rows(UNIT.key)
    made = Store(tmp_path).commit(UNIT, rows, {"wall_s": 1.5})
    store = Store(tmp_path)
    assert store.has(UNIT.key)
    assert_same(store.read_rows(UNIT.key), rows)
    assert store.read_record(UNIT.key) == {"wall_s": 1.5}
    assert store.list_commits() == [made]
    assert made.num_tokens == 300
    assert made.unit["hook_name"] == UNIT.hook_name
    assert not list((tmp_path / "tmp").iterdir())


def test_the_same_unit_twice_is_fine_only_with_the_same_rows(tmp_path):
    store = Store(tmp_path)
    first = store.commit(UNIT, make_rows(), {"attempt": 1})
    assert store.commit(UNIT, make_rows(), {"attempt": 2}) == first
    with pytest.raises(NondeterminismError, match=first.shard_sha256) as caught:
        store.commit(UNIT, make_rows(seed=1), {"attempt": 3})
    assert "this attempt has" in str(caught.value)
    assert_same(store.read_rows(UNIT.key), make_rows())


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_flip, "sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, its commit says"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_shard_is_refused_and_a_new_attempt_repairs_it(tmp_path, damage, match):
    store = Store(tmp_path)
    store.commit(UNIT, make_rows(), {})
    damage(shard_path(store))
    with pytest.raises(ShardError, match=match) as caught:
        store.read_rows(UNIT.key)
    assert "run the sweep again" in str(caught.value)
    assert not store.has(UNIT.key)
    store.commit(UNIT, make_rows(), {})
    assert_same(store.read_rows(UNIT.key), make_rows())
    damage(shard_path(store))
    store.commit(UNIT, make_rows(seed=1), {})  # from an engine that is not exact to the bit
    assert_same(store.read_rows(UNIT.key), make_rows(seed=1))


@pytest.mark.parametrize(
    "damage", [damage_flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
def test_damaged_residuals_make_the_unit_absent_and_a_new_attempt_repairs_them(tmp_path, damage):
    store = Store(tmp_path)
    store.commit(UNIT, make_rows(), {}, RESIDUALS)
    (path,) = (tmp_path / "residuals").iterdir()
    damage(path)
    assert not store.has(UNIT.key)
    with pytest.raises(ShardError, match="run the sweep again: it computes the base again"):
        store.read_residuals(UNIT.key)
    store.commit(UNIT, make_rows(), {}, RESIDUALS)
    assert store.has(UNIT.key)
    np.testing.assert_array_equal(store.read_residuals(UNIT.key), RESIDUALS)


def test_residuals_are_mapped_and_belong_to_their_commit(tmp_path):
    store = Store(tmp_path)
    store.commit(UNIT, make_rows(), {}, RESIDUALS)
    found = store.read_residuals(UNIT.key)
    assert isinstance(found, np.memmap)
    found[:] = 0  # in this process alone
    np.testing.assert_array_equal(Store(tmp_path).read_residuals(UNIT.key), RESIDUALS)
    with pytest.raises(NondeterminismError):
        store.commit(UNIT, make_rows(), {}, RESIDUALS + 1)
    plain = dataclasses.replace(UNIT, candidate_key="e" * 64)
    store.commit(plain, make_rows(), {})
    with pytest.raises(KeyError, match="without residuals"):
        store.read_residuals(plain.key)


def forge(store, table):
    """Put `table` in the place of the unit's shard, with a commit whose hash agrees."""
    store.commit(UNIT, make_rows(), {})
    data = write_ipc(table)
    path = store.root / "commits" / f"{UNIT.key}.json"
    note = json.loads(path.read_bytes())
    note |= {"shard_sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    path.write_text(json.dumps(note))
    (store.root / "shards" / store.read_commit(UNIT.key).shard_name).write_bytes(data)


def shard_table(store):
    return pa.ipc.open_file(shard_path(store)).read_all()


def with_metadata(table, **changes):
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    return table.replace_schema_metadata(metadata | changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: with_metadata(t, schema_version="1"), "it says version 1"),
        (lambda t: with_metadata(t, unit_key="e" * 64), "not of this release's schema"),
        (lambda t: with_metadata(t, surprise="x"), "not of this release's schema"),
        (lambda t: t.append_column("more", pa.array(np.zeros(len(t)))), "not of this release's schema"),
        (lambda t: t.drop_columns(["cosine", "change"]), "not of this release's schema"),
        (lambda t: t.drop_columns(["fvu_err"]), "not of this release's schema"),
        (lambda t: t.set_column(1, "prompt", t["prompt"].cast(pa.int64())), "not of this release's schema"),
        (
            lambda t: t.set_column(1, "prompt", pa.array([str(i) for i in range(len(t))])),
            "not of this release",
        ),
        (
            lambda t: t.append_column(
                "tensor",
                pa.ExtensionArray.from_storage(
                    pa.fixed_shape_tensor(pa.float32(), [1]),
                    pa.FixedSizeListArray.from_arrays(np.zeros(len(t), np.float32), 1),
                ),
            ),
            "extension type",
        ),
    ],
)
def test_a_shard_of_another_schema_is_refused_though_its_hash_agrees(tmp_path, change, match):
    store = Store(tmp_path)
    store.commit(UNIT, make_rows(), {})
    forge(store, change(shard_table(store)))
    with pytest.raises(ShardError, match=match):
        store.read_rows(UNIT.key)


def test_an_unknown_extension_type_never_reaches_pyarrow(tmp_path, monkeypatch):
    field = pa.field("x", pa.int32(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"})
    store = Store(tmp_path)
    forge(store, pa.table([pa.array([1], pa.int32())], schema=pa.schema([field])))
    monkeypatch.setattr(pa.ipc, "open_file", lambda *a: pytest.fail("parsed"))
    with pytest.raises(ShardError, match="extension type"):
        store.read_rows(UNIT.key)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not a commit of ours"),
        ('{"schema_version": 2}', "not a commit of ours"),
        ("[1]", "not a commit of ours"),
        ("[" * 100_000, "not a commit of ours"),
        ('{"schema_version": 1}', "units of schema version 2, got 1 in "),
        (" " * (1 << 20) + " ", "over 1048576 bytes"),
    ],
)
def test_a_commit_that_is_not_ours_is_named(tmp_path, text, match):
    store = Store(tmp_path)
    (tmp_path / "commits" / f"{UNIT.key}.json").write_text(text)
    other_release = "schema version" in match
    if not other_release:
        assert not store.has(UNIT.key)  # damaged, so computed again
    for read in (
        *([store.has] if other_release else []),
        store.read_rows,
        store.read_record,
        lambda _: store.list_commits(),
    ):
        with pytest.raises(ShardError, match=match) as caught:
            read(UNIT.key)
        assert UNIT.key in str(caught.value)


def test_a_commit_cannot_point_elsewhere(tmp_path):
    store = Store(tmp_path)
    path = tmp_path / "commits" / f"{UNIT.key}.json"
    store.commit(UNIT, make_rows(), {})
    good = json.loads(path.read_bytes())
    for change in (
        {"shard_sha256": "../../../etc/passwd"},
        {"residuals_sha256": "../../../etc/passwd"},
        {"unit_key": "e" * 64},
        {"unit": good["unit"] | {"k": 9}},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ShardError, match="run the sweep again"):
            store.read_rows(UNIT.key)
    for key in ("../x", "A" * 64, "a" * 63, ""):
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            store.has(key)


def test_suites_come_back_and_are_never_overwritten_by_others(tmp_path):
    key = UNIT.suites_key
    prompts = [
        SuitePrompt(
            0, "general", 0, "Grüße <b>&\u202e", [1, 2, 70_000], ["a", "b", "é"], [False, True, True]
        ),
        SuitePrompt(1, "maths", 0, "", [], [], []),
    ]
    with pytest.raises(KeyError, match="not in"):
        Store(tmp_path).read_suites(key)
    Store(tmp_path).write_suites(key, prompts)
    Store(tmp_path).write_suites(key, prompts)
    assert Store(tmp_path).read_suites(key) == prompts
    with pytest.raises(ShardError, match="other prompts"):
        Store(tmp_path).write_suites(key, prompts[:1])
    path = tmp_path / "suites" / f"{key}.arrow"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ShardError, match="not a whole Arrow file"):
        Store(tmp_path).read_suites(key)


KILLED_WRITER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_store
from ray_auditor.store import Store
store, calls = Store(Path({root!r})), 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {step}: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
real_write = os.write
os.write = lambda fd, data: real_write(fd, data[:4000])  # many short writes
for name in ("write", "fsync", "link", "replace", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
store.commit(test_store.UNIT, test_store.make_rows(), {{}}, test_store.RESIDUALS)
"""


def run_writer(root, step):
    code = KILLED_WRITER.format(tests=str(Path(__file__).parent), root=str(root), step=step)
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_the_unit_absent_or_whole(tmp_path):
    seen, step, left = [], 0, 0
    while True:
        step += 1
        root = tmp_path / str(step)
        returncode = run_writer(root, step)
        if returncode == 0:
            break
        assert returncode == -signal.SIGKILL
        store = Store(root)
        assert not list((root / "tmp").iterdir())
        seen.append(store.has(UNIT.key))
        if seen[-1]:
            assert_same(store.read_rows(UNIT.key), make_rows())
            np.testing.assert_array_equal(store.read_residuals(UNIT.key), RESIDUALS)
        else:
            assert store.list_commits() == []
        left += bool(list((root / "residuals").iterdir())) and not seen[-1]
        store.commit(UNIT, make_rows(), {}, RESIDUALS)
        assert_same(store.read_rows(UNIT.key), make_rows())
        np.testing.assert_array_equal(store.read_residuals(UNIT.key), RESIDUALS)
        assert [len(list((root / name).iterdir())) for name in ("shards", "residuals")] == [1, 1]
    assert len(seen) >= 18  # writes, syncs, renames and removals of residuals, shard and commit
    assert left >= 8  # killed after the residuals were there and before their commit was
    assert True in seen
    assert False in seen
    assert seen == sorted(seen)  # once whole, whole


@pytest.mark.parametrize("name", ["write", "fsync", "link", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_nothing_and_can_be_tried_again(tmp_path, monkeypatch, name, code):
    store = Store(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            store.commit(UNIT, make_rows(), {})
    assert not store.has(UNIT.key)
    assert not list((tmp_path / "tmp").iterdir())
    store.commit(UNIT, make_rows(), {})
    assert_same(store.read_rows(UNIT.key), make_rows())


def test_a_filesystem_without_hard_links_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(ValueError, match="hard links"):
        Store(tmp_path).commit(UNIT, make_rows(), {})


def test_opening_a_store_spares_the_file_of_a_living_writer(tmp_path, monkeypatch):
    store, real_link = Store(tmp_path), os.link
    (tmp_path / "tmp" / "left").write_text("by a killed writer")

    def link(source, target):
        Store(tmp_path)  # another process starts while this one is about to commit
        real_link(source, target)

    monkeypatch.setattr(os, "link", link)
    store.commit(UNIT, make_rows(), {})
    assert store.has(UNIT.key)
    assert not (tmp_path / "tmp" / "left").exists()


def race(root, seed, barrier, results):
    store = Store(Path(root))
    rows = make_rows(seed=seed)
    barrier.wait()
    try:
        results.put(store.commit(UNIT, rows, {"pid": os.getpid()}).record["pid"])
    except NondeterminismError:
        results.put("refused")


@pytest.mark.parametrize(("seeds", "num_refused"), [([0, 0, 0, 0], 0), ([0, 1, 2, 3], 3)])
def test_of_many_writers_exactly_one_wins(tmp_path, seeds, num_refused):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(len(seeds)), context.Queue()
    workers = [context.Process(target=race, args=(str(tmp_path), seed, barrier, results)) for seed in seeds]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert outcomes.count("refused") == num_refused
    assert len({outcome for outcome in outcomes if outcome != "refused"}) == 1
    assert len(Store(tmp_path).list_commits()) == 1
