"""Settings of where candidates come from and how they are fetched, typed and bounded."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Source(StrEnum):
    """Kinds of places that hold candidates."""

    folder = "folder"
    manifest = "manifest"
    hub = "hub"
    objects = "objects"


class Read(StrEnum):
    """How much of full weights that lie elsewhere is fetched."""

    verified = "verified"  # whole files where a hash can be held to them, ranges where none is known
    ranges = "ranges"  # never more than the header and the tensors up to the hook


RELATIONS = ("finetune", "adapter", "merge", "quantized")  # to the base, in the hub's words

# The settings each source reads; any other one that is given is an error, for it would be ignored.
READ_BY = {
    Source.folder: {"path"},
    Source.manifest: {"path", "limit"},
    Source.objects: {"url", "limit"},
    Source.hub: {
        "author",
        "tags",
        "base_model",
        "relations",
        "search",
        "sort",
        "limit",
        "include",
        "exclude",
    },
}
NEEDED = {Source.folder: "path", Source.manifest: "path", Source.objects: "url"}


@dataclass(kw_only=True, slots=True)
class CandidatesConfig:
    """Where the finetunes are: one source."""

    source: Source = Source.folder
    path: str | None = None  # of a folder, or of a manifest
    url: str | None = None  # of an object store's prefix
    author: str | None = None
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None
    relations: list[str] = field(default_factory=lambda: ["finetune", "adapter"])
    search: str | None = None
    sort: str | None = "created_at"
    limit: int | None = None
    include: list[str] = field(default_factory=list)  # glob patterns over AUTHOR/NAME
    exclude: list[str] = field(default_factory=list)

    def require(self) -> None:
        """Check that the source was named, and nothing that it does not read.

        Raises:
            ValueError: Says what is missing or too much.
        """
        if not self.relations or not set(self.relations) <= set(RELATIONS):
            raise ValueError(
                f"candidates.relations must be some of {', '.join(RELATIONS)}, got {self.relations}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"candidates.limit must be >= 1, got {self.limit}; leave it out for all")
        usual = CandidatesConfig()
        for name in set().union(*READ_BY.values()) - READ_BY[self.source]:
            if getattr(self, name) != getattr(usual, name):
                raise ValueError(
                    f"candidates.{name} must be left out with candidates={self.source.value}, which reads "
                    f"{', '.join(sorted(READ_BY[self.source]))}; got {getattr(self, name)!r}"
                )
        needed = NEEDED.get(self.source)
        if needed is not None and not getattr(self, needed):
            example = "DIR" if needed == "path" else "s3://BUCKET/PREFIX"
            raise ValueError(
                f"candidates.{needed} must be given, got {getattr(self, needed)!r}; "
                f"add candidates.{needed}={example} to the command"
            )
        if self.source is Source.hub and not (self.author or self.base_model or self.search or self.tags):
            raise ValueError(
                "candidates must name an author, base_model, search or tags, got none, which is a whole hub; "
                "add candidates.base_model=NAME to the command"
            )


@dataclass(kw_only=True, slots=True)
class DownloadConfig:
    """How candidates that are not on this machine come here."""

    cache_dir: str | None = None  # None: `cache` in out_dir
    read: Read = Read.verified
    max_cache_bytes: int = 200 << 30
    min_free_bytes: int = 10 << 30
    max_candidate_bytes: int = 100 << 30
    num_parallel: int = 4
    stall_s: float = 60.0
    max_attempts: int = 5

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, bound: str, value: Any) -> None:
            if not ok:
                raise ValueError(f"download.{name} must be {bound}, got {value!r}; correct it")

        require("max_cache_bytes", self.max_cache_bytes >= 1, ">= 1", self.max_cache_bytes)
        require("min_free_bytes", self.min_free_bytes >= 0, ">= 0", self.min_free_bytes)
        require("max_candidate_bytes", self.max_candidate_bytes >= 1, ">= 1", self.max_candidate_bytes)
        require("num_parallel", 1 <= self.num_parallel <= 64, "in [1, 64]", self.num_parallel)
        require("stall_s", 1 <= self.stall_s < math.inf, ">= 1 and finite", self.stall_s)
        require("max_attempts", self.max_attempts >= 1, ">= 1", self.max_attempts)
