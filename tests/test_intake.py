"""What need not be read again, and what comes in while the engine works."""

import hashlib
import io
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from rich.console import Console

from ray_auditor.budget import Limits, Meter
from ray_auditor.config import AuditConfig
from ray_auditor.hub import Admitted, Candidate
from ray_auditor.hub.endpoint import Endpoint
from ray_auditor.hub.fetch import Origin
from ray_auditor.hub.hub_query import HubQuery, pin
from ray_auditor.hub.rate_limit import RateLimit
from ray_auditor.hub.remote import Listed
from ray_auditor.hub.source import Remote, stamp_folder
from ray_auditor.intake import Arrivals, Recall, find_whole
from ray_auditor.ledger import Admission, Audit, Ledger, explain
from ray_auditor.progress_line import say_how_far
from ray_auditor.roster import Row, distinct_name
from ray_auditor.store import Store
from tests.hub.hub_server import HubServer, answer, garble, serving
from tests.test_store import UNIT, make_rows

PARTS = {"base": "b", "sae": "s", "suites": "u", "settings": "k"}


@pytest.mark.parametrize(
    ("before", "content", "parts", "why"),
    [
        (None, "w", {}, "new"),
        (None, None, {}, "new"),
        (Audit("w", "ok", PARTS), "w", {}, "unchanged"),
        (Audit("w", "flagged", PARTS), "v", {}, "changed weights"),
        (Audit("w", "ok", PARTS), "w", {"base": "c"}, "changed base"),
        (Audit("w", "ok", PARTS), "w", {"sae": "t"}, "changed sae"),
        (
            Audit("w", "ok", PARTS),
            "v",
            {"suites": "x", "settings": "y"},
            "changed weights, changed suites, changed settings",
        ),
        (Audit("w", "failed", PARTS), "w", {}, "policy retry"),
        (Audit(None, "deferred", PARTS), "w", {}, "policy retry"),
        (Audit(None, "rejected", PARTS), None, {}, "unchanged"),
        (Audit(None, "rejected", PARTS), "w", {}, "changed weights"),
    ],
)
def test_why_a_candidate_is_where_it_is(
    before: Audit | None, content: str | None, parts: dict[str, str], why: str
) -> None:
    assert explain(before, content, PARTS | parts) == why


def test_a_unit_is_hashed_once_and_again_when_its_file_was_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    units = [replace(UNIT, candidate_key=hashlib.sha256(bytes([i])).hexdigest()) for i in range(3)]
    for unit in units:
        store.commit(unit, make_rows(), {})
    looked: list[str] = []
    has = Store.has
    monkeypatch.setattr(Store, "has", lambda self, key: looked.append(key) or has(self, key))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert find_whole(store, ledger) == {unit.key for unit in units}
        assert len(looked) == 3
        assert find_whole(store, ledger) == {unit.key for unit in units}
        assert len(looked) == 3
        (shard,) = (store.root / "shards").glob(f"{units[1].key}-*")
        status = shard.stat()
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as one who hides it would
        assert find_whole(store, ledger) == {units[0].key, units[2].key}
        assert looked[3:] == [units[1].key]
        ledger.forget_stamps()
        find_whole(store, ledger)
        assert len(looked) == 4 + 3


def test_a_ledger_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(
        ValueError, match=r"out_dir must hold a ledger of ours, got .*ledger\.sqlite: .* delete it"
    ):
        Ledger(tmp_path / "ledger.sqlite")


def test_what_admission_said_is_remembered_for_the_same_rules_only(tmp_path: Path) -> None:
    said = Admission("admitted", None, "adapter", "w", ("a note",), "org/base")
    with Ledger(tmp_path / "l") as ledger:
        ledger.keep_admission("files", "rules", said)
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.admission("files", "rules") == said
        assert ledger.admission("files", "other rules") is None
        assert ledger.admission("other files", "rules") is None
        recall = Recall(ledger, UNIT, "rules", set())
        recall.remember("gone", Row("x", None, "deferred", "deferred:stall: x", None))
        assert ledger.admission("gone", "rules") is None  # another look may find something else


def test_a_folder_is_known_by_its_stamp_until_somebody_touches_it(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(b"one")
    assert stamp_folder(folder) is None  # too fresh: a change within the clock's tick would not show
    time.sleep(2.1)
    stamp = stamp_folder(folder)
    assert stamp is not None
    assert stamp_folder(folder) == stamp
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    time.sleep(2.1)
    assert stamp_folder(folder) not in (stamp, None)


def test_no_two_rows_share_a_name_whatever_a_hub_calls_its_authors() -> None:
    taken: set[str] = set()
    names = ["null/x", "a", "null/x~2", "null/x", "null/x"]  # an author, a name that prints so, null members
    assert [distinct_name(name, taken) for name in names] == [
        "null/x",
        "a",
        "null/x~2",
        "null/x~3",
        "null/x~4",
    ]


def test_long_loops_say_how_far_they_are_and_short_ones_nothing() -> None:
    said = io.StringIO()
    console = Console(file=said)
    times = iter(range(0, 100, 4))
    found = say_how_far(range(8), "listed", console=console, clock=lambda: float(next(times)))
    assert list(found) == list(range(8))
    assert said.getvalue().splitlines() == ["2 listed, 12 s", "5 listed, 24 s"]
    assert list(say_how_far(range(8), "listed", console=Console(file=(quiet := io.StringIO())))) == [
        *range(8)
    ]
    assert not quiet.getvalue()


NUM, BYTES = 8, 200_000


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(HubServer()) as server:
        for i in range(NUM):
            server.add(f"org/m{i}", {"config.json": b"{}", "model.safetensors": os.urandom(BYTES)})
        server.add("org/m3-again", server.repos["org/m3"].commits[-1][1])
        yield server


def make_arrivals(hub: HubServer, tmp_path: Path, ledger: Ledger, meter: Meter, **download: Any) -> Arrivals:
    """Everything the hub has, to be fetched; admission keeps a unit of its own for every content."""
    limit = RateLimit()
    endpoint = Endpoint(hub.url, None, limit)
    pending = [pin(Listed(name, name), endpoint, max_candidate_bytes=1 << 30) for name in hub.repos]
    query: Any = HubQuery.__new__(HubQuery)
    config = AuditConfig(out_dir=str(tmp_path))
    config.download = replace(config.download, min_free_bytes=0, max_attempts=2, **download)

    def admit(candidate: Candidate) -> tuple[Row, Admitted | None]:
        content = hashlib.sha256((candidate.path / "model.safetensors").read_bytes()).hexdigest()
        unit = replace(UNIT, candidate_key=content)
        admitted = Admitted(candidate, content, {}, None, ())
        return Row(candidate.id, "full", "admitted", None, unit), admitted

    recall = Recall(ledger, UNIT, "rules", set())
    return Arrivals(pending, Remote(query, Origin(hub.url), limit, endpoint), recall, admit, config, meter)


def test_candidates_come_in_through_a_cache_smaller_than_they_are(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("org/m5/resolve", *[answer(404, X_Error_Code="EntryNotFound")] * 9)
    names = list(hub.repos)
    seen: dict[str, bytes] = {}

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        arrivals = make_arrivals(
            hub,
            tmp_path,
            ledger,
            Meter(Limits(), 1),
            max_cache_bytes=int(2.5 * BYTES),
            num_parallel=3,
        )
        pending = arrivals.pending
        assert arrivals.num_bytes == NUM * BYTES + len(b"{}")
        assert len(arrivals.groups()) == NUM
        for stage in arrivals.stages():
            time.sleep(0.1)  # the engine works; what it reads must stay
            for task in stage:
                assert task.candidate is not None
                folder = task.candidate.candidate.path
                seen[task.name] = (folder / "model.safetensors").read_bytes()
            blobs = [path.stat().st_size for path in (tmp_path / "cache" / "blobs").iterdir()]
            assert sum(blobs) <= 2.5 * BYTES
        assert ledger.admission(pending[0].key, "rules") is not None
    wanted = {name: hub.repos[name].commits[-1][1]["model.safetensors"] for name in names}
    assert seen == {name: data for name, data in wanted.items() if name not in ("org/m5", "org/m3-again")}
    assert {name: row.status for name, row in arrivals.rows.items()} == {
        name: "deferred" if name == "org/m5" else "admitted" for name in names
    }
    assert arrivals.rows["org/m3"].unit == arrivals.rows["org/m3-again"].unit
    assert hub.count("org/m3-again/resolve") == 0


def test_downloads_stop_at_the_budget_whatever_the_plan_expected(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("model.safetensors", garble)  # the first one: moved in vain
    hub.fault("org/m1/resolve/", answer(503))  # which moves nothing
    limits = Limits(num_bytes=3 * BYTES + 100, given={"max_download_bytes": 3 * BYTES + 100})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        arrivals = make_arrivals(hub, tmp_path, ledger, Meter(limits, 1), num_parallel=1)
        assert [task.name for stage in arrivals.stages() for task in stage] == ["org/m0", "org/m1"]
        rate = ledger.fact("fetch_rate")
        assert rate is not None
        assert float(rate) > 0
    sent = sum(hub.bytes_sent.values())
    assert 3 * BYTES <= sent <= 3 * BYTES + 100
    rows = arrivals.rows
    assert rows["org/m2"].reason == (
        f"deferred:max_download_bytes: downloads use up budget.max_download_bytes={3 * BYTES + 100}"
    )
    assert {rows[f"org/m{i}"].status for i in range(2, NUM)} == {"deferred"}


def test_what_is_in_the_cache_is_not_moved_again(hub: HubServer, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        arrivals = make_arrivals(hub, tmp_path, ledger, Meter(Limits(), 1))
        for _ in arrivals.stages():
            pass
        again = make_arrivals(hub, tmp_path, ledger, Meter(Limits(num_bytes=0.0), 1))
        assert again.num_bytes == 0
        assert sum(len(stage) for stage in again.stages()) == NUM
