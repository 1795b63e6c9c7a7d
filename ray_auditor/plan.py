"""What a sweep will do, before anything runs: its inputs, its candidates, and the units they share."""

import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ray_auditor.calibration import recorded_fits
from ray_auditor.candidates_config import Read, Source
from ray_auditor.config import AuditConfig
from ray_auditor.engine import check_fit, num_layers_of
from ray_auditor.engine_class import engine_class
from ray_auditor.gate import Bounds, Fit, base_bounds, check_base, measure_fit
from ray_auditor.hub import Admitted, BaseModel, open_base
from ray_auditor.hub.remote import Pinned, SourceError
from ray_auditor.hub.source import open_remote
from ray_auditor.intake import Arrivals, Recall, admission_class_of, find_whole, waiting_row
from ray_auditor.lease import Lease, LeaseHeld
from ray_auditor.ledger import Ledger
from ray_auditor.report.printable import printable
from ray_auditor.roster import Found, Role, admit_row, keep_apart, list_rows
from ray_auditor.roster import Row as Row
from ray_auditor.sae import Sae, load_sae
from ray_auditor.store import Store, SuitePrompt, TokenRows, Unit
from ray_auditor.suites import Suites, load_suites
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
    base_unit: Unit
    replay_unit: Unit
    assignments: tuple[Assignment, ...]  # of finetunes; units with the same content share one
    ledger: Ledger
    arrivals: Arrivals | None = None  # candidates whose files lie elsewhere; their rows wait for them

    @property
    def k(self) -> int:
        """Features kept per token: `sae.k`, or all a TopK SAE can have active."""
        return self.base_unit.k

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
        """Keys of the distinct contents that are here, the base's own left out."""
        return frozenset(row.unit.key for row in self.rows if row.unit) - {self.base_unit.key}

    def unit_of(self, candidate_key: str) -> Unit:
        """The unit of other weights under everything else of this sweep."""
        return replace(self.base_unit, candidate_key=candidate_key)

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


def make_plan(config: AuditConfig, *, candidates: bool = True) -> Plan:
    """Read and check every input, list the finetunes, and admit what is safe and comparable.

    Args:
        config: Settings with every source given.
        candidates: Whether there are any to list; without, the plan is about the base alone.

    Raises:
        ValueError: An input is missing or does not fit another; nothing has run.
    """
    config.require_inputs(candidates=candidates)
    sae = load_sae(config.sae.path, config.sae.release, config.sae.sae_id, config.sae.hook_name)
    num_layers = num_layers_of(sae)
    base = open_base(str(config.base.model))
    check_fit(base, sae, config.sae.k)
    base = open_base(str(config.base.model), num_layers=num_layers)
    store = open_store(config)
    ledger = Ledger(store.root / "ledger.sqlite")
    remote = open_remote(config.candidates) if candidates else None
    found = list(list_rows(config, remote, ledger)) if candidates else []
    if remote is not None and (remote.origin.is_store or config.download.read is Read.ranges):
        found = [(one.in_ranges(num_layers) if isinstance(one, Pinned) else one, role) for one, role in found]
    suites = load_suites(config.suites, base.path)
    check_context(base, suites)
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
    rows: list[Row] = []
    assignments: dict[str, Assignment] = {}
    pending: list[Pinned] = []
    max_lora_rank = config.engine.max_lora_rank
    admission_class = admission_class_of(base, num_layers, max_lora_rank)
    recall = Recall(ledger, base_unit, admission_class, find_whole(store, ledger) | ledger.refusals().keys())

    def admit_one(one: Found, role: Role = "candidate") -> tuple[Row, Admitted | None]:
        return admit_row(one, role, base, num_layers, max_lora_rank, base_unit)

    for one, role in found:
        known, key = recall.row(one)
        admitted = None
        if known is not None:
            row = replace(known, role=role)
        elif isinstance(one, Pinned):
            row = waiting_row(one)
            pending.append(one)
        else:
            row, admitted = admit_one(one, role)
            recall.remember(key, row)
        row = keep_apart(row, rows)
        rows.append(row)
        if admitted is not None and row.unit is not None and row.unit != base_unit:
            assignments.setdefault(row.unit.key, Assignment(row.unit, admitted))
    if len({row.id for row in rows}) != len(rows):
        raise ValueError("candidates.path must hold folders with distinct names once they are made printable")
    ledger.commit()
    store.write_suites(suites.key, _stored_prompts(suites))
    return Plan(
        config=config,
        base=base,
        sae=sae,
        suites=suites,
        store=store,
        rows=tuple(rows),
        base_unit=base_unit,
        replay_unit=replace(base_unit, candidate_key=base.content_sha256 + REPLAY),
        assignments=tuple(assignments.values()),
        ledger=ledger,
        arrivals=Arrivals(pending, remote, recall, admit_one, config) if remote and pending else None,
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


def open_store(config: AuditConfig) -> Store:
    """Open `out_dir`'s store.

    Raises:
        ValueError: `out_dir` cannot be written.
    """
    try:
        return Store(Path(config.out_dir) / "store")
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


def print_plan(config: AuditConfig) -> int:
    """The verb `plan`: what a sweep would do, candidate by candidate. Runs nothing.

    Returns:
        0, 3 when there is nothing to audit, or 2 when the source does not answer or a sweep is reading it.
    """
    config.require_inputs()
    is_folder = config.candidates.source is Source.folder
    try:
        with nullcontext() if is_folder else Lease(Path(config.out_dir)):  # a listing has one reader
            plan = make_plan(config)
    except (LeaseHeld, SourceError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    console = Console(emoji=False)
    title = f"{len(plan.candidates)} candidates" + (f", {len(plan.nulls)} null members" if plan.nulls else "")
    table = Table("candidate", "kind", "plan", "why", title=title)
    waiting = {one.id for one in plan.arrivals.pending} if plan.arrivals else set()
    todo = {task.unit.key for task in plan.assignments if not plan.store.has(task.unit.key)}
    for row in plan.rows:
        what = row.status if row.unit is None else "audit" if row.unit.key in todo else "done already"
        what = "fetch, admit, audit" if row.id in waiting else what
        table.add_row(
            *(printable(text or "") for text in (row.id, row.kind, what, row.reason or "; ".join(row.notes)))
        )
    console.print(table, markup=False)
    tokens = plan.suites.num_tokens
    if plan.arrivals is not None:
        console.print(
            f"{len(plan.arrivals.groups())} distinct candidates to fetch, "
            f"{plan.arrivals.num_bytes} bytes at most",
            markup=False,
        )
    console.print(
        f"{len(todo)} of {len(plan.units)} distinct finetunes to audit, {tokens} tokens each "
        f"({tokens * len(todo)} in all), hook {plan.sae.hook_name}, k {plan.k}",
        markup=False,
    )
    for status, count in sorted(Counter(row.status for row in plan.rows).items()):
        console.print(f"  {count:>6} {status}", markup=False)
    return 0 if waiting or any(row.unit for row in plan.candidates) else 3
