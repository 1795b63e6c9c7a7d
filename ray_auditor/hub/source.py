"""From the settings to candidates: on this machine, or pinned and still to be fetched."""

import hashlib
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token

from ray_auditor.candidates_config import CandidatesConfig, DownloadConfig, Source
from ray_auditor.hub.candidate import Candidate, CandidateError, Refused
from ray_auditor.hub.endpoint import Endpoint, default_url
from ray_auditor.hub.fetch import Origin
from ray_auditor.hub.hub_query import HubQuery, pin
from ray_auditor.hub.listing import Pages, read_listing
from ray_auditor.hub.manifest import Manifest
from ray_auditor.hub.objects import ObjectPrefix, open_objects
from ray_auditor.hub.rate_limit import RateLimit
from ray_auditor.hub.remote import Listed, Pinned, choose_files
from ray_auditor.hub.secret import is_secret
from ray_auditor.hub.sources import distinct_id, examine, list_folder
from ray_auditor.ledger import Ledger

_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

Found = Candidate | Pinned | Refused
RACY_S = 2.0  # a file that changed so lately may change again within the clock's tick


@dataclass(frozen=True)
class Remote:
    """A source whose candidates may lie elsewhere."""

    pages: Pages
    origin: Origin
    limit: RateLimit
    endpoint: Endpoint | None = None  # a hub, for what its listing does not tell


def open_remote(config: CandidatesConfig) -> Remote | None:
    """Open the source that the settings name; None when it is a folder.

    Raises:
        ValueError: It is not one.
    """
    if config.source is Source.folder:
        return None
    limit = RateLimit()
    if config.source is Source.objects:
        url = str(config.url).rstrip("/")
        keys = {name: value for name, value in os.environ.items() if is_secret(name)}
        origin = Origin(url, is_store=True, secrets=keys)
        return Remote(ObjectPrefix(url, open_objects(url)), origin, limit)
    token = get_token()
    endpoint = Endpoint(default_url(), token, limit)
    origin = Origin(endpoint.url, token=token)
    if config.source is Source.manifest:
        return Remote(Manifest(str(config.path)), origin, limit, endpoint)
    query = HubQuery(
        endpoint,
        author=config.author,
        tags=config.tags,
        base_model=config.base_model,
        relations=config.relations,
        search=config.search,
        sort=config.sort,
        include=config.include,
        exclude=config.exclude,
    )
    return Remote(query, origin, limit, endpoint)


def find_candidates(
    config: CandidatesConfig,
    download: DownloadConfig,
    remote: Remote | None,
    *,
    listing_path: Path,
    ledger: Ledger,
) -> Iterator[Found]:
    """Every candidate of the source, each once, in its order.

    Args:
        config: The source.
        download: Bounds of one candidate, and how many repositories are asked about at a time.
        remote: What `open_remote` gave for `config`.
        listing_path: Where a listing that is broken off is kept.
        ledger: What a commit held never changes, so nobody is asked twice.

    Raises:
        ValueError: The source cannot be read as the settings say.
        SourceError: It stopped answering; the next call goes on from there.
    """
    if remote is None:
        yield from list_folder(str(config.path))
        return

    def find(listed: Listed) -> Found:
        try:
            if not _ID.fullmatch(listed.id):
                bound = "NAME or AUTHOR/NAME, each 1 to 96 of [A-Za-z0-9._-] without '..'"
                raise CandidateError("rejected", "id", f"the id must be {bound}, got {listed.id[:80]!r}")
            if listed.is_local:
                return examine(listed.id, Path(listed.repo))
            most = download.max_candidate_bytes
            if listed.files is not None:
                known = {file.name: (file.num_bytes, file.oid) for file in listed.files}
                return choose_files(listed, "listed", known, max_candidate_bytes=most)
            assert remote.endpoint is not None, "a listing without files comes from a hub"
            return pin(listed, remote.endpoint, max_candidate_bytes=most, ledger=ledger)
        except CandidateError as error:
            return Refused(distinct_id(listed.id), error.status, error.reason)

    window: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(download.num_parallel, "pin") as pool:
        try:
            for listed in read_listing(listing_path, remote.pages, limit=config.limit):
                window.append(pool.submit(find, listed))
                if len(window) > 8 * download.num_parallel:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def stamp_folder(folder: Path) -> str | None:
    """What stands for a folder's files as long as nobody touches them; None when somebody just did.

    A change of content moves a file's change time, which no user can set back.
    """
    stamps = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat()
                if time.time() - status.st_ctime < RACY_S:
                    return None
                times = status.st_mtime_ns, status.st_ctime_ns
                stamps.append((entry.name, status.st_dev, status.st_ino, status.st_size, *times))
    except OSError:
        return None
    text = repr((str(folder.resolve()), sorted(stamps)))
    return "stamp-" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
