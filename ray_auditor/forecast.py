"""What a plan will do and take, before any of it is done: rows, bytes, requests, hours, price, disk."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_auditor.budget import Job, defer_beyond, limits_of, num_devices
from ray_auditor.config import Dtype
from ray_auditor.cost import CostModel, benchmark_cost, measured_cost
from ray_auditor.engine_class import device_name
from ray_auditor.history import History
from ray_auditor.hub.rate_limit import Policy
from ray_auditor.intake import FETCH_RATE, cache_root
from ray_auditor.plan import Plan
from ray_auditor.stages import Stage, stages_of

RATE_LIMITS = "rate_limits"  # the fact that holds what a server allowed when it last said so
API, RESOLVERS = "api", "resolvers"  # what a hub calls the two kinds of requests
ROW_BYTES = 27  # of a scored token on disk, features left out: an upper bound


@dataclass(frozen=True)
class Span:
    """An expected value, and between which the same work came to lie for single units; None: not known."""

    low: float | None
    expected: float
    high: float | None

    def scaled(self, factor: float) -> "Span":
        """The same in another unit."""
        low, high = self.low, self.high
        return Span(low and low * factor, self.expected * factor, high and high * factor)


@dataclass(frozen=True)
class Requests:
    """Requests of one kind: made for this plan, needed to carry it out, and what the server allows."""

    made: int
    needed: int
    quota: int | None  # a window; None: the server never said
    window_s: int | None
    seconds: int | None  # that `needed` takes at least; None: not known


@dataclass(frozen=True)
class Forecast:
    """docs/schema.md has every field."""

    actions: dict[str, int]
    reasons: dict[str, int]
    refused: dict[str, int]
    num_units: int
    tokens_per_unit: int
    bytes_to_move: int
    files_to_move: int
    move_s: float | None
    requests: dict[str, Requests]
    device: str
    num_devices: float
    wall_s: Span | None
    gpu_hours: Span | None
    price: Span | None
    cost_source: str | None
    disk: dict[str, int]
    screen: dict[str, float | None] | None  # the stage before the one that `num_units` and the like are of


def cost_of(plan: Plan) -> CostModel | None:
    """What units cost: measured, or by the benchmark that the settings name; None: not known yet."""
    measured = measured_cost(plan.store, plan.base_unit)
    path = plan.config.budget.benchmark
    return measured or (benchmark_cost(path) if path else None)


def within_budget(plan: Plan) -> Plan:
    """The plan with what does not fit into its budget deferred.

    Null members come first, since every candidate is held to them, then candidates in the order of listing.

    Raises:
        ValueError: Not even the base fits.
    """
    config = plan.config
    limits = limits_of(config.budget, device_name(config))
    jobs, model = jobs_of(plan), cost_of(plan)
    if not limits.given or not jobs:
        return plan
    used = plan.meter.usage
    if model is None:
        return plan.without(defer_beyond(jobs, limits, used=used))
    per_unit = num_devices(config.cluster) / config.cluster.num_workers
    stages = stages_of(plan, jobs).stages
    seconds: dict[str, float] = {}
    for stage in stages:
        seconds |= {key: s + seconds.get(key, 0.0) for key, s in stage.job_seconds(model).items()}
    upfront_s = sum(stage.upfront_seconds(model) for stage in stages) * num_devices(config.cluster)
    if upfront_s > limits.device_s:
        raise ValueError(
            f"budget.{limits.device_setting} must allow for the workers' start and the base's own runs, "
            f"about {upfront_s / 3600:.3g} GPU hours, got {limits.given[limits.device_setting]:g}; raise it"
        )
    others_s = sum(seconds[key] for key in seconds.keys() - {job.key for job in jobs})
    before_s = used.device_s + upfront_s + per_unit * others_s
    return plan.without(
        defer_beyond(
            jobs,
            limits,
            used=replace(used, device_s=before_s),
            seconds_of=lambda job: per_unit * seconds[job.key],
        )
    )


def jobs_of(plan: Plan) -> list[Job]:
    """What is to be done, each once: null members first, then candidates as they were listed."""
    pending = {one.key: one for one in plan.arrivals.pending} if plan.arrivals else {}
    todo = {task.unit.key: task for task in plan.assignments}
    ordered = [row.id for row in (*plan.nulls, *plan.candidates) if row.id in plan.waiting]
    jobs = []
    for key in dict.fromkeys(plan.waiting[name] for name in ordered):
        if key in pending:
            one = pending[key]
            files = plan.arrivals.files_of([one]) if plan.arrivals else {}
            jobs.append(Job(key, one.num_weight_bytes, files))
        else:
            jobs.append(Job(key, todo[key].num_bytes))
    return jobs


def actions_of(plan: Plan) -> dict[str, str]:
    """By row: `fetch`, `audit`, `nothing` (its unit is there), `defer` (the budget), or `refuse`."""
    pending = {one.id for one in plan.arrivals.pending} if plan.arrivals else set()
    budget = {f"deferred:{setting}:" for setting in ("max_gpu_hours", "max_download_bytes", "max_price")}
    found = {}
    for row in plan.rows:
        if row.id in plan.waiting:
            found[row.id] = "fetch" if row.id in pending else "audit"
        elif row.unit is not None:
            found[row.id] = "nothing"
        else:
            is_budget = any((row.reason or "").startswith(prefix) for prefix in budget)
            found[row.id] = "defer" if is_budget else "refuse"
    return found


def reasons_of(plan: Plan) -> dict[str, str]:
    """By candidate, why it is where it is: the words of `explain`, or `changed files`, not read yet."""
    history = History(plan.ledger, plan.base_unit, plan.candidates)
    known = plan.arrivals.recall.contents(plan.arrivals.pending) if plan.arrivals else {}
    whys = history.whys(known)
    pending = {one.id for one in plan.arrivals.pending} if plan.arrivals else set()
    unread = {name for name in pending if not known.get(name)}
    return {
        name: why.replace("changed weights", "changed files") if name in unread else why
        for name, why in whys.items()
    }


def make_forecast(plan: Plan) -> Forecast:
    """Foresee what a sweep of this plan takes; asks nobody, moves nothing."""
    config, cluster = plan.config, plan.config.cluster
    actions = actions_of(plan)
    jobs, model, device = jobs_of(plan), cost_of(plan), device_name(config)
    files = plan.arrivals.files if plan.arrivals else {}
    rate = plan.ledger.fact(FETCH_RATE)
    move_s = sum(files.values()) / json.loads(rate) if rate and files else (None if files else 0.0)
    found = stages_of(plan, jobs)
    *screens, whole = found.stages
    wall = Span(0.0, 0.0, 0.0) if not jobs else None
    if jobs and model:
        wall = _wall_seconds(model, found.stages, cluster.num_workers, move_s or 0.0)
    hours = wall.scaled(num_devices(cluster) / 3600) if wall else None
    price = config.budget.prices.get(device)
    return Forecast(
        actions=dict(Counter(actions[row.id] for row in plan.candidates)),
        reasons=dict(Counter(reasons_of(plan).values())),
        refused=dict(Counter(row.status for row in plan.candidates if actions[row.id] == "refuse")),
        num_units=whole.num_units,
        tokens_per_unit=whole.tokens,
        bytes_to_move=sum(files.values()),
        files_to_move=len(files),
        move_s=move_s,
        requests=_requests(plan, len(files)),
        device=device,
        num_devices=num_devices(cluster),
        wall_s=wall,
        gpu_hours=hours,
        price=hours.scaled(price) if hours and price is not None else None,
        cost_source=model.source if model else None,
        disk=_disk(plan, model, found.stages, sum(files.values())),
        screen={
            "num_units": screens[0].num_units,
            "tokens_per_unit": screens[0].tokens,
            "num_cleared": sum(odds == 0 for odds in whole.odds.values()),
            "going_on": found.going_on,
        }
        if screens
        else None,
    )


def keep_rate_limits(plan: Plan) -> None:
    """Remember what the server said that it allows, for the next plan."""
    if plan.remote is not None and plan.remote.limit.policies:
        known = _policies(plan) | plan.remote.limit.policies
        plan.ledger.keep_fact(RATE_LIMITS, json.dumps({name: asdict(one) for name, one in known.items()}))


def _policies(plan: Plan) -> dict[str, Policy]:
    known = json.loads(plan.ledger.fact(RATE_LIMITS) or "{}")
    return {name: Policy(**fields) for name, fields in known.items()}


def _requests(plan: Plan, num_files: int) -> dict[str, Requests]:
    if plan.remote is None or plan.remote.endpoint is None:
        return {}
    policies = _policies(plan) | plan.remote.limit.policies
    found = {}
    for kind, needed in ((API, 0), (RESOLVERS, num_files)):
        policy = policies.get(kind)
        found[kind] = Requests(
            made=plan.remote.limit.num_taken[kind],
            needed=needed,
            quota=policy.quota if policy else None,
            window_s=policy.window_s if policy else None,
            seconds=policy.seconds_for(needed) if policy else (None if needed else 0),
        )
    return found


def _wall_seconds(model: CostModel, stages: Sequence[Stage], num_workers: int, move_s: float) -> Span:
    """Seconds from the workers' start to the last unit; the devices are held all the while."""
    spans = []
    for stage in stages:
        if upfront_s := stage.upfront_seconds(model):
            each = stage.job_seconds(model).values()
            spans.append(upfront_s - model.start_s + max(sum(each) / num_workers, *each, 0.0))

    def wall(factor: float) -> float:
        if not spans:
            return 0.0
        still_moving_s = max(0.0, move_s - factor * spans[0])  # what moves, moves beside the first
        return sum(model.start_s + factor * span for span in spans) + still_moving_s

    low, high = model.low, model.high
    return Span(low and wall(low), wall(1.0), high and wall(high))


def _disk(plan: Plan, model: CostModel | None, stages: Sequence[Stage], bytes_to_move: int) -> dict[str, int]:
    """What the store and the cache grow by, at most, and what is free where they lie."""
    unit, engine, download = plan.base_unit, plan.config.engine, plan.config.download
    features = plan.k * ((2 if unit.d_sae <= 1 << 16 else 4) + 4)
    per_token = model.shard_bytes if model and model.shard_bytes else ROW_BYTES + features
    width = 4 if engine.dtype is Dtype.float32 else 2
    store = 0
    for stage in stages:
        store += int(stage.num_units * stage.tokens * per_token)
        store += stage.tokens * plan.sae.d_in * width if stage.base_runs else 0
    return {
        "store_bytes": store,
        "cache_bytes": min(bytes_to_move, download.max_cache_bytes),
        "free_bytes_store": _free(Path(plan.config.out_dir)),
        "free_bytes_cache": _free(cache_root(plan.config)),
        "min_free_bytes": download.min_free_bytes,
    }


def _free(folder: Path) -> int:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def to_json(forecast: Forecast) -> Mapping[str, Any]:
    """The forecast as the plan's file carries it."""
    return asdict(forecast)
