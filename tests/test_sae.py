"""Ours against sae-lens' own `encode` and `decode`, for every inference class and normalisation."""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae, K = kept features.

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from auditor_kernels import encode_topk, fvu_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_oracle import CLASSES, HOOK, Case, assert_encodes_alike, residuals, sae_lens_sae, saved
from torch import Tensor

from ray_auditor.sae import Normalisation, load_sae, normalise_resid

ALL = [Case(*parts) for parts in itertools.product(CLASSES, (True, False), Normalisation)]


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.kind}-{case.apply_b_dec}-{case.normalisation}")
def test_every_class_encodes_and_decodes_as_sae_lens_does(case: Case, tmp_path: Path) -> None:
    theirs = sae_lens_sae(case)
    sae = load_sae(saved(theirs, tmp_path))
    resid_ND = residuals(case)
    assert assert_encodes_alike(sae, theirs, resid_ND) == 0, "the fixed seed has no tie"

    # decode: the reconstruction before sae-lens undoes the normalisation
    reconstructed: list[Tensor] = []
    keep = ("hook_sae_recons", lambda act, hook: reconstructed.append(act))
    with torch.no_grad(), theirs.hooks(fwd_hooks=[keep]):
        theirs.decode(theirs.encode(resid_ND))
    input_ND = normalise_resid(resid_ND, sae.normalisation)
    top = encode_topk(input_ND, sae.encoder, k=sae.d_sae)
    error_N, total_N = fvu_parts(input_ND, top, sae.encoder)
    torch.testing.assert_close(error_N, (input_ND - reconstructed[0]).square().sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total_N, (input_ND - theirs.b_dec.data).square().sum(-1), rtol=1e-5, atol=1e-5)

    assert (sae.hook_name, sae.hook_layer, sae.hook_point) == (HOOK, 3, "resid_post")
    assert (sae.d_in, sae.d_sae, sae.architecture) == (case.d_in, case.d_sae, case.kind.split()[0])
    assert (sae.model_name, sae.neuronpedia_id) == ("tiny", "tiny/3")
    assert sae.encoder.max_active == (case.k if "topk" in case.kind else None)
    assert sae.encoder.two_sided == ("abstopk" in case.kind)
    assert sae.encoder.W_enc_DF.t().is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(CLASSES),
    apply_b_dec=st.booleans(),
    normalisation=st.sampled_from(list(Normalisation)),
    shape=st.tuples(st.integers(2, 70), st.integers(1, 128)),
    k_share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    norm=st.sampled_from([1e-2, 1.0, 172.0, 1e5]),
)
def test_any_shape_encodes_as_sae_lens_does(
    kind: str,
    apply_b_dec: bool,
    normalisation: str,
    shape: tuple[int, int],
    k_share: float,
    seed: int,
    norm: float,
) -> None:
    d_in, d_sae = shape
    k = max(1, round(k_share * d_sae))
    theirs = sae_lens_sae(case := Case(kind, apply_b_dec, normalisation, d_in, d_sae, k, seed, norm))
    resid_ND = residuals(case, tokens=7)
    with tempfile.TemporaryDirectory() as folder:
        sae = load_sae(saved(theirs, Path(folder)))
    if theirs.encode(resid_ND).any():
        assert_encodes_alike(sae, theirs, resid_ND)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_scale_left_in_a_checkpoint_is_folded_as_sae_lens_folds_it(kind: str, tmp_path: Path) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    case = Case(kind, normalisation="expected_average_only_in")
    theirs = sae_lens_sae(case)
    path = saved(theirs, tmp_path)
    with pytest.raises(ValueError, match=r"normalize_activations .* 'expected_average_only_in'; fold"):
        load_sae(path)
    ActivationScaler(scaling_factor=0.037).save(str(tmp_path / "activation_scaler.json"))
    sae = load_sae(path)
    theirs.fold_activation_norm_scaling_factor(0.037)
    resid_ND = residuals(case)
    assert assert_encodes_alike(sae, theirs, resid_ND) == 0
    with torch.no_grad():
        want_ND = theirs.decode(theirs.encode(resid_ND))
    top = encode_topk(resid_ND, sae.encoder, k=sae.d_sae)
    error_N, _ = fvu_parts(resid_ND, top, sae.encoder)
    torch.testing.assert_close(error_N, (resid_ND - want_ND).square().sum(-1), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_batch_topk_is_the_jumprelu_that_sae_lens_saves(name: str, rescaled: bool, tmp_path: Path) -> None:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    case = Case("jumprelu")
    widths = {"matryoshka_widths": [40, 120]} if name.startswith("Matryoshka") else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=case.d_in,
        d_sae=case.d_sae,
        k=8,
        rescale_acts_by_decoder_norm=rescaled,
        metadata=SAEMetadata(hook_name=HOOK),
        **widths,
    )
    training = getattr(sae_lens, f"{name}TrainingSAE")(config)
    training.W_dec.data *= torch.linspace(0.5, 3, case.d_sae)[:, None]
    training.topk_threshold.fill_(2.0)
    with pytest.raises(ValueError, match=r"architecture must be .* save_inference_model"):
        load_sae(saved(training, tmp_path / "checkpoint"))
    training.save_inference_model(tmp_path / "inference")
    sae = load_sae(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert assert_encodes_alike(sae, theirs, residuals(case)) == 0


def test_a_zero_row_is_undetermined_where_sae_lens_gives_nan(tmp_path: Path) -> None:
    theirs = sae_lens_sae(Case("standard", normalisation="constant_norm_rescale"))
    sae = load_sae(saved(theirs, tmp_path))
    zero_ND = torch.zeros(1, 24)
    assert theirs.encode(zero_ND).isnan().all()
    top = encode_topk(normalise_resid(zero_ND, sae.normalisation), sae.encoder, k=4)
    assert top.top_acts_NK.isnan().all()
    assert (top.top_idx_NK == -1).all()


def test_normalising_bf16_residuals_is_fp32_maths() -> None:
    resid_ND = residuals(Case("standard")).bfloat16()
    assert normalise_resid(resid_ND, Normalisation.NONE) is resid_ND
    for normalisation in (Normalisation.LAYER_NORM, Normalisation.CONSTANT_NORM_RESCALE):
        got_ND = normalise_resid(resid_ND, normalisation)
        assert got_ND.dtype == torch.float32
        assert torch.equal(got_ND, normalise_resid(resid_ND.float(), normalisation))
