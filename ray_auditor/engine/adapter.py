"""A LoRA adapter on its way into the engine: rewritten by us, read by vLLM, proven in its slot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_auditor.engine.parameters import SwapError
from ray_auditor.hub import LoraSpec, TensorSource
from ray_auditor.hub.checkpoint import iter_tensors

AdapterTensors = dict[str, tuple[Tensor, Tensor]]
"""Module name, as in the base's checkpoint -> (lora_A [r, in], lora_B [out, r] times its scaling)."""


def read_adapter(lora: LoraSpec, specs: Mapping[str, TensorSource], dtype: torch.dtype) -> AdapterTensors:
    """Read an admitted adapter, with every scaling multiplied into B in fp32 before the cast to `dtype`.

    Raises:
        CandidateError: A file is not the one that was admitted.
    """
    state = dict(iter_tensors(specs))
    return {
        name: (state[module.lora_A].to(dtype), (state[module.lora_B].float() * module.scaling).to(dtype))
        for name, module in lora.modules.items()
    }


def write_adapter(folder: Path, tensors: AdapterTensors) -> None:
    """Write the folder vLLM reads: our own configuration, scalings folded into B.

    The candidate's own folder is never shown to vLLM: its configuration can name any module to import,
    and a missing safetensors file would make vLLM open a pickle.
    """
    rank = max(lora_a.shape[0] for lora_a, _ in tensors.values())
    state = {}
    for module, (lora_a, lora_b) in tensors.items():
        state[f"base_model.model.{module}.lora_A.weight"] = lora_a.contiguous()
        state[f"base_model.model.{module}.lora_B.weight"] = lora_b.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in tensors}),
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@torch.no_grad()
def clear_slots(model: nn.Module) -> None:
    """Zero every adapter slot: vLLM forgets an adapter that is removed and leaves its numbers there."""
    for layer in model.modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            stacked = getattr(layer, name, ())
            for slot in (stacked,) if isinstance(stacked, Tensor) else stacked:
                slot.zero_()


@torch.no_grad()
def prove_slot(model: nn.Module, tensors: AdapterTensors, packed: Mapping[str, list[str]]) -> None:
    """Hold the engine's only adapter slot to the adapter: its tensors in place, zero everywhere else.

    Without an adapter, to zero everywhere: then no arithmetic could mix a former one into these rows.

    Raises:
        SwapError: A slice of the slot differs, or a module of the adapter has no slot.
    """
    holds: dict[str, Tensor] = {}  # by module; read together at the end, so the host waits once
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_a_stacked"):
            continue
        if isinstance(layer.lora_a_stacked, Tensor):  # the embedding, which no admitted adapter touches
            holds[name] = ~layer.lora_b_stacked.any()
            continue
        parent, _, fused = name.rpartition(".")
        parts = packed.get(fused, [fused])
        if len(parts) != len(layer.lora_a_stacked):
            raise SwapError(f"{name}: {len(layer.lora_a_stacked)} adapter slices for {len(parts)} parts")
        for part, slot_a, slot_b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            module = f"{parent}.{part}"
            lora_a, lora_b = tensors.get(module, (slot_a.new_zeros(0, 0), slot_b.new_zeros(0, 0)))
            holds[module] = _holds(slot_a[0, 0], lora_a) & _holds(slot_b[0, 0], lora_b)
    if unplaced := tensors.keys() - holds.keys():
        raise SwapError(f"{len(unplaced)} adapter modules have no slot, first {min(unplaced)}")
    in_place_of = torch.stack(list(holds.values())).tolist() if holds else []  # an engine without adapters
    for module, in_place in zip(holds, in_place_of, strict=True):
        if not in_place:
            raise SwapError(f"{module}: the adapter slot on the device is not the adapter")


def _holds(slot: Tensor, wanted: Tensor) -> Tensor:
    """Whether `slot` is `wanted` in its upper left corner, value for value, and zero elsewhere."""
    expected = torch.zeros_like(slot)
    expected[: wanted.shape[0], : wanted.shape[1]] = wanted.to(slot.device)
    return (slot == expected).all()


class OneAdapter:
    """vLLM's adapter arithmetic for an engine of one slot whose batches never mix adapters.

    vLLM's own picks an adapter per token. On a CPU it gathers the adapter's matrices once per token, and
    gives base rows the last slot's adapter when a batch mixes them; on a GPU its kernels are made for
    decoding. With one slot, and every row of a call under the same adapter or none, the same sum is two
    small matrix products.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: object,
    ) -> None:
        """Add `scale * (x A^T) B^T` of every slice to its columns of `y`, in place."""
        if self._wrapper.no_lora:
            return
        start = 0
        for slot_a, slot_b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            if x.is_cuda or slot_b[0, 0].any():  # on a GPU asking would cost more than the products
                y[:, start : start + width].addmm_(x @ slot_a[0, 0].T, slot_b[0, 0].T, alpha=scale)
            start += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *_: object, **__: object
    ) -> None:
        """No admitted adapter touches the embedding; its slot stays zero, which `prove_slot` holds it to."""


def install_one_adapter(model: nn.Module) -> None:
    """Put `OneAdapter` before vLLM's arithmetic in every adapter layer of an engine that is not compiled."""
    for layer in model.modules():
        if hasattr(layer, "lora_a_stacked"):
            setattr(layer, "punica_wrapper", OneAdapter(layer.punica_wrapper))  # noqa: B010 (no parameter)
