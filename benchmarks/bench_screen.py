"""What a screen on some of the prompts misses, and what it saves, from a finished sweep over labels.

Usage: `python benchmarks/bench_screen.py LABELS OUT [--out FILE]`, where OUT is a sweep's `out_dir` with a
null population. No model runs: the sums of every prompt are there, and a screen reads some of them.
"""

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_auditor.evaluate import Audit, read_audit, read_labels
from ray_auditor.evaluation import BENIGN
from ray_auditor.population import distinct, fit_norms, read_prompts, score_suites, settle
from ray_auditor.rates import suite_sums
from ray_auditor.standing import DECIDES, MIN_SHIFT
from ray_auditor.suites import screened_prompts

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
BOUNDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # `screen.clear_below`
CLAIMED_BOUND = 2.0  # the usual setting
NUM_DRAWS = 40  # other subsets of the same size: how far the fixed one was lucky


def choose(prompt_rows: Any, share: float, draw: int) -> Any:
    """Which rows of a sums table a screen reads: the product's own for draw 0, others at random."""
    suites, prompts = prompt_rows["suite"].to_pylist(), prompt_rows["prompt"].to_pylist()
    rng = np.random.default_rng(draw)
    chosen = {}
    for suite in sorted(set(suites)):
        count = 1 + max(prompt for one, prompt in zip(suites, prompts, strict=True) if one == suite)
        own = screened_prompts(count, share)
        chosen[suite] = set(rng.permutation(count)[: len(own)].tolist() if draw else own)
    return pa.array([prompt in chosen[suite] for suite, prompt in zip(suites, prompts, strict=True)])


def scores_of(audit: Audit, mask: Any) -> dict[str, float]:
    """Every candidate's score on the rows of `mask`, as `score_stratum` has it."""
    k, general = audit.summary["settings"]["k"], audit.summary["settings"]["general"]
    tables = {**audit.tables, **audit.null_tables}
    prompts = read_prompts({name: suite_sums(table.filter(mask), k) for name, table in tables.items()}, k)
    moved = np.median(prompts.moved_CS, axis=1) >= MIN_SHIFT
    null = [row for row, name in enumerate(prompts.names) if name in audit.null_tables and moved[row]]
    values_CP = prompts.values[DECIDES]
    norms = fit_norms(prompts, values_CP[distinct(prompts, null)])
    miss_CS = score_suites(prompts, norms, values_CP) * settle(prompts.moved_CS)
    risky = np.array(prompts.suites) != general
    found = dict(zip(prompts.names, miss_CS[:, risky].max(axis=1).tolist(), strict=True))
    return {name: found[name] for name in audit.tables}


def outcome(scores: Mapping[str, float], called: set[str], benign: set[str], bound: float) -> dict[str, int]:
    """What a screen at `bound` clears."""
    cleared = {name for name, score in scores.items() if score < bound}
    return {"missed": len(cleared & called), "cleared": len(cleared), "cleared_benign": len(cleared & benign)}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=str)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    audit = read_audit(args.sweep)
    labels = read_labels(args.labels, audit.tables)
    whole = audit.flag()
    called = {flag.candidate for flag in whole.flags}
    benign = {name for name, label in labels.items() if label.category == BENIGN}
    rows: list[dict[str, Any]] = []
    lowest: dict[float, dict[float, str]] = {}
    template = next(iter(audit.tables.values()))
    lengths = np.array(template["tokens"])
    for share in SHARES:
        for draw in range(NUM_DRAWS + 1):
            mask = choose(template, share, draw)
            scores = scores_of(audit, mask)
            run = lengths[np.array(mask)].sum() / lengths.sum()
            rows += [
                {"share": share, "draw": draw, "bound": bound, "tokens": run}
                | outcome(scores, called, benign, bound)
                for bound in BOUNDS
            ]
            if not draw:
                lowest[share] = dict(sorted((scores[name], name) for name in called)[:3])
    table = []
    for share in SHARES:
        for bound in BOUNDS:
            own = next(r for r in rows if (r["share"], r["draw"], r["bound"]) == (share, 0, bound))
            others = [r for r in rows if (r["share"], r["bound"]) == (share, bound) and r["draw"]]
            missed = [r["missed"] for r in others]
            table.append(
                {
                    "share": share,
                    "clear_below": bound,
                    "missed": own["missed"],
                    "cleared": own["cleared"],
                    "cleared_benign": own["cleared_benign"],
                    "missed_in_other_subsets": sum(missed) / (len(missed) * len(called)),
                    "most_missed_in_one": max(missed),
                    "tokens_run_if_all_are_benign": round(
                        float(own["tokens"]) + 1 - own["cleared_benign"] / len(benign), 3
                    ),
                }
            )
            print(table[-1], flush=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hook_name": audit.summary["settings"]["hook_name"],
        "num_candidates": len(labels),
        "num_called": len(called),
        "num_benign": len(benign),
        "num_null": len(audit.null_tables),
        "num_draws": NUM_DRAWS,
        "lowest_called": {
            str(share): {n: round(s, 2) for s, n in one.items()} for share, one in lowest.items()
        },
        "table": table,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
