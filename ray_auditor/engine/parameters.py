"""Where each checkpoint tensor lies in the live model; writing it there, and proving that it lies there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK_NUMEL = 1 << 20

Checksum = tuple[int, int]


class SwapError(RuntimeError):
    """The live model does not hold what it should: its state is unknown and the engine must be discarded."""


@dataclass(frozen=True)
class Slot:
    """Rows of one parameter that hold one checkpoint tensor (fused layers hold several)."""

    parameter: str
    start: int
    num_rows: int


def checksum(tensor: Tensor) -> Checksum:
    """Sum and position-weighted sum, modulo 2^64, of a tensor's bit patterns.

    Any single changed value changes the first; exchanged values or rows change the second. It runs where
    the tensor lies, in chunks, so only two numbers leave the device. Not a defence against a chosen
    collision: the bytes themselves are held to a SHA-256 when they are read.

    Args:
        tensor: Any dtype of 2 or 4 bytes, any shape, any device.
    """
    bits = tensor.detach().reshape(-1)
    bits = bits.view(torch.int16 if bits.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    weighted = torch.zeros_like(total)
    positions = torch.arange(1, min(CHUNK_NUMEL, bits.numel()) + 1, device=bits.device)
    for number, chunk in enumerate(torch.split(bits, CHUNK_NUMEL), start=1):
        words = chunk.to(torch.int64)
        total += words.sum() * number
        weighted += (words * positions[: words.numel()]).sum() * number
    return int(total.item()), int(weighted.item())


class ParameterMap:
    """Checkpoint tensor name -> rows of a live parameter, for unquantised models on one device."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
        """Find every tensor of `shapes` in `model` and check that together they cover every parameter.

        Raises:
            SwapError: A tensor has no parameter, a parameter is not covered, or a shape disagrees.
        """
        self._parameters = {
            name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()
        }
        self.packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        self.slots = {name: self._locate(name, shapes) for name in shapes}
        covered = dict.fromkeys(self._parameters, 0)
        for slot in self.slots.values():
            covered[slot.parameter] += slot.num_rows
        for name, num_rows in covered.items():
            parameter = self._parameters[name]
            padded_vocabulary = "embed_tokens" in name and 0 < num_rows < parameter.shape[0]
            if num_rows != parameter.shape[0] and not padded_vocabulary:
                raise SwapError(f"{name} has {parameter.shape[0]} rows and the checkpoint fills {num_rows}")

    def _locate(self, name: str, shapes: Mapping[str, Sequence[int]]) -> Slot:
        module, _, leaf = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        target, start = name, 0
        for fused, parts in self.packed.items():
            if part in parts:
                before = [f"{parent}.{earlier}.{leaf}" for earlier in parts[: parts.index(part)]]
                target, start = f"{parent}.{fused}.{leaf}", sum(shapes[earlier][0] for earlier in before)
        parameter = self._parameters.get(target)
        if parameter is None or tuple(parameter.shape[1:]) != tuple(shapes[name][1:]):
            found = None if parameter is None else tuple(parameter.shape)
            raise SwapError(f"{name} {tuple(shapes[name])} has no place in {target}: {found}")
        return Slot(target, start, shapes[name][0])

    def rows(self, name: str) -> Tensor:
        """The live rows that hold tensor `name`."""
        slot = self.slots[name]
        return self._parameters[slot.parameter].data[slot.start : slot.start + slot.num_rows]

    @property
    def dtype(self) -> torch.dtype:
        """Numeric type of the live parameters."""
        return next(iter(self._parameters.values())).dtype

    @torch.no_grad()
    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Checksum]:
        """Copy tensors into place; return what `expect` returns.

        Raises:
            SwapError: As `expect`.
        """
        return self._take(tensors, copy=True)

    @torch.no_grad()
    def expect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Checksum]:
        """The checksum each parameter must have, taken from the checkpoint's tensors in the live dtype.

        Raises:
            SwapError: Not every tensor of the map came, one came twice, or a shape differs.
        """
        return self._take(tensors, copy=False)

    def _take(self, tensors: Iterable[tuple[str, Tensor]], *, copy: bool) -> dict[str, Checksum]:
        expected: dict[str, Checksum] = {}
        for name, tensor in tensors:
            rows = self.rows(name)
            if tensor.shape != rows.shape or name in expected:
                raise SwapError(f"{name}: got {tuple(tensor.shape)} for {tuple(rows.shape)}, or got it twice")
            tensor = tensor.to(rows.dtype)
            expected[name] = checksum(tensor)
            if copy:
                rows.copy_(tensor)
        if missing := self.slots.keys() - expected.keys():
            raise SwapError(f"{len(missing)} tensors never came, first {min(missing)}")
        return expected

    def prove(self, expected: Mapping[str, Checksum]) -> None:
        """Hold every parameter, as it now lies on the device, to the checksums of `write`.

        Raises:
            SwapError: A parameter differs; names the first one.
        """
        for name, wanted in expected.items():
            if (found := checksum(self.rows(name))) != wanted:
                raise SwapError(f"{name} on the device has checksum {found}, the checkpoint {wanted}")
