"""JSON as a stranger wrote it: bounded, strict, and the same for every reader.

Python's `json` alone accepts NaN, duplicate keys, UTF-16 and integers of any length; two readers that
disagree on such a file audit two different models.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from ray_auditor.hub.candidate import CandidateError
from ray_auditor.hub.folder import read_file

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_INT_DIGITS = 19  # an int64


def read_object(folder: Path, name: str, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of an untrusted folder.

    Raises:
        CandidateError: `rejected:json` and the errors of `folder.read_file`.
    """
    return parse_object(read_file(folder, name, max_bytes=max_bytes), name)


def parse_object(raw: bytes, name: str, *, max_items: int = 200_000, code: str = "json") -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: UTF-8 without a byte order mark.
        name: What the errors call it.
        max_items: Bound on commas and opening brackets, so on the objects Python would build. Counted before
            parsing: 32 MB of `[` would take a gigabyte.
        code: Slug of the refusal.

    Returns:
        dict: every key once, integers of at most 19 digits; a float may be infinite (1e400 is valid JSON).

    Raises:
        CandidateError: anything else.
    """

    def refuse(why: str) -> NoReturn:
        raise CandidateError("rejected", code, f"{name}: {why}")

    def parse_int(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_INT_DIGITS or digits == "-0":
            refuse(f"an integer must have at most {MAX_INT_DIGITS} digits, got {digits[:24]}")
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            known: set[str] = set()
            for key, _ in pairs:
                if key in known:
                    refuse(f"the key {key!r} is there twice")
                known.add(key)
        return found

    if (num_items := sum(raw.count(c) for c in (b",", b"[", b"{"))) > max_items:
        refuse(f"must have at most {max_items} items, got {num_items}")
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            parse_int=parse_int,
            parse_constant=lambda c: refuse(f"{c} is not JSON"),
            object_pairs_hook=unique,
        )
        if "\\ud" in text.lower():  # a lone surrogate parses, and cannot be written anywhere
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        refuse("must be UTF-8")
    except RecursionError:
        refuse(f"must be nested at most {MAX_DEPTH} deep")
    except json.JSONDecodeError as error:
        refuse(f"is not JSON: {error.msg} at character {error.pos}")
    if not isinstance(value, dict):
        refuse(f"must be an object, got {type(value).__name__}")
    if _depth(value) > MAX_DEPTH:
        refuse(f"must be nested at most {MAX_DEPTH} deep")
    return value


def _depth(value: object) -> int:
    """Nesting of a parsed value, level by level, so without recursion."""
    depth, level = 0, [value]
    while level := [
        child
        for parent in level
        if isinstance(parent, dict | list)
        for child in (parent.values() if isinstance(parent, dict) else parent)
    ]:
        depth += 1
    return depth
