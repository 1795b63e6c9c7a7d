import json
import os
from pathlib import Path

import numpy as np
import pytest
from hub_folders import Hub, write_safetensors

from ray_auditor.hub import Candidate, Refused, list_folder


def only(hub: Hub) -> Candidate | Refused:
    (found,) = list_folder(hub.root)
    return found


def test_every_folder_is_one_row_sorted_by_id(hub: Hub) -> None:
    hub.full("m2")
    hub.adapter("m1")
    (hub.root / "m3").mkdir()
    (hub.root / "README.md").write_text("stray")
    (hub.root / ".git").mkdir()
    rows = list(list_folder(hub.root))
    assert [row.id for row in rows] == ["m1", "m2", "m3"]
    assert [row.kind for row in rows[:2]] == ["adapter", "full"]
    assert rows[1].num_bytes == (hub.root / "m2/model.safetensors").stat().st_size
    assert isinstance(rows[2], Refused)
    assert rows[2].reason == "skipped:no_weights: no safetensors among 0 files"


def test_an_empty_folder_lists_nothing(hub: Hub) -> None:
    assert list(list_folder(hub.root)) == []


def test_a_missing_folder_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"candidates\.path must be a folder .* got '.*/nowhere'"):
        list_folder(tmp_path / "nowhere")  # before the first row is asked for


def test_a_finetune_given_as_the_folder_is_told_so(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"candidates\.path .* is a finetune itself"):
        list_folder(hub.full())


@pytest.mark.parametrize(
    "name",
    [
        "g\u043eod",
        "a" * 129,
        "..a",
        "a..b",
        "new\nline",
        "<script>",
        "[red]",
        "\x1b[31m",
        "=cmd",
        "-rf",
        "a b",
        "é",
    ],
)
def test_A23_hostile_id(hub: Hub, name: str) -> None:
    hub.full("fine")
    (hub.root / name).mkdir()
    rows = {type(row): row for row in list_folder(hub.root)}
    refused = rows[Refused]
    assert refused.reason.startswith("rejected:id:")
    assert refused.id.isascii()
    assert refused.id.isprintable()
    assert refused.reason.isascii()
    assert rows[Candidate].id == "fine"


def test_A16_file_link_out_of_the_folder(hub: Hub) -> None:
    folder = hub.full()
    secret = write_safetensors(hub.root.parent / "secret.safetensors", {"x": np.zeros(1)})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)
    assert only(hub).reason.startswith("rejected:symlink_escape:")


def test_A16_link_to_another_candidate(hub: Hub) -> None:
    target = hub.full("m1")
    folder = hub.full("m2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target / "model.safetensors")
    rows = {row.id: row for row in list_folder(hub.root)}
    assert isinstance(rows["m1"], Candidate)
    assert rows["m2"].reason.startswith("rejected:symlink_escape:")


def test_A16_folder_link_out_of_the_folder(hub: Hub) -> None:
    outside = hub.full()
    outside = outside.rename(hub.root.parent / "outside")
    (hub.root / "m1").symlink_to(outside, target_is_directory=True)
    assert only(hub).reason.startswith("rejected:symlink_escape:")


def test_A16_the_hub_cache_layout_is_followed(hub: Hub) -> None:
    folder = hub.full()
    snapshot = hub.root.parent / "models--org--name/snapshots/abc"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"hash-{file.name}")
        file.symlink_to(f"../../blobs/hash-{file.name}")
    hub.root = snapshot.parent
    assert hub.admit().tensors
    # ... but a blob that is itself a link is not a blob
    (blobs / "hash-model.safetensors").rename(hub.base_path / "elsewhere")
    (blobs / "hash-model.safetensors").symlink_to(hub.base_path / "elsewhere")
    assert only(hub).reason.startswith("rejected:symlink_escape:")


def test_a_link_within_the_folder_is_followed(hub: Hub) -> None:
    folder = hub.full()
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    assert hub.admit().tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt", "x.ckpt"])
def test_B1_only_pickles(hub: Hub, name: str, audit_events) -> None:
    folder = hub.root / "m1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    events = audit_events()
    found = only(hub)
    assert found.status == "skipped"
    assert found.reason.startswith(f"skipped:pickle_only: {name}")
    assert not [args for event, args in events if event in ("open", "pickle.find_class")]


def test_B11_gguf(hub: Hub) -> None:
    (hub.root / "m1").mkdir()
    (hub.root / "m1/model.Q4_K_M.gguf").write_bytes(b"GGUF")
    assert only(hub).reason.startswith("skipped:quantized: model.Q4_K_M.gguf")


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_B25_lfs_pointer(hub: Hub, kind: str) -> None:
    folder = getattr(hub, kind)()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    next(folder.glob("*.safetensors")).write_text(pointer)
    found = only(hub)
    assert found.status == "deferred"
    assert found.reason.startswith("deferred:lfs_pointer:")


def test_B26_ids_that_differ_in_case_only(hub: Hub) -> None:
    for name in ("Model", "model", "other"):
        hub.full(name)
    rows = {row.id: row for row in list_folder(hub.root)}
    assert rows["Model"].reason.startswith("rejected:duplicate_name:")
    assert rows["model"].reason.startswith("rejected:duplicate_name:")
    assert isinstance(rows["other"], Candidate)


def test_B26_files_that_differ_in_case_only(hub: Hub) -> None:
    (hub.full() / "Model.safetensors").write_bytes(b"")
    assert only(hub).reason.startswith("rejected:duplicate_name:")


def test_a_fifo_is_no_weights_file_and_does_not_block(hub: Hub) -> None:
    folder = hub.full()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert only(hub).reason.startswith("rejected:not_a_file:")


def test_adapter_and_full_weights_in_one_folder(hub: Hub) -> None:
    folder = hub.full()
    (folder / "adapter_config.json").write_text(json.dumps({}))
    write_safetensors(folder / "adapter_model.safetensors", {"x": np.zeros(1)})
    assert only(hub).reason.startswith("rejected:ambiguous_weights:")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_deferred(hub: Hub) -> None:
    hub.full().chmod(0)
    assert only(hub).reason.startswith("deferred:unreadable:")


def test_too_many_files(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_auditor.hub.folder.MAX_FILES", 3)
    folder = hub.full()
    for i in range(4):
        (folder / f"{i}.txt").touch()
    assert only(hub).reason.startswith("rejected:too_many_files:")


def test_a_dangling_link_is_not_lost(hub: Hub) -> None:
    (hub.root / "m1").symlink_to("gone")
    (hub.root / "m2").symlink_to("/nonexistent/gone")
    rows = list(list_folder(hub.root))
    assert [(row.id, row.reason.split(":")[1]) for row in rows] == [
        ("m1", "unreadable"),
        ("m2", "symlink_escape"),
    ]
