"""Time every implementation of `encode_topk` against the product alone, each checked in float64 first.

With `kernels/` on PYTHONPATH: `python benchmarks/bench_encode_topk.py [--baselines] [--many-rows N]`. On a
CUDA device it runs the nine shapes of `SHAPES` with k 32 and 64; on a CPU the one shape of `CPU_SHAPE`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from auditor_kernels import EncoderWeights, encode_topk, fvu_parts, hopper
from auditor_kernels.dispatch import Implementation, choose, launch
from auditor_kernels.encode_topk_ref import encode_topk_ref
from encode_topk_cases import DEVICE_ROWS, check_many_rows, count_misses, make_encoder, perturbed, sae_like
from encode_topk_report import cpu_claims, cuda_claims, line, markdown, row_claims
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
SAE_LIKE_SHAPES = [(2304, 16384, 16384), (2304, 65536, 16384), (4096, 131072, 8192)]
CPU_SHAPE = (576, 9216, 2048)


def interleaved_ms(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn, each round in another order.

    The card is limited by power, so a call's time depends on what ran before it: a fixed order favours those
    that follow light ones. A call gets its round's number, to rotate its inputs; two runs make a measurement.
    """
    order = random.Random(0)
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for turn in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            call(turn)
            call(turn + 1)
            events[1].record()
            times[name].append(events)
    torch.cuda.synchronize()
    return {
        name: statistics.median(first.elapsed_time(last) / 2 for first, last in pairs)
        for name, pairs in times.items()
    }


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
    d_in: int, d_sae: int, tokens: int, k: int, rounds: int, baselines: bool, data: str = "gaussian"
) -> dict[str, object]:
    """All rows of one shape; correctness of each of ours on 512 rows first."""
    encoder = make_encoder(d_in, d_sae, "cuda", torch.bfloat16)
    base = [torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    if data == "sae-like":
        pairs = [sae_like(tokens, encoder) for _ in range(3)]
        base, encoder = [x for x, _ in pairs], pairs[0][1]
    w_fd, bias = encoder.W_enc_DF.t(), encoder.b_enc_F.bfloat16()
    tuned = [perturbed(x) for x in base]
    hints = [launch(Implementation.FILTER, x, encoder, k, None).val_NK[:, -1].contiguous() for x in base]
    flops = 2 * tokens * d_in * d_sae

    calls: dict[str, Callable[[int], object]] = {}
    rows: dict[str, dict[str, object]] = {}
    for row, (which, hinted) in DEVICE_ROWS.items():
        if which is not Implementation.FILTER and hopper.load()[0] is None:
            continue
        launcher = launch(which, tuned[0], encoder, k, hints[0] if hinted else None)
        sample = torch.randperm(tokens, device="cuda")[:512]
        check = count_misses(tuned[0][sample], encoder, launcher.idx_NK[sample], k)
        if check["misses"]:
            raise SystemExit(f"{row} at {d_in}x{d_sae}, k {k}: {check}; nothing is timed")
        rows[row] = {**check, "recomputed": launcher.num_recomputed()}
        calls[row] = functools.partial(_ours, which, tuned, hints if hinted else None, encoder, k)
    gemm = functools.partial(_gemm, tuned, w_fd, bias)
    calls["cublas-gemm"] = gemm
    top = encode_topk(tuned[0], encoder, k=k)
    calls["fvu-parts"] = lambda _: fvu_parts(tuned[0], top, encoder)
    slow: dict[str, Callable[[int], object]] = {}
    if baselines:
        slow["torch-eager"] = lambda i: torch.topk(gemm(i), k, dim=-1)
        if k == 32 and (d_in, d_sae) == (896, 32768):
            compiled = torch.compile(
                lambda x: torch.topk(functional.relu(functional.linear(x, w_fd, bias)), k, dim=-1)
            )
            slow["torch-compile"] = lambda i: compiled(tuned[i % 3])
        if tokens * d_sae <= 1 << 30 and k == 32:
            w32_df, x32 = encoder.W_enc_DF.float(), [x.float() for x in tuned]
            slow["sae-lens-fp32"] = lambda i: _sae_lens(x32[i % 3], w32_df, encoder.b_enc_F, k)
    extra = {name: extra_memory(call) for name, call in (calls | slow).items()}
    # Apart: float32 draws less power, so in turn with the rest it would cool the card for its neighbours.
    ms = interleaved_ms(slow, max(3, rounds // 6)) | interleaved_ms(calls, rounds)
    for name in ms:
        rows.setdefault(name, {}).update(
            ms=ms[name],
            ratio=ms[name] / ms["cublas-gemm"],
            tflops=flops / ms[name] / 1e9,
            extra_bytes=extra[name],
            extra_share=extra[name] / (2 * tokens * d_sae),
        )
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "tokens": tokens,
        "k": k,
        "data": data,
        "rows": rows,
        "device_state": device_state(),
    }


def _ours(
    which: Implementation,
    xs: list[Tensor],
    hints: list[Tensor] | None,
    encoder: EncoderWeights,
    k: int,
    i: int,
) -> object:
    launcher = launch(which, xs[i % 3], encoder, k, hints[i % 3] if hints else None)
    return launcher.val_NK, launcher.idx_NK


def _gemm(xs: list[Tensor], w_fd: Tensor, bias: Tensor, i: int) -> Tensor:
    return functional.linear(xs[i % 3], w_fd, bias)


def _sae_lens(x_nd: Tensor, w_df: Tensor, bias: Tensor, k: int) -> Tensor:
    """What sae-lens' TopK encoder does: dense float32 pre-activations, top-k, scatter into zeros."""
    pre = x_nd @ w_df + bias
    top = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, top.indices, functional.relu(top.values))


def bench_cpu(k: int, rounds: int) -> dict[str, object]:
    """The CPU paths against the product alone and against sae-lens' encode followed by a top-k.

    Calls are taken in turn and a ratio is the median over the rounds of that round's two times, since other
    processes on the machine slow whole rounds; the quartiles and the load average say how much.
    """
    d_in, d_sae, tokens = CPU_SHAPE
    encoder = make_encoder(d_in, d_sae, "cpu", torch.float32)
    x_nd = torch.randn(tokens, d_in)
    which, why = choose(x_nd.device, x_nd.dtype, tokens, encoder, k, hinted=False)
    out = torch.empty(512, d_sae)
    calls: dict[str, Callable[[], object]] = {
        "gemm": lambda: [torch.mm(x, encoder.W_enc_DF, out=out) for x in x_nd.split(512)],
        "encode_topk": lambda: encode_topk(x_nd, encoder, k=k),
        "reference": lambda: encode_topk_ref(x_nd, encoder, k=k),
        "sae-lens-fp32": lambda: _sae_lens(x_nd, encoder.W_enc_DF, encoder.b_enc_F, k).topk(k),
    }
    rows: dict[str, dict[str, object]] = {name: {} for name in calls}
    rows["encode_topk"]["implementation"] = which
    for name, ours in (("encode_topk", encode_topk), ("reference", encode_topk_ref)):
        check = count_misses(x_nd, encoder, ours(x_nd, encoder, k=k).top_idx_NK, k)
        if check["misses"]:
            raise SystemExit(f"{name} misses features: {check}; nothing is timed")
        rows[name].update(check)
    load = os.getloadavg()[0]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, values in times.items():
        ratios = [mine / gemm for mine, gemm in zip(values, times["gemm"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name].update(ms=statistics.median(values), ratio=middle, ratio_quartiles=[low, high])
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "tokens": tokens,
        "k": k,
        "rows": rows,
        "device_state": f"{torch.get_num_threads()} threads, {why}, {rounds} rounds, load average before "
        f"{load:.1f}, after {os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved measurements per shape")
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
                results.append(bench_cuda_shape(*shape, k, options.rounds, options.baselines))
                print(line(results[-1]), flush=True)
                torch.cuda.empty_cache()
        for shape in SAE_LIKE_SHAPES:
            results.append(bench_cuda_shape(*shape, 32, options.rounds, False, "sae-like"))
            print(line(results[-1]), flush=True)
            torch.cuda.empty_cache()
        many = check_many_rows(options.many_rows) if options.many_rows else []
        for row in many:
            print(row, flush=True)
    else:
        hardware = "CPU"
        results, many = [bench_cpu(32, options.rounds)], []
        print(line(results[0]))
    report = {"hardware": hardware, "torch": torch.__version__, "date": now.isoformat(timespec="seconds")}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"encode_topk_{hardware.replace(' ', '_')}_{now:%Y-%m-%d}"
    path = options.out / f"{name}.json"
    claims = [*cuda_claims(results), *row_claims(many)] if torch.cuda.is_available() else cpu_claims(results)
    for claim in claims:
        claim["device"] = hardware
    path.write_text(json.dumps({**report, "claims": claims, "results": results, "many_rows": many}, indent=1))
    path.with_suffix(".md").write_text(markdown(report, claims, results))
    print(path)


if __name__ == "__main__":
    main()
