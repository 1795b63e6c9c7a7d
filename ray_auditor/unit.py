"""The unit, and the commit that makes it true."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_auditor.shard import SCHEMA_VERSION, SchemaVersionError, ShardError


class NondeterminismError(ValueError):
    """The same unit was computed twice with different results."""


@dataclass(frozen=True)
class Unit:
    """What is computed, stored and reused: everything its rows depend on, and nothing else.

    Attributes:
        candidate_key: sha256 of the candidate's weights; for the base, the base's own key.
        base_key: sha256 of the base's weights.
        sae_key: sha256 of the folded SAE.
        hook_name: Where the residual is read, e.g. `blocks.15.hook_resid_post`.
        suites_key: sha256 of the tokenised suites and their masks.
        k: Features kept per token, 1 to 128.
        d_sae: Width of the SAE; decides the stored index type.
        engine_class: Whatever else changes the numbers: engine, version, device class, dtype.
    """

    candidate_key: str
    base_key: str
    sae_key: str
    hook_name: str
    suites_key: str
    k: int
    d_sae: int
    engine_class: str

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 128:
            raise ValueError(f"sae.k must be in [1, 128], got {self.k}; change sae.k")
        if not self.k <= self.d_sae <= 1 << 31:
            raise ValueError(f"d_sae must be in [k = {self.k}, 2^31], got {self.d_sae}; lower sae.k")

    @cached_property
    def key(self) -> str:
        """sha256 hex over the canonical JSON of the parts and the schema version."""
        return hashlib.sha256(canonical_json({"schema_version": SCHEMA_VERSION, **asdict(self)})).hexdigest()

    @property
    def stratum(self) -> str:
        """The same for units whose numbers may be compared: every part but the candidate is equal.

        Adapters and full weights share a stratum exactly when their `engine_class` says that they ran alike.
        """
        parts = asdict(self)
        del parts["candidate_key"]
        return hashlib.sha256(canonical_json(parts)).hexdigest()

    def metadata(self) -> dict[str, str]:
        """What the unit's shard says of itself in its Arrow schema."""
        return {"unit_key": self.key, **{name: str(value) for name, value in asdict(self).items()}}


@dataclass(frozen=True)
class Commit:
    """One committed unit: `unit` names its parts, `record` is the writer's own note (timings, versions).

    `residuals_sha256` and `residuals_bytes` are those of the file kept beside the shard, for the base alone.
    """

    schema_version: int
    unit_key: str
    unit: dict[str, Any]
    shard_sha256: str
    num_bytes: int
    num_tokens: int
    record: dict[str, Any]
    residuals_sha256: str | None = None
    residuals_bytes: int = 0

    @property
    def shard_name(self) -> str:
        """File name below `shards/`."""
        return f"{self.unit_key}-{self.shard_sha256[:16]}.arrow"

    @property
    def residuals_name(self) -> str | None:
        """File name below `residuals/`, when there is one."""
        return self.residuals_sha256 and f"{self.unit_key}-{self.residuals_sha256[:16]}.bin"

    def to_json(self) -> bytes:
        """The bytes `parse` reads."""
        return canonical_json(asdict(self))

    @classmethod
    def parse(cls, data: bytes, path: Path) -> "Commit":
        """Read a commit named `<unit_key>.json`; ShardError, naming `path`, when it is not one of ours."""
        remedy = "delete it and run the sweep again"
        try:
            fields = json.loads(data)
            version = fields.get("schema_version")
            if version != SCHEMA_VERSION:
                raise SchemaVersionError(
                    f"out_dir must hold units of schema version {SCHEMA_VERSION}, got {version!r} in {path}; "
                    f"delete {path.parent.parent}, another release's, of which this one can use nothing, or "
                    "set another out_dir"
                )
            commit = cls(**fields)
            if not path.stem == commit.unit_key == Unit(**commit.unit).key:
                raise ShardError(f"{path} holds the commit of another unit; {remedy}")
            for sha256 in (commit.shard_sha256, commit.residuals_sha256 or "0" * 64):
                if not re.fullmatch(r"[0-9a-f]{64}", sha256):
                    raise ShardError(f"{path} has the sha256 {sha256[:80]!r}; {remedy}")
        except ShardError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"{path} is not a commit of ours ({error}); {remedy}") from error
        return commit


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
