"""Manifests, object stores, and the allowance of requests."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.store import MemoryStore
from s3_server import S3Server

from ray_auditor.hub import CandidateError
from ray_auditor.hub.cache import Cache
from ray_auditor.hub.fetch import Fetcher, Origin
from ray_auditor.hub.listing import read_listing
from ray_auditor.hub.manifest import Manifest
from ray_auditor.hub.objects import ObjectPrefix, open_objects
from ray_auditor.hub.rate_limit import RateLimit, RateLimited
from ray_auditor.hub.remote import Listed, SourceError, choose_files

ROWS = [
    {"repo": "org/a", "revision": "v1", "note": "ours"},
    {"id": "mine", "path": "folders/b"},
    {"id": "again", "repo": "org/a", "revision": "0" * 40},
    {"path": "folders/c"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Manifest:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        columns = ["id", "repo", "path", "revision", "note"]
        lines = [",".join(row.get(name, "") for name in columns) for row in rows]
        path.write_text("\n".join([",".join(columns), *lines]))
    else:
        names = {name for row in rows for name in row}
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in sorted(names)}), path)
    return Manifest(str(path))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_manifest_names_repositories_and_folders(tmp_path: Path, ending: str) -> None:
    listed = list(read_listing(tmp_path / "l", write(tmp_path / f"m{ending}", ROWS)))
    assert listed == [
        Listed("org/a", "org/a", "v1"),
        Listed("mine", str(tmp_path / "folders" / "b"), is_local=True),
        Listed("again", "org/a", "0" * 40),
        Listed("c", str(tmp_path / "folders" / "c"), is_local=True),
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_long_manifest_is_taken_up_at_any_page(tmp_path: Path, ending: str) -> None:
    manifest = write(tmp_path / f"m{ending}", [{"repo": f"org/m{i}"} for i in range(3500)])
    pages = list(manifest.pages(None))
    assert [len(page.items) for page in pages] == [1000, 1000, 1000, 500, 0]
    for i, page in enumerate(pages[:-1]):
        rest = [listed for later in manifest.pages(page.cursor) for listed in later.items]
        assert rest == [listed for later in pages[i + 1 :] for listed in later.items]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"repo": "a"}\n{"repo": "a", "path": "b"}', "row 2 must name a repo or a path, and not both"),
        ('{"id": "a"}', "row 1 must name a repo or a path"),
        ('{"repo": 7}', "row 1: id, repo, path, revision must be text"),
        ('{"repo": "a"}\n{', "line 2 is none"),
        ("[1]", "line 1 is"),
        ('{"id": "x", "repo": "a"}\n{"id": "x", "repo": "b"}', "distinct ids, got 'x' for two"),
    ],
)
def test_a_wrong_manifest_is_a_usage_error_that_names_the_row(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        list(read_listing(tmp_path / "l", Manifest(str(tmp_path / "m.jsonl"))))


def test_a_manifest_that_is_no_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_text("no")
    with pytest.raises(ValueError, match="must be a Parquet file"):
        list(Manifest(str(tmp_path / "m.parquet")).pages(None))
    for name in ("none.csv", "m.txt"):
        with pytest.raises(ValueError, match=r"ending in \.jsonl, \.csv, \.parquet"):
            Manifest(str(tmp_path / name))


def test_objects_in_memory_are_grouped_by_folder() -> None:
    store = MemoryStore()
    for name in ("b/model.safetensors", "b/deep/model.safetensors", "a-b/x", "a/x", "top", "c/config.json"):
        obstore.put(store, name, name.encode())
    (page,) = ObjectPrefix("memory://", store).pages(None)
    found = {listed.id: [file.name for file in listed.files or ()] for listed in page.items}
    assert found == {"a-b": ["x"], "a": ["x"], "b": ["model.safetensors"], "c": ["config.json"]}


def test_a_store_is_taken_up_behind_any_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    for i in range(25):
        for name in ("config.json", "model.safetensors"):
            obstore.put(store, f"m{i:02}/{name}", b"%d" % i)
    monkeypatch.setattr("ray_auditor.hub.objects.PAGE_SIZE", 4)
    source = ObjectPrefix("memory://", store)
    pages = list(source.pages(None))
    assert [listed.id for page in pages for listed in page.items] == [f"m{i:02}" for i in range(25)]
    for i, page in enumerate(pages[:-1]):
        rest = [listed for later in source.pages(page.cursor) for listed in later.items]
        assert rest == [listed for later in pages[i + 1 :] for listed in later.items]
    again = list(read_listing(tmp_path / "l", source))
    assert again == [listed for page in pages for listed in page.items]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def test_candidates_of_an_s3_prefix_are_listed_and_fetched(s3: S3Server, tmp_path: Path) -> None:
    for i in range(6):
        s3.objects[f"runs/tonight/m{i}/config.json"] = b"{}"
        s3.objects[f"runs/tonight/m{i}/model.safetensors"] = b"%d" % i * 100_000
        s3.objects[f"runs/tonight/m{i}/optimizer.pt"] = b"no"
    s3.objects["runs/other/m/model.safetensors"] = b"no"
    url = "s3://bucket/runs/tonight"
    found = list(read_listing(tmp_path / "l", ObjectPrefix(url, open_objects(url))))
    assert [listed.id for listed in found] == [f"m{i}" for i in range(6)]
    pinned = pin(found[3])
    cache = Cache(tmp_path / "cache", max_bytes=1 << 30, min_free_bytes=0)
    keys = {name: value for name, value in s3.environment.items() if "KEY" in name}
    fetcher = Fetcher(
        Origin(url, is_store=True, secrets=keys), cache, RateLimit(), stall_s=20, max_attempts=2
    )
    try:
        with cache.pin(pinned.key):
            folder = fetcher.fetch(pinned)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
                "config.json": b"{}",
                "model.safetensors": b"3" * 100_000,
            }
        s3.objects["runs/tonight/m4/model.safetensors"] = b"x" * 100_000  # after it was listed
        stale = pin(found[4])
        with cache.pin(stale.key), pytest.raises(CandidateError, match="deferred:stale_commit"):
            fetcher.fetch(stale)
        again = list(read_listing(tmp_path / "l", ObjectPrefix(url, open_objects(url))))
        assert [pin(a).key == pin(b).key for a, b in zip(found, again, strict=True)].count(False) == 1
    finally:
        fetcher.close()
    assert not any("optimizer" in request for request in s3.requests if "list-type" not in request)


def pin(listed: Listed) -> Any:
    known = {file.name: (file.num_bytes, file.oid) for file in listed.files or ()}
    return choose_files(listed, "objects", known, max_candidate_bytes=1 << 30)


def test_a_store_that_fails_says_so_without_its_keys(s3: S3Server, tmp_path: Path) -> None:
    s3.objects["p/m/model.safetensors"] = b"1"
    s3.fail = 1000
    with pytest.raises(SourceError, match="cannot be listed") as caught:
        list(read_listing(tmp_path / "l", ObjectPrefix("s3://bucket/p", open_objects("s3://bucket/p"))))
    assert "sentinel" not in repr(caught.value)
    for url in ("ftp://x", "s3://key:secret@bucket/p", "bucket"):
        with pytest.raises(ValueError, match=r"candidates\.url must") as refused:
            open_objects(url)
        assert "secret" not in str(refused.value)


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def limit(self, **settings: Any) -> RateLimit:
        return RateLimit(clock=lambda: self.now, sleep=self.sleep, **settings)


def test_what_the_server_still_allows_is_spread_over_its_window() -> None:
    time = Time()
    limit = time.limit()
    limit.learn({"ratelimit": '"api";r=2;t=30'})
    limit.take("api")
    limit.take("api")
    assert time.now == 0
    limit.take("resolvers")  # another bucket
    assert time.now == 0
    limit.take("api")
    assert 30 <= time.now < 32


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Mon, 23 Nov 2026 10:00:40 GMT", "date": "Mon, 23 Nov 2026 10:00:00 GMT"}, 40),
        ({}, 3),
        ({"ratelimit": "nonsense", "retry-after": "soon"}, 3),
    ],
)
def test_a_429_pauses_its_bucket_for_as_long_as_it_says(headers: dict[str, str], least: int) -> None:
    time = Time()
    limit = time.limit()
    limit.pause("api", headers, fallback_s=3)
    limit.take("resolvers")
    assert time.now == 0
    limit.take("api")
    assert least <= time.now < least + 2


def test_a_pause_that_is_too_long_is_not_slept() -> None:
    limit = Time().limit(max_wait_s=300)
    limit.pause("api", {"retry-after": "86400"}, fallback_s=1)
    with pytest.raises(RateLimited, match="no request for api in the next 86400 s"):
        limit.take("api")
