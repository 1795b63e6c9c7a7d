"""The Ray cluster a sweep runs on: started here or joined, and large enough for the workers asked for."""

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil
import ray

from ray_auditor.config import ClusterConfig
from ray_auditor.dashboard import refuse_exposed
from ray_auditor.hub.secret import without_secrets

# Rounds; libgomp's own bound, which is far higher, holds out against whoever needs the core.
SPIN_COUNT = "5000"
LOOK_S = 1.0
ASK_AGAIN_S = 0.1
GONE = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH}  # what says so, besides a timeout
# How long one may not answer. Ray itself ends a process that goes on without its raylet, or for 60 s without
# the head's GCS: on the spot, and with the exit code of findings.
PATIENCE_S = {"raylet": 2.0, "GCS": 30.0}


class ClusterLost(RuntimeError):
    """Ray ended under what ran on it."""


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[int]:
    """A Ray session, local unless an address is given; yields the threads each worker computes with.

    Raises:
        ValueError: The cluster cannot be reached, is open to everybody, or is too small for the workers asked
            for.
        ClusterLost: Within the block: Ray is gone.
    """
    num_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # a sweep is what the user waits for
    if config.address is not None:
        try:
            joined = _start(address=config.address)
        except (ConnectionError, ValueError) as error:
            raise ValueError(
                f"cluster.address must be that of a running Ray cluster, got {config.address!r}: {error}; "
                "start one with `ray start --head`, or leave it out for a local one"
            ) from error
        try:
            refuse_exposed(joined.dashboard_url)
        except ValueError:
            _stop()
            raise
    else:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # which workers inherit
        num_cpus = max(num_cores, round(config.num_workers * config.cpus_per_worker + 0.5))
        _start(address="local", num_cpus=num_cpus, include_dashboard=False)
    try:
        check_resources(config)
        with _watched():
            yield config.threads_per_worker or max(1, num_cores // config.num_workers)
    finally:
        _stop()


def _start(**settings: Any) -> Any:
    """Start or join Ray; whoever handled a SIGTERM still does, though Ray puts itself in their place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with without_secrets():  # what Ray starts keeps its environment for as long as it runs
            return ray.init(**settings, log_to_driver=False, logging_level="ERROR")
    except BaseException as error:
        _stop()
        if isinstance(error, SystemExit) and callable(before):  # Ray's own handler
            before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop() -> None:
    """End Ray, or leave it; SIGTERM, which Ray then handles no more, goes to whom it went to before.

    What the raylet started is ended too: its agents, when they are no older than a few seconds, would look
    for Ray for another minute.
    """
    before = signal.getsignal(signal.SIGTERM)
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    started = [one for raylet in raylets for one in (raylet, *raylet.children(recursive=True))]
    try:
        ray.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)
        for one in started:
            with suppress(psutil.Error):
                one.kill()


@contextmanager
def _watched() -> Iterator[None]:
    """Raise ClusterLost in the block, which is the main thread's, when one of Ray's servers is gone.

    Every LOOK_S until the block has ended, for what it runs may swallow an exception. A SIGUSR2 from others
    goes to the handler that was there before.
    """
    servers = servers_in_reach()
    lost: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        seen = dict.fromkeys(servers, time.monotonic())
        while not ended.wait(LOOK_S):
            for name, (host, port) in servers.items():
                if _answers((host, port)):
                    seen[name] = time.monotonic()
                elif time.monotonic() - seen[name] > PATIENCE_S[name]:
                    lost.append(_gone(name, (host, port)))
                    while not ended.is_set():
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                        ended.wait(LOOK_S)
                    return

    def leave(number: int, frame: FrameType | None) -> None:
        if lost and not ended.is_set():
            raise ClusterLost(lost[0])
        if not lost and callable(before):
            before(number, frame)

    before = signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, leave)
    watcher = threading.Thread(target=watch, name="ray", daemon=True)
    watcher.start()
    try:
        yield
    except SystemError as error:  # of which Ray's compiled code makes what a signal's handler raised in it
        if isinstance(error.__cause__, (ClusterLost, KeyboardInterrupt)):
            raise error.__cause__ from None
        raise
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, before)


def servers_in_reach() -> dict[str, tuple[str, int]]:
    """By name, the addresses of the servers without which this process cannot go on."""
    return {name: address for name, address in _servers() if _answers(address)}


def check_raylet(servers: Mapping[str, tuple[str, int]]) -> None:
    """Check that this process may ask Ray for more: without its raylet that would end it.

    Raises:
        ClusterLost: The raylet is gone.
    """
    if "raylet" not in servers or _answers(servers["raylet"]):
        return
    time.sleep(ASK_AGAIN_S)
    if not _answers(servers["raylet"]):
        raise ClusterLost(_gone("raylet", servers["raylet"]))


def _gone(name: str, address: tuple[str, int]) -> str:
    return (
        f"Ray's {name} at {address[0]}:{address[1]} is gone: killed, out of memory, or with its machine; "
        "what was committed is kept; run the same command again to go on"
    )


def _servers() -> Iterator[tuple[str, tuple[str, int]]]:
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    yield "GCS", (host.strip("[]"), int(port))
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            yield "raylet", (node["NodeManagerAddress"], node["NodeManagerPort"])


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1.0).close()
    except TimeoutError:
        return False
    except OSError as error:  # no file descriptors left, say, is nothing that the server did
        return error.errno not in GONE
    return True


def check_resources(config: ClusterConfig) -> None:
    """Check that every worker asked for can start, for an actor that cannot would wait without a word."""
    for resource, each, setting in (
        ("CPU", config.cpus_per_worker, "cpus_per_worker"),
        ("GPU", config.gpus_per_worker, "gpus_per_worker"),
    ):
        has, wanted = ray.cluster_resources().get(resource, 0.0), config.num_workers * each
        if wanted > has:
            raise ValueError(
                f"cluster.num_workers x cluster.{setting} must be at most the cluster's {has:g} {resource}s, "
                f"got {config.num_workers} x {each:g}; lower one of them"
            )
    kinds, wanted_kind = device_kinds(), config.accelerator_type
    if wanted_kind is not None and wanted_kind not in kinds:
        raise ValueError(
            f"cluster.accelerator_type must be one of the cluster's {kinds}, got {wanted_kind!r}; correct it"
        )
    if config.gpus_per_worker and wanted_kind is None and len(kinds) > 1:
        raise ValueError(
            f"cluster.accelerator_type must be given in a cluster of several kinds, {kinds}; choose one, for "
            "cards differ in their last bits"
        )


def device_kinds() -> list[str]:
    """The kinds of GPU in the running cluster, by Ray's names."""
    prefix = "accelerator_type:"
    return sorted(name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix))
