"""What a swap of full weights costs: reading, the checksum on the host, the copy, the proof on the device.

Usage: `python benchmarks/bench_swap.py [--megabytes 512] [--out FILE]`, with the repository's root and
`kernels/` on PYTHONPATH. The files lie in the page cache, so this is the cost of everything but the disk.
CPU seconds are of all threads: on a machine that others use, they are what can be compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ray_auditor.engine.parameters import ParameterMap, checksums
from ray_auditor.engine.staging import Staging
from ray_auditor.hub.checkpoint import TORCH_DTYPES, iter_tensors
from ray_auditor.hub.weights import read_weights

NUM_COLUMNS = 2048
DTYPES = (("BF16", "BF16"), ("F32", "F32"), ("F32", "BF16"))  # the file's, the engine's
TENSOR_MB = (8, 64)  # as an MLP's matrix of 0.5B and of 2B
NUM_READERS = (1, 2)
REPEATS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cost(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Median seconds of a call after a first one, the device's work included; of what comes before, none."""
    walls, cpus = [], []
    for _ in range(REPEATS + 1):
        before()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"seconds": statistics.median(walls[1:]), "cpu_seconds": statistics.median(cpus[1:])}


def staging_of(places: ParameterMap, num_readers: int) -> Staging:
    """Half of the threads read."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2 * num_readers)
    staging = Staging(places, 1 << 40)
    torch.set_num_threads(num_threads)
    return staging


def measure(file: str, engine: str, tensor_mb: int, megabytes: int) -> Iterator[dict[str, Any]]:
    """One figure after the other, of a file of so many megabytes."""
    shape = ((tensor_mb << 20) // (NUM_COLUMNS * TORCH_DTYPES[file].itemsize), NUM_COLUMNS)
    names = [f"w{i}" for i in range(max(1, megabytes // tensor_mb))]
    model = nn.ParameterDict(
        {name: torch.zeros(shape, dtype=TORCH_DTYPES[engine], device=DEVICE) for name in names}
    )
    places = ParameterMap(model, dict.fromkeys(names, shape))
    with TemporaryDirectory(prefix="bench-swap-") as work:
        state = {name: torch.randn(shape).to(TORCH_DTYPES[file]) for name in names}
        save_file(state, Path(work) / "model.safetensors")
        specs = read_weights(Path(work), ["model.safetensors"])
        summed = [tensor.to(TORCH_DTYPES[engine]) for tensor in state.values()]

        yield {"what": "read into fresh memory", **cost(lambda: [None for _ in iter_tensors(specs)])}
        yield {"what": "checksum on the host", **cost(lambda: checksums(summed))}
        for num_readers in NUM_READERS:
            staging = staging_of(places, num_readers)

            def read_ahead(staging: Staging = staging) -> None:
                staging.read_ahead("ahead", specs)
                assert staging._ahead is not None
                wait(staging._ahead[1].values())

            def read_and_forget(staging: Staging = staging) -> None:
                read_ahead(staging)
                staging._ahead = None

            def swap(staging: Staging = staging) -> None:
                places.prove(staging.swap("ahead", specs))

            direct = cost(lambda staging=staging: staging.swap("direct", specs))
            yield {"what": "swap that was not read ahead", "readers": num_readers, **direct}
            yield {"what": "read ahead", "readers": num_readers, **cost(read_and_forget)}
            ahead = cost(swap, before=read_ahead)
            yield {"what": "swap that was read ahead, with its proof", "readers": num_readers, **ahead}
            staging.close()
        found = checksums([places.rows(name) for name in names])
        expected = dict(zip(names, found, strict=True))
        yield {"what": "proof", **cost(lambda: places.prove(expected))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    rows = []
    for (file, engine), tensor_mb in product(DTYPES, TENSOR_MB):
        for found in measure(file, engine, tensor_mb, args.megabytes):
            rows.append({"file": file, "engine": engine, "tensor_mb": tensor_mb, **found})
            per_s = (args.megabytes << 20) / 1e9 / found["seconds"]
            print(*rows[-1].values(), f"{per_s:.2f} GB/s of the file", flush=True)
    if args.out:
        result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device}
        result |= {"threads": torch.get_num_threads(), "megabytes": args.megabytes, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
