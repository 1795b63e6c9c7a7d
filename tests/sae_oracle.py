"""sae-lens as the oracle: random SAEs of every class, and the comparison with what we make of them."""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae.

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from auditor_kernels import encode_topk
from torch import Tensor

from ray_auditor.sae import Sae, normalise_resid

CLASSES = ("standard", "topk", "topk rescaled", "abstopk", "abstopk rescaled", "jumprelu", "gated")
HOOK = "blocks.3.hook_resid_post"


@dataclass(frozen=True)
class Case:
    kind: str
    apply_b_dec: bool = True
    normalisation: str = "none"
    d_in: int = 24
    d_sae: int = 120
    k: int = 8
    seed: int = 0
    norm: float = 172.0


def sae_lens_sae(case: Case) -> Any:
    """A sae-lens SAE, every parameter random: also negative thresholds and unequal decoder norms."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    architecture, _, rescaled = case.kind.partition(" ")
    sae_class, config_class = get_sae_class(architecture)
    extra = {"k": case.k, "rescale_acts_by_decoder_norm": bool(rescaled)} if "topk" in architecture else {}
    sae = sae_class(
        config_class(
            d_in=case.d_in,
            d_sae=case.d_sae,
            apply_b_dec_to_input=case.apply_b_dec,
            normalize_activations=case.normalisation,
            metadata=SAEMetadata(hook_name=HOOK, model_name="tiny", neuronpedia_id="tiny/3"),
            **extra,
        )
    )
    generator = torch.Generator().manual_seed(case.seed)
    rescaled_input = case.normalisation in ("layer_norm", "constant_norm_rescale")
    size = 1.0 if rescaled_input else case.norm / case.d_in**0.5
    for name, parameter in sae.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name == "W_dec":
            value *= torch.rand(case.d_sae, 1, generator=generator) + 0.25
        spread = {"W_enc": case.d_in**-0.5, "r_mag": 0.5}.get(name, size)
        parameter.data = value * spread
    return sae


def residuals(case: Case, tokens: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    offset_D = torch.randn(case.d_in, generator=generator)
    resid_ND = torch.randn(tokens, case.d_in, generator=generator) + offset_D
    return resid_ND * (case.norm / math.sqrt(case.d_in))


def margin(reference: Any, resid_ND: Tensor) -> Tensor:
    """How far each feature's pre-activation lies from where it would turn on or off, in float64: [N, F]."""
    _, cache = reference.run_with_cache(resid_ND)
    pre_NF: Tensor = cache["hook_sae_acts_pre"]
    match reference.cfg.architecture():
        case "standard":
            return pre_NF.abs()
        case "jumprelu":
            floor_F: Tensor = reference.threshold.clamp(min=0)
            return (pre_NF - floor_F).abs()
        case "gated":
            gain_F = reference.r_mag.exp()
            gate_NF = (pre_NF - reference.b_mag) / gain_F + reference.b_gate
            return torch.minimum(pre_NF.abs(), gate_NF.abs() * gain_F)
    if reference.cfg.rescale_acts_by_decoder_norm:
        pre_NF = pre_NF * reference.W_dec.norm(dim=-1)
    score_NF = pre_NF.abs() if reference.cfg.architecture() == "abstopk" else pre_NF
    ranked_NF = torch.nn.functional.pad(score_NF.sort(descending=True).values, (0, 1), value=-torch.inf)
    last_N1, next_N1 = ranked_NF[:, reference.cfg.k - 1, None], ranked_NF[:, reference.cfg.k, None]
    to_boundary_NF = torch.where(score_NF >= last_N1, score_NF - next_N1, last_N1 - score_NF)
    return torch.minimum(to_boundary_NF, score_NF.abs())


def encode_dense(sae: Sae, resid_ND: Tensor) -> Tensor:
    top = encode_topk(normalise_resid(resid_ND, sae.normalisation), sae.encoder, k=sae.d_sae)
    acts_NF = torch.zeros(len(resid_ND), sae.d_sae + 1)  # the last column takes what is inactive
    acts_NF.scatter_(1, top.top_idx_NK.long().where(top.top_idx_NK >= 0, sae.d_sae), top.top_acts_NK)
    return acts_NF[:, :-1]


def rounding(sae: Sae, resid_ND: Tensor) -> Tensor:
    """An fp32 rounding bound for each pre-activation, either way of computing it: [N, F]."""
    weights_DF = sae.encoder.W_enc_DF.double().abs()
    input_ND = normalise_resid(resid_ND, sae.normalisation).double().abs()
    terms_NF = (input_ND + 2 * sae.encoder.b_dec_D.double().abs()) @ weights_DF
    return 2**-23 * (sae.d_in + 8) * (terms_NF + sae.encoder.b_enc_F.double().abs() + sae.encoder.threshold_F)


def assert_encodes_alike(sae: Sae, theirs: Any, resid_ND: Tensor) -> int:
    """Values and active sets agree but for ties that float64 proves; the number of such ties is returned."""
    with torch.no_grad():
        want_NF = theirs.encode(resid_ND)
        got_NF = encode_dense(sae, resid_ND)
        bound_NF = rounding(sae, resid_ND)
        differs_NF = (want_NF != 0) != (got_NF != 0)
        if ties := int(differs_NF.sum()):
            margin_NF = margin(theirs.to(dtype=torch.float64), resid_ND.double())
            theirs.to(dtype=torch.float32)
            assert (margin_NF <= bound_NF)[differs_NF].all(), "a feature differs that is not tied"
    same_NF = ~differs_NF
    assert ((want_NF - got_NF).abs() <= bound_NF)[same_NF].all()
    assert (want_NF != 0).any(), "nothing fires: the comparison is empty"
    return ties


def saved(sae: Any, folder: Path) -> str:
    sae.save_model(folder)
    return str(folder)
