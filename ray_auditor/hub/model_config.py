"""config.json of a stranger against the base's: within bounds, and the same computation up to the hook.

Only tensors are swapped in a live engine; the base's config stays. So a field that changes the computation
and differs is a refusal, or the audit would run another model than the one in the repository.
"""

import re
from typing import Any

from ray_auditor.hub.candidate import CandidateError
from ray_auditor.hub.rope import as_float32, check_rope, is_finite, spell_rope

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
INT_BOUNDS = {
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "moe_intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (1, 8192),
    "vocab_size": (1, 1 << 24),
    "sliding_window": (1, 1 << 31),
    "max_window_layers": (0, 1000),
    "num_experts": (0, 4096),
    "num_local_experts": (0, 4096),
    "num_experts_per_tok": (0, 4096),
}
EPS_FIELDS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")

# Fields one side may lack: absent means off. Any other field is compared where both have it.
COMPUTES = frozenset({
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "attention_bias",
    "mlp_bias", "qkv_bias", "sliding_window", "layer_types", "rope", "attn_logit_softcapping",
    "query_pre_attn_scalar", "use_bidirectional_attention", "embedding_multiplier", "attention_multiplier",
    "residual_multiplier", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "model_type", "architectures", "max_position_embeddings",
})  # fmt: skip
# Nothing below the hook depends on these; finetunes rewrite them freely.
HARMLESS = frozenset({
    "_name_or_path", "_commit_hash", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
    "vocab_size", "tie_word_embeddings", "final_logit_softcapping", "logits_scaling", "pretraining_tp",
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "output_attentions",
    "output_hidden_states", "return_dict", "router_aux_loss_coef", "output_router_logits", "rope_interleaved",
    "is_llama_config", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "repetition_penalty", "model_name", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset",
    "cache_implementation", "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "use_mrope",
})  # fmt: skip
REMOTE_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "_target_")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")


def check_bounds(config: dict[str, Any]) -> None:
    """Refuse a config whose sizes no model has, before anything is allocated from it.

    Raises:
        CandidateError: `rejected:config_bounds`, `rejected:config_rope` or `rejected:arch_mismatch`.
    """
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [None])]
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names) or len(names) != 2:
        raise CandidateError(
            "rejected",
            "arch_mismatch",
            f"config.json must name one architecture and a model_type, got {names}",
        )
    for field, (low, high) in INT_BOUNDS.items():
        value = config.get(field)
        if value is None and field not in REQUIRED:
            continue
        if type(value) is not int or not low <= value <= high:
            _out_of_bounds(field, f"an integer in [{low}, {high}]", value)
    for field in EPS_FIELDS:
        value = config.get(field)
        if value is not None and not (is_finite(value) and 0 < value < 1):
            _out_of_bounds(field, "in (0, 1)", value)
    layer_types = config.get("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list)
        and len(layer_types) == config["num_hidden_layers"]
        and all(isinstance(kind, str) for kind in layer_types)
    ):
        _out_of_bounds("layer_types", f"{config['num_hidden_layers']} names", layer_types)
    check_rope(config)


def find_differences(base: dict[str, Any], candidate: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two configs that are within bounds.

    Returns:
        tuple: what changes the computation, as `field VALUE (base: VALUE)`; and notes on what does not.
    """
    ours, theirs = computation_fields(base), computation_fields(candidate)
    shared = (ours.keys() & theirs.keys()) | ((ours.keys() | theirs.keys()) & COMPUTES)
    different = [
        f"{field} {_show(field, candidate, theirs)} (base: {_show(field, base, ours)})"
        for field in sorted(shared)
        if ours.get(field) != theirs.get(field)
    ]
    notes = []
    if unknown := sorted((ours.keys() ^ theirs.keys()) - COMPUTES):
        notes.append(f"config keys that one side lacks were not compared: {', '.join(unknown)}")
    if base.get("tie_word_embeddings", True) != candidate.get("tie_word_embeddings", True):
        notes.append("tie_word_embeddings differs; the head lies above the hook")
    return different, notes


def _show(field: str, config: dict[str, Any], fields: dict[str, Any]) -> str:
    return str(config.get(field, fields.get(field)))[:120]  # as it was written, if it was


def computation_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What the computation up to the hook depends on, in one spelling.

    Config formats differ between library versions: defaults are filled in, fields that are off are dropped,
    and numbers are rounded to float32, all a model sees of them (1e-05 and 9.999999747378752e-06 are one).
    """
    fields = {
        key: as_float32(value)
        for key, value in config.items()
        if key not in HARMLESS and key not in REMOTE_CODE and not key.startswith("rope_")
    }
    fields["hidden_act"] = config.get("hidden_activation") or config.get("hidden_act")
    fields.pop("hidden_activation", None)
    if fields.get("head_dim") is None:
        fields["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = config["num_attention_heads"]

    kinds = _layer_types(config)
    windowed = config.get("layer_types") is None and config.get("use_sliding_window") is None
    if "sliding_attention" not in kinds and not windowed:
        fields.pop("sliding_window", None)
    fields["layer_types"] = kinds
    for derived in (
        "use_sliding_window",
        "max_window_layers",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    ):
        fields.pop(derived, None)

    fields["rope"] = rope = spell_rope(config)
    types = {str(part.get("rope_type", "")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if types <= {"", "default", "linear", "llama3"}:
        # Prompts are cut to the base's own length, and these kinds do not depend on the longest one.
        fields.pop("max_position_embeddings", None)
    return {key: value for key, value in fields.items() if value is not None and value is not False}


def _layer_types(config: dict[str, Any]) -> list[str]:
    """Attention of every layer; older configs leave it to the family's rule."""
    if config.get("layer_types") is not None:
        return list(config["layer_types"])
    num_layers = config["num_hidden_layers"]
    if config["model_type"] == "gemma2":
        sliding = [layer % 2 == 0 for layer in range(num_layers)]
    elif config["model_type"] == "gemma3_text":
        sliding = [(layer + 1) % 6 != 0 for layer in range(num_layers)]
    elif config.get("use_sliding_window") and config.get("sliding_window"):
        sliding = [layer >= config.get("max_window_layers", 0) for layer in range(num_layers)]
    else:
        sliding = [False] * num_layers
    return ["sliding_attention" if yes else "full_attention" for yes in sliding]


def _out_of_bounds(field: str, bound: str, value: object) -> None:
    raise CandidateError("rejected", "config_bounds", f"{field} must be {bound}, got {str(value)[:80]}")
