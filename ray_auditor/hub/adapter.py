"""LoRA adapters by a reader of our own.

The loaders of peft import modules that adapter_config.json names, and compile its patterns as regular
expressions. Here a config is a dozen keys, and the tensors' own names say what is adapted.
"""

import math
import re
from pathlib import Path
from typing import Any, NoReturn

from ray_auditor.hub.candidate import BaseModel, CandidateError, LoraModule, LoraSpec, TensorSpec, printable
from ray_auditor.hub.config_json import read_object
from ray_auditor.hub.header import read_header
from ray_auditor.hub.weights import FLOAT_DTYPES, layer_of, lies_below_hook

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_ALPHA = 65536.0

# What is read; every other key must be off (null, false, empty) or be one of IGNORED.
READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "init_lora_weights", "base_model_name_or_path",
})  # fmt: skip
# Training, bookkeeping, and what the tensors' names say better. Never used, so never imported.
IGNORED = frozenset({
    "auto_mapping", "megatron_core", "peft_version", "revision", "task_type", "inference_mode",
    "lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying",
})  # fmt: skip
# Ways to initialise A and B that leave the base alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_EMBEDDING = re.compile(r"embed")
_PATTERN = re.compile(r"[A-Za-z0-9_.]{1,200}")
_LORA_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def read_adapter(
    folder: Path, base: BaseModel, *, num_layers: int, max_lora_rank: int
) -> tuple[dict[str, TensorSpec], LoraSpec, list[str]]:
    """Read an adapter's config and header, and fit it to the base's module shapes.

    Args:
        folder: An untrusted folder.
        base: The model it must fit. Every module is checked, also above the hook.
        num_layers: Layers the audit runs; what adapts later ones is not returned.
        max_lora_rank: The largest rank the engine holds buffers for.

    Returns:
        tuple: specs of the lora_A and lora_B tensors below the hook, what to do with them, and notes.

    Raises:
        CandidateError: `rejected:` with `adapter_config`, `adapter_shape`, `wrong_base`, `lora_bounds` or
            `dtype`, `skipped:` with `adapter_type` or `lora_rank`, and the errors of the readers below.
    """
    config = read_object(folder, CONFIG_NAME)
    targets = _check_supported(config)
    ranks = _read_pattern(config, "rank_pattern")
    alphas = _read_pattern(config, "alpha_pattern")
    default_rank, default_alpha = config.get("r"), config.get("lora_alpha")
    rslora = config.get("use_rslora") or False

    header = read_header(folder / WEIGHTS_NAME)
    pairs, notes = _pair_tensors(header, num_layers)
    modules: dict[str, LoraModule] = {}
    for module, sides in sorted(pairs.items()):
        rank = _check_rank(module, _match(ranks, module, default_rank))
        alpha = _check_alpha(module, _match(alphas, module, default_alpha))
        names = _check_module(module, sides, header, base, rank)
        _check_targeted(module, targets)
        if rank > max_lora_rank:
            raise CandidateError(
                "skipped",
                "lora_rank",
                f"{module}: rank {rank} > max_lora_rank {max_lora_rank}; raise max_lora_rank",
            )
        if lies_below_hook(f"{module}.weight", num_layers):
            scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
            modules[module] = LoraModule(rank, scaling, *names)
    if not modules:
        notes.append("nothing at or below the hook is adapted: the audit sees the base itself")
    declared = config.get("base_model_name_or_path")
    base_model = printable(declared, 200) if isinstance(declared, str) and declared else None
    read = {name: header[name] for module in modules.values() for name in (module.lora_A, module.lora_B)}
    spec = LoraSpec(max((module.rank for module in modules.values()), default=0), modules, base_model)
    return read, spec, notes


def _check_supported(config: dict[str, Any]) -> frozenset[str] | None:
    """Refuse what the audit would not run as it was trained; returns target_modules, None for all."""

    def skip(key: str, why: str) -> NoReturn:
        raise CandidateError("skipped", "adapter_type", f"{key} {str(config.get(key))[:80]!r}: {why}")

    if config.get("peft_type") != "LORA":
        skip("peft_type", "only LORA adapters are audited; merge it into full weights")
    for key, value in config.items():
        if key not in READ and key not in IGNORED and value not in (None, False, 0, "", [], {}):
            skip(key, "not supported; merge the adapter into full weights")
    if config.get("bias", "none") != "none":
        skip("bias", "adapters that train biases are not supported; merge it into full weights")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in PLAIN_INITS:
        skip("init_lora_weights", "it changes the base's weights; convert it to plain LoRA or merge it")
    if config.get("use_rslora") not in (None, True, False):
        _reject("adapter_config", "use_rslora must be true or false")
    targets = config.get("target_modules")
    if targets == "all-linear":
        return None
    if isinstance(targets, str):
        skip("target_modules", "a pattern is never compiled; list the modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        _reject("adapter_config", "target_modules must be a list of module names or 'all-linear'")
    return frozenset(targets)


def _read_pattern(config: dict[str, Any], field: str) -> dict[str, tuple[int, Any]]:
    """Per-module values and their positions; keys are module names or endings, never regular expressions."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        _reject("adapter_config", f"{field} must be an object")
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
    hits = [pattern[ending] for ending in _endings(module) if ending in pattern]
    return min(hits)[1] if hits else default


def _endings(module: str) -> list[str]:
    """`a.b.c`, `b.c` and `c` for `a.b.c`."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _check_rank(module: str, rank: Any) -> int:
    if type(rank) is not int or rank < 1:
        _reject("lora_bounds", f"{module}: r must be an integer >= 1, got {str(rank)[:80]}")
    return rank


def _check_alpha(module: str, alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA:
        _reject("lora_bounds", f"{module}: lora_alpha must be in (0, {MAX_ALPHA:g}], got {str(alpha)[:80]}")
    return float(alpha)


def _check_targeted(module: str, targets: frozenset[str] | None) -> None:
    # Other loaders leave out tensors the config does not name: they and the audit would run two models.
    if targets is not None and targets.isdisjoint(_endings(module)):
        _reject("adapter_config", f"{module} has tensors and target_modules does not name it")


def _pair_tensors(
    header: dict[str, TensorSpec], num_layers: int
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Tensor names by module and side (A or B); anything else below the hook is a kind of adapter we lack."""
    pairs: dict[str, dict[str, str]] = {}
    above: list[str] = []
    for name in header:
        if match := _LORA_TENSOR.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = name
        elif lies_below_hook(name, num_layers):
            raise CandidateError("skipped", "adapter_type", f"tensor {name}: not a lora_A or lora_B weight")
        else:
            above.append(name)
    notes = (
        [f"{len(above)} tensors above the hook were not read: {', '.join(sorted(above)[:3])}"]
        if above
        else []
    )
    if not pairs:
        _reject("adapter_shape", f"{WEIGHTS_NAME} holds no lora_A and lora_B weights")
    return pairs, notes


def _check_module(
    module: str, sides: dict[str, str], header: dict[str, TensorSpec], base: BaseModel, rank: int
) -> tuple[str, str]:
    """Names of the module's A and B, once their shapes fit each other, the config and the base."""
    if sides.keys() != {"A", "B"}:
        _reject("adapter_shape", f"{module} has lora_{next(iter(sides))} only")
    a, b = header[sides["A"]], header[sides["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        _reject("adapter_shape", f"{module}: A {list(a.shape)} and B {list(b.shape)} do not multiply")
    for spec, name in ((a, sides["A"]), (b, sides["B"])):
        if spec.dtype not in FLOAT_DTYPES:
            _reject("dtype", f"{name} must be one of {sorted(FLOAT_DTYPES)}, got {spec.dtype}")
    if _EMBEDDING.search(module):
        raise CandidateError("skipped", "adapter_type", f"{module} is adapted and is no linear layer")
    weight = base.tensors.get(f"{module}.weight")
    if weight is None or len(weight.shape) != 2:
        depth = base.config["num_hidden_layers"]
        layer = layer_of(f"{module}.weight")
        hint = f" (it has {depth} layers)" if layer is not None and layer >= depth else ""
        # A tied head is no tensor of its own, and no concern of the audit.
        if module != "lm_head":
            _reject("wrong_base", f"the base has no linear module {module}{hint}")
    elif (b.shape[0], a.shape[1]) != weight.shape:
        _reject(
            "wrong_base",
            f"{module} is {[b.shape[0], a.shape[1]]} in the adapter, {list(weight.shape)} in the base",
        )
    if rank != a.shape[0]:
        _reject("lora_bounds", f"{module}: r is {rank} in the config and {a.shape[0]} in the tensors")
    if rank > min(b.shape[0], a.shape[1]):
        _reject("lora_bounds", f"{module}: r must be <= {min(b.shape[0], a.shape[1])}, got {rank}")
    return sides["A"], sides["B"]


def _reject(code: str, text: str) -> NoReturn:
    raise CandidateError("rejected", code, text)
