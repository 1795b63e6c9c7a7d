"""What a hub's size costs: listing a million candidates, and a night in which none of 100,000 is new.

Usage: `python benchmarks/bench_listing.py [--listed 1000000] [--unchanged 100000] [--out FILE]`. The hub is
a server on loopback that makes its pages up; what is measured is a process of its own, so its memory is its
own. Half of the listing is also done by a process that is killed, and the rest by another: the ids must be
the same.

The night runs `ray-auditor sweep` over a manifest of pinned repositories whose units are committed. The units
are made up too, by the store's own writer without its syncs: no engine runs.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LIMIT_RSS_MB, LIMIT_NIGHT_S = 300, 120


class MadeUpHub(BaseHTTPRequestHandler):
    """Lists `num` models in pages of 1000; nothing is kept."""

    protocol_version = "HTTP/1.1"
    num = 0
    num_requests = 0

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """One page."""
        type(self).num_requests += 1
        query = parse_qs(urlsplit(self.path).query)
        start = int(base64.b64decode(query["cursor"][0])) if "cursor" in query else 0
        stop = min(start + 1000, self.num)
        page = [
            {"_id": f"{i:024x}", "id": f"org{i % 9973}/model-{i:07}", "sha": sha(i)}
            for i in range(start, stop)
        ]
        body = json.dumps(page).encode()
        self.send_response(200)
        if stop < self.num:
            cursor = base64.b64encode(b"%d" % stop).decode().replace("=", "%3D")
            host, port = self.server.server_address[:2]
            url = f"http://{host!s}:{port}/api/models?author=org&limit=1000&cursor={cursor}"
            self.send_header("Link", f'<{url}>; rel="next"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def sha(number: int) -> str:
    return hashlib.sha1(b"%d" % number).hexdigest()


LIST = """
import hashlib, os, resource, sys, time
from pathlib import Path
from ray_auditor.hub.endpoint import Endpoint
from ray_auditor.hub.hub_query import HubQuery
from ray_auditor.hub.listing import read_listing
from ray_auditor.hub.rate_limit import RateLimit
url, path, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
query = HubQuery(Endpoint(url, None, RateLimit()), author="org", tags=[], base_model=None, relations=[],
                 search=None, sort=None, include=[], exclude=[])
begun, digest, num = time.perf_counter(), hashlib.sha256(), 0
for listed in read_listing(path, query):
    digest.update(f"{listed.id} {listed.revision}\\n".encode())
    num += 1
    if num == kill_at:
        os.kill(os.getpid(), 9)
rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(num, digest.hexdigest(), time.perf_counter() - begun, rss_mb)
"""


def bench_listing(num: int, work: Path) -> dict[str, Any]:
    """List once in one go, and once in two halves."""
    MadeUpHub.num, MadeUpHub.num_requests = num, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), MadeUpHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"

    def run(name: str, kill_at: int) -> tuple[int, list[str]]:
        arguments = [sys.executable, "-c", LIST, url, str(work / name), str(kill_at)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment(url), check=False)
        if not done.stdout and done.returncode != -signal.SIGKILL:
            raise RuntimeError(done.stderr)
        return done.returncode, done.stdout.split()

    _, whole = run("whole", -1)
    code, _ = run("halves", num // 2)
    assert code == -signal.SIGKILL, "the first half was not killed"
    before = MadeUpHub.num_requests
    _, rest = run("halves", -1)
    server.shutdown()
    expected = hashlib.sha256()
    for i in range(num):
        expected.update(f"org{i % 9973}/model-{i:07} {sha(i)}\n".encode())
    seconds, rss_mb = float(whole[2]), max(float(whole[3]), float(rest[3]))
    return {
        "num_listed": num,
        "seconds": seconds,
        "items_per_s": num / seconds,
        "peak_rss_mb": rss_mb,
        "file_mb": (work / "whole").stat().st_size / 2**20,
        "pages_after_the_kill": MadeUpHub.num_requests - before,
        "same": whole[:2] == rest[:2] == [str(num), expected.hexdigest()],
    }


def environment(url: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {
        "PYTHONPATH": path,
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }


def bench_night(num: int, work: Path) -> dict[str, Any]:
    """Sweep twice over units that are all there: the second finds the conclusion drawn."""
    MadeUpHub.num_requests = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), MadeUpHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    arguments, made_s = make_units(num, work, url)

    def night() -> tuple[float, float, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ray_auditor", "sweep", *arguments],
            env=environment(url),
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout[-4000:])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - begun, cpu_s, after.ru_maxrss / 1024

    first, second = night(), night()
    server.shutdown()
    summary = json.loads((work / "out" / "summary.json").read_bytes())
    assert len(summary["candidates"]) == num, "not every candidate has its row"
    return {
        "num_unchanged": num,
        "units_made_s": made_s,
        "first_conclusion_s": first[0],
        "seconds": second[0],
        "cpu_s": second[1],
        "peak_rss_mb": second[2],
        "requests": MadeUpHub.num_requests,
        "whys": sorted({row["why"] for row in summary["candidates"]}),
    }


def make_units(num: int, work: Path, url: str) -> tuple[list[str], float]:
    """A store with a unit a candidate, a ledger that knows them all, and the command that audits them."""
    import numpy as np

    from ray_auditor import durable_file
    from ray_auditor.__main__ import config_dir
    from ray_auditor.config import AuditConfig, register_schemas
    from ray_auditor.hub.remote import Listed, choose_files
    from ray_auditor.intake import admission_class_of
    from ray_auditor.ledger import Admission
    from ray_auditor.plan import make_plan
    from ray_auditor.store import TokenRows

    sys.path.insert(0, str(ROOT))
    from tests.test_sweep import Hub

    hub = Hub(work)
    manifest = work / "candidates.jsonl"
    manifest.touch()
    arguments = [one for one in hub.arguments if not one.startswith("candidates.")]
    arguments += ["candidates=manifest", f"candidates.path={manifest}"]
    plan = make_plan(compose(arguments, AuditConfig, config_dir(), register_schemas))
    sizes = [len(suite.prompts) for suite in plan.suites.suites]
    owners = [(suite, prompt) for suite, size in enumerate(sizes) for prompt in range(size)]
    suite_N = np.repeat(np.array([suite for suite, _ in owners], np.int16), 4)
    prompt_N = np.repeat(np.array([prompt for _, prompt in owners], np.int32), 4)
    position_N = np.tile(np.arange(1, 5, dtype=np.int32), len(owners))
    rng = np.random.default_rng(0)

    def rows(seed: int) -> TokenRows:
        idx = np.sort((np.arange(plan.k) * 7 + rng.integers(0, 7, (len(suite_N), plan.k))), axis=1)
        ones = np.ones(len(suite_N), np.float32)
        acts = np.ones(idx.shape, np.float32)
        same = seed < 0
        change = ones * (0.0 if same else 0.1)
        return TokenRows(
            suite_N,
            prompt_N,
            position_N,
            idx.astype(np.int32),
            acts,
            ones,
            2 * ones,
            ones * (1 if same else 0.9),
            change,
        )

    begun = time.perf_counter()
    durable_file.os.fsync = lambda _: None  # type: ignore[attr-defined, assignment]
    for unit in (plan.base_unit, plan.replay_unit):
        plan.store.commit(unit, rows(-1), {"name": "made up"})
    layers = int(plan.base_unit.hook_name.split(".")[1]) + 1
    known_as = admission_class_of(plan.base, layers, plan.config.engine.max_lora_rank)
    with manifest.open("w") as lines:
        for i in range(num):
            repo, commit = f"org/model-{i:07}", sha(i)
            content = hashlib.sha256(b"%d" % i).hexdigest()
            found = {"adapter_config.json": (500, sha(-i)), "adapter_model.safetensors": (1 << 20, content)}
            plan.ledger.keep_pin(url, repo, commit, found)
            pinned = choose_files(Listed(repo, repo), commit, found, max_candidate_bytes=1 << 40)
            admission = Admission("admitted", None, "adapter", content)
            plan.ledger.keep_admission(pinned.key, known_as, admission)
            plan.store.commit(replace(plan.base_unit, candidate_key=content), rows(i), {"name": repo})
            lines.write(json.dumps({"repo": repo, "revision": commit}) + "\n")
    plan.ledger.commit()
    return arguments, time.perf_counter() - begun


def compose(arguments: list[str], schema: type, conf: Path, register: Any) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    register()
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = OmegaConf.to_object(hydra_compose("config", overrides=arguments))
    assert isinstance(config, schema)
    return config


def claim(name: str, value: Any, target: Any, met: bool) -> dict[str, Any]:
    device = f"cpu ({platform.machine()}), {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return {"name": name, "value": value, "target": target, "met": met, "device": device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listed", type=int, default=1_000_000)
    parser.add_argument("--unchanged", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    date = datetime.now(UTC)
    result: dict[str, Any] = {"date": date.isoformat(timespec="seconds"), "claims": []}
    with TemporaryDirectory(prefix="bench-listing-") as work:
        if args.listed:
            listing = result["listing"] = bench_listing(args.listed, Path(work))
            rss_mb = round(listing["peak_rss_mb"], 1)
            result["claims"] += [
                claim(
                    f"peak MB of listing {args.listed} candidates",
                    rss_mb,
                    LIMIT_RSS_MB,
                    rss_mb <= LIMIT_RSS_MB,
                ),
                claim(
                    "a listing killed in the middle and taken up again has the same candidates",
                    listing["same"],
                    True,
                    listing["same"],
                ),
            ]
        if args.unchanged:
            night = result["night"] = bench_night(args.unchanged, Path(work))
            seconds = round(night["seconds"], 1)
            result["claims"] += [
                claim(
                    f"seconds of a night over {args.unchanged} unchanged candidates",
                    seconds,
                    LIMIT_NIGHT_S,
                    seconds <= LIMIT_NIGHT_S,
                ),
                claim("requests of that night", night["requests"], 0, night["requests"] == 0),
            ]
    out = args.out or ROOT / "benchmarks" / "results" / f"listing_CPU_{date.date()}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
