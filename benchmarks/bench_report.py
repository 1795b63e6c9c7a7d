"""What the report of a hub's worth of candidates weighs and how fast it opens, in a real Chromium.

Usage: `python benchmarks/bench_report.py [--candidates 100000] [--out FILE]`. The sweep is made up, as in the
tests, with 12 suites and with 24. Opening is measured from the start of the navigation to the load event, and
to the moment when every candidate can be sorted and searched: the median of `OPENINGS`, each in a fresh
context. Sorting and searching are timed in the page.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ray_auditor.report.html import write_html  # noqa: E402
from tests.report.large_sweep import LargeSweep  # noqa: E402

LIMIT_MB, LIMIT_OPEN_S = 5.0, 2.0
OPENINGS = 5
READY = """() => new Promise(done => {
  const look = () => document.querySelector('#map .controls') ? done(performance.now()) : setTimeout(look, 5);
  look();
})"""
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
TIMED = """key => { const start = performance.now();
  document.querySelector(`th[data-key="${key}"] button`).click(); return performance.now() - start; }"""
SEARCHED = """() => { const start = performance.now(); const box = document.querySelector('.controls input');
  box.value = 'legal'; box.dispatchEvent(new Event('input')); return performance.now() - start; }"""


def measure(browser: Browser, num_candidates: int, num_suites: int, folder: Path) -> dict[str, Any]:
    path, sweep = folder / f"{num_suites}.html", LargeSweep(num_candidates, num_suites)
    start = time.monotonic()
    write_html(sweep, path)
    written_s = time.monotonic() - start
    loaded, ready, sorts, searches = [], [], [], []
    said = ""
    for _ in range(OPENINGS):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        page = context.new_page()
        page.goto(path.as_uri())
        ready.append(page.evaluate(READY) / 1000)
        loaded.append(page.evaluate(LOADED) / 1000)
        said = page.locator("#map [role=status]").inner_text()
        sorts += [page.evaluate(TIMED, key) for key in ("p", "shift", "id")]
        searches.append(page.evaluate(SEARCHED))
        context.close()
    kept = re.search(r"of ([\d,]+) candidates", said)
    assert kept is not None
    return {
        "num_candidates": num_candidates,
        "num_suites": num_suites,
        "num_in_page": int(kept[1].replace(",", "")),
        "mb": path.stat().st_size / 1e6,
        "written_s": written_s,
        "loaded_s": statistics.median(loaded),
        "ready_s": statistics.median(ready),
        "sort_ms": statistics.median(sorts),
        "search_ms": statistics.median(searches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    date = datetime.now(UTC)
    device = f"cpu ({platform.machine()}), {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    with TemporaryDirectory(prefix="bench-report-") as work, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        result = {
            "date": date.isoformat(timespec="seconds"),
            "browser": f"Chromium {browser.version}",
            "sweeps": [measure(browser, args.candidates, suites, Path(work)) for suites in (12, 24)],
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        browser.close()
    claims = []
    for one in result["sweeps"]:
        what = f"the report of {one['num_candidates']} candidates on {one['num_suites']} suites"
        for name, value, target in (
            (f"MB of {what}", round(one["mb"], 2), LIMIT_MB),
            (f"seconds until {what} is loaded", round(one["loaded_s"], 2), LIMIT_OPEN_S),
            (f"seconds until {what} can be sorted", round(one["ready_s"], 2), LIMIT_OPEN_S),
        ):
            met = value <= target
            claims.append({"name": name, "value": value, "target": target, "met": met, "device": device})
    out = args.out or ROOT / "benchmarks" / "results" / f"report_CPU_{date.date()}.json"
    out.write_text(json.dumps({**result, "claims": claims}, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
