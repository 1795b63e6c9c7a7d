"""What readers read is the file's, block by block, and nothing else is ever written."""

import os
import time
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ray_auditor.engine import staging as staging_module
from ray_auditor.engine.parameters import (
    FOLD,
    ROW_WEIGHT,
    Checksum,
    ParameterMap,
    SwapError,
    checksums,
    sum_blocks,
)
from ray_auditor.engine.staging import Staging, _Block
from ray_auditor.hub import CandidateError
from ray_auditor.hub.checkpoint import TORCH_DTYPES
from tests.tiny import save_tensors

SHAPES = {"0.weight": (60, 4), "0.bias": (60,), "1.weight": (2, 60)}


def staging_of(model: nn.Module) -> Staging:
    return Staging(ParameterMap(model, SHAPES), 0)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 60), nn.Linear(60, 2, bias=False))


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def checksum(tensor: Tensor) -> Checksum:
    return checksums([tensor])[0]


BLOCK_BYTES = 96  # of 24 values in fp32
EDGES = {
    "one value": (1, 1), "one row": (1, 24), "whole blocks": (6, 12), "a rest": (7, 12),
    "a row a block": (3, 24), "longer rows": (3, 50), "odd rows": (9, 7), "words of 4 bytes": (9, 6),
    "a vector": (11,), "a longer vector": (101,), "a scalar": (), "experts": (5, 3, 4),
    "no rows": (0, 4), "no columns": (4, 0),
}  # fmt: skip


def by_definition(tensor: Tensor) -> Checksum:
    """In Python's integers, from the bytes."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    row_bytes = rows.shape[1] * rows.element_size()
    size = next(size for size in (8, 4, 2) if row_bytes % size == 0)
    plain = weighted = 0
    for r in range(len(rows)):
        raw = rows[r].contiguous().view(torch.uint8).numpy().tobytes()
        for c in range(row_bytes // size):
            word = int.from_bytes(raw[c * size : (c + 1) * size], "little", signed=True)
            word += word >> FOLD
            plain += word
            weighted += word * (c + 1 + (r + 1) * ROW_WEIGHT)
    signed = [(total + (1 << 63)) % (1 << 64) - (1 << 63) for total in (plain, weighted)]
    return signed[0], signed[1]


@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("dtypes", ["F32 F32", "BF16 BF16", "F16 F16", "F32 BF16", "BF16 F32", "F64 F16"])
def test_blocks_of_rows_are_the_file_s(
    shape: tuple[int, ...], dtypes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, and summed by the definition; twice, so that the memory is used again."""
    monkeypatch.setattr(staging_module, "BLOCK_BYTES", BLOCK_BYTES)
    file, live = (TORCH_DTYPES[name] for name in dtypes.split())
    staging = staging_of(small())
    for seed in (0, 1):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(file)
        specs = save_tensors(tmp_path / str(seed), {"w": values})
        target = torch.full(shape, torch.nan, dtype=live)
        found = staging._read_one(specs, "w", target)
        assert torch.equal(target, values.to(live))
        assert found == by_definition(values.to(live)) == checksum(target)


@settings(deadline=None)
@given(st.data())
def test_a_checksum_is_the_same_however_its_rows_come(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    num_rows, num_columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    tensor = torch.randn(num_rows, num_columns).to(dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), max_size=4)))
    blocks = [tensor[a:b] for a, b in pairwise([0, *cuts, num_rows])]
    assert sum_blocks(blocks) == checksum(tensor) == by_definition(tensor)


def test_readers_use_their_memory_again_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "BLOCK_BYTES", BLOCK_BYTES)
    staging = staging_of(small())
    held = []
    for seed in (0, 1):
        staging.swap(str(seed), save_tensors(tmp_path / str(seed), tensors(seed)))
        turns = staging._readers.submit(lambda: staging._memory.turns).result()
        held.append([(block._bytes.data_ptr(), len(block._bytes)) for block in turns])
    assert held[0] == held[1]
    assert [size for _, size in held[0]] == [4 * 60, 4 * 60]  # rows of 60 are longer than a block
    alive = [weakref.ref(block) for block in turns]
    del turns
    staging.close()
    assert [block() for block in alive] == [None, None]


def test_nothing_is_written_when_a_tensor_has_another_shape(tmp_path: Path) -> None:
    model = small()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = tensors() | {"1.weight": torch.zeros(60, 2)}
    with pytest.raises(SwapError, match=r"1.weight: got \(60, 2\) for \(2, 60\)"):
        staging_of(model).swap("0", save_tensors(tmp_path, state))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", ["F32 F32", "F32 BF16"])
def test_a_block_is_not_overwritten_before_it_has_left(
    dtypes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device lags behind: every copy first waits for some millions of its cycles."""
    monkeypatch.setattr(staging_module, "BLOCK_BYTES", BLOCK_BYTES)
    file, live = (TORCH_DTYPES[name] for name in dtypes.split())
    values, send = torch.randn(40, 24).to(file), _Block.send

    def lagging(self: _Block, rows: Tensor, target: Tensor) -> None:
        torch.cuda._sleep(5_000_000)
        send(self, rows, target)

    monkeypatch.setattr(_Block, "send", lagging)
    staging, target = staging_of(small().cuda()), torch.zeros(40, 24, dtype=live, device="cuda")
    assert staging._read_one(save_tensors(tmp_path, {"w": values}), "w", target) == checksum(values.to(live))
    assert torch.equal(target.cpu(), values.to(live))
    assert all(block._bytes.is_pinned() for block in staging._memory.turns)


@pytest.mark.parametrize(("fault", "num_read"), [("rewritten", 40), ("shorter", 20)])
def test_a_file_that_changes_between_two_blocks_is_refused(
    fault: str, num_read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "BLOCK_BYTES", BLOCK_BYTES)
    specs, target = save_tensors(tmp_path, {"w": torch.randn(40, 24)}), torch.zeros(40, 24)
    path, send, sent = tmp_path / "model.safetensors", _Block.send, []

    def change(self: _Block, rows: Tensor, target: Tensor) -> None:
        send(self, rows, target)
        sent.append(rows)
        if len(sent) == 20 and fault == "shorter":
            os.truncate(path, path.stat().st_size // 2)
        elif len(sent) == 20:
            path.write_bytes(path.read_bytes()[::-1])

    monkeypatch.setattr(_Block, "send", change)
    with pytest.raises(CandidateError, match="rejected:changed: "):
        staging_of(small())._read_one(specs, "w", target)
    assert len(sent) == num_read


def test_a_reader_s_error_is_heard_when_no_other_writes_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(SHAPES)
    specs = [save_tensors(tmp_path / name, {name: tensors()[name]})[name] for name in names]
    os.truncate(tmp_path / names[0] / "model.safetensors", 9)
    send, sent = _Block.send, []

    def slowly(self: _Block, rows: Tensor, target: Tensor) -> None:
        time.sleep(0.1)
        send(self, rows, target)
        sent.append(rows)

    monkeypatch.setattr(_Block, "send", slowly)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)  # three readers
    with pytest.raises(CandidateError, match="rejected:changed: "):
        staging_of(small()).swap("0", dict(zip(names, specs, strict=True)))
    assert len(sent) == len(names) - 1
