import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hub_folders import write_raw, write_safetensors
from safetensors import SafetensorError, safe_open

from ray_auditor.hub import CandidateError
from ray_auditor.hub.checkpoint import read_header


def refusal(path: Path) -> CandidateError:
    with pytest.raises(CandidateError) as caught:
        read_header(path)
    return caught.value


def rust_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_slice(name).get_shape()
    except SafetensorError:
        return False
    return True


def entry(start: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def test_a_sound_file_is_read_as_rust_reads_it(tmp_path: Path) -> None:
    tensors = {
        "b.weight": np.zeros((2, 3)),
        "a": ("F16", np.zeros((4,))),
        "scalar": np.zeros(()),
        "empty": np.zeros((0, 5)),
    }
    specs = read_header(write_safetensors(tmp_path / "x.safetensors", tensors))
    assert {name: (spec.dtype, spec.shape) for name, spec in specs.items()} == {
        "b.weight": ("F32", (2, 3)),
        "a": ("F16", (4,)),
        "scalar": ("F32", ()),
        "empty": ("F32", (0, 5)),
    }
    spec = specs["a"]
    assert spec.end - spec.start == 8
    assert (
        spec.file.num_bytes
        == (tmp_path / "x.safetensors").stat().st_size
        == max(s.end for s in specs.values())
    )


MALFORMED: dict[str, tuple[object, int, str]] = {
    # name: header, bytes after it, code
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "safetensors:overlap"),
    "same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "safetensors:overlap"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "safetensors:hole"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "safetensors:hole"),
    "trailing bytes": ({"a": entry(0, 8)}, 9, "safetensors:length"),
    "truncated body": ({"a": entry(0, 8)}, 7, "safetensors:length"),
    "bytes of no tensor": ({}, 8, "safetensors:length"),
    "duplicate key": (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), 8, "safetensors:json"),
    "duplicate key, other offsets": (
        b'{"a":%b,"a":%b}' % (json.dumps(entry(0, 4)).encode(), json.dumps(entry(4, 8)).encode()),
        8,
        "safetensors:json",
    ),
    "duplicate inner field": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "safetensors:json",
    ),
    "shape overflow": ({"a": entry(0, 8, [1 << 32, 1 << 32, 1 << 32])}, 8, "safetensors:size"),
    "huge empty shape": ({"a": entry(0, 0, [0, 1 << 62])}, 0, "safetensors:shape"),
    "negative shape": ({"a": entry(0, 8, [-2])}, 8, "safetensors:shape"),
    "float shape": ({"a": entry(0, 8, [2.0])}, 8, "safetensors:shape"),
    "bool shape": ({"a": entry(0, 4, [True])}, 4, "safetensors:shape"),
    "rank 9": ({"a": entry(0, 4, [1] * 9)}, 4, "safetensors:shape"),
    "shape of no list": ({"a": entry(0, 8, 2)}, 8, "safetensors:shape"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F128")}, 8, "safetensors:dtype"),
    "dtype of no string": ({"a": entry(0, 8, dtype=32)}, 8, "safetensors:dtype"),
    "dtype lie": ({"a": entry(0, 8, [2], "F64")}, 8, "safetensors:size"),
    "odd F4": ({"a": entry(0, 1, [1], "F4")}, 1, "safetensors:size"),
    "offsets reversed": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        8,
        "safetensors:offsets",
    ),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        8,
        "safetensors:offsets",
    ),
    "negative offset": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        8,
        "safetensors:offsets",
    ),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "safetensors:fields"),
    "further field": ({"a": entry(0, 8) | {"strides": [1]}}, 8, "safetensors:fields"),
    "tensor of no object": ({"a": 1}, 0, "safetensors:fields"),
    "nested metadata": ({"__metadata__": {"a": {"b": "c"}}}, 0, "safetensors:metadata"),
    "leading whitespace": (b" {}", 0, "safetensors:json"),
    "two objects": (b"{}{}", 0, "safetensors:json"),
    "array": (b"[]", 0, "safetensors:json"),
    "NaN": (b'{"a":NaN}', 0, "safetensors:json"),
    "bad UTF-8": (b'{"\xff":1}', 0, "safetensors:json"),
    "lone surrogate": (b'{"__metadata__":{"a":"\\ud800"}}', 0, "safetensors:json"),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "safetensors:json"),
    "nesting without end": (b'{"a":' + b"[" * 400_000, 0, "safetensors:json"),
    "huge integer": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%b]}}' % (b"9" * 9999),
        4,
        "safetensors:json",
    ),
    "names in two cases": ({"a.w": entry(0, 4), "a.W": entry(4, 8)}, 8, "duplicate_name"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_B3_malformed(tmp_path: Path, case: str) -> None:
    header, num_body_bytes, code = MALFORMED[case]
    error = refusal(write_raw(tmp_path / "x.safetensors", header, bytes(num_body_bytes)))
    assert (error.status, error.code) == ("rejected", code)


def test_B4_header_past_the_limit(tmp_path: Path) -> None:
    error = refusal(write_raw(tmp_path / "x.safetensors", b"{}", length=99 << 20))
    assert error.reason.startswith(
        "rejected:header_limits: x.safetensors: the header must be at most 33554432 bytes"
    )


def test_B4_two_hundred_thousand_tensors(tmp_path: Path) -> None:
    header = {f"t{i}": entry(0, 0, [0]) for i in range(200_000)}
    path = write_raw(tmp_path / "x.safetensors", header)
    assert rust_accepts(path)
    start = time.process_time()
    assert refusal(path).code == "header_limits"
    assert time.process_time() - start < 1


@pytest.mark.parametrize("item", [b"[],", b"{},", b"0,", b'"",', b"[[", b"1e9,"])
def test_B4_a_full_header_of_small_items_costs_little(tmp_path: Path, item: bytes) -> None:
    count = (31 << 20) // len(item)
    path = write_raw(tmp_path / "x.safetensors", b'{"a":[' + item * count + b"0]}")
    start = time.process_time()
    tracemalloc.start()
    try:
        assert refusal(path).code == ("header_limits" if b'"' in item else "safetensors:json")
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1


def test_B4_more_metadata_than_any_model_has(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    notes = {"training": json.dumps({f"tag{i}": i for i in range(20_000)})}  # as trainers really write
    assert read_header(write_raw(path, {"__metadata__": notes})) == {}
    many = {f"{i:08}": "v" for i in range(100_000)}
    error = refusal(write_raw(path, {"__metadata__": many}))
    assert error.reason.startswith("rejected:header_limits: x.safetensors: more metadata")


def test_fifty_thousand_tensors_are_read_in_time(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path / "x.safetensors", {f"model.layers.{i}.w": entry(0, 0, [0]) for i in range(50_000)}
    )
    start = time.process_time()
    assert len(read_header(path)) == 50_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["../x", "a/b", "a\x00b", "x" * 1_000_000, "", "é", ".hidden", "a b", "<b>"])
def test_B5_tensor_name(tmp_path: Path, name: str) -> None:
    error = refusal(write_raw(tmp_path / "x.safetensors", {name: entry(0, 4)}, bytes(4)))
    assert error.code == "tensor_name"
    assert len(str(error)) < 500
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (0).to_bytes(8, "little"), (2).to_bytes(8, "little"), b"\xff" * 8]
)
def test_B24_too_short(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert refusal(path).code in ("safetensors:too_short", "safetensors:json", "header_limits")
    assert not rust_accepts(path)


def test_a_header_only_file_without_tensors_is_empty(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "x.safetensors", b"{}      ")) == {}


def test_rust_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ours would let through, the second parser still refuses."""
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 8)}, bytes(9))
    assert not rust_accepts(path)
    sound = {"a": object()}
    monkeypatch.setattr("ray_auditor.hub.header.parse_header", lambda raw, file: sound)
    monkeypatch.setitem(sound, "a", type("Spec", (), {"dtype": "F32", "shape": (2,)})())
    assert refusal(path).code == "safetensors:disagreement"
    assert refusal(write_raw(path, {"b": entry(0, 8)}, bytes(8))).text.endswith("other tensors: ['a', 'b']")
