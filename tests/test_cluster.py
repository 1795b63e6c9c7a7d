"""A cluster that anybody can send jobs to is not joined."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
import ray

from ray_auditor.cluster import cluster
from ray_auditor.config import ClusterConfig


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port


def test_E23_a_sweep_does_not_join_a_cluster_with_an_open_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {"port": free_port(), "dashboard-port": free_port(), "ray-client-server-port": free_port()}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as older releases were
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            "--dashboard-host=0.0.0.0",
            "--num-cpus=1",
            "--disable-usage-stats",
            *(f"--{name}={port}" for name, port in ports.items()),
        ],
        env=os.environ | {"RAY_TMPDIR": "/tmp"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 50
        while True:
            try:
                url = f"http://127.0.0.1:{ports['dashboard-port']}/api/jobs/"
                build_opener(ProxyHandler({})).open(url, timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "Ray did not start"
                time.sleep(0.3)
        config = ClusterConfig(address=f"127.0.0.1:{ports['port']}")
        with (
            pytest.raises(ValueError, match=r"dashboard is open to others, got one at [\d.]+:\d+; start Ray"),
            cluster(config),
        ):
            pass
        assert not ray.is_initialized()
    finally:
        head.terminate()
        head.wait(timeout=30)
