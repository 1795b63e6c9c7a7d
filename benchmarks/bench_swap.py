"""What a swap of full weights costs: reading, the checksum on the host, the copy, the proof on the device.

Usage: `python benchmarks/bench_swap.py [--megabytes 512] [--out FILE]`, with the repository's root and
`kernels/` on PYTHONPATH. The files lie in the page cache, so this is the cost of everything but the disk.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import wait
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import nn

from ray_auditor.engine.parameters import ParameterMap, checksums
from ray_auditor.engine.staging import Staging
from ray_auditor.hub.checkpoint import iter_tensors
from ray_auditor.hub.weights import read_weights

SIDE = 2048  # a tensor is SIDE x SIDE in bf16, 8 MiB
REPEATS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call, the device's work included."""
    found = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    num_tensors = max(1, args.megabytes * 2**20 // (2 * SIDE * SIDE))
    model = nn.Module()
    for i in range(num_tensors):
        model.register_parameter(
            f"w{i}", nn.Parameter(torch.zeros(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE))
        )
    places = ParameterMap(model, {f"w{i}": (SIDE, SIDE) for i in range(num_tensors)})
    staging = Staging(places, 1 << 40)
    with TemporaryDirectory(prefix="bench-swap-") as work:
        state = {f"w{i}": torch.randn(SIDE, SIDE).to(torch.bfloat16) for i in range(num_tensors)}
        save_file(state, Path(work) / "model.safetensors")
        specs = read_weights(Path(work), ["model.safetensors"])

        def ahead() -> None:
            staging.read_ahead("ahead", specs)
            assert staging._ahead is not None
            wait(staging._ahead[1].values())
            staging._ahead = None

        expected = staging.swap("direct", specs)
        places.prove(expected)
        found = {
            "read, one thread": seconds(lambda: [None for _ in iter_tensors(specs)]),
            "checksum on the host, one thread": seconds(lambda: checksums(list(state.values()))),
            "swap that was not read ahead": seconds(lambda: staging.swap("direct", specs)),
            "read ahead": seconds(ahead),
            "proof": seconds(lambda: places.prove(expected)),
        }
        staging.read_ahead("ahead", specs)
        assert staging._ahead is not None
        wait(staging._ahead[1].values())
        begun = time.perf_counter()
        places.prove(staging.swap("ahead", specs))
        found["swap that was read ahead, with its proof"] = time.perf_counter() - begun
        staging.close()
    num_bytes = places.num_bytes
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    for name, value in found.items():
        print(f"{name}: {value * 1e3:.1f} ms, {num_bytes / value / 1e9:.2f} GB/s")
    if args.out:
        result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device}
        result |= {"threads": torch.get_num_threads(), "num_bytes": num_bytes, "seconds": found}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
