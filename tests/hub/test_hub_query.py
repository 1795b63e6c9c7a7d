"""Listing and pinning against a hub on loopback: pages, cursors, limits, faults."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_server import HubServer, answer, fine, hang_up, serving

from ray_auditor.hub import CandidateError
from ray_auditor.hub.endpoint import Endpoint
from ray_auditor.hub.hub_query import HubQuery, pin
from ray_auditor.hub.listing import read_listing
from ray_auditor.hub.rate_limit import RateLimit
from ray_auditor.hub.remote import Listed, SourceError

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"hello"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(HubServer(page_size=7)) as server:
        yield server


def endpoint(server: HubServer, **settings: Any) -> Endpoint:
    return Endpoint(
        server.url, settings.pop("token", None), RateLimit(max_wait_s=5), **{"backoff_s": 0.01, **settings}
    )


def query(server: HubServer, **question: Any) -> HubQuery:
    asked: dict[str, Any] = {
        "author": None,
        "tags": [],
        "base_model": None,
        "relations": [],
        "search": None,
        "sort": None,
        "include": [],
        "exclude": [],
    }
    return HubQuery(endpoint(server), **(asked | question))


def names(path: Path, source: Any, **limits: Any) -> list[str]:
    return [listed.id for listed in read_listing(path, source, **limits)]


def refusal(listed: Listed, server: HubServer, **settings: Any) -> CandidateError:
    with pytest.raises(CandidateError) as caught:
        pin(listed, endpoint(server, **settings), max_candidate_bytes=1 << 30)
    return caught.value


def test_every_page_is_read_and_the_commit_is_known(server: HubServer, tmp_path: Path) -> None:
    shas = {f"org/m{i:03}": server.add(f"org/m{i:03}", FILES | {"i": b"%d" % i}) for i in range(50)}
    found = {listed.id: listed.revision for listed in read_listing(tmp_path / "l", query(server))}
    assert found == shas
    assert server.count("/api/models?") == 8  # 50 in pages of 7


def test_a_question_is_asked_as_it_was_configured(server: HubServer, tmp_path: Path) -> None:
    server.add("a/tuned", FILES, tags=("base_model:finetune:org/base", "en"))
    server.add("a/lora", FILES, tags=("base_model:adapter:org/base", "en"))
    server.add("b/lora", FILES, tags=("base_model:adapter:org/base",))
    server.add("a/other", FILES, tags=("base_model:adapter:org/other", "en"))
    both = {"base_model": "org/base", "relations": ["finetune", "adapter"]}
    assert names(tmp_path / "1", query(server, **both)) == ["a/tuned", "a/lora", "b/lora"]
    assert names(tmp_path / "2", query(server, **both, tags=["en"])) == ["a/tuned", "a/lora"]
    assert names(tmp_path / "3", query(server, author="b")) == ["b/lora"]
    assert names(tmp_path / "4", query(server, search="lora", exclude=["b/*"])) == ["a/lora"]
    assert names(tmp_path / "5", query(server, include=["*/lora", "*/tuned"], exclude=["a/l*"])) == [
        "a/tuned",
        "b/lora",
    ]
    assert names(tmp_path / "6", query(server), limit=3) == ["a/tuned", "a/lora", "b/lora"]


def test_a_repository_that_moves_between_pages_is_listed_once(server: HubServer, tmp_path: Path) -> None:
    for i in range(20):
        server.add(f"org/m{i:02}", FILES)
    in_order = server.list_models({})
    shifted = [{"id": "org/new", "sha": None}, *in_order]  # created while we list, newest first
    served = iter([in_order, shifted, shifted])
    server.list_models = lambda _: next(served)
    assert names(tmp_path / "l", query(server)) == [f"org/m{i:02}" for i in range(20)]


def test_a_listing_broken_off_goes_on_where_it_stopped(server: HubServer, tmp_path: Path) -> None:
    for i in range(50):
        server.add(f"org/m{i:03}", FILES)
    server.fault("/api/models?", fine, fine, fine, *[answer(503)] * 5)
    with pytest.raises(SourceError, match="gave no answer in 5 attempts: HTTP 503"):
        names(tmp_path / "l", query(server))
    server.requests.clear()
    assert names(tmp_path / "l", query(server)) == [f"org/m{i:03}" for i in range(50)]
    assert server.count("/api/models?") == 5  # three pages of eight were kept
    server.requests.clear()
    names(tmp_path / "l", query(server))
    assert server.count("/api/models?") == 8  # one that was finished is made anew
    names(tmp_path / "l", query(server, author="org"))
    assert server.count("author=org") == 8  # and so is one of another question


def test_a_killed_listing_goes_on_without_gap_or_repeat(server: HubServer, tmp_path: Path) -> None:
    for i in range(60):
        server.add(f"org/m{i:03}", FILES)
    script = f"""
        import os
        from pathlib import Path
        from ray_auditor.hub.endpoint import Endpoint
        from ray_auditor.hub.hub_query import HubQuery
        from ray_auditor.hub.listing import read_listing
        from ray_auditor.hub.rate_limit import RateLimit
        query = HubQuery(Endpoint({server.url!r}, None, RateLimit()), author=None, tags=[], base_model=None,
                         relations=[], search=None, sort=None, include=[], exclude=[])
        for number, listed in enumerate(read_listing(Path({str(tmp_path / "l")!r}), query)):
            if number == 17:
                os.kill(os.getpid(), 9)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=os.environ | {"HF_HUB_OFFLINE": "0"}, check=False
    )
    assert run.returncode == -signal.SIGKILL
    server.requests.clear()
    assert names(tmp_path / "l", query(server)) == [f"org/m{i:03}" for i in range(60)]
    assert server.count("/api/models?") == 6  # nine in all


def test_faults_in_the_middle_are_survived(server: HubServer, tmp_path: Path) -> None:
    for i in range(30):
        server.add(f"org/m{i:03}", FILES)
    server.fault(
        "/api/models?",
        answer(502),
        hang_up,
        fine,
        answer(429, RateLimit='"api";r=0;t=1'),
        answer(200, b"<html>"),
        answer(504),
    )
    assert names(tmp_path / "l", query(server)) == [f"org/m{i:03}" for i in range(30)]


def test_a_server_that_asks_for_too_long_a_pause_ends_the_listing(server: HubServer, tmp_path: Path) -> None:
    server.add("org/m", FILES)
    server.fault("/api/models?", answer(429, RateLimit='"api";r=0;t=3000'))
    with pytest.raises(SourceError, match="no request for api in the next 3000 s"):
        names(tmp_path / "l", query(server))


def test_the_token_goes_to_the_endpoint_only(server: HubServer, tmp_path: Path) -> None:
    for i in range(9):
        server.add(f"org/m{i}", FILES)
    server.token = "hf_right"
    with serving(HubServer()) as stranger:
        link = f'<{stranger.url}/api/models?cursor=Nw%3D%3D&limit=7>; rel="next"'
        server.fault("/api/models?", answer(200, b"[]", Link=link))
        asked = HubQuery(
            endpoint(server, token="hf_right"),
            author=None,
            tags=[],
            base_model=None,
            relations=[],
            search=None,
            sort=None,
            include=[],
            exclude=[],
        )
        assert names(tmp_path / "l", asked) == ["org/m7", "org/m8"]  # the cursor, asked of the right host
        assert not stranger.requests
    assert server.seen_tokens == {"Bearer hf_right"}
    assert all(path.startswith("/api/models") for path in server.requests)  # nothing is asked on the side
    with pytest.raises(ValueError, match="HF_TOKEN must be a token that") as caught:
        pin(Listed("x", "org/m0"), endpoint(server, token="hf_wrong"), max_candidate_bytes=1)
    assert "hf_wrong" not in str(caught.value)


def test_a_repository_is_pinned_to_one_commit(server: HubServer) -> None:
    first = server.add("org/m", FILES)
    pinned = pin(Listed("m", "org/m", "main"), endpoint(server), max_candidate_bytes=1 << 30)
    assert pinned.commit == first
    assert [file.name for file in pinned.files] == ["config.json", "model.safetensors"]
    server.add("org/m", FILES | {"README.md": b"other words"})
    again = pin(Listed("m", "org/m", "main"), endpoint(server), max_candidate_bytes=1 << 30)
    assert again.commit != first
    assert again.key == pinned.key  # a README costs nothing
    server.add("org/copy", FILES)
    copy = pin(Listed("c", "org/copy", "main"), endpoint(server), max_candidate_bytes=1 << 30)
    assert copy.key == pinned.key
    server.add("org/m", FILES | {"model.safetensors": b"other weights"})
    changed = pin(Listed("m", "org/m", "main"), endpoint(server), max_candidate_bytes=1 << 30)
    assert changed.key != pinned.key


def test_a_commit_that_was_pushed_away_is_looked_up_once_more(server: HubServer) -> None:
    now = server.add("org/m", FILES)
    pinned = pin(Listed("m", "org/m", "a" * 40), endpoint(server), max_candidate_bytes=1 << 30)
    assert pinned.commit == now
    server.fault("/tree/", answer(404, X_Error_Code="RevisionNotFound"))
    server.fault("/tree/", answer(404, X_Error_Code="RevisionNotFound"))
    assert refusal(Listed("m", "org/m", now), server).code == "stale_commit"


def test_a_tree_of_many_pages_is_read_whole(server: HubServer) -> None:
    shards = {f"model-{i:05}-of-00120.safetensors": b"%d" % i for i in range(1, 121)}
    server.add("org/large", {"config.json": b"{}", **shards})
    pinned = pin(Listed("m", "org/large", "main"), endpoint(server), max_candidate_bytes=1 << 30)
    assert len(pinned.files) == 121


def test_what_cannot_be_audited_is_refused_without_a_download(server: HubServer) -> None:
    server.add("org/pickled", {"pytorch_model.bin": b"cos\nsystem"})
    server.add("org/gguf", {"m.gguf": b"GGUF"})
    server.add("org/gated", FILES)
    server.repos["org/gated"].gated = True
    server.add("org/large", FILES | {"model.safetensors": b"x" * 5000})
    for name, wanted in (("pickled", "skipped:pickle_only"), ("gguf", "skipped:quantized")):
        assert refusal(Listed(name, f"org/{name}"), server).reason.startswith(wanted)
    assert refusal(Listed("g", "org/gated"), server).reason.startswith("skipped:gated")
    assert f"{server.url}/org/gated" in refusal(Listed("g", "org/gated"), server).reason
    assert refusal(Listed("n", "org/none"), server).reason.startswith("skipped:gone")
    for name in ("../../etc", "a/b/c", "org/..", "org/x y", "org/m?x=1"):
        assert refusal(Listed("n", name), server).code == "id"
    with pytest.raises(CandidateError, match="skipped:too_large"):
        pin(Listed("l", "org/large"), endpoint(server), max_candidate_bytes=4000)
    assert not server.count("/resolve/")


def test_a_tree_that_lies_about_itself_is_refused(server: HubServer) -> None:
    server.add("org/m", FILES)

    def tree(*entries: str) -> CandidateError:
        server.fault("/tree/", answer(200, f"[{','.join(entries)}]".encode()))
        return refusal(Listed("m", "org/m"), server)

    weights = '{"type":"file","path":"model.safetensors","size":%s,"oid":"%s"}'
    assert tree(weights % (-1, "0" * 40)).code == "tree"
    assert tree(weights % (1e30, "0" * 40)).code == "tree"
    assert tree(weights % ('"7"', "0" * 40)).code == "tree"
    assert tree(weights % (7, "../../x")).code == "tree"
    assert tree('{"path":7}').code == "tree"
    assert tree("7").code == "tree"
    bad = weights.replace("model.safetensors", "model/../../../x.safetensors")
    assert tree(bad % (7, "0" * 40)).code == "path_traversal"


def test_a_hub_that_does_not_answer_defers_the_candidate(server: HubServer) -> None:
    server.add("org/m", FILES)
    server.fault("/api/models/org/m", *[answer(500)] * 5)
    assert refusal(Listed("m", "org/m"), server).code == "unreachable"
    server.fault("/api/models/org/m", answer(429, RateLimit='"api";r=0;t=3000'))
    assert refusal(Listed("m", "org/m"), server).code == "ratelimit"


def test_tags_survive_a_listing_that_is_broken_off(server: HubServer, tmp_path: Path) -> None:
    tags = ("base_model:org/base", "base_model:adapter:org/base", "license:mit")
    server.add("org/m0", FILES, tags=tags)
    listing = read_listing(tmp_path / "l", query(server))
    first = next(listing)
    listing.close()
    again = next(read_listing(tmp_path / "l", query(server)))  # from the file: nothing is asked
    assert first == again
    assert first.bases == ("adapter:org/base",)
    assert pin(first, endpoint(server), max_candidate_bytes=1 << 30).bases == first.bases


def test_a_listing_of_another_release_is_made_anew(server: HubServer, tmp_path: Path) -> None:
    server.add("org/m0", FILES)
    with closing(sqlite3.connect(tmp_path / "l")) as db:
        db.executescript(
            "CREATE TABLE listed (number INTEGER PRIMARY KEY, id TEXT UNIQUE, repo TEXT);"
            "CREATE TABLE state (identity TEXT, cursor TEXT, is_done INTEGER, begun REAL);"
        )
    assert [listed.id for listed in read_listing(tmp_path / "l", query(server))] == list(server.repos)
