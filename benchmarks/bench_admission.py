"""Admission against hostile input: mutated files by the million, and the costliest files known, timed.

Four kinds take turns: headers of safetensors (held against the Rust parser), indexes, configs, adapter
configs; each goes through what admission calls. Counted: errors other than CandidateError, files opened
outside the candidate's and the base's folders, and files that ours accepts and the Rust parser refuses. All
must be 0.

    python benchmarks/bench_admission.py [--count N] [--first NUMBER] [--resume]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from admission_corpus import CONFIG, INDEX, SHAPES, Tally, corpus, watch, write_safetensors

from ray_auditor.hub import Candidate, CandidateError, admit, list_folder, open_base

COUNT, STEP = 1_000_000, 50_000
MAX_SECONDS, MAX_BYTES = 1.0, 200e6  # of one refusal, in a process of its own
RESULTS = Path(__file__).resolve().parent / "results"


def fuzz(first: int, count: int, tally: Tally) -> Iterator[int]:
    """Run a range of cases; yields how many are done, now and then."""
    sys.addaudithook(watch)
    with corpus() as made:
        for number in range(first, first + count):
            made.run(number, tally)
            if (done := number + 1 - first) % STEP == 0 or done == count:
                yield done


HEAVY = {
    "200,000 tensors": "header",
    "a header of 99 MB": "length",
    "a header of 31 MB of lists": "lists",
    "a header of 31 MB of one string": "string",
    "a header of 680,000 entries of metadata": "metadata",
    "a header of 50,000 tensors": "tensors",
    "a header nested without end": "nested",
    "an index of 1 GB": "index_size",
    "an index of 190,000 tensors": "index",
    "a config of 1 MB, nested": "config_nested",
    "a config with a billion layers": "config_bomb",
    "a tokenizer of 499,000 tokens": "tokens",
    "a tokenizer of 1 GB": "tokenizer_size",
}


def write_heavy(what: str, folder: Path) -> None:
    """A candidate that is as large as its kind can be."""
    weights = folder / "model.safetensors"

    def header(raw: bytes, length: int | None = None) -> None:
        weights.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw)

    if what == "header":
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header(json.dumps({f"t{i}": entry for i in range(200_000)}).encode())
    elif what == "length":
        header(b"{}" + b" " * 1000, 99 << 20)
    elif what == "lists":
        header(b'{"a":[' + b"[]," * (10 << 20) + b"0]}")
    elif what == "string":
        header(b'{"' + b"x" * (31 << 20) + b'":1}')
    elif what == "metadata":
        entries = (b'"%08d":"%032d"' % (i, i) for i in range(680_000))
        header(b'{"__metadata__":{' + b",".join(entries) + b"}}")
    elif what == "tensors":
        entry = b'"model.layers.%d.w%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        header(b"{" + b",".join(entry % (i, b"x" * 200) for i in range(50_000)) + b"}")
    elif what == "nested":
        header(b'{"a":' + b"[" * 600_000)
    elif what in ("index_size", "index"):
        raw = b'{"weight_map": {' + b",".join(b'"t%d": "m.safetensors"' % i for i in range(190_000)) + b"}}"
        (folder / INDEX).write_bytes(raw)
        if what == "index_size":
            os.truncate(folder / INDEX, 1 << 30)
    elif what == "config_nested":
        (folder / "config.json").write_bytes(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}")
    elif what == "config_bomb":
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 10**9}))
    else:
        vocab = ",".join(f'"{i}":{i % 1000}' for i in range(499_000))
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {' + vocab + "}}}")
        if what == "tokenizer_size":
            os.truncate(folder / "tokenizer.json", 1 << 30)


def judge_heavy(root: str) -> None:
    """In a child: list, admit, and print outcome, seconds by the clock and of CPU, and peak bytes."""
    base = open_base(Path(root) / "base", num_layers=1)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    (found,) = list_folder(Path(root) / "candidates")
    assert isinstance(found, Candidate), found
    try:
        outcome = "; ".join(admit(found, base, num_layers=1, max_lora_rank=16).notes)
    except CandidateError as error:
        outcome = error.reason
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "outcome": outcome[:120],
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                "peak_bytes": peak,
            }
        )
    )


def time_heavy() -> dict[str, dict[str, Any]]:
    """Every heavy file, each in a process of its own."""
    found = {}
    for name, what in HEAVY.items():
        with tempfile.TemporaryDirectory(prefix="admission-") as folder:
            root = Path(folder)
            for part in ("base", "candidates/heavy"):
                (root / part).mkdir(parents=True)
                write_safetensors(root / part / "model.safetensors", SHAPES, 1)
                (root / part / "config.json").write_text(json.dumps(CONFIG))
            (root / "base/tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
            write_heavy(what, root / "candidates/heavy")
            command = [sys.executable, __file__, "--judge", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
        print(f"{name}: {found[name]}", flush=True)
    return found


def report(first: int, tally: Tally, seconds: float, heavy: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The result file."""
    device = f"cpu ({platform.machine()})"
    count = sum(tally.outcomes.values())
    bounds: list[tuple[str, float, float]] = [
        ("errors other than a refusal, over mutated files", len(tally.crashes), 0),
        ("files opened outside the candidate's and the base's folders", len(tally.strays), 0),
        ("files that ours accepts and the Rust parser refuses", len(tally.disagreements), 0),
    ]
    if heavy:
        slowest, largest = (
            max(one[what] for one in heavy.values()) for what in ("cpu_seconds", "peak_bytes")
        )
        bounds += [
            ("CPU seconds to judge the costliest file", slowest, MAX_SECONDS),
            ("peak bytes of a process that judges it", largest, MAX_BYTES),
        ]
    claims = [
        {"name": name, "value": value, "target": target, "met": value <= target, "device": device}
        for name, value, target in bounds
    ]
    met = count >= COUNT
    claims.append({"name": "mutated files", "value": count, "target": COUNT, "met": met, "device": device})
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "first": first,
        "count": count,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "codes": dict(tally.codes.most_common()),
        "crashes": tally.crashes[:20],
        "strays": tally.strays[:20],
        "disagreements": tally.disagreements[:20],
        "heavy": heavy,
        "claims": claims,
    }


def main() -> int:
    """Fuzz, time, print and write the result file, as far as it has come after every step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on where today's result file stops")
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.judge:
        judge_heavy(args.judge)
        return 0
    path = RESULTS / f"admission_{datetime.now(UTC).date().isoformat()}.json"
    tally, seconds, first = Tally(), 0.0, args.first
    if args.resume and path.exists():
        known = json.loads(path.read_bytes())
        lists = (known[name] for name in ("crashes", "strays", "disagreements"))
        tally = Tally(Counter(known["outcomes"]), Counter(known["codes"]), *lists)
        first, seconds = known["first"], known["seconds"]
    done = sum(tally.outcomes.values())
    result = report(first, tally, seconds, {})
    begun = time.monotonic()
    for num_cases in fuzz(first + done, args.count - done, tally):
        result = report(first, tally, seconds + time.monotonic() - begun, {})
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{done + num_cases} cases, {num_cases / (time.monotonic() - begun):.0f} a second", flush=True)
    result = report(first, tally, result["seconds"], time_heavy())
    path.write_text(json.dumps(result, indent=1) + "\n")
    shown = ("outcomes", "crashes", "strays", "disagreements", "claims")
    print(json.dumps({key: result[key] for key in shown}, indent=1))
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
