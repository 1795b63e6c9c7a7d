"""What a sae-lens configuration says, checked: any meaning that is not implemented is refused by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NoReturn, cast

HookPoint = Literal["resid_pre", "resid_post"]

ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated")
TOPK = ("topk", "abstopk")
SCALED = "expected_average_only_in"

# TransformerLens names, and the Hugging Face decoder layer: a module's own name stands for its output.
_BLOCK_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_(resid_pre|resid_post)")
_LAYER_HOOK = re.compile(r"model\.layers\.(\d{1,4})(?:\.(input|output))?")

_NOT_AN_SAE = "choose an SAE: a transcoder or crosscoder does not reconstruct the residual it reads"


class Normalisation(StrEnum):
    """What is done to each residual before the encoder sees it."""

    NONE = "none"
    LAYER_NORM = "layer_norm"
    CONSTANT_NORM_RESCALE = "constant_norm_rescale"


@dataclass(frozen=True)
class Hook:
    """The residual stream before (`resid_pre`) or after (`resid_post`) one layer."""

    layer: int
    point: HookPoint

    @property
    def name(self) -> str:
        """The TransformerLens name."""
        return f"blocks.{self.layer}.hook_{self.point}"

    @property
    def depth(self) -> int:
        """How many layers the residual has passed."""
        return self.layer + (self.point == "resid_post")


@dataclass(frozen=True)
class SaeSpec:
    """A configuration that can be honoured exactly; names as in sae-lens.

    `scale` multiplies every residual: the factor of activations scaled to a mean norm in training, or 1.
    `explained_variance` and `expected_l0` are what the SAE's makers measured; None where they say nothing.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    rescale_acts_by_decoder_norm: bool
    apply_b_dec_to_input: bool
    normalisation: Normalisation
    scale: float
    hook: Hook
    model_name: str | None
    neuronpedia_id: str | None
    explained_variance: float | None = None
    expected_l0: float | None = None


def refuse(field: str, value: object, bound: str, remedy: str) -> NoReturn:
    """Raise the `ValueError` that names the field, its value, what is allowed, and what to do."""
    raise ValueError(f"{field} must be {bound}, got {value!r}; {remedy}")


def parse_hook(name: object, field: str = "hook_name") -> Hook:
    """Read `blocks.L.hook_resid_pre`, `blocks.L.hook_resid_post` or `model.layers.L`.

    Raises:
        ValueError: for any other hook: attention and MLP outputs, heads, embeddings, the mid-layer residual.
    """
    if isinstance(name, str):
        if block := _BLOCK_HOOK.fullmatch(name):
            return Hook(int(block[1]), cast(HookPoint, block[2]))
        if layer := _LAYER_HOOK.fullmatch(name):
            return Hook(int(layer[1]), "resid_pre" if layer[2] == "input" else "resid_post")
    bound = "blocks.L.hook_resid_pre, blocks.L.hook_resid_post or model.layers.L (its output)"
    refuse(field, name, bound, "choose an SAE of the residual stream")


def check_activation(stored: Mapping[str, Any]) -> None:
    """Refuse a configuration that sae-lens would load under another activation than it was trained with.

    sae-lens reads a TopK SAE whose k is missing as k = 100, and as ReLU where only the old activation fields
    say TopK; it forgets that a TopK was signed. So this runs on the fields as stored, before any conversion.

    Raises:
        ValueError: naming the field.
    """
    architecture = stored.get("architecture") or "standard"
    if architecture not in ARCHITECTURES:
        remedy = f"{_NOT_AN_SAE}, and a training checkpoint is saved for use with save_inference_model"
        refuse("architecture", architecture, f"one of {', '.join(ARCHITECTURES)}", remedy)
    activation = _activation(stored)
    options = stored.get("activation_fn_kwargs") or {}
    if not isinstance(options, dict):
        refuse("activation_fn_kwargs", options, "an object", "correct cfg.json")
    if activation not in (None, "relu", "topk"):
        refuse("activation_fn", activation, "relu or topk", "no other activation is implemented")
    if activation == "topk" and architecture in ("jumprelu", "gated"):
        refuse("activation_fn", activation, f"relu where architecture is {architecture}", "correct cfg.json")
    if others := {name: value for name, value in options.items() if name != "k" and value}:
        refuse("activation_fn_kwargs", others, "k alone", "save a signed TopK as architecture abstopk")
    ks = [value for value in (stored.get("k"), options.get("k")) if value is not None]
    selects = architecture in TOPK or activation == "topk"
    if selects and (not ks or ks[0] != ks[-1]):
        refuse("k", ks or None, "given once", "write the k of the SAE's training in cfg.json")
    if (
        ks and architecture in ("standard", "gated") and not selects
    ):  # a BatchTopK saved as jumprelu may keep its k
        refuse("architecture", architecture, "topk where k is given", "set architecture to topk, or remove k")


def read_spec(
    stored: Mapping[str, Any], converted: Mapping[str, Any], scale: object, hook_name: str | None
) -> SaeSpec:
    """Check a configuration and keep what encoding needs.

    Args:
        stored: the configuration as it was stored; `check_activation` has passed it.
        converted: the same in the form of sae-lens 6.
        scale: the factor of `expected_average_only_in`, where one was found.
        hook_name: the hook of a configuration that names none; it may not contradict one.

    Raises:
        ValueError: naming the field, its value, what is allowed and the remedy.
    """
    # sae-lens keeps these at the top level or under metadata, by version; its converter loses the latter.
    parts = (stored, converted.get("metadata", {}), stored.get("metadata") or {})
    about = {name: value for part in parts for name, value in part.items() if value is not None}
    architecture = str(converted.get("architecture"))
    if _activation(stored) == "topk" and architecture not in TOPK:
        refuse("architecture", architecture, "topk where activation_fn is topk", "set architecture to topk")
    d_sae = _count(converted, "d_sae")
    for field in ("d_out", "hook_name_out"):
        if field in about:
            refuse(field, about[field], "absent", _NOT_AN_SAE)
    if "hook_head_index" in about:
        refuse(
            "hook_head_index", about["hook_head_index"], "null", "choose an SAE of the whole residual stream"
        )
    reshape = converted.get("reshape_activations")
    if reshape not in (None, "none"):
        refuse("reshape_activations", reshape, "none", "choose an SAE of the residual stream, not of heads")
    normalisation, factor = _normalisation(converted.get("normalize_activations", "none"), scale)
    selects = architecture in TOPK
    return SaeSpec(
        architecture=architecture,
        d_in=_count(converted, "d_in"),
        d_sae=d_sae,
        k=_count(converted, "k", high=d_sae) if selects else None,
        rescale_acts_by_decoder_norm=selects and _flag(converted, "rescale_acts_by_decoder_norm", False),
        apply_b_dec_to_input=_flag(converted, "apply_b_dec_to_input", True),
        normalisation=normalisation,
        scale=factor,
        hook=_hook(about, hook_name),
        model_name=_text(about, "model_name"),
        neuronpedia_id=_text(about, "neuronpedia_id"),
        explained_variance=_measured(about, "explained_variance", below=1.0),
        expected_l0=_measured(about, "expected_l0", below=float("inf")),
    )


def _activation(stored: Mapping[str, Any]) -> object:
    return stored.get("activation_fn") or stored.get("activation_fn_str")


def _normalisation(name: object, scale: object) -> tuple[Normalisation, float]:
    if name == SCALED:
        if type(scale) not in (int, float) or not 0 < (factor := float(cast(float, scale))) < float("inf"):
            bound = f"one of {', '.join(Normalisation)} where no scale is known"
            remedy = (
                "fold the scale with sae.fold_activation_norm_scaling_factor and save the SAE again, or put "
                'activation_scaler.json beside cfg.json: {"scaling_factor": sqrt(d_in) / mean residual norm}'
            )
            refuse("normalize_activations", name, bound, remedy)
        return Normalisation.NONE, factor
    if name not in tuple(Normalisation):
        bound = f"one of {', '.join((*Normalisation, SCALED))}"
        refuse("normalize_activations", name, bound, "fold it into the weights and save the SAE again")
    return Normalisation(str(name)), 1.0


def _hook(about: Mapping[str, Any], given: str | None) -> Hook:
    named = about.get("hook_name", about.get("hf_hook_name"))
    if named is None and given is None:
        refuse("hook_name", None, "given", "set sae.hook_name, such as blocks.12.hook_resid_post")
    if named is None:
        return parse_hook(given, "sae.hook_name")
    hook = parse_hook(named)
    if given is not None and parse_hook(given, "sae.hook_name").depth != hook.depth:
        refuse("sae.hook_name", given, f"{named}, where the SAE was trained", "drop sae.hook_name")
    return hook


def _count(cfg: Mapping[str, Any], field: str, high: int | None = None) -> int:
    value = cfg.get(field)
    if type(value) is not int or value < 1 or (high is not None and value > high):
        refuse(field, value, f"an integer in [1, {high or 'inf'}]", "correct cfg.json")
    return value


def _flag(cfg: Mapping[str, Any], field: str, default: bool) -> bool:
    value = cfg.get(field, default)
    if type(value) is not bool:
        refuse(field, value, "true or false", "correct cfg.json")
    return value


def _text(about: Mapping[str, Any], field: str) -> str | None:
    value = about.get(field)
    if value is not None and not isinstance(value, str):
        refuse(field, value, "text or null", "correct cfg.json")
    return value


def _measured(about: Mapping[str, Any], field: str, *, below: float) -> float | None:
    """A number strictly between 0 and `below`; others are placeholders, as sae-lens' table has some."""
    value = about.get(field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(cast(float, value)) if is_number and 0 < cast(float, value) < below else None
