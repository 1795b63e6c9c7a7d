"""A sparse autoencoder, read from a sae-lens folder or release and ready to encode."""

# Shape suffixes: N packed tokens, D = d_in.

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from auditor_kernels import EncoderWeights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_auditor.sae_fold import check_tensors, fold, key_of
from ray_auditor.sae_spec import HookPoint, Normalisation, check_activation, read_spec, refuse

__all__ = ["Normalisation", "Sae", "load_sae", "normalise_resid"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALE_FILE = "activation_scaler.json"  # sae-lens writes it beside a checkpoint whose scale is not folded yet

# The readers of sae-lens that open no pickle and yield SAEs; the others open .pt files, or yield transcoders.
RELEASE_READERS = ("sae_lens", "gemma_2", "gemma_3", "llama_scope", "llama_scope_r1_distill", "sparsify")


@dataclass(frozen=True, eq=False)
class Sae:
    """An SAE ready for encoding.

    Attributes:
        encoder: folded weights, fp32 on the CPU. Under a `normalisation` other than none, `b_dec` and `W_dec`
            live in the space of normalised residuals, and so does the share of variance left unexplained.
        hook_name: `blocks.{hook_layer}.hook_{hook_point}`, whatever name the configuration used.
        key: sha256 (hex) of the folded tensors and of each field that changes an encoding.
        explained_variance: what its makers measured, in (0, 1); with `expected_l0` it takes no part in `key`.
    """

    encoder: EncoderWeights
    hook_name: str
    hook_layer: int
    hook_point: HookPoint
    d_in: int
    d_sae: int
    architecture: str
    normalisation: Normalisation
    key: str
    model_name: str | None
    neuronpedia_id: str | None
    explained_variance: float | None = None
    expected_l0: float | None = None


@dataclass(frozen=True)
class _Stored:
    """An SAE as it was found: nothing is checked yet."""

    cfg: dict[str, Any]
    tensors: dict[str, Tensor]
    scale: object


def load_sae(
    path: str | Path | None,
    release: str | None = None,
    sae_id: str | None = None,
    hook_name: str | None = None,
) -> Sae:
    """Read, check and fold an SAE.

    Args:
        path: a folder with `cfg.json` and `sae_weights.safetensors`, as sae-lens saves it.
        release: instead of a path, a release of sae-lens or a hub repository; needs `sae_id`.
        sae_id: the SAE within the release.
        hook_name: the hook, where the configuration names none.

    Raises:
        ValueError: the SAE is damaged, or means something that is not implemented; the field is named.
    """
    if (path is None) == (release is None):
        refuse(
            "sae.path",
            path,
            "given where sae.release is not",
            "set one: sae.path, or sae.release and sae.sae_id",
        )
    if release is not None and sae_id is None:
        refuse("sae.sae_id", sae_id, "given with sae.release", f"choose an SAE of {release}")
    if path is not None:
        origin, stored = str(path), _read_folder(Path(path))
    else:
        origin, stored = f"{release}/{sae_id}", _read_release(str(release), str(sae_id))
    try:
        check_activation(stored.cfg)
        spec = read_spec(stored.cfg, _modern(stored.cfg), stored.scale, hook_name)
        encoder = fold(spec, check_tensors(spec, stored.tensors))
    except ValueError as error:
        raise ValueError(f"SAE {origin}: {error}") from error
    return Sae(
        encoder=encoder,
        hook_name=spec.hook.name,
        hook_layer=spec.hook.layer,
        hook_point=spec.hook.point,
        d_in=spec.d_in,
        d_sae=spec.d_sae,
        architecture=spec.architecture,
        normalisation=spec.normalisation,
        key=key_of(spec, encoder),
        model_name=spec.model_name,
        neuronpedia_id=spec.neuronpedia_id,
        explained_variance=spec.explained_variance,
        expected_l0=spec.expected_l0,
    )


def normalise_resid(resid_ND: Tensor, normalisation: Normalisation) -> Tensor:
    """Do to each row what the SAE's training did, as sae-lens does it; what precedes `encode_topk`.

    Args:
        resid_ND: residuals, any float dtype.
        normalisation: `Sae.normalisation`.

    Returns:
        fp32 [N, D], or `resid_ND` itself where there is nothing to do. A row of zeros, which
        `constant_norm_rescale` cannot rescale, becomes NaN, as in sae-lens.
    """
    if normalisation is Normalisation.NONE:
        return resid_ND
    resid_ND = resid_ND.float()
    if normalisation is Normalisation.LAYER_NORM:
        centred_ND = resid_ND - resid_ND.mean(dim=-1, keepdim=True)
        return centred_ND / (centred_ND.std(dim=-1, keepdim=True) + 1e-5)
    norm_N1: Tensor = torch.linalg.vector_norm(resid_ND, dim=-1, keepdim=True)
    return resid_ND * (math.sqrt(resid_ND.shape[-1]) / norm_N1)


def _read_folder(folder: Path) -> _Stored:
    if not folder.is_dir():
        refuse("sae.path", str(folder), f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}", "correct sae.path")
    cfg = _read_json(_inside(folder, CONFIG_FILE))
    weights = _inside(folder, WEIGHTS_FILE)
    try:
        tensors: dict[str, Tensor] = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"SAE {weights} is not a whole safetensors file ({error}); get it again") from error
    scaled = (folder / SCALE_FILE).exists()
    return _Stored(
        cfg, tensors, _read_json(_inside(folder, SCALE_FILE)).get("scaling_factor") if scaled else None
    )


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        remedy = "weights are read from safetensors alone: convert a .pt or .bin file with sae-lens"
        refuse("sae.path", str(folder), f"a folder with {name}", remedy)
    if not file.resolve().is_relative_to(folder.resolve()):
        refuse(
            str(file), str(file.resolve()), "a file inside its folder", "copy the file in place of the link"
        )
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"SAE {file} is not JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        refuse(str(file), type(value).__name__, "a JSON object", "get the SAE again")
    return value


def _modern(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the form of sae-lens 6; sae-lens itself converts an older one."""
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, dict):
        refuse("metadata", metadata, "an object", f"correct {CONFIG_FILE}")
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "0"
    if not isinstance(version, str) or not (major := re.match(r"\d+", version)):
        refuse("sae_lens_version", version, "a version such as 6.54.12", f"correct {CONFIG_FILE}")
    if int(major[0]) >= 6:
        if cfg.get("architecture") is None:
            refuse("architecture", None, "given", f"correct {CONFIG_FILE}")
        return cfg
    from sae_lens.loading.pretrained_sae_loaders import handle_pre_6_0_config  # takes seconds to import

    try:
        converted: dict[str, Any] = handle_pre_6_0_config(
            {k: v for k, v in cfg.items() if v not in (None, {})}
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{CONFIG_FILE} is not a configuration of sae-lens ({error!r}); correct it"
        ) from error
    return converted


def _read_release(release: str, sae_id: str) -> _Stored:
    from sae_lens.loading import pretrained_sae_loaders as loaders  # takes seconds to import
    from sae_lens.loading import pretrained_saes_directory as directory

    known = directory.get_pretrained_saes_directory().get(release)
    if known is None and "/" not in release:
        refuse(
            "sae.release", release, "a release of sae-lens or a hub repository", "see sae-lens' table of SAEs"
        )
    if known is not None and sae_id not in known.saes_map:
        refuse(
            "sae.sae_id", sae_id, f"an SAE of {release}", f"choose one, such as {next(iter(known.saes_map))}"
        )
    reader = loaders.get_conversion_loader_name(release)
    if reader not in RELEASE_READERS:
        bound = f"SAEs stored without pickles, as {', '.join(RELEASE_READERS)} are and {reader} is not"
        refuse("sae.release", release, bound, "save the SAE to a folder with sae-lens, and set sae.path")
    repo_id, folder_name = directory.get_repo_id_and_folder_name(release, sae_id)
    try:
        cfg, tensors, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[reader](
            repo_id=repo_id,
            folder_name=folder_name,
            device="cpu",
            force_download=False,
            cfg_overrides={**directory.get_config_overrides(release, sae_id), "dtype": "float32"},
        )
    except OSError as error:
        raise ValueError(
            f"SAE {release}/{sae_id} cannot be downloaded ({error}); set sae.path to a copy"
        ) from error
    measured = {
        "explained_variance": (known.expected_var_explained or {}).get(sae_id) if known else None,
        "expected_l0": (known.expected_l0 or {}).get(sae_id) if known else None,
    }
    return _Stored(cfg | measured, tensors, directory.get_norm_scaling_factor(release, sae_id))
