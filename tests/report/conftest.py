"""The made sweep, hostile text, and a browser to look at pages with."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from ray_auditor.report.html import write_html
from tests.report.made_sweep import make_summary

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


@pytest.fixture(scope="session")
def _made() -> dict[str, Any]:
    return make_summary()


@pytest.fixture
def summary(_made: dict[str, Any]) -> dict[str, Any]:
    """A fresh copy of the made sweep."""
    return copy.deepcopy(_made)


@pytest.fixture
def made() -> Callable[[int], dict[str, Any]]:
    """The made sweep with so many benign finetunes."""
    return make_summary


@pytest.fixture
def without_null() -> dict[str, Any]:
    """The made sweep, its candidates held to each other."""
    return make_summary(0)


@pytest.fixture
def report(summary: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_html(summary, path)
    return path


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
        "miss_z": 5.0,
    }
    suites = {"general": rate, **dict.fromkeys(HOSTILE, rate)}
    audited = [
        {
            "id": text,
            "kind": everything,
            "status": "flagged",
            "reason": None,
            "score": 6.0,
            "score_low": 4.0,
            "suite": everything,
            "p": 0.1,
            "q": 0.1,
            "why": everything,
            "proof": everything,
            "rivals": {
                "relative_change": 0.1,
                "mean_difference": {everything: 0.2, **dict.fromkeys(HOSTILE, 0.1)},
            },
            "suites": suites,
        }
        for text in HOSTILE
    ]
    misfits: list[dict[str, Any]] = [
        {
            "id": f"misfit {text}",
            "kind": None,
            "status": "sae_misfit",
            "reason": text,
            "score": None,
            "suites": {name: {"tokens": 9, "fvu": 0.6, "base_fvu": 0.1} for name in ("general", text)},
        }
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
    sides = {"base": [[5, 1.0], [6, 0.5]], "candidate": [[6, 1.0]]}
    example = {"prompt": everything, "tokens": list(HOSTILE), "overlaps": [3] * len(HOSTILE), "focus": 1}
    example["sides"] = sides
    passage = {"suite": everything, "prompt": everything, "tokens": list(HOSTILE), "focus": 2, "act": 1.0}
    labels = {
        "5": {"text": everything, "source": "suites", "prompts": [passage], "base_rate": 0.1},
        "6": {"text": HOSTILE[0], "source": "neuronpedia", "by": everything, "base_rate": 0.1},
    }
    feature = {"feature": 5, "rate_base": 0.1, "rate_candidate": 0.2, "delta": 0.1, "examples": [example]}
    return {
        "candidates": audited + refused + misfits,
        "flags": [
            {"candidate": text, "suite": suite, "score": 6.0, "rule": everything, "new": True}
            for text, suite in zip(HOSTILE, reversed(HOSTILE), strict=True)
        ],
        "details": {text: {everything: {"features": [feature]}} for text in HOSTILE},
        "labels": labels,
        "noise_floor": dict.fromkeys(HOSTILE, 0.1),
        "settings": {
            "neuronpedia_id": everything,
            "base": {"model": everything},
            **{text: {text: text} for text in HOSTILE},
        },
        "versions": {text: text for text in HOSTILE},
        "null": {"scores": {f"null/{text}": 0.5 for text in HOSTILE}, "num_listed": len(HOSTILE)},
        "calibration": {
            "generated_at": everything,
            "variants": [
                {"name": text, "what": text, "reason": text if at % 2 else None, "shift": {text: 0.1}}
                for at, text in enumerate(HOSTILE)
            ],
        },
        "sae_gate": {"fvu": 0.1, "bounds": {"max_fvu": 0.5, "source": everything}},
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
