"""What a candidate's tokenizer would change: said in a note, and used nowhere.

Every prompt goes through the base's own tokenizer. Nothing here loads one: a pattern in tokenizer.json can
keep a matcher busy for minutes, and a template can allocate without end. Files are compared as bounded JSON,
or as bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray_auditor.hub.candidate import CandidateError
from ray_auditor.hub.config_json import parse_object
from ray_auditor.hub.folder import open_file, read_exactly, read_file

MAX_BYTES = 8 << 20  # of a tokenizer.json that is described; larger ones are another or not
MAX_ITEMS = 500_000
CHUNK_BYTES = 1 << 20

JSON_NAME = "tokenizer.json"
# Compared as bytes: other spellings of a tokenizer, and templates.
PLAIN_NAMES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@dataclass(frozen=True)
class _Facts:
    """What of a tokenizer.json decides how text becomes tokens."""

    ids: dict[str, int]
    merges: tuple[str, ...]
    added: frozenset[str]
    sections: dict[str, str]


def note_tokenizer(base: Path, folder: Path, names: Sequence[str]) -> list[str]:
    """How a candidate's tokenizer differs from the base's, as notes; none when it does not.

    Args:
        base: The base's folder, trusted.
        folder: The candidate's.
        names: The candidate's files.

    Raises:
        CandidateError: a file of a tokenizer's name is no plain file of the folder.
    """
    notes = []
    changed = [name for name in PLAIN_NAMES if name in names and (base / name).is_file()]
    changed = [name for name in changed if _differs(base, folder, name)]
    if changed:
        what = "chat_template" if changed == ["chat_template.jinja"] else "tokenizer"
        notes.append(f"{what}_changed: {', '.join(changed)}; the base's own is used")
    if JSON_NAME not in names or not (base / JSON_NAME).is_file():
        return notes
    if not _differs(base, folder, JSON_NAME):
        return notes
    raw = None if (folder / JSON_NAME).stat().st_size > MAX_BYTES else _read(folder)
    if raw is None or sum(raw.count(c) for c in (b",", b"[", b"{")) > MAX_ITEMS:
        said = f"{JSON_NAME} is another, too large to be described"
        return [*notes, f"tokenizer_changed: {said}; the base's own is used"]
    try:
        found = _parse(raw)
    except CandidateError as error:
        return [*notes, f"tokenizer_hostile: {error.text}; the base's own is used"]
    status = (base / JSON_NAME).stat()
    known = _base_facts(base, status.st_size, status.st_mtime_ns)
    different = ["it is another"] if known is None else _describe(known, found)
    return (
        [*notes, f"tokenizer_changed: {', '.join(different)}; the base's own is used"] if different else notes
    )


def _differs(base: Path, folder: Path, name: str) -> bool:
    """Whether two files hold other bytes; of files of other sizes none is read."""
    with open_file(base, name) as (base_fd, ours), open_file(folder, name) as (fd, theirs):
        if ours.num_bytes != theirs.num_bytes:
            return True
        for start in range(0, ours.num_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, ours.num_bytes - start)
            if read_exactly(base_fd, start, length, name) != read_exactly(fd, start, length, name):
                return True
    return False


@lru_cache(maxsize=2)
def _base_facts(base: Path, num_bytes: int, mtime_ns: int) -> _Facts | None:
    """The base's, kept from one candidate to the next for as long as the file is the same."""
    assert num_bytes >= 0 <= mtime_ns, "a file has a size and a time"
    try:
        return _parse(_read(base))
    except CandidateError:
        return None


def _read(folder: Path) -> bytes:
    return read_file(folder, JSON_NAME, max_bytes=MAX_BYTES)


def _parse(raw: bytes) -> _Facts:
    value = parse_object(raw, JSON_NAME, max_items=MAX_ITEMS)
    model = value.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # unigram: [piece, score], numbered by their order
        vocab = {str(piece[0]): i for i, piece in enumerate(vocab) if isinstance(piece, list) and piece}
    merges = model.get("merges")
    added = value.get("added_tokens")
    return _Facts(
        vocab if isinstance(vocab, dict) else {},
        tuple(_spell(merge) for merge in merges) if isinstance(merges, list) else (),
        frozenset(
            json.dumps([token.get("content"), token.get("id")]) for token in added if isinstance(token, dict)
        )
        if isinstance(added, list)
        else frozenset(),
        {name: json.dumps(value.get(name), sort_keys=True) for name in _SECTIONS},
    )


def _spell(merge: Any) -> str:
    """Older files write a merge as one string, newer ones as a pair."""
    return " ".join(map(str, merge)) if isinstance(merge, list) else str(merge)


def _describe(base: _Facts, found: _Facts) -> list[str]:
    """What differs, in words and counts alone: nothing of the file is quoted."""
    num_new = sum(token not in base.ids for token in found.ids)
    num_gone = sum(token not in found.ids for token in base.ids)
    num_moved = sum(found.ids.get(token, at) != at for token, at in base.ids.items())
    num_added = len(found.added - base.added)
    counts = (
        (num_new, "tokens new"),
        (num_gone, "tokens gone"),
        (num_moved, "tokens with another id"),
        (num_added, "added tokens that the base lacks"),
        (len(base.added - found.added), "added tokens gone"),
    )
    different = [f"{count} {what}" for count, what in counts if count]
    if base.merges != found.merges:
        different.append("other merges")
    return different + [
        f"another {name}" for name in _SECTIONS if base.sections[name] != found.sections[name]
    ]
