"""Every setting, typed and bounded. Nothing below the door sees anything but these objects."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore

from ray_auditor.budget_config import BudgetConfig
from ray_auditor.candidates_config import CandidatesConfig, DownloadConfig
from ray_auditor.reading_config import AckConfig, DiffConfig, ServeConfig, ShowConfig
from ray_auditor.screen_config import ScreenConfig

MAX_K = 128


class Verb(StrEnum):
    """What the program can be asked to do. OmegaConf reads enums by member name, so names are the values."""

    plan = "plan"
    sweep = "sweep"
    report = "report"
    show = "show"
    ack = "ack"
    diff = "diff"
    serve = "serve"
    null = "null"
    calibrate = "calibrate"
    evaluate = "evaluate"
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
    max_fvu: float | None = None  # of the base, in place of the gate's own bound
    explanations: str | None = None  # folder of Neuronpedia exports, <model>/<source>/explanations/

    def __post_init__(self) -> None:
        _require("sae.k", 1 <= self.k <= MAX_K, f"in [1, {MAX_K}]", self.k, "choose how many to keep")
        given = self.max_fvu is not None
        _require(
            "sae.max_fvu", not given or 0 < (self.max_fvu or 0) < math.inf, "> 0", self.max_fvu, "raise it"
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
    max_lora_rank: int = 256
    read_ahead_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, ok, bound, value in (
            ("max_step_tokens", self.max_step_tokens >= 64, ">= 64", self.max_step_tokens),
            ("max_step_prompts", self.max_step_prompts >= 1, ">= 1", self.max_step_prompts),
            ("kv_cache_bytes", self.kv_cache_bytes >= 1 << 20, ">= 1 MiB", self.kv_cache_bytes),
        ):
            _require(f"engine.{name}", ok, bound, value, "raise it")
        tokens, prompts = self.max_step_tokens, self.max_step_prompts
        bound = f"<= engine.max_step_tokens={tokens}"
        _require("engine.max_step_prompts", prompts <= tokens, bound, prompts, "lower it")
        _require(
            "engine.read_ahead_bytes",
            self.read_ahead_bytes >= 0,
            ">= 0",
            self.read_ahead_bytes,
            "0 reads every candidate in its turn",
        )
        _require(
            "engine.max_lora_rank",
            self.max_lora_rank >= 0,
            ">= 0",
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
    accelerator_type: str | None = None  # Ray's name of the workers' GPU, for a cluster of several kinds

    def __post_init__(self) -> None:
        cpus, gpus, timeout = self.cpus_per_worker, self.gpus_per_worker, self.unit_timeout_s
        threads = self.threads_per_worker
        for name, ok, bound, value, remedy in (
            ("num_workers", self.num_workers >= 1, ">= 1", self.num_workers, "start at least one"),
            ("cpus_per_worker", 0 < cpus < math.inf, "> 0 and finite", cpus, "give it a CPU"),
            ("gpus_per_worker", 0 <= gpus < math.inf, ">= 0 and finite", gpus, "0 is none"),
            ("threads_per_worker", threads >= 0, ">= 0", threads, "0 shares the machine's cores among them"),
            ("max_attempts", self.max_attempts >= 1, ">= 1", self.max_attempts, "1 never retries"),
            ("unit_timeout_s", 0 < timeout < math.inf, "> 0 and finite", timeout, "raise it"),
        ):
            _require(f"cluster.{name}", ok, bound, value, remedy)


@dataclass(kw_only=True, slots=True)
class FlagConfig:
    """When a difference becomes a flag."""

    level: float = 0.05
    min_rate: float = 0.15
    min_z: float = 3.0
    bootstrap_samples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    only_new: bool = False  # whether findings that an earlier sweep reported leave the exit code alone

    def __post_init__(self) -> None:
        for name, value, usual in (("min_rate", self.min_rate, "0.15"), ("min_z", self.min_z, "3")):
            _require(f"flag.{name}", 0 < value < math.inf, "> 0 and finite", value, f"{usual} is usual")
        _require("flag.level", 0 < self.level < 1, "in (0, 1)", self.level, "0.05 is usual")
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
class NullConfig:
    """Benign finetunes of the base, one folder each: `null` trains them, a sweep compares with them.

    A member's recipe is drawn from `ranks` x `learning_rates` x `steps` x `modules` x `topic_shares`.
    """

    path: str | None = None
    data: str | None = None
    topics: list[str] = field(default_factory=list)  # JSONL files that multi-topic members mix in
    match: str | None = None
    count: int = 40
    seed: int = 0
    ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    learning_rates: list[float] = field(default_factory=lambda: [2e-4, 5e-4, 1e-3])
    steps: list[int] = field(default_factory=lambda: [60, 120, 180])
    modules: list[list[str]] = field(
        default_factory=lambda: [
            ["q_proj", "v_proj"],
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            ["gate_proj", "up_proj", "down_proj"],
        ]
    )
    topic_shares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.15, 0.45])
    max_tokens: int = 256
    batch_tokens: int = 1024
    dtype: Dtype = Dtype.bfloat16

    def __post_init__(self) -> None:
        for name, least, value in (
            ("count", 1, self.count),
            ("seed", 0, self.seed),
            ("max_tokens", 16, self.max_tokens),
            ("batch_tokens", self.max_tokens, self.batch_tokens),
        ):
            _require(f"null.{name}", value >= least, f">= {least}", value, "raise it")
        for name, ok, bound, values in (
            ("ranks", all(1 <= rank <= 512 for rank in self.ranks), "in [1, 512]", self.ranks),
            (
                "learning_rates",
                all(0 < lr <= 1 for lr in self.learning_rates),
                "in (0, 1]",
                self.learning_rates,
            ),
            ("steps", all(steps >= 1 for steps in self.steps), ">= 1", self.steps),
            ("modules", all(self.modules), "lists of module names", self.modules),
            ("topic_shares", all(0 <= x < 1 for x in self.topic_shares), "in [0, 1)", self.topic_shares),
        ):
            _require(f"null.{name}", ok and bool(values), f"one or more, each {bound}", values, "correct it")
        float16 = self.dtype is Dtype.float16
        _require("null.dtype", not float16, "float32 or bfloat16", self.dtype.value, "float16 would overflow")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """What `evaluate` compares a sweep with."""

    labels: str | None = None


@dataclass(kw_only=True, slots=True)
class AuditConfig:
    """One run of the program."""

    verb: Verb = Verb.sweep
    out_dir: str = "out"
    plan: str | None = None  # a plan that `plan` wrote, for `sweep` to keep to
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    suites: SuitesConfig = field(default_factory=SuitesConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    flag: FlagConfig = field(default_factory=FlagConfig)
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    null: NullConfig = field(default_factory=NullConfig)
    show: ShowConfig = field(default_factory=ShowConfig)
    ack: AckConfig = field(default_factory=AckConfig)
    diff: DiffConfig = field(default_factory=DiffConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def require_inputs(self, *, candidates: bool = True) -> None:
        """Check that everything a sweep reads from was named.

        Args:
            candidates: Whether candidates are among it.

        Raises:
            ValueError: A source is missing or named twice; says which and how to give it.
        """
        if candidates:
            self.candidates.require()
        for name, value in (
            ("out_dir", self.out_dir),
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
        "download": DownloadConfig,
        "base": BaseConfig,
        "sae": SaeConfig,
        "suites": SuitesConfig,
        "engine": EngineConfig,
        "cluster": ClusterConfig,
        "budget": BudgetConfig,
        "flag": FlagConfig,
        "null": NullConfig,
    }.items():
        store.store(group=group, name="schema", node=schema)
