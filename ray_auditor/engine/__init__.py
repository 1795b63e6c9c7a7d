"""The live engine. What it can run is said here, without loading vLLM."""

from ray_auditor.hub import BaseModel
from ray_auditor.sae import Sae

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
)
"""Families whose residuals are tested to equal transformers' hidden states."""


def num_layers_of(sae: Sae) -> int:
    """Layers that must run so that the last one's output is the SAE's hook.

    Raises:
        ValueError: The hook is the embedding, before any layer.
    """
    depth = sae.hook_layer + (sae.hook_point == "resid_post")
    if depth < 1:
        raise ValueError(
            f"sae.hook_name must lie behind at least one layer, got {sae.hook_name}; "
            "an audit of the embedding alone sees no layer of the model"
        )
    return depth


def check_fit(base: BaseModel, sae: Sae, k: int) -> None:
    """Check that this engine can run `base` and that `sae` can read it.

    Raises:
        ValueError: The architecture, the width, the depth or k does not fit; names both values.
    """
    architecture = (base.config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"base.model must be one of {', '.join(ARCHITECTURES)}, got {architecture}; "
            "choose a base of one of these families"
        )
    if sae.d_in != base.config["hidden_size"]:
        raise ValueError(
            f"sae.path must hold an SAE of width {base.config['hidden_size']}, the base's hidden_size, "
            f"got d_in {sae.d_in}; choose an SAE trained on this base"
        )
    if num_layers_of(sae) > base.config["num_hidden_layers"]:
        raise ValueError(
            f"sae.hook_name must lie within the base's {base.config['num_hidden_layers']} layers, "
            f"got {sae.hook_name}; choose an SAE trained on this base"
        )
    if k > sae.d_sae:
        raise ValueError(f"sae.k must be at most d_sae = {sae.d_sae}, got {k}; lower sae.k")
