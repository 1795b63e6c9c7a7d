"""What every fault's test uses: a hub of folders, its outcomes, and a hub on loopback that misbehaves."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
for folder in (TESTS / "faults", TESTS / "hub", TESTS.parent / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from audit_hook import audit_events  # noqa: E402
from hub_folders import NUM_LAYERS, Hub  # noqa: E402

from ray_auditor.hub import Candidate, CandidateError, admit, list_folder  # noqa: E402

__all__ = ["audit_events"]
_SLUG = re.compile(r"([a-z_ ]+): .*", re.DOTALL)


class Faults(Hub):
    """A hub of folders whose candidates are all looked at."""

    def outcomes(self) -> dict[str, str]:
        """By candidate: `ok`, `ok, NOTE`, or `status:code`."""
        found, base = {}, self.base
        for one in list_folder(self.root):
            try:
                if not isinstance(one, Candidate):
                    found[one.id] = one.reason.partition(": ")[0]
                    continue
                admitted = admit(one, base, num_layers=NUM_LAYERS, max_lora_rank=16)
            except CandidateError as error:
                found[one.id] = f"{error.status}:{error.code}"
            else:
                slugs = [m[1] if (m := _SLUG.fullmatch(note)) else "noted" for note in admitted.notes]
                found[one.id] = ", ".join(["ok", *slugs])
        return found

    @property
    def outcome(self) -> str:
        """Of the one candidate there is."""
        (outcome,) = self.outcomes().values()
        return outcome


@pytest.fixture
def hub(tmp_path: Path) -> Faults:
    return Faults(tmp_path)


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Call it with every outcome; at the end they must be the row's, all of them and no other."""
    outcomes: list[str] = []
    yield outcomes.append
    assert set(outcomes) == set(request.function.fault.seen)
