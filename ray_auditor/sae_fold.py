"""The tensors of an SAE, checked and folded into encoder weights.

sae-lens computes `act((norm(x) * scale - b_dec) @ W_enc + b_enc)`, with variations per class. All that does
not depend on the residual is folded here, once, in float64: one product, one bias and one threshold remain.
"""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae, C = the features of one chunk.

import hashlib
import json
from collections.abc import Mapping

import torch
from auditor_kernels import EncoderWeights
from torch import Tensor

from ray_auditor.sae_spec import SaeSpec, refuse

_CHUNK = 2048  # features folded at a time: bounds the float64 copies to a few hundred MB at d_in 8192
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(spec: SaeSpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that the tensors are those of the architecture, in the shapes of the configuration, and finite.

    Two spellings of older files are understood: a log threshold, and a decoder scaling factor of all ones.

    Returns:
        The tensors that `fold` reads, under the names of sae-lens.

    Raises:
        ValueError: naming the tensor.
    """
    tensors = dict(stored)
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").double().exp().float()
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]
    vectors = ["b_gate", "b_mag", "r_mag"] if spec.architecture == "gated" else ["b_enc"]
    if spec.architecture == "jumprelu":
        vectors.append("threshold")
    shapes = {"W_enc": (spec.d_in, spec.d_sae), "W_dec": (spec.d_sae, spec.d_in), "b_dec": (spec.d_in,)}
    shapes |= dict.fromkeys(vectors, (spec.d_sae,))
    if tensors.keys() != shapes.keys():
        bound = f"{', '.join(sorted(shapes))} where architecture is {spec.architecture}"
        refuse("the tensors", sorted(tensors), bound, "correct cfg.json or get the SAE again")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            bound = f"{shape}, as cfg.json says d_in {spec.d_in} and d_sae {spec.d_sae}"
            refuse(
                f"the shape of {name}", tuple(tensor.shape), bound, "correct cfg.json or get the SAE again"
            )
        if tensor.dtype not in _DTYPES:
            refuse(
                f"the dtype of {name}", str(tensor.dtype), "a float of 16 to 64 bits", "dequantise the SAE"
            )
        if bad := int((~tensor.isfinite()).sum()):
            refuse(name, f"{bad} NaN or infinite values", "finite", "the SAE is damaged: get it again")
    return tensors


def fold(spec: SaeSpec, tensors: Mapping[str, Tensor]) -> EncoderWeights:
    """Fold scales, biases, norms and gates into encoder weights, in float64; the result is fp32 on the CPU.

    A gated SAE multiplies `relu(z * exp(r_mag) + b_mag)` by `z + b_gate > 0`: the same as a threshold of
    `b_mag - b_gate * exp(r_mag)` on the former. The bits, and with them the SAE's key, do not depend on the
    processor or the number of threads.

    Args:
        spec: the checked configuration.
        tensors: what `check_tensors` returned.

    Raises:
        ValueError: a folded tensor left the range of fp32.
    """
    W_enc_FD = torch.empty(spec.d_sae, spec.d_in)
    W_dec_FD = torch.empty(spec.d_sae, spec.d_in)
    b_enc_F, threshold_F = torch.empty(spec.d_sae), torch.zeros(spec.d_sae)
    b_dec_D = tensors["b_dec"].double() / spec.scale
    for start in range(0, spec.d_sae, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        enc_CD = tensors["W_enc"][:, chunk].t().double() * spec.scale
        dec_CD = tensors["W_dec"][chunk].double() / spec.scale
        if spec.architecture == "gated":
            gain_C = _steady(tensors["r_mag"][chunk].double().exp())
            bias_C = tensors["b_mag"][chunk].double()
            threshold_F[chunk] = (bias_C - tensors["b_gate"][chunk].double() * gain_C).clamp(min=0).float()
            enc_CD *= gain_C[:, None]
        else:
            bias_C = tensors["b_enc"][chunk].double()
        if spec.architecture == "jumprelu":
            threshold_F[chunk] = tensors["threshold"][chunk].float().clamp(min=0)
        if spec.rescale_acts_by_decoder_norm:
            norm_C = _steady(dec_CD.square().sum(dim=1).sqrt())
            bias_C = bias_C * norm_C
            enc_CD *= norm_C[:, None]
            dec_CD /= norm_C.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        if spec.apply_b_dec_to_input:
            bias_C = bias_C - (enc_CD * b_dec_D).sum(dim=1)  # not BLAS: its order follows the machine
        W_enc_FD[chunk], W_dec_FD[chunk], b_enc_F[chunk] = enc_CD.float(), dec_CD.float(), bias_C.float()
    encoder = EncoderWeights(
        W_enc_DF=W_enc_FD.t(),
        b_enc_F=b_enc_F,
        threshold_F=threshold_F,
        b_dec_D=b_dec_D.float(),
        W_dec_FD=W_dec_FD,
        max_active=spec.k,
        two_sided=spec.architecture == "abstopk",
    )
    for name, tensor in _rows_of(encoder).items():
        if not bool(tensor.isfinite().all()):
            refuse(f"the folded {name}", "an overflow", "within fp32", "the SAE is damaged: get it again")
    return encoder


def key_of(spec: SaeSpec, encoder: EncoderWeights) -> str:
    """Name what is encoded: sha256 (hex) of the folded tensors and of each field that changes an encoding."""
    meaning = {
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "hook_name": spec.hook.name,
        "normalisation": spec.normalisation,
        "max_active": encoder.max_active,
        "two_sided": encoder.two_sided,
    }
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for tensor in _rows_of(encoder).values():
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _rows_of(encoder: EncoderWeights) -> dict[str, Tensor]:
    """The tensors of `fold`'s result, each contiguous."""
    assert encoder.W_dec_FD is not None
    return {
        "W_enc": encoder.W_enc_DF.t(),
        "b_enc": encoder.b_enc_F,
        "threshold": encoder.threshold_F,
        "b_dec": encoder.b_dec_D,
        "W_dec": encoder.W_dec_FD,
    }


def _steady(value_C: Tensor) -> Tensor:
    """Round to fp32: the last float64 bit of a square root or an exponential depends on the processor."""
    return value_C.float().double()
