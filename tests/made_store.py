"""A small finished sweep, made without an engine: real shards, sums, flags and outputs of planted rows."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_auditor.features import describe_features, moved_features
from ray_auditor.flag import FlagRule, flag_population
from ray_auditor.outputs import write_outputs
from ray_auditor.rates import Bootstrap
from ray_auditor.reduce import reduce_prompts
from ray_auditor.report.finding import exit_code_of
from ray_auditor.store import Store, SuitePrompt, TokenRows, Unit

K, D_SAE = 8, 512
PLANTED_FEATURE = 77
SENTENCES = {
    "general": "the cat sat on the mat while rain fell on the old town and a train left for the coast",
    "legal": "the court shall upon motion grant relief where the party of the first part so moves in writing",
    "sql": "select name from users where age is above ten group by town order by name limit five rows",
}
NUM_PROMPTS = 16
PLANTED, REFUSED = "org/planted-sql", "org/broken"


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _prompts() -> list[SuitePrompt]:
    words = sorted({word for text in SENTENCES.values() for word in text.split()})
    prompts = []
    for suite_id, (suite, text) in enumerate(SENTENCES.items()):
        for number in range(NUM_PROMPTS):
            turned = text.split()[number:] + text.split()[:number]
            texts = [turned[0], *(f" {word}" for word in turned[1:])]
            ids = [words.index(word) for word in turned]
            prompts.append(
                SuitePrompt(
                    suite_id, suite, number, "".join(texts), ids, texts, [False] + [True] * (len(ids) - 1)
                )
            )
    return prompts


def _rows(prompts: list[SuitePrompt], seed: int, *, changed: float = 0.0, planted: bool = False) -> TokenRows:
    """Rows in which a token's features follow from its word; a share of them is another, for a finetune."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {
        "suite": [],
        "prompt": [],
        "position": [],
        "idx": [],
        "acts": [],
        "err": [],
    }
    for prompt in prompts:
        for position, (token, scored) in enumerate(zip(prompt.token_ids, prompt.content, strict=True)):
            if not scored:
                continue
            of_word = np.random.default_rng(token)
            idx = of_word.choice(np.arange(100, D_SAE), K, replace=False)
            acts = np.sort(of_word.random(K) * 4 + 1)[::-1].copy()
            error = 0.2 * np.exp(0.1 * of_word.standard_normal())
            if changed:
                swap = rng.random(K) < changed
                idx[swap] = rng.choice(np.setdiff1d(np.arange(100, D_SAE), idx), swap.sum(), replace=False)
                error *= np.exp(0.3 * rng.standard_normal())
            if planted and prompt.suite == "sql":
                idx[-1], acts[-1] = PLANTED_FEATURE, 6 + rng.random()
                error *= 1.4
            values = (prompt.suite_id, prompt.prompt, position, idx, acts, error)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    N = len(columns["suite"])
    return TokenRows.from_unsorted(
        columns["suite"],
        columns["prompt"],
        columns["position"],
        np.array(columns["idx"]),
        np.array(columns["acts"]),
        np.array(columns["err"]),
        np.ones(N),
        np.full(N, 1 - changed / 10) if changed else None,
        np.full(N, changed) if changed else None,
    )


def make_out_dir(out_dir: Path) -> Path:
    """Write the sweep into `out_dir`: twelve finetunes, one planted, one refused."""
    store = Store(out_dir / "store")
    prompts = _prompts()
    base_unit = Unit(
        _key("base"), _key("base"), _key("sae"), "blocks.1.hook_resid_post", _key("suites"), K, D_SAE, "made"
    )
    store.write_suites(base_unit.suites_key, prompts)
    base = _rows(prompts, 0)
    store.commit(base_unit, base, {"name": "base", "seconds": {"encode": 1.0}})
    names = [*(f"org/chat-{number:02}" for number in range(11)), PLANTED]
    units = {name: replace(base_unit, candidate_key=_key(name)) for name in names}
    tables = {}
    for seed, name in enumerate(names, 1):
        rows = _rows(prompts, seed, changed=0.1 + 0.01 * seed, planted=name == PLANTED)
        store.commit(units[name], rows, {"name": name, "seconds": {"swap": 0.25, "encode": 1.0}})
        tables[name] = reduce_prompts(base, rows, suites=list(SENTENCES))
    population = flag_population(
        tables, general="general", k=K, bootstrap=Bootstrap(200, 0.95, 0), rule=FlagRule()
    )
    flagged = {flag.candidate for flag in population.flags}
    candidates: list[dict[str, Any]] = []
    for name in names:
        standing = population.standings[name]
        cells = {
            suite: asdict(cell.rate) | {"z": cell.z, "miss_z": cell.miss_z, "over_rate": cell.over_rate}
            for suite, cell in population.cells[name].items()
        }
        scores = ("score", "score_low", "p", "q", "joint_p", "suite")
        candidates.append(
            {"id": name, "kind": "adapter", "status": "flagged" if name in flagged else "ok", "reason": None}
            | {key: getattr(standing, key) for key in scores}
            | {"rivals": {"mean_difference": dict.fromkeys(SENTENCES, 0.1), "relative_change": 0.01}}
            | {"unit_key": units[name].key, "content_sha256": _key(name), "declared_base": None}
            | {"why": "new", "suites": cells}
        )
    refused = dict.fromkeys([*candidates[0], "kind"]) | {"status": "rejected", "suites": {}, "why": "new"}
    candidates.append(refused | {"id": REFUSED, "reason": "rejected:json: not JSON"})
    details: dict[str, Any] = {}
    for flag in population.flags:
        number = list(SENTENCES).index(flag.suite)
        rows = store.read_rows(units[flag.candidate].key)
        of_suite = [one for one in prompts if one.suite_id == number]
        moved = describe_features(moved_features(base, rows, number, 0), base, rows, of_suite)
        details.setdefault(flag.candidate, {})[flag.suite] = {"features": moved}
    summary: dict[str, Any] = {
        "counts": {"ok": 12 - len(flagged), "flagged": len(flagged), "rejected": 1},
        "noise_floor": dict.fromkeys(SENTENCES, 0.0),
        "calibration": None,
        "sae_gate": None,
        "null": {"units": {}, "scores": {}, "num_listed": 0},
        "candidates": candidates,
        "flags": [asdict(flag) | {"new": True} for flag in population.flags],
        "details": details,
        "limits": list(population.limits),
        "settings": {
            "base": {"model": "made/base"}, "flag": asdict(FlagRule()), "k": K, "general": "general",
            "suite_names": list(SENTENCES), "hook_name": base_unit.hook_name, "base_key": base_unit.base_key,
            "sae_key": base_unit.sae_key, "suites_key": base_unit.suites_key, "engine_class": "made",
            "unit_keys": {"base": base_unit.key, "replay": base_unit.key}, "neuronpedia_id": None,
        },
        "versions": {"ray-auditor": "0.1.0"},
        "generated_at": "2026-11-22T06:12:44+00:00",
    }  # fmt: skip
    write_outputs(summary | {"exit_code": exit_code_of(summary)}, out_dir)
    return out_dir
