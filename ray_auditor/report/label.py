"""What a feature stands for, as the report shows it beside the feature's number."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_auditor.report.candidate import read_number

NEURONPEDIA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Passage:
    """Tokens around one of a feature's largest activations on the base."""

    suite: str
    prompt: str
    tokens: tuple[str, ...]
    focus: int
    act: float | None


@dataclass(frozen=True)
class Label:
    """One feature; `base_rate` is the share of all of the base's scored tokens that keep it."""

    text: str
    is_explained: bool
    by: str | None
    base_rate: float | None
    passages: tuple[Passage, ...]

    @property
    def source(self) -> str:
        """Who says so."""
        if not self.is_explained:
            return "from the suites"
        return f"explained by {self.by}" if self.by else "explained"


def feature_address(neuronpedia_id: Any, feature: int) -> str | None:
    """The feature's page at Neuronpedia, where the SAE is known there."""
    if not isinstance(neuronpedia_id, str) or not NEURONPEDIA_ID.fullmatch(neuronpedia_id):
        return None
    return f"https://www.neuronpedia.org/{neuronpedia_id}/{feature}"


def read_labels(raw: Mapping[str, Any]) -> Mapping[int, Label]:
    """`labels` of a summary, by feature.

    Raises:
        ValueError: A number is not finite.
    """
    return {int(feature): _label(row, f"labels[{feature!r}]") for feature, row in raw.items()}


def _label(row: Mapping[str, Any], where: str) -> Label:
    return Label(
        text=str(row["text"]),
        is_explained=row.get("source") == "neuronpedia",
        by=row.get("by"),
        base_rate=read_number(row, "base_rate", where),
        passages=tuple(
            Passage(
                suite=str(one["suite"]),
                prompt=str(one["prompt"]),
                tokens=tuple(map(str, one["tokens"])),
                focus=int(one["focus"]),
                act=read_number(one, "act", where),
            )
            for one in row.get("prompts", ())
        ),
    )
