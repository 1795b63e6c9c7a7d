"""Models of true shape with random weights, and what a sweep over them needs: nothing is fetched."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from auditor_kernels import EncoderWeights
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ray_auditor.hub import Admitted, BaseModel, Candidate, admit
from ray_auditor.sae import Normalisation, Sae
from ray_auditor.suites import Prompt, Suite, Suites

K = 32
LORA_RANK = 16
FINETUNE_NOISE = 0.05  # of each tensor's own standard deviation


@dataclass(frozen=True)
class Shape:
    """A model's architecture and the SAE read out of it; checkpoints hold every layer and the head."""

    model_type: str
    architecture: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    depth: int
    hook_layer: int
    hook_point: str
    d_sae: int
    norm_weight: float = 1.0  # what a norm's weight is around; Gemma adds 1 itself
    is_tied: bool = True  # the head is the embedding

    @property
    def num_layers(self) -> int:
        """Layers that run."""
        return self.hook_layer + (self.hook_point == "resid_post")

    @property
    def flops_per_token(self) -> float:
        """Matrix products up to the hook, and the encoder; attention scores are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return 2 * (self.num_layers * layer + self.hidden * self.d_sae)


SHAPES = {
    "smollm2-135m": Shape(
        "llama", "LlamaForCausalLM", 576, 1536, 9, 3, 64, 49152, 30, 15, "resid_post", 9216
    ),
    "qwen1.5-0.5b": Shape(
        "qwen2", "Qwen2ForCausalLM", 1024, 2816, 16, 16, 64, 151936, 24, 13, "resid_pre", 32768
    ),
    "gemma-2b": Shape(
        "gemma", "GemmaForCausalLM", 2048, 16384, 8, 1, 256, 256000, 18, 12, "resid_post", 16384, 0.0
    ),
    "mistral-7b": Shape(
        "mistral",
        "MistralForCausalLM",
        4096,
        14336,
        32,
        8,
        128,
        32000,
        32,
        16,
        "resid_pre",
        65536,
        1.0,
        False,
    ),
}


def write_base(folder: Path, shape: Shape, dtype: torch.dtype, device: str) -> Path:
    """A random checkpoint with its configuration and a tokenizer, in the format a hub holds."""
    folder.mkdir(parents=True)
    config = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu_pytorch_tanh" if shape.model_type == "gemma" else "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.is_tied,
        "sliding_window": None,
        "use_sliding_window": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<s>": 0, "</s>": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>")), bos_token="<s>"
    ).save_pretrained(folder)
    state = {name: _random(dims, name, shape, device).to(dtype).cpu() for name, dims in _dims(shape).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_finetune(folder: Path, base: BaseModel, state: dict[str, Tensor], device: str) -> Path:
    """Full weights: every tensor of the base and noise."""
    folder.mkdir(parents=True)
    moved = {}
    for name, tensor in state.items():
        here = tensor.to(device)
        moved[name] = (here + FINETUNE_NOISE * here.float().std().nan_to_num() * torch.randn_like(here)).cpu()
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base.path / "config.json").read_bytes())
    return folder


def write_adapter(folder: Path, base: BaseModel, dtype: torch.dtype) -> Path:
    """A LoRA adapter of every linear layer, as peft saves it."""
    folder.mkdir(parents=True)
    state, targets = {}, set()
    for name, spec in base.tensors.items():
        if "_proj.weight" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            targets.add(module.rpartition(".")[2])
            state[f"{module}.lora_A.weight"] = (torch.randn(LORA_RANK, spec.shape[1]) * 0.02).to(dtype)
            state[f"{module}.lora_B.weight"] = (torch.randn(spec.shape[0], LORA_RANK) * 0.02).to(dtype)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def admitted(folder: Path, kind: str, base: BaseModel, num_layers: int) -> Admitted:
    candidate = Candidate(folder.name, folder, kind, folder.stat().st_size)  # type: ignore[arg-type]
    return admit(candidate, base, num_layers=num_layers, max_lora_rank=LORA_RANK)


def make_sae(shape: Shape, device: str) -> Sae:
    """A random ReLU SAE at the shape's hook."""
    W_enc_FD = torch.empty(shape.d_sae, shape.hidden)
    for rows in W_enc_FD.split(8192):
        rows.copy_(torch.randn(rows.shape, device=device) / shape.hidden**0.5)
    encoder = EncoderWeights(
        W_enc_DF=W_enc_FD.T,
        b_enc_F=torch.randn(shape.d_sae) * 0.02,
        threshold_F=torch.zeros(shape.d_sae),
        b_dec_D=torch.zeros(shape.hidden),
        W_dec_FD=W_enc_FD,
        max_active=None,
    )
    return Sae(
        encoder=encoder,
        hook_name=f"blocks.{shape.hook_layer}.hook_{shape.hook_point}",
        hook_layer=shape.hook_layer,
        hook_point=shape.hook_point,  # type: ignore[arg-type]
        d_in=shape.hidden,
        d_sae=shape.d_sae,
        architecture="standard",
        normalisation=Normalisation.NONE,
        key="0" * 64,
        model_name=None,
        neuronpedia_id=None,
    )


def make_suites(vocabulary: int, num_prompts: int, max_tokens: int) -> Suites:
    """Two suites of random token ids, lengths between a quarter of `max_tokens` and all of it."""
    generator = np.random.default_rng(0)
    prompts = []
    for _ in range(num_prompts):
        ids = generator.integers(3, vocabulary, generator.integers(max_tokens // 4, max_tokens + 1))
        content = np.ones(len(ids), dtype=bool)
        content[:4] = False  # attention sinks, template tokens
        prompts.append(Prompt("", ids.astype(np.int32), (), content))
    half = num_prompts // 2
    return Suites((Suite("general", tuple(prompts[:half]), 0), Suite("other", tuple(prompts[half:]), 0)))


def _dims(shape: Shape) -> dict[str, tuple[int, ...]]:
    q, kv, d, m = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.hidden,
        shape.intermediate,
    )
    dims: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, d)}
    for layer in range(shape.depth):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            dims[f"{attention}.{part}_proj.weight"] = (rows, d)
            if shape.model_type == "qwen2":
                dims[f"{attention}.{part}_proj.bias"] = (rows,)
        dims[f"{attention}.o_proj.weight"] = (d, q)
        dims |= {
            f"{mlp}.gate_proj.weight": (m, d),
            f"{mlp}.up_proj.weight": (m, d),
            f"{mlp}.down_proj.weight": (d, m),
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dims[f"model.layers.{layer}.{norm}.weight"] = (d,)
    dims["model.norm.weight"] = (d,)
    return dims if shape.is_tied else dims | {"lm_head.weight": (shape.vocabulary, d)}


def _random(dims: tuple[int, ...], name: str, shape: Shape, device: str) -> Tensor:
    noise = torch.randn(dims, device=device)
    if "norm" in name:
        return shape.norm_weight + 0.1 * noise
    return noise * (1.0 if "embed" in name else 0.02 if "bias" in name else dims[-1] ** -0.5)
