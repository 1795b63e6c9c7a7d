"""What an audit reads of full weights that lie elsewhere, and nothing more: bytes counted by the server."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import psutil
import pytest
from hub_server import Handler, HubServer, answer, cut, fine, serving
from s3_server import S3Server

from ray_auditor.budget import Limits, Meter
from ray_auditor.config import AuditConfig
from ray_auditor.hub import Admitted, BaseModel, Candidate, CandidateError, admit, open_base
from ray_auditor.hub.cache import Cache
from ray_auditor.hub.checkpoint import iter_tensors
from ray_auditor.hub.endpoint import Endpoint
from ray_auditor.hub.fetch import Fetcher, Origin
from ray_auditor.hub.hub_query import HubQuery, pin
from ray_auditor.hub.objects import ObjectPrefix, open_objects
from ray_auditor.hub.ranges import HEAD_BYTES, MAX_GAP_BYTES, MAX_RANGES, join_ranges
from ray_auditor.hub.rate_limit import RateLimit
from ray_auditor.hub.remote import Listed, Pinned, RemoteFile, choose_files
from ray_auditor.hub.source import Remote
from ray_auditor.intake import UNVERIFIED, Arrivals, Recall
from ray_auditor.ledger import Ledger
from ray_auditor.roster import Row
from tests.test_store import UNIT
from tests.tiny import make_finetune, make_model

NUM_LAYERS = 2  # of 12
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a finetune of 12 layers, 1.5 MB each."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "base", hidden_size=192, intermediate_size=512, num_hidden_layers=12)
    make_finetune(root / "other", root / "base", seed=1, scale=0.1)
    return root


@pytest.fixture(scope="module")
def base(models: Path) -> BaseModel:
    return open_base(models / "base", num_layers=NUM_LAYERS)


class Bench:
    def __init__(self, server: HubServer, root: Path) -> None:
        self.server = server
        self.limit = RateLimit(max_wait_s=5)
        self.endpoint = Endpoint(server.url, None, self.limit, backoff_s=0.01)
        self.origin = Origin(server.url)
        self.cache = Cache(root, max_bytes=1 << 40, min_free_bytes=0)

    def pin(self) -> Pinned:
        return pin(Listed("org/m", "org/m"), self.endpoint, max_candidate_bytes=1 << 40)

    @contextmanager
    def fetched(self, pinned: Pinned, **settings: Any) -> Iterator[Path]:
        usual: dict[str, Any] = {"stall_s": 20.0, "max_attempts": 3, "backoff_s": 0.01}
        fetcher = Fetcher(self.origin, self.cache, self.limit, **(usual | settings))
        try:
            with self.cache.pin(pinned.key):
                yield fetcher.fetch(pinned)
        finally:
            fetcher.close()

    @property
    def num_sent(self) -> int:
        return sum(count for path, count in self.server.bytes_sent.items() if path.endswith(MODEL))


@pytest.fixture
def bench(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(HubServer()) as server:
        server.add("org/m", models / "other")
        yield Bench(server, tmp_path / "cache")


def admitted(path: Path, base: BaseModel) -> Admitted:
    return admit(Candidate("m", path, "full", 0), base, num_layers=NUM_LAYERS, max_lora_rank=8)


def num_wanted(found: Admitted) -> int:
    return sum(spec.end - spec.start for spec in found.tensors.values())  # type: ignore[union-attr]


def test_no_more_than_the_layers_up_to_the_hook_comes_and_it_is_the_same_candidate(
    bench: Bench, models: Path, base: BaseModel
) -> None:
    whole = admitted(models / "other", base)
    file_bytes = (models / "other" / MODEL).stat().st_size
    pinned = bench.pin().in_ranges(NUM_LAYERS)
    with bench.fetched(pinned) as folder:
        num_requests = sum(not path.startswith(("cdn", "/api")) for path in bench.server.requests)
        found = admitted(folder, base)
        taken = 512 * (folder / MODEL).stat().st_blocks
    assert found.content_sha256 == whole.content_sha256
    assert num_wanted(found) < file_bytes / 4
    gaps = (len(bench.server.ranges) // 2) * MAX_GAP_BYTES  # each request is redirected
    assert num_wanted(found) <= bench.num_sent <= num_wanted(found) + HEAD_BYTES + gaps
    assert bench.num_sent < file_bytes / 2
    assert taken <= bench.num_sent + 64 * 1024
    bench.server.requests.clear()
    with bench.fetched(pinned):
        assert bench.server.count(MODEL) == 0  # nothing twice
    assert bench.limit.num_taken["resolvers"] == num_requests


def test_a_part_never_passes_for_the_whole(bench: Bench, models: Path) -> None:
    pinned = bench.pin()
    with bench.fetched(pinned.in_ranges(1)), bench.fetched(pinned.in_ranges(NUM_LAYERS)):
        pass
    with bench.fetched(pinned) as folder:
        assert (folder / MODEL).read_bytes() == (models / "other" / MODEL).read_bytes()
    assert len({pinned.key, pinned.in_ranges(1).key, pinned.in_ranges(2).key}) == 3


def test_what_came_before_the_connection_broke_does_not_come_again(
    bench: Bench, models: Path, base: BaseModel
) -> None:
    with bench.fetched(bench.pin().in_ranges(NUM_LAYERS)):
        undisturbed = bench.num_sent
    bench.server.bytes_sent.clear()
    for path in (bench.cache.root / "blobs").iterdir():
        path.unlink()
    for path in (bench.cache.root / "folders").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    bench.server.fault(MODEL, fine, cut(600_000), cut(300_000))
    with bench.fetched(bench.pin().in_ranges(NUM_LAYERS)) as folder:
        assert admitted(folder, base).content_sha256 == admitted(models / "other", base).content_sha256
    assert bench.num_sent <= undisturbed + 2 * 65536  # what lay in buffers when it broke


def without_ranges(handler: Handler) -> None:
    handler.serves_ranges = False
    handler.body = lambda data: data  # from this host


def other_commit(handler: Handler) -> None:
    raise_later = handler.server.repos["org/m"].commits[0][1][MODEL]
    handler.body = lambda _: raise_later + b"more"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (without_ranges, r"deferred:no_ranges: .* set download\.read=verified"),
        (other_commit, "deferred:unreachable: .*the server sent 'bytes"),
        (answer(206, b"x" * 65536, Content_Range="bytes 9-65544/99999"), "deferred:unreachable: .*'bytes 9-"),
    ],
)
def test_a_server_that_sends_something_else_is_not_believed(bench: Bench, fault: Any, reason: str) -> None:
    bench.server.fault(MODEL, *[fault] * 9)
    with (
        pytest.raises(CandidateError, match=f"^({reason})"),
        bench.fetched(bench.pin().in_ranges(NUM_LAYERS), max_attempts=2),
    ):
        pass


def test_a_server_that_names_another_file_is_not_believed(bench: Bench, models: Path) -> None:
    pinned = bench.pin().in_ranges(NUM_LAYERS)
    other = bytearray((models / "other" / MODEL).read_bytes())
    other[-1] ^= 1
    ((_, files),) = bench.server.repos["org/m"].commits
    files[MODEL] = bytes(other)  # under the same commit, after it was pinned
    with pytest.raises(CandidateError, match=r"deferred:stale_commit: .*another file"), bench.fetched(pinned):
        pass


def test_a_server_that_names_nothing_is_not_believed(bench: Bench, models: Path) -> None:
    changed = bytearray((models / "other" / MODEL).read_bytes())
    changed[-1] ^= 1  # between the first range and the next

    def unnamed(handler: Handler) -> None:
        handler.send_range(bytes(changed), handler.path)

    bench.server.fault(MODEL, fine, *[unnamed] * 9)
    with (
        pytest.raises(CandidateError, match=r"deferred:no_ranges: .*does not name the commit"),
        bench.fetched(bench.pin().in_ranges(NUM_LAYERS)),
    ):
        pass


def test_an_answer_without_end_is_cut_off(bench: Bench, models: Path) -> None:
    size = (models / "other" / MODEL).stat().st_size
    sent = 0

    def endless(handler: Handler) -> None:
        nonlocal sent
        data = bench.server.repos["org/m"].commits[0][1][MODEL]
        handler.send_response(206)
        handler.send_header("X-Repo-Commit", bench.server.repos["org/m"].commits[0][0])
        handler.send_header("X-Linked-Etag", hashlib.sha256(data).hexdigest())
        handler.send_header("Content-Range", f"bytes 0-{HEAD_BYTES - 1}/{size}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while sent < 256 << 20:
            handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            sent += 0x10000

    settled: list[int] = []
    bench.server.fault(MODEL, endless)
    with (
        pytest.raises(CandidateError, match=r"rejected:size_mismatch: .*more than the 65536 bytes"),
        bench.fetched(bench.pin().in_ranges(NUM_LAYERS), settle=settled.append),
    ):
        pass
    assert sent < 32 << 20  # what the sockets buffer
    assert HEAD_BYTES < settled[-1] + size < 1 << 20  # what came was counted


def test_no_range_is_asked_for_that_was_not_granted(bench: Bench, base: BaseModel) -> None:
    """The base's share is too low a guess: what the header says is granted before it moves."""
    used = 0

    def grant(most: int) -> Any:
        def ask(file: RemoteFile, needed: int | None) -> int:
            nonlocal used
            asked = HEAD_BYTES if needed is None and file.num_layers else needed or file.num_bytes
            if used + asked > most:
                raise CandidateError("deferred", "max_download_bytes", "no more")
            used += asked
            return asked

        return ask

    def settle(num_bytes: int) -> None:
        nonlocal used
        used += num_bytes

    pinned = bench.pin().in_ranges(NUM_LAYERS)
    with (
        pytest.raises(CandidateError, match="max_download_bytes"),
        bench.fetched(pinned, ask_to_move=grant(300_000), settle=settle),
    ):
        pass
    assert bench.num_sent == HEAD_BYTES
    bench.server.fault(MODEL, answer(503), answer(503))  # which move nothing
    with bench.fetched(pinned, ask_to_move=grant(5 * 10**6), settle=settle) as folder:
        admitted(folder, base)
    assert used == sum(bench.server.bytes_sent.values())


def test_a_header_that_admission_refuses_is_refused_by_admission(
    bench: Bench, base: BaseModel, models: Path
) -> None:
    data = bytearray((models / "other" / MODEL).read_bytes())
    data[0:8] = (1 << 40).to_bytes(8, "little")
    files = {"config.json": (models / "other" / "config.json").read_bytes(), MODEL: bytes(data)}
    bench.server.add("org/m", files)
    with (
        bench.fetched(bench.pin().in_ranges(NUM_LAYERS)) as folder,
        pytest.raises(CandidateError, match="rejected:header_limits"),
    ):
        admitted(folder, base)
    assert bench.num_sent == HEAD_BYTES


def test_the_row_says_that_no_hash_was_checked(bench: Bench, base: BaseModel, tmp_path: Path) -> None:
    def look(candidate: Candidate) -> tuple[Row, Admitted | None]:
        found = admitted(candidate.path, base)
        unit = replace(UNIT, candidate_key=found.content_sha256)
        return Row(candidate.id, "full", "admitted", None, unit, found.notes), found

    query: Any = HubQuery.__new__(HubQuery)
    remote = Remote(query, bench.origin, bench.limit, bench.endpoint)
    config = AuditConfig(out_dir=str(tmp_path / "out"))
    config.download = replace(config.download, min_free_bytes=0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for pinned in (bench.pin(), bench.pin().in_ranges(NUM_LAYERS)):
            meter = Meter(Limits(num_bytes=1e9, given={"max_download_bytes": 1e9}), 1)
            recall = Recall(ledger, UNIT, "rules", set())
            arrivals = Arrivals([pinned], remote, recall, look, config, meter, range_share=0.1)
            assert len(list(arrivals.stages())) == 1
            assert (UNVERIFIED in arrivals.rows["org/m"].notes) == pinned.is_unverified
            meter.move(10**9 - arrivals.fetched_bytes)  # what moved was counted, to the byte
            with pytest.raises(CandidateError, match="max_download_bytes"):
                meter.move(1)
    assert pinned.is_unverified


def test_of_an_object_only_the_ranges_are_read_and_one_version(
    models: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("config.json", MODEL):
        server.objects[f"runs/m/{name}"] = (models / "other" / name).read_bytes()
    url = "s3://bucket/runs"
    (page,) = ObjectPrefix(url, open_objects(url)).pages(None)
    (listed,) = page.items
    known = {file.name: (file.num_bytes, file.oid) for file in listed.files or ()}
    pinned = choose_files(listed, "listed", known, max_candidate_bytes=1 << 40).in_ranges(NUM_LAYERS)
    assert not pinned.is_unverified  # nobody has hashed it: whole, it would be no better known
    keys = {name: value for name, value in server.environment.items() if "KEY" in name}
    origin = Origin(url, is_store=True, secrets=keys)
    cache = Cache(tmp_path, max_bytes=1 << 40, min_free_bytes=0)
    fetcher = Fetcher(origin, cache, RateLimit(), stall_s=20, max_attempts=2)
    try:
        with cache.pin(pinned.key):
            found = admitted(fetcher.fetch(pinned), base)
    finally:
        fetcher.close()
        server.shutdown()
        server.server_close()
    assert found.content_sha256 == admitted(models / "other", base).content_sha256
    assert num_wanted(found) < server.num_bytes_sent < len(server.objects[f"runs/m/{MODEL}"]) / 2


def test_ranges_are_joined_when_a_request_would_cost_more_than_the_gap() -> None:
    far = 3 * MAX_GAP_BYTES
    assert join_ranges([(far, far + 5), (10, 20), (20, 30), (40, 50)], after=0) == [(10, 50), (far, far + 5)]
    assert join_ranges([(10, 20), (0, 5), (30, 30)], after=15) == [(15, 20)]
    assert join_ranges([(10, 20)], after=20) == []
    many = [(far * i + (i == 7), far * i + 9) for i in range(1000)]  # one gap is a byte wider
    joined = join_ranges(many, after=0)
    assert len(joined) <= MAX_RANGES
    assert (joined[0][0], joined[-1][1]) == (0, many[-1][1])
    scattered = [(far * i * i, far * i * i + 9) for i in range(1000)]
    joined = join_ranges(scattered, after=0)
    assert len(joined) == MAX_RANGES
    assert joined[1:] == scattered[1001 - MAX_RANGES :]  # the nearest were joined


def test_of_a_local_file_only_the_ranges_are_read(models: Path, base: BaseModel) -> None:
    """Bytes that system calls brought, admission's hash and a load: each once."""
    process = psutil.Process()
    before = process.io_counters().read_chars  # type: ignore[attr-defined]
    found = admitted(models / "other", base)
    hashed = process.io_counters().read_chars  # type: ignore[attr-defined]
    for _ in iter_tensors(found.tensors):
        pass
    loaded = process.io_counters().read_chars  # type: ignore[attr-defined]
    file_bytes = (models / "other" / MODEL).stat().st_size
    small = 6 << 20  # header, configs, tokenizers, and the sample that tells whose finetune it is
    assert num_wanted(found) + 2 * small < file_bytes
    assert hashed - before <= num_wanted(found) + small
    assert loaded - hashed <= num_wanted(found) + (1 << 16)
    assert json.loads((models / "other" / "config.json").read_text())["num_hidden_layers"] == 12
