"""Full weights on their way into the engine: read in parallel, ahead of their turn where memory allows.

On a GPU the base's stay there too, so that going back to it reads nothing and its weights are at hand.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import cycle
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor, set_num_threads  # by its own name: vLLM replaces torch's on a CPU

from ray_auditor.engine.parameters import Checksum, ParameterMap, SwapError, as_rows, sum_blocks
from ray_auditor.hub import TensorSource, TensorSpec
from ray_auditor.hub.checkpoint import TORCH_DTYPES, iter_tensors, open_tensor

MAX_READERS = 4  # threads; they share the memory bandwidth of one socket
BLOCK_BYTES = 4 << 20  # of 1 MiB the interpreter's time shows, of 8 nothing is gained

Reading = dict[str, Future[Checksum]]


class Kept(NamedTuple):
    """The base, as the live parameters held it."""

    key: str
    tensors: Mapping[str, Tensor]
    checksums: Mapping[str, Checksum]


class Staging:
    """Reads candidates tensor by tensor; at most one ahead, into a second copy of the weights on the device.

    A reader holds two blocks of the host's memory, pinned if they leave for a GPU, and a third where the
    file's dtype is another: BLOCK_BYTES each, or a longer row's. Merging takes one tensor and its parts.
    """

    def __init__(self, places: ParameterMap, budget_bytes: int) -> None:
        """Remember where the live tensors are.

        Args:
            places: The live parameters.
            budget_bytes: Device memory that copies may take: one of what is read ahead comes first, then one
                of the base. A model that needs more, or more than the device has, is not read ahead.
        """
        self._places = places
        # One thread each: a second team of OpenMP's makes the one that computes sleep between its loops.
        num_readers = min(MAX_READERS, max(1, torch.get_num_threads() // 2))
        self._readers = ThreadPoolExecutor(num_readers, "staging", set_num_threads, (1,))
        on_gpu = places.device.type == "cuda"
        self._stream = torch.cuda.Stream(places.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._memory = _Memory(self._stream)
        self._num_copies = budget_bytes // places.num_bytes
        self._copy: dict[str, Tensor] = {}
        self._ahead: tuple[str, Reading] | None = None
        self.waited_s = 0.0  # of the last swap, for its readers
        self._kept: Kept | None = None

    def keep(self, key: str, expected: Mapping[str, Checksum]) -> None:
        """Keep a copy of what the live parameters hold, proven to be `expected`, where a GPU has the room."""
        if self._stream is not None and self._num_copies > 1:
            with suppress(torch.OutOfMemoryError):
                tensors = {name: self._places.rows(name).clone() for name in self._places.slots}
                self._kept = Kept(key, tensors, expected)

    @property
    def kept(self) -> Mapping[str, Tensor] | None:
        """The tensors of `keep`."""
        return self._kept.tensors if self._kept else None

    def read_ahead(self, key: str, specs: Mapping[str, TensorSource]) -> None:
        """Begin to read a candidate while another computes, and return at once; nothing if it does not fit.

        Args:
            key: What `swap` will ask for.
            specs: As `Admitted.tensors` has them.
        """
        is_kept = self._kept is not None and self._kept.key == key
        if not self._num_copies or is_kept or self._ahead is not None:  # another that waits was read first
            return
        if not self._copy:
            try:
                self._copy = {name: torch.empty_like(self._places.rows(name)) for name in self._places.slots}
            except torch.OutOfMemoryError:  # a device has less than the budget: each is read in its turn
                self._num_copies = 0
                return
            if self._stream is not None:  # the memory may have been that of kernels still under way
                self._stream.wait_stream(torch.cuda.current_stream())
        self._ahead = key, self._read(specs, self._copy)

    def swap(self, key: str, specs: Mapping[str, TensorSource]) -> dict[str, Checksum]:
        """Write a candidate over the live parameters, from the copy if it was read ahead.

        Returns:
            Checksum of every tensor as it was read, in the live dtype: what `ParameterMap.prove` takes.

        Raises:
            CandidateError: A file is not the one that was admitted.
            SwapError: A tensor is missing or of another shape.
        """
        begun, self.waited_s = time.perf_counter(), 0.0
        if self._kept and self._kept.key == key:
            for name, tensor in self._kept.tensors.items():
                self._places.rows(name).copy_(tensor)
            return dict(self._kept.checksums)
        if self._ahead is None or self._ahead[0] != key:
            self._drop()
            live = {name: self._places.rows(name) for name in self._places.slots}
            expected = _finish(self._read(specs, live))
            self.waited_s = time.perf_counter() - begun
            return expected
        _, reading = self._ahead
        self._ahead = None
        expected = _finish(reading)
        self.waited_s = time.perf_counter() - begun
        for name, tensor in self._copy.items():
            self._places.rows(name).copy_(tensor)
        return expected

    def close(self) -> None:
        """Wait for the readers, and free the copy and what they read into."""
        self._drop()
        self._readers.shutdown()
        self._copy.clear()
        self._kept = None

    def _drop(self) -> None:
        if self._ahead is not None:
            wait(self._ahead[1].values())
            self._ahead = None

    def _read(self, specs: Mapping[str, TensorSource], targets: Mapping[str, Tensor]) -> Reading:
        if missing := targets.keys() - specs.keys():
            raise SwapError(f"{len(missing)} tensors never came, first {min(missing)}")
        for name, target in targets.items():
            if specs[name].shape != target.shape:
                raise SwapError(f"{name}: got {specs[name].shape} for {tuple(target.shape)}")
        return {
            name: self._readers.submit(self._read_one, specs, name, target)
            for name, target in targets.items()
        }

    def _read_one(self, specs: Mapping[str, TensorSource], name: str, target: Tensor) -> Checksum:
        source, target_RC = specs[name], as_rows(target)
        try:  # on a stream of our own: it does not wait for the forward pass
            with torch.cuda.stream(self._stream):
                if isinstance(source, TensorSpec):
                    return sum_blocks(self._blocks(source, target_RC))
                ((_, merged),) = iter_tensors(specs, [name])
                merged_RC = as_rows(merged.to(target.dtype))
                target_RC.copy_(merged_RC)
                return sum_blocks([merged_RC])
        finally:
            if self._stream is not None:  # whoever failed, too, writes nothing from here on
                self._stream.synchronize()

    def _blocks(self, spec: TensorSpec, target_RC: Tensor) -> Iterator[Tensor]:
        """A file's rows in the live dtype, block by block, each on its way into the target already."""
        dtype, memory = TORCH_DTYPES[spec.dtype], self._memory
        row_bytes = target_RC.shape[1] * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes, target_RC.shape[1] * target_RC.itemsize))
        turns = cycle(memory.turns)
        with open_tensor(spec) as fill:
            for start in range(0, len(target_RC), step):
                target, block = target_RC[start : start + step], next(turns)
                rows = block.room(target.shape, target.dtype)
                read = rows if dtype == target.dtype else memory.unconverted.room(target.shape, dtype)
                fill(start * row_bytes, read)
                if read is not rows:
                    rows.copy_(read)
                block.send(rows, target)
                yield rows


class _Block:
    """Memory that is used again; pinned if it leaves by a stream, and an event then says when it has left."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._stream = stream
        self._left = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor here, of any values, once what was sent last has left."""
        if self._left is not None:
            self._left.synchronize()
        num_bytes = shape.numel() * dtype.itemsize
        if len(self._bytes) < num_bytes:
            size, is_pinned = max(num_bytes, BLOCK_BYTES), self._left is not None
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
        return self._bytes[:num_bytes].view(dtype).view(shape)

    def send(self, rows: Tensor, target: Tensor) -> None:
        """Begin to copy what lies here, on the current stream, which is the block's."""
        target.copy_(rows, non_blocking=True)
        if self._left is not None:
            self._left.record(self._stream)


class _Memory(local):
    """Each reader's own, freed with its thread: two blocks in turn, one is filled while the other leaves."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.turns = _Block(stream), _Block(stream)
        self.unconverted = _Block()


def _finish(reading: Reading) -> dict[str, Checksum]:
    """Every checksum, once no reader writes any more; raises what the first failed reader raised."""
    wait(reading.values())
    return {name: future.result() for name, future in reading.items()}
