"""How often the bootstrap interval of a difference rate holds the true rate, over simulated sweeps.

Prompts are drawn from two populations of known means; shifts of a prompt are skewed and go with its length,
as measured ones do. A nominal 95% interval should hold the truth in 93 to 97% of sweeps.

    python benchmarks/bench_coverage.py [NUM_SWEEPS]
"""

# Shape suffixes: P prompts.

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ray_auditor.rates import Bootstrap, SuiteSums, rates_from_sums

K, NUM_SAMPLES = 32, 1000
SIZES = ((30, 30), (100, 150), (512, 512))  # prompts of the suite and of the general suite
TARGET = (0.93, 0.97)
SPREAD, LENGTH_SPREAD = 0.5, 0.4  # of log shift and log length between prompts
MEAN_SHIFT = {"general": 3.0, "suite": 4.5}


def draw(suite: str, num_prompts: int, rng: np.random.Generator) -> SuiteSums:
    """Sums of one suite, prompts drawn anew."""
    length = np.maximum(np.exp(rng.normal(np.log(60), LENGTH_SPREAD, num_prompts)).astype(np.int64), 1)
    mean = MEAN_SHIFT[suite] * np.exp(rng.normal(-(SPREAD**2) / 2, SPREAD, num_prompts))
    mean *= (length / 60) ** -0.2  # long prompts shift less a token
    shift = rng.binomial(length * K, np.minimum(mean / K, 1))
    none = np.zeros(num_prompts)
    return SuiteSums(
        prompt_P=np.arange(num_prompts),
        tokens_P=length,
        shift_P=shift,
        overlap_P=length * K - shift,
        shift_quartic_P=shift**4 // length**3,
        log_miss_P=none,
        change_quartic_P=none,
        jaccard=0.0,
        cosine=1.0,
        change=0.0,
        fvu=0.0,
        base_fvu=0.0,
    )


def coverage(num_suite: int, num_general: int, num_sweeps: int) -> float:
    """Share of simulated sweeps whose interval holds the true rate."""
    rng = np.random.default_rng(num_suite)
    true = draw("suite", 2_000_000, rng).shift / draw("general", 2_000_000, rng).shift - 1
    held = 0
    for sweep in range(num_sweeps):
        sums = {"suite": draw("suite", num_suite, rng), "general": draw("general", num_general, rng)}
        rate = rates_from_sums(sums, "general", K, Bootstrap(NUM_SAMPLES, seed=sweep), 0.0)["suite"]
        assert rate.ci_low is not None
        assert rate.ci_high is not None
        held += rate.ci_low <= true <= rate.ci_high
    return held / num_sweeps


def main() -> None:
    """Simulate, print and write the result file."""
    num_sweeps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    claims = []
    for sizes in SIZES:
        value = coverage(*sizes, num_sweeps)
        print(f"{sizes[0]} and {sizes[1]} prompts: the 95% interval holds the truth in {value:.1%}")
        claims.append(
            {
                "name": f"coverage of the 95% interval, {sizes[0]} and {sizes[1]} prompts, of {num_sweeps}",
                "value": value,
                "target": list(TARGET),
                "met": TARGET[0] <= value <= TARGET[1],
                "device": "cpu",
            }
        )
    date = datetime.now(UTC).date().isoformat()
    path = Path(__file__).parent / "results" / f"coverage_{date}.json"
    path.write_text(json.dumps({"date": date, "num_samples": NUM_SAMPLES, "claims": claims}, indent=1) + "\n")


if __name__ == "__main__":
    main()
