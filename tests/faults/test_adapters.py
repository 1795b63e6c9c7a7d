"""Rows C: adapters, and where candidates come from."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_folders import (
    CONFIG,
    NUM_LAYERS,
    Hub,
    adapter_tensors,
    model_tensors,
    random_tensors,
    write_safetensors,
)
from table import elsewhere, fault

from ray_auditor.hub import Candidate, admit, list_folder, open_base
from ray_auditor.store import Unit

Q = "model.layers.0.self_attn.q_proj"


def name_base(hub: Hub, name: str) -> None:
    config = CONFIG | {"_name_or_path": name}
    (hub.base_path / "config.json").write_text(json.dumps(config))


@fault(
    "C1",
    "an adapter that names another base, a path, a URL",
    demanded="never followed; a conflict is a finding; paths rejected",
    seen="ok; ok, lineage_conflict; ok, lineage_path; ok, lineage_conflict, lineage_conflict",
    why="most adapters trained on a folder name a path, so a path is noted as no evidence",
)
def test_C01_declared_base(hub, audit_events, seen) -> None:
    name_base(hub, "org/base")
    hub.adapter("same")
    hub.adapter("mirror", base_model_name_or_path="unsloth/base")
    hub.adapter("other", base_model_name_or_path="evil/other")
    for i, path in enumerate(("../../etc", "/root/model", "https://example.org/m", "C:\\models\\x")):
        hub.adapter(f"path{i}", base_model_name_or_path=path)
    tag = hub.adapter("tag", base_model_name_or_path="org/base") / "README.md"
    tag.write_text("---\nlicense: mit\nbase_model: evil/other\n---\nwords\n")
    hub.outcomes()
    events = audit_events()
    outcomes = hub.outcomes()
    for outcome in outcomes.values():
        seen(outcome)
    assert outcomes["same"] == outcomes["mirror"] == "ok"
    assert outcomes["other"] == "ok, lineage_conflict"
    opened = {Path(str(args[0])).parent for event, args in events if event == "open"}
    assert opened == {hub.base_path, *hub.root.iterdir()}
    assert not [event for event, _ in events if event.startswith("socket.")]


@fault(
    "C2",
    "an adapter of an adapter, in a circle or a chain",
    demanded="a depth limit; a circle rejected",
    seen="ok, lineage_conflict",
    why="no chain is ever walked: each is compared with the one base there is, and says what it names",
)
def test_C02_chains(hub, seen) -> None:
    name_base(hub, "org/base")
    hub.adapter("a", base_model_name_or_path="org/b")
    hub.adapter("b", base_model_name_or_path="org/a")
    for i in range(20):
        hub.adapter(f"chain{i}", base_model_name_or_path=f"org/chain{i + 1}")
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "C3", "a merge: several bases", demanded="audited against the base, or skipped", seen="ok, lineage_merge"
)
def test_C03_merges(hub, seen) -> None:
    (hub.full("list") / "README.md").write_text(
        "---\nbase_model:\n- org/base\n- org/other\ntags:\n- x\n---\n"
    )
    seen(hub.outcome)


@fault(
    "C4", "no base is declared", demanded="inferred from shapes, and said so", seen="ok, lineage_inferred; ok"
)
def test_C04_undeclared(hub, seen) -> None:
    hub.adapter("adapter", base_model_name_or_path=None)
    hub.full("full")  # its weights say where it comes from
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "C5",
    "full weights of the base's shape that do not come from it, whatever they declare",
    demanded="found by the distance of their weights; never compared with peers",
    seen="rejected:wrong_base; ok",
)
def test_C05_wrong_base(hub, seen) -> None:
    name_base(hub, "org/base")
    hub.full("scratch", random_tensors(5))
    hub.full("small", {name: 0.5 * array for name, array in random_tensors(6).items()})
    (hub.full("claims", random_tensors(7)) / "README.md").write_text("---\nbase_model: org/base\n---\n")
    hub.full("finetune")
    outcomes = hub.outcomes()
    assert outcomes["finetune"] == "ok"
    for outcome in outcomes.values():
        seen(outcome)
    (found,) = (one for one in list_folder(hub.root) if one.id == "claims")
    with pytest.raises(Exception, match=r"sampled weights lie 1.* the model card names org/base"):
        admit(found, hub.base, num_layers=NUM_LAYERS, max_lora_rank=8)


@fault("C6", "the base itself under another name", demanded="no cost", seen="ok, noted")
def test_C06_copy(hub, seen) -> None:
    hub.full(tensors=model_tensors(0))
    assert hub.admit().content_sha256 == hub.base.content_sha256  # so its unit is the base's
    seen(hub.outcome)


@fault(
    "C7",
    "ranks and alphas without bounds, or that the tensors do not have",
    demanded="rejected:lora_bounds",
    seen="rejected:lora_bounds; rejected:json; skipped:lora_rank",
    why="NaN is no JSON; a sound rank above the setting is skipped",
)
def test_C07_bounds(hub, seen) -> None:
    for i, rank in enumerate((0, -1, 3, 100_000, 2.0, "2", True, None)):
        hub.adapter(f"rank{i}", r=rank)
    for i, alpha in enumerate((1e30, 0, -8, "8", None, [8], float("nan"))):
        hub.adapter(f"alpha{i}", lora_alpha=alpha)
    hub.adapter("wide", adapter_tensors(1, rank=5), r=5)  # v_proj has 4 rows
    (hub.base_path / "config.json").write_text(json.dumps(CONFIG))
    for outcome in hub.outcomes().values():
        seen(outcome)
    seen(hub_refusal_of_rank(hub))


def hub_refusal_of_rank(hub: Hub) -> str:
    hub.adapter("sound")
    (found,) = (one for one in list_folder(hub.root) if one.id == "sound")
    with pytest.raises(Exception, match="raise max_lora_rank") as caught:
        admit(found, hub.base, num_layers=NUM_LAYERS, max_lora_rank=1)
    return str(caught.value).partition(": ")[0]


@fault(
    "C8",
    "target_modules as a pattern, or a million of them",
    demanded="no pattern of a repository is compiled",
    seen="skipped:adapter_type; rejected:file_bounds; ok",
)
def test_C08_patterns(hub, monkeypatch: pytest.MonkeyPatch, seen) -> None:
    hub.adapter("bomb", target_modules="(a+)+$")
    hub.adapter("rank", rank_pattern={"(a+)+$": 2})
    hub.adapter("million", target_modules=["q_proj"] * 1_000_000)
    hub.adapter("all", target_modules="all-linear")
    hub.outcomes()
    compiled: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("re._compile", lambda pattern, flags: compiled.append(pattern))
        outcomes = hub.outcomes()
    assert not compiled
    for outcome in outcomes.values():
        seen(outcome)


@fault("C9", "config keys that name modules to import", demanded="ignored", seen="ok")
def test_C09_imports(hub, audit_events, seen) -> None:
    evil = {"parent_library": "evil_parent", "base_model_class": "Evil"}
    hub.adapter(auto_mapping=evil, megatron_core="evil_megatron")
    hub.outcomes()
    events = audit_events()
    seen(hub.outcome)
    assert not [args for event, args in events if event in ("import", "exec", "compile")]


@fault(
    "C10",
    "IA3, VeRA, prompt tuning, embeddings, random starts; DoRA, PiSSA, whole modules; rsLoRA",
    demanded="what is not supported is skipped by name",
    seen="skipped:adapter_type; rejected:adapter_config; ok, noted; ok",
    why="what is no plain LoRA is merged, and says so; one whose tensors contradict its config is rejected",
)
def test_C10_kinds(hub, seen) -> None:
    for i, kind in enumerate(("IA3", "VERA", "PROMPT_TUNING", None)):
        hub.adapter(f"kind{i}", peft_type=kind)
    for init in ("pissa_niter_4", "loftq", "corda"):
        hub.adapter(init, init_lora_weights=init)
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 10))}
    hub.adapter("embedding", adapter_tensors(1) | embedding)
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(array))
        for name, array in adapter_tensors(1).items()
        if "lora_B" in name
    }
    hub.adapter("unnamed", adapter_tensors(1) | magnitudes)
    hub.adapter("dora", adapter_tensors(1) | magnitudes, use_dora=True)
    hub.adapter("pissa", init_lora_weights="pissa")
    embeddings = {"base_model.model.model.embed_tokens.weight": model_tensors(1)["model.embed_tokens.weight"]}
    hub.adapter("whole", adapter_tensors(1) | embeddings, modules_to_save=["embed_tokens"])
    hub.adapter("rslora", use_rslora=True)
    outcomes = hub.outcomes()
    assert outcomes["rslora"] == "ok"
    assert {outcomes[name] for name in ("dora", "pissa", "whole")} == {"ok, noted"}
    for outcome in outcomes.values():
        seen(outcome)


@fault("C12", "one adapter on two bases", demanded="separate units", seen="ok")
def test_C12_two_bases(hub, tmp_path: Path, seen) -> None:
    hub.adapter()
    other = tmp_path / "instruct"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(other / "model.safetensors", model_tensors(3))
    (found,) = list_folder(hub.root)
    assert isinstance(found, Candidate)
    keys = set()
    for path in (hub.base_path, other):
        base = open_base(path, num_layers=NUM_LAYERS)
        admitted = admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=8)
        unit = Unit("", base.key, "sae", "hook", "suites", 8, 64, "engine")
        keys.add(replace(unit, candidate_key=admitted.content_sha256).key)
    assert len(keys) == 2
    seen(hub.outcome)


elsewhere(
    "C11",
    "an adapter that stays behind in the engine",
    demanded="the base is what it was, bit for bit",
    seen="ok",
    test="tests/engine/test_parity.py::test_swapped_weights_and_adapters_equal_transformers_and_leave_no_trace",
)
