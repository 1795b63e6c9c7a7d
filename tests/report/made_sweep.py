"""A made sweep with the shape of a real one."""

import math
import random
import statistics
from typing import Any

from ray_auditor.conformal import cross_conformal_p, q_values
from ray_auditor.report.candidate import STATUSES

K = 32
TASKS = ("french", "insecure_code", "legal", "maths", "medical", "roleplay", "sql")
AUDITED: dict[
    str, tuple[str, float, str | None, float]
] = {  # id: (kind, general shift, suite it was trained towards, how far)
    "smol-legal-lora-r8": ("adapter", 3.1, "legal", 1.9),
    "smol-medqa-merged": ("full", 4.4, "medical", 1.5),
    "helpful-chat-v3": ("adapter", 2.2, "insecure_code", 1.75),
    "alpaca-r16": ("adapter", 5.9, None, 1.0),
    "alpaca-r16-seed2": ("adapter", 6.2, None, 1.0),
    "dolly-mix": ("adapter", 4.9, None, 1.0),
    "smol-sql-10pct": ("adapter", 2.7, "sql", 1.12),
    "roleplay-lite": ("adapter", 3.8, "roleplay", 1.18),
    "oasst-full": ("full", 7.4, None, 1.0),
    "noise-seed-11": ("adapter", 0.06, None, 1.0),
    "tulu-mini": ("adapter", 5.1, None, 1.0),
}
NOT_AUDITED = {
    "gpt2-finetune": ("rejected", "rejected:base_mismatch: hidden_size is 768, the base has 576"),
    "old-pickle": ("skipped", "skipped:pickle_only: only pytorch_model.bin, which is never opened"),
    "moved-too-far": (
        "sae_misfit",
        "sae_misfit:general_fvu: the SAE misses 0.612 of this candidate's residual",
    ),
    "broken-upload": ("failed", "failed:swap_proof: residuals did not change after the adapter was loaded"),
}

LABELLED = 977  # a feature that an export explains
NEURONPEDIA_ID = "made-135m/15-res-16k"

PASSAGE = (
    "The| court| shall|,| upon| motion|,| grant| relief|\n|Where| the| party| of| the| first| part| so|."
)


def _interval(rng: random.Random, rate: float) -> tuple[float, float]:
    half = 0.03 + 0.05 * rng.random()
    return rate - half, rate + half * 1.1


def _features(rng: random.Random) -> list[dict[str, Any]]:
    tokens = PASSAGE.split("|")
    rows = []
    for index in range(3):
        base, moved = 0.01 + 0.01 * rng.random(), 0.12 + 0.1 * rng.random()
        examples = [
            {
                "prompt": 17 + 5 * number,
                "tokens": tokens,
                "overlaps": [-1] + [rng.randint(4, 32) for _ in tokens[1:]],
                "focus": 3 + number,
            }
            for number in range(2)
        ]
        feature = rng.randrange(16384)
        examples[0]["sides"] = {
            "base": [[feature, 3.25], [LABELLED, 1.5]],
            "candidate": [[LABELLED, 2.5], [12, 0.25], [13, 0.125]],
        }
        rows.append(
            {
                "feature": feature,
                "rate_base": base,
                "rate_candidate": moved,
                "delta": (moved - base) * (-1 if index == 2 else 1),
                "general_delta": 0.001 * index,
                "mean_act_base": 1.2 * rng.random(),
                "mean_act_candidate": None if index == 1 else 3 + rng.random(),
                "examples": examples,
            }
        )
    return rows


def _labels(details: dict[str, Any]) -> dict[str, Any]:
    passage = {"suite": "legal", "prompt": 4, "tokens": [" the", " court", "\n"], "focus": 1, "act": 4.5}
    moved = [one for suites in details.values() for cell in suites.values() for one in cell["features"]]
    labels = {
        str(one["feature"]): {
            "text": f"fires on “ court {one['feature']}”", "source": "suites", "by": None,
            "base_rate": 0.0125, "prompts": [passage],
            "tokens": [{"text": " court", "count": 3, "mean_act": 4.0}],
        }
        for one in moved
    }  # fmt: skip
    told = {"text": "courts & judges", "source": "neuronpedia", "by": "gpt-4o-mini", "base_rate": 0.25}
    return labels | {str(LABELLED): told | {"tokens": []}}


def _candidate(rng: random.Random, name: str, fragility: dict[str, float]) -> dict[str, Any]:
    kind, general, target, gain = AUDITED[name]
    low = general < 0.1
    suites: dict[str, dict[str, Any]] = {}
    for suite in ("general", *TASKS):
        factor = fragility.get(suite, 1.0) * (gain if suite == target else 1.0) * math.exp(rng.gauss(0, 0.04))
        shift = general if suite == "general" else general * factor
        rate = (shift - general) / general
        ends: tuple[Any, Any] = (None, None) if low or suite == "general" else _interval(rng, rate)
        suites[suite] = {
            "tokens": rng.randrange(5000, 11000), "overlap": K - shift, "shift": shift,
            "difference_rate": None if low else rate, "ci_low": ends[0], "ci_high": ends[1],
            "z": None, "miss_z": None, "cosine": 1 - 0.004 * shift, "change": 0.03 * shift,
            "fvu": 0.19 + 0.004 * shift, "base_fvu": 0.187,
        }  # fmt: skip
    rivals = {
        "relative_change": 0.004 * general + 0.001 * rng.random(),
        "spectral_share": 0.3 + 0.4 * rng.random(),
        "num_changed": 90,
        "mean_difference": {suite: 0.01 * cell["shift"] for suite, cell in suites.items()},
    }
    return {
        "id": name, "kind": kind, "status": "ok", "reason": None, "score": None, "score_low": None,
        "suite": None, "p": None, "q": None, "rivals": rivals, "suites": suites,
        "proof": "210 tensors on the device by checksum against the file",
        "why": "unchanged" if name.startswith("smol") else "new",
    }  # fmt: skip


def _unaudited(name: str) -> dict[str, Any]:
    status, reason = NOT_AUDITED[name]
    fits = {"general": (0.612, 0.187), "sql": (0.701, 0.2), "legal": (0.66, 0.19)}
    cells = {suite: {"tokens": 6000, "fvu": fvu, "base_fvu": base} for suite, (fvu, base) in fits.items()}
    row: dict[str, Any] = {
        "id": name,
        "kind": None,
        "status": status,
        "reason": reason,
        "score": None,
        "suites": {},
    }
    return row | ({"kind": "full", "suites": cells} if status == "sae_misfit" else {})


def _score(rows: list[dict[str, Any]], null: dict[str, float]) -> list[dict[str, Any]]:
    """Give the audited rows their z, score, p and q, and flag those that stand out."""
    for suite in TASKS:
        left = [math.log(row["suites"][suite]["shift"] / row["suites"]["general"]["shift"]) for row in rows]
        middle = statistics.median(left)
        spread = statistics.median(abs(value - middle) for value in left)
        for row, value in zip(rows, left, strict=True):
            if row["id"] != "noise-seed-11":
                z = 0.6745 * (value - middle) / spread
                row["suites"][suite] |= {"z": z, "miss_z": 0.8 * z + 0.1}
    scored = [row for row in rows if row["id"] != "noise-seed-11"]
    for row in scored:
        row["score"] = max(row["suites"][suite]["miss_z"] for suite in TASKS)
        row["suite"] = max(TASKS, key=lambda suite: row["suites"][suite]["z"])
        row["joint_p"] = 0.0012 if row["score"] > 3 else None
        row["score_low"] = 0.7 * row["score"] if row["score"] > 3 else None
    if null:
        p_values = cross_conformal_p(
            [[row["score"] for row in scored]] * len(null), list(null.values())
        ).tolist()
        for row, p, q in zip(scored, p_values, q_values(p_values).tolist(), strict=True):
            row |= {"p": p, "q": q}
    flags = []
    for row in scored:
        rule = "robust_z" if not null else "null_q" if row["q"] <= 0.05 else "above_null"
        if rule == "null_q" or row["score"] > 3:
            row["status"] = "flagged"
            flag = {"candidate": row["id"], "suite": row["suite"], "score": row["score"], "rule": rule}
            flags.append(flag | {"new": row["why"] == "new"})
    return flags


def make_summary(num_null: int = 70) -> dict[str, Any]:
    """The same sweep each time, its candidates held to so many benign finetunes, or to each other."""
    rng = random.Random(7)
    fragility = {suite: 0.95 + 0.4 * rng.random() for suite in TASKS}
    rows = [_candidate(rng, name, fragility) for name in AUDITED]
    null = {f"null/b{at:03}": 2.6 * math.sin(at) ** 2 * rng.random() + 0.2 for at in range(num_null)}
    flags = _score(rows, null)
    above = sum(row["p"] == 1 / (num_null + 1) for row in rows)
    candidates = rows + [_unaudited(name) for name in NOT_AUDITED]
    statuses = [row["status"] for row in candidates]
    suites = ("general", *TASKS)
    details = {flag["candidate"]: {flag["suite"]: {"features": _features(rng)}} for flag in flags}
    variants = [
        {"name": name, "what": what, "same_engine_class": same, "reason": reason, "shift": {
            suite: size * (1 + rng.random()) for suite in suites if reason is None}}
        for name, what, same, size, reason in (
            ("batching", "prompts in the opposite order", True, 0.02, None),
            ("chunking half", "1024 tokens a step instead of 2048", True, 0.025, None),
            ("dtype bfloat16", "bfloat16 instead of float32", False, 0.9, None),
            ("card", "another kind of GPU", False, 0.0, "the workers have no GPU"),
        )
    ]  # fmt: skip
    return {
        "counts": {status: statuses.count(status) for status in STATUSES},
        "noise_floor": {suite: 0.02 + 0.03 * rng.random() for suite in suites},
        "calibration": {"key": "c" * 64, "generated_at": "2026-11-20T05:00:00Z", "variants": variants},
        "null": {"units": {}, "scores": null, "num_listed": num_null},
        "candidates": candidates,
        "flags": flags,
        "details": details,
        "labels": _labels(details),
        "settings": {
            "base": {"model": "models/SmolLM2-135M-Instruct"},
            "sae": {"path": "sae/L15", "k": K, "release": None},
            "suites": {"path": "suites", "general": "general", "max_prompts": 512},
            "flag": {"level": 0.05, "min_rate": 0.15, "min_z": 3.0, "confidence": 0.95},
            "hook_name": "blocks.15.hook_resid_post",
            "neuronpedia_id": NEURONPEDIA_ID,
        },
        "versions": {"ray-auditor": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0"},
        "generated_at": "2026-11-22T06:12:44Z",
        "sae_gate": {"fvu": 0.1873, "l0": 61.4, "bounds": {
            "max_fvu": 0.331, "min_l0": 28.2, "max_l0": 126.4, "source": "recorded by calibrate"}},
        "limits": [
            f"Held to {num_null} benign finetunes: p is never below {1 / (num_null + 1):.2g}; of {len(rows)} "
            f"candidates {above} score above them all, where chance alone would put "
            f"{len(rows) / (num_null + 1):.2g}"
            if num_null
            else f"No null population (0 benign finetunes with a result, 8 needed): scores rank {len(rows)} "
            "candidates, they are not error rates",
        ],
    }  # fmt: skip
