"""Mutated headers, indexes and configs: refused in our words, never accepted where Rust refuses."""

import json
import random
from pathlib import Path

import pytest
from hub_folders import (
    ADAPTER_CONFIG,
    CONFIG,
    NUM_LAYERS,
    Hub,
    adapter_tensors,
    model_tensors,
    write_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from ray_auditor.hub import BaseModel, Candidate, CandidateError, WeightFile, admit, open_base
from ray_auditor.hub.header import parse_header

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1, 2, 10**9, 1 << 62, "", "../x", "\ud800", "linear", "all-linear", "LORA"]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OFFSETS = st.integers(-1, 24) | st.sampled_from([2**32, 2**63, 2**64])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "F4", "F64", "BOOL", "nope"]),
        "shape": st.lists(OFFSETS, max_size=3),
        "data_offsets": st.lists(OFFSETS, min_size=1, max_size=3),
    }
)
NAMES = st.sampled_from(["a", "b", "A", "model.layers.0.w", "../x", "", "é", "__metadata__"])
SOUND = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
).encode()


def rust_accepts(header: bytes, num_body_bytes: int) -> bool:
    try:
        deserialize(len(header).to_bytes(8, "little") + header + bytes(num_body_bytes))
    except SafetensorError:
        return False
    return True


def ours_accepts(header: bytes, num_body_bytes: int) -> bool:
    try:
        parse_header(header, WeightFile(Path("x.safetensors"), 8 + len(header) + num_body_bytes, 0, 0))
    except CandidateError:
        return False
    return True


def mutate(raw: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    mutated = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(mutated))
        piece = rng.choice(
            [
                b"",
                b"0",
                b"9",
                b"-",
                b"{",
                b"}",
                b"[",
                b"]",
                b'"',
                b",",
                b" ",
                b"\xff",
                b"1e9",
                b"NaN",
                b"null",
                bytes([rng.randrange(256)]),
                raw[: rng.randrange(len(raw))],
            ]
        )
        mutated[at : at + rng.choice([0, 1, 1, 5])] = piece
    return bytes(mutated)


def test_the_two_parsers_agree_on_the_sound_one() -> None:
    assert rust_accepts(SOUND, 24)
    assert ours_accepts(SOUND, 24)


@FUZZ
@given(st.integers(), st.sampled_from([0, 16, 23, 24, 25, 32]))
def test_B3_mutated_headers(seed: int, num_body_bytes: int) -> None:
    header = mutate(SOUND, seed)
    if ours_accepts(header, num_body_bytes):
        assert rust_accepts(header, num_body_bytes)


@FUZZ
@given(st.dictionaries(NAMES, ENTRY | JSON, max_size=3), st.integers(0, 32))
def test_B3_generated_headers(header: dict, num_body_bytes: int) -> None:
    raw = json.dumps(header).encode()
    if ours_accepts(raw, num_body_bytes):
        assert rust_accepts(raw, num_body_bytes)


def test_B3_both_outcomes_occur() -> None:
    """A fuzz in which nothing is accepted would show nothing."""
    outcomes = [ours_accepts(mutate(SOUND, seed), 24) for seed in range(2_000)]
    assert 20 < sum(outcomes) < 1_900


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Hub, BaseModel, Candidate, Candidate]:
    hub = Hub(tmp_path_factory.mktemp("fuzz"))
    full, lora = hub.full("full"), hub.adapter("lora")
    base = open_base(hub.base_path, num_layers=NUM_LAYERS)
    return hub, base, Candidate("full", full, "full", 1), Candidate("lora", lora, "adapter", 1)


def admits(candidate: Candidate, base: BaseModel) -> bool:
    reason = ""
    try:
        admit(candidate, base, num_layers=NUM_LAYERS, max_lora_rank=16)
    except CandidateError as error:
        reason = error.reason
    assert reason.isascii()
    assert not reason or reason.isprintable()
    return not reason


@FUZZ
@given(
    st.dictionaries(st.sampled_from(sorted(CONFIG)) | st.text(max_size=8), JSON, max_size=4), st.integers()
)
def test_any_config_is_admitted_or_refused(fuzzed, changes: dict, seed: int) -> None:
    _, base, full, _ = fuzzed
    raw = json.dumps(CONFIG | changes).encode()
    (full.path / "config.json").write_bytes(raw if seed % 2 else mutate(raw, seed))
    admits(full, base)
    (full.path / "config.json").write_text(json.dumps(CONFIG))
    assert admits(full, base)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "long_factor", "full_attention"]),
        JSON,
        max_size=4,
    ),
    st.sampled_from(["rope_parameters", "rope_scaling"]),
)
def test_B18_any_rope_is_admitted_or_refused(fuzzed, rope: dict, field: str) -> None:
    _, base, full, _ = fuzzed
    (full.path / "config.json").write_text(json.dumps(CONFIG | {field: rope}))
    admits(full, base)
    (full.path / "config.json").write_text(json.dumps(CONFIG))
    assert admits(full, base)


@FUZZ
@given(
    st.dictionaries(st.sampled_from(sorted(ADAPTER_CONFIG)) | st.text(max_size=8), JSON, max_size=4),
    st.integers(),
)
def test_any_adapter_config_is_admitted_or_refused(fuzzed, changes: dict, seed: int) -> None:
    _, base, _, lora = fuzzed
    raw = json.dumps(ADAPTER_CONFIG | changes).encode()
    (lora.path / "adapter_config.json").write_bytes(raw if seed % 2 else mutate(raw, seed))
    admits(lora, base)
    (lora.path / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    assert admits(lora, base)


@FUZZ
@given(st.integers())
def test_any_weights_file_is_admitted_or_refused(fuzzed, seed: int) -> None:
    _, base, full, lora = fuzzed
    for candidate, name, tensors in (
        (full, "model.safetensors", model_tensors(1)),
        (lora, "adapter_model.safetensors", adapter_tensors(1)),
    ):
        path = candidate.path / name
        sound = write_safetensors(path, tensors).read_bytes()
        header_end = 8 + int.from_bytes(sound[:8], "little")
        path.write_bytes(mutate(sound[:header_end], seed) + sound[header_end:])
        admits(candidate, base)
        path.write_bytes(sound)
    assert admits(full, base)
    assert admits(lora, base)


@FUZZ
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=3) | JSON, st.integers())
def test_B8_any_index_is_refused_or_admitted(fuzzed, weight_map: object, seed: int) -> None:
    _, base, full, _ = fuzzed
    index = full.path / "model.safetensors.index.json"
    sound = {"weight_map": dict.fromkeys(model_tensors(), "model.safetensors")}
    raw = json.dumps({"weight_map": weight_map} if seed % 2 else sound).encode()
    index.write_bytes(mutate(raw, seed))
    admits(full, base)
    index.write_text(json.dumps(sound))
    assert admits(full, base)
    index.unlink()
