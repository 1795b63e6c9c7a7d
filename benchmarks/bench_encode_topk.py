"""Time every implementation of `encode_topk` against the matrix product alone, after checking each against float64.

Usage: `python benchmarks/bench_encode_topk.py [--out DIR] [--shapes N] [--rows ROWS]`, with `kernels/` on PYTHONPATH.
On a CUDA device it runs the nine shapes of `SHAPES` with k 32 and 64; on a CPU the one shape of `CPU_SHAPE`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from auditor_kernels import EncoderWeights, encode_topk, hopper
from auditor_kernels.dispatch import Implementation, launch
from torch import Tensor
from torch.nn import functional

# d_in, d_sae, tokens
SHAPES = [
    (2304, 16384, 16384),
    (2304, 65536, 16384),
    (896, 14336, 16384),
    (896, 32768, 16384),
    (4096, 32768, 8192),
    (4096, 65536, 8192),
    (4096, 131072, 8192),
    (2304, 16384, 65536),
    (4096, 65536, 16384),
]
CPU_SHAPE = (576, 9216, 2048)
DEVICE_ROWS = [Implementation.HOPPER, Implementation.FILTER, Implementation.GROUPS]
# A finetune's residuals differ from the base's by noise of this relative size.
FINETUNE_NOISE = 0.1


def make_encoder(d_in: int, d_sae: int, device: str, dtype: torch.dtype) -> EncoderWeights:
    """Unit-norm Gaussian features: the hardest case for a filter, without a gap at the k-th value."""
    w_fd = torch.empty(d_sae, d_in, dtype=dtype, device=device)
    for block in w_fd.split(8192):
        rows = torch.randn(block.shape, device=device)
        block.copy_(rows / rows.norm(dim=1, keepdim=True))
    zeros = torch.zeros(d_sae, device=device)
    bias = torch.randn(d_sae, device=device) * 0.02
    return EncoderWeights(w_fd.t(), bias, zeros, torch.zeros(d_in, device=device), None, None)


def perturbed(x_nd: Tensor) -> Tensor:
    scale = FINETUNE_NOISE * x_nd.float().square().mean(1, keepdim=True).sqrt()
    return (x_nd + scale * torch.randn_like(x_nd, dtype=torch.float32)).to(x_nd.dtype)


def oracle(x_nd: Tensor, encoder: EncoderWeights, k: int) -> tuple[Tensor, Tensor]:
    """Float64 values and indices of the top k."""
    pre = x_nd.double() @ encoder.W_enc_DF.double() + encoder.b_enc_F.double()
    top = pre.topk(k, dim=1)
    return top.values, top.indices


def count_misses(x_nd: Tensor, encoder: EncoderWeights, top_idx: Tensor, k: int) -> dict[str, int]:
    """Rows whose set differs from float64's, and those among them that float32 rounding does not explain."""
    values, indices = oracle(x_nd, encoder, k)
    mine = top_idx.long()
    same = (mine.sort(1).values == indices.sort(1).values).all(1)
    wrong = 0
    for row in (~same).nonzero().flatten().tolist():
        w_kd = encoder.W_enc_DF.t()[mine[row].clamp(min=0)].double()
        score = w_kd @ x_nd[row].double() + encoder.b_enc_F[mine[row].clamp(min=0)].double()
        # 2^-16 relative is what the keys of the group designs resolve; float32 sums err by less.
        tolerance = 2.0**-16 * float(values[row, 0])
        distinct = mine[row].unique().numel() == k and bool((mine[row] >= 0).all())
        wrong += not (distinct and bool((score >= values[row, -1] - tolerance).all()))
    return {"rows": x_nd.shape[0], "sets_differ": int((~same).sum()), "misses": wrong}


def median_ms(call: Callable[[int], object], device: str, budget_ms: float) -> float:
    """Median time of one call, inputs rotated by its argument."""
    if device == "cuda":
        from triton.testing import do_bench

        turn = iter(range(10**9))
        return float(do_bench(lambda: call(next(turn)), warmup=20, rep=budget_ms, return_mode="median"))
    call(0)
    times = []
    for turn in range(9):
        start = time.perf_counter()
        call(turn)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def device_state() -> str:
    query = "nvidia-smi --query-gpu=name,clocks.sm,power.draw,temperature.gpu --format=csv,noheader"
    return subprocess.run(query.split(), capture_output=True, text=True, check=False).stdout.strip()


def extra_memory(call: Callable[[int], object]) -> int:
    """Peak bytes that a call allocates, beyond what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call(0)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del result
    return torch.cuda.max_memory_allocated() - before - kept


def bench_cuda_shape(
    d_in: int, d_sae: int, tokens: int, k: int, budget_ms: float, baselines: bool
) -> dict[str, object]:
    """All rows of one shape; correctness of each of ours on 512 rows first."""
    encoder = make_encoder(d_in, d_sae, "cuda", torch.bfloat16)
    w_fd, bias = encoder.W_enc_DF.t(), encoder.b_enc_F.bfloat16()
    base = [torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    tuned = [perturbed(x) for x in base]
    hints = [launch(Implementation.GROUPS, x, encoder, k, None).val_NK[:, -1].contiguous() for x in base]
    flops = 2 * tokens * d_in * d_sae

    calls: dict[str, Callable[[int], object]] = {}
    rows: dict[str, dict[str, object]] = {}
    for which in DEVICE_ROWS:
        if which is Implementation.HOPPER and hopper.load()[0] is None:
            continue
        launcher = launch(which, tuned[0], encoder, k, hints[0])
        sample = torch.randperm(tokens, device="cuda")[:512]
        check = count_misses(tuned[0][sample], encoder, launcher.idx_NK[sample], k)
        if check["misses"]:
            raise SystemExit(f"{which} at {d_in}x{d_sae}, k {k}: {check}; nothing is timed")
        rows[which] = {**check, "recomputed": launcher.num_recomputed()}
        calls[which] = functools.partial(_ours, which, tuned, hints, encoder, k)
    gemm = functools.partial(_gemm, tuned, w_fd, bias)
    if baselines:
        calls["torch-eager"] = lambda i: torch.topk(gemm(i), k, dim=-1)
        if k == 32 and d_in == 896:
            compiled = torch.compile(
                lambda x: torch.topk(functional.relu(functional.linear(x, w_fd, bias)), k, dim=-1)
            )
            calls["torch-compile"] = lambda i: compiled(tuned[i % 3])
        if tokens * d_sae <= 1 << 30 and k == 32:
            w32_df, x32 = encoder.W_enc_DF.float(), [x.float() for x in tuned]
            calls["sae-lens-fp32"] = lambda i: _sae_lens(x32[i % 3], w32_df, encoder.b_enc_F, k)
    first = median_ms(gemm, "cuda", budget_ms)
    for name, call in calls.items():
        ms = median_ms(call, "cuda", budget_ms)
        rows.setdefault(name, {}).update(ms=ms, extra_bytes=extra_memory(call))
    last = median_ms(gemm, "cuda", budget_ms)
    gemm_ms = (first + last) / 2
    rows["cublas-gemm"] = {"ms": gemm_ms, "first_ms": first, "last_ms": last}
    for row in rows.values():
        ms = row["ms"]
        assert isinstance(ms, float)
        row.update(ratio=ms / gemm_ms, tflops=flops / ms / 1e9)
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "tokens": tokens,
        "k": k,
        "rows": rows,
        "device_state": device_state(),
    }


def _ours(
    which: Implementation, xs: list[Tensor], hints: list[Tensor], encoder: EncoderWeights, k: int, i: int
) -> object:
    launcher = launch(which, xs[i % 3], encoder, k, hints[i % 3])
    return launcher.val_NK, launcher.idx_NK


def _gemm(xs: list[Tensor], w_fd: Tensor, bias: Tensor, i: int) -> Tensor:
    return functional.linear(xs[i % 3], w_fd, bias)


def _sae_lens(x_nd: Tensor, w_df: Tensor, bias: Tensor, k: int) -> Tensor:
    """What sae-lens' TopK encoder does: dense float32 pre-activations, top-k, scatter into zeros."""
    pre = x_nd @ w_df + bias
    top = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, top.indices, functional.relu(top.values))


def bench_cpu(k: int) -> dict[str, object]:
    """The CPU path against the product alone and against sae-lens' encode followed by a top-k."""
    d_in, d_sae, tokens = CPU_SHAPE
    encoder = make_encoder(d_in, d_sae, "cpu", torch.float32)
    x_nd = torch.randn(tokens, d_in)
    check = count_misses(x_nd[:512], encoder, encode_topk(x_nd[:512], encoder, k=k).top_idx_NK, k)
    if check["misses"]:
        raise SystemExit(f"the reference misses features: {check}; nothing is timed")
    out = torch.empty(512, d_sae)
    times: dict[str, list[float]] = {"gemm": [], "encode_topk": [], "sae-lens-fp32": []}
    for _ in range(9):  # interleaved, so that a busy machine slows all three alike
        for name, call in (
            ("gemm", lambda: [torch.mm(x, encoder.W_enc_DF, out=out) for x in x_nd.split(512)]),
            ("encode_topk", lambda: encode_topk(x_nd, encoder, k=k)),
            ("sae-lens-fp32", lambda: _sae_lens(x_nd, encoder.W_enc_DF, encoder.b_enc_F, k).topk(k)),
        ):
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    ms = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, dict[str, object]] = {
        name: {"ms": value, "ratio": value / ms["gemm"]} for name, value in ms.items()
    }
    rows["encode_topk"].update(check)
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "tokens": tokens,
        "k": k,
        "rows": rows,
        "device_state": f"{torch.get_num_threads()} threads",
    }


def check_many_rows(total: int) -> list[dict[str, object]]:
    """Every device implementation against float64 over `total` rows of fresh data."""
    tokens, results = 16384, []
    for d_in, d_sae, k in ((896, 14336, 32), (896, 14336, 64), (2304, 16384, 32)):
        encoder = make_encoder(d_in, d_sae, "cuda", torch.bfloat16)
        counts = {which: {"rows": 0, "sets_differ": 0, "misses": 0, "recomputed": 0} for which in DEVICE_ROWS}
        while counts[DEVICE_ROWS[0]]["rows"] < total / 3:
            base = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
            tuned = perturbed(base)
            hint = launch(Implementation.GROUPS, base, encoder, k, None).val_NK[:, -1].contiguous()
            for which in DEVICE_ROWS:
                launcher = launch(which, tuned, encoder, k, hint)
                counts[which]["recomputed"] += launcher.num_recomputed()
                for name, number in count_misses(tuned, encoder, launcher.idx_NK, k).items():
                    counts[which][name] += number
        results += [
            {"d_in": d_in, "d_sae": d_sae, "k": k, "which": which, **c} for which, c in counts.items()
        ]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--budget-ms", type=float, default=150.0, help="device time per measurement")
    parser.add_argument("--many-rows", type=int, default=0, help="rows of the float64 check, 0 for none")
    parser.add_argument(
        "--baselines", action="store_true", help="also time eager, compiled and sae-lens-style"
    )
    options = parser.parse_args()
    now = datetime.now(UTC)
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
        results = []
        for shape in SHAPES[: options.shapes]:
            for k in (32, 64):
                results.append(bench_cuda_shape(*shape, k, options.budget_ms, options.baselines))
                print(line(results[-1]), flush=True)
                torch.cuda.empty_cache()
        many = check_many_rows(options.many_rows) if options.many_rows else []
        for row in many:
            print(row, flush=True)
    else:
        hardware = "CPU"
        results, many = [bench_cpu(32)], []
        print(line(results[0]))
    report = {"hardware": hardware, "torch": torch.__version__, "date": now.isoformat(timespec="seconds")}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"encode_topk_{hardware.replace(' ', '_')}_{now:%Y-%m-%d}"
    path = options.out / f"{name}.json"
    path.write_text(json.dumps({**report, "results": results, "many_rows": many}, indent=1))
    print(path)


def line(result: dict[str, object]) -> str:
    """One shape on one line of the console."""
    rows = result["rows"]
    assert isinstance(rows, dict)
    cells = []
    for name, row in rows.items():
        extra = f" rec {row['recomputed']}" if "recomputed" in row else ""
        extra += f" mem {row['extra_bytes'] / 1e6:.0f}MB" if "extra_bytes" in row else ""
        extra += f" diff {row['sets_differ']}" if row.get("sets_differ") else ""
        cells.append(f"{name} {row['ms']:.3f} ({row['ratio']:.3f}{extra})")
    return f"{result['d_in']}x{result['d_sae']} T {result['tokens']} k {result['k']}: " + "; ".join(cells)


if __name__ == "__main__":
    main()
