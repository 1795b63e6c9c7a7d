"""Seconds that a device spends on a part of its work, without making the host wait for it."""

import time
from types import TracebackType
from typing import Any

import torch


class DeviceClock:
    """Times every `with` block; on a GPU between two events of the current stream.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark()

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def forget(self) -> None:
        """Drop all blocks so far, finished on the device or not."""
        self._marks.clear()

    def take(self) -> float:
        """Seconds of all blocks since the last call; on a GPU the caller has waited for the device."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks.clear()
        if self._on_gpu:
            return float(sum(begun.elapsed_time(ended) for begun, ended in pairs)) / 1000
        return float(sum(ended - begun for begun, ended in pairs))
