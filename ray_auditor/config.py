"""Every setting, typed and bounded. Nothing below the door sees anything but these objects."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore

MAX_K = 128


class Verb(StrEnum):
    """What the program can be asked to do. OmegaConf reads enums by member name, so names are the values."""

    plan = "plan"
    sweep = "sweep"
    report = "report"
    show = "show"
    doctor = "doctor"
    demo = "demo"


class Dtype(StrEnum):
    """Numeric type of the engine's weights and residuals."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _require(field_name: str, ok: bool, bound: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{field_name} must be {bound}, got {value!r}; {remedy}")


@dataclass(kw_only=True, slots=True)
class CandidatesConfig:
    """Where the finetunes are."""

    path: str | None = None


@dataclass(kw_only=True, slots=True)
class BaseConfig:
    """The reference model all candidates were finetuned from."""

    model: str | None = None


@dataclass(kw_only=True, slots=True)
class SaeConfig:
    """The sparse autoencoder: a sae-lens folder, or a release and id that sae-lens can load."""

    path: str | None = None
    release: str | None = None
    sae_id: str | None = None
    hook_name: str | None = None
    k: int = 32

    def __post_init__(self) -> None:
        _require(
            "sae.k", 1 <= self.k <= MAX_K, f"in [1, {MAX_K}]", self.k, "choose how many features to keep"
        )


@dataclass(kw_only=True, slots=True)
class SuitesConfig:
    """The fixed prompts, one file or data set a suite."""

    path: str | None = None
    general: str = "general"
    max_prompts: int = 512
    max_tokens: int = 256

    def __post_init__(self) -> None:
        _require(
            "suites.max_prompts", self.max_prompts >= 2, ">= 2", self.max_prompts, "an interval needs prompts"
        )
        _require(
            "suites.max_tokens",
            8 <= self.max_tokens <= 131_072,
            "in [8, 131072]",
            self.max_tokens,
            "it is the length prompts are cut to",
        )


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How vLLM runs."""

    dtype: Dtype = Dtype.float32
    max_step_tokens: int = 2048
    max_step_prompts: int = 64
    kv_cache_bytes: int = 256 << 20
    max_lora_rank: int = 64
    read_ahead_bytes: int = 1 << 30
    eager: bool = True

    def __post_init__(self) -> None:
        ranks = (0, 1, 8, 16, 32, 64, 128, 256, 320, 512)
        _require(
            "engine.max_step_tokens", self.max_step_tokens >= 64, ">= 64", self.max_step_tokens, "raise it"
        )
        _require(
            "engine.max_step_prompts", self.max_step_prompts >= 1, ">= 1", self.max_step_prompts, "raise it"
        )
        _require(
            "engine.kv_cache_bytes",
            self.kv_cache_bytes >= 1 << 20,
            ">= 1 MiB",
            self.kv_cache_bytes,
            "raise it",
        )
        _require(
            "engine.read_ahead_bytes",
            self.read_ahead_bytes >= 0,
            ">= 0",
            self.read_ahead_bytes,
            "0 reads every candidate in its turn",
        )
        _require(
            "engine.max_lora_rank",
            self.max_lora_rank in ranks,
            f"one of {ranks}",
            self.max_lora_rank,
            "0 turns adapters off",
        )


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster: a local one unless an address is given."""

    address: str | None = None
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads_per_worker: int = 0
    max_attempts: int = 2
    unit_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        _require("cluster.num_workers", self.num_workers >= 1, ">= 1", self.num_workers, "start at least one")
        _require(
            "cluster.cpus_per_worker",
            0 < self.cpus_per_worker < math.inf,
            "> 0 and finite",
            self.cpus_per_worker,
            "give it a CPU",
        )
        _require(
            "cluster.gpus_per_worker",
            0 <= self.gpus_per_worker < math.inf,
            ">= 0 and finite",
            self.gpus_per_worker,
            "0 is none",
        )
        _require(
            "cluster.threads_per_worker",
            self.threads_per_worker >= 0,
            ">= 0",
            self.threads_per_worker,
            "0 shares the machine's cores among the workers",
        )
        _require("cluster.max_attempts", self.max_attempts >= 1, ">= 1", self.max_attempts, "1 never retries")
        _require(
            "cluster.unit_timeout_s",
            0 < self.unit_timeout_s < math.inf,
            "> 0 and finite",
            self.unit_timeout_s,
            "raise it",
        )


@dataclass(kw_only=True, slots=True)
class FlagConfig:
    """When a difference becomes a flag."""

    min_rate: float = 0.15
    min_z: float = 3.0
    bootstrap_samples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, usual in (("min_rate", self.min_rate, "0.15"), ("min_z", self.min_z, "3")):
            _require(f"flag.{name}", 0 < value < math.inf, "> 0 and finite", value, f"{usual} is usual")
        _require("flag.seed", self.seed >= 0, ">= 0", self.seed, "any such number seeds the resampling")
        _require(
            "flag.bootstrap_samples",
            100 <= self.bootstrap_samples <= 100_000,
            "in [100, 100000]",
            self.bootstrap_samples,
            "1000 resolves a 95% interval",
        )
        _require(
            "flag.confidence", 0.5 <= self.confidence < 1, "in [0.5, 1)", self.confidence, "0.95 is usual"
        )


@dataclass(kw_only=True, slots=True)
class ShowConfig:
    """What `show` prints."""

    candidate: str | None = None
    suite: str | None = None


@dataclass(kw_only=True, slots=True)
class AuditConfig:
    """One run of the program."""

    verb: Verb = Verb.sweep
    out_dir: str = "out"
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    suites: SuitesConfig = field(default_factory=SuitesConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    flag: FlagConfig = field(default_factory=FlagConfig)
    show: ShowConfig = field(default_factory=ShowConfig)

    def require_inputs(self) -> None:
        """Check that everything a sweep reads from was named.

        Raises:
            ValueError: A source is missing or named twice; says which and how to give it.
        """
        for name, value in (
            ("out_dir", self.out_dir),
            ("candidates.path", self.candidates.path),
            ("base.model", self.base.model),
            ("suites.path", self.suites.path),
        ):
            _require(name, bool(value), "given", value, f"add {name}=DIR to the command")
        one_source = bool(self.sae.path) != bool(self.sae.release)
        _require(
            "sae.path",
            one_source and (self.sae.release is None) == (self.sae.sae_id is None),
            "given, or sae.release with sae.sae_id, and not both",
            self.sae.path,
            "add sae.path=DIR to the command",
        )


def register_schemas() -> None:
    """Make every schema known to Hydra, under the group whose YAML files start from it."""
    store = ConfigStore.instance()
    store.store(name="audit_schema", node=AuditConfig)
    for group, schema in {
        "candidates": CandidatesConfig,
        "base": BaseConfig,
        "sae": SaeConfig,
        "suites": SuitesConfig,
        "engine": EngineConfig,
        "cluster": ClusterConfig,
        "flag": FlagConfig,
    }.items():
        store.store(group=group, name="schema", node=schema)
