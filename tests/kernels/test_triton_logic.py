"""The logic of every Triton design, certificates included, on a CPU through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from auditor_kernels import (
    EncoderWeights,
    agreement,
    describe_dispatch,
    dispatch,
    encode_topk,
    hopper,
    screened,
)
from auditor_kernels.designs import choose_sample, chunk_tokens, hint_capacity, per_group
from auditor_kernels.dispatch import Implementation, choose
from auditor_kernels.prepared import prepare
from kernel_oracle import make_encoder

CASES = [
    "one_sided",
    "thresholds",
    "two_sided",
    "hints",
    "sample",
    "long_lists",
    "overflow_fails_closed",
    "ties",
    "fvu",
    "int8",
    "int8_classes",
]


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case):
    script = Path(__file__).with_name("interpreted.py")
    paths = os.pathsep.join([str(script.parent), str(script.parents[2] / "kernels")])
    environment = (
        os.environ
        | {"PYTHONPATH": paths}
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    )
    result = subprocess.run(
        [sys.executable, str(script), case],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_group_size_follows_the_odds():
    assert per_group(32, 65536) < per_group(32, 16384) < per_group(64, 16384)
    assert per_group(128, 300) is None


def test_a_random_sample_misleads_as_rarely_as_claimed():
    """Simulated ranks: the floor is almost never too high, nor too low, and not lower than it must be."""
    generator = torch.Generator().manual_seed(0)
    for kept, d_sae in ((32, 14336), (64, 65536)):
        plan = choose_sample(kept, d_sae)
        sampled = torch.rand(4000, plan.capacity, generator=generator) < 1 / plan.stride
        above_floor = (sampled.cumsum(1) < plan.rank).sum(1)
        assert ((above_floor < kept) | (above_floor >= plan.capacity)).float().mean() < 1e-3
        assert 0.8 < above_floor.float().mean() / plan.expected < 1.2
        # And it asks for no more than it must: one rank less would mislead more often than is allowed.
        assert (sampled[:, :kept].sum(1) >= plan.rank - 4).any()


def test_weights_that_need_no_change_are_not_held_twice():
    for d_in, is_shared in ((64, True), (60, False)):  # rows of whole 16-byte units, and not
        encoder = make_encoder(d_in, 300, dtype=torch.bfloat16).to()
        prepared = prepare(encoder, torch.bfloat16)
        assert (prepared.w_FD.data_ptr() == encoder.W_enc_DF.data_ptr()) is is_shared
        assert torch.equal(prepared.w_FD[:, :d_in], encoder.W_enc_DF.t())
        assert not prepared.w_FD[:, d_in:].any()


def test_workspace_is_bounded():
    for d_sae, k in ((14336, 32), (65536, 64), (131072, 128)):
        for slots in (hint_capacity(k, d_sae), choose_sample(k, d_sae).capacity):
            size = chunk_tokens(16384, 8 * slots, d_sae)
            assert size * 8 * slots <= max(64 << 20, 0.051 * 2 * d_sae * 16384)


def test_a_cpu_call_runs_the_reference_and_says_so(monkeypatch):
    monkeypatch.setattr(screened, "is_fast_here", lambda: False)
    lines = describe_dispatch(make_encoder(4, 50), k=3, num_tokens=100, dtype=torch.float32)
    assert len(lines) == 2
    assert all("reference (device is cpu, no bfloat16 tiles (AMX))" in line for line in lines)


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k", "expected"),
    [
        (2304, 65536, 32, Implementation.INT8),
        (2304, 65536, 64, Implementation.HOPPER),
        (896, 65536, 32, Implementation.HOPPER),
        (2304, 16384, 32, Implementation.HOPPER),
        (576, 700, 64, Implementation.ROWS),
        (576, 9216, 128, Implementation.FILTER),
    ],
)
def test_a_hopper_gpu_runs_what_was_measured_to_be_fastest(monkeypatch, d_in, d_sae, k, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(agreement, "check_hopper", lambda _: (True, "built"))
    zeros = torch.zeros(d_sae)
    w_df = torch.zeros(1, 1, dtype=torch.bfloat16).expand(d_in, d_sae)
    encoder = EncoderWeights(w_df, zeros, zeros, torch.zeros(d_in), None, None)
    which, why = choose(torch.device("cuda"), torch.bfloat16, 16384, encoder, k, hinted=False)
    assert which is expected, why
    monkeypatch.setattr(agreement, "check_hopper", lambda _: (False, "no nvcc"))
    which, why = choose(torch.device("cuda"), torch.bfloat16, 16384, encoder, k, hinted=False)
    assert which in (Implementation.FILTER, Implementation.ROWS), why


def test_the_override_is_obeyed_and_checked(monkeypatch):
    encoder = make_encoder(4, 50)
    monkeypatch.setenv(dispatch.OVERRIDE, "reference")
    which, why = choose(torch.device("cuda"), torch.bfloat16, 100, encoder, 3, hinted=True)
    assert which is Implementation.REFERENCE
    assert dispatch.OVERRIDE in why
    monkeypatch.setenv(dispatch.OVERRIDE, "fastest")
    with pytest.raises(ValueError, match="fastest"):
        encode_topk(torch.zeros(2, 4), encoder, k=3)


@pytest.mark.skipif(hopper.find_nvcc() is None, reason="no nvcc")
def test_the_hopper_filter_compiles_once(tmp_path):
    nvcc = hopper.find_nvcc()
    assert nvcc is not None
    library = hopper.build(nvcc, tmp_path)
    stamp = library.stat().st_mtime_ns
    assert hopper.build(nvcc, tmp_path) == library
    assert library.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


@pytest.mark.skipif(hopper.find_nvcc() is None, reason="no nvcc")
def test_the_hopper_filter_spills_nothing_and_its_products_overlap(tmp_path):
    """What costs a tenth of the speed is decided by ptxas, which says so to those who ask."""
    nvcc = hopper.find_nvcc()
    assert nvcc is not None
    (tmp_path / "wgmma.inc").write_text(hopper.wgmma_header())
    command = [*hopper.compile_command(nvcc, tmp_path, tmp_path / "filter.so"), "-Xptxas", "-v"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == 5, said[-2000:]
    assert "serialized" not in said


def test_a_failed_build_leaves_nothing_and_gives_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="nvcc failed"):
        hopper.build("/bin/false", tmp_path)
    assert list(tmp_path.iterdir()) == []
