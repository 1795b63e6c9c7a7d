"""Candidates below a prefix of an object store: one `folder` of objects each.

The store lists its objects in the order of their names, so a candidate is complete when the next one begins,
nothing is held but its own files, and the last name is a cursor.
"""

import hashlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from ray_auditor.hub.candidate import printable
from ray_auditor.hub.folder import MAX_FILES
from ray_auditor.hub.listing import Page
from ray_auditor.hub.remote import Listed, RemoteFile, SourceError

PAGE_SIZE = 1000
SCHEMES = ("s3://", "gs://", "az://", "abfs://")


def open_objects(url: str) -> ObjectStore:
    """Open a store at a prefix; its keys are read from the environment, as its own tools do.

    Raises:
        ValueError: The address names no store, or holds a password.
    """
    if not url.startswith(SCHEMES) or urlsplit(url).password:
        raise ValueError(
            f"candidates.url must begin with one of {', '.join(SCHEMES)} and hold no password; "
            "a folder is candidates=folder"
        )
    try:
        return from_url(url)
    except BaseError as error:
        raise ValueError(
            f"candidates.url must be the address of a store: {printable(str(error), 200)}"
        ) from None


class ObjectPrefix:
    """A store's objects below a prefix, by candidate. A cursor is the last name of the last one.

    Args:
        url: Without the credentials, which stay in the environment.
        store: The store at `url`.
    """

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url, self._store = url, store

    @property
    def identity(self) -> list[Any]:
        """The prefix."""
        return [self.url]

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """Every page from `cursor` on.

        Raises:
            SourceError: The store does not answer, or lists out of order.
        """
        name, last, files = "", cursor or "", list[RemoteFile]()
        done: list[Listed] = []
        done_until = last
        for entry in self._entries(cursor):
            if entry["path"] <= last:
                raise SourceError(f"{self.url} does not list its objects in order")
            folder, _, rest = entry["path"].partition("/")
            if folder != name:
                if name:
                    done.append(Listed(name, name, files=tuple(files)))
                    done_until = last
                if len(done) >= PAGE_SIZE:
                    yield Page(done, done_until)
                    done = []
                name, files = folder if rest else "", []
            last = entry["path"]
            if rest and "/" not in rest and len(files) <= MAX_FILES:
                files.append(RemoteFile(rest, entry["size"], entry_oid(self.url, entry)))
        if name:
            done.append(Listed(name, name, files=tuple(files)))
        yield Page(done, None)

    def _entries(self, cursor: str | None) -> Iterator[Any]:
        try:
            for batch in obstore.list(self._store, offset=cursor, chunk_size=PAGE_SIZE):
                yield from batch
        except BaseError as error:
            raise SourceError(f"{self.url} cannot be listed: {type(error).__name__}") from None


def entry_oid(url: str, entry: Any) -> str:
    """What stands for one version of an object.

    An ETag may be an MD5, for which two files can be made alike: where an object lies and when it was written
    take part. Stores list fractions of a second that they do not tell on demand.
    """
    written = int(entry["last_modified"].timestamp())
    parts = (url, entry["path"], entry["e_tag"], entry["size"], written)
    return "etag-" + hashlib.sha256(repr(parts).encode()).hexdigest()
