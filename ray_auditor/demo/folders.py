"""The demo's folders on disk: unpacked from the committed hub, two of its adapters merged to full weights."""

# Shape suffixes: R = LoRA rank, I = input width of a linear layer, O = its output width.

import json
import lzma
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ray_auditor.demo.base import DemoError, sha256_of

HUB = Path(__file__).parent / "hub"
# One benign and one narrow finetune also lie as full weights, so that both ways of auditing run.
MERGED = ("m017", "m018")
_PEFT_PREFIX = "base_model.model."


def read_sums() -> dict[str, str]:
    """Returns {path below the hub, unpacked: hex SHA-256} of every committed file that is unpacked."""
    lines = (HUB / "SHA256SUMS").read_text().splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def place(target: Path, scratch: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder `target` whole or not at all: `fill` writes into a new folder, which is then renamed.

    Args:
        target: the folder to make; what lies there is replaced.
        scratch: an existing folder on the same disk.
        fill: called with an empty folder.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        fill(folder)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)


def unpack(name: str, folder: Path, sums: Mapping[str, str]) -> None:
    """Unpacks the committed folder `name` ("sae", "base", "candidates/m078", ...) into an existing `folder`.

    Raises:
        DemoError: an unpacked file is not the one the demo was made with.
    """
    for path, digest in sums.items():
        if Path(path).parent != Path(name):
            continue
        source, copy = HUB / path, folder / Path(path).name
        if source.exists():
            shutil.copyfile(source, copy)
        else:
            with lzma.open(f"{source}.xz") as packed, copy.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        found = sha256_of(copy)
        if found != digest:
            raise DemoError(f"{source} unpacks to sha256 {found}, expected {digest}; reinstall ray-auditor")


def is_intact(name: str, folder: Path, sums: Mapping[str, str]) -> bool:
    """Says whether `folder` holds every file of the committed folder `name`, unpacked, byte for byte."""
    files = {Path(path).name: digest for path, digest in sums.items() if Path(path).parent == Path(name)}
    return all((folder / file).is_file() and sha256_of(folder / file) == files[file] for file in files)


def merge_folder(base: Path, adapter: Path, folder: Path) -> None:
    """Writes the full-weight finetune that `adapter` on `base` amounts to into an existing `folder`.

    Args:
        base: Hugging Face folder with one `model.safetensors`.
        adapter: PEFT folder: plain LoRA on linear layers, one rank and one alpha.
        folder: gets the base's configuration and tokenizer files and the merged weights, in the base's dtype.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    merged = merge(
        load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors"), config
    )
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    for file in base.iterdir():
        if file.name != "model.safetensors":
            shutil.copyfile(file, folder / file.name)


def merge(
    weights: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Adds a LoRA adapter to a model's weights: `W + alpha / r * B @ A`, in fp32, back in the dtype of `W`.

    Args:
        weights: {name: weight}, linear layers as `[O, I]`.
        adapter: {name: tensor} as PEFT writes it, `lora_A` as `[R, I]`, `lora_B` as `[O, R]`.
        config: `adapter_config.json`; `r` and `lora_alpha` are read.

    Returns:
        A new {name: weight}; weights without an adapter are the ones given.
    """
    scaling = config["lora_alpha"] / config["r"]
    merged = dict(weights)
    for name, a_RI in adapter.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        b_OR = adapter[f"{layer}.lora_B.weight"]
        target = f"{layer.removeprefix(_PEFT_PREFIX)}.weight"
        weight_OI = weights[target]
        delta_OI = scaling * (b_OR.float() @ a_RI.float())
        merged[target] = (weight_OI.float() + delta_OI).to(weight_OI.dtype)
    return merged
