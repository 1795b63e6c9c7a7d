"""Nights in the life of an audit: a hub on loopback, faults of every kind, and what is new each time."""

import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import psutil
import pytest
import ray

from ray_auditor.__main__ import main
from ray_auditor.lease import Lease
from tests.hub.hub_server import HubServer, answer, garble, serving, stall
from tests.test_sweep import Hub, plant_digits
from tests.tiny import make_adapter, make_model

SECRET = f"sentinel{uuid.uuid4().hex}"  # other tests on this machine have other ones
TOKEN, AWS_KEY = f"hf_{SECRET}", f"aws+{SECRET}"


@contextmanager
def watching(shown_by: dict[int, str]) -> Iterator[None]:
    """Note what every process of this machine shows of the secret meanwhile."""
    ended = threading.Event()

    def look() -> None:
        for process in psutil.process_iter():
            try:
                shown = repr(process.cmdline())
                if process.pid != os.getpid():
                    shown += repr(process.environ())
            except (psutil.Error, OSError):
                continue
            if SECRET in shown:
                shown_by[process.pid] = shown

    def watch() -> None:
        look()
        while not ended.wait(0.2):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class Nights:
    """A hub's server, a tiny base, and one sweep after the other in one folder."""

    def __init__(self, root: Path, server: HubServer) -> None:
        self.server, self.hub = server, Hub(root)
        self.arguments = [one for one in self.hub.arguments if not one.startswith("candidates.path=")] + [
            "candidates=hub",
            "candidates.author=org",
            "download.stall_s=6",
            "download.max_attempts=2",
            "download.min_free_bytes=0",
            "download.num_parallel=2",
        ]
        self.processes: dict[int, str] = {}

    def sweep(self, *more: str) -> int:
        """Run a sweep under watch."""
        self.server.requests.clear()
        with watching(self.processes):
            return main(["sweep", *self.arguments, *more])

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.hub.summary["candidates"]}

    @property
    def fetched(self) -> set[str]:
        """Repositories whose files were asked for."""
        return {
            path[1:].partition("/resolve/")[0] for path in self.server.requests if path.startswith("/org")
        }


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    root = tmp_path_factory.mktemp("nights")
    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name, value in (("HF_TOKEN", TOKEN), ("AWS_SECRET_ACCESS_KEY", AWS_KEY), ("HF_HUB_OFFLINE", "0")):
        patch.setenv(name, value)
    with serving(HubServer(token=TOKEN)) as server:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        nights = Nights(root, server)
        base = nights.hub.base
        adapter = make_adapter(root / "one", base, seed=1, scale=0.02)
        (adapter / "modeling_evil.py").write_text("import os; os.abort()")
        server.add("org/one", adapter)
        server.add("org/again", adapter)
        plant_digits(root / "planted", base)
        server.add("org/planted", root / "planted")
        server.add("org/corrupt", make_adapter(root / "corrupt", base, seed=2, scale=0.02))
        server.add("org/stalls", make_adapter(root / "stalls", base, seed=3, scale=0.02))
        server.add("org/narrow", make_model(root / "narrow", hidden_size=32, seed=6))
        server.add("org/pickled", {"pytorch_model.bin": b"cos\nsystem\n(S'touch /tmp/owned'\ntR."})
        server.add("org/gated", root / "one")
        server.repos["org/gated"].gated = True
        listed = server.list_models
        server.list_models = lambda query: [*listed(query), {"id": "org/gone", "sha": "a" * 40}]
        server.fault("/resolve/", answer(503), answer(429, RateLimit='"resolvers";r=0;t=1'))
        server.fault("org/corrupt/resolve", *[garble] * 9)
        server.fault("org/stalls/resolve", *[stall(10)] * 9)
        yield nights
    patch.undo()


@pytest.fixture(scope="module")
def first(nights: Nights) -> dict[str, dict[str, Any]]:
    """The first night."""
    assert nights.sweep() == 2
    return nights.rows()


@pytest.fixture(scope="module")
def second(nights: Nights, first: object) -> dict[str, dict[str, Any]]:
    """The second: a README, other weights, a repository that is new, and no more faults."""
    root, server = nights.hub.root, nights.server
    server.faults.clear()
    server.add("org/one", {**server.repos["org/one"].commits[-1][1], "README.md": b"better words"})
    server.add("org/again", make_adapter(root / "other", nights.hub.base, seed=4, scale=0.02))
    server.add("org/copy", root / "planted")
    assert nights.sweep() == 1
    return nights.rows()


def test_every_listed_repository_has_its_row(first: dict[str, dict[str, Any]]) -> None:
    statuses = {name: row["status"] for name, row in first.items()}
    assert statuses.pop("org/planted") == "flagged"
    assert statuses.pop("org/one") == statuses.pop("org/again") in {"ok", "flagged"}
    assert statuses == {
        "org/corrupt": "failed",
        "org/stalls": "deferred",
        "org/narrow": "rejected",
        "org/pickled": "skipped",
        "org/gated": "skipped",
        "org/gone": "skipped",
    }
    reasons = {name: str(row["reason"]) for name, row in first.items()}
    assert reasons["org/stalls"].startswith("deferred:stall: ")
    assert reasons["org/gated"].startswith("skipped:gated: ")
    assert reasons["org/gone"].startswith("skipped:gone: ")
    assert "modeling_evil.py" in reasons["org/one"]
    assert {row["why"] for row in first.values()} == {"new"}


def test_one_content_under_two_names_is_one_unit(nights: Nights, first: dict[str, dict[str, Any]]) -> None:
    assert first["org/one"]["unit_key"] == first["org/again"]["unit_key"]
    assert first["org/one"]["suites"] == first["org/again"]["suites"]


def test_the_second_night_fetches_and_audits_what_changed(
    nights: Nights, first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]
) -> None:
    assert {name: row["why"] for name, row in second.items()} == {
        "org/one": "unchanged",  # but for its README
        "org/planted": "unchanged",
        "org/copy": "new",
        "org/again": "changed weights",
        "org/corrupt": "policy retry",
        "org/stalls": "policy retry",
        "org/narrow": "unchanged",
        "org/pickled": "unchanged",
        "org/gated": "unchanged",
        "org/gone": "unchanged",
    }
    assert nights.fetched == {"org/again", "org/corrupt", "org/stalls"}
    assert second["org/one"]["suites"].keys() == first["org/one"]["suites"].keys()
    assert second["org/copy"]["unit_key"] == first["org/planted"]["unit_key"]
    # The first night ended with 2, which says nothing of findings: what it found is still new.
    assert {"org/copy", "org/planted"} <= {flag["candidate"] for flag in nights.hub.summary["flags"]}
    assert all(flag["new"] for flag in nights.hub.summary["flags"])
    assert len(nights.hub.commits) == 2 + 2 + 3


def test_a_night_without_news_moves_nothing_and_does_not_alert(
    nights: Nights, second: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a night without news needs no cluster")

    commits = nights.hub.commits
    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", refuse)
        assert nights.sweep("flag.only_new=true") == 0
        assert nights.fetched == set()
        assert nights.server.count("/tree/") == 2  # of what is gated, and of what is gone
        assert {row["why"] for row in nights.rows().values()} == {"unchanged"}
        assert not any(flag["new"] for flag in nights.hub.summary["flags"])
        assert nights.sweep() == 1  # the findings stand
    assert nights.hub.commits == commits
    shutil.rmtree(nights.hub.out / "cache")  # what was fetched is not needed any more
    assert nights.sweep("flag.only_new=true") == 0


def test_the_second_sweep_of_a_folder_touches_nothing(
    nights: Nights, second: object, capfd: pytest.CaptureFixture[str]
) -> None:
    def look() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in nights.hub.out.rglob("*") if path.is_file()}

    with Lease(nights.hub.out):
        before = look()
        assert nights.sweep() == 2
        assert main(["plan", *nights.arguments]) == 2
        assert look() == before
    assert f"is being swept by process {os.getpid()} on " in capfd.readouterr().err
    assert not nights.server.requests


def test_plan_says_what_would_be_fetched(
    nights: Nights, second: object, capfd: pytest.CaptureFixture[str]
) -> None:
    nights.server.add("org/tomorrow", make_adapter(nights.hub.root / "t", nights.hub.base, seed=9))
    try:
        assert main(["plan", *nights.arguments]) == 0
    finally:
        del nights.server.repos["org/tomorrow"]
    shown = capfd.readouterr().out
    assert "fetch, admit, audit" in shown
    assert "1 fetch, admit, audit" in shown


def test_a_token_that_is_not_accepted_is_a_usage_error(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}wrong")
    assert main(["plan", *nights.arguments]) == 4
    said = capfd.readouterr()
    assert "HF_TOKEN must be a token" in said.err
    assert SECRET not in said.err + said.out


def test_a_hub_that_does_not_answer_ends_the_night(
    nights: Nights, second: object, capfd: pytest.CaptureFixture[str]
) -> None:
    nights.server.fault("/api/models?", answer(429, Retry_After="9999"))
    assert nights.sweep() == 2
    assert "no request for api in the next 9999 s" in capfd.readouterr().err


@pytest.mark.usefixtures("second")
def test_no_secret_is_written_or_shown_anywhere(nights: Nights) -> None:
    assert f"Bearer {TOKEN}" in nights.server.seen_tokens  # it was used
    assert not nights.server.cdn_tokens
    assert nights.processes == {}  # no command line, and no environment of any other process
    logs = list(Path("/tmp/ray").glob(f"session_*_{os.getpid()}"))
    assert len(logs) >= 2
    written = [path for root in (nights.hub.out, *logs) for path in root.rglob("*") if path.is_file()]
    for path in written:
        data = path.read_bytes()
        assert SECRET.encode() not in data, path


def test_a_process_that_shows_the_secret_is_seen_and_another_test_s_is_not() -> None:
    shown_by: dict[int, str] = {}
    environments = ({"HF_TOKEN": TOKEN}, {"HF_TOKEN": "hf_sentinelsentinelsentinel"})
    processes = [subprocess.Popen(["sleep", "60"], env=one, start_new_session=True) for one in environments]
    with watching(shown_by):
        pass
    for process in processes:
        process.kill()
        process.wait()
    assert shown_by.keys() == {processes[0].pid}
