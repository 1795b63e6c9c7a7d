"""Audit finetuned language models by the movement of their sparse-autoencoder features."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_auditor.reader import StoreReader

__version__ = "0.1.0"


def open_store(path: str | Path) -> "StoreReader":
    """Open a finished sweep to be read: its candidates, rates, features and shards as Arrow.

    Args:
        path: The sweep's `out_dir`, or a copy of it. Nothing in it is changed.

    Raises:
        ValueError: There is no finished sweep of this release.
    """
    from ray_auditor.reader import StoreReader  # here, so that `import ray_auditor` loads nothing

    return StoreReader(Path(path))
