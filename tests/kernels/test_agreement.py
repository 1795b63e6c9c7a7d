"""A Hopper filter that computes something else than Triton is not used, whatever it promises."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from auditor_kernels import EncoderWeights, dispatch, hopper
from auditor_kernels.agreement import KEPT, TOKENS, check_hopper
from auditor_kernels.dispatch import Implementation
from auditor_kernels.encode_topk_ref import encode_topk_ref

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    check_hopper.cache_clear()
    yield
    check_hopper.cache_clear()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (None, "built by nvcc"),
        (Implementation.HOPPER, "hopper-filter was built by nvcc and disagrees with triton-rows"),
        (Implementation.INT8, "disagrees with triton-rows"),
    ],
)
def test_a_filter_is_used_only_where_it_agrees(
    broken: Implementation | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(which: Implementation, resid: Any, encoder: EncoderWeights, k: int, hint: None) -> Any:
        assert (len(resid), k, hint) == (TOKENS, KEPT, None)
        values = encode_topk_ref(resid, encoder, k=k).top_acts_NK.clone()
        if which is broken:
            values[7, 3] *= 1.01
        return SimpleNamespace(val_NK=values)

    monkeypatch.setattr(hopper, "load", lambda: (object(), "built by nvcc"))
    monkeypatch.setattr(dispatch, "launch", launch)
    works, reason = check_hopper(CPU)
    assert works is (broken is None)
    assert says in reason


def test_one_that_does_not_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> None:
        raise RuntimeError("code 700")

    monkeypatch.setattr(hopper, "load", lambda: (object(), "built by nvcc"))
    monkeypatch.setattr(dispatch, "launch", launch)
    assert check_hopper(CPU) == (False, "it was built by nvcc and does not run: code 700")


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "load", lambda: (None, "no nvcc"))
    assert check_hopper(CPU) == (False, "no nvcc")
