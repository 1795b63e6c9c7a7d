import math
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hub_folders import CONFIG, NUM_LAYERS, Hub, adapter_tensors, model_tensors

from ray_auditor.hub import CandidateError, LoraModule, admit, list_folder

Q = "model.layers.0.self_attn.q_proj"


def test_what_is_admitted_is_what_the_engine_needs(hub: Hub) -> None:
    hub.adapter()
    admitted = hub.admit()
    assert admitted.lora is not None
    assert admitted.lora.rank == 2
    assert admitted.declared_base == "org/base"
    assert admitted.lora.modules[Q] == LoraModule(
        2, 4.0, f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
    )
    assert sorted(admitted.lora.modules) == [
        f"model.layers.{i}.self_attn.{name}" for i in range(NUM_LAYERS) for name in ("q_proj", "v_proj")
    ]
    assert admitted.tensors.keys() == {
        name for module in admitted.lora.modules.values() for name in (module.lora_A, module.lora_B)
    }
    assert admitted.notes == ()


def test_A18_content_is_what_is_computed(hub: Hub) -> None:
    hub.adapter("same", tensors=adapter_tensors(1))
    hub.adapter("same-again", lora_dropout=0.1, base_model_name_or_path="elsewhere")
    hub.adapter("same-below", tensors=adapter_tensors(1, layers=2))
    hub.adapter("same-scaling", lora_alpha=4 * math.sqrt(2), use_rslora=True)
    hub.adapter("other-alpha", lora_alpha=16)
    hub.adapter("other-bytes", tensors=adapter_tensors(2))
    base = hub.base
    content = {
        found.id: admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16).content_sha256
        for found in list_folder(hub.root)
    }
    same = {value for name, value in content.items() if name.startswith("same")}
    assert len(same) == 1
    assert len(set(content.values())) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 7}},
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 1},
            "alpha_pattern": {Q: 5.5, "self_attn.q_proj": 2},
        },
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"mlp.up_proj": 4}},
    ],
)
def test_scalings_and_ranks_are_those_of_peft(hub: Hub, tmp_path: Path, settings: dict) -> None:
    """An adapter that peft itself wrote, against the numbers peft itself uses."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")}
    )
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(
        r=2, lora_alpha=3, task_type="CAUSAL_LM", init_lora_weights=False,
        **({"target_modules": ["q_proj", "v_proj"]} | settings),
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, lora)
    wrapped.save_pretrained(hub.root / "m1")
    admitted = hub.admit()
    assert admitted.lora is not None
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A") and isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    below = {name: value for name, value in expected.items() if "layers.2" not in name}
    assert {name: (m.rank, m.scaling) for name, m in admitted.lora.modules.items()} == below
    assert len(below) in (4, 14)


def test_wrong_base_of_another_width(hub: Hub) -> None:
    tensors = adapter_tensors(1)
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name] = np.zeros((2, 16))
    hub.adapter(tensors=tensors)
    assert hub.refusal().reason == f"rejected:wrong_base: {Q} is [8, 16] in the adapter, [8, 8] in the base"


def test_wrong_base_of_other_modules(hub: Hub) -> None:
    tensors = {name.replace("q_proj", "query_key_value"): array for name, array in adapter_tensors(1).items()}
    hub.adapter(tensors=tensors, target_modules=["query_key_value", "v_proj"])
    assert hub.refusal().reason == (
        "rejected:wrong_base: the base has no linear module model.layers.0.self_attn.query_key_value"
    )


def test_wrong_base_of_another_depth(hub: Hub) -> None:
    hub.adapter(tensors=adapter_tensors(1, layers=4))
    assert hub.refusal().text.endswith("no linear module model.layers.3.self_attn.q_proj (it has 3 layers)")


def test_an_adapter_above_the_hook_only_says_so(hub: Hub) -> None:
    tensors = {name: array for name, array in adapter_tensors(1).items() if "layers.2" in name}
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 8))
    tensors["base_model.model.lm_head.lora_B.weight"] = np.zeros((10, 2))
    tensors["base_model.model.lm_head.weight"] = np.zeros((10, 8))
    hub.adapter(tensors=tensors, target_modules=["q_proj", "v_proj", "lm_head"])
    admitted = hub.admit()
    assert admitted.lora is not None
    assert (admitted.lora.rank, admitted.lora.modules, admitted.tensors) == (0, {}, {})
    assert admitted.notes == (
        "1 tensors above the hook were not read: base_model.model.lm_head.weight",
        "the adapter changes nothing at or below the hook: its rows are the base's",
    )


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_that_multiplies_to_nothing_is_the_base(hub: Hub, side: str) -> None:
    tensors = adapter_tensors(1)
    for name, array in tensors.items():
        if f"lora_{side}" in name:
            array[:] = 0
    hub.adapter(tensors=tensors)
    admitted = hub.admit()
    assert admitted.content_sha256 == hub.base.content_sha256
    assert "the adapter changes nothing at or below the hook: its rows are the base's" in admitted.notes


def test_one_value_that_is_not_zero_makes_an_adapter_a_candidate(hub: Hub) -> None:
    tensors = {name: 0 * array for name, array in adapter_tensors(1).items()}
    tensors[f"base_model.model.{Q}.lora_A.weight"][1, 7] = 1e-30
    tensors[f"base_model.model.{Q}.lora_B.weight"][7, 1] = 1e-30
    hub.adapter(tensors=tensors)
    assert hub.admit().content_sha256 != hub.base.content_sha256


def test_B2_a_pickle_beside_an_adapter_is_noted(hub: Hub) -> None:
    (hub.adapter() / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert hub.admit().notes == ("not used: training_args.bin",)


def test_B12_nonfinite_weights(hub: Hub) -> None:
    tensors = adapter_tensors(1)
    tensors[f"base_model.model.{Q}.lora_B.weight"][3, 1] = np.nan
    hub.adapter(tensors=tensors)
    assert hub.refusal().code == "nonfinite_weights"


@pytest.mark.parametrize(
    "declared",
    ["../../etc", "/root/model", "https://example.org/m", "org/private", "x\x1b[31m\n" + "y" * 9999, None, 3],
)
def test_C1_the_declared_base_is_a_claim(hub: Hub, declared: object, audit_events) -> None:
    hub.adapter(base_model_name_or_path=declared)
    base = hub.base
    (found,) = list_folder(hub.root)
    events = audit_events()
    named = admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16).declared_base
    assert {Path(str(args[0])).parent for event, args in events if event == "open"} == {found.path}
    if isinstance(declared, str):
        assert named is not None
        assert named.isprintable()
        assert named.startswith(declared[:1])
        assert len(named) <= 200
    else:
        assert named is None


@pytest.mark.parametrize("rank", [0, -1, 3, 100_000, 2.0, "2", True, None, float("inf")])
def test_C7_rank_out_of_bounds(hub: Hub, rank: object) -> None:
    folder = hub.adapter(r=rank)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("Infinity", "1e400"))
    assert hub.refusal().code == "lora_bounds"


def test_C7_rank_above_the_module(hub: Hub) -> None:
    hub.adapter(tensors=adapter_tensors(1, rank=5), r=5)
    assert hub.refusal().reason == (
        "rejected:lora_bounds: model.layers.0.self_attn.v_proj: r must be <= 4, got 5"
    )


@pytest.mark.parametrize("alpha", [1e30, 0, -8, "8", True, None, [8], float("inf")])
def test_C7_alpha_out_of_bounds(hub: Hub, alpha: object) -> None:
    folder = hub.adapter(lora_alpha=alpha)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("Infinity", "1e400"))
    error = hub.refusal()
    assert error.code == "lora_bounds"
    assert "lora_alpha must be in (0, 65536]" in error.text


def test_C7_alpha_that_is_no_number(hub: Hub) -> None:
    hub.adapter(lora_alpha=float("nan"))
    assert hub.refusal().reason.startswith("rejected:json: adapter_config.json: NaN is not JSON")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [0, "1", 1e30, None])
def test_C7_pattern_value_out_of_bounds(hub: Hub, field: str, value: object) -> None:
    hub.adapter(**{field: {"v_proj": value}})
    assert hub.refusal().code == "lora_bounds"


def test_a_rank_above_the_setting_is_skipped(hub: Hub) -> None:
    hub.adapter()
    assert hub.refusal(max_lora_rank=1).reason == (
        "skipped:lora_rank: model.layers.0.self_attn.q_proj: rank 2 > max_lora_rank 1; raise max_lora_rank"
    )


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["(a+)+$", r"layers\.\d+\.q_proj", "^q_proj", "a|b", ".*", "x" * 300])
def test_C8_no_pattern_is_compiled(hub: Hub, field: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.adapter(**{field: {key: 2}})
    base = hub.base
    (found,) = list_folder(hub.root)
    compiled = []
    with monkeypatch.context() as patch:
        patch.setattr(re, "_compile", lambda pattern, flags: compiled.append(pattern))
        with pytest.raises(CandidateError) as caught:
            admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)
    assert caught.value.reason.startswith(f"skipped:adapter_type: {field}: ")
    assert not compiled


def test_C8_target_modules_as_a_pattern(hub: Hub) -> None:
    hub.adapter(target_modules=r".*\.(q|v)_proj")
    assert hub.refusal().reason.startswith("skipped:adapter_type: target_modules '.*\\")


def test_C8_a_million_target_modules(hub: Hub) -> None:
    hub.adapter(target_modules=["q_proj"] * 1_000_000)
    assert hub.refusal().code == "file_bounds"


@pytest.mark.parametrize("targets", [None, 3, {}, [1], []])
def test_C8_target_modules_of_another_type(hub: Hub, targets: object) -> None:
    hub.adapter(target_modules=targets)
    assert hub.refusal().code == "adapter_config"


def test_C8_tensors_the_config_does_not_name(hub: Hub) -> None:
    """peft would drop them in silence; the audit would apply them."""
    hub.adapter(target_modules=["q_proj", "j_proj"])
    error = hub.refusal()
    assert error.code == "adapter_config"
    assert error.text == "model.layers.0.self_attn.v_proj has tensors and target_modules does not name it"


def test_C9_names_of_modules_are_never_imported(hub: Hub, audit_events) -> None:
    evil = {"parent_library": "evil_parent", "base_model_class": "Evil"}
    hub.adapter(auto_mapping=evil, megatron_core="evil_megatron")
    base = hub.base
    (found,) = list_folder(hub.root)
    events = audit_events()
    assert admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16).tensors
    assert not [args for event, args in events if event in ("import", "exec", "compile")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "VERA"),
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", None),
        ("bias", "some"),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_qalora", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.w"]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 1),
        ("use_new_thing", True),
        ("new_config", {"x": 1}),
    ],
)
def test_C10_adapter_kinds_that_are_not_supported(hub: Hub, key: str, value: object) -> None:
    hub.adapter(**{key: value})
    assert hub.refusal().reason.startswith(f"skipped:adapter_type: {key} ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "gaussian"), ("use_new_thing", False), ("new_config", {}), ("bias", "none")],
)
def test_C10_what_is_off_is_no_obstacle(hub: Hub, key: str, value: object) -> None:
    hub.adapter(**{key: value})
    assert hub.admit().tensors


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.lora_magnitude_vector.weight",
        f"{Q}.lora_embedding_A",
        f"{Q}.base_layer.weight",
        f"{Q}.modules_to_save.weight",
        f"{Q}.lora_A.default.weight",
        f"{Q}.lora_A.bias",
    ],
)
def test_C10_tensors_that_are_not_lora(hub: Hub, name: str) -> None:
    hub.adapter(tensors=adapter_tensors(1) | {f"base_model.model.{name}": np.zeros((2, 8))})
    assert hub.refusal().reason.startswith(f"skipped:adapter_type: tensor base_model.model.{name}")


def test_adapter_shapes(hub: Hub) -> None:
    half = {name: array for name, array in adapter_tensors(1).items() if "q_proj.lora_B" not in name}
    hub.adapter("m1", tensors=half)
    hub.adapter("m2", tensors=adapter_tensors(1) | {f"base_model.model.{Q}.lora_B.weight": np.zeros((8, 3))})
    hub.adapter(
        "m3", tensors=adapter_tensors(1) | {f"base_model.model.{Q}.lora_A.weight": np.zeros((2, 2, 4))}
    )
    hub.adapter("m4", tensors={})
    hub.adapter(
        "m5", tensors=adapter_tensors(1) | {f"base_model.model.{Q}.lora_A.weight": ("I64", np.zeros((2, 8)))}
    )
    hub.adapter("m6", tensors=model_tensors(1))
    base = hub.base
    codes = {}
    for found in list_folder(hub.root):
        with pytest.raises(Exception, match=r"^(rejected|skipped):") as caught:
            admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)
        codes[found.id] = caught.value.code
    assert codes == {
        "m1": "adapter_shape",
        "m2": "adapter_shape",
        "m3": "adapter_shape",
        "m4": "adapter_shape",
        "m5": "dtype",
        "m6": "adapter_type",
    }


def test_an_adapter_without_its_config(hub: Hub) -> None:
    (hub.adapter() / "adapter_config.json").unlink()
    assert hub.refusal().reason == "rejected:missing_file: adapter_config.json does not exist"
