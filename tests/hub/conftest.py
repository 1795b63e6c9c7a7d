"""Fixtures of the hub: a folder of candidates beside a base, and what the interpreter was asked to do."""

from pathlib import Path

import pytest
from audit_hook import audit_events
from hub_folders import Hub

__all__ = ["audit_events"]


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)
