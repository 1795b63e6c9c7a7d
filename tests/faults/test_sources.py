"""Rows A: hubs and folders that misbehave, over real HTTP on loopback and real links on disk."""

import hashlib
import os
import time
from email.utils import formatdate
from itertools import islice
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from hub_folders import model_tensors, write_safetensors
from hub_server import HubServer, answer, garble, hang_up, serving, stall, swap
from table import fault
from test_fetch import FILES, PLENTY, WANTED, WEIGHTS, Bench, bench
from test_hub_query import endpoint, names, query

from ray_auditor.hub import CandidateError
from ray_auditor.hub.hub_query import pin
from ray_auditor.hub.listing import read_listing
from ray_auditor.hub.remote import Listed

__all__ = ["bench"]


@fault(
    "A1",
    "a gated repository answers 403",
    demanded="skipped, with the address to ask at",
    seen="skipped:gated",
)
def test_A01_gated(bench: Bench, seen) -> None:
    bench.server.repos["org/m"].gated = True
    with pytest.raises(CandidateError) as caught:
        bench.pin()
    assert f"{bench.server.url}/org/m" in caught.value.text
    seen(caught.value.reason.partition(": ")[0])


@fault(
    "A2",
    "the token is wrong: 401",
    demanded="a usage error that does not repeat the token",
    seen="usage error",
)
def test_A02_wrong_token(bench: Bench, seen) -> None:
    bench.server.token = "hf_right"
    with pytest.raises(ValueError, match="HF_TOKEN must be a token that") as caught:
        pin(Listed("m", "org/m"), endpoint(bench.server, token="hf_wrong"), max_candidate_bytes=PLENTY)
    assert "hf_wrong" not in str(caught.value)
    seen("usage error")


@fault(
    "A3", "the repository is gone when its files are asked for", demanded="skipped:gone", seen="skipped:gone"
)
def test_A03_gone(bench: Bench, seen) -> None:
    pinned = bench.pin()
    del bench.server.repos["org/m"]
    seen(bench.refusal(pinned).reason.partition(": ")[0])


@fault(
    "A4",
    "429 that names the seconds left of its window",
    demanded="that bucket alone pauses, once",
    seen="ok",
)
def test_A04_rate_limit(bench: Bench, seen) -> None:
    pinned = bench.pin()
    bench.server.fault("/resolve/", answer(429, RateLimit='"resolvers";r=0;t=2'))
    begun = time.monotonic()
    assert bench.fetch(pinned) == WANTED
    assert time.monotonic() - begun > 1.4
    assert bench.limit.num_pauses == 1
    begun = time.monotonic()
    bench.server.fault("/resolve/", answer(429, RateLimit='"resolvers";r=0;t=4'))
    bench.limit.pause("resolvers", {"ratelimit": '"resolvers";r=0;t=4'}, fallback_s=1)
    bench.pin()  # asks the api's bucket
    assert time.monotonic() - begun < 1
    seen("ok")


@fault(
    "A5",
    "429 with Retry-After as seconds or as a date, or with nothing",
    demanded="read, or backed off from; too long is deferred",
    seen="ok; deferred:ratelimit",
)
def test_A05_retry_after(bench: Bench, seen) -> None:
    soon = formatdate(time.time() + 1, usegmt=True)
    bench.server.fault("/resolve/", answer(429, Retry_After=soon), answer(429))
    assert bench.fetch(max_attempts=5) == WANTED
    seen("ok")
    bench.server.add("org/m", {**FILES, "model.safetensors": b"other"})
    late = formatdate(time.time() + 900, usegmt=True)
    bench.server.fault("/resolve/", answer(429, Retry_After=late), answer(429, Retry_After=late))
    seen(bench.refusal().reason.partition(": ")[0])


@fault(
    "A6", "5xx and broken connections within a listing", demanded="taken up; nothing twice, no gap", seen="ok"
)
def test_A06_listing_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(HubServer(page_size=7)) as server:
        for i in range(30):
            server.add(f"org/m{i:03}", FILES)
        server.fault("/api/models?", answer(502), hang_up, answer(504), answer(503))
        assert names(tmp_path / "listing", query(server)) == [f"org/m{i:03}" for i in range(30)]
    seen("ok")


@fault(
    "A7", "a file of the tree is not there", demanded="deferred, never audited", seen="deferred:incomplete"
)
def test_A07_partial(bench: Bench, seen) -> None:
    bench.server.fault("config.json", *[answer(404, X_Error_Code="EntryNotFound")] * 5)
    seen(bench.refusal().reason.partition(": ")[0])


@fault(
    "A8", "the branch moves between listing and download", demanded="all files of the first commit", seen="ok"
)
def test_A08_branch_moves(bench: Bench, seen) -> None:
    pinned = bench.pin()
    bench.server.add("org/m", {"config.json": b"{}", "model.safetensors": b"other weights"})
    assert bench.fetch(pinned) == WANTED
    assert bench.pin().key != pinned.key  # the next sweep's
    seen("ok")


@fault(
    "A9", "the commit was pushed away", demanded="deferred after another look", seen="deferred:stale_commit"
)
def test_A09_force_push(bench: Bench, seen) -> None:
    pinned = bench.pin()
    bench.server.repos["org/m"].commits.clear()
    bench.server.add("org/m", {"model.safetensors": b"rewritten"})
    seen(bench.refusal(pinned).reason.partition(": ")[0])


@fault("A10", "a commit changes the README alone", demanded="the same key: nothing moves", seen="ok")
def test_A10_readme(bench: Bench, seen) -> None:
    pinned = bench.pin()
    bench.fetch(pinned)
    bench.server.add("org/m", FILES | {"README.md": b"other words"})
    again = bench.pin()
    assert again.key == pinned.key
    bench.server.requests.clear()
    bench.fetch(again)
    assert bench.server.count("/resolve/") == 0
    seen("ok")


@fault("A11", "a download stalls", demanded="the child is killed; then deferred", seen="deferred:stall")
def test_A11_stall(bench: Bench, seen) -> None:
    bench.server.fault("model.safetensors", stall(1000), stall(0))
    seen(bench.refusal(stall_s=3.0, max_attempts=2).reason.partition(": ")[0])


@fault(
    "A12", "bytes with another hash, twice", demanded="failed:corrupt; nothing kept", seen="failed:corrupt"
)
def test_A12_corrupt(bench: Bench, seen) -> None:
    bench.server.fault("model.safetensors", garble, garble, garble)
    seen(bench.refusal().reason.partition(": ")[0])
    assert not bench.cache.blob(hashlib.sha256(WEIGHTS).hexdigest()).exists()


@fault(
    "A13",
    "larger than the setting",
    demanded="skipped from its sizes, no byte moved",
    seen="skipped:too_large",
)
def test_A13_too_large(bench: Bench, seen) -> None:
    with pytest.raises(CandidateError) as caught:
        pin(Listed("m", "org/m"), endpoint(bench.server), max_candidate_bytes=1000)
    assert bench.server.count("/resolve/") == 0
    seen(caught.value.reason.partition(": ")[0])


@fault(
    "A14",
    "more bytes than the tree says",
    demanded="rejected at the first too many",
    seen="rejected:size_mismatch",
)
def test_A14_size_lie(bench: Bench, seen) -> None:
    bench.server.fault("model.safetensors", swap(WEIGHTS * 3))
    seen(bench.refusal().reason.partition(": ")[0])
    assert sum(path.stat().st_size for path in (bench.root / "partial").iterdir()) == 0


@fault("A15", "archives and zip bombs in a repository", demanded="neither fetched nor opened", seen="ok")
def test_A15_archives(bench: Bench, seen) -> None:
    bench.server.add("org/m", FILES | {"bomb.zip": b"PK", "weights.tar.gz": b"\x1f\x8b", "x.7z": b"7z"})
    assert bench.fetch() == WANTED
    assert not any(bench.server.count(name) for name in ("bomb.zip", "weights.tar.gz", "x.7z"))
    seen("ok")


@fault(
    "A16",
    "a link out of the candidate's folder, of a file or of the folder",
    demanded="rejected; the hub's own cache layout is followed",
    seen="rejected:symlink_escape; ok",
)
def test_A16_links(hub, seen) -> None:
    secret = write_safetensors(hub.root.parent / "secret.safetensors", model_tensors(1))
    (hub.full("file") / "model.safetensors").unlink()
    (hub.root / "file/model.safetensors").symlink_to(secret)
    hub.full("moved").rename(hub.root.parent / "moved")
    (hub.root / "folder").symlink_to(hub.root.parent / "moved", target_is_directory=True)
    (hub.full("tokenizer") / "README.md").symlink_to("/etc/passwd")
    for outcome in hub.outcomes().values():
        seen(outcome)
    snapshots = hub.root.parent / "models--org--m/snapshots"
    blobs = snapshots.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshots.mkdir()
    hub.full("sound").rename(snapshots / "abc")
    for file in list((snapshots / "abc").iterdir()):
        file.rename(blobs / f"hash-{file.name}")
        file.symlink_to(f"../../blobs/hash-{file.name}")
    hub.root = snapshots
    seen(hub.outcome)


@fault("A17", "a local folder without a commit", demanded="identified by its content", seen="ok")
def test_A17_local_content(hub, seen) -> None:
    folder = hub.full("m1")
    first = hub.admit().content_sha256
    folder.rename(hub.root / "m2")
    assert hub.admit().content_sha256 == first
    write_safetensors(hub.root / "m2/model.safetensors", model_tensors(2))
    assert hub.admit().content_sha256 != first
    seen(hub.outcome)


@fault("A18", "the same weights under many names", demanded="moved and audited once, a row each", seen="ok")
def test_A18_many_names(bench: Bench, seen) -> None:
    for i in range(5):
        bench.server.add(f"org/copy{i}", FILES | {"README.md": b"%d" % i})
    keys = {bench.pin(f"org/copy{i}").key for i in range(5)}
    assert len(keys) == 1
    for i in range(5):
        bench.fetch(bench.pin(f"org/copy{i}"))
    assert bench.server.count("cdn") == 1
    seen("ok")


@fault("A19", "a renamed repository: the hub redirects", demanded="followed on the same host", seen="ok")
def test_A19_renamed(bench: Bench, seen) -> None:
    sha = bench.server.repos["org/m"].commits[-1][0]
    bench.server.fault(
        "/api/models/org/old/revision", answer(307, Location="/api/models/org/m/revision/main")
    )
    bench.server.fault("/api/models/org/old/tree", answer(307, Location=f"/api/models/org/m/tree/{sha}"))
    pinned = bench.pin("org/old")
    assert pinned.commit == sha
    assert pinned.key == bench.pin().key  # so the units are shared
    seen("ok")


@fault("A20", "a mirror serves other bytes than the tree says", demanded="as A12", seen="failed:corrupt")
def test_A20_mirror(bench: Bench, seen) -> None:
    other = os.urandom(len(WEIGHTS))
    bench.server.fault("model.safetensors", *[swap(other)] * 3)
    seen(bench.refusal().reason.partition(": ")[0])


@fault(
    "A21",
    "offline, one of two is in the cache",
    demanded="it is audited, the other skipped",
    seen="ok; skipped:offline",
)
def test_A21_offline(bench: Bench, monkeypatch: pytest.MonkeyPatch, seen) -> None:
    bench.server.add("org/n", {"config.json": b"{}", "model.safetensors": b"not here yet"})
    here, there = bench.pin(), bench.pin("org/n")
    bench.fetch(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert bench.fetch(here) == WANTED
    seen("ok")
    seen(bench.refusal(there).reason.partition(": ")[0])


@fault("A22", "a listing without end", demanded="streamed: a page is asked for when it is read", seen="ok")
def test_A22_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(HubServer(page_size=10)) as server:
        many = [{"id": f"org/m{i:06}", "sha": "0" * 40} for i in range(5000)]
        server.list_models = lambda _: many
        found = [one.id for one in islice(read_listing(tmp_path / "listing", query(server)), 25)]
        assert found == [f"org/m{i:06}" for i in range(25)]
        assert server.count("/api/models?") == 3
    seen("ok")


@fault(
    "A23",
    "hostile names: homoglyphs, 255 letters, `..`, newlines, markup, escape codes, `=cmd`",
    demanded="refused by the rule for ids, shown as plain text",
    seen="rejected:id",
)
def test_A23_names(hub, seen) -> None:
    for name in ("g\u043eod", "a" * 255, "a..b", "new\nline", "<script>", "[red]", "\x1b[31m", "=cmd", "-rf"):
        hub.full(name)
    outcomes = hub.outcomes()
    assert len(outcomes) == 9
    for shown, outcome in outcomes.items():
        assert shown.isascii()
        assert shown.isprintable()
        seen(outcome)


def test_a_fifo_or_a_socket_is_never_waited_for(hub) -> None:
    hub.full("sound")
    os.mkfifo(hub.root / "fifo")
    for name in ("model.safetensors", "config.json", "README.md"):
        folder = hub.full(f"fifo-{name}")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert np.all(
        np.array(sorted(hub.outcomes().values()))
        == ["ok", *["rejected:not_a_file"] * 3, "rejected:not_a_folder"]
    )
