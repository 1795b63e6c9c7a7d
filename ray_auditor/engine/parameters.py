"""Where each checkpoint tensor lies in the live model, and proving that it lies there."""

# Shape suffixes: R rows of a tensor, C words of a row (of 8 bytes where its length allows, else 4 or 2).

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Checksum = tuple[int, int]

CHUNK_WORDS = 1 << 16  # what stays in a core's cache while both sums read it
STACK_WORDS = 1 << 24  # summed together on a device: 128 MiB, and as much beside it
FOLD = 33  # a word's upper half is added to its lower: two changes of the highest bit would else cancel
WORDS = (torch.int64, torch.int32, torch.int16)  # the wider, the fewer additions
ROW_WEIGHT = 0x9E3779B97F4A7C15 - (1 << 64)  # odd and spread over 64 bits, so rows never weigh like columns


class SwapError(RuntimeError):
    """The live model does not hold what it should: its state is unknown and the engine must be discarded."""


@dataclass(frozen=True)
class Slot:
    """Rows of one parameter that hold one checkpoint tensor (fused layers hold several)."""

    parameter: str
    start: int
    num_rows: int


def checksums(tensors: Sequence[Tensor]) -> list[Checksum]:
    """Sum and position-weighted sum, modulo 2^64, of each tensor's bit patterns.

    Any single changed value changes the first; exchanged values or rows change the second. What keeps every
    row's and every column's sum is not seen (+1, -2, +1 on neighbours, a rectangle's corners exchanged): no
    fault of a copy does that. The sums are taken where the tensors lie and leave a device all together, so
    the host waits once. Not a defence against a chosen collision: the bytes themselves are held to a SHA-256
    when they are admitted.

    Args:
        tensors: Dtypes of 2 or 4 bytes, any shape, all on one device.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return [sum_blocks([as_rows(tensor)]) for tensor in tensors]
    return device_sums([_words(as_rows(tensor)) for tensor in tensors])


def as_rows(tensor: Tensor) -> Tensor:
    """The matrix whose rows and columns weigh: the first dimension by all others; a vector is one row."""
    if not tensor.numel():
        return tensor.detach().reshape(0, 1)
    return tensor.detach().reshape(len(tensor) if tensor.dim() > 1 else 1, -1)


def _words(rows: Tensor) -> Tensor:
    kind = next(kind for kind in WORDS if rows.shape[1] * rows.element_size() % kind.itemsize == 0)
    if rows.storage_offset() * rows.element_size() % kind.itemsize:
        rows = rows.clone()
    return rows.view(kind)


def device_sums(words: Sequence[Tensor]) -> list[Checksum]:
    """The definition, in torch; tensors of one shape together, for launching costs more than summing."""
    alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for at, words_RC in enumerate(words):
        alike.setdefault((words_RC.dtype, words_RC.shape), []).append(at)
    longest = max(max(words_RC.shape) for words_RC in words)
    column_weight = torch.arange(1, longest + 1, device=words[0].device)
    row_weight = column_weight * ROW_WEIGHT
    order, parts = [], []
    for (_, (num_rows, num_columns)), group in alike.items():
        step = max(1, STACK_WORDS // max(1, num_rows * num_columns))
        for some in (group[start : start + step] for start in range(0, len(group), step)):
            words_BRC = torch.stack([words[at] for at in some]) if len(some) > 1 else words[some[0]][None]
            columns_BC, rows_BR = _sums_on_device(words_BRC)
            weighted_B = (columns_BC * column_weight[:num_columns]).sum(1)
            weighted_B += (rows_BR * row_weight[:num_rows]).sum(1)
            parts.append(torch.stack([columns_BC.sum(1), weighted_B], 1))
            order += some
    found = dict(zip(order, torch.cat(parts).tolist(), strict=True))  # the host waits once
    return [(found[at][0], found[at][1]) for at in range(len(words))]


def _sums_on_device(words_BRC: Tensor) -> tuple[Tensor, Tensor]:
    """Of columns `[B, C]` and of rows `[B, R]`, some rows at a time: a vocabulary's matrix has a gigabyte."""
    num_stacked, _, num_columns = words_BRC.shape
    columns_BC, rows = words_BRC.new_zeros(num_stacked, num_columns, dtype=torch.int64), []
    for part in torch.split(words_BRC, max(1, STACK_WORDS // max(1, num_stacked * num_columns)), dim=1):
        folded = (part.long() >> FOLD).add_(part)
        columns_BC += folded.sum(1)
        rows.append(folded.sum(2))
    return columns_BC, torch.cat(rows, 1)


def sum_blocks(blocks: Iterable[Tensor]) -> Checksum:
    """The same numbers, of one tensor in the host's memory that comes block by block.

    Args:
        blocks: Its `as_rows`, some whole rows at a time; one is summed before the next is asked for.
    """
    columns_C, sums_R = np.zeros(1, np.int64), [np.zeros(0, np.int64)]
    for rows in blocks:
        block_C, block_R = _sums_on_host(_words(rows).numpy())
        columns_C = columns_C + block_C
        sums_R.append(block_R)
    rows_R = np.concatenate(sums_R)
    weighted_C = columns_C * np.arange(1, len(columns_C) + 1)
    weighted_R = rows_R * (np.arange(1, len(rows_R) + 1) * np.int64(ROW_WEIGHT))
    return int(columns_C.sum()), int(np.concatenate([weighted_C, weighted_R]).sum())


def _sums_on_host(words_RC: NDArray[np.signedinteger]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of columns and of rows, by chunks: torch's integer sums on a CPU read their input six times slower."""
    num_rows, num_columns = words_RC.shape
    columns_C, rows_R = np.zeros(num_columns, np.int64), np.empty(num_rows, np.int64)
    step = max(1, CHUNK_WORDS // max(num_columns, 1))
    memory = np.empty((min(step, num_rows), num_columns), np.int64)
    for start in range(0, num_rows, step):
        chunk = words_RC[start : start + step]
        folded = np.right_shift(chunk, FOLD, out=memory[: len(chunk)], dtype=np.int64)
        folded += chunk
        columns_C += folded.sum(0)
        rows_R[start : start + step] = folded.sum(1)
    return columns_C, rows_R


class ParameterMap:
    """Checkpoint tensor name -> rows of a live parameter, for unquantised models on one device."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
        """Find every tensor of `shapes` in `model` and check that together they cover every parameter.

        Raises:
            SwapError: A tensor has no parameter, a parameter is not covered, or a shape disagrees.
        """
        self._parameters = dict(model.named_parameters())
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

    @property
    def device(self) -> torch.device:
        """Where the live parameters lie."""
        return next(iter(self._parameters.values())).device

    @property
    def num_bytes(self) -> int:
        """Size of all the tensors in the live dtype."""
        return sum(rows.numel() * rows.element_size() for rows in map(self.rows, self.slots))

    def prove(self, expected: Mapping[str, Checksum]) -> None:
        """Hold every parameter, as it now lies on the device, to the checksums of the file's tensors.

        Raises:
            SwapError: A parameter differs, or has no checksum to be held to; names the first one.
        """
        if missing := self.slots.keys() - expected.keys():
            raise SwapError(f"{len(missing)} tensors never came, first {min(missing)}")
        found = checksums([self.rows(name) for name in expected])
        for (name, wanted), sums in zip(expected.items(), found, strict=True):
            if sums != wanted:
                raise SwapError(f"{name} on the device has checksum {sums}, the checkpoint {wanted}")
