"""Rows B15 to B26: configs, tokenizers, templates, names."""

import json
import os
import time
from pathlib import Path

import pytest
from hub_folders import CONFIG, NUM_LAYERS, Hub
from table import fault

from ray_auditor.hub import Candidate, CandidateError, admit, list_folder

VOCAB = {"a": 0, "b": 1, "ab": 2}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel"},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": VOCAB, "merges": ["a b"]},
}


def write_tokenizer(folder: Path, *, model: dict | None = None, **changes: object) -> None:
    value = TOKENIZER | {"model": TOKENIZER["model"] | (model or {})} | changes
    (folder / "tokenizer.json").write_text(json.dumps(value))


@pytest.fixture
def tokenized(hub: Hub) -> Hub:
    """A hub whose base has a tokenizer and a template."""
    write_tokenizer(hub.base_path)
    (hub.base_path / "tokenizer.model").write_bytes(b"\x0a\x05pieces")
    (hub.base_path / "chat_template.jinja").write_text("{{ messages }}")
    return hub


@fault(
    "B15",
    "another tokenizer: added tokens, other merges, exchanged ids",
    demanded="the base's is used; a finding with what differs",
    seen="ok, tokenizer_changed; ok",
)
def test_B15_tokenizer(tokenized, seen) -> None:
    hub = tokenized
    added = [*TOKENIZER["added_tokens"], {"id": 4, "content": "<tool>"}]
    write_tokenizer(hub.full("added"), added_tokens=added)
    write_tokenizer(hub.full("merges"), model={"merges": []})
    write_tokenizer(hub.adapter("ids"), model={"vocab": VOCAB | {"a": 1, "b": 0}})
    write_tokenizer(hub.full("normalizer"), normalizer={"type": "Lowercase"})
    write_tokenizer(hub.full("respelt"), model={"merges": [["a", "b"]]})  # newer files write pairs
    outcomes = hub.outcomes()
    assert outcomes.pop("respelt") == "ok"
    assert set(outcomes.values()) == {"ok, tokenizer_changed"}
    seen("ok")
    seen("ok, tokenizer_changed")
    (found,) = (one for one in list_folder(hub.root) if one.id == "ids")
    notes = admit(found, hub.base, num_layers=NUM_LAYERS, max_lora_rank=8).notes
    assert notes == ("tokenizer_changed: 2 tokens with another id; the base's own is used",)


@fault(
    "B16",
    "no config, another architecture, a model_type that lies",
    demanded="rejected:arch_mismatch",
    seen="rejected:arch_mismatch",
)
def test_B16_architecture(hub, seen) -> None:
    (hub.full("none") / "config.json").unlink()
    hub.full("architecture", architectures=["Qwen2ForCausalLM"])
    hub.full("type", model_type="mistral")
    hub.full("computation", rms_norm_eps=1e-6)
    hub.full("unnamed", architectures=None)
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B17",
    "sizes of a billion, zero, negative, of other types, 1e400",
    demanded="rejected in 50 ms, before anything is allocated",
    seen="rejected:config_bounds",
)
def test_B17_config_bombs(hub, seen) -> None:
    bombs = (10**9, 10**12, 0, -1, 2.0, "8", True, [8], float("inf"))
    fields = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    folder, base = hub.full(), hub.base
    (found,) = list_folder(hub.root)
    for field in fields:
        for bomb in bombs:
            raw = json.dumps(CONFIG | {field: bomb}).replace("Infinity", "1e400")
            (folder / "config.json").write_text(raw)
            begun = time.process_time()
            with pytest.raises(CandidateError) as caught:
                admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=8)
            assert time.process_time() - begun < 0.05
            seen(f"{caught.value.status}:{caught.value.code}")


@fault(
    "B18",
    "rotary settings: factor 0, NaN, 1e30, unknown kinds, a million factors, endless positions",
    demanded="rejected:config_rope",
    seen="rejected:config_rope; rejected:json; rejected:file_bounds",
    why="NaN is no JSON, and a million factors are no config's size",
)
def test_B18_rope(hub, seen) -> None:
    ropes = (
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": 1e30},
        {"rope_type": "linear", "factor": float("nan")},
        {"type": "evil"},
        {"rope_type": "longrope", "long_factor": [1.0] * 5000},
        {"rope_type": "longrope", "long_factor": [1.0] * 1_000_000},
    )
    for i, rope in enumerate(ropes):
        hub.full(f"m{i}", rope_scaling=rope)
    hub.full("position", max_position_embeddings=10**12)
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B19",
    "absurd layer kinds, windows, experts",
    demanded="rejected:config_bounds",
    seen="rejected:config_bounds",
)
def test_B19_absurd(hub, seen) -> None:
    cases = (
        ("layer_types", ["full_attention"] * 1000),
        ("layer_types", [1, 2, 3]),
        ("sliding_window", -1),
        ("sliding_window", 2**40),
        ("num_experts", 10**6),
        ("head_dim", 1 << 20),
    )
    for i, (field, value) in enumerate(cases):
        hub.full(f"m{i}", **{field: value})
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B20",
    "code in a repository, and config keys that ask for it",
    demanded="never run; noted; another architecture is not audited",
    seen="ok, not used; rejected:arch_mismatch",
)
def test_B20_remote_code(hub, tmp_path: Path, audit_events, seen) -> None:
    canary = tmp_path / "owned"
    code = f"open({str(canary)!r}, 'w')"
    evil = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "trust_remote_code": True,
        "_target_": "os.x",
    }
    (hub.full("known", **evil) / "modeling_evil.py").write_text(code)
    (hub.full("own", **evil, model_type="evil") / "modeling_evil.py").write_text(code)
    (hub.adapter("adapter") / "__init__.py").write_text(code)
    hub.outcomes()
    events = audit_events()
    for outcome in hub.outcomes().values():
        seen(outcome)
    assert not [args for event, args in events if event in ("import", "exec", "compile")]
    assert not canary.exists()


@fault(
    "B21",
    "templates that reach for the interpreter, loop, allocate, or are named `../x`",
    demanded="never rendered",
    seen="ok, chat_template_changed; ok",
)
def test_B21_templates(tokenized, tmp_path: Path, seen) -> None:
    hub = tokenized
    evil = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
    )
    for i, template in enumerate(evil):
        (hub.full(f"m{i}") / "chat_template.jinja").write_text(template)
    named = {"chat_template": [{"name": "../../owned", "template": "x"}]}
    (hub.full("named") / "tokenizer_config.json").write_text(json.dumps(named))
    begun = time.process_time()
    outcomes = hub.outcomes()
    assert time.process_time() - begun < 1
    assert outcomes.pop("named") == "ok"  # nothing reads it, nothing writes by it
    assert not list(tmp_path.rglob("owned*"))
    seen("ok")
    for outcome in outcomes.values():
        seen(outcome)


@fault(
    "B22",
    "tokenizer.json with catastrophic patterns, a gigabyte, ten million tokens, endless nesting",
    demanded="not loaded; a finding; whoever looks lives",
    seen="ok, tokenizer_changed; ok, tokenizer_hostile",
)
def test_B22_hostile_tokenizers(tokenized, seen) -> None:
    hub = tokenized
    write_tokenizer(
        hub.full("pattern"),
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed"},
    )
    replace = [{"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1000}] * 1000
    write_tokenizer(hub.full("replace"), normalizer={"type": "Sequence", "normalizers": replace})
    (hub.full("gigabyte") / "tokenizer.json").touch()
    os.truncate(hub.root / "gigabyte/tokenizer.json", 1 << 30)
    (hub.full("tokens") / "tokenizer.json").write_bytes(b'{"added_tokens": [' + b"1," * 7_000_000 + b"1]}")
    (hub.full("nested") / "tokenizer.json").write_bytes(
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    )
    (hub.full("torn") / "tokenizer.json").write_bytes(b"{")
    begun = time.process_time()
    for outcome in hub.outcomes().values():
        seen(outcome)
    assert time.process_time() - begun < 3


@fault(
    "B23",
    "a tokenizer in Python; a SentencePiece file of junk",
    demanded="neither run nor parsed; noted",
    seen="ok, not used; ok, tokenizer_changed",
)
def test_B23_other_tokenizers(tokenized, seen) -> None:
    hub = tokenized
    (hub.full("code") / "tokenization_evil.py").write_text("raise SystemExit('owned')")
    (hub.full("junk") / "tokenizer.model").write_bytes(os.urandom(4096))
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B24",
    "files of no bytes, of 7, of a header alone",
    demanded="rejected",
    seen="rejected:safetensors:too_short; rejected:safetensors:json; rejected:header_limits; "
    "rejected:missing_tensor",
)
def test_B24_short_files(hub, seen) -> None:
    contents = (b"", b"1234567", (0).to_bytes(8, "little"), (2).to_bytes(8, "little"), b"\xff" * 8)
    for i, content in enumerate((*contents, (2).to_bytes(8, "little") + b"{}")):
        (hub.full(f"m{i}") / "model.safetensors").write_bytes(content)
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B25",
    "a Git LFS pointer in place of weights",
    demanded="deferred:lfs_pointer",
    seen="deferred:lfs_pointer",
)
def test_B25_lfs_pointer(hub, seen) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (hub.full("full") / "model.safetensors").write_text(pointer)
    (hub.adapter("adapter") / "adapter_model.safetensors").write_text(pointer)
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B26",
    "names that differ in case, or in how their letters are composed",
    demanded="rejected:duplicate_name",
    seen="rejected:duplicate_name; ok",
)
def test_B26_twins(hub, seen) -> None:
    (hub.full("case") / "Model.safetensors").write_bytes(b"")
    folder = hub.full("composed")
    for name in ("caf\u00e9.txt", "cafe\u0301.txt"):
        (folder / name).write_text("")
    for name in ("Twin", "twin"):
        hub.full(name)
    hub.full("sound")
    outcomes = hub.outcomes()
    assert outcomes["sound"] == "ok"
    for outcome in outcomes.values():
        seen(outcome)
    assert all(isinstance(one, Candidate) == (one.id in ("sound",)) for one in list_folder(hub.root))
