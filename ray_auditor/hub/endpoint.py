"""A hub's API over HTTP: one JSON page at a time, retried, bounded, and never told to a stranger.

The client is huggingface_hub's. Its retries are not used: they sleep for as long as the server says, without
a bound, and its paginator keeps the cursor to itself. Nor are its headers: to make them it asks the endpoint
for a list of environment variables to look for.
"""

import json
import random
import time
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ray_auditor import __version__
from ray_auditor.hub.candidate import CandidateError, printable
from ray_auditor.hub.rate_limit import RateLimit, RateLimited
from ray_auditor.hub.remote import SourceError

MAX_PAGE_BYTES = 64 << 20
TIMEOUT_S = 30.0
RETRIED = frozenset({408, 500, 502, 503, 504})


class StatusError(Exception):
    """An answer that is no success and will not become one by asking again."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code

    def __str__(self) -> str:
        return f"HTTP {self.status}" + (f" {self.code}" if self.code else "")


class Endpoint:
    """Where a hub is, and what it allows.

    Args:
        url: Without a path at its end, e.g. what HF_ENDPOINT holds.
        token: Sent to this endpoint only, and never part of a message.
        limit: Shared with everything else that asks the same hub.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        limit: RateLimit,
        *,
        max_attempts: int = 5,
        backoff_s: float = 1.0,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"HF_ENDPOINT must be the address of a hub, got {printable(url, 200)!r}")
        if parts.username or parts.password:
            raise ValueError("HF_ENDPOINT must not hold a password; put a token into HF_TOKEN")
        self.url = url.rstrip("/")
        self.limit = limit
        self.max_attempts, self.backoff_s = max_attempts, backoff_s
        self._timeout_s = timeout_s
        self._headers = request_headers(token)

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def get_page(self, path: str, params: Mapping[str, Any] | None = None) -> tuple[Any, str | None]:
        """Ask for one page of JSON.

        Args:
            path: Path and query below the endpoint, such as an earlier page's cursor.
            params: Of the query; None when `path` has them.

        Returns:
            tuple: the parsed JSON, and the path and query of the next page or None.

        Raises:
            StatusError: The server refused.
            SourceError: It did not answer, or not in JSON, however often it was asked.
            RateLimited: It wants a longer pause than a sweep waits.
        """
        last = ""
        for attempt in range(self.max_attempts):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            try:
                return self._ask(path, params)
            except httpx2.TransportError as error:
                last = type(error).__name__
            except _TryAgain as error:
                last = str(error)
        raise SourceError(f"{self.url} gave no answer in {self.max_attempts} attempts: {last}")

    def _ask(self, path: str, params: Mapping[str, Any] | None) -> tuple[Any, str | None]:
        num_waits = 0
        while True:
            self.limit.take("api")
            try:
                with get_session().stream(
                    "GET",
                    self.url + path,
                    params=params,
                    headers=self._headers,
                    timeout=self._timeout_s,
                ) as response:
                    self.limit.learn(response.headers)
                    if response.status_code != 429:
                        return self._read(response)
                    num_waits += 1
                    if num_waits >= self.max_attempts:
                        raise RateLimited(f"the server answered 429 {num_waits} times in a row")
                    self.limit.pause("api", response.headers, fallback_s=self.backoff_s * 2**num_waits)
            except OfflineModeIsEnabled:
                raise SourceError("HF_HUB_OFFLINE is set, so no hub is asked") from None

    def _read(self, response: httpx2.Response) -> tuple[Any, str | None]:
        if response.status_code in RETRIED:
            raise _TryAgain(f"HTTP {response.status_code}")
        if response.status_code != 200:
            raise StatusError(response.status_code, error_code(response.headers))
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_PAGE_BYTES:
                raise SourceError(f"{self.url} sent a page of more than {MAX_PAGE_BYTES} bytes")
        try:
            page = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise _TryAgain("a page that is not JSON") from None
        following = response.links.get("next", {}).get("url")
        return page, self._below(following) if following else None

    def _below(self, url: str) -> str:
        """Path and query of a link. The host it names is not asked: the token would go there."""
        if url.startswith(self.url + "/"):
            return url[len(self.url) :]
        parts = urlsplit(url)
        return f"{parts.path}?{parts.query}"


class _TryAgain(Exception):
    """What the server said may pass; the request is made again."""


def request_headers(token: str | None) -> dict[str, str]:
    """Who asks, and with whose right."""
    headers = {"user-agent": f"ray-auditor/{__version__}"}
    return headers | {"authorization": f"Bearer {token}"} if token else headers


def error_code(headers: Mapping[str, str]) -> str:
    """The hub's own slug for an error, such as `GatedRepo`."""
    return printable(headers.get("x-error-code", ""), 40)


def refuse(error: StatusError, endpoint: str, repo: str) -> NoReturn:
    """Say what an answer means for one candidate.

    Raises:
        CandidateError: `skipped:gated`, `skipped:gone`, `deferred:stale_commit` or `deferred:refused`.
        ValueError: The token itself is not accepted.
    """
    if error.code == "RevisionNotFound":
        raise CandidateError("deferred", "stale_commit", "the commit is no longer there") from None
    if error.code == "EntryNotFound":
        raise CandidateError("deferred", "incomplete", "a file that the tree names is not there") from None
    if error.code == "GatedRepo" or error.status == 403:
        raise CandidateError("skipped", "gated", f"access must be asked for at {endpoint}/{repo}") from None
    if error.status in (404, 410) or error.code in ("RepoNotFound", "DisabledRepo"):
        raise CandidateError(
            "skipped", "gone", "the repository is not there, or not for this token"
        ) from None
    if error.status == 401:
        raise ValueError(f"HF_TOKEN must be a token that {endpoint} accepts; make a new one or unset it")
    raise CandidateError("deferred", "refused", f"the hub answered {error}") from None


def default_url() -> str:
    """HF_ENDPOINT, or the public hub."""
    return str(constants.ENDPOINT)
