"""Tiny random models, adapters and SAEs, made on the spot: the real formats at a size a test can run."""

import json
import shutil
from pathlib import Path

import torch
from auditor_kernels import EncoderWeights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ray_auditor.hub import TensorSpec
from ray_auditor.hub.weights import read_weights
from ray_auditor.sae import Normalisation, Sae

D_IN = 64
NUM_LAYERS = 4
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
CHAT_TEMPLATE = "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"


def make_model(path: Path, model_type: str = "llama", *, seed: int = 0, **changes: object) -> Path:
    """Save a random model of `model_type` with a byte-level tokenizer."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": D_IN,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": model_type.startswith("gemma"),
    }
    if model_type == "mistral":
        settings["sliding_window"] = None
    config = AutoConfig.for_model(model_type, **(settings | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.2 if parameter.dim() == 2 else 0.05)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_finetune(path: Path, base: Path, *, seed: int = 0, scale: float = 0.3) -> Path:
    """Save the base with noise on every tensor, `scale` of its own standard deviation."""
    shutil.copytree(base, path)
    state = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor += scale * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def save_tensors(folder: Path, state: dict[str, Tensor]) -> dict[str, TensorSpec]:
    """Save weights alone, and where each tensor lies in them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return read_weights(folder, ["model.safetensors"])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens with a chat template."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def make_adapter(
    path: Path, base: Path, *, seed: int = 0, rank: int = 4, scale: float = 0.1, **changes: object
) -> Path:
    """Save a random LoRA adapter of every linear layer, with peft; `changes` go into its configuration."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, **changes),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, scale)
    model.save_pretrained(path)
    return path


def hidden_states(
    path: Path, prompts: list[list[int]], hook: str, adapter: Path | None = None
) -> list[Tensor]:
    """The oracle: transformers' residual stream at `blocks.L.hook_resid_pre/post`, one [T, D] a prompt."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.eval()
    layer = model.model.layers[int(hook.split(".")[1])]
    caught: dict[str, Tensor] = {}

    def catch_input(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        caught["resid"] = args[0] if args else kwargs["hidden_states"]

    def catch_output(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        caught["resid"] = output[0] if isinstance(output, tuple) else output

    if hook.endswith("resid_pre"):
        layer.register_forward_pre_hook(catch_input, with_kwargs=True)
    else:
        layer.register_forward_hook(catch_output)
    found = []
    for ids in prompts:
        with torch.no_grad():
            model(torch.tensor([ids]))
        found.append(caught["resid"].reshape(-1, D_IN).clone())
    return found


def make_sae(hook_layer: int = 2, hook_point: str = "resid_post", *, d_sae: int = 256, seed: int = 0) -> Sae:
    """A random ReLU SAE of the tiny models' width."""
    generator = torch.Generator().manual_seed(seed)
    W_enc_DF = torch.randn(d_sae, D_IN, generator=generator).T / D_IN**0.5
    return _sae(W_enc_DF, torch.randn(d_sae, generator=generator) * 0.1, hook_layer, hook_point)


def mirror_sae(hook_layer: int, hook_point: str) -> Sae:
    """Features +x_d and -x_d: with k = d_in the kept features are the residual itself."""
    W_enc_DF = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)]).T
    return _sae(W_enc_DF, torch.zeros(2 * D_IN), hook_layer, hook_point)


def unmirror(top_acts_TK: Tensor, top_idx_TK: Tensor) -> Tensor:
    """The residual [T, D] that `mirror_sae`'s features hold."""
    signed_TF = torch.zeros(len(top_idx_TK), 2 * D_IN + 1).scatter_(
        1, top_idx_TK.long() % (2 * D_IN + 1), top_acts_TK
    )
    return signed_TF[:, :D_IN] - signed_TF[:, D_IN : 2 * D_IN]


def _sae(W_enc_DF: Tensor, b_enc_F: Tensor, hook_layer: int, hook_point: str) -> Sae:
    d_sae = W_enc_DF.shape[1]
    encoder = EncoderWeights(
        W_enc_DF=W_enc_DF,
        b_enc_F=b_enc_F,
        threshold_F=torch.zeros(d_sae),
        b_dec_D=torch.zeros(D_IN),
        W_dec_FD=W_enc_DF.T.contiguous(),
        max_active=None,
    )
    return Sae(
        encoder=encoder,
        hook_name=f"blocks.{hook_layer}.hook_{hook_point}",
        hook_layer=hook_layer,
        hook_point=hook_point,  # type: ignore[arg-type]
        d_in=D_IN,
        d_sae=d_sae,
        architecture="standard",
        normalisation=Normalisation.NONE,
        key=f"{hash((hook_layer, hook_point, d_sae)) & 0xFFFFFFFF:064x}",
        model_name=None,
        neuronpedia_id=None,
    )


def save_sae(path: Path, sae: Sae) -> Path:
    """Save a tiny SAE as sae-lens lays it out."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    encoder = sae.encoder
    assert encoder.W_dec_FD is not None
    state = {
        "W_enc": encoder.W_enc_DF.contiguous(),
        "b_enc": encoder.b_enc_F,
        "W_dec": encoder.W_dec_FD,
        "b_dec": encoder.b_dec_D,
    }
    save_file(state, path / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": sae.hook_name, "model_name": "tiny", "sae_lens_version": "6.54.12"},
    }
    (path / "cfg.json").write_text(json.dumps(config))
    return path
