"""What stands behind the strongest flags: features that moved, where they show, what they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_auditor.features import describe_features, moved_features
from ray_auditor.flag import Flag
from ray_auditor.labels import label_features, read_explanations
from ray_auditor.plan import Plan
from ray_auditor.shard import TokenRows

MAX_DETAILED = 200  # flags whose moved features are kept in the summary


def describe_flags(plan: Plan, base: TokenRows, flags: Sequence[Flag]) -> dict[str, Any]:
    """The summary's `details` (candidate -> suite -> features) and `labels` (feature -> what it stands for).

    Args:
        plan: The sweep; every flagged candidate has a committed unit.
        base: The base's rows.
        flags: The strongest first.

    Raises:
        ValueError: The export under `sae.explanations` is damaged.
    """
    unit_of = {row.id: row.unit for row in plan.candidates}
    prompts = plan.store.read_suites(plan.suites.key)
    details: dict[str, dict[str, Any]] = {}
    moved_ones, beside = set[int](), set[int]()
    for flag in flags[:MAX_DETAILED]:
        unit = unit_of[flag.candidate]
        assert unit is not None, f"{flag.candidate} is flagged and has no unit"
        rows = plan.store.read_rows(unit.key)
        number = plan.suites.names.index(flag.suite)
        of_suite = [prompt for prompt in prompts if prompt.suite_id == number]
        moved = describe_features(moved_features(base, rows, number, 0), base, rows, of_suite)
        details.setdefault(flag.candidate, {})[flag.suite] = {"features": moved}
        moved_ones |= {one["feature"] for one in moved}
        sides = [
            side for one in moved for example in one["examples"] for side in example.get("sides", {}).values()
        ]
        beside |= {feature for side in sides for feature, _ in side}
    features = moved_ones | beside
    folder, neuronpedia_id = plan.config.sae.explanations, plan.sae.neuronpedia_id
    told = read_explanations(Path(folder), neuronpedia_id, features) if folder and neuronpedia_id else {}
    labels = label_features(base, prompts, features, in_full=moved_ones, explanations=told)
    return {"details": details, "labels": labels}
