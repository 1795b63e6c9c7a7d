"""What Ray's own metrics port says of a sweep, scraped from a running cluster."""

import re
import socket
import time
import urllib.request

import ray

from ray_auditor.ray_metrics import RayMetrics
from ray_auditor.work import Ran, Work


def scrape(port: int) -> dict[str, float]:
    """Samples of ours: name, part and worker -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith("ray_auditor_")]
    found = {}
    for line in lines:
        name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[" ".join([name, *(of[key] for key in ("worker", "part") if key in of)])] = float(value)
    return found


def test_ray_s_port_has_what_every_worker_did() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port
    )
    try:
        work = Work()
        told = RayMetrics(work)
        told.add(Ran("a", 10, 100, {"forward": 1.5, "write": 0.25, "start": 0.0}))
        told.add(Ran("a", 10, 100, {"forward": 0.5, "write": 0.25}))
        told.add(Ran("b", 10, 0, {"forward": 1.0}))
        wanted = {
            "ray_auditor_work_seconds_total a forward": 2.0,
            "ray_auditor_work_seconds_total a write": 0.5,
            "ray_auditor_work_seconds_total b forward": 1.0,
            "ray_auditor_work_units_total a": 2.0,
            "ray_auditor_work_units_total b": 1.0,
            "ray_auditor_work_tokens_total a": 20.0,
            "ray_auditor_work_tokens_total b": 10.0,
            "ray_auditor_work_weight_bytes_total a": 200.0,
        }
        found: dict[str, float] = {}
        deadline = time.monotonic() + 50
        while found != wanted and time.monotonic() < deadline:
            time.sleep(1.0)
            try:
                found = scrape(port)
            except OSError:
                continue
        assert found == wanted
        described = work.describe()
        assert described is not None
        assert described["total"]["num_units"] == 3
    finally:
        ray.shutdown()
