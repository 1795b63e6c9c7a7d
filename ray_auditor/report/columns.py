"""Every candidate as columns of text, packed small enough that a hundred thousand fit in one page.

A column is the list of its distinct texts, as the page shows them and in the order of their values, and one
code a row. The page's script therefore formats no number: it shows texts, and sorts codes.

    deflate-raw of: length of the head (uint32, little endian), head (JSON), ids (a line each), codes

The codes of a column are one byte a row, or two or four: then all lowest bytes first, which packs better.
"""

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_auditor.report.candidate import Candidate
from ray_auditor.report.figure import z_shade
from ray_auditor.report.number import ABSENT, UNDETERMINED, decimal, probability, signed
from ray_auditor.report.printable import printable
from ray_auditor.report.summary import Summary

# Shape suffixes: N candidates.

NO_VALUE = (ABSENT, UNDETERMINED)  # the first texts of every column; they sort last
TEXT_CHARS = 200


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: Names it in the page: `score`, `z 3`.
        texts: Distinct texts, `NO_VALUE` first, the others ascending by value.
        code_N: Of each candidate, the place of its text.
        shades: Class of a cell by text, for the columns of z.
    """

    key: str
    texts: tuple[str, ...]
    code_N: npt.NDArray[np.uint32]
    shades: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Bytes a code needs."""
        return 1 if len(self.texts) <= 1 << 8 else 2 if len(self.texts) <= 1 << 16 else 4

    def pack(self, num_rows: int) -> bytes:
        """The first codes, lowest bytes first."""
        kept_N = self.code_N[:num_rows].astype("<u4")
        return kept_N.view(np.uint8).reshape(-1, 4)[:, : self.width].T.tobytes()


def _numbers(key: str, values: Sequence[float | str | None], show: Callable[[float | None], str]) -> Column:
    """A column of numbers; a str stands for itself, and None is undetermined."""
    texts = [value if isinstance(value, str) else show(value) for value in values]
    known = {text: value for text, value in zip(texts, values, strict=True) if isinstance(value, float)}
    ordered = (*NO_VALUE, *sorted(known, key=lambda text: known[text]))
    place = {text: at for at, text in enumerate(ordered)}
    shades = tuple(z_shade(known.get(text)) for text in ordered) if key == "z" else ()
    codes = np.fromiter((place[text] for text in texts), dtype=np.uint32, count=len(texts))
    return Column(key, ordered, codes, shades)


def _words(key: str, values: Iterable[str | None]) -> Column:
    """A column of words, sorted by themselves; None is absent."""
    texts = [ABSENT if value is None else printable(value, TEXT_CHARS) for value in values]
    ordered = (*NO_VALUE, *sorted(set(texts) - set(NO_VALUE)))
    place = {text: at for at, text in enumerate(ordered)}
    return Column(key, ordered, np.array([place[text] for text in texts], dtype=np.uint32))


def _shift(row: Candidate, general: str) -> float | str | None:
    rate = row.suites.get(general)
    return ABSENT if rate is None or not row.audited else rate.shift


def make_columns(summary: Summary, suites: Sequence[str]) -> tuple[Column, ...]:
    """The columns of every listed candidate, in the summary's order.

    Args:
        summary: The sweep.
        suites: Suites in the order of the map's columns.
    """
    rows = summary.candidates
    of: dict[str, list[str]] = {}
    number = {suite: str(at) for at, suite in enumerate(suites)}
    for flag in summary.flags:
        if flag.suite in number:
            of.setdefault(flag.candidate, []).append(number[flag.suite])

    def audited(show: Callable[[Candidate], float | None]) -> list[float | str | None]:
        return [show(row) if row.audited else ABSENT for row in rows]

    # All z share their texts; a shape of [suites, N] keeps one suite's codes together.
    z = _numbers("z", [_z(row, suite) for suite in suites for row in rows], signed)
    z_codes = z.code_N.reshape(len(suites), len(rows))
    return (
        _words("status", (row.status for row in rows)),
        _words("why", (row.why for row in rows)),
        _words("kind", (row.kind for row in rows)),
        _words("suite", (row.suite for row in rows)),
        _words("reason", (None if row.audited else row.reason or "no reason recorded" for row in rows)),
        _words("marks", (" ".join(of[row.id]) if row.id in of else None for row in rows)),
        _numbers("score", audited(lambda row: row.score), signed),
        _numbers("p", audited(lambda row: row.p), probability),
        _numbers("q", audited(lambda row: row.q), probability),
        _numbers("shift", [_shift(row, summary.general) for row in rows], decimal),
        *(Column(f"z {at}", z.texts, codes, z.shades) for at, codes in enumerate(z_codes)),
    )


def _z(row: Candidate, suite: str) -> float | str | None:
    rate = row.suites.get(suite) if row.audited else None
    return ABSENT if rate is None else rate.z


@dataclass(frozen=True)
class Packed:
    """What the page carries: base64, and how many of the candidates are in it."""

    data: str
    num_rows: int


def pack_columns(
    summary: Summary,
    columns: Sequence[Column],
    *,
    places: Sequence[int],
    anchors: Mapping[str, str],
    max_bytes: int,
) -> Packed:
    """Pack as many candidates as fit, from the first.

    Args:
        summary: The sweep.
        columns: From `make_columns`.
        places: Indices of the first candidates in their clustered order.
        anchors: Candidate id -> fragment of its section, for those that have one.
        max_bytes: Of the base64.
    """
    num_rows = len(summary.candidates)
    packed = _pack(summary, columns, places, anchors, num_rows)
    while len(packed) > max_bytes and num_rows:
        num_rows = min(num_rows - 1, int(0.99 * num_rows * max_bytes / len(packed)))
        packed = _pack(summary, columns, places, anchors, num_rows)
    return Packed(packed, num_rows)


def _pack(
    summary: Summary,
    columns: Sequence[Column],
    places: Sequence[int],
    anchors: Mapping[str, str],
    num_rows: int,
) -> str:
    rows = summary.candidates[:num_rows]
    kept = [at for at in places if at < num_rows]
    head_columns: list[dict[str, Any]] = []
    texts_at: dict[int, int] = {}  # columns of z share one list of texts
    for at, column in enumerate(columns):
        like = texts_at.setdefault(id(column.texts), at)
        own = {"texts": column.texts, "shades": column.shades} if like == at else {"like": like}
        head_columns.append({"key": column.key, "width": column.width, **own})
    ids = "\n".join(printable(row.id) for row in rows).encode()
    head = json.dumps(
        {
            "rows": num_rows,
            "idBytes": len(ids),
            "places": kept,
            "anchors": {at: anchors[row.id] for at, row in enumerate(rows) if row.id in anchors},
            "columns": head_columns,
        },
        separators=(",", ":"),
    ).encode()
    codes = b"".join(column.pack(num_rows) for column in columns)
    raw = len(head).to_bytes(4, "little") + head + ids + codes
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(squeezer.compress(raw) + squeezer.flush()).decode()
