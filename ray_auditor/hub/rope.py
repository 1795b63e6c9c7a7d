"""Rotary embedding settings of a stranger's config.json: within bounds, and in one spelling."""

import math
import struct
from typing import Any, TypeGuard

from ray_auditor.hub.candidate import CandidateError

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn")
MAX_POSITION = 1 << 31
MAX_FACTORS = 4096  # longrope: one per pair of head dimensions
MAX_FACTOR = 1e6
MAX_THETA = 1e12
# Numbers that may be 0; every other one divides something.
MAY_BE_ZERO = frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"})


def check_rope(config: dict[str, Any]) -> None:
    """Raise `rejected:config_rope` for settings no model has."""
    position = config.get("max_position_embeddings", 1)
    if type(position) is not int or not 1 <= position <= MAX_POSITION:
        _refuse("max_position_embeddings", f"an integer in [1, {MAX_POSITION}]", position)
    for field in ("rope_theta", "rope_local_base_freq"):
        _check_number(field, config.get(field, 1.0))
    for field in ("rope_parameters", "rope_scaling"):
        given = config.get(field) or {}
        if not isinstance(given, dict):
            _refuse(field, "an object", given)
        by_layer_type = [value for value in given.values() if isinstance(value, dict)]
        for rope in by_layer_type or [given]:
            kind = rope.get("rope_type", rope.get("type", "default"))
            if not isinstance(kind, str) or kind not in ROPE_TYPES:
                _refuse(f"{field}.rope_type", f"one of {', '.join(ROPE_TYPES)}", kind)
            for key, value in rope.items():
                if key not in ("rope_type", "type"):
                    _check_number(f"{field}.{key}", value)


def _check_number(field: str, value: object) -> None:
    if isinstance(value, list) and len(value) > MAX_FACTORS:
        _refuse(field, f"at most {MAX_FACTORS} factors", len(value))
    if value is None or isinstance(value, bool):
        return
    low = 0.0 if field.rsplit(".")[-1] in MAY_BE_ZERO else 1e-6
    high = MAX_FACTOR if "factor" in field else MAX_THETA
    for number in value if isinstance(value, list) else [value]:
        if not is_finite(number) or not low <= number <= high:
            _refuse(field, f"in [{low:g}, {high:g}]", number)


def spell_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in the newer spelling: rope_theta inside, by layer type where layers differ."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}

    def spell(rope: dict[str, Any]) -> dict[str, Any]:
        filled = {
            "rope_theta": config.get("rope_theta") or 10000.0,
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
            **rope,
            "rope_type": rope.get("rope_type", rope.get("type", "default")),
        }
        return {
            key: as_float32(value) for key, value in filled.items() if value is not None and key != "type"
        }

    if any(isinstance(value, dict) for value in given.values()):
        return {kind: spell(rope) for kind, rope in given.items() if isinstance(rope, dict)}
    if "rope_local_base_freq" in config:
        return {
            "full_attention": spell(given),
            "sliding_attention": spell({"rope_theta": config["rope_local_base_freq"]}),
        }
    return spell(given)


def as_float32(value: Any) -> Any:
    """Floats, also in a list, as a model sees them: 1e-05 and 9.999999747378752e-06 are the same number."""
    if isinstance(value, list):
        return [as_float32(item) for item in value]
    if not isinstance(value, float):
        return value
    try:
        single: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return value
    return int(single) if single.is_integer() else single  # 100000.0 and 100000 hash alike


def is_finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a number, not a bool, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(field: str, bound: str, value: object) -> None:
    raise CandidateError("rejected", "config_rope", f"{field} must be {bound}, got {str(value)[:80]}")
