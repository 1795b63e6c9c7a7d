"""A cluster that anybody can send jobs to is not joined."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

# In a process of its own: Ray keeps the first authentication mode it sees for as long as a process lives.
JOIN = """
import sys
import ray
from ray_auditor.cluster import cluster
from ray_auditor.config import ClusterConfig
try:
    with cluster(ClusterConfig(address=sys.argv[1])):
        print("joined")
except ValueError as error:
    print("still connected" if ray.is_initialized() else error)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port


def test_E23_a_sweep_does_not_join_a_cluster_with_an_open_dashboard() -> None:
    ports = {"port": free_port(), "dashboard-port": free_port(), "ray-client-server-port": free_port()}
    environment = os.environ | {"RAY_TMPDIR": "/tmp", "RAY_AUTH_MODE": "disabled"}  # as older releases were
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
        env=environment,
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
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, f"127.0.0.1:{ports['port']}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert re.search(r"dashboard is open to others, got one at [\d.]+:\d+; start Ray", joined.stdout)
    finally:
        head.terminate()
        head.wait(timeout=30)
