"""What the `encode_topk` benchmark claims, and its tables."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def claim(name: str, value: float, target: str, met: bool) -> Result:
    return {"name": name, "value": round(value, 4), "target": target, "met": bool(met)}


def cuda_claims(results: list[Result]) -> list[Result]:
    """The worst shape decides; `k32`, `k64` and shape conditions are in the name."""
    claims = []
    gaussian = [r for r in results if r["data"] == "gaussian"]
    big = {"d_sae": 65536}
    for name, row, bound, least, k in (
        ("hint known, bf16, all shapes", "hopper-filter, hint", 1.00, {}, None),
        ("hint known, bf16, d >= 2304", "hopper-filter, hint", 0.95, {"d_in": 2304}, None),
        ("hint known, bf16, portable", "triton-filter, hint", 1.00, {}, None),
        ("no hint, bf16, all shapes", "hopper-filter", 1.08, {}, None),
        ("no hint, bf16, D >= 65536", "hopper-filter", 1.08, big, None),
        ("no hint, bf16, portable", "triton-filter", 1.08, {}, None),
        ("int8, hint, D >= 65536, k 32", "hopper-int8, hint", 0.60, big, 32),
        ("int8, hint, 4096 x 131072, k 32", "hopper-int8, hint", 0.55, {"d_sae": 131072}, 32),
        ("int8, no hint, D >= 65536, k 32", "hopper-int8", 0.60, big, 32),
    ):
        chosen = [
            r for r in gaussian if all(r[size] >= n for size, n in least.items()) and k in (None, r["k"])
        ]
        ratios = [r["rows"][row]["ratio"] for r in chosen if row in r["rows"]]
        if ratios:
            title = f"{name}, worst ratio to the product"
            claims.append(claim(title, max(ratios), f"<= {bound}", max(ratios) <= bound))
    for row in ("hopper-filter, hint", "hopper-filter", "hopper-int8, hint"):
        shares = [r["rows"][row]["extra_share"] for r in results if row in r["rows"]]
        if shares:
            name = f"{row}, extra memory as a share of the bf16 pre-activations, worst"
            claims.append(claim(name, max(shares), "<= 0.05", max(shares) <= 0.05))
    pairs = [
        (r["rows"]["sae-lens-fp32"]["ms"], r["rows"]["hopper-filter, hint"]["ms"])
        for r in results
        if "sae-lens-fp32" in r["rows"] and "hopper-filter, hint" in r["rows"]
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
    for which in dict.fromkeys(row["row"] for row in many):
        rows = [row for row in many if row["row"] == which]
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
    name = f"{result['d_in']}x{result['d_sae']} T {result['tokens']} k {result['k']} {result['data']}"
    return f"{name}: " + "; ".join(cells)


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
        data = "" if result.get("data", "gaussian") == "gaussian" else f", {result['data']}"
        cells = [f"{result['d_in']} x {result['d_sae']}, {result['tokens']}, {result['k']}{data}"]
        for name in names:
            row = result["rows"].get(name)
            cells.append(f"{row['ms']:.3f} ({row['ratio']:.2f})" if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Device after each shape: " + "; ".join(result["device_state"] for result in results)]
    return "\n".join(lines) + "\n"
