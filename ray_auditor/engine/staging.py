"""Full weights on their way into the engine: read in parallel, ahead of their turn where memory allows.

On a GPU the base's stay there too, so that going back to it reads nothing and its weights are at hand.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor, set_num_threads  # by its own name: vLLM replaces torch's on a CPU

from ray_auditor.engine.parameters import Checksum, ParameterMap, SwapError, checksums
from ray_auditor.hub import TensorSource
from ray_auditor.hub.checkpoint import iter_tensors

MAX_READERS = 4  # threads; they share the memory bandwidth of one socket

Reading = dict[str, Future[Checksum]]


class Kept(NamedTuple):
    """The base, as the live parameters held it."""

    key: str
    tensors: Mapping[str, Tensor]
    checksums: Mapping[str, Checksum]


class Staging:
    """Reads candidates tensor by tensor; at most one ahead, into a second copy of the weights on the device.

    The host holds one tensor a reader at any time, however large the candidate is.
    """

    def __init__(self, places: ParameterMap, budget_bytes: int) -> None:
        """Remember where the live tensors are.

        Args:
            places: The live parameters.
            budget_bytes: Device memory that copies may take: one of what is read ahead comes first, then one
                of the base. A model that needs more is not read ahead.
        """
        self._places = places
        # One thread each: a second team of OpenMP's makes the one that computes sleep between its loops.
        num_readers = min(MAX_READERS, max(1, torch.get_num_threads() // 2))
        self._readers = ThreadPoolExecutor(num_readers, "staging", set_num_threads, (1,))
        on_gpu = places.device.type == "cuda"
        self._stream = torch.cuda.Stream(places.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._num_copies = budget_bytes // places.num_bytes
        self._copy: dict[str, Tensor] = {}
        self._ahead: tuple[str, Reading] | None = None
        self.waited_s = 0.0  # of the last swap, for its readers
        self._kept: Kept | None = None

    def keep(self, key: str, expected: Mapping[str, Checksum]) -> None:
        """Keep a copy of what the live parameters hold, proven to be `expected`, where a GPU has the room."""
        if self._stream is not None and self._num_copies > 1:
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
            self._copy = {name: torch.empty_like(self._places.rows(name)) for name in self._places.slots}
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
        """Wait for the readers and free the copy."""
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
        return {
            name: self._readers.submit(self._read_one, specs, name, target)
            for name, target in targets.items()
        }

    def _read_one(self, specs: Mapping[str, TensorSource], name: str, target: Tensor) -> Checksum:
        ((_, tensor),) = iter_tensors(specs, [name])
        if tensor.shape != target.shape:
            raise SwapError(f"{name}: got {tuple(tensor.shape)} for {tuple(target.shape)}")
        tensor = tensor.to(target.dtype)
        (expected,) = checksums([tensor])
        with torch.cuda.stream(self._stream):  # a stream of our own: it does not wait for the forward pass
            target.copy_(tensor)
        if self._stream is not None:
            self._stream.synchronize()
        return expected


def _finish(reading: Reading) -> dict[str, Checksum]:
    """Every checksum, once no reader writes any more; raises what the first failed reader raised."""
    wait(reading.values())
    return {name: future.result() for name, future in reading.items()}
