"""Candidates through the worker, against a plain loop and against bare vLLM, in one run on one machine.

Usage: `python benchmarks/bench_sweep.py [--shape NAME] [--dtype bfloat16] [--prompts 512] [--out FILE]`, with
the repository's root and `kernels/` on PYTHONPATH. Weights are random at the true shape; Ray is left out.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from plain_loop import DEVICE, Naive, dense_encoder, plain_seconds, sync
from safetensors.torch import load_file
from sweep_models import (
    LORA_RANK,
    SHAPES,
    K,
    Shape,
    admitted,
    make_sae,
    make_suites,
    write_adapter,
    write_base,
    write_finetune,
)
from torch import Tensor

from ray_auditor.config import Dtype, EngineConfig
from ray_auditor.hub import Admitted, open_base
from ray_auditor.sae import Sae
from ray_auditor.store import Unit
from ray_auditor.worker import IN_FLIGHT, Assignment, Worker, WorkerSpec

GATE_PROMPTS = 6
READERS = 4  # as many as the engine starts at most
READ_BYTES = 4 << 20  # at a time


def timed(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, the median of `repeats`."""
    found = []
    for _ in range(repeats):
        begun = sync()
        call()
        found.append(sync() - begun)
    return statistics.median(found)


def overlap(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean share of a token's kept features that two runs agree on."""
    shares = [
        (a[:, :, None] == b[:, None, :]).any(-1).float().mean() for a, b in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(shares).mean())


def gate(worker: Worker, folder: Path, shape: Shape, sae: Sae, dtype: torch.dtype) -> dict[str, float]:
    """Ours and the plain loop in the same dtype, each against the plain loop in fp32."""
    prompts = worker._layout.token_ids[:GATE_PROMPTS]

    def plain(kind: torch.dtype) -> list[Tensor]:
        naive = Naive(folder, shape, dense_encoder(sae), kind, is_trimmed=True)
        found = {batch[0]: idx[0] for batch, _, idx in naive.rows(prompts, 1)}
        return [found[i] for i in range(len(prompts))]

    exact = plain(torch.float32)
    ours = torch.from_numpy(worker._engine.encode(prompts).top_idx_MK).split([len(ids) for ids in prompts])
    found = {"ours_against_fp32": overlap(ours, exact), "plain_against_fp32": overlap(plain(dtype), exact)}
    floor = 0.999 if dtype == torch.float32 else found["plain_against_fp32"] - 0.005
    if found["ours_against_fp32"] < floor:
        raise SystemExit(f"features differ from the plain loop's: {found}; nothing is timed")
    return found


def ceilings(candidate: Admitted, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do: matrix products; reading files that lie in the page cache, no more."""
    size = 8192 if DEVICE == "cuda" else 2048
    a, b, out = torch.randn(3, size, size, device=DEVICE, dtype=dtype)
    torch.mm(a, b, out=out)
    specs = list(candidate.tensors.values())

    def read(reader: int) -> None:
        memory = memoryview(bytearray(READ_BYTES))
        for spec in specs[reader::READERS]:
            with spec.file.path.open("rb", buffering=0) as file:
                for at in range(spec.start, spec.end, READ_BYTES):
                    os.preadv(file.fileno(), [memory[: spec.end - at]], at)

    with ThreadPoolExecutor(READERS) as pool:
        read_s = timed(lambda: list(pool.map(read, range(READERS))), 5)
    return {
        "gemm_flops": 2 * size**3 / timed(lambda: torch.mm(a, b, out=out), 7),
        "read_bytes_per_s": sum(spec.end - spec.start for spec in specs) / read_s,
    }


def bare_seconds(worker: Worker, repeats: int) -> dict[str, float]:
    """The same tokens without an encoder, through vLLM and as recorded, and the encoder alone."""
    pool, step = worker._engine._model.pooler.pooling, worker._spec.engine.max_step_tokens
    prompts = [{"prompt_token_ids": ids} for ids in worker._layout.token_ids]
    num_tokens = worker._spec.suites.num_tokens
    pack = pool.pack
    pool.pack = lambda resid_ND, *_: resid_ND[:, :1].clone()
    call = {"pooling_task": "token_embed", "use_tqdm": False}
    bare = timed(lambda: worker._engine._llm.encode(prompts, **call), repeats)
    pool.pack = pack
    schedule = worker._engine._schedule
    assert schedule is not None
    recorded = timed(lambda: deque(schedule.run(worker._engine._model), 0), repeats)
    resid = torch.randn(step, worker._spec.sae.d_in, device=DEVICE, dtype=pool.encoder.W_enc_DF.dtype)
    pack(resid, pool.encoder)
    return {
        "bare": bare,
        "recorded": recorded,
        "encode_alone": timed(lambda: pack(resid, pool.encoder), repeats) * num_tokens / step,
    }


def audit_all(worker: Worker, found: list[Admitted], unit: Callable[[str], Unit]) -> list[dict[str, float]]:
    """Seconds of every candidate by part, and since the one before was committed; two calls are under way."""
    tasks = [Assignment(unit(candidate.content_sha256), candidate) for candidate in found]

    def committed_at(task: Assignment) -> float:
        worker.audit(task)
        return time.perf_counter()

    begun = sync()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        ends = list(pool.map(committed_at, tasks))
    table = []
    for task, end in zip(tasks, ends, strict=True):
        parts = worker._store.read_record(task.unit.key)["seconds"]
        table.append({"total": end - begun, **parts})
        begun = end
        print(task.name, {name: round(value, 3) for name, value in table[-1].items()}, flush=True)
    return table


def steady(table: list[dict[str, float]]) -> dict[str, float]:
    """Medians over all candidates but the first."""
    return {name: statistics.median(row[name] for row in table[1:]) for name in table[0]}


def claim(name: str, value: float, target: float, *, at_most: bool) -> dict[str, Any]:
    met = value <= target if at_most else value >= target
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {"name": name, "value": round(value, 3), "target": target, "met": met, "device": device}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    torch.manual_seed(0)
    begun = time.perf_counter()
    folder = write_base(work / "base", shape, dtype, DEVICE)
    written = time.perf_counter()
    base = open_base(folder, num_layers=shape.num_layers)
    admit_s = time.perf_counter() - written
    state = load_file(folder / "model.safetensors")
    fulls = [write_finetune(work / f"full{i}", base, state, DEVICE) for i in range(args.candidates)]
    adapters = [write_adapter(work / f"adapter{i}", base, dtype) for i in range(args.candidates)]
    sae = make_sae(shape, DEVICE)
    suites = make_suites(shape.vocabulary, args.prompts, args.tokens)
    with ThreadPoolExecutor() as pool:
        full = list(pool.map(lambda path: admitted(path, "full", base, shape.num_layers), fulls))
        adapter = list(pool.map(lambda path: admitted(path, "adapter", base, shape.num_layers), adapters))
    print(f"made in {time.perf_counter() - begun:.0f} s, admission {admit_s:.2f} s a candidate", flush=True)

    def unit(key: str) -> Unit:
        return Unit(key, base.key, sae.key, sae.hook_name, suites.key, K, sae.d_sae, f"bench {args.dtype}")

    engine = EngineConfig(
        dtype=Dtype[args.dtype],
        max_step_tokens=args.step,
        max_step_prompts=256,
        kv_cache_bytes=(4 << 30) if DEVICE == "cuda" else (256 << 20),
        max_lora_rank=LORA_RANK,
        read_ahead_bytes=args.read_ahead,
    )
    spec = WorkerSpec(base, unit(base.key), sae, suites, K, engine, work / "store", torch.get_num_threads())
    begun = time.perf_counter()
    worker = Worker(spec)
    start_s = time.perf_counter() - begun
    print(f"engine started in {start_s:.1f} s", flush=True)
    base_s = timed(lambda: worker.audit(Assignment(unit(base.key), None)))
    found_gate = gate(worker, folder, shape, sae, dtype)
    print(f"base {base_s:.2f} s, gate {found_gate}", flush=True)
    peak = {}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tables = {"full": audit_all(worker, full, unit)}
    if args.adapters:
        tables["adapter"] = audit_all(worker, adapter, unit)
    peak["host_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if DEVICE == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated()
    worker._engine.load(None)
    bare = bare_seconds(worker, 3)
    limits = ceilings(full[0], dtype)
    worker._engine.close()

    prompts = [prompt.token_ids.tolist() for suite in suites.suites for prompt in suite.prompts]
    num_tokens = suites.num_tokens
    encode = dense_encoder(sae)
    kinds = ["float32-1", "-1", "-1-trimmed", "-32-trimmed"]
    loops = args.naive or dict.fromkeys(args.dtype + kind if kind[0] == "-" else kind for kind in kinds)
    for name in loops:
        plain_seconds(name, fulls[-1], shape, encode, prompts[:2])  # what is made at a first call
    naive = {name: plain_seconds(name, fulls[0], shape, encode, prompts) for name in loops}

    parts = {kind: steady(table) for kind, table in tables.items()}
    num_bytes = sum(spec.end - spec.start for spec in full[0].tensors.values())
    floor = max(
        num_bytes / limits["read_bytes_per_s"], num_tokens * shape.flops_per_token / limits["gemm_flops"]
    )
    ours = parts["full"]["total"]
    rest = ours - parts["full"]["swap"] - parts["full"]["prove"]
    encoded = rest - parts["full"]["weights"]
    speedup = 20 if DEVICE == "cuda" else 6 if args.dtype == "float32" else 9
    claims = [
        claim("full candidate over its floor", ours / floor, 1.25, at_most=True),
        claim("full candidate less swap and proof, over bare vLLM", rest / bare["bare"], 1.15, at_most=True),
        claim("the same less weighing", encoded / bare["bare"], 1.15, at_most=True),
        claim("proof's share of a candidate", parts["full"]["prove"] / ours, 0.02, at_most=True),
    ]
    for name in dict.fromkeys([args.dtype, "float32"]):
        if row := naive.get(f"{name}-1"):
            value = row["total"] / ours
            claims.append(claim(f"plain loop in {name}, batch 1, over ours", value, speedup, at_most=False))
    if args.adapters:
        ratio = parts["adapter"]["total"] / bare["bare"]
        claims.append(claim("adapter candidate over bare vLLM", ratio, 1.15, at_most=True))
    return {
        "shape": args.shape,
        "dtype": args.dtype,
        "step_tokens": args.step,
        "num_tokens": num_tokens,
        "bytes_per_candidate": num_bytes,
        "tokens_per_s": num_tokens / ours,
        "bytes_per_s": num_bytes / ours,
        "start_s": start_s,
        "admit_s": admit_s,
        "floor_s": floor,
        "gate": found_gate,
        "ceilings": limits,
        "seconds": parts | {"bare vLLM": bare, "plain loop": naive},
        "runs": tables,
        "peak": peak,
        "claims": claims,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=[kind.value for kind in Dtype], default="float32")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step", type=int, default=2048, help="tokens a step")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--read-ahead", type=int, default=1 << 34, help="bytes of the second copy")
    parser.add_argument("--no-adapters", dest="adapters", action="store_false")
    parser.add_argument(
        "--naive",
        nargs="*",
        help="plain loops: DTYPE-BATCH, or DTYPE-BATCH-trimmed for one that stops at the hook; left out: "
        "fp32 and the engine's dtype at batch 1, the latter trimmed as well, and trimmed at batch 32",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    with TemporaryDirectory(prefix="bench-sweep-") as work:
        result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **run(args, Path(work))}
        shutil.rmtree(work, ignore_errors=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in result if name not in ("runs", "claims")}))
    for row in result["claims"]:
        print(
            f"{'met   ' if row['met'] else 'missed'} {row['name']}: {row['value']} (target {row['target']})"
        )


if __name__ == "__main__":
    main()
