"""Whether memory is flat: adapters by the thousand and full candidates by the hundred, on one engine.

Usage: `python benchmarks/bench_memory.py [--adapters 1000] [--full 200] [--out FILE]`, with the repository's
root and `kernels/` on PYTHONPATH. A small random model; every candidate is written, admitted, swapped in,
proven, run and committed by a worker, and its files are deleted. Ray is left out.
"""

import argparse
import gc
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from sweep_models import K, Shape, admitted, make_sae, make_suites, write_adapter, write_base, write_finetune

from ray_auditor.config import Dtype, EngineConfig
from ray_auditor.engine.adapter import slices_of
from ray_auditor.hub import Admitted, open_base
from ray_auditor.store import Unit
from ray_auditor.worker import IN_FLIGHT, Assignment, Worker, WorkerSpec

SHAPE = Shape("llama", "LlamaForCausalLM", 256, 704, 4, 2, 64, 2048, 3, "resid_post", 2048)
SETTLED = 20  # candidates after which nothing should grow any more
WINDOW = 20  # resident sizes are medians of so many
MAX_GROWTH = 0.02
PROMPTS, MAX_TOKENS = 4, 64


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def run(
    worker: Worker, names: list[str], make: Callable[[str], Admitted], unit: Callable[[str], Unit]
) -> Any:
    """Audit them, two under way; the resident size after each."""
    sizes, most = [], 0
    begun = time.perf_counter()

    def audit(name: str) -> None:
        candidate = make(name)
        worker.audit(Assignment(unit(candidate.content_sha256), candidate))
        shutil.rmtree(candidate.candidate.path)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(audit, names):
            modules = [part.module for layer in worker._engine._model.modules() for part in slices_of(layer)]
            most = max([most, *Counter(modules).values()])
            gc.collect()
            sizes.append(resident())
    before, after = (statistics.median(part) for part in (sizes[SETTLED : SETTLED + WINDOW], sizes[-WINDOW:]))
    return {
        "count": len(names),
        "seconds": round(time.perf_counter() - begun, 1),
        "bytes_settled": int(before),
        "bytes_at_the_end": int(after),
        "growth": after / before - 1,
        "growth_bytes_each": (after - before) / max(1, len(names) - SETTLED - WINDOW),
        "most_adapters_of_a_module": most,
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--full", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="bench-memory-") as folder:
        root = Path(folder)
        base = open_base(write_base(root / "base", SHAPE, torch.float32, "cpu"), num_layers=SHAPE.num_layers)
        state = load_file(base.path / "model.safetensors")
        sae = make_sae(SHAPE, "cpu")
        suites = make_suites(SHAPE.vocabulary, PROMPTS, MAX_TOKENS)

        def unit(content: str) -> Unit:
            return Unit(content, base.key, sae.key, sae.hook_name, suites.key, K, sae.d_sae, "bench")

        def adapter(name: str) -> Admitted:
            return admitted(
                write_adapter(root / name, base, torch.float32), "adapter", base, SHAPE.num_layers
            )

        def full(name: str) -> Admitted:
            return admitted(write_finetune(root / name, base, state, "cpu"), "full", base, SHAPE.num_layers)

        engine = EngineConfig(
            dtype=Dtype.float32, max_step_tokens=256, kv_cache_bytes=32 << 20, max_lora_rank=16
        )
        spec = WorkerSpec(base, unit(base.content_sha256), sae, suites, K, engine, root / "store", 1)
        worker = Worker(spec)
        worker.audit(Assignment(spec.base_unit, None))
        found = {}
        for kind, count, make in (("adapters", args.adapters, adapter), ("full", args.full, full)):
            if count:
                found[kind] = run(worker, [f"{kind}-{i}" for i in range(count)], make, unit)
                print(kind, json.dumps(found[kind]), flush=True)
    claims = []
    for kind, one in found.items():
        growth = one["growth"]
        claims.append(
            {
                "name": f"growth of resident memory over {one['count']} {kind}, from candidate {SETTLED} on",
                "value": round(growth, 5),
                "target": f"<= {MAX_GROWTH}",
                "met": growth <= MAX_GROWTH,
                "device": "cpu",
            }
        )
    if "adapters" in found:
        most = found["adapters"]["most_adapters_of_a_module"]
        claims.append(
            {
                "name": "adapters that the engine holds at a time",
                "value": most,
                "target": "<= 1",
                "met": most <= 1,
                "device": "cpu",
            }
        )
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": SHAPE.__dict__,
        "tokens": suites.num_tokens,
        "measured": found,
        "claims": claims,
    }
    print(json.dumps(claims, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
