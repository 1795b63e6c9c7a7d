"""What each member of the null population is: drawn from the grid by its number alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ray_auditor.config import NullConfig

NUM_DRAWS = 8  # random numbers a member has; fixed, so that a new field leaves the others alone
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """How one member is trained.

    Attributes:
        name: Its folder.
        mix: Topic and share of the rows; the shares sum to 1.
        target: Relative weight change at which training ends before `steps`; None: it does not.
    """

    name: str
    r: int
    lr: float
    steps: int
    target_modules: tuple[str, ...]
    seed: int
    mix: tuple[tuple[str, float], ...]
    target: float | None

    def to_json(self) -> dict[str, Any]:
        """As it stands in `labels.json`."""
        return {
            "mix": [list(part) for part in self.mix],
            "lr": self.lr,
            "steps": self.steps,
            "r": self.r,
            "target_modules": list(self.target_modules),
            "seed": self.seed,
            "target_change": self.target,
        }


def topic_name(path: str) -> str:
    """What a file of rows is called in labels."""
    return Path(path).stem


def draw_recipe(config: NullConfig, number: int, targets: Sequence[float] | None) -> Recipe:
    """Member `number`'s recipe: the same however many are asked for, in whatever order.

    The random numbers are those of a counter-based generator (Philox) keyed by `null.seed` and `number`.

    Args:
        config: The grid.
        number: Which member, from 0.
        targets: Relative changes of the candidates, ascending, to be matched; the member takes a uniformly
            drawn quantile of them. None: it trains for all its steps.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([config.seed, number], np.uint64)))
    rank, lr, steps, modules, share, topics, target, seed = generator.random(NUM_DRAWS)
    general = topic_name(str(config.data))
    mixed = _pick(config.topic_shares, share) if config.topics else 0.0
    mix: tuple[tuple[str, float], ...] = ((general, 1.0),)
    if mixed:
        num_topics = 1 + int(topics * len(config.topics))
        chosen = sorted(generator.permutation(len(config.topics))[:num_topics].tolist())
        parts = [(topic_name(config.topics[topic]), mixed / num_topics) for topic in chosen]
        mix = ((general, 1 - mixed), *parts)
    return Recipe(
        name=f"n{number:04d}",
        r=_pick(config.ranks, rank),
        lr=_pick(config.learning_rates, lr),
        steps=_pick(config.steps, steps),
        target_modules=tuple(_pick(config.modules, modules)),
        seed=int(seed * (1 << 31)),
        mix=mix,
        target=None if targets is None else float(np.quantile(targets, target)),
    )


def _pick(values: Sequence[T], uniform: float) -> T:
    return values[int(uniform * len(values))]
