"""A Hopper filter that computes something else than Triton is not used, whatever it promises."""

import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from auditor_kernels import EncoderWeights, dispatch, hopper
from auditor_kernels.agreement import FEATURES, KEPT, TOKENS, WIDTH, check_hopper
from auditor_kernels.dispatch import Implementation
from auditor_kernels.encode_topk_ref import encode_topk_ref

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    check_hopper.cache_clear()
    yield
    check_hopper.cache_clear()


@pytest.mark.parametrize(
    ("broken", "how", "says"),
    [
        (None, "", "built by nvcc"),
        (Implementation.HOPPER, "wrong", "hopper-filter was built by nvcc and disagrees with triton-rows"),
        (Implementation.INT8, "wrong", "hopper-int8 was built by nvcc and disagrees with triton-rows"),
        (Implementation.HOPPER, "idle", "hopper-filter was built by nvcc and leaves 1000 of 1000 tokens"),
    ],
)
def test_a_filter_is_used_only_where_it_agrees_by_its_own_work(
    broken: Implementation | None, how: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(which: Implementation, resid: Any, encoder: EncoderWeights, k: int, hint: None) -> Any:
        assert (len(resid), k, hint) == (TOKENS, KEPT, None)
        values = encode_topk_ref(resid, encoder, k=k).top_acts_NK.clone()
        if which is broken and how == "wrong":
            values[7, 3] *= 1.01
        num_recomputed = TOKENS if which is broken and how == "idle" else 1
        return SimpleNamespace(val_NK=values, num_recomputed=lambda: num_recomputed)

    monkeypatch.setattr(hopper, "load", lambda: (object(), "built by nvcc"))
    monkeypatch.setattr(dispatch, "launch", launch)
    works, reason = check_hopper(CPU)
    assert works is (broken is None)
    assert says in reason


def test_the_question_meets_all_that_a_filter_does() -> None:
    """Its shape holds what `hopper_filter.cu` would else first do in a sweep, as its constants say."""
    text = hopper.SOURCE.read_text()

    def constant(name: str) -> int:
        found = re.search(rf"\b{name} = (\d+)", text)
        assert found is not None
        return int(found[1])

    tokens_a_pair, features_a_tile = constant("BM") * constant("CLUSTER"), constant("BN")
    tiles = -(-TOKENS // tokens_a_pair) * -(-FEATURES // features_a_tile)
    assert tiles > 3 * (132 // constant("CLUSTER"))  # what keeps a tile's winners is used again, twice
    least_steps = 2 * constant("STAGES")  # from then on one consumer follows the other, in int8 too
    assert -(-WIDTH // constant("ROW_BYTES")) >= least_steps
    assert TOKENS % constant("BM")
    assert WIDTH % (constant("ROW_BYTES") // 2)


def test_one_that_does_not_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> None:
        raise RuntimeError("code 700")

    monkeypatch.setattr(hopper, "load", lambda: (object(), "built by nvcc"))
    monkeypatch.setattr(dispatch, "launch", launch)
    assert check_hopper(CPU) == (False, "it was built by nvcc and does not run: code 700")


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "load", lambda: (None, "no nvcc"))
    assert check_hopper(CPU) == (False, "no nvcc")


def test_a_compiler_that_hangs_is_given_up_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path / 'started'}\nwait\n")
    nvcc.chmod(0o700)
    monkeypatch.setattr(hopper, "BUILD_SECONDS", 1)
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        hopper.build(str(nvcc), tmp_path / "cache")
    assert time.monotonic() - begun < 30
    started = Path(f"/proc/{int((tmp_path / 'started').read_text())}/stat")
    assert not started.exists() or started.read_text().split()[2] == "Z"
    assert not list((tmp_path / "cache").iterdir())
