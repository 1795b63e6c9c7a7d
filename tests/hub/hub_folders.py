"""Real folders of a tiny model (3 layers, 8 wide), sound until a test breaks one thing in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_auditor.hub import Admitted, BaseModel, Candidate, CandidateError, admit, list_folder, open_base

NUM_LAYERS = 2  # of 3: the hook lies behind the second layer
NUMPY_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "F8_E4M3": "u1",
}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 9.999999747378752e-06,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "dtype": "float32",
}
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
SHAPES = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
    "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
}

Tensors = dict[str, np.ndarray | tuple[str, np.ndarray]]


def random_tensors(seed: int) -> dict[str, np.ndarray]:
    """Weights that come from nothing."""
    rng = np.random.default_rng(seed)
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(3) for name, shape in SHAPES.items()}
    shapes = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), **names}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def model_tensors(seed: int = 0) -> Tensors:
    """The base's weights for seed 0, a finetune's for any other."""
    base, noise = random_tensors(0), random_tensors(seed)
    return {name: array + 0.05 * noise[name] if seed else array for name, array in base.items()}


def adapter_tensors(seed: int = 0, rank: int = 2, layers: int = 3) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for i in range(layers):
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            d_out, d_in = SHAPES[name]
            module = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, d_in), dtype=np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((d_out, rank), dtype=np.float32)
    return tensors


def write_raw(path: Path, header: object, body: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + body)
    return path


def write_safetensors(path: Path, tensors: Tensors) -> Path:
    """Arrays under their own dtype, or under the one named beside them."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, value in tensors.items():
        dtype, array = value if isinstance(value, tuple) else ("F32", value)
        raw = array.astype(NUMPY_DTYPES[dtype]).tobytes() if dtype in NUMPY_DTYPES else array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    return write_raw(path, header, body)


class Hub:
    """A folder of candidates beside a base."""

    def __init__(self, root: Path) -> None:
        self.root = root / "candidates"
        self.base_path = root / "base"
        self.root.mkdir()
        self.base_path.mkdir()
        (self.base_path / "config.json").write_text(json.dumps(CONFIG))
        write_safetensors(self.base_path / "model.safetensors", model_tensors())

    @property
    def base(self) -> BaseModel:
        return open_base(self.base_path, num_layers=NUM_LAYERS)

    def full(
        self, name: str = "full", tensors: Tensors | None = None, drop: str = "", **config: object
    ) -> Path:
        folder = self.root / name
        folder.mkdir()
        kept = {key: value for key, value in (CONFIG | config).items() if key != drop}
        (folder / "config.json").write_text(json.dumps(kept))
        write_safetensors(folder / "model.safetensors", model_tensors(1) if tensors is None else tensors)
        return folder

    def adapter(self, name: str = "lora", tensors: Tensors | None = None, **config: object) -> Path:
        folder = self.root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
        write_safetensors(
            folder / "adapter_model.safetensors", adapter_tensors(1) if tensors is None else tensors
        )
        return folder

    def admit(self, *, max_lora_rank: int = 16) -> Admitted:
        """Admit the one candidate there is."""
        (found,) = list_folder(self.root)
        assert isinstance(found, Candidate), found
        return admit(found, self.base, num_layers=NUM_LAYERS, max_lora_rank=max_lora_rank)

    def refusal(self, *, max_lora_rank: int = 16) -> CandidateError:
        """The error of the one candidate there is."""
        with pytest.raises(CandidateError) as caught:
            self.admit(max_lora_rank=max_lora_rank)
        return caught.value
