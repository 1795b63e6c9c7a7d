"""LoRA adapters: fitted to the base's modules by their tensors' names and shapes.

What vLLM applies beside the base's weights becomes a `LoraSpec`. What it cannot apply (magnitudes, biases,
whole modules, weights that training took something out of first) becomes full weights: tensors of the base
with what the adapter changes in them, computed where they are read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_auditor.hub.adapter_config import AdapterConfig, read_config, reject
from ray_auditor.hub.candidate import (
    BaseModel,
    CandidateError,
    LoraModule,
    LoraSpec,
    MergedTensor,
    TensorSource,
    TensorSpec,
)
from ray_auditor.hub.header import read_header
from ray_auditor.hub.weights import FLOAT_DTYPES, fit_to_base, layer_of, lies_below_hook

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_EMBEDDING = re.compile(r"embed")
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector)")
_WHOLE = re.compile(r"(?P<module>.+?)(?P<wrapped>\.base_layer)?\.(?P<leaf>weight|bias)")
_A, _B, _B_BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter that fits the base.

    Attributes:
        read: The adapter's own tensors at or below the hook, by their names in its file.
        settings: What decides, besides `read`, what is computed.
        lora: For vLLM to apply; None when the adapter is merged.
        merged: The base's tensors at or below the hook as the adapter changes them; empty when `lora` is.
        replaced: Those of `merged` that the adapter holds whole.
        declared_base: The base it names; a claim.
        notes: For the report.
    """

    read: dict[str, TensorSpec]
    settings: list[Any]
    lora: LoraSpec | None
    merged: dict[str, TensorSource]
    replaced: dict[str, TensorSpec]
    declared_base: str | None
    notes: list[str]


@dataclass
class _Parts:
    """An adapter's tensors, sorted by what they are."""

    of_module: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    whole: dict[str, TensorSpec] = field(default_factory=dict)  # by name in the base
    file_names: dict[str, str] = field(default_factory=dict)  # of `whole`
    above: list[str] = field(default_factory=list)


def read_adapter(folder: Path, base: BaseModel, *, num_layers: int, max_lora_rank: int) -> FittedAdapter:
    """Read an adapter's config and header, and fit it to the base's module shapes.

    Args:
        folder: An untrusted folder.
        base: The model it must fit. Every module is checked, also above the hook.
        num_layers: Layers the audit runs; what adapts later ones is not returned.
        max_lora_rank: The largest rank that is admitted; a merged one may have any.

    Raises:
        CandidateError: `rejected:` with `adapter_config`, `adapter_shape`, `wrong_base`, `lora_bounds`,
            `vocab`, `shape` or `dtype`, `skipped:` with `adapter_type` or `lora_rank`, and the errors of the
            readers below.
    """
    config = read_config(folder)
    header = read_header(folder / WEIGHTS_NAME)
    parts = _sort_tensors(header, config, num_layers)
    modules: dict[str, LoraModule] = {}
    for module, found in sorted(parts.of_module.items()):
        rank = config.rank_of(module)
        scaling = config.scaling_of(module, rank)
        _check_module(module, found, base, rank, config)
        config.check_targeted(module)
        if f"{module}.weight" in parts.whole:
            reject("adapter_config", f"{module} is adapted, and there whole")
        if lies_below_hook(f"{module}.weight", num_layers):
            names = (f"{PREFIX}{module}.{part}" for part in (_A, _B))
            modules[module] = LoraModule(rank, scaling, *names)
    notes = [f"{len(parts.above)} tensors above the hook were not read: {', '.join(sorted(parts.above)[:3])}"]
    notes = notes if parts.above else []
    read = {
        f"{PREFIX}{module}.{part}": spec
        for module in modules
        for part, spec in parts.of_module[module].items()
    }
    kinds = _kinds_beyond_lora(modules, parts, config)
    if not kinds:
        for module, lora in modules.items():
            if lora.rank > max_lora_rank:
                raise CandidateError(
                    "skipped",
                    "lora_rank",
                    f"{module}: rank {lora.rank} > max_lora_rank {max_lora_rank}; raise max_lora_rank",
                )
        spec = LoraSpec(max((lora.rank for lora in modules.values()), default=0), modules)
        settings = [[name, lora.rank, lora.scaling] for name, lora in modules.items()]
        return FittedAdapter(read, settings, spec, {}, {}, config.declared_base, notes)
    merged, more_notes = _merge(modules, parts, config, base, num_layers)
    changed = {name: one for name, one in merged.items() if isinstance(one, MergedTensor)}
    replaced = {name: one for name in parts.whole if isinstance(one := merged[name], TensorSpec)}
    read |= {parts.file_names[name]: spec for name, spec in replaced.items()}
    settings = [[name, one.start, one.scaling] for name, one in sorted(changed.items())]
    notes += [f"merged into the base's weights: {', '.join(kinds)}", *more_notes]
    return FittedAdapter(read, settings, None, merged, replaced, config.declared_base, notes)


def _sort_tensors(header: Mapping[str, TensorSpec], config: AdapterConfig, num_layers: int) -> _Parts:
    """Tensors by module and part; anything else at or below the hook is a kind of adapter we lack."""
    parts = _Parts()
    for name, spec in header.items():
        own = name.removeprefix(PREFIX)
        if own != name and (match := _PART.fullmatch(own)) and "lora_" not in match["module"]:
            parts.of_module.setdefault(match["module"], {})[match["part"]] = spec
            continue
        if not lies_below_hook(name, num_layers):
            parts.above.append(name)
            continue
        match = _WHOLE.fullmatch(own) if own != name else None
        if match is None or "lora_" in own or ".modules_to_save" in own:
            raise CandidateError("skipped", "adapter_type", f"tensor {name}: not a lora_A or lora_B weight")
        _check_whole(name, match, header, config)
        place = f"{match['module']}.{match['leaf']}"
        parts.whole[place], parts.file_names[place] = spec, name
    if not parts.of_module:
        reject("adapter_shape", f"{WEIGHTS_NAME} holds no lora_A and lora_B weights")
    return parts


def _check_whole(
    name: str, match: re.Match[str], header: Mapping[str, TensorSpec], config: AdapterConfig
) -> None:
    """Refuse a tensor of the base's own that peft, by its config, would not load, or load elsewhere."""
    module, leaf, is_wrapped = match["module"], match["leaf"], match["wrapped"] is not None
    is_adapted = f"{PREFIX}{module}.{_A}" in header
    if is_wrapped and (leaf == "weight" or not is_adapted):
        raise CandidateError("skipped", "adapter_type", f"tensor {name}: not a lora_A or lora_B weight")
    if leaf == "bias" and is_adapted and not is_wrapped:
        raise CandidateError(
            "skipped", "adapter_type", f"tensor {name}: releases of peft place it differently"
        )
    is_named = config.saves(module) or (leaf == "bias" and config.has_biases)
    is_resized = leaf == "weight" and _EMBEDDING.search(module)  # kept whenever a vocabulary grew
    if not is_named and not is_resized:
        reject("adapter_config", f"{name} is there whole and neither modules_to_save nor bias names it")


def _kinds_beyond_lora(modules: Mapping[str, LoraModule], parts: _Parts, config: AdapterConfig) -> list[str]:
    """What two products beside a weight cannot apply, of what lies at or below the hook, in words."""
    leaves = {name.rpartition(".")[2] for name in parts.whole}
    return [
        kind
        for kind, is_there in (
            ("DoRA", modules and config.use_dora),
            ("biases beside B", modules and config.lora_bias),
            ("PiSSA", modules and config.start == "pissa"),
            ("OLoRA", modules and config.start == "olora"),
            ("whole modules", "weight" in leaves),
            ("biases", "bias" in leaves),
        )
        if is_there
    ]


def _merge(
    modules: Mapping[str, LoraModule],
    parts: _Parts,
    config: AdapterConfig,
    base: BaseModel,
    num_layers: int,
) -> tuple[dict[str, TensorSource], list[str]]:
    """All the base's tensors at or below the hook, with those that the adapter changes in their place."""
    for name in parts.whole:
        if name not in base.tensors:
            reject("wrong_base", f"the base has no tensor {name}, which the adapter holds whole")
    fitted, notes = fit_to_base(base.tensors, base.tensors | parts.whole, num_layers)
    merged: dict[str, TensorSource] = dict(fitted)
    for module, lora in modules.items():
        found, name = parts.of_module[module], f"{module}.weight"
        merged[name] = MergedTensor(
            base.tensors[name], found[_B], found[_A], lora.scaling, found.get(_MAGNITUDE), config.start
        )
        if _B_BIAS in found:
            name = f"{module}.bias"
            merged[name] = MergedTensor(fitted[name], found[_B_BIAS], None, lora.scaling, None, "base")
    return merged, notes


def _check_module(
    module: str, found: Mapping[str, TensorSpec], base: BaseModel, rank: int, config: AdapterConfig
) -> None:
    """Check that a module's tensors fit each other, the config and the base."""
    if not {_A, _B} <= found.keys():
        there = ", ".join(sorted(part.partition(".")[0] for part in found))
        reject("adapter_shape", f"{module} has {there} only")
    for part, is_on, key in (
        (_MAGNITUDE, config.use_dora, "use_dora"),
        (_B_BIAS, config.lora_bias, "lora_bias"),
    ):
        if (part in found) != is_on:
            has = "has" if part in found else "lacks"
            reject("adapter_config", f"{module} {has} {part}, and {key} is {str(is_on).lower()}")
    a, b = found[_A], found[_B]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        reject("adapter_shape", f"{module}: A {list(a.shape)} and B {list(b.shape)} do not multiply")
    for part, spec in found.items():
        if spec.dtype not in FLOAT_DTYPES:
            reject(
                "dtype", f"{PREFIX}{module}.{part} must be one of {sorted(FLOAT_DTYPES)}, got {spec.dtype}"
            )
        if part in (_MAGNITUDE, _B_BIAS) and spec.shape != b.shape[:1]:
            reject("adapter_shape", f"{module}: {part} {list(spec.shape)} must be {list(b.shape[:1])}")
    if _EMBEDDING.search(module):
        raise CandidateError("skipped", "adapter_type", f"{module} is adapted and is no linear layer")
    weight = base.tensors.get(f"{module}.weight")
    if weight is None or len(weight.shape) != 2:
        depth = base.config["num_hidden_layers"]
        layer = layer_of(f"{module}.weight")
        hint = f" (it has {depth} layers)" if layer is not None and layer >= depth else ""
        # A tied head is no tensor of its own, and no concern of the audit.
        if module != "lm_head":
            reject("wrong_base", f"the base has no linear module {module}{hint}")
    elif (b.shape[0], a.shape[1]) != weight.shape:
        reject(
            "wrong_base",
            f"{module} is {[b.shape[0], a.shape[1]]} in the adapter, {list(weight.shape)} in the base",
        )
    if _B_BIAS in found and f"{module}.bias" not in base.tensors:
        reject("wrong_base", f"{module} has no bias in the base that {_B_BIAS} could be added to")
    if rank != a.shape[0]:
        reject("lora_bounds", f"{module}: r is {rank} in the config and {a.shape[0]} in the tensors")
    if rank > min(b.shape[0], a.shape[1]):
        reject("lora_bounds", f"{module}: r must be <= {min(b.shape[0], a.shape[1])}, got {rank}")
