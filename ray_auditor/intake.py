"""Finetunes whose bytes need not be read tonight, and those whose bytes are not here yet.

A sweep's plan asks `recall` first: what the ledger knows, and the store has, is a row without opening a file.
What is left and lies elsewhere comes in through `Arrivals`, while the engine works on what came before.
"""

import json
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue

from ray_auditor.budget import Meter
from ray_auditor.config import AuditConfig
from ray_auditor.hub import Admitted, BaseModel, Candidate, CandidateError, Refused
from ray_auditor.hub.cache import Cache, bytes_to_move
from ray_auditor.hub.fetch import Fetcher
from ray_auditor.hub.remote import Pinned, RemoteFile
from ray_auditor.hub.source import Remote, stamp_folder
from ray_auditor.ledger import Admission, Ledger, admission_class
from ray_auditor.progress_line import say_how_far
from ray_auditor.roster import Row
from ray_auditor.store import Store, Unit
from ray_auditor.worker import Assignment

LASTING = ("admitted", "rejected", "skipped")  # what the same files will be the next time, too
UNVERIFIED = "read in ranges: that its bytes are those of the commit is the hub's word, held to no hash"
NOT_YET = "deferred:not_fetched: the sweep ended before its files were here"

FETCH_RATE = "fetch_rate"  # the fact that holds bytes a second of the last sweep that moved any

Landed = tuple[list[Pinned], Path | Exception, ExitStack]
Admit = Callable[[Candidate], tuple[Row, Admitted | None]]


def find_whole(store: Store, ledger: Ledger) -> set[str]:
    """Keys of the units that are committed and whole.

    A unit's files are hashed once; as long as nobody touches them, a look from outside is enough. Whoever
    reads the rows hashes them again.
    """
    stamps, known = store.list_stamps(), ledger.stamps()
    looked_at = say_how_far(stamps.items(), f"of {len(stamps)} units found whole")
    whole = {key: stamp for key, stamp in looked_at if known.get(key) == stamp or store.has(key)}
    ledger.keep_stamps({key: stamp for key, stamp in whole.items() if known.get(key) != stamp})
    return set(whole)


@dataclass(frozen=True)
class Recall:
    """What is known without reading bytes.

    Args:
        ledger: What earlier sweeps found out.
        base_unit: The base's unit of this sweep.
        admission_class: What admission depends on besides the files.
        whole: Units that need not be computed: committed, or refused by what they did.
    """

    ledger: Ledger
    base_unit: Unit
    admission_class: str
    whole: set[str]

    def row(self, found: Candidate | Pinned | Refused) -> tuple[Row | None, str | None]:
        """The row of a finetune whose bytes need not be read, and the key to remember it by."""
        if isinstance(found, Refused):
            return None, None
        key = found.key if isinstance(found, Pinned) else stamp_folder(found.path)
        known = self.ledger.admission(key, self.admission_class) if key else None
        if known is None:
            return None, key
        unit = replace(self.base_unit, candidate_key=known.content) if known.content else None
        if unit is not None and unit != self.base_unit and unit.key not in self.whole:
            return None, key
        return (
            Row(found.id, known.kind, known.status, known.reason, unit, known.notes, known.declared_base),
            key,
        )

    def contents(self, pinned: Iterable[Pinned]) -> dict[str, list[str]]:
        """By id, what identified these files' weights in earlier sweeps, whatever their other inputs."""
        return {one.id: self.ledger.contents(one.key) for one in pinned}

    def remember(self, key: str | None, row: Row) -> None:
        """Keep what admission said, unless another look may find something else."""
        if key is not None and row.status in LASTING:
            content = row.unit.candidate_key if row.unit else None
            kept = Admission(row.status, row.reason, row.kind, content, row.notes, row.declared_base)
            self.ledger.keep_admission(key, self.admission_class, kept)


def admission_class_of(base: BaseModel, num_layers: int, max_lora_rank: int) -> str:
    """What `admit` depends on besides the files."""
    return admission_class([base.key, num_layers, max_lora_rank])


def waiting_row(pinned: Pinned) -> Row:
    """The row of a candidate until its files are here."""
    return Row(pinned.id, pinned.kind, "deferred", NOT_YET, None)


@dataclass
class Arrivals:
    """Candidates on their way here: fetched in the background, admitted and handed over a stage at a time.

    A stage is what has arrived when the one before is done, so bytes move while the engine computes. What the
    engine reads is pinned in the cache until its stage is over, and then makes room when room is needed.

    Args:
        pending: What to fetch; the same files under several names are fetched once.
        remote: Where from.
        recall: What to remember of them.
        admit: Makes a row of a folder.
        config: Bounds of the cache and of the downloads.
        meter: What they may use; a sweep's own.
        claim: Adds to an admitted row what its source says of it.
        range_share: The share of full weights that is expected to be wanted when they are read in ranges.
    """

    pending: Sequence[Pinned]
    remote: Remote
    recall: Recall
    admit: Admit
    config: AuditConfig
    meter: Meter
    range_share: float = 1.0
    claim: Callable[[Row, Pinned], Row] = lambda row, _: row
    rows: dict[str, Row] = field(default_factory=dict)  # by id; grows with every stage
    fetch_s: float = 0.0  # of all downloads
    fetched_bytes: int = 0

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes to move, by hash, of every file that is not in the cache yet."""
        return self.files_of(self.pending)

    def files_of(self, pending: Iterable[Pinned]) -> dict[str, int]:
        """The same for some of the candidates."""
        files = {file.blob: file for one in pending for file in one.files}
        missing = ((name, self._bytes_to_move(file)) for name, file in files.items())
        return {name: num_bytes for name, num_bytes in missing if num_bytes}

    def _bytes_to_move(self, file: RemoteFile) -> int:
        return bytes_to_move(cache_root(self.config), file, self.range_share)

    def _ask_to_move(self, file: RemoteFile, needed: int | None) -> int:
        granted = self._bytes_to_move(file) if needed is None else needed
        self.meter.move(granted)
        return granted

    @property
    def num_bytes(self) -> int:
        """All there is to move."""
        return sum(self.files.values())

    def without(self, keys: Container[str]) -> "Arrivals | None":
        """The same without the candidates whose files have one of these keys; None when none is left."""
        pending = [one for one in self.pending if one.key not in keys]
        return replace(self, pending=pending) if pending else None

    def groups(self) -> list[list[Pinned]]:
        """Candidates with the same files together."""
        groups: dict[str, list[Pinned]] = {}
        for pinned in self.pending:
            groups.setdefault(pinned.key, []).append(pinned)
        return list(groups.values())

    def stages(self) -> Generator[list[Assignment], None, None]:
        """Assignments whose files are here; the caller is done with a stage when it asks for the next.

        Raises:
            ValueError: The cache cannot be used, or the source does not accept the token.
        """
        settings, groups = self.config.download, self.groups()
        if not groups:
            return
        cache = Cache(
            cache_root(self.config),
            max_bytes=settings.max_cache_bytes,
            min_free_bytes=settings.min_free_bytes,
        )
        fetcher = Fetcher(
            self.remote.origin,
            cache,
            self.remote.limit,
            stall_s=settings.stall_s,
            max_attempts=settings.max_attempts,
            ask_to_move=self._ask_to_move,
            settle=self.meter.settle,
        )
        landed: SimpleQueue[Landed] = SimpleQueue()

        begun = ended = time.monotonic()

        def bring(group: list[Pinned]) -> None:
            nonlocal ended
            stack = ExitStack()
            try:
                if refusal := self.meter.refuse_unit():
                    raise refusal
                stack.enter_context(cache.pin(group[0].key))
                landed.put((group, fetcher.fetch(group[0]), stack))
            except (CandidateError, ValueError, OSError) as error:
                stack.close()
                landed.put((group, error, stack))
            ended = time.monotonic()

        pool = ThreadPoolExecutor(settings.num_parallel, "fetch")
        try:
            for group in groups:
                pool.submit(bring, group)
            num_left = len(groups)
            while num_left:
                with ExitStack() as held:
                    stage = []
                    for group, outcome, stack in take_all(landed):
                        held.push(stack)
                        num_left -= 1
                        stage += self._admit(group, outcome)
                    self.recall.ledger.commit()
                    if not num_left and fetcher.num_bytes:
                        rate = fetcher.num_bytes / max(ended - begun, 1e-3)
                        self.recall.ledger.keep_fact(FETCH_RATE, json.dumps(rate))
                    if stage:
                        yield stage
        finally:
            self.fetch_s, self.fetched_bytes = fetcher.seconds, fetcher.num_bytes
            fetcher.close()
            pool.shutdown(cancel_futures=True)

    def _admit(self, group: list[Pinned], outcome: Path | Exception) -> list[Assignment]:
        first = group[0]
        admitted = None
        if isinstance(outcome, CandidateError):
            row = Row(first.id, first.kind, outcome.status, outcome.reason, None)
        elif isinstance(outcome, Exception):
            raise outcome
        else:
            row, admitted = self.admit(Candidate(first.id, outcome, first.kind, first.num_weight_bytes))
            if first.is_unverified:
                row = replace(row, notes=(*row.notes, UNVERIFIED))
            if first.unused:
                row = replace(row, notes=(*row.notes, f"not fetched: {', '.join(first.unused)}"))
            self.recall.remember(first.key, row)
        self.rows |= {one.id: self.claim(replace(row, id=one.id), one) for one in group}
        unit = row.unit
        if admitted is None or unit is None or unit == self.recall.base_unit or unit.key in self.recall.whole:
            return []
        self.recall.whole.add(unit.key)  # it will be; other names of the same content need no second unit
        return [Assignment(unit, admitted)]


def cache_root(config: AuditConfig) -> Path:
    """Where fetched files are kept."""
    return Path(config.download.cache_dir or Path(config.out_dir) / "cache")


def take_all(queue: "SimpleQueue[Landed]") -> Iterator[Landed]:
    """Wait for one, then take whatever else is there."""
    yield queue.get()
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return
