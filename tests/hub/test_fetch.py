"""Downloads by a real child process from a real server that misbehaves on order."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import psutil
import pytest
from hub_server import HubServer, answer, cut, hang_up, serving, stall, swap

from ray_auditor.hub import CandidateError
from ray_auditor.hub.cache import Cache
from ray_auditor.hub.endpoint import Endpoint
from ray_auditor.hub.fetch import Fetcher, Origin
from ray_auditor.hub.hub_query import pin
from ray_auditor.hub.rate_limit import RateLimit
from ray_auditor.hub.remote import Listed, Pinned, RemoteFile

WEIGHTS = os.urandom(3_000_000)
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "README.md": b"hello",
    "evil.py": b"import os",
}
MAIN = "/resolve/"
PLENTY = 1 << 40


class Bench:
    """A server, a cache and a fetcher between them."""

    def __init__(self, server: HubServer, root: Path) -> None:
        self.server, self.root = server, root
        self.limit = RateLimit(max_wait_s=5)
        self.cache = Cache(root, max_bytes=PLENTY, min_free_bytes=0)
        self.fetchers: list[Fetcher] = []

    def fetcher(self, **settings: Any) -> Fetcher:
        usual: dict[str, Any] = {"stall_s": 20.0, "max_attempts": 3, "backoff_s": 0.01}
        token = settings.pop("token", None)
        origin = Origin(self.server.url, token=token)
        self.fetchers.append(Fetcher(origin, self.cache, self.limit, **(usual | settings)))
        return self.fetchers[-1]

    def pin(self, repo: str = "org/m") -> Pinned:
        where = Endpoint(self.server.url, None, self.limit, backoff_s=0.01)
        return pin(Listed(repo, repo), where, max_candidate_bytes=PLENTY)

    def fetch(self, pinned: Pinned | None = None, **settings: Any) -> dict[str, bytes]:
        pinned = pinned or self.pin()
        with self.cache.pin(pinned.key):
            folder = self.fetcher(**settings).fetch(pinned)
            return {path.name: path.read_bytes() for path in folder.iterdir()}

    def refusal(self, pinned: Pinned | None = None, **settings: Any) -> CandidateError:
        with pytest.raises(CandidateError) as caught:
            self.fetch(pinned, **settings)
        return caught.value


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(HubServer()) as server:
        server.add("org/m", FILES)
        bench = Bench(server, tmp_path / "cache")
        yield bench
        for fetcher in bench.fetchers:
            fetcher.close()


WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors")}


def test_wanted_files_come_verified_and_nothing_else_is_asked_for(bench: Bench) -> None:
    assert bench.fetch() == WANTED
    assert {path.rpartition("/")[2] for path in bench.server.requests if MAIN in path} == {
        "config.json",
        "model.safetensors",
        "model.safetensors?signature=x",
    }
    bench.server.requests.clear()
    assert bench.fetch() == WANTED
    assert bench.server.count(MAIN) == 0


def test_the_token_does_not_follow_a_redirect_to_another_host(bench: Bench) -> None:
    bench.server.token = "hf_sentinel"
    bench.fetch(token="hf_sentinel")
    assert "Bearer hf_sentinel" in bench.server.seen_tokens
    assert bench.server.count("cdn") == 1
    assert not bench.server.cdn_tokens


def test_the_same_bytes_under_many_names_are_moved_once(bench: Bench) -> None:
    for i in range(5):
        bench.server.add(f"org/copy{i}", FILES | {"config.json": b'{"b": %d}' % i})
    for i in range(5):
        bench.fetch(bench.pin(f"org/copy{i}"))
    assert bench.server.count("model.safetensors?signature") == 1


def test_a_body_that_is_cut_goes_on_by_range(bench: Bench) -> None:
    bench.server.fault("model.safetensors", cut(1_000_000), cut(500_000))
    assert bench.fetch() == WANTED
    starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in bench.server.ranges]
    assert starts
    assert starts == sorted(starts)
    sent = sum(n for path, n in bench.server.bytes_sent.items() if "model" in path)
    assert sent < len(WEIGHTS) + 2 * (1 << 20)  # what had come was not sent again


def test_a_server_without_ranges_starts_over(bench: Bench) -> None:
    whole = answer(200, WEIGHTS)
    bench.server.fault("model.safetensors", cut(1_500_000), whole)
    assert bench.fetch() == WANTED


def test_a_stalled_child_is_killed_and_its_part_is_kept(bench: Bench) -> None:
    bench.server.fault("model.safetensors", stall(2_000_000))
    begun = time.monotonic()
    assert bench.fetch(stall_s=3.0) == WANTED
    assert 3.0 < time.monotonic() - begun < 50
    assert int(bench.server.ranges[0].removeprefix("bytes=").rstrip("-")) >= 1 << 20
    children = [c for c in psutil.Process().children() if "ray_auditor.hub.download" in c.cmdline()]
    assert len(children) == 1  # the one that stalled is gone, the other waits for work


def test_one_that_always_stalls_is_deferred(bench: Bench) -> None:
    bench.server.fault("model.safetensors", stall(0), stall(0))
    error = bench.refusal(stall_s=3.0, max_attempts=2)
    assert (error.status, error.code) == ("deferred", "stall")


def test_wrong_bytes_are_fetched_once_more_and_then_failed(bench: Bench) -> None:
    wrong = swap(b"x" * len(WEIGHTS))
    bench.server.fault("model.safetensors", wrong)
    assert bench.fetch() == WANTED
    bench.server.add("org/m", FILES | {"model.safetensors": WEIGHTS[::-1]})
    bench.server.fault("model.safetensors", wrong, wrong, wrong)
    error = bench.refusal()
    assert (error.status, error.code) == ("failed", "corrupt")
    assert not bench.cache.blob(hashlib.sha256(WEIGHTS[::-1]).hexdigest()).exists()
    config = swap(b'{"a": 2}')
    bench.server.add("org/n", {"config.json": b'{"a": 3}', "model.safetensors": b"w"})
    bench.server.fault("config.json", config, config)
    assert bench.refusal(bench.pin("org/n")).code == "corrupt"  # small files have git's hash


def test_a_file_that_is_larger_than_said_is_cut_off(bench: Bench) -> None:
    bench.server.fault("model.safetensors", swap(WEIGHTS * 3))
    error = bench.refusal()
    assert (error.status, error.code) == ("rejected", "size_mismatch")
    assert sum(path.stat().st_size for path in (bench.root / "partial").iterdir()) == 0


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ([answer(403, X_Error_Code="GatedRepo")], "skipped:gated"),
        ([answer(404, X_Error_Code="RepoNotFound")], "skipped:gone"),
        ([answer(404, X_Error_Code="RevisionNotFound")], "deferred:stale_commit"),
        ([answer(404, X_Error_Code="EntryNotFound")], "deferred:incomplete"),
        ([answer(500), answer(503), answer(504)], "deferred:unreachable"),
        ([hang_up, hang_up, hang_up], "deferred:unreachable"),
        ([answer(429, RateLimit='"resolvers";r=0;t=900')] * 2, "deferred:ratelimit"),
        ([answer(418)], "deferred:refused"),
    ],
)
def test_what_the_server_says_becomes_a_reason(bench: Bench, faults: list[Any], code: str) -> None:
    bench.server.fault(f"{MAIN}", *faults)
    assert bench.refusal().reason.startswith(code)


def test_faults_that_pass_are_survived(bench: Bench) -> None:
    bench.server.fault(MAIN, answer(503), hang_up)
    assert bench.fetch() == WANTED


def test_all_downloads_wait_when_the_server_says_so(bench: Bench) -> None:
    for i in range(6):
        bench.server.add(f"org/m{i}", {"config.json": b"{}", "model.safetensors": os.urandom(1000)})
    pinned = [bench.pin(f"org/m{i}") for i in range(6)]
    times: list[float] = []

    def note(inner: Callable[[Any], None]) -> Callable[[Any], None]:
        def fault(handler: Any) -> None:
            times.append(time.monotonic())
            inner(handler)

        return fault

    bench.server.fault(MAIN, note(answer(429, RateLimit='"resolvers";r=0;t=2')), *[note(lambda _: None)] * 50)
    fetcher = bench.fetcher(max_attempts=5)

    def fetch(one: Pinned) -> None:
        with bench.cache.pin(one.key):
            fetcher.fetch(one)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fetch, pinned))
    assert bench.limit.num_pauses == 1
    # Requests that were under way when the 429 came are not called back; then nothing for two seconds.
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) > 1.4
    assert len([t for t in times if t < times[gaps.index(max(gaps))] + 1.4]) <= 4


def test_neither_arguments_nor_environment_of_the_child_hold_the_token(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sentinel")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_sentinel")
    bench.server.token = "hf_sentinel"
    fetcher = bench.fetcher(token="hf_sentinel")
    pinned = bench.pin()
    with bench.cache.pin(pinned.key):
        fetcher.fetch(pinned)
    (child,) = (c for c in psutil.Process().children() if "ray_auditor.hub.download" in c.cmdline())
    assert "sentinel" not in repr(child.cmdline())
    assert "sentinel" not in repr(child.environ())
    assert "sentinel" not in repr(Origin("u", token="hf_sentinel", secrets={"A": "aws_sentinel"}))


def test_no_child_outlives_a_killed_parent(bench: Bench, tmp_path: Path) -> None:
    bench.server.fault("model.safetensors", stall(1000))
    script = f"""
        import os, sys, threading
        from pathlib import Path
        from ray_auditor.hub.cache import Cache
        from ray_auditor.hub.fetch import Fetcher, Origin
        from ray_auditor.hub.rate_limit import RateLimit
        from ray_auditor.hub.remote import Pinned, RemoteFile
        cache = Cache(Path({str(tmp_path / "c")!r}), max_bytes=1 << 40, min_free_bytes=0)
        fetcher = Fetcher(Origin({bench.server.url!r}), cache, RateLimit(), stall_s=60, max_attempts=1)
        pinned = {bench.pin()!r}
        thread = threading.Thread(target=lambda: fetcher.fetch(pinned), daemon=True)
        thread.start()
        sys.stdin.readline()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
    )
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(parent.pid).children()) or not bench.server.count("model.safe"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def make(cache: Cache, name: str, num_bytes: int) -> Pinned:
    """A candidate whose one blob is there already."""
    data = name.encode() * num_bytes
    file = RemoteFile("model.safetensors", len(data), hashlib.sha256(data).hexdigest())
    pinned = Pinned(name, f"org/{name}", "0" * 40, "full", (file,))
    cache.blob(file.oid).write_bytes(data)
    return pinned


def absent(num_bytes: int) -> Pinned:
    return Pinned("new", "org/new", "0" * 40, "full", (RemoteFile("model.safetensors", num_bytes, "f" * 64),))


def test_the_least_recently_used_makes_room_and_what_is_in_use_does_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=350, min_free_bytes=0)
    held = {}
    for name in "abc":
        held[name] = make(cache, name, 100)
        with cache.pin(held[name].key):
            cache.stage(held[name])
        time.sleep(0.01)
    with cache.pin(held["a"].key):  # used again, so b is the oldest
        pass
    with cache.pin(absent(100).key), cache.room(absent(100)):
        assert [(tmp_path / "folders" / held[n].key).exists() for n in "abc"] == [True, False, True]
    with cache.pin(held["a"].key) as a, cache.pin(held["c"].key) as c, cache.room(absent(150)):
        assert a.exists()
        assert c.exists()
    with cache.pin(held["a"].key) as a, cache.pin(absent(200).key), cache.room(absent(200)):
        assert a.exists()
        assert not (tmp_path / "folders" / held["c"].key).exists()
    blobs = {path.name for path in (tmp_path / "blobs").iterdir()}
    assert blobs == {held["a"].files[0].oid}


def test_what_another_process_reads_is_not_evicted_until_that_ends_however_it_ends(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=250, min_free_bytes=0)
    held = {}
    for name in "ab":  # a is the older
        held[name] = make(cache, name, 100)
        with cache.pin(held[name].key):
            cache.stage(held[name])
        time.sleep(0.01)
    script = f"""
        import sys
        from pathlib import Path
        from ray_auditor.hub.cache import Cache
        with Cache(Path({str(tmp_path)!r}), max_bytes=250, min_free_bytes=0).pin({held["a"].key!r}):
            print("held", flush=True)
            sys.stdin.readline()
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"held\n"
    with cache.pin(absent(100).key), cache.room(absent(100)):
        there = {name: (tmp_path / "folders" / one.key).exists() for name, one in held.items()}
    assert there == {"a": True, "b": False}  # the newer one went, for the older one was being read
    with pytest.raises(CandidateError, match="deferred:disk"), cache.room(absent(200)):
        pass
    reader.kill()
    reader.wait()
    with cache.room(absent(200)):
        assert not (tmp_path / "folders" / held["a"].key).exists()


def test_nothing_is_asked_for_that_does_not_fit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1000, min_free_bytes=0)
    with pytest.raises(CandidateError, match="skipped:too_large"), cache.room(absent(1001)):
        pass
    full = Cache(tmp_path, max_bytes=1000, min_free_bytes=1 << 60)
    with pytest.raises(CandidateError, match="deferred:disk"), full.room(absent(10)):
        pass


def test_a_candidate_waits_for_room_that_a_reader_gives_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=150, min_free_bytes=0)
    one = make(cache, "a", 100)
    order: list[str] = []

    def wait_for_room() -> None:
        with cache.pin(absent(100).key), cache.room(absent(100)):
            order.append("room")

    with cache.pin(one.key):
        cache.stage(one)
        thread = threading.Thread(target=wait_for_room)
        thread.start()
        time.sleep(0.5)
        order.append("read")
    thread.join(timeout=20)
    assert order == ["read", "room"]


def test_a_pin_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=150, min_free_bytes=0)
    one = make(cache, "a", 100)
    cache.stage(one)
    script = f"""
        import sys
        from pathlib import Path
        from ray_auditor.hub.cache import Cache
        with Cache(Path({str(tmp_path)!r}), max_bytes=150, min_free_bytes=0).pin({one.key!r}):
            print("pinned", flush=True)
            sys.stdin.readline()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"pinned\n"
    with pytest.raises(CandidateError, match="deferred:disk"), cache.room(absent(100)):
        pass
    holder.kill()
    holder.wait()
    with cache.room(absent(100)):
        assert not (tmp_path / "folders" / one.key).exists()
