"""What an adapter's configuration says, by a reader of our own.

The loaders of peft import modules that adapter_config.json names, and compile its patterns as regular
expressions. Here a config is a dozen keys; nothing of it is imported, compiled or resolved.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ray_auditor.hub.candidate import CandidateError, Start, printable
from ray_auditor.hub.config_json import read_object

CONFIG_NAME = "adapter_config.json"
MAX_ALPHA = 65536.0

# What is read; every other key must be off (null, false, empty) or be one of IGNORED.
READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "init_lora_weights", "base_model_name_or_path", "use_dora", "lora_bias", "modules_to_save",
})  # fmt: skip
# Training, bookkeeping, and what the tensors' names say better. Never used, so never imported.
IGNORED = frozenset({
    "auto_mapping", "megatron_core", "peft_version", "revision", "task_type", "inference_mode",
    "lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying",
})  # fmt: skip
# Ways to initialise A and B, and what each takes out of the base's weight. Those that are not here draw at
# random (pissa_niter_N) or look at data (corda, loftq, lora_ga), so what they took out cannot be known.
STARTS: dict[str, Start] = {
    "gaussian": "base", "eva": "base", "orthogonal": "base", "pissa": "pissa", "olora": "olora",
}  # fmt: skip
BIASES = ("none", "all", "lora_only")

_PATTERN = re.compile(r"[A-Za-z0-9_.]{1,200}")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's configuration, checked but for the values that belong to single modules.

    Attributes:
        targets: Modules, or endings of their names, that may be adapted; None for all linear ones.
        saved: Modules, or endings, that the adapter holds whole.
        use_dora: Whether every adapted weight has a magnitude of its own.
        lora_bias: Whether every adapted module has a bias beside B.
        has_biases: Whether biases of the base may be replaced.
        start: What training started from.
        declared_base: The base it names; a claim.
    """

    targets: frozenset[str] | None
    saved: frozenset[str]
    use_dora: bool
    lora_bias: bool
    has_biases: bool
    start: Start
    declared_base: str | None
    _rslora: bool
    _rank: Any
    _alpha: Any
    _ranks: dict[str, tuple[int, Any]]
    _alphas: dict[str, tuple[int, Any]]

    def rank_of(self, module: str) -> int:
        """A module's rank; `rejected:lora_bounds` when it is none."""
        rank = _match(self._ranks, module, self._rank)
        if type(rank) is not int or rank < 1:
            reject("lora_bounds", f"{module}: r must be an integer >= 1, got {str(rank)[:80]}")
        return rank

    def scaling_of(self, module: str, rank: int) -> float:
        """What B A is multiplied by; `rejected:lora_bounds` when alpha is out of bounds."""
        alpha = _match(self._alphas, module, self._alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA:
            reject(
                "lora_bounds", f"{module}: lora_alpha must be in (0, {MAX_ALPHA:g}], got {str(alpha)[:80]}"
            )
        return alpha / math.sqrt(rank) if self._rslora else alpha / rank

    def check_targeted(self, module: str) -> None:
        """Refuse what other loaders would leave out: they and the audit would run two models."""
        if self.targets is not None and self.targets.isdisjoint(endings(module)):
            reject("adapter_config", f"{module} has tensors and target_modules does not name it")

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module, or one that holds it."""
        parts = module.split(".")
        holders = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return any(not self.saved.isdisjoint(endings(holder)) for holder in holders)


def read_config(folder: Path) -> AdapterConfig:
    """Read an adapter's config and refuse what the audit would not run as it was trained.

    Raises:
        CandidateError: `skipped:adapter_type`, which names the key; `rejected:adapter_config`, and the errors
            of `config_json.read_object`.
    """
    config = read_object(folder, CONFIG_NAME)

    def skip(key: str, why: str) -> NoReturn:
        raise CandidateError("skipped", "adapter_type", f"{key} {str(config.get(key))[:80]!r}: {why}")

    if config.get("peft_type") != "LORA":
        skip("peft_type", "only LORA adapters are audited; merge it into full weights")
    for key, value in config.items():
        if key not in READ and key not in IGNORED and value not in (None, False, 0, "", [], {}):
            skip(key, "not supported; merge the adapter into full weights")
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if config.get(key) not in (None, True, False):
            reject("adapter_config", f"{key} must be true or false")
    bias = config.get("bias", "none")
    if bias not in BIASES:
        skip("bias", f"it must be one of {', '.join(BIASES)}")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or (isinstance(init, str) and init not in STARTS):
        skip("init_lora_weights", "what it took from the base is not known; convert it to plain LoRA")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        reject("adapter_config", "modules_to_save must be a list of module names")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        skip("target_modules", "a pattern is never compiled; list the modules")
    if targets != "all-linear" and not (
        isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    ):
        reject("adapter_config", "target_modules must be a list of module names or 'all-linear'")
    declared = config.get("base_model_name_or_path")
    return AdapterConfig(
        targets=None if targets == "all-linear" else frozenset(targets),
        saved=frozenset(saved),
        use_dora=bool(config.get("use_dora")),
        lora_bias=bool(config.get("lora_bias")),
        has_biases=bias != "none",
        start=STARTS[init] if isinstance(init, str) else "base",
        declared_base=printable(declared, 200) if isinstance(declared, str) and declared else None,
        _rslora=bool(config.get("use_rslora")),
        _rank=config.get("r"),
        _alpha=config.get("lora_alpha"),
        _ranks=_read_pattern(config, "rank_pattern"),
        _alphas=_read_pattern(config, "alpha_pattern"),
    )


def _read_pattern(config: dict[str, Any], field: str) -> dict[str, tuple[int, Any]]:
    """Per-module values and their positions; keys are module names or endings, never regular expressions."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        reject("adapter_config", f"{field} must be an object")
    for key in pattern:
        if not _PATTERN.fullmatch(key):
            raise CandidateError(
                "skipped",
                "adapter_type",
                f"{field}: {key[:80]!r} must be a module name; no pattern is compiled",
            )
    return {key: (position, value) for position, (key, value) in enumerate(pattern.items())}


def _match(pattern: dict[str, tuple[int, Any]], module: str, default: Any) -> Any:
    """The first entry whose key is the module or its ending at a dot, as peft chooses."""
    hits = [pattern[ending] for ending in endings(module) if ending in pattern]
    return min(hits)[1] if hits else default


def endings(module: str) -> list[str]:
    """`a.b.c`, `b.c` and `c` for `a.b.c`."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def reject(code: str, text: str) -> NoReturn:
    """Raise `rejected:code`."""
    raise CandidateError("rejected", code, text)
