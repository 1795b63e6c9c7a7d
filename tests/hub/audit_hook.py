"""What the interpreter was asked to do while a test looked."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# An audit hook cannot be removed; it records while a test asks for it.
_recording: list[tuple[str, tuple[Any, ...]]] | None = None


def _record(event: str, args: tuple[Any, ...]) -> None:
    if _recording is not None:
        _recording.append((event, args))


sys.addaudithook(_record)


@pytest.fixture
def audit_events() -> Iterator[Callable[[], list[tuple[str, tuple[Any, ...]]]]]:
    """Call it to start recording; the list it returns fills until the test ends."""

    def start() -> list[tuple[str, tuple[Any, ...]]]:
        global _recording
        _recording = []
        return _recording

    yield start
    global _recording
    _recording = None
