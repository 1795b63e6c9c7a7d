"""Admission: from a folder that was found to tensors that may be read, or a refusal."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ray_auditor.hub.adapter import read_adapter
from ray_auditor.hub.candidate import (
    Admitted,
    BaseModel,
    Candidate,
    CandidateError,
    LoraSpec,
    TensorSpec,
)
from ray_auditor.hub.config_json import read_object
from ray_auditor.hub.content import hash_content, is_zero
from ray_auditor.hub.folder import list_names
from ray_auditor.hub.lineage import check_statistics, judge, measure_closeness, read_card
from ray_auditor.hub.model_config import REMOTE_CODE, check_bounds, computation_fields, find_differences
from ray_auditor.hub.tokenizer import note_tokenizer
from ray_auditor.hub.weights import fit_to_base, read_weights

CONFIG_NAME = "config.json"
MAX_SHOWN = 5  # differences named in one refusal


def open_base(path: str | Path, *, num_layers: int | None = None) -> BaseModel:
    """Open the model every candidate is compared with.

    Args:
        path: Its folder: config.json and safetensors, floating dtypes.
        num_layers: Layers the audit runs; what lies above is not hashed. None: all.

    Returns:
        BaseModel: every tensor of the base, and the hash of those that are read.

    Raises:
        ValueError: the folder is not a model the audit can run, or has fewer layers.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"base.model must be a folder, got {str(path)!r}; download the base or convert it first"
        )
    folder = folder.resolve()
    try:
        names = list_names(folder)
        config = _read_config(folder, names)
        tensors = read_weights(folder, names)
        depth = config["num_hidden_layers"]
        if num_layers is not None and not 1 <= num_layers <= depth:
            raise ValueError(
                f"the hook needs {num_layers} layers and base.model has {depth}; take an earlier hook"
            )
        read, _ = fit_to_base(tensors, tensors, depth if num_layers is None else num_layers)
        content_sha256 = hash_content(read)
    except CandidateError as error:
        raise ValueError(f"base.model {str(path)!r} cannot be the base: {error.reason}") from error
    fields = json.dumps(computation_fields(config), sort_keys=True)
    key = hashlib.sha256(f"{content_sha256}\n{fields}".encode()).hexdigest()
    return BaseModel(folder, config, tensors, content_sha256, key)


def admit(candidate: Candidate, base: BaseModel, *, num_layers: int, max_lora_rank: int) -> Admitted:
    """Check everything about a candidate that can be known without running it.

    Reads headers and configs first, and the tensors' bytes only when all of them fit.

    Args:
        candidate: As `list_folder` found it.
        base: As `open_base` opened it.
        num_layers: Layers the audit runs: the hook's layer for resid_pre, one more for resid_post.
        max_lora_rank: The largest rank that is admitted.

    Returns:
        Admitted: the tensors to read, what identifies them, and notes for the report.

    Raises:
        CandidateError: the candidate is not safe, not sound, or not comparable with the base.
    """
    names = list_names(candidate.path)
    card = read_card(candidate.path, names)
    findings = note_tokenizer(base.path, candidate.path, names)
    if candidate.kind == "adapter":
        found = read_adapter(candidate.path, base, num_layers=num_layers, max_lora_rank=max_lora_rank)
        closeness = measure_closeness(base.tensors, found.replaced)
        if closeness is not None:
            check_statistics(closeness)
        lineage = judge(base, card, found.declared_base, closeness)
        notes = [*found.notes, *_note_code({}, names), *findings, *lineage.conflicts]
        content_sha256 = hash_content(found.read, found.settings)
        if found.lora is not None and _changes_nothing(found.lora, found.read):
            content_sha256 = base.content_sha256
            notes.append("the adapter changes nothing at or below the hook: its rows are the base's")
        tensors = found.merged or dict(found.read)
        return Admitted(candidate, content_sha256, tensors, found.lora, tuple(notes), found.declared_base)

    config = _read_config(candidate.path, names)
    different, notes = find_differences(base.config, config)
    if different:
        raise CandidateError("rejected", "arch_mismatch", "; ".join(different[:MAX_SHOWN]))
    notes += _note_code(config, names)
    read, more_notes = fit_to_base(base.tensors, read_weights(candidate.path, names), num_layers)
    closeness = measure_closeness(base.tensors, read)
    if closeness is not None:
        check_statistics(closeness)
    lineage = judge(base, card, None, closeness)
    if lineage.verdict == "wrong_base":
        raise CandidateError("rejected", "wrong_base", "; ".join(lineage.evidence[::-1]))
    more_notes += [*findings, *lineage.conflicts]
    content_sha256 = hash_content(read)
    if content_sha256 == base.content_sha256:
        more_notes.append("every tensor the audit reads is identical to the base's")
    return Admitted(candidate, content_sha256, dict(read), None, (*notes, *more_notes))


def _read_config(folder: Path, names: list[str]) -> dict[str, Any]:
    if CONFIG_NAME not in names:
        raise CandidateError("rejected", "arch_mismatch", "there is no config.json")
    config = read_object(folder, CONFIG_NAME)
    for field in ("quantization_config", "compression_config"):
        if config.get(field):
            method = config[field].get("quant_method") if isinstance(config[field], dict) else None
            raise CandidateError(
                "skipped", "quantized", f"config.json has {field} ({method or 'unknown method'})"
            )
    if own := sorted({"quantize_config.json", "quant_config.json"} & set(names)):
        raise CandidateError("skipped", "quantized", f"{own[0]} describes quantised weights")
    check_bounds(config)
    return config


def _changes_nothing(lora: LoraSpec, tensors: dict[str, TensorSpec]) -> bool:
    """Whether B A is zero for every module, as in an adapter that was saved before it was trained."""
    return all(
        is_zero(tensors[module.lora_B]) or is_zero(tensors[module.lora_A]) for module in lora.modules.values()
    )


def _note_code(config: dict[str, Any], names: list[str]) -> list[str]:
    """Code and pickles a repository carries: none of it is used, and the report says that it was there."""
    found = [key for key in REMOTE_CODE if key in config]
    found += [name for name in names if name.endswith((".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    return [f"not used: {', '.join(found[:MAX_SHOWN])}"] if found else []
