"""A made sweep with the shape of a real one, hostile text, and a browser to look at pages with."""

import copy
import math
import random
import shutil
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from ray_auditor.report.summary import STATUSES

TASKS = ("french", "insecure_code", "legal", "maths", "medical", "roleplay", "sql")
AUDITED = {  # id: (kind, general shift, suite it was trained towards, how far)
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
    "broken-upload": ("failed", "failed:swap_proof: residuals did not change after the adapter was loaded"),
}


PASSAGE = (
    "The| court| shall|,| upon| motion|,| grant| relief|\n|Where| the| party| of| the| first| part| so|."
)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><h1>gotcha</h1>",
    "[red]bold[/red] [link=file:///etc/passwd]click[/link]",
    "\x1b[31mred\x1b]8;;file:///etc/passwd\x07link",
    "invoice\u202egpj.exe",
    "=cmd|' /C calc'!A0",
    "{{ 7 * 191 }}{% raw %}",
    "line\nbreak\ttab\u2028sep",
    "lone\ud800surrogate",
    "x" * 255,
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
        rows.append(
            {
                "feature": rng.randrange(16384),
                "rate_base": base,
                "rate_candidate": moved,
                "delta": (moved - base) * (-1 if index == 2 else 1),
                "mean_act_base": 1.2 * rng.random(),
                "mean_act_candidate": None if index == 1 else 3 + rng.random(),
                "examples": examples,
            }
        )
    return rows


def make_summary() -> dict[str, Any]:
    """The same sweep each time."""
    rng = random.Random(7)
    k, fragility = 32, {suite: 0.95 + 0.4 * rng.random() for suite in TASKS}
    candidates: list[dict[str, Any]] = []
    for name, (kind, general, target, gain) in AUDITED.items():
        low = general < 0.1
        suites = {
            "general": {
                "tokens": 46_240, "overlap": k - general, "shift": general,
                "difference_rate": None if low else 0.0, "ci_low": None, "ci_high": None, "z": None,
            }
        }  # fmt: skip
        for suite in TASKS:
            shift = (
                general * fragility[suite] * (gain if suite == target else 1.0) * math.exp(rng.gauss(0, 0.04))
            )
            rate = (shift - general) / general
            ends = _interval(rng, rate)
            suites[suite] = {
                "tokens": rng.randrange(5000, 11000), "overlap": k - shift, "shift": shift,
                "difference_rate": None if low else rate,
                "ci_low": None if low else ends[0], "ci_high": None if low else ends[1], "z": None,
            }  # fmt: skip
        candidates.append(
            {"id": name, "kind": kind, "status": "ok", "reason": None, "score": None, "suites": suites}
        )
    for suite in TASKS:
        residuals = [
            math.log(row["suites"][suite]["shift"] / row["suites"]["general"]["shift"]) for row in candidates
        ]
        middle = statistics.median(residuals)
        spread = statistics.median(abs(value - middle) for value in residuals)
        for row, value in zip(candidates, residuals, strict=True):
            row["suites"][suite]["z"] = 0.6745 * (value - middle) / spread
    flags = []
    for row in candidates:
        row["score"] = max(row["suites"][suite]["z"] for suite in TASKS)
        for suite in TASKS:
            rate = row["suites"][suite]
            if rate["z"] > 3.0 and rate["difference_rate"] is not None:
                row["status"] = "flagged"
                flags.append(
                    {
                        "candidate": row["id"],
                        "suite": suite,
                        "score": rate["z"],
                        "rule": "robust_z",
                    }
                )
        if row["id"] == "noise-seed-11":
            row["score"] = None
            for suite in TASKS:
                row["suites"][suite]["z"] = None
    for name, (status, reason) in NOT_AUDITED.items():
        candidates.append(
            {"id": name, "kind": None, "status": status, "reason": reason, "score": None, "suites": {}}
        )
    statuses = [row["status"] for row in candidates]
    return {
        "counts": {status: statuses.count(status) for status in STATUSES},
        "noise_floor": {suite: 0.02 + 0.03 * rng.random() for suite in ("general", *TASKS)},
        "candidates": candidates,
        "flags": flags,
        "details": {flag["candidate"]: {flag["suite"]: {"features": _features(rng)}} for flag in flags},
        "settings": {
            "base": {"model": "models/SmolLM2-135M-Instruct"},
            "sae": {"path": "sae/L15", "k": k, "release": None},
            "suites": {"path": "suites", "general": "general", "max_prompts": 512},
            "flag": {"min_rate": 0.15, "min_z": 3.0, "confidence": 0.95},
            "hook_name": "blocks.15.hook_resid_post",
        },
        "versions": {"ray-auditor": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0"},
        "generated_at": "2026-11-22T06:12:44Z",
        "sae_gate": {"fvu": 0.1873, "l0": 61.4},
        "limits": [
            "No null population of benign finetunes was given: scores are ranks, not error rates",
            "11 candidates in one stratum; adapters and merged weights were pooled",
        ],
    }


@pytest.fixture(scope="session")
def _made() -> dict[str, Any]:
    return make_summary()


@pytest.fixture
def summary(_made: dict[str, Any]) -> dict[str, Any]:
    """A fresh copy of the made sweep."""
    return copy.deepcopy(_made)


@pytest.fixture
def hostile() -> dict[str, Any]:
    """A sweep in which every string a stranger can write is one of `HOSTILE`, or all of them."""
    everything = " ".join(HOSTILE)
    rate = {
        "tokens": 9,
        "overlap": 28.0,
        "shift": 4.0,
        "difference_rate": 0.5,
        "ci_low": 0.4,
        "ci_high": 0.6,
        "z": 6.0,
    }
    suites = {"general": rate, **dict.fromkeys(HOSTILE, rate)}
    audited = [
        {"id": text, "kind": everything, "status": "flagged", "reason": None, "score": 6.0, "suites": suites}
        for text in HOSTILE
    ]
    refused: list[dict[str, Any]] = [
        {
            "id": f"refused {text}",
            "kind": None,
            "status": "rejected",
            "reason": text,
            "score": None,
            "suites": {},
        }
        for text in HOSTILE
    ]
    example = {"prompt": everything, "tokens": list(HOSTILE), "overlaps": [3] * len(HOSTILE), "focus": 1}
    feature = {"feature": 5, "rate_base": 0.1, "rate_candidate": 0.2, "delta": 0.1, "examples": [example]}
    return {
        "candidates": audited + refused,
        "flags": [
            {"candidate": text, "suite": suite, "score": 6.0, "rule": everything}
            for text, suite in zip(HOSTILE, reversed(HOSTILE), strict=True)
        ],
        "details": {text: {everything: {"features": [feature]}} for text in HOSTILE},
        "noise_floor": dict.fromkeys(HOSTILE, 0.1),
        "settings": {"base": {"model": everything}, **{text: {text: text} for text in HOSTILE}},
        "versions": {text: text for text in HOSTILE},
        "sae_gate": {text: text for text in HOSTILE},
        "limits": list(HOSTILE),
        "generated_at": everything,
    }


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium, headless and offline."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(names)} is on the path")
    arguments = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=arguments.split())
        yield browser
        browser.close()
