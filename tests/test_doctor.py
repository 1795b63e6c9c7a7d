"""The doctor on this machine, and on one where something is wrong."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from ray_auditor import dashboard as dashboard_room
from ray_auditor import doctor
from ray_auditor.__main__ import main
from ray_auditor.candidates_config import CandidatesConfig, DownloadConfig, Source
from ray_auditor.config import AuditConfig, ClusterConfig
from ray_auditor.dashboard import probe_dashboard
from ray_auditor.doctor import FLOORS, VLLM_FLOOR, Check, check_dashboard, check_version


def config(tmp_path: Path, **changes: Any) -> AuditConfig:
    return AuditConfig(out_dir=str(tmp_path / "out"), **changes)


def wrong(group: Any, config: AuditConfig) -> list[Check]:
    found: list[Check] = [check for check in group(config) if not check.ok]
    assert all(check.remedy for check in found)
    return found


@contextmanager
def dashboard(monkeypatch: pytest.MonkeyPatch, status: int, host: str) -> Iterator[None]:
    """A real server where Ray's would listen, that answers every stranger with a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    monkeypatch.setattr(dashboard_room, "PORT", server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def test_every_line_holds_here_or_names_its_remedy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", f"out_dir={tmp_path / 'out'}"])
    lines = capfd.readouterr().out.splitlines()
    subjects = " ".join(lines)
    for what in ("python", "vllm", "kernel", "disk at", "commits", "ray dashboard", "hub", "assertions"):
        assert what in subjects
    bad = [line for line in lines if line.startswith("wrong")]
    assert all("; " in line for line in bad)
    assert code == (2 if bad else 0)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())  # what it tried, it removed


def test_something_wrong_is_a_code_that_is_not_zero(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = tmp_path / "file"
    sink.write_text("")
    assert main(["doctor", f"out_dir={sink}", "cluster.gpus_per_worker=99"]) == 2
    assert {"wrong gpu", "wrong out_dir"} <= {
        line.partition(":")[0] for line in capfd.readouterr().out.splitlines()
    }


@pytest.mark.parametrize("floor", [*FLOORS, VLLM_FLOOR], ids=lambda floor: floor.package)
def test_a_version_below_its_floor_is_wrong_and_says_why(floor: Any) -> None:
    at = ".".join(map(str, floor.version))
    below = ".".join(map(str, (*floor.version[:-1], floor.version[-1] - 1))) if floor.version[-1] else "0.9"
    assert check_version(floor, at).ok
    assert check_version(floor, f"{at}.99+cpu").ok
    check = check_version(floor, f"{below}.99rc1")
    assert not check.ok
    assert floor.why in check.remedy
    assert f"{floor.package}>={at}" in check.remedy
    assert not check_version(floor, None).ok


def test_E25_a_longer_version_is_no_older_one() -> None:
    floor = next(floor for floor in FLOORS if len(floor.version) == 3)
    major, minor, patch = floor.version
    assert check_version(floor, f"{major}.{minor + 1}").ok
    assert not check_version(floor, f"{major}.{minor}.{patch - 1}.post1").ok


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        ({"10.0.0.7": "open"}, False),
        ({"127.0.0.1": "open", "10.0.0.7": "open"}, False),
        ({"127.0.0.1": "open", "10.0.0.7": "closed"}, True),
        ({"10.0.0.7": "token"}, True),
        ({"localhost": "open"}, True),
        ({"127.0.0.1": "closed"}, True),
    ],
)
def test_E23_a_dashboard_that_others_reach_without_a_token_is_wrong(found: dict[str, str], ok: bool) -> None:
    check = check_dashboard(found)
    assert check.ok == ok
    assert ok or "RAY_AUTH_MODE=token" in check.remedy


def test_E23_the_dashboard_of_the_cluster_in_the_settings_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("ray://127.0.0.2:10001", "127.0.0.2:6379"):
        far = config(tmp_path, cluster=ClusterConfig(address=address))
        with dashboard(monkeypatch, 401, "127.0.0.2"):
            (check,) = doctor._ray(far)
            assert check.found == "asks for a token"
            (here,) = doctor._ray(config(tmp_path))
            assert here.found == "none answers"


def test_a_dashboard_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, said in ((200, "open"), (401, "token"), (403, "token"), (404, "closed")):
        with dashboard(monkeypatch, status, "127.0.0.1"):
            assert probe_dashboard("127.0.0.1") == said
    assert probe_dashboard("127.0.0.1") == "closed"


@pytest.mark.parametrize("fault", ["refused", "ignored"])
def test_E12_a_store_that_does_not_refuse_a_second_writer_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    assert not wrong(doctor._store, config(tmp_path))

    def link(first: Path, second: Path) -> None:
        if fault == "refused":
            raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    (check,) = wrong(doctor._store, config(tmp_path))
    assert check.what == "commits"
    assert "out_dir" in check.remedy


def test_a_full_disk_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wrong(doctor._machine, config(tmp_path))
    remote = config(
        tmp_path,
        candidates=CandidatesConfig(source=Source.hub, author="org"),
        download=DownloadConfig(min_free_bytes=1 << 60),
    )
    (check,) = wrong(doctor._machine, remote)
    assert "download.cache_dir" in check.remedy
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    assert ["out_dir" in check.remedy for check in wrong(doctor._machine, config(tmp_path))] == [True]


def test_the_token_is_never_shown_and_never_sent_in_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sentinel")
    assert not wrong(doctor._hub, config(tmp_path))
    main(["doctor", f"out_dir={tmp_path / 'out'}"])
    shown = capfd.readouterr()
    assert "a token is set" in shown.out
    assert "sentinel" not in shown.out + shown.err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://user:pw@mirror.example:8080")
    (check,) = wrong(doctor._hub, config(tmp_path))
    assert "https" in check.remedy
    assert "pw" not in check.found
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert not wrong(doctor._hub, config(tmp_path)) or huggingface_hub.get_token()


def test_offline_mode_is_wrong_for_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not [check for check in wrong(doctor._hub, config(tmp_path)) if check.what == "offline mode"]
    asks = config(tmp_path, candidates=CandidatesConfig(source=Source.hub, author="org"))
    assert [check.what for check in wrong(doctor._hub, asks)] == ["offline mode"]
