import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import transformers
from hub_folders import CONFIG, NUM_LAYERS, Hub, model_tensors, write_safetensors

from ray_auditor.hub import CandidateError, admit, list_folder, open_base
from ray_auditor.hub.checkpoint import iter_tensors
from ray_auditor.hub.folder import read_exactly
from ray_auditor.hub.model_config import check_bounds, computation_fields, find_differences

INDEX = "model.safetensors.index.json"


def shard(folder: Path, tensors: dict | None = None) -> dict[str, str]:
    """Split a folder's weights over two shards with an index."""
    tensors = model_tensors(1) if tensors is None else tensors
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def test_what_is_admitted_is_what_the_audit_reads(hub: Hub) -> None:
    hub.full()
    admitted = hub.admit()
    assert set(admitted.tensors) == {
        name for name in model_tensors() if "layers.2" not in name and name != "model.norm.weight"
    }
    assert list(admitted.tensors) == sorted(admitted.tensors)
    assert admitted.lora is None
    assert admitted.notes == ()


def test_A17_A18_the_same_bytes_are_the_same_content(hub: Hub) -> None:
    hub.full("m1")
    shard(hub.full("m2"))  # sharding does not count
    deeper = model_tensors(1) | {"model.layers.2.mlp.up_proj.weight": np.zeros((12, 8), np.float32)}
    hub.full("m3", deeper)  # nor does what lies above the hook
    other = model_tensors(1)
    other["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    hub.full("m4", other)
    hub.full("m5", {name: ("F64", array) for name, array in model_tensors(1).items()})
    base = hub.base
    content = [
        admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16).content_sha256
        for found in list_folder(hub.root)
    ]
    assert content[0] == content[1] == content[2]
    assert len(set(content)) == 3


def test_C6_a_copy_of_the_base_is_told_apart(hub: Hub) -> None:
    hub.full(tensors=model_tensors(0))
    admitted = hub.admit()
    assert admitted.content_sha256 == hub.base.content_sha256
    assert admitted.notes == ("every tensor the audit reads is identical to the base's",)


def test_a_copy_is_known_by_its_tensors_in_whatever_files_they_lie(hub: Hub) -> None:
    """Other shards and order, more rows for a grown vocabulary, a head of its own, other layers above."""
    tensors = model_tensors(0)
    tensors["lm_head.weight"] = model_tensors(2)["model.embed_tokens.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"] + 1
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([embedding, embedding[:3]])
    shard(hub.full("a", tensors), dict(reversed(tensors.items())))
    hub.full("b", dict(reversed(tensors.items())))
    base = hub.base
    for found in list_folder(hub.root):
        admitted = admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)
        assert admitted.content_sha256 == base.content_sha256


def test_the_key_of_the_base_covers_weights_and_config(hub: Hub, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(hub.base_path, copy)
    assert open_base(copy, num_layers=NUM_LAYERS).key == hub.base.key
    assert open_base(copy).key != hub.base.key  # another depth reads other tensors
    (copy / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    other = open_base(copy, num_layers=NUM_LAYERS)
    assert other.content_sha256 == hub.base.content_sha256
    assert other.key != hub.base.key


def test_a_base_that_is_none_is_a_value_error(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base\.model must be a folder, got '.*/nowhere'"):
        open_base(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"the hook needs 4 layers and base\.model has 3"):
        open_base(hub.base_path, num_layers=4)
    (hub.base_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"base\.model '.*' cannot be the base: rejected:safetensors:too_short"
    ):
        open_base(hub.base_path)


def test_B2_pickles_and_code_beside_the_weights_are_noted(hub: Hub) -> None:
    folder = hub.full()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    assert hub.admit().notes == ("not used: modeling_evil.py, pytorch_model.bin",)


def test_B6_tensor_in_two_shards(hub: Hub) -> None:
    folder = hub.full()
    shard(folder)
    tensors = model_tensors(1)
    write_safetensors(folder / "model-00002-of-00002.safetensors", tensors)
    assert hub.refusal().code == "duplicate_tensor"


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_B6_missing_tensor(hub: Hub, name: str) -> None:
    tensors = model_tensors(1)
    del tensors[name]
    hub.full(tensors=tensors)
    assert hub.refusal().reason.startswith(f"rejected:missing_tensor: {name} ")


def test_B6_a_tensor_above_the_hook_may_be_missing(hub: Hub) -> None:
    tensors = {name: array for name, array in model_tensors(1).items() if "layers.2" not in name}
    del tensors["model.norm.weight"]
    hub.full(tensors=tensors)
    assert hub.admit().tensors


def test_B6_extra_tensors_are_noted_and_not_read(hub: Hub) -> None:
    extra = {"model.layers.0.evil.weight": np.zeros(3), "lm_head.weight": np.zeros((10, 8))}
    hub.full(tensors=model_tensors(1) | extra)
    admitted = hub.admit()
    assert admitted.notes == ("1 tensors the base does not have were not read: model.layers.0.evil.weight",)
    assert not extra.keys() & admitted.tensors.keys()


def test_B6_the_index_names_a_tensor_its_shard_lacks(hub: Hub) -> None:
    folder = hub.full()
    weight_map = shard(folder)
    write_index(folder, weight_map | {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"})
    assert hub.refusal().reason.startswith(
        "rejected:missing_tensor: the index puts model.embed_tokens.weight in"
    )


def test_B6_the_index_names_a_tensor_no_shard_has(hub: Hub) -> None:
    folder = hub.full()
    weight_map = shard(folder)
    write_index(folder, weight_map | {"model.layers.9.w": "model-00002-of-00002.safetensors"})
    assert hub.refusal().reason.startswith("rejected:missing_tensor: the index puts model.layers.9.w in")


def test_weights_that_change_while_they_are_hashed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that is still running must not be admitted under a hash of its halves."""
    weights = hub.full() / "model.safetensors"
    base = hub.base

    def read_and_touch(fd: int, start: int, num_bytes: int, name: str) -> bytes:
        os.utime(weights, ns=(0, 0))
        return read_exactly(fd, start, num_bytes, name)

    monkeypatch.setattr("ray_auditor.hub.content.read_exactly", read_and_touch)
    (found,) = list_folder(hub.root)
    with pytest.raises(CandidateError, match="rejected:changed: "):
        admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)


def test_wrong_shape(hub: Hub) -> None:
    hub.full(tensors=model_tensors(1) | {"model.layers.0.mlp.up_proj.weight": np.zeros((8, 12))})
    assert hub.refusal().reason == (
        "rejected:shape: model.layers.0.mlp.up_proj.weight must be [12, 8] as in the base, got [8, 12]"
    )


@pytest.mark.parametrize(
    "file",
    [
        "../../other/model.safetensors",
        "/etc/passwd",
        "a/../model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "model.safetensors\x00",
        "~/x.safetensors",
        "C:\\x.safetensors",
        "pytorch_model.bin",
    ],
)
def test_B7_index_traversal(hub: Hub, file: str, audit_events) -> None:
    folder = hub.full()
    weight_map = shard(folder)
    write_index(folder, weight_map | {"model.embed_tokens.weight": file})
    base = hub.base
    (found,) = list_folder(hub.root)
    events = audit_events()
    with pytest.raises(CandidateError) as caught:
        admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)
    assert caught.value.code == "path_traversal"
    assert {Path(str(args[0])).name for event, args in events if event == "open"} <= {"config.json", INDEX}


def test_B7_symlinked_shard(hub: Hub) -> None:
    folder = hub.full()
    weight_map = shard(folder)
    link = folder / "model-00009-of-00009.safetensors"
    target = hub.base_path / "model.safetensors"
    link.symlink_to(target)
    write_index(folder, weight_map | {"model.embed_tokens.weight": link.name})
    (found,) = list_folder(hub.root)
    assert found.reason.startswith("rejected:symlink_escape:")
    link.unlink()
    write_safetensors(link, {})
    (found,) = list_folder(hub.root)
    link.unlink()
    link.symlink_to(target)  # between listing and admission
    with pytest.raises(CandidateError, match="rejected:symlink_escape:"):
        admit(found, hub.base, num_layers=NUM_LAYERS, max_lora_rank=16)


@pytest.mark.parametrize(
    "weight_map", [None, [], "model.safetensors", {}, {"a": 1}, {"a": ["x.safetensors"]}]
)
def test_B8_index_without_a_weight_map(hub: Hub, weight_map: object) -> None:
    folder = hub.full()
    shard(folder)
    write_index(folder, weight_map)
    assert hub.refusal().code in ("json", "file_bounds")


def test_B8_index_of_one_gigabyte(hub: Hub) -> None:
    folder = hub.full()
    shard(folder)
    with open(folder / INDEX, "wb") as file:
        file.truncate(1 << 30)
    assert hub.refusal().reason == (
        f"rejected:file_bounds: {INDEX} must be at most 16777216 bytes, got 1073741824"
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_B9_missing_shard(hub: Hub, indexed: bool) -> None:
    folder = hub.full()
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    if not indexed:
        (folder / INDEX).unlink()
    assert hub.refusal().code == "missing_shard"


def test_shards_without_an_index_are_read(hub: Hub) -> None:
    folder = hub.full()
    shard(folder)
    (folder / INDEX).unlink()
    assert hub.admit().tensors


def test_an_index_beside_a_single_file_is_ambiguous(hub: Hub) -> None:
    folder = hub.full()
    shard(folder)
    write_safetensors(folder / "model.safetensors", model_tensors(2))
    assert hub.refusal().code == "ambiguous_weights"


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"load_in_4bit": True}},
        {"compression_config": {"format": "float-quantized"}},
    ],
)
def test_B11_quantised_by_its_config(hub: Hub, config: dict) -> None:
    hub.full(**config)
    assert hub.refusal().reason.startswith(f"skipped:quantized: config.json has {next(iter(config))}")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3"),
        ("model.layers.0.mlp.up_proj.qweight", "I32"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "F32"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "U8"),
    ],
)
def test_B11_quantised_by_its_tensors(hub: Hub, name: str, dtype: str) -> None:
    hub.full(tensors=model_tensors(1) | {name: (dtype, np.zeros((12, 8)))})
    assert hub.refusal().reason.startswith(f"skipped:quantized: {name} ({dtype})")


@pytest.mark.parametrize("dtype", ["I64", "U8"])
def test_integer_weights(hub: Hub, dtype: str) -> None:
    hub.full(tensors=model_tensors(1) | {"model.layers.0.mlp.up_proj.weight": (dtype, np.zeros((12, 8)))})
    assert hub.refusal().code == "dtype"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_B12_nonfinite_weights(hub: Hub, dtype: str, value: float) -> None:
    array = np.ones((12, 8), dtype=np.float32)
    array[11, 7] = value
    raw = (array.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else array
    hub.full(tensors=model_tensors(1) | {"model.layers.1.mlp.up_proj.weight": (dtype, raw)})
    error = hub.refusal()
    assert error.code == "nonfinite_weights"
    assert error.text == "model.layers.1.mlp.up_proj.weight holds 1 values that are NaN or infinite"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_B12_the_largest_finite_weights_pass(hub: Hub, dtype: str) -> None:
    array = np.full((12, 8), 65504.0, dtype=np.float32)
    raw = np.full((12, 8), 0x7F7F, dtype=np.uint16) if dtype == "BF16" else array
    hub.full(tensors=model_tensors(1) | {"model.layers.1.mlp.up_proj.weight": (dtype, raw)})
    assert hub.admit().tensors["model.layers.1.mlp.up_proj.weight"].dtype == dtype


def test_B12_nonfinite_above_the_hook_does_not_count(hub: Hub) -> None:
    hub.full(tensors=model_tensors(1) | {"model.layers.2.mlp.up_proj.weight": np.full((12, 8), np.nan)})
    assert hub.admit().tensors


@pytest.mark.parametrize("rows", [11, 20])
def test_B14_more_rows_are_cut_to_the_base(hub: Hub, rows: int) -> None:
    name = "model.embed_tokens.weight"
    grown = np.random.default_rng(5).standard_normal((rows, 8), dtype=np.float32)
    grown[10:] = np.nan  # never looked up, so never read
    hub.full(tensors=model_tensors(1) | {name: grown}, vocab_size=rows)
    admitted = hub.admit()
    assert admitted.notes == (f"{name} has {rows} rows; the base's 10 are read",)
    ((_, read),) = iter_tensors(admitted.tensors, [name])
    np.testing.assert_array_equal(read.numpy(), grown[:10])


def test_B14_fewer_rows(hub: Hub) -> None:
    hub.full(tensors=model_tensors(1) | {"model.embed_tokens.weight": np.zeros((9, 8))}, vocab_size=9)
    assert hub.refusal().reason == "rejected:vocab: model.embed_tokens.weight has 9 rows, the base's has 10"


def test_B14_an_untied_head_is_above_the_hook(hub: Hub) -> None:
    hub.full(tensors=model_tensors(1) | {"lm_head.weight": np.zeros((10, 8))}, tie_word_embeddings=False)
    assert hub.admit().notes == ("tie_word_embeddings differs; the head lies above the hook",)


def test_B16_no_config(hub: Hub) -> None:
    (hub.full() / "config.json").unlink()
    assert hub.refusal().reason == "rejected:arch_mismatch: there is no config.json"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["Qwen2ForCausalLM"]),
        ("model_type", "mistral"),
        ("hidden_size", 16),
        ("intermediate_size", 16),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 8),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-6),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 16),
        ("layer_types", ["full_attention"] * 2 + ["sliding_attention"]),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 64),
        ("num_experts", 8),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 100000.0, "rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
    ],
)
def test_B16_another_computation(hub: Hub, field: str, value: object) -> None:
    drop = "rope_parameters" if field == "rope_scaling" else ""
    hub.full(drop=drop, **{field: value})
    error = hub.refusal()
    assert error.code == "arch_mismatch"
    assert ("rope " if "rope" in field else f"{field} {value}") in error.text
    assert "(base: " in error.text


@pytest.mark.parametrize("field", ["architectures", "model_type"])
@pytest.mark.parametrize("value", [None, [], "../x", ["A", "B"], [1], 3, ["<script>"]])
def test_B16_unnamed_architecture(hub: Hub, field: str, value: object) -> None:
    hub.full(**{field: value})
    assert hub.refusal().code == "arch_mismatch"


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "bfloat16", "torch_dtype": "float16", "transformers_version": "4.40.0", "use_cache": False},
        {"rms_norm_eps": 1e-05},
        {"drop": "head_dim"},
        {"drop": "attention_bias"},
        {"drop": "rope_parameters", "rope_theta": 100000, "rope_scaling": None},
        {"max_position_embeddings": 128},
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
        {"bos_token_id": 7, "eos_token_id": [1, 2], "_name_or_path": "../../secret"},
    ],
)
def test_other_spellings_of_the_same_computation(hub: Hub, config: dict) -> None:
    hub.full(**config)
    assert hub.admit().notes == ()


def test_the_length_counts_where_rope_depends_on_it() -> None:
    yarn = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "yarn", "factor": 2.0}}
    different, _ = find_differences(CONFIG | yarn, CONFIG | yarn | {"max_position_embeddings": 128})
    assert different == ["max_position_embeddings 128 (base: 64)"]


def test_layer_types_of_older_configs() -> None:
    gemma = CONFIG | {"model_type": "gemma2", "sliding_window": 16}
    alternating = ["sliding_attention", "full_attention", "sliding_attention"]
    assert find_differences(gemma | {"layer_types": alternating}, gemma) == ([], [])
    qwen = CONFIG | {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 99,
        "max_window_layers": 2,
    }
    newer = CONFIG | {"model_type": "qwen2", "sliding_window": None, "layer_types": ["full_attention"] * 3}
    assert find_differences(qwen, newer) == ([], [])
    assert find_differences(qwen | {"use_sliding_window": True}, newer)[0]


@pytest.mark.parametrize(
    "family",
    [
        "LlamaConfig",
        "MistralConfig",
        "Qwen2Config",
        "Qwen3Config",
        "GemmaConfig",
        "Gemma2Config",
        "Gemma3TextConfig",
    ],
)
def test_configs_of_the_supported_families_are_within_bounds(family: str) -> None:
    config = getattr(transformers, family)(architectures=["X"])
    config = json.loads(config.to_json_string(use_diff=False))
    check_bounds(config)
    assert find_differences(config, config) == ([], [])
    assert computation_fields(config)["rope"]
    assert find_differences(config, config | {"hidden_act": "relu", "hidden_activation": "relu"})[0]


BOMBS = [
    (field, value)
    for field in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
    )
    for value in (10**9, 10**12, 0, -1, 2.0, "8", True, [8], float("inf"))
]


@pytest.mark.parametrize(("field", "value"), BOMBS)
def test_B17_config_bomb(hub: Hub, field: str, value: object) -> None:
    folder = hub.full()
    raw = json.dumps(CONFIG | {field: value}).replace("Infinity", "1e400")
    (folder / "config.json").write_text(raw)
    base = hub.base
    (found,) = list_folder(hub.root)
    start = time.process_time()
    with pytest.raises(CandidateError) as caught:
        admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)
    assert time.process_time() - start < 0.05
    assert caught.value.reason.startswith(f"rejected:config_bounds: {field} must be an integer in [1, ")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_B17_missing_size(hub: Hub, field: str) -> None:
    hub.full(drop=field)
    assert hub.refusal().code == "config_bounds"


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e30}},
        {"rope_scaling": {"rope_type": "linear", "factor": -1.0}},
        {"rope_scaling": {"type": "evil"}},
        {"rope_scaling": {"type": ["linear"]}},
        {"rope_scaling": [1, 2]},
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 5000}},
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, 0.0]}},
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, "x"]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 0}}},
        {"rope_theta": 0},
        {"rope_theta": "1e5"},
        {"max_position_embeddings": 10**12},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 64.0},
    ],
)
def test_B18_rope(hub: Hub, config: dict) -> None:
    hub.full(**config)
    error = hub.refusal()
    assert (error.status, error.code) == ("rejected", "config_rope")
    assert next(iter(config)) in error.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_types", ["full_attention"] * 1_000),
        ("layer_types", "full_attention"),
        ("layer_types", [1, 2, 3]),
        ("sliding_window", -1),
        ("sliding_window", 2**40),
        ("num_experts", 10**6),
        ("num_experts_per_tok", -2),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", 2),
        ("rms_norm_eps", "small"),
        ("head_dim", 1 << 20),
    ],
)
def test_B19_absurd_field(hub: Hub, field: str, value: object) -> None:
    hub.full(**{field: value})
    assert hub.refusal().reason.startswith(f"rejected:config_bounds: {field} must be ")


def test_B20_remote_code_is_noted_and_never_run(hub: Hub, tmp_path: Path) -> None:
    folder = hub.full(
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, trust_remote_code=True, _target_="os.x"
    )
    canary = tmp_path / "owned"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    assert hub.admit().notes == ("not used: auto_map, trust_remote_code, _target_, modeling_evil.py",)
    assert not canary.exists()


def test_an_error_travels_between_processes_and_prints_plainly() -> None:
    error = CandidateError("rejected", "shape", "a\x1b[31m\n\u202e" + "x" * 10_000)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.code, copy.text) == (error.status, error.code, error.text)
    assert str(copy) == copy.reason == error.reason
    assert copy.reason.startswith("rejected:shape: a\\x1b[31m\\x0a\\u202ex")
    assert len(copy.reason) < 450
    assert copy.reason.isascii()
    assert copy.reason.isprintable()
