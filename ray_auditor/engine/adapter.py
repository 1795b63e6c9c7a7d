"""A LoRA adapter beside the live weights: two small matrix products in every layer that it changes."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn, set_num_threads

from ray_auditor.engine.parameters import ParameterMap, SwapError
from ray_auditor.hub import Admitted, LoraSpec, TensorSource
from ray_auditor.hub.checkpoint import iter_tensors

PLACE = "ray_auditor_adapter"  # attribute of a layer: its slices
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


class AdapterReader:
    """Reads adapters; at most one ahead of its turn, into host memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Read for layers of a numeric type."""
        self._dtype = dtype
        self._thread = ThreadPoolExecutor(1, "adapter", set_num_threads, (1,))
        self._ahead: tuple[str, Future[AdapterTensors]] | None = None

    def read_ahead(self, candidate: Admitted) -> None:
        """Begin to read an adapter, and return at once; nothing while another waits for its turn."""
        if self._ahead is None:
            self._ahead = candidate.content_sha256, self._thread.submit(self._read, candidate)

    def take(self, candidate: Admitted) -> AdapterTensors:
        """An adapter's tensors, once they are read.

        Raises:
            CandidateError: A file is not the one that was admitted.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == candidate.content_sha256:
            return ahead[1].result()
        return self._read(candidate)

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()
        self._ahead = None

    def _read(self, candidate: Admitted) -> AdapterTensors:
        assert candidate.lora is not None
        return read_adapter(candidate.lora, candidate.tensors, self._dtype)


@dataclass(frozen=True)
class AdapterSlice:
    """What one adapted module adds to a layer, which may hold several modules fused."""

    module: str
    start: int  # first output column
    lora_A: Tensor  # [r, in], on the device
    lora_B: Tensor  # [out, r], scaling included


def slices_of(layer: nn.Module) -> Sequence[AdapterSlice]:
    """What the live adapter adds to a layer."""
    parts: Sequence[AdapterSlice] = layer.__dict__.get(PLACE, ())
    return parts


def put_adapter(model: nn.Module, places: ParameterMap, tensors: AdapterTensors) -> None:
    """Add an adapter to the live model.

    Args:
        model: The live one.
        places: Where the modules' weights lie in it.
        tensors: Empty: none.

    Raises:
        SwapError: A module has no place in the model, or another shape there.
    """
    copies = _in_one_copy([tensor for pair in tensors.values() for tensor in pair], places.device)
    for at, (module, (lora_A, lora_B)) in enumerate(tensors.items()):
        slot = places.slots.get(f"{module}.weight")
        if slot is None:
            raise SwapError(f"{module} is adapted and has no place in the model")
        layer = model.get_submodule(slot.parameter.rpartition(".")[0])
        if not getattr(getattr(layer, "quant_method", None), "adds_slices", False):
            raise SwapError(f"{module} is adapted and is no linear layer of ours")
        if (slot.num_rows, places.rows(f"{module}.weight").shape[1]) != (len(lora_B), lora_A.shape[1]):
            raise SwapError(f"{module} is adapted as {tuple(lora_B.shape)} x {tuple(lora_A.shape)}")
        part = AdapterSlice(module, slot.start, copies[2 * at], copies[2 * at + 1])
        layer.__dict__.setdefault(PLACE, []).append(part)


def _in_one_copy(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on a device, as one block: each of many small copies would be waited for."""
    if not tensors:
        return []
    block = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    parts = torch.split(block, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def drop_adapter(model: nn.Module) -> None:
    """Leave the live model as its weights alone make it."""
    for layer in model.modules():
        layer.__dict__.pop(PLACE, None)


@torch.no_grad()
def prove_adapter(model: nn.Module, places: ParameterMap, tensors: AdapterTensors) -> None:
    """Hold what every layer adds to the adapter, value for value: all of it, once, where it belongs.

    Raises:
        SwapError: A slice on the device differs, is missing, is elsewhere, or is of no module of the adapter.
    """
    found = [(name, part) for name, layer in model.named_modules() for part in slices_of(layer)]
    slots = [(module, places.slots[f"{module}.weight"]) for module in tensors]
    wanted = sorted((slot.parameter.rpartition(".")[0], module, slot.start) for module, slot in slots)
    live = sorted((name, part.module, part.start) for name, part in found)
    if live != wanted:
        odd = set(live) ^ set(wanted) or {one for one in live if live.count(one) > 1}
        raise SwapError(f"the live adapter differs in {min(odd)}")
    pairs = [
        (part.module, live, read)
        for _, part in found
        for live, read in zip((part.lora_A, part.lora_B), tensors[part.module], strict=True)
    ]
    copies = _in_one_copy([read for *_, read in pairs], places.device)
    same = [(live == copy).all() for (_, live, _), copy in zip(pairs, copies, strict=True)]
    for (module, *_), in_place in zip(pairs, torch.stack(same).tolist() if same else [], strict=True):
        if not in_place:
            raise SwapError(f"{module}: the adapter on the device is not the candidate's")
