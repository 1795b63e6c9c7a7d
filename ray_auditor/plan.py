"""What a sweep will do, before anything runs: its inputs, its candidates, and the units they share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_auditor.budget import Limits, Meter, limits_of, num_devices
from ray_auditor.calibration import recorded_fits
from ray_auditor.candidates_config import Read
from ray_auditor.config import AuditConfig
from ray_auditor.engine import check_fit, num_layers_of
from ray_auditor.engine_class import device_name, engine_class
from ray_auditor.gate import Bounds, Fit, base_bounds, check_base, measure_fit
from ray_auditor.hub import Admitted, BaseModel, CandidateError, lies_below_hook, open_base
from ray_auditor.hub.remote import Pinned
from ray_auditor.hub.source import Remote, open_remote
from ray_auditor.intake import Arrivals, Recall, admission_class_of, find_whole, waiting_row
from ray_auditor.ledger import Ledger
from ray_auditor.progress_line import say_how_far
from ray_auditor.roster import (
    Entry,
    Found,
    Role,
    admit_row,
    distinct_name,
    keep_apart,
    list_rows,
    with_claims,
)
from ray_auditor.roster import Row as Row
from ray_auditor.sae import Sae, load_sae
from ray_auditor.store import Store, SuitePrompt, TokenRows, Unit
from ray_auditor.suites import Suites, load_suites
from ray_auditor.usage import NOTHING, read_usage
from ray_auditor.work import Work
from ray_auditor.worker import Assignment, WorkerSpec

REPLAY = "+replay"  # marks the base's second pass, in another batching, that measures the noise floor


@dataclass(frozen=True)
class Plan:
    """The inputs of a sweep, one row a finetune, one assignment a unit."""

    config: AuditConfig
    base: BaseModel
    sae: Sae
    suites: Suites
    store: Store
    rows: tuple[Row, ...]
    found: tuple[Entry, ...]  # what each row was made of
    base_unit: Unit
    replay_unit: Unit
    assignments: tuple[Assignment, ...]  # of finetunes; units with the same content share one
    ledger: Ledger
    meter: Meter  # what a sweep of this plan uses, and may use
    remote: Remote | None = None  # where candidates come from, unless from a folder
    arrivals: Arrivals | None = None  # candidates whose files lie elsewhere; their rows wait for them
    work: Work = field(default_factory=Work)  # what the units that a sweep of this plan ran took

    @property
    def k(self) -> int:
        """Features kept per token: `sae.k`, or all a TopK SAE can have active."""
        return self.base_unit.k

    def describe_work(self) -> dict[str, Any] | None:
        """What the units that ran took, and what was fetched for them; None when none ran."""
        return self.work.describe()

    @property
    def candidates(self) -> tuple[Row, ...]:
        """The rows that are audited for their own sake."""
        return tuple(row for row in self.rows if row.role == "candidate")

    @property
    def nulls(self) -> tuple[Row, ...]:
        """The rows that candidates are compared with."""
        return tuple(row for row in self.rows if row.role == "null")

    @cached_property
    def units(self) -> frozenset[str]:
        """Keys of the distinct contents that are here and not put off, the base's own left out."""
        found = frozenset(row.unit.key for row in self.rows if row.unit and row.status == "admitted")
        return found - {self.base_unit.key}

    def unit_of(self, candidate_key: str) -> Unit:
        """The unit of other weights under everything else of this sweep."""
        return replace(self.base_unit, candidate_key=candidate_key)

    @cached_property
    def waiting(self) -> dict[str, str]:
        """By row, the key of what it waits for: of its files, or of the unit that is to be computed."""
        files = {one.id: one.key for one in self.arrivals.pending} if self.arrivals else {}
        todo = {task.unit.key for task in self.assignments}
        units = {row.id: row.unit.key for row in self.rows if row.unit and row.unit.key in todo}
        return files | units

    def without(self, refusals: Mapping[str, CandidateError]) -> "Plan":
        """The plan with some of its work, by key, put off."""
        rows = [
            replace(row, status=refusal.status, reason=refusal.reason, unit=None)
            if (refusal := refusals.get(self.waiting.get(row.id, "")))
            else row
            for row in self.rows
        ]
        assignments = tuple(task for task in self.assignments if task.unit.key not in refusals)
        arrivals = self.arrivals and self.arrivals.without(refusals)
        return replace(self, rows=tuple(rows), assignments=assignments, arrivals=arrivals)

    def worker_spec(self, num_threads: int) -> WorkerSpec:
        """What every worker of this sweep is started with."""
        return WorkerSpec(
            self.base,
            self.base_unit,
            self.sae,
            self.suites,
            self.k,
            self.config.engine,
            self.store.root.resolve(),
            num_threads,
        )


def make_plan(
    config: AuditConfig,
    *,
    candidates: bool = True,
    create: bool = True,
    find: Callable[[Unit], Iterable[tuple[Entry, Role]]] | None = None,
    share: float | None = None,
) -> Plan:
    """Read and check every input, list the finetunes, and admit what is safe and comparable.

    Args:
        config: Settings with every source given.
        candidates: Whether there are any to list; without, the plan is about the base alone.
        create: Whether the store is made when it is not there, and the suites are kept in it.
        find: Gives the finetunes, from the base's unit, in place of the sources that the settings name.
        share: Of every suite's prompts; None for all.

    Raises:
        ValueError: An input is missing or does not fit another; nothing has run.
    """
    config.require_inputs(candidates=candidates)
    limits = limits_of(config.budget, device_name(config)) if candidates else Limits()
    used = read_usage(Path(config.out_dir)) if limits.given else NOTHING
    meter = Meter(limits, num_devices(config.cluster), used=used)
    sae = load_sae(config.sae.path, config.sae.release, config.sae.sae_id, config.sae.hook_name)
    num_layers = num_layers_of(sae)
    base = open_base(str(config.base.model))
    check_fit(base, sae, config.sae.k)
    base = open_base(str(config.base.model), num_layers=num_layers)
    suites = load_suites(config.suites, base.path)
    suites = suites if share is None else suites.screened(share)
    check_context(base, suites)
    store = open_store(config, create=create)
    ledger = Ledger(Path(config.out_dir) / "ledger.sqlite")
    remote = open_remote(config.candidates) if candidates else None
    base_unit = Unit(
        candidate_key=base.content_sha256,
        base_key=base.key,
        sae_key=sae.key,
        hook_name=sae.hook_name,
        suites_key=suites.key,
        k=min(config.sae.k, sae.encoder.max_active or config.sae.k),
        d_sae=sae.d_sae,
        engine_class=engine_class(config),
    )
    listing = find(base_unit) if find else list_rows(config, remote, ledger) if candidates else ()
    found = list(say_how_far(listing, "finetunes listed"))
    if remote is not None and (remote.origin.is_store or config.download.read is Read.ranges):
        found = [(one.in_ranges(num_layers) if isinstance(one, Pinned) else one, role) for one, role in found]
    rows: list[Row] = []
    names: set[str] = set()
    assignments: dict[str, Assignment] = {}
    pending: list[Pinned] = []
    max_lora_rank = config.engine.max_lora_rank
    admission_class = admission_class_of(base, num_layers, max_lora_rank)
    recall = Recall(ledger, base_unit, admission_class, find_whole(store, ledger) | ledger.refusals().keys())

    def admit_one(one: Found, role: Role = "candidate") -> tuple[Row, Admitted | None]:
        return admit_row(one, role, base, num_layers, max_lora_rank, base_unit)

    def claim(row: Row, one: Pinned) -> Row:
        return with_claims(row, one, base, config.candidates.base_model)

    for one, role in say_how_far(found, f"of {len(found)} finetunes admitted, known or refused"):
        known, key = recall.row(one)
        admitted = None
        if known is not None:
            row = replace(known, role=role)
            row = claim(row, one) if isinstance(one, Pinned) else row
        elif isinstance(one, Pinned):
            row = waiting_row(one)
            pending.append(one)
        else:
            row, admitted = admit_one(one, role)
            recall.remember(key, row)
        row = replace(keep_apart(row, rows), id=distinct_name(row.id, names))
        rows.append(row)
        is_new = row.unit is not None and row.unit != base_unit and row.unit.key not in recall.whole
        if admitted is not None and row.unit is not None and is_new:
            assignments.setdefault(row.unit.key, Assignment(row.unit, admitted))
    ledger.commit()
    if create:
        store.write_suites(suites.key, _stored_prompts(suites))
    return Plan(
        config=config,
        base=base,
        sae=sae,
        suites=suites,
        store=store,
        rows=tuple(rows),
        found=tuple(one for one, _ in found),
        base_unit=base_unit,
        replay_unit=replace(base_unit, candidate_key=base.content_sha256 + REPLAY),
        assignments=tuple(assignments.values()),
        ledger=ledger,
        meter=meter,
        remote=remote,
        arrivals=Arrivals(
            pending, remote, recall, admit_one, config, meter, share_below(base, num_layers), claim
        )
        if remote and pending
        else None,
    )


def gate_base(plan: Plan, rows: TokenRows) -> tuple[Fit, Bounds]:
    """How the SAE fits the base, and what that is held to.

    Args:
        plan: The sweep.
        rows: Of the base.
    """
    fit = measure_fit(rows)
    return fit, base_bounds(
        k=plan.k,
        max_active=plan.sae.encoder.max_active,
        found=fit,
        max_fvu=plan.config.sae.max_fvu,
        recorded=recorded_fits(plan.store.root, plan.base_unit),
        explained_variance=plan.sae.explained_variance,
        expected_l0=plan.sae.expected_l0,
    )


def check_gate(plan: Plan) -> None:
    """Refuse an SAE that does not fit its base; nothing to say before the base's unit is committed.

    Raises:
        ValueError: It does not fit.
    """
    if plan.store.has(plan.base_unit.key):
        check_base(*gate_base(plan, plan.store.read_rows(plan.base_unit.key)), plan.sae.hook_name)


def share_below(base: BaseModel, num_layers: int) -> float:
    """The share of the base's bytes that an audit of so many layers reads."""
    sizes = {name: spec.end - spec.start for name, spec in base.tensors.items()}
    return sum(size for name, size in sizes.items() if lies_below_hook(name, num_layers)) / sum(
        sizes.values()
    )


def check_context(base: BaseModel, suites: Suites) -> None:
    """Check that every prompt fits the base's context.

    Raises:
        ValueError: One does not.
    """
    context = base.config.get("max_position_embeddings")
    longest = max(len(prompt.token_ids) for suite in suites.suites for prompt in suite.prompts)
    if context is not None and longest > context:
        raise ValueError(
            f"suites.max_tokens must be at most {context}, the base's max_position_embeddings, for prompts "
            f"of {longest} tokens; lower suites.max_tokens"
        )


def open_store(config: AuditConfig, *, create: bool = True) -> Store:
    """Open `out_dir`'s store, or only look into it.

    Raises:
        ValueError: `out_dir` cannot be written.
    """
    try:
        return Store(Path(config.out_dir) / "store", read_only=not create)
    except OSError as error:
        raise ValueError(
            f"out_dir must be a folder that can be written, got {config.out_dir}: {error}"
        ) from error


def _stored_prompts(suites: Suites) -> list[SuitePrompt]:
    return [
        SuitePrompt(
            suite_id=suite_id,
            suite=suite.name,
            prompt=number,
            text=prompt.text,
            token_ids=prompt.token_ids.tolist(),
            content=prompt.content.tolist(),
            token_texts=prompt.token_texts,
        )
        for suite_id, suite in enumerate(suites.suites)
        for number, prompt in enumerate(suite.prompts)
    ]
