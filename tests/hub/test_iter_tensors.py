import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_folders import Hub, adapter_tensors, model_tensors, write_safetensors
from safetensors.torch import load_file, save_file

from ray_auditor.hub import CandidateError, open_base
from ray_auditor.hub.checkpoint import iter_tensors, open_tensor, read_header


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_is_the_file_s(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {"a": (3, 5), "scalar": (), "empty": (0, 4), "b": (2, 3, 4)}
    save_file(
        {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}, path
    )
    read = dict(iter_tensors(read_header(path)))
    expected = load_file(path)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def test_names_come_in_the_order_asked_for(hub: Hub) -> None:
    names = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"]
    read = list(iter_tensors(hub.base.tensors, names))
    assert [name for name, _ in read] == names
    for name, tensor in read:
        np.testing.assert_array_equal(tensor.numpy(), model_tensors()[name])


def test_what_is_yielded_belongs_to_the_caller(hub: Hub) -> None:
    (_, first), (_, second) = iter_tensors(hub.base.tensors, ["model.norm.weight"] * 2)
    first.zero_()
    np.testing.assert_array_equal(second.numpy(), model_tensors()["model.norm.weight"])


def test_an_adapter_is_read_under_its_own_names(hub: Hub) -> None:
    hub.adapter()
    admitted = hub.admit()
    read = dict(iter_tensors(admitted.tensors))
    assert read.keys() == admitted.tensors.keys()
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor.numpy(), adapter_tensors(1)[name])


def rewrite(path: Path) -> None:
    write_safetensors(path, model_tensors(7))


def replace(path: Path) -> None:
    write_safetensors(path.with_name("new"), model_tensors(1))
    path.with_name("new").replace(path)  # same bytes, another inode


def link(path: Path) -> None:
    path.rename(path.with_name("moved.safetensors"))
    path.symlink_to("moved.safetensors")


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (rewrite, "changed"),
        (replace, "changed"),
        (truncate, "changed"),
        (link, "symlink_escape"),
        (remove, "missing_file"),
    ],
)
def test_a_file_that_changed_after_admission(hub: Hub, change, code: str) -> None:
    folder = hub.full()
    admitted = hub.admit()
    change(folder / "model.safetensors")
    with pytest.raises(CandidateError) as caught:
        next(iter_tensors(admitted.tensors))
    assert (caught.value.status, caught.value.code) == ("rejected", code)


@pytest.mark.parametrize("change", [rewrite, truncate])
def test_a_file_that_changes_while_it_is_read(hub: Hub, change) -> None:
    folder = hub.full()
    stream = iter_tensors(hub.admit().tensors)
    next(stream)
    change(folder / "model.safetensors")
    with pytest.raises(CandidateError, match="rejected:changed: "):
        list(stream)


def test_a_tensor_comes_in_pieces_too(hub: Hub) -> None:
    spec = hub.base.tensors["model.embed_tokens.weight"]
    read = torch.empty(spec.shape)
    with open_tensor(spec) as fill:
        for row in reversed(range(len(read))):
            fill(row * read[0].nbytes, read[row])
    np.testing.assert_array_equal(read.numpy(), model_tensors()["model.embed_tokens.weight"])


@pytest.mark.parametrize("change", [rewrite, truncate])
def test_pieces_of_a_file_that_changes_meanwhile_are_refused(hub: Hub, change) -> None:
    folder = hub.full()
    spec = hub.admit().tensors["model.embed_tokens.weight"]
    with pytest.raises(CandidateError, match="rejected:changed: "), open_tensor(spec) as fill:  # noqa: PT012
        fill(0, torch.empty(spec.shape))
        change(folder / "model.safetensors")


def test_files_are_closed(hub: Hub) -> None:
    hub.full()
    admitted = hub.admit()
    before = len(os.listdir("/dev/fd"))
    stream = iter_tensors(admitted.tensors)
    next(stream)
    assert len(os.listdir("/dev/fd")) == before + 1
    stream.close()
    assert len(os.listdir("/dev/fd")) == before
    list(iter_tensors(admitted.tensors))
    open_base(hub.base_path)
    assert len(os.listdir("/dev/fd")) == before
