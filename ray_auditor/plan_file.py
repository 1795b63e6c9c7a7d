"""`plan.json`: what a sweep will do, written down so that one can be held to it.

It has every row with what it was made of: a hub's or a store's candidate is pinned to its files' hashes, so
the sweep asks nobody what there is; a folder is looked at again, and must hold what it held.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_auditor.config import AuditConfig
from ray_auditor.durable_file import put_file
from ray_auditor.forecast import Forecast, actions_of, reasons_of, to_json
from ray_auditor.hub import Candidate, CandidateError, Refused
from ray_auditor.hub.remote import Listed, Pinned, choose_files
from ray_auditor.hub.sources import examine
from ray_auditor.plan import Plan
from ray_auditor.roster import Entry, Role, Row
from ray_auditor.store import Unit

PLAN_VERSION = 1
FILE_NAME = "plan.json"
NOT_INPUTS = (
    "verb",
    "plan",
    "show",
    "ack",
    "diff",
    "serve",
    "evaluate",
)  # settings that a sweep does not read
AS_MUCH = ("nothing", "audit", "fetch")  # by how much there is to do
MAX_NAMED = 5


def write_plan(plan: Plan, forecast: Forecast) -> Path:
    """Write the plan into its `out_dir`, whole or not at all.

    Raises:
        ValueError: `out_dir` cannot be written.
    """
    actions, reasons = actions_of(plan), reasons_of(plan)
    value = {
        "schema_version": PLAN_VERSION,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": _settings(plan.config),
        "inputs": _inputs(plan.base_unit),
        "forecast": to_json(forecast),
        "rows": [
            {
                "id": row.id,
                "role": row.role,
                "kind": row.kind,
                "action": actions[row.id],
                "why": reasons.get(row.id),
                "reason": row.reason,
                "unit_key": row.unit.key if row.unit else None,
                "from": _origin(one),
            }
            for row, one in zip(plan.rows, plan.found, strict=True)
        ],
    }
    path = Path(plan.config.out_dir) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_file(path, json.dumps(value, indent=1, allow_nan=False).encode(), replace=True)
    except OSError as error:
        raise ValueError(
            f"out_dir must be a folder that can be written, got {path.parent}: {error}"
        ) from error
    return path


class PlanFile:
    """A plan that was written earlier.

    Args:
        path: The file.
        max_candidate_bytes: The most one candidate may take.

    Raises:
        ValueError: It is not one of this release.
    """

    def __init__(self, path: Path, *, max_candidate_bytes: int) -> None:
        self.path, self._most = path, max_candidate_bytes
        try:
            value = json.loads(path.read_bytes())
            version = value["schema_version"]
            if version != PLAN_VERSION:
                raise ValueError(f"schema version {version!r}, this release reads {PLAN_VERSION}")
            self.settings: dict[str, Any] = _inputs_among(dict(value["settings"]))
            self.inputs: dict[str, Any] = dict(value["inputs"])
            self.rows: dict[str, dict[str, Any]] = {str(row["id"]): row for row in value["rows"]}
            self._found = [(self._read(row), row["role"]) for row in value["rows"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, CandidateError) as error:
            raise ValueError(
                f"plan must be a file that `ray-auditor plan` wrote, got {path}: {error!r}; make it again"
            ) from error

    def check_settings(self, config: AuditConfig) -> None:
        """Check that the sweep is asked for with the settings that were planned with.

        Raises:
            ValueError: Says which differ.
        """
        self._refuse("settings", _differences(self.settings, _settings(config)))

    def find(self, base_unit: Unit) -> Iterator[tuple[Entry, Role]]:
        """What the rows were made of, in place of a listing.

        Raises:
            ValueError: Base, SAE, suites or engine are not what was planned with; says which.
        """
        self._refuse("inputs", _differences(self.inputs, _inputs(base_unit)))
        yield from self._found

    def keep_to(self, plan: Plan) -> Plan:
        """Put off what the file puts off, and check that nothing else differs from it.

        Raises:
            ValueError: Says which rows do.
        """
        put_off = {
            plan.waiting[name]: _parse_reason(row["reason"])
            for name, row in self.rows.items()
            if row["action"] == "defer" and name in plan.waiting
        }
        plan = plan.without(put_off)
        actions = actions_of(plan)
        changed = [
            f"{row.id} (was {self.rows[row.id]['action']}, is {actions[row.id]})"
            for row in plan.rows
            if self._differs(row, actions[row.id])
        ]
        self._refuse("candidates", changed)
        return plan

    def _differs(self, row: Row, action: str) -> bool:
        """More to do than was planned, other weights, or another outcome; less to do is fine."""
        was = self.rows[row.id]
        if was["action"] in AS_MUCH and action in AS_MUCH:
            other = was["unit_key"] and row.unit and row.unit.key != was["unit_key"]
            return bool(other) or AS_MUCH.index(action) > AS_MUCH.index(was["action"])
        return (was["action"], action) not in (("defer", "nothing"), (action, action))

    def _refuse(self, what: str, differences: list[str]) -> None:
        if differences:
            more = f" and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
            raise ValueError(
                f"plan must be of this sweep's {what}, and in {self.path} changed since: "
                f"{', '.join(differences[:MAX_NAMED])}{more}; make it again with `ray-auditor plan`"
            )

    def _read(self, row: Mapping[str, Any]) -> Entry:
        """What a row was made of; a folder is looked at again."""
        name, origin = str(row["id"]), row["from"]
        if "folder" in origin:
            try:
                return examine(name, Path(origin["folder"]))
            except CandidateError as error:
                return Refused(name, error.status, error.reason)
        if "files" in origin:
            files = {file: (num_bytes, oid) for file, num_bytes, oid in origin["files"]}
            bases = tuple(map(str, origin["bases"]))
            listed = Listed(name, str(origin["repo"]), str(origin["commit"]), bases=bases)
            pinned = choose_files(listed, listed.revision, files, max_candidate_bytes=self._most)
            return replace(pinned, unused=tuple(map(str, origin["unused"])))
        return Refused(name, origin["status"], str(row["reason"]))


def _origin(found: Entry) -> dict[str, Any]:
    if isinstance(found, Pinned):
        files = [[file.name, file.num_bytes, file.oid] for file in found.files]
        beside = {"unused": list(found.unused), "bases": list(found.bases)}
        return {"repo": found.repo, "commit": found.commit, "files": files, **beside}
    if isinstance(found, Candidate):
        return {"folder": str(found.path)}
    return {"status": found.status}


def _settings(config: AuditConfig) -> dict[str, Any]:
    settings = _inputs_among(json.loads(json.dumps(asdict(config))))
    return settings | {"out_dir": str(Path(config.out_dir).resolve())}


def _inputs_among(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NOT_INPUTS}


def _inputs(base_unit: Unit) -> dict[str, Any]:
    return {name: value for name, value in asdict(base_unit).items() if name != "candidate_key"}


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, with both values; a group's by its fields."""
    found = []
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} (was {_short(before)}, is {_short(after)})")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parse_reason(reason: str) -> CandidateError:
    """The error behind `deferred:code: text`."""
    _, code, text = reason.split(":", 2)
    return CandidateError("deferred", code, text.strip())
