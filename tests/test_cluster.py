"""A cluster that anybody can send jobs to is not joined, and one that ends under a sweep is named."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest
import ray

from ray_auditor.cluster import SPIN_COUNT, ClusterLost, check_raylet, cluster
from ray_auditor.config import ClusterConfig
from tests.test_sweep import Hub
from tests.tiny import make_adapter

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

LOSE = """
import signal
import time
from ray_auditor import cluster
from ray_auditor.config import ClusterConfig
signal.signal(signal.SIGUSR2, lambda *_: print("handed on", flush=True))
cluster.PATIENCE_S = dict.fromkeys(cluster.PATIENCE_S, 1.0)
try:
    with cluster.cluster(ClusterConfig()):
        print("begun", flush=True)
        try:
            time.sleep(60)
        except cluster.ClusterLost:
            print("swallowed")
        try:
            time.sleep(60)
        except cluster.ClusterLost as error:
            raise SystemError("as Ray's compiled code may make of it") from error
except cluster.ClusterLost as error:
    print(error)
"""

STOP = """
import sys
import time
from ray_auditor.cluster import cluster
from ray_auditor.config import ClusterConfig
from ray_auditor.interrupt import INTERRUPTED, run_interruptibly
def main():
    try:
        with cluster(ClusterConfig()):
            print("begun", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        return INTERRUPTED
sys.exit(run_interruptibly(main))
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


def kill_server(parent: int, name: str) -> None:
    """Kill one of the servers of the Ray that a process started."""
    (server,) = (one for one in psutil.Process(parent).children() if one.name() == name)
    server.kill()


def test_the_end_of_rays_head_is_named() -> None:
    sweep = subprocess.Popen([sys.executable, "-c", LOSE], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    assert sweep.stdout.readline() == "begun\n"
    sweep.send_signal(signal.SIGUSR2)  # as Slurm does before the time is up
    assert sweep.stdout.readline() == "handed on\n"
    kill_server(sweep.pid, "gcs_server")
    said, _ = sweep.communicate(timeout=50)
    assert said.startswith("swallowed\n")
    assert re.search(r"^Ray's GCS at [\d.]+:\d+ is gone: .* run the same command again to go on$", said, re.M)
    assert sweep.returncode == 0


@pytest.mark.parametrize("while_it_starts", [True, False])
def test_a_terminated_sweep_ends_with_143_and_leaves_no_process(while_it_starts: bool) -> None:
    sweep = subprocess.Popen(
        [sys.executable, "-c", STOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert sweep.stdout is not None
    assert sweep.stderr is not None
    itself, started = psutil.Process(sweep.pid), set()
    if while_it_starts:
        while "raylet" not in {one.name() for one in itself.children()}:
            time.sleep(0.01)
    else:
        assert sweep.stdout.readline() == "begun\n"
    sweep.terminate()
    deadline = time.monotonic() + 40
    while sweep.poll() is None and time.monotonic() < deadline:
        with suppress(psutil.Error):
            started |= set(itself.children(recursive=True))
        time.sleep(0.01)
    assert sweep.returncode == 143
    assert sweep.stderr.read() == ""
    assert len(started) >= 2
    # Ray's agents alone look for it for a minute: one that the raylet begins as it is ended still does
    _, alive = psutil.wait_procs(started, timeout=90 if while_it_starts else 10)
    assert not alive


def test_only_what_does_not_answer_twice_is_gone() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        servers = {"raylet": server.getsockname()}
        with pytest.raises(ClusterLost, match="Ray's raylet at"):
            check_raylet(servers)
        most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            check_raylet(servers)  # nobody can be asked
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        late = threading.Timer(0.02, server.listen)
        late.start()
        check_raylet(servers)
        late.join()


def test_a_sweep_whose_raylet_dies_says_so_and_goes_on_when_run_again(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    for number in range(5):
        make_adapter(hub.candidates / f"c{number}", hub.base, seed=number, scale=0.02)
    command = [sys.executable, "-m", "ray_auditor", "sweep", *hub.arguments]
    sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    commits = hub.out / "store" / "commits"
    deadline = time.monotonic() + 50
    while not commits.is_dir() or len(list(commits.iterdir())) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [
        one for one in psutil.Process(sweep.pid).children(recursive=True) if one.name().startswith("ray::")
    ]
    assert workers
    for worker in workers:
        worker.suspend()  # else a fast machine is done before anything is noticed
    kill_server(sweep.pid, "raylet")
    for worker in workers:
        worker.kill()
    _, said = sweep.communicate(timeout=50)
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert re.search(r"Ray's raylet at .* is gone: .* run the same command again to go on$", line)
    assert sweep.returncode == 2  # not 1, which says findings
    assert not hub.out.joinpath("summary.json").exists()
    before = hub.commits
    assert len(before) >= 3
    assert hub.sweep() in (0, 1)
    assert {name: hub.commits[name] for name in before} == before
    assert len(hub.commits) == 7


def test_a_local_worker_gives_its_core_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with cluster(ClusterConfig()):
        told = ray.remote(lambda: os.environ.get("GOMP_SPINCOUNT"))
        assert ray.get(told.remote()) == SPIN_COUNT
    os.environ.pop("GOMP_SPINCOUNT")
