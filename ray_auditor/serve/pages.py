"""What each page shows, from the store alone."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_auditor.drilldown import feature_hits, feature_movers, feature_rates, view_prompt
from ray_auditor.reader import StoreReader
from ray_auditor.reduce import reduce_prompts

ROWS = 50
PROMPTS = 24
MOVERS = 20
MAX_MOVERS = 100
SORTS = ("score", "p", "q", "id", "status", "suite", "why")
RAN = ("ok", "flagged")


class Pages:
    """The pages of one sweep; each is a template's name and its values.

    Args:
        store: The sweep.
    """

    def __init__(self, store: StoreReader) -> None:
        self.store = store
        self.shifts = lru_cache(64)(self._shifts)

    def candidates(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """A page of candidates: those whose id holds `find`, of one `status`, ordered by `sort`."""
        table = self.store.candidates()
        statuses = sorted(set(table["status"].to_pylist()))
        find, status = asked.get("find", ""), asked.get("status", "")
        sort, order = asked.get("sort", "score"), asked.get("order", "descending")
        _one_of("sort", sort, SORTS)
        _one_of("order", order, ("ascending", "descending"))
        if status:
            _one_of("status", status, statuses)
            table = table.filter(pc.equal(table["status"], status))
        if find:
            table = table.filter(pc.match_substring(table["id"], find, ignore_case=True))
        order_by = pc.sort_indices(table, [(sort, order, "at_end"), ("id", "ascending", "at_end")])
        page = _whole("page", asked, 0, last=max(0, (table.num_rows - 1) // ROWS))
        shown = table.take(order_by.slice(page * ROWS, ROWS))
        return {
            "rows": shown.to_pylist(),
            "total": table.num_rows,
            "first": page * ROWS + 1,
            "page": page,
            "last_page": max(0, (table.num_rows - 1) // ROWS),
            "statuses": statuses,
            "sorts": SORTS,
            "asked": {"find": find, "status": status, "sort": sort, "order": order},
            "about": self.store.about,
        }

    def candidate(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """One candidate: its suites, and, of one of them, which features and prompts moved."""
        row = self._row(asked.get("id", ""))
        ran = row["status"] in RAN
        usual = row["suite"] or next(iter(self.store.suites[1:]), self.store.suites[0])
        suite = asked.get("suite") or usual
        _one_of("suite", suite, self.store.suites)
        return {
            "row": row,
            "ran": ran,
            "suite": suite,
            "general": self.store.suites[0],
            "rates": self._rates(row["id"]),
            "features": self.store.features(row["id"], suite).to_pylist() if ran else [],
            "prompts": self.shifts(row["id"], suite)[:PROMPTS] if ran else [],
            "k": self.store.about["settings"]["k"],
        }

    def feature(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """One feature: the base's strongest tokens, who moved it, and, of a candidate, where."""
        feature = _whole("feature", asked, None, last=self.store.d_sae - 1)
        most = _whole("of", asked, MOVERS, last=MAX_MOVERS)
        name, suite = asked.get("id") or None, asked.get("suite") or None
        if suite is not None:
            _one_of("suite", suite, self.store.suites)
        movers, unread = feature_movers(self.store, feature, most)
        return {
            "feature": feature,
            "id": name,
            "suite": suite,
            "of": most,
            "rates": feature_rates(self.store, feature, name),
            "movers": movers,
            "unread": unread,
            "on_base": feature_hits(self.store, feature, None, suite),
            "changed": feature_hits(self.store, feature, name, suite) if name else [],
        }

    def prompt(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """One prompt, base and candidate side by side."""
        row, suite = self._row(asked.get("id", "")), asked.get("suite", "")
        _one_of("suite", suite, self.store.suites)
        last = self._num_prompts(suite) - 1
        number = _whole("prompt", asked, None, last=last)
        feature = _whole("feature", asked, -1, last=self.store.d_sae - 1)
        view = view_prompt(self.store, row["id"], suite, number)
        return {"row": row, "view": view, "feature": feature, "last": last}

    def _row(self, name: str) -> dict[str, Any]:
        table = self.store.candidates()
        at = pc.index(table["id"], name).as_py()
        if at < 0:
            raise ValueError(f"id must be a listed candidate, got {name!r}")
        row: dict[str, Any] = table.slice(at, 1).to_pylist()[0]
        return row

    def _rates(self, name: str) -> list[dict[str, Any]]:
        table = self.store.rates().combine_chunks()
        if not table.num_rows:
            return []
        names = table["candidate"].chunk(0)
        at = names.dictionary.index(name).as_py()
        found: list[dict[str, Any]] = table.filter(pc.equal(names.indices, at)).to_pylist() if at >= 0 else []
        return found

    def _shifts(self, name: str, suite: str) -> list[tuple[int, float]]:
        """Prompts of a suite with their mean shift, the largest first."""
        rows = self.store.read_rows(self.store.unit_key(name))
        k = rows.k
        table = reduce_prompts(self.store.base_rows, rows, suites=self.store.suites, ks=(k,))
        table = table.filter(pc.equal(table["suite"], suite))
        means = pc.divide(pc.cast(table[f"shift_{k}"], pa.float64()), pc.cast(table["tokens"], pa.float64()))
        pairs = zip(table["prompt"].to_pylist(), means.to_pylist(), strict=True)
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))

    def _num_prompts(self, suite: str) -> int:
        return int(pc.sum(pc.equal(self.store.prompts()["suite"], suite)).as_py() or 0)


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _whole(name: str, asked: Mapping[str, str], usual: int | None, *, last: int) -> int:
    """A whole number in [0, last] among what was asked for."""
    text = asked.get(name)
    if text is None and usual is not None:
        return usual
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) > last:
        raise ValueError(f"{name} must be a whole number in [0, {last}], got {text!r}")
    return int(text)
