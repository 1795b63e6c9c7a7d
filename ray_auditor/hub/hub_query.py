"""What a hub lists, a page at a time, and the files behind one of its repositories at one commit."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ray_auditor.hub.candidate import CandidateError, printable
from ray_auditor.hub.endpoint import Endpoint, StatusError, refuse
from ray_auditor.hub.folder import MAX_FILES
from ray_auditor.hub.lineage import read_tags
from ray_auditor.hub.listing import Page
from ray_auditor.hub.rate_limit import RateLimited
from ray_auditor.hub.remote import Listed, Pinned, SourceError, choose_files, choose_names
from ray_auditor.ledger import Ledger

PAGE_SIZE = 1000  # the most the hub gives
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_TREE_PAGES = MAX_FILES // 50 + 1


class HubQuery:
    """A question to a hub; its answer comes in pages.

    A cursor is the number of the sub-query and the path and query of its next page, so that a listing can be
    taken up again by another process.

    Args:
        endpoint: The hub.
        author: User or organisation; None: everyone.
        tags: All of them must be there.
        base_model: Name of a base; with `relations`, one sub-query each: `base_model:RELATION:NAME`.
        relations: `finetune`, `adapter`, `merge` or `quantized`.
        search: Part of the name.
        sort: The hub's own orders, such as `created_at`.
        include: Glob patterns over `author/name`; empty: every name.
        exclude: Glob patterns; they win.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        author: str | None,
        tags: Sequence[str],
        base_model: str | None,
        relations: Sequence[str],
        search: str | None,
        sort: str | None,
        include: Sequence[str],
        exclude: Sequence[str],
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.endpoint = endpoint
        self._include, self._exclude = tuple(include), tuple(exclude)
        filters = [[f"base_model:{r}:{base_model}"] for r in relations] if base_model else [[]]
        options = {"author": author, "search": search, "sort": _SORTS.get(sort or "", sort)}
        fixed = {key: value for key, value in options.items() if value}
        self._params: list[dict[str, Any]] = [
            fixed
            | ({"filter": [*chosen, *tags]} if [*chosen, *tags] else {})
            | {"limit": page_size, "expand": ["sha", "gated", "tags"]}
            for chosen in filters
        ]

    @property
    def identity(self) -> list[Any]:
        """What must be equal for a cursor to be taken up again."""
        return [self.endpoint.url, self._params, self._include, self._exclude]

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """Every page from `cursor` on.

        Raises:
            SourceError: The hub does not answer, or the cursor has expired.
            ValueError: It does not accept the token or the question.
        """
        number, _, path = cursor.partition(" ") if cursor else ("0", "", "")
        for i in range(int(number), len(self._params)):
            following: str | None = path
            while following is not None:
                page, following = self._page(i, following)
                after = f"{i} {following}" if following is not None else f"{i + 1} "
                is_last = following is None and i + 1 == len(self._params)
                yield Page(list(self._listed(page)), None if is_last else after)
            path = ""

    def _page(self, number: int, path: str) -> tuple[Any, str | None]:
        try:
            if path:
                return self.endpoint.get_page(path)
            return self.endpoint.get_page("/api/models", self._params[number])
        except RateLimited as error:
            raise SourceError(f"listing {self.endpoint.url}: {error}") from error
        except StatusError as error:
            if error.status == 401:
                refuse(error, self.endpoint.url, "")
            if path:
                raise SourceError(
                    f"{self.endpoint.url} does not take its cursor any more: {error}"
                ) from error
            raise ValueError(
                f"candidates must be a question that {self.endpoint.url} answers, got {error}; "
                "check author, tags and sort"
            ) from error

    def _listed(self, page: Any) -> Iterator[Listed]:
        if not isinstance(page, list):
            raise SourceError(f"{self.endpoint.url} lists {type(page).__name__}, not models")
        for item in page:
            repo = item.get("id") if isinstance(item, dict) else None
            if not isinstance(repo, str):
                raise SourceError(f"{self.endpoint.url} lists a model without an id")
            if self._wants(repo):
                sha = item.get("sha")
                commit = sha if isinstance(sha, str) and COMMIT.fullmatch(sha) else "main"
                yield Listed(repo, repo, commit, bases=read_tags(item.get("tags")))

    def _wants(self, repo: str) -> bool:
        if self._include and not any(fnmatchcase(repo, pattern) for pattern in self._include):
            return False
        return not any(fnmatchcase(repo, pattern) for pattern in self._exclude)


_SORTS = {"created_at": "createdAt", "last_modified": "lastModified", "trending_score": "trendingScore"}


def pin(
    listed: Listed, endpoint: Endpoint, *, max_candidate_bytes: int, ledger: Ledger | None = None
) -> Pinned:
    """Find the commit of a repository, and the files that lie there.

    Args:
        listed: The candidate.
        endpoint: Its hub.
        max_candidate_bytes: The most one candidate may take.
        ledger: Remembers what commits held, which cannot change; None: asks every time.

    Raises:
        CandidateError: The repository cannot be read, or by its files' names and sizes cannot be audited.
        ValueError: The token is not accepted.
    """
    try:
        validate_repo_id(listed.repo)
    except HFValidationError:
        bound = "NAME or AUTHOR/NAME of [A-Za-z0-9._-]"
        raise CandidateError(
            "rejected", "id", f"the repository must be {bound}, got {listed.repo[:80]!r}"
        ) from None
    try:
        commit = _commit_of(listed, endpoint)
        try:
            found = ledger.pin(endpoint.url, listed.repo, commit) if ledger else None
            if found is None:
                found = choose_names(_read_tree(listed.repo, commit, endpoint))
                if ledger:
                    ledger.keep_pin(endpoint.url, listed.repo, commit, found)
        except StatusError as error:
            if error.code != "RevisionNotFound":
                raise
            # Someone pushed by force between the listing and now: look once more at what there is.
            commit = _commit_of(replace(listed, revision="main"), endpoint)
            found = choose_names(_read_tree(listed.repo, commit, endpoint))
    except StatusError as error:
        refuse(error, endpoint.url, listed.repo)
    except RateLimited as error:
        raise CandidateError("deferred", "ratelimit", str(error)) from error
    except SourceError as error:
        raise CandidateError("deferred", "unreachable", str(error)) from error
    return choose_files(listed, commit, found, max_candidate_bytes=max_candidate_bytes)


def _commit_of(listed: Listed, endpoint: Endpoint) -> str:
    revision = listed.revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    info, _ = endpoint.get_page(f"/api/models/{listed.repo}/revision/{quote(revision, safe='')}")
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise SourceError(f"{endpoint.url} names no commit for {printable(revision, 80)}")
    return commit


def _read_tree(repo: str, commit: str, endpoint: Endpoint) -> dict[str, tuple[Any, Any]]:
    """(bytes, hash) of every file at the top of a repository."""
    found: dict[str, tuple[Any, Any]] = {}
    path = f"/api/models/{repo}/tree/{commit}"
    for _ in range(MAX_TREE_PAGES):
        page, following = endpoint.get_page(path)
        for entry in page if isinstance(page, list) else [None]:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise CandidateError("deferred", "tree", "the hub's tree is not a list of files")
            if entry.get("type") == "directory":
                continue
            lfs = entry.get("lfs")
            source = lfs if isinstance(lfs, dict) else entry
            found[entry["path"]] = (source.get("size"), source.get("oid"))
        if following is None:
            return found
        path = following
    raise CandidateError("rejected", "too_many_files", f"more than {MAX_FILES} files")
