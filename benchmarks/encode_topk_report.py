"""What the `encode_topk` benchmark claims, and its tables."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def claim(name: str, value: float, target: str, met: bool) -> Result:
    return {"name": name, "value": round(value, 4), "target": target, "met": bool(met)}


def cuda_claims(results: list[Result]) -> list[Result]:
    """The worst shape decides; `k32`, `k64` and shape conditions are in the name."""
    claims = []
    for name, row, narrowest, bound in (
        ("hint known, bf16, worst ratio to the GEMM, all shapes", "hopper-filter", 0, 1.00),
        ("hint known, bf16, worst ratio, d >= 2304", "hopper-filter", 2304, 0.95),
        ("hint known, bf16, portable, worst ratio", "triton-filter", 0, 1.00),
        ("no hint, bf16, worst ratio", "triton-groups", 0, 1.08),
    ):
        ratios = [r["rows"][row]["ratio"] for r in results if r["d_in"] >= narrowest and row in r["rows"]]
        if ratios:
            claims.append(claim(name, max(ratios), f"<= {bound}", max(ratios) <= bound))
    for row in ("hopper-filter", "triton-groups"):
        shares = [r["rows"][row]["extra_share"] for r in results if row in r["rows"]]
        if shares:
            name = f"{row}, extra memory as a share of the bf16 pre-activations, worst"
            claims.append(claim(name, max(shares), "<= 0.05", max(shares) <= 0.05))
    pairs = [
        (r["rows"]["sae-lens-fp32"]["ms"], r["rows"]["hopper-filter"]["ms"])
        for r in results
        if "sae-lens-fp32" in r["rows"] and "hopper-filter" in r["rows"]
    ]
    if pairs:
        slowest = min(theirs / ours for theirs, ours in pairs)
        claims.append(
            claim("times faster than sae-lens-style fp32, worst shape, k 32", slowest, ">= 20", slowest >= 20)
        )
    return claims


def row_claims(many: list[Result]) -> list[Result]:
    """Unflagged misses over all rows checked in float64, per implementation."""
    claims = []
    for which in dict.fromkeys(row["which"] for row in many):
        rows = [row for row in many if row["which"] == which]
        misses, total = sum(row["misses"] for row in rows), sum(row["rows"] for row in rows)
        claims.append(claim(f"{which}, unflagged misses in {total} rows", misses, "0", misses == 0))
    return claims


def cpu_claims(results: list[Result]) -> list[Result]:
    rows = results[0]["rows"]
    ratio = rows["encode_topk"]["ratio"]
    speedup = rows["sae-lens-fp32"]["ratio"] / ratio
    return [
        claim("CPU, ratio to the matrix product, d 576, D 9216, k 32", ratio, "<= 1.15", ratio <= 1.15),
        claim("CPU, times faster than sae-lens-style encode and top-k", speedup, ">= 2", speedup >= 2),
    ]


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


def markdown(report: Result, claims: list[Result], results: list[Result]) -> str:
    """The dated page beside the JSON."""
    lines = [f"# encode_topk on {report['hardware']}, {report['date']}, torch {report['torch']}", ""]
    lines += ["| claim | value | target | met |", "|---|---|---|---|"]
    lines += [
        f"| {c['name']} | {c['value']} | {c['target']} | {'yes' if c['met'] else 'no'} |" for c in claims
    ]
    lines += ["", "Milliseconds (ratio to the product alone).", ""]
    names = list(dict.fromkeys(name for result in results for name in result["rows"]))
    lines += ["| d x D, tokens, k | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        cells = [f"{result['d_in']} x {result['d_sae']}, {result['tokens']}, {result['k']}"]
        for name in names:
            row = result["rows"].get(name)
            cells.append(f"{row['ms']:.3f} ({row['ratio']:.2f})" if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Device after each shape: " + "; ".join(result["device_state"] for result in results)]
    return "\n".join(lines) + "\n"
