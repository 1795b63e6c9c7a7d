"""Who is audited: the finetunes of the candidates' folder and of the null population's, a row each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ray_auditor.config import AuditConfig
from ray_auditor.hub import Admitted, BaseModel, Candidate, CandidateError, Refused, admit, list_folder
from ray_auditor.hub.lineage import judge_tags
from ray_auditor.hub.remote import Pinned
from ray_auditor.hub.source import Remote, find_candidates
from ray_auditor.ledger import Ledger
from ray_auditor.store import Unit

NULL_PREFIX = "null/"  # of the ids of null members

Role = Literal["candidate", "null"]
Found = Candidate | Refused
Entry = Found | Pinned


@dataclass(frozen=True)
class Row:
    """One listed finetune: admitted with its unit, or refused with its reason.

    `role` null: a benign finetune that candidates are compared with. It is audited as they are, but is none.
    """

    id: str
    kind: str | None
    status: str  # "admitted", or why it is not: rejected, skipped, deferred
    reason: str | None
    unit: Unit | None
    notes: tuple[str, ...] = ()
    declared_base: str | None = None  # by its adapter's config, or else by the hub's tags: a claim
    role: Role = "candidate"


def list_rows(config: AuditConfig, remote: Remote | None, ledger: Ledger) -> Iterator[tuple[Entry, Role]]:
    """Every candidate, then every null member, as their sources hold them.

    Args:
        config: Settings with every source given.
        remote: The candidates' source, as `open_remote` gave it.
        ledger: What earlier sweeps found out about it.

    Raises:
        ValueError: A source is not there, or is itself a finetune, or there is a null without members.
        SourceError: One stopped answering.
    """
    null = [] if config.null.path is None else list_finetunes(config.null.path, "null.path")
    if config.null.path is not None and not null:
        raise ValueError(
            f"null.path must hold at least one finetune, got {config.null.path!r}, which holds none; "
            "train some with `ray-auditor null`, or leave it out"
        )
    listing_path = ledger.path.with_name("listing.sqlite")
    for found in find_candidates(
        config.candidates, config.download, remote, listing_path=listing_path, ledger=ledger
    ):
        yield found, "candidate"
    for one in null:
        yield replace(one, id=NULL_PREFIX + one.id), "null"


def list_finetunes(path: str, setting: str) -> list[Found]:
    """What `list_folder` finds in the folder that `setting` names.

    Raises:
        ValueError: There is no such folder, or it is itself a finetune.
    """
    try:
        return list(list_folder(path))
    except ValueError as error:
        raise ValueError(str(error).replace("candidates.path", setting)) from error


def distinct_name(name: str, taken: set[str]) -> str:
    """A name no other row has; kept in `taken`. Who comes first keeps his own.

    A hub may have an author called `null`, and what is refused may print as something else does.
    """
    number = 1
    chosen = name
    while chosen in taken:
        number += 1
        chosen = f"{name}~{number}"
    taken.add(chosen)
    return chosen


def keep_apart(row: Row, before: Sequence[Row]) -> Row:
    """A null member with a candidate's weights is left out: nothing is compared with itself."""
    if row.role == "candidate" or row.unit is None:
        return row
    twins = [other.id for other in before if other.role == "candidate" and other.unit == row.unit]
    if not twins:
        return row
    reason = f"skipped:is_candidate: its weights are those of the candidate {twins[0]}"
    return replace(row, status="skipped", reason=reason, unit=None)


def with_claims(row: Row, pinned: Pinned, base: BaseModel, asked_for: str | None) -> Row:
    """An admitted row with what its source's tags say of its base, and what speaks against them.

    Args:
        row: As admission left it, which knows the files alone: they may lie under several names.
        pinned: The candidate of that name.
        base: What it is compared with.
        asked_for: The base's name in the question that found it.
    """
    if row.unit is None or not pinned.bases:
        return row
    conflicts = judge_tags(base, asked_for, pinned.bases, row.declared_base)
    # That no base is declared was said of the files; the tags declare one.
    notes = [note for note in row.notes if not note.startswith("lineage_inferred")]
    declared = row.declared_base or pinned.bases[0].partition(":")[2]
    return replace(row, notes=(*notes, *conflicts), declared_base=declared)


def admit_row(
    found: Found,
    role: Role,
    base: BaseModel,
    num_layers: int,
    max_lora_rank: int,
    base_unit: Unit,
) -> tuple[Row, Admitted | None]:
    """Admit one finetune: its row, with its unit beside the base's, or with the reason of its refusal."""
    if isinstance(found, Refused):
        return Row(found.id, None, found.status, found.reason, None, role=role), None
    try:
        admitted = admit(found, base, num_layers=num_layers, max_lora_rank=max_lora_rank)
    except CandidateError as error:
        return Row(found.id, found.kind, error.status, error.reason, None, role=role), None
    unit = replace(base_unit, candidate_key=admitted.content_sha256)
    return (
        Row(found.id, found.kind, "admitted", None, unit, admitted.notes, admitted.declared_base, role),
        admitted,
    )
