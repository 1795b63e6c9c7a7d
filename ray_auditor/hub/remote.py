"""The nouns of a source: a candidate as it was listed, and as it was pinned to files that cannot change."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ray_auditor.hub.candidate import CandidateError, Kind
from ray_auditor.hub.folder import MAX_FILES
from ray_auditor.hub.sources import classify

MAX_SMALL_BYTES = 64 << 20  # of a file that is no weights: the largest tokenizer.json are about 35 MB

# Besides weights, what admission reads or compares as bytes. Nothing else of a repository is ever fetched.
CONFIGS = frozenset({
    "config.json", "adapter_config.json", "model.safetensors.index.json", "quantize_config.json",
    "quant_config.json",
})  # fmt: skip
TOKENIZER = frozenset({
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
})  # fmt: skip

_NOTED = (".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_OID = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}|etag-[0-9a-f]{64}")


class SourceError(Exception):
    """A hub or store that does not answer, or not sensibly: nobody's fault here, and worth another try."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file that can be fetched.

    `oid` says what its bytes must be: 64 hex digits are their sha256, 40 the git blob's sha1, and
    `etag-<64 hex>` stands for a version of an object whose bytes nobody has hashed. With `num_layers`, only
    its header and the tensors of so many layers are wanted, in byte ranges: that they are those of `oid`
    is then the server's word.
    """

    name: str
    num_bytes: int
    oid: str
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if type(self.num_bytes) is not int or not 0 <= self.num_bytes < 1 << 50:
            raise CandidateError("rejected", "tree", f"{self.name!r} has size {str(self.num_bytes)[:30]}")
        if not isinstance(self.oid, str) or not _OID.fullmatch(self.oid):
            raise CandidateError("rejected", "tree", f"{self.name!r} has no hash that can be verified")

    @property
    def blob(self) -> str:
        """Its name in the cache: a part of a file never passes for the file."""
        return self.oid if self.num_layers is None else f"layers-{self.num_layers}-{self.oid}"


@dataclass(frozen=True, slots=True)
class Listed:
    """One candidate as a source names it. Nothing has been asked about it yet.

    `repo` is a hub's repository, a folder, or the candidate's prefix in a store; `revision` a commit if the
    source knows it, otherwise a branch or tag, or empty. `files` is set by stores, whose listing has them.
    """

    id: str
    repo: str
    revision: str = ""
    files: tuple[RemoteFile, ...] | None = None
    is_local: bool = False
    bases: tuple[str, ...] = ()  # RELATION:NAME of what the source's tags say it was made from: claims


@dataclass(frozen=True)
class Pinned:
    """A candidate whose wanted files are known by their hashes, at one commit."""

    id: str
    repo: str
    commit: str
    kind: Kind
    files: tuple[RemoteFile, ...]  # wanted ones, by name
    unused: tuple[str, ...] = ()  # code and pickles that lie beside them, and stay where they are
    bases: tuple[str, ...] = ()  # as `Listed.bases`

    @cached_property
    def key(self) -> str:
        """sha256 hex over the names and hashes of the wanted files: the same for a README's commit."""
        lines = sorted((file.name, file.num_bytes, file.blob) for file in self.files)
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()

    @property
    def is_unverified(self) -> bool:
        """Whether a hash is known that what is fetched of it cannot be held to."""
        return any(file.num_layers is not None and not file.oid.startswith("etag-") for file in self.files)

    def in_ranges(self, num_layers: int) -> "Pinned":
        """The same with no more of full weights than the audit reads."""
        if self.kind != "full":
            return self
        files = (
            replace(file, num_layers=num_layers) if file.name.endswith(".safetensors") else file
            for file in self.files
        )
        return replace(self, files=tuple(files))

    @property
    def num_bytes(self) -> int:
        """All there is to fetch; of what is read in ranges, at most."""
        return sum(file.num_bytes for file in self.files)

    @property
    def num_weight_bytes(self) -> int:
        """Of its safetensors files, as `Candidate.num_bytes`."""
        return sum(file.num_bytes for file in self.files if file.name.endswith(".safetensors"))


def choose_names(found: dict[str, Any]) -> dict[str, Any]:
    """Of a repository's files, those that decide whether and as what it is audited."""
    return {
        name: value
        for name, value in found.items()
        if name in CONFIGS or name in TOKENIZER or name.lower().endswith((".safetensors", ".gguf", *_NOTED))
    }


def choose_files(listed: Listed, commit: str, found: dict[str, Any], *, max_candidate_bytes: int) -> Pinned:
    """Keep what an audit reads of a repository's top level, and refuse by names and sizes alone.

    Args:
        listed: Whose files they are.
        commit: Where they were found.
        found: By name, (bytes, oid) as the source says.
        max_candidate_bytes: The most one candidate may take.

    Raises:
        CandidateError: the errors of `classify`; `rejected:` with `too_many_files`, `tree`, `path_traversal`
            or `file_bounds`; `skipped:too_large`.
    """
    if len(found) > MAX_FILES:
        raise CandidateError("rejected", "too_many_files", f"more than {MAX_FILES} files")
    names = sorted(found)
    kind, weights = classify(names)
    if any(name.startswith("model") for name in weights):
        weights = [
            name for name in weights if name.startswith("model")
        ]  # others repeat them, or are no model
    small = {"adapter_config.json"} if kind == "adapter" else CONFIGS
    wanted = [name for name in names if name in weights or name in small or name in TOKENIZER]
    files = []
    for name in wanted:
        if not _PLAIN_NAME.fullmatch(name):
            raise CandidateError("rejected", "path_traversal", f"{name!r} must be the plain name of a file")
        file = RemoteFile(name, *found[name])
        if name not in weights and file.num_bytes > MAX_SMALL_BYTES:
            raise CandidateError(
                "rejected",
                "file_bounds",
                f"{name} must be at most {MAX_SMALL_BYTES} bytes, got {file.num_bytes}",
            )
        files.append(file)
    unused = [n for n in names if n.lower().endswith(_NOTED)]
    pinned = Pinned(listed.id, listed.repo, commit, kind, tuple(files), tuple(unused[:5]), listed.bases)
    if pinned.num_bytes > max_candidate_bytes:
        raise CandidateError(
            "skipped",
            "too_large",
            f"{pinned.num_bytes} bytes, and download.max_candidate_bytes is {max_candidate_bytes}",
        )
    return pinned
